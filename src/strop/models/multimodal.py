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
