"""The head of a reward model: one number for a text, from what the model holds at its last token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from strop.errors import ModelError

HEAD = "score"  # as the sequence classifiers of transformers call it
TASK = "SEQ_CLS"
START = 0.02  # standard deviation at the start, as transformers has it


def check_head(config: Any) -> None:
    """Raises ModelError for a family of which transformers has no sequence classifier: nothing could load the head."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        what = f"{config.model_type}: transformers has no AutoModelForSequenceClassification of this family"
        raise ModelError(what, fix="choose another base for a reward model")


def add_head(model: nn.Module) -> None:
    """Gives a causal language model a score head, drawn anew; peft trains and saves a copy of it."""
    output = cast(Any, model).get_output_embeddings().weight
    head = nn.Linear(output.shape[1], 1, bias=False, device=output.device, dtype=torch.float32)
    if not output.is_meta:
        nn.init.normal_(head.weight, std=START)
    model.add_module(HEAD, head.requires_grad_(False))


def head_of(model: nn.Module) -> nn.Module | None:
    """The score head of a model with adapters; None where it has none."""
    found: nn.Module | None = getattr(cast(Any, model).get_base_model(), HEAD, None)
    return found
