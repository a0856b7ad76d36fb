"""Give a merged classifier the config of transformers, and compare its class probabilities with the adapter's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from strop.data.types import Classes, Example, LabelledText
from strop.engine.step import compute_scores
from strop.engine.train.plain import PlainLoss
from strop.exporting.parity import Limit, Parity, compare, compute_in_fp32
from strop.models.adapter_config import SCORE_HEAD, WEIGHTS_FILE
from strop.models.lora import find_score_head

SCORE_WEIGHT = f"{SCORE_HEAD}.weight"


def read_score_weight(folder: Path) -> Tensor:
    """Return the weight of an adapter's score head, (C, h)."""
    weights = load_file(folder / WEIGHTS_FILE)
    return next(weight for name, weight in weights.items() if name.endswith(f".{SCORE_WEIGHT}"))


def set_classes(config: Any, tokenizer: Any, classes: Classes) -> None:
    """Change a base's config and tokenizer to those of transformers' sequence classifier."""
    config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__name__]
    config.id2label = dict(enumerate(classes.names))
    config.label2id = {name: i for i, name in enumerate(classes.names)}
    config.problem_type = "multi_label_classification" if classes.several else "single_label_classification"
    # transformers scores the last token that is not padding, so no text may end with the padding token.
    last = tokenizer("a")["input_ids"][-1]
    candidates = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
    known = [token for token in candidates if token is not None and tokenizer.convert_tokens_to_ids(token) != last]
    if known:
        tokenizer.pad_token = known[0]
        config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id


def compare_classifiers(
    load_tuned: Callable[[], Any], folder: Path, dtype: torch.dtype, texts: Sequence[LabelledText], classes: Classes,
    limit: Limit,
) -> Parity:  # fmt: skip
    """Compare a merged classifier with the adapter on its base by the probabilities of classes.

    The positions of the result are texts; with several labels, they are pairs of a text and a class.
    """
    examples = [text.examples[0] for text in texts]

    def reference() -> _ClassDistributions:
        module = load_tuned()
        step, head = PlainLoss(module), find_score_head(module)
        assert head is not None
        return _ClassDistributions(lambda example: compute_scores(step, head, [example])[0], examples, classes)

    def merged() -> _ClassDistributions:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, local_files_only=True)
        model = compute_in_fp32(cast(Any, model).eval())
        model.score.float()

        def compute(example: Example) -> Tensor:
            logits: Tensor = model(input_ids=torch.from_numpy(example.ids.astype(np.int64))[None]).logits[0]
            return logits

        return _ClassDistributions(compute, examples, classes)

    return compare(reference, merged, [_as_row(i, text, classes) for i, text in enumerate(texts)], limit)


def _as_row(index: int, text: LabelledText, classes: Classes) -> Example:
    """Return a row whose first "token" is the index of a text, and whose others are its labels."""
    several = [int(i in text.classes) for i in range(len(classes.names))]
    labels = several if classes.several else list(text.classes)
    weights = np.array([0.0, *[1.0] * len(labels)], np.float32)
    return Example(np.array([index, *labels], np.int32), weights, text.file, text.line)


class _ClassDistributions:
    """A classifier as `parity.compare` reads it. compute: returns the scores (C,) of an example."""

    def __init__(self, compute: Callable[[Example], Tensor], examples: Sequence[Example], classes: Classes) -> None:
        self._compute, self._examples, self._several = compute, examples, classes.several

    def log_probabilities(self, row: Example) -> Tensor:
        """Return (1, C), or (C, 2) with several labels."""
        with torch.no_grad():
            scores = self._compute(self._examples[int(row.ids[0])]).float().cpu()
        if self._several:
            return torch.stack([logsigmoid(-scores), logsigmoid(scores)], 1)
        return log_softmax(scores[None], 1)
