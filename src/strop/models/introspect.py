"""A model's shape by the model itself, built without weights: exact for every family that transformers knows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from strop.errors import ModelError
from strop.models.families.shape import EXPERTS, LinearKind, LinearShape, ModelShape, ModelInfo
from strop.models.load import load_config, model_without_weights
from strop.models.lora import check_modules_to_save, linear_kinds
from strop.models.source import Source, prequantized

SPARE_POSITIONS = 2  # in front of the first, which OPT and its kin leave out
AHEAD = "its tokens see those that stand behind them, and so what they are to predict"


def shape_from_model(config: Mapping[str, Any], stored: Mapping[str, Any], bare: nn.Module) -> ModelShape:
    """By the config (`stored`: as on disk); the linear layers of a family that is not in the table by the model."""
    whole: Any = bare
    embedding, lists = whole.get_input_embeddings(), [m for m in bare.modules() if isinstance(m, nn.ModuleList)]
    known = {
        "hidden_size": embedding.embedding_dim,
        "vocab_size": embedding.num_embeddings,
        "num_hidden_layers": max([1, *map(len, lists)]),
    }
    try:
        shape = ModelShape.of(config)
    except ModelError:  # its config has other names for its sizes
        shape = ModelShape.of({**known, "model_type": config.get("model_type")})
    shape = replace(shape, prequantized=prequantized(stored), learned=learned_positions(bare) is not None)
    if shape.known:
        return shape
    active = next((linear.active for linear in shape.in_experts), 1.0)
    kinds = [kind for kind in linear_kinds(bare) if kind.sets or kind.type == EXPERTS]
    biased = {
        name.rpartition(".")[2] for name, module in bare.named_modules() if getattr(module, "bias", None) is not None
    }
    linears = tuple(_linear(kind, shape.layers, active, kind.name in biased) for kind in kinds)
    shape = replace(shape, linears=linears or shape.linears)
    biases = sum(weight.numel() for name, weight in bare.named_parameters() if name.endswith(".bias"))  # as peft does
    return replace(shape, other_biases=max(0, biases - shape.biases))


def why_not_causal(config: Any) -> str | None:
    """Why a model of this config predicts nothing: one of BERT's kind that is not told to be a decoder. (GPT-NeoX is
    one, whatever it is told.)"""
    kind = str(config.model_type)
    if getattr(config, "is_decoder", None) is not False or kind.startswith("gpt_neox"):
        return None
    return f"{kind}: {AHEAD}"


def refine_with_model(found: ModelInfo, *, whole_modules: Sequence[str] = (), predicts: bool = True) -> ModelInfo:
    """What was looked at from outside, by the model itself, where transformers builds it from the config alone.

    whole_modules: to be trained in full; predicts: whether tokens are what it is trained on. Raises ModelError and
    RecipeError for modules that cannot be.
    """
    config = found.config
    if config is None:
        return found
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            whole = load_config(Source(found.name, "folder", Path(folder)))
        bare = model_without_weights(whole)
    except ModelError as error:  # transformers has no such language model: sizes are those that its config names
        return replace(found, refused=error.lines()[0])
    check_modules_to_save(bare, whole_modules)
    if predicts and (why := why_not_causal(bare.config)):
        found = replace(found, refused=why)
    if found.shape.known:
        return found
    shape = shape_from_model(whole.to_dict(), config, bare)
    return replace(found, shape=shape, parameters=count_parameters(bare))


def _linear(kind: LinearKind, layers: int, active: float, bias: bool) -> LinearShape:
    experts = kind.type == EXPERTS
    return LinearShape(
        kind.name, kind.in_features, kind.out_features, bias, kind.count / layers, active if experts else 1, kind.sets,
        kind.kept_16_bit is not None,
    )  # fmt: skip


def max_positions(model: Any) -> int | None:
    """How many tokens a model was made for, where its config says."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def learned_positions(model: Any) -> int | None:
    """How many positions a model has that learned a vector for each (GPT-2, OPT): a longer text has none. None for
    models that turn or bend attention by distance instead."""
    count = max_positions(model)
    if count is None or getattr(model.config.get_text_config(), "rope_parameters", None):
        return None
    tokens = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return count if any(count <= table.num_embeddings <= count + SPARE_POSITIONS for table in tables) else None


def count_parameters(bare: nn.Module) -> int:
    return sum(weight.numel() for weight in bare.parameters())


# ---- from strop.models.multimodal ----
"""The text half of a model that also sees or hears: where it lies in the module, and what is outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def text_path(model: nn.Module) -> str:
    """The path of the text half, with a dot behind it; "" where the whole model is one."""
    whole: Any = model
    text = whole.config.get_text_config(decoder=True)
    if text is whole.config or not whole.config.sub_configs:
        return ""
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and module.config is text:
            return f"{path}."
    return ""


def in_text(model: nn.Module) -> Callable[[str], bool]:
    """Tells of a module or weight, by its name, whether text passes through it: the text half, and the output head."""
    inside, head = text_path(model), model.get_output_embeddings()  # type: ignore[operator]
    heads = tuple(path for path, module in model.named_modules() if module is head and head is not None)
    return lambda name: name.startswith((inside, *heads)) if inside else True


def text_forward(model: nn.Module) -> None:
    """Lets text through models whose class fails on it: Llama 4's, up to transformers 5.24 at least, reads
    `image_outputs` of a result that has none. Its text half is a language model with a head of its own."""
    whole: Any = model
    if type(model).__name__ != "Llama4ForConditionalGeneration":
        return

    def forward(input_ids: Any = None, pixel_values: Any = None, **given: Any) -> Any:
        assert pixel_values is None
        return whole.language_model(input_ids=input_ids, **given)

    whole.forward = forward
