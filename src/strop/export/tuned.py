"""A tuned model as what it is made of: a base, what the adapter makes of it, and rows to measure on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor

from strop.adapters import (
    ALL_LAYERS,
    WEIGHTS_FILE,
    adapter_folder,
    attach,
    check_base,
    check_weights,
    read_adapter_config,
    read_identity,
)
from strop.config.load import read_resolved
from strop.config.schema import DataSection
from strop.data.conversation import Example
from strop.data.prepare import prepare
from strop.engine.choose import step_for
from strop.errors import ModelError
from strop.evaluation.loss import mean_loss
from strop.model.facts import Source, locate
from strop.model.load import DTYPES, load_base, skeleton
from strop.model.quantize import pack, prequantized, quantizable, unpack
from strop.model.tokenizer import load_tokenizer
from strop.runs.folder import RunFolder, cache_folder, is_run

CHOOSING_ROWS = 64  # on which two bases are compared
ROWS = 2000  # at most, to measure on


@dataclass(frozen=True)
class Trained:
    """How the base was stored while the adapter was trained."""

    scheme: str
    double: bool
    dtype: torch.dtype

    @staticmethod
    def read(folder: Path) -> Trained:
        identity = read_identity(folder)
        scheme, double = identity.get("quantization", "none"), identity.get("double_quantization", True)
        return Trained(str(scheme), bool(double), DTYPES[str(identity.get("dtype", "bf16"))])

    def rounded(self, weight: Tensor, quantized: bool) -> Tensor:
        """A base weight as the adapter saw it: rounded to the type it was trained in, and quantized."""
        if self.scheme == "none" or not weight.is_floating_point():
            return weight
        weight = weight.to(self.dtype)
        if not quantized:
            return weight
        return unpack(pack(weight, self.scheme, double=self.double), self.scheme, weight.shape, self.dtype)


@dataclass(frozen=True)
class Tuned:
    """base: to merge into, original or dequantized; base_losses: of the adapter on either, where both were tried.

    trained: how that base is to be rounded. examples: held-out rows, or training rows where there are none.
    """

    source: Source
    folder: Path | None
    trained: Trained
    base: str
    base_losses: dict[str, float]
    examples: list[Example]

    @staticmethod
    def read(name: str, data: str | None) -> Tuned:
        """Of a run or adapter folder; or a model without an adapter, which is then its own base (folder None).

        Raises InputError for what cannot be merged or measured.
        """
        folder = adapter_folder(name)
        source = locate(name if folder is None else str(read_adapter_config(folder)["base_model_name_or_path"]))
        if prequantized(source.config()):
            raise ModelError(f"{source.name}: has no 16-bit weights to merge into", fix="serve the adapter on its base")
        if folder is None:
            plain = Trained("none", True, torch.float32)
            return Tuned(source, None, plain, "original", {}, _examples(name, source, data))
        check_base(folder, source)
        check_weights(folder)
        trained, examples = Trained.read(folder), _examples(name, Source(source.name, "folder", folder), data)
        base, losses = _better_base(source, folder, trained, examples)
        if base == "original":
            trained = replace(trained, scheme="none")
        return Tuned(source, folder, trained, base, losses, examples)

    @property
    def tokenizer(self) -> Any:
        """The one that was trained with, its chat template included."""
        return load_tokenizer(self.source if self.folder is None else Source(self.source.name, "folder", self.folder))

    def model(self) -> Any:
        """The adapter on its base, computing in fp32."""
        if self.folder is None:
            return load_base(self.source, torch.float32, "cpu")
        return _tuned(self.source, self.folder, self.trained)

    def merging(self) -> Callable[[str, Tensor], tuple[Tensor, Tensor]]:
        """Gives of a base tensor, by its name: (what the adapter makes of it, the tensor as it was trained on)."""
        change = changes(self.source, self.folder) if self.folder is not None else lambda _, weight: weight
        quantized = {f"{name}.weight" for name, _ in quantizable(skeleton(self.source))}

        def merged(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
            weight = self.trained.rounded(weight, name in quantized)
            return change(name, weight), weight

        return merged


def _examples(name: str, head: Source, data: str | None) -> list[Example]:
    tokenizer = load_tokenizer(head)
    if data is None and not is_run(Path(name)):
        raise ModelError(f"{name}: an adapter or model has no rows to measure on", fix="give --data")
    if is_run(Path(name)):
        section = read_resolved(RunFolder(Path(name)).recipe).recipe.data
        section = section if data is None else section.model_copy(update={"train": data, "eval": None})
    else:
        section = DataSection(train=str(data))
    prepared = prepare(section, tokenizer, cache=cache_folder() / "data")
    held_out = prepared.eval if prepared.eval is not None else prepared.train
    return [held_out[row] for row in range(min(len(held_out), ROWS))]


def _better_base(
    source: Source, folder: Path, trained: Trained, examples: list[Example]
) -> tuple[str, dict[str, float]]:
    """Which base an adapter trained on a quantized one does better on: the dequantized, or the original. Measured."""
    if trained.scheme == "none":
        return "original", {}
    losses = {}
    for base, tried in (("original", replace(trained, scheme="none")), ("dequantized", trained)):
        model = _tuned(source, folder, tried)
        losses[base] = mean_loss(
            step_for(model).token_loss, examples[:CHOOSING_ROWS], lambda block: [[n] for n in range(len(block))]
        )
        del model
    return min(losses, key=lambda base: losses[base]), losses


def _tuned(source: Source, folder: Path, trained: Trained) -> Any:
    """The adapter on its base, computing in fp32; quantized weights are rounded as they were in training."""
    dtype = torch.float32 if trained.scheme == "none" else trained.dtype
    base = load_base(
        source, dtype, "cpu", quantization=trained.scheme, double=trained.double, resident_layers=ALL_LAYERS
    )
    return attach(base.float(), folder, source)[0].eval()


def changes(source: Source, folder: Path) -> Callable[[str, Tensor], Tensor]:
    """What the adapter makes of a base tensor, by its name; fp32 where it changes something.

    Raises ModelError for what is trained besides LoRA layers and whole modules, which no merged weight can hold.
    """
    saved = saved_tensors(folder)
    scale = scales(source, folder)
    known = {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_magnitude_vector.weight"}
    for key in saved:
        if not any(key.endswith(f".{part}") for part in (*known, "weight", "bias")) or "token_adapter" in key:
            raise ModelError(f"{folder}: {key} cannot be merged", fix="serve the adapter on its base")

    def change(name: str, weight: Tensor) -> Tensor:
        module = name.removesuffix(".weight")
        if name in saved:
            return saved[name].float()
        a, b = saved.get(f"{module}.lora_A.weight"), saved.get(f"{module}.lora_B.weight")
        if a is None or b is None or name == module:
            return weight
        merged = weight.float().addmm(b.float(), a.float(), alpha=scale[module])
        magnitude = saved.get(f"{module}.lora_magnitude_vector", saved.get(f"{module}.lora_magnitude_vector.weight"))
        if magnitude is not None:  # DoRA, arXiv:2402.09353: the rows keep their learned length
            merged *= (magnitude.float() / merged.norm(dim=1))[:, None]
        return merged

    return change


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, under the base's names."""
    return {_plain(key): tensor for key, tensor in load_file(folder / WEIGHTS_FILE).items()}


def _plain(key: str) -> str:
    return key.removeprefix("base_model.model.")


def scales(source: Source, folder: Path) -> dict[str, float]:
    """The scale of each adapted module, as peft computes it from rank, alpha, patterns and rsLoRA."""
    config: Any = peft.LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # peft would warn that the skeleton has another name
    adapted = peft.get_peft_model(skeleton(source), config)
    found = {}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and module.scaling:
            found[_plain(name)] = float(next(iter(module.scaling.values())))
            assert math.isfinite(found[_plain(name)])
    return found
