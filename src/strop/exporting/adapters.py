"""Implement `strop adapters`: describe and compare adapters on disk, and write weighted sums of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from strop.errors import ModelError, RecipeError
from strop.exporting.adapter_weights import find_non_lora, find_targets, read_weights
from strop.models.adapter_config import (
    NEEDS_QUANTIZED_BASE,
    STROP_FILE,
    WEIGHTS_FILE,
    adapter_folder,
    find_adapter_folder,
    read_adapter_config,
    read_base_name,
    read_identity,
)
from strop.models.adapters import (
    attach_adapter,
    check_adapter_base,
    check_adapter_weights,
    check_same_base,
    locate_base,
)
from strop.models.experts import split_by_expert
from strop.models.load import load_base
from strop.models.source import read_safetensors_header
from strop.runs.folder import RunFolder, check_new_output, disk_errors, exclusive_output, new_folder, write_json
from strop.runs.lock import sha256_file, versions

MAX_SUM_ERROR = 1e-5  # of a sum of adapters, relative to its terms
# Settings in adapter_config.json that are compared.
SETTINGS = (
    "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "bias", "modules_to_save", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip


def read_info(name: str) -> dict[str, Any]:
    """Describe an adapter from its files. `data` and `template` are hashes, or None if strop did not write it."""
    folder = find_adapter_folder(name)
    config, identity = read_adapter_config(folder), read_identity(folder)
    shapes = [entry["shape"] for entry in read_safetensors_header(folder / WEIGHTS_FILE).values()]
    targets, parameters = config["target_modules"], list(config.get("target_parameters") or [])
    evaluation = RunFolder(folder.parent).read_report().get("evaluation") or {}
    metric = evaluation.get("metric")
    return {
        "folder": str(folder),
        "base": str(read_base_name(folder)),
        "rank": int(config["r"]),
        "alpha": float(config["lora_alpha"]),
        "target_modules": sorted([*targets, *parameters]) if isinstance(targets, list) else [str(targets), *parameters],
        "parameters": sum(math.prod(shape) for shape in shapes),
        "size_bytes": (folder / WEIGHTS_FILE).stat().st_size,
        "quantization": str(identity.get("quantization", "none")),
        "data": identity.get("data"),
        "template": identity.get("template"),
        "score": f"{metric} {evaluation['tuned'][metric]:.1%}" if evaluation.get("tuned") else "",
    }


def find_adapters(folder: Path) -> list[dict[str, Any]]:
    """Describe the adapters of the runs in a folder, and the adapter folders in it.

    An adapter that cannot be read has the fields `folder` and `problem` only.
    """
    files = {file for pattern in ("*", "*/adapter") for file in folder.glob(f"{pattern}/adapter_config.json")}
    return [_read_info_or_problem(file.parent) for file in sorted(files)]


def _read_info_or_problem(folder: Path) -> dict[str, Any]:
    try:
        return read_info(str(folder))
    except ModelError as error:
        return {"folder": str(folder), "problem": error.what.removeprefix(f"{folder}: ")}


def is_adapter(name: str) -> bool:
    return adapter_folder(name) is not None


def compute_norm(name: str) -> float | None:
    """Return the Frobenius norm of the adapter's change to the base weights, or None: see `why_not_measured`."""
    delta = _LoraDelta.read(find_adapter_folder(name))
    return None if delta is None else delta.norm


def why_not_measured(*names: str) -> str | None:
    """Return why norm and cosine are unknown. For DoRA and full tensors, they would depend on the base weights."""
    for folder in map(find_adapter_folder, names):
        if tensors := find_non_lora(folder):
            return f"norm and cosine need plain LoRA matrices, but {folder} also has {min(tensors)}"
    return None


def compare(first: str, second: str) -> dict[str, Any]:
    """Compare two adapters.

    `settings` of the result has [first, second] for each setting that differs. `cosine` is the cosine similarity of the
    changes to all base weights (0 where an adapter has no module), or None if the bases' shapes differ or one changes
    nothing. `modules` has the similarity by the last part of the names of the modules that both have, such as q_proj.
    See `why_not_measured` for `not_measured`.
    """
    folders = [find_adapter_folder(name) for name in (first, second)]
    configs, identities = list(map(read_adapter_config, folders)), list(map(read_identity, folders))
    a, b = map(_LoraDelta.read, folders)
    cosine, cosines = None, dict[str, float | None]()
    if a is not None and b is not None:
        by_last_name: dict[str, list[str]] = {}
        shared = [module for module in a.scales if a.has_same_shape(b, module)]
        for module in shared:
            last_name = next(part for part in reversed(module.split(".")) if not part.isdigit())
            by_last_name.setdefault(last_name, []).append(module)
        cosines = {name: _compute_cosine(a, b, modules) for name, modules in by_last_name.items()}
        if a.scales.keys() & b.scales.keys() == set(shared) and (norms := a.norm * b.norm):
            cosine = a.inner_product(b, shared) / norms
    fingerprints = [identity.get("base", {}).get("fingerprint") for identity in identities]
    return {
        "same_base": fingerprints[0] == fingerprints[1] if all(fingerprints) else None,
        "same_template": identities[0].get("template") == identities[1].get("template"),
        "same_data": identities[0].get("data") == identities[1].get("data"),
        "settings": {
            name: [config.get(name) for config in configs]
            for name in SETTINGS
            if _normalize(configs[0].get(name)) != _normalize(configs[1].get(name))
        },
        "norms": [None if delta is None else delta.norm for delta in (a, b)],
        "cosine": cosine,
        "modules": cosines,
        "not_measured": why_not_measured(first, second),
    }


def combine(names: Sequence[str], weights: Sequence[float], out: Path) -> dict[str, Any]:
    """Write an adapter whose change to the base weights is the weighted sum of the changes of several adapters.

    Uses peft's combination type `cat`, whose rank is the sum of the ranks. `linear` sums A and B separately, so the
    product B A would not be the sum. Raises ModelError for adapters of different bases.
    """
    if len(names) != len(weights):
        what, fix = f"{len(names)} adapters, {len(weights)} weights", "give one for each, such as --weights 0.7,0.3"
        raise RecipeError(what, fix=fix)
    if not all(map(math.isfinite, weights)):
        raise RecipeError(f"weights {', '.join(map(str, weights))}: not all are finite", fix="--weights 0.7,0.3")
    check_new_output(out)
    folders = [find_adapter_folder(name) for name in names]
    for folder in folders:
        _check_summable(folder)
    _check_quantization(folders)
    source = locate_base(folders[0])
    for folder in folders[1:]:
        check_same_base(folder, source, "combine adapters of one base")
    model: Any = load_base(source, torch.float32, "cpu")
    peft_names = [f"part{number}" for number in range(len(folders))]
    for folder, peft_name in zip(folders, peft_names, strict=True):
        model, _ = attach_adapter(model, folder, source, name=peft_name)
    model.peft_config[peft_names[0]].use_rslora = False  # peft copies this config, and the sum has a scale of 1
    for peft_name in peft_names:
        _list_targets(model, peft_name)
    model.add_weighted_adapter(peft_names, list(weights), "combined", combination_type="cat")
    if len(folders) == 1:  # peft keeps the matrices as they are, and sets the largest rank of all modules
        part, config = (model.peft_config[name] for name in (peft_names[0], "combined"))
        config.r = config.lora_alpha = part.r
        config.rank_pattern, config.alpha_pattern = part.rank_pattern, {**part.rank_pattern}
    with disk_errors(out.parent), exclusive_output(out), new_folder(out) as temp:
        model.save_pretrained(str(temp), selected_adapters=["combined"], save_embedding_layers=False)
        for file in (temp / "combined").iterdir():
            file.replace(temp / file.name)
        (temp / "combined").rmdir()
        (temp / "README.md").unlink(missing_ok=True)
        for file in folders[0].iterdir():
            if file.is_file() and not (temp / file.name).exists() and file.name not in (STROP_FILE, "README.md"):
                shutil.copy2(file, temp / file.name)
        parts = [
            {"name": name, "weight": weight, "sha256": sha256_file(folder / WEIGHTS_FILE)}
            for name, weight, folder in zip(names, weights, folders, strict=True)
        ]
        identity = {key: value for key, value in read_identity(folders[0]).items() if key not in ("data", "versions")}
        identity |= {"weights": {"sha256": sha256_file(temp / WEIGHTS_FILE)}, "versions": versions(), "combined": parts}
        if any(read_identity(folder).get(NEEDS_QUANTIZED_BASE) for folder in folders):
            identity[NEEDS_QUANTIZED_BASE] = True
        write_json(temp / STROP_FILE, identity)
        _check_sum(temp, folders, weights)
    return read_info(str(out))


def _check_quantization(folders: Sequence[Path]) -> None:
    """Raise ModelError for an adapter that corrects the error of its quantized base, with one of another base."""
    identities = {folder: read_identity(folder) for folder in folders}
    schemes = {
        folder: (identity.get("quantization", "none"), identity.get("double_quantization"))
        for folder, identity in identities.items()
    }
    corrected = next((folder for folder, identity in identities.items() if identity.get(NEEDS_QUANTIZED_BASE)), None)
    other = next((folder for folder in folders if corrected and schemes[folder] != schemes[corrected]), None)
    if corrected and other:
        what = f"{corrected}: began with LoftQ on its base in {schemes[corrected][0]}, and {other} has another base"
        raise ModelError(what, fix="combine adapters of the same quantized base")


def _list_targets(model: Any, name: str) -> None:
    """Name the adapted modules of an adapter in its config, which peft copies for a sum of several."""
    layers = [(path, x) for path, x in model.base_model.model.named_modules() if isinstance(x, LoraLayer)]
    config = model.peft_config[name]
    config.target_modules = {path for path, layer in layers if name in layer.lora_A}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _check_sum(out: Path, folders: Sequence[Path], weights: Sequence[float]) -> None:
    """Raise ModelError if an adapter's change differs from the weighted sum of the changes of others."""
    deltas = [delta for folder in (out, *folders) if (delta := _LoraDelta.read(folder)) is not None]
    terms = list(zip(deltas, (-1.0, *weights), strict=True))  # of plain LoRA: see _check_summable
    for module in {name for delta in deltas for name in delta.scales}:
        held = [(delta, weight * delta.scales[module]) for delta, weight in terms if module in delta.scales]
        a = torch.cat([delta.matrices(module)[0].double() for delta, _ in held])
        b = torch.cat([factor * delta.matrices(module)[1].double() for delta, factor in held], 1)
        size = float(((b.T @ b).diag().sqrt() * (a @ a.T).diag().sqrt()).sum())
        if float(((b.T @ b) * (a @ a.T)).sum()) > (MAX_SUM_ERROR * size) ** 2:
            what = f"the sum differs from its parts in {module}, so it was not written"
            raise ModelError(what, fix="merge the adapters one after the other")


def find_prompt_differences(names: Sequence[str]) -> list[str]:
    """Return notes on adapters that were trained with other prompt settings than the first adapter."""
    (first, expected), *others = [(name, read_identity(find_adapter_folder(name))) for name in names]
    settings = {"template": "chat template", "system": "system prompt", "reasoning": "handling of reasoning"}
    return [
        f"{name} was trained with another {settings[key]} than {first}: the sum uses that of {first}"
        for name, identity in others
        for key in settings
        if key in identity and key in expected and identity[key] != expected[key]
    ]


@dataclass(frozen=True)
class _LoraDelta:
    """The change scale * B A of the weight of each adapted module. Each expert of a mixture counts as a module."""

    weights: dict[str, Tensor]  # the matrices A and B by peft's names
    scales: dict[str, float]  # by module

    @staticmethod
    def read(folder: Path) -> _LoraDelta | None:
        """Read an adapter. Returns None if it has tensors other than LoRA matrices."""
        source = locate_base(folder)
        check_adapter_base(folder, source)
        check_adapter_weights(folder)
        if find_non_lora(folder):
            return None
        weights = {name: tensor.float() for name, tensor in read_weights(folder).items()}
        scales = {}
        for name, target in find_targets(source, folder).items():
            if f"{target.key}.lora_A.weight" not in weights:
                continue
            if not target.experts:
                scales[target.key] = target.scale
                continue
            packed = [weights[f"{target.key}.lora_{part}.weight"] for part in "AB"]
            a, b = split_by_expert(packed[0], packed[1], target.experts)
            for expert in range(target.experts):
                module = f"{name}.{expert}"
                scales[module] = target.scale
                weights |= {f"{module}.lora_A.weight": a[expert], f"{module}.lora_B.weight": b[expert]}
        return _LoraDelta(weights, scales)

    def matrices(self, module: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{module}.lora_A.weight"], self.weights[f"{module}.lora_B.weight"]

    def has_same_shape(self, delta: _LoraDelta, module: str) -> bool:
        if module not in delta.scales:
            return False
        (a1, b1), (a2, b2) = self.matrices(module), delta.matrices(module)
        return a1.shape[1] == a2.shape[1] and b1.shape[0] == b2.shape[0]

    @property
    def norm(self) -> float:
        return math.sqrt(self.inner_product(self, list(self.scales)))

    def inner_product(self, delta: _LoraDelta, modules: Sequence[str]) -> float:
        """Return the Frobenius inner product with another adapter's changes, summed over the modules.

        <s1 B1 A1, s2 B2 A2> = s1 s2 sum((B1^T B2) * (A1 A2^T)) avoids matrices of the weight's size.
        """

        def product(module: str) -> float:
            (a1, b1), (a2, b2) = self.matrices(module), delta.matrices(module)
            return self.scales[module] * delta.scales[module] * float(((b1.T @ b2) * (a1 @ a2.T)).sum())

        return sum(map(product, modules))


def _compute_cosine(a: _LoraDelta, b: _LoraDelta, modules: Sequence[str]) -> float | None:
    squared = a.inner_product(a, modules) * b.inner_product(b, modules)
    return a.inner_product(b, modules) / math.sqrt(squared) if squared > 0 else None


def _check_summable(folder: Path) -> None:
    """Raise ModelError for adapters that peft cannot add. For experts, `cat` concatenates A and B in a wrong order."""
    config = read_adapter_config(folder)
    if config.get("target_parameters"):
        what = f"{folder}: has adapters on a mixture's experts, which peft cannot add up"
        raise ModelError(what, fix="serve or merge each adapter separately")
    extra = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
    if any(config.get(name) for name in extra) or config.get("bias", "none") != "none":
        what = f"{folder}: DoRA, biases, full modules and new tokens have no weighted sum"
        raise ModelError(what, fix="combine plain LoRA adapters")


def _normalize(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value or None
