"""`strop adapters`: what an adapter on disk is, how two differ, and weighted combinations of several."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strop.errors import FolderError, ModelError, RecipeError
from strop.exporting.weight_changes import beyond_lora, places_of, read_weights
from strop.models.adapter_config import WEIGHTS_FILE, read_adapter_config
from strop.models.adapters import (
    STROP_FILE,
    adapter_folder,
    attach_adapter,
    base_source,
    check_adapter_base,
    check_adapter_weights,
    read_identity,
)
from strop.models.experts import split_by_expert
from strop.models.load import load_base
from strop.models.source import read_safetensors_header
from strop.runs.folder import RunFolder, disk_errors, exclusive_output, new_folder, write_json
from strop.runs.lock import sha256_file, versions

# What two adapters may differ in that decides what they do, by its name in adapter_config.json.
SETTINGS = (
    *("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "bias", "modules_to_save"),
    *("rank_pattern", "alpha_pattern"),
)


@dataclass(frozen=True)
class Facts:
    """An adapter as its files say. data, template: hashes; None for an adapter that another tool made."""

    folder: str
    base: str
    rank: int
    alpha: float
    target_modules: list[str]
    parameters: int
    size_bytes: int
    quantization: str
    data: str | None
    template: str | None
    score: str


def facts(name: str) -> Facts:
    """Raises ModelError where there is no adapter."""
    folder = _folder(name)
    config, identity = read_adapter_config(folder), read_identity(folder)
    shapes = [entry["shape"] for entry in read_safetensors_header(folder / WEIGHTS_FILE).values()]
    targets = config["target_modules"]
    parameters = list(config.get("target_parameters") or [])
    return Facts(
        folder=str(folder),
        base=str(config.get("base_model_name_or_path")),
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        target_modules=sorted([*targets, *parameters]) if isinstance(targets, list) else [str(targets), *parameters],
        parameters=sum(math.prod(shape) for shape in shapes),
        size_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        quantization=str(identity.get("quantization", "none")),
        data=identity.get("data"),
        template=identity.get("template"),
        score=_score(folder),
    )


def found_in(folder: Path) -> list[Facts]:
    """The adapters of the runs in a folder, and the adapter folders in it."""
    places = {file.parent for pattern in ("*", "*/adapter") for file in folder.glob(f"{pattern}/adapter_config.json")}
    return [facts(str(place)) for place in sorted(places)]


def is_adapter(name: str) -> bool:
    return adapter_folder(name) is not None


def norm(name: str) -> float | None:
    """Frobenius norm of all that an adapter adds to its base's weights; None where `unmeasured` has a reason."""
    delta = _Delta.read(_folder(name))
    return None if delta is None else delta.norm


def unmeasured(*names: str) -> str | None:
    """Why there is no norm and no cosine: what adapters train besides plain LoRA matrices; None where that is nothing.

    DoRA's change and that of whole tensors cannot be told without the base's weights.
    """
    for folder in map(_folder, names):
        if more := beyond_lora(folder):
            return f"norm and cosine are of plain LoRA matrices, and {folder} has {min(more)} too"
    return None


def compare(first: str, second: str) -> dict[str, Any]:
    """How two adapters differ: {same_base, same_template, same_data, settings: {name: [a, b]}, norms, cosine, modules,
    not_measured}.

    cosine: between what they add to the weights, over all modules and by the last part of a module's name; None where
    they sit on other modules, one adds nothing, or one is more than plain LoRA: not_measured says so then. Raises
    ModelError where one is missing.
    """
    folders = [_folder(name) for name in (first, second)]
    configs, identities = [read_adapter_config(one) for one in folders], [read_identity(one) for one in folders]
    read = [_Delta.read(folder) for folder in folders]
    deltas = [delta for delta in read if delta is not None]
    both = len(deltas) == 2
    shared = [module for module in deltas[0].scales if deltas[0].fits(deltas[1], module)] if both else []
    whole = both and len(shared) == len(deltas[0].scales) == len(deltas[1].scales)
    kinds: dict[str, list[str]] = {}
    for module in shared:
        kinds.setdefault(_leaf(module), []).append(module)
    prints = [identity.get("base", {}).get("fingerprint") for identity in identities]
    return {
        "same_base": prints[0] == prints[1] if all(prints) else None,
        "same_template": identities[0].get("template") == identities[1].get("template"),
        "same_data": identities[0].get("data") == identities[1].get("data"),
        "settings": {
            name: [config.get(name) for config in configs]
            for name in SETTINGS
            if _plain(configs[0].get(name)) != _plain(configs[1].get(name))
        },
        "norms": [None if delta is None else delta.norm for delta in read],
        "cosine": _cosine(deltas, shared) if whole else None,
        "modules": {kind: _cosine(deltas, modules) for kind, modules in kinds.items()},
        "not_measured": unmeasured(first, second),
    }


def combine(names: Sequence[str], weights: Sequence[float], out: Path) -> Facts:
    """A new adapter that adds the weighted sum of what several add, through peft.

    By peft's `cat`, whose rank is the sum of theirs: its `linear` multiplies mixed A with mixed B, which is no sum.
    Raises ModelError where they are not of one base, RecipeError where there is not one finite weight for each.
    """
    if len(names) != len(weights) or len(names) < 2:
        raise RecipeError(f"{len(names)} adapters, {len(weights)} weights", fix="--weights 0.7,0.3 for two adapters")
    if not all(map(math.isfinite, weights)):
        raise RecipeError(f"weights {', '.join(map(str, weights))}: not all are finite", fix="--weights 0.7,0.3")
    if out.exists():
        raise FolderError(f"{out}: already exists", fix="give --out a new folder")
    folders = [_folder(name) for name in names]
    for folder in folders:
        _check_summable(folder)
    source = base_source(folders[0])
    model: Any = load_base(source, torch.float32, "cpu")
    inner = [f"part{number}" for number in range(len(folders))]
    for folder, name in zip(folders, inner, strict=True):
        model, _ = attach_adapter(model, folder, source, name=name)
    model.peft_config[inner[0]].use_rslora = False  # the sum takes its config, and is scaled by 1
    model.add_weighted_adapter(inner, list(weights), "combined", combination_type="cat")
    with disk_errors(out.parent), exclusive_output(out), new_folder(out) as temp:
        model.save_pretrained(str(temp), selected_adapters=["combined"], save_embedding_layers=False)
        made = temp / "combined"
        for file in made.iterdir():
            file.replace(temp / file.name)
        made.rmdir()
        (temp / "README.md").unlink(missing_ok=True)
        for file in folders[0].iterdir():
            if file.is_file() and not (temp / file.name).exists() and file.name not in (STROP_FILE, "README.md"):
                shutil.copy2(file, temp / file.name)
        kept = {key: value for key, value in read_identity(folders[0]).items() if key not in ("data", "versions")}
        parts = [
            {"name": name, "weight": weight, "sha256": sha256_file(folder / WEIGHTS_FILE)}
            for name, weight, folder in zip(names, weights, folders, strict=True)
        ]
        own = {"weights": {"sha256": sha256_file(temp / WEIGHTS_FILE)}, "versions": versions(), "combined": parts}
        write_json(temp / STROP_FILE, {**kept, **own})
    return facts(str(out))


def told_apart(names: Sequence[str]) -> list[str]:
    """What the adapters of a sum were asked with in training, where it differs: the sum has the first one's."""
    first, *others = [(name, read_identity(_folder(name))) for name in names]
    kinds = {"template": "chat template", "system": "system prompt", "reasoning": "handling of reasoning"}
    return [
        f"{name} was trained with another {kinds[key]} than {first[0]}: the sum is asked as {first[0]}"
        for name, identity in others
        for key in kinds
        if key in identity and key in first[1] and identity[key] != first[1][key]
    ]


@dataclass(frozen=True)
class _Delta:
    """What plain LoRA matrices add: scale * B A by module, and of experts by expert, each as a module of its own."""

    weights: dict[str, Tensor]
    scales: dict[str, float]

    @staticmethod
    def read(folder: Path) -> _Delta | None:
        """None for an adapter that has more than such matrices."""
        source = base_source(folder)
        check_adapter_base(folder, source)
        check_adapter_weights(folder)
        if beyond_lora(folder):
            return None
        plain = {name: tensor.float() for name, tensor in read_weights(folder).items()}
        scales = {}
        for name, place in places_of(source, folder).items():
            if f"{place.key}.lora_A.weight" not in plain:
                continue
            if not place.experts:
                scales[place.key] = place.scale
                continue
            whole = [plain[f"{place.key}.lora_{part}.weight"] for part in "AB"]
            a, b = split_by_expert(whole[0], whole[1], place.experts)
            for expert in range(place.experts):
                scales[f"{name}.{expert}"] = place.scale
                plain |= {f"{name}.{expert}.lora_A.weight": a[expert], f"{name}.{expert}.lora_B.weight": b[expert]}
        return _Delta(plain, scales)

    def fits(self, other: _Delta, module: str) -> bool:
        """Whether both add something of one shape there."""
        if module not in other.scales:
            return False
        (a1, b1), (a2, b2) = (
            [one.weights[f"{module}.lora_{part}.weight"].shape for part in "AB"] for one in (self, other)
        )
        return a1[1] == a2[1] and b1[0] == b2[0]

    @property
    def norm(self) -> float:
        return math.sqrt(sum(self.inner(self, module) for module in self.scales))

    def inner(self, other: _Delta, module: str) -> float:
        """<s1 B1 A1, s2 B2 A2> = s1 s2 sum((B1^T B2) * (A1 A2^T)): no matrix of the weight's size is made."""
        a1, b1 = (self.weights[f"{module}.lora_{part}.weight"] for part in "AB")
        a2, b2 = (other.weights[f"{module}.lora_{part}.weight"] for part in "AB")
        return self.scales[module] * other.scales[module] * float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def _cosine(deltas: Sequence[_Delta], modules: Sequence[str]) -> float | None:
    def total(one: _Delta, other: _Delta) -> float:
        return sum(one.inner(other, module) for module in modules)

    lengths = total(deltas[0], deltas[0]) * total(deltas[1], deltas[1])
    return total(deltas[0], deltas[1]) / math.sqrt(lengths) if lengths > 0 else None


def _folder(name: str) -> Path:
    folder = adapter_folder(name)
    if folder is None:
        raise ModelError(f"{name}: no adapter there", fix="give a run or adapter folder")
    return folder


def _leaf(module: str) -> str:
    """The last part of a path that is no number."""
    return next(part for part in reversed(module.split(".")) if not part.isdigit())


def _check_summable(folder: Path) -> None:
    """Of a mixture's experts peft's `cat` lays whole A and B side by side, where they belong together by expert."""
    config = read_adapter_config(folder)
    if config.get("target_parameters"):
        what = f"{folder}: has adapters on a mixture's experts, which peft cannot add up"
        raise ModelError(what, fix="serve or merge each by itself")
    more = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if config.get(name)]
    if more or config.get("bias", "none") != "none":
        what = f"{folder}: DoRA, biases, whole modules and new tokens have no weighted sum"
        raise ModelError(what, fix="combine plain LoRA adapters")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value or None


def _score(folder: Path) -> str:
    """The run's score, where it was evaluated."""
    found = RunFolder(folder.parent).read_report().get("evaluation")
    return f"{found['metric']} {found['tuned'][found['metric']]:.1%}" if found and found.get("tuned") else ""
