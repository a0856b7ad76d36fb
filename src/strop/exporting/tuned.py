"""A tuned model as what it is made of: a base, what the adapter makes of it, and rows to measure on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strop.data.types import Example
from strop.errors import ModelError
from strop.exporting.merge import Trained, better_base, rows_to_measure, tuned_model
from strop.exporting.weight_changes import changes
from strop.models.adapter_config import read_adapter_config
from strop.models.adapters import (
    adapter_folder,
    base_source,
    check_adapter_base,
    check_adapter_kind,
    check_adapter_weights,
    tokenizer_source,
)
from strop.models.load import load_base
from strop.models.source import Source, locate, quantization_method
from strop.models.tokenizer import config_folder, load_tokenizer, trained_token_rows


@dataclass(frozen=True)
class Tuned:
    """base: to merge into, original or dequantized; base_losses: of the adapter on either, where both were tried.

    folder: of the adapter; None for a model without one. trained: how that base is to be rounded.
    """

    source: Source
    folder: Path | None
    trained: Trained
    base: str
    base_losses: dict[str, float]
    examples: list[Example]

    @staticmethod
    def read(name: str, data: str | None, *, base: str | None = None, measure: bool = True) -> Tuned:
        """Of a run or adapter folder, or a model. data: rows to measure on; default: the run's own. base: original,
        where the adapter will lie on that; default: the better one, or, without measuring, what it was trained on.

        Raises InputError for what cannot be merged or measured.
        """
        folder = adapter_folder(name)
        source = locate(name) if folder is None else base_source(folder)
        if quantization_method(source.config()):
            raise ModelError(f"{source.name}: has no 16-bit weights to merge into", fix="serve the adapter on its base")
        if folder is None:
            rows = rows_to_measure(name, config_folder(source), source, data) if measure else []
            return Tuned(source, None, Trained("none", True, torch.float32), "original", {}, rows)
        if trained_token_rows(read_adapter_config(folder)):
            what = f"{name}: brings tokens that its base does not have"
            raise ModelError(what, fix="run `strop merge` on it, and export the merged folder")
        check_adapter_kind(folder, scores=False)
        check_adapter_base(folder, source)
        check_adapter_weights(folder)
        trained, losses = Trained.read(folder), dict[str, float]()
        rows = rows_to_measure(name, folder, source, data) if measure else []
        if base is None and measure:
            base, losses = better_base(source, folder, trained, rows)
        base = base or ("original" if trained.scheme == "none" else "dequantized")
        trained = replace(trained, scheme="none") if base == "original" else trained
        return Tuned(source, folder, trained, base, losses, rows)

    @property
    def tokenizer(self) -> Any:
        """The one that was trained with, its chat template included."""
        return load_tokenizer(self.source if self.folder is None else tokenizer_source(self.folder, self.source))

    def model(self) -> Any:
        """The adapter on its base, computing in fp32."""
        if self.folder is None:
            return load_base(self.source, torch.float32, "cpu")
        return tuned_model(self.source, self.folder, self.trained)

    def merging(self) -> Callable[[str, Tensor], tuple[Tensor, Tensor]]:
        """Gives of a base tensor, by its name: (what the adapter makes of it, the tensor as it was trained on)."""
        change = changes(self.source, self.folder) if self.folder is not None else lambda _, weight: weight
        as_trained = self.trained.rounding(self.source)

        def merged(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
            weight = as_trained(name, weight)
            return change(name, weight), weight

        return merged
