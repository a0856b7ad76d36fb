"""Facts about a model: its sizes, its weight files, its layers, and the adapter that training starts from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from strop.config.load import resolve
from strop.config.schema import Recipe
from strop.errors import ModelError
from strop.machine.doctor import installed
from strop.models.adapter_config import adapter_config, as_start
from strop.models.families.shape import Peek, header_kinds, peek
from strop.models.source import headers, locate, quantized_by
from strop.models.targets import LinearKind, embedding_kind, target_names
from strop.objectives.table import objective_of


def read_model_facts(recipe: Recipe) -> Peek:
    """Return the model's sizes.

    They come from its config. For a family that is not in the table, or modules trained in full, they come from the
    model itself, built without weights; without torch, from its config and the headers of its weight files.

    Raises:
        InputError: the model lacks a module that the recipe trains in full.
    """
    facts = _check_weight_files(peek(recipe.model.name, recipe.model.revision))
    whole_modules = recipe.lora.modules_to_save
    if (facts.shape.known and not whole_modules) or not installed("torch"):
        return facts
    from strop.models.introspect import exactly

    objective = objective_of(recipe.train)
    return exactly(facts, whole_modules=whole_modules, predicts=objective is None or not objective.scored)


def _check_weight_files(facts: Peek) -> Peek:
    """Set `refused` if the model's weight files have fewer weights than its config describes, or more layers."""
    folder, shape = Path(facts.name).expanduser(), facts.shape
    if facts.config is None or not shape.known or quantized_by(facts.config) or not any(folder.glob("*.safetensors")):
        return facts
    names = (name for _, header in headers(folder) for name in header)
    layers = {int(match[1]) for name in names if (match := re.search(r"\blayers\.(\d+)\.", name))}
    if facts.parameters >= shape.parameters and max(layers, default=0) < shape.layers:
        return facts
    files = f"its files have {facts.parameters:,} weights in {len(layers)} layers"
    config = f"its config describes {shape.parameters:,} in {shape.layers} layers"
    return replace(facts, refused=f"{facts.name}: {files}, and {config}")


def start_adapter(recipe: Recipe) -> dict[str, Any] | None:
    """Return the config of the adapter that training starts from, as `adapter_config.as_start` does, or None.

    Raises:
        ModelError: `model.adapter` is neither a run nor an adapter folder.
    """
    if recipe.model.adapter is None:
        return None
    path = Path(recipe.model.adapter).expanduser()
    folder = next((place for place in (path, path / "adapter") if (place / "adapter_config.json").is_file()), None)
    if folder is None:
        raise ModelError(f"--model.adapter {path}: no adapter in this folder", fix="give a run or adapter folder")
    return as_start(folder, adapter_config(folder))


def list_layers(model: str) -> tuple[list[LinearKind], list[dict[str, Any]]]:
    """Return the kinds of layers of a model, and for each its fields in `strop modules --json`."""
    shape = peek(model).shape
    kinds: Sequence[LinearKind] = [
        *shape.linear_kinds(),
        embedding_kind("embed_tokens", shape.vocabulary, shape.hidden),
    ]
    if not shape.known:
        kinds = _introspect_layers(model)
    linears = [kind for kind in kinds if kind.type != "Embedding"]
    presets = {
        preset: _preset_targets(
            linears, resolve(None, {"model": model, "data": "-", "preset": preset}).recipe.lora.target_modules
        )
        for preset in ("auto", "low-memory", "balanced", "max-quality")
    }
    rows = [
        {**asdict(kind), "presets": [preset for preset, names in presets.items() if kind.name in names]}
        for kind in kinds
    ]
    return list(kinds), rows


def _preset_targets(kinds: list[LinearKind], targets: str | list[str]) -> list[str]:
    """Return the target layers of a preset; none if the model lacks such layers, as a run would refuse the preset."""
    try:
        return target_names(kinds, targets)
    except ModelError:
        return []


def _introspect_layers(model: str) -> list[LinearKind]:
    """Return the layers of a family that is not in the table.

    They come from the model, built without weights; without torch, from the headers of its weight files.
    """
    source = locate(model)
    if not installed("torch"):
        if source.kind != "folder":
            raise ModelError(f"{model}: listing the layers of this family needs torch", fix="pip install torch")
        return header_kinds(source.path)
    from strop.models.load import skeleton
    from strop.models.lora import embedding_kinds, linear_kinds

    bare = skeleton(source)
    return [*linear_kinds(bare), *embedding_kinds(bare)]
