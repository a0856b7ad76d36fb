"""The layers that `strop modules` lists, and which of them a preset picks. No torch, but where a family needs it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from strop.config.load import resolve
from strop.errors import ModelError
from strop.machine.doctor import is_installed
from strop.models.families.shape import (
    LinearKind,
    embedding_kind,
    linear_kinds_from_headers,
    read_model_info,
    target_names,
)
from strop.models.source import locate


def found_in(model: str) -> tuple[list[LinearKind], list[dict[str, Any]]]:
    """The kinds of layers of a model, and of each its fields of `strop modules --json`."""
    shape = read_model_info(model).shape
    found = [*shape.linear_kinds(), embedding_kind("embed_tokens", shape.vocabulary, shape.hidden)]
    if not shape.known:
        found = _kinds_of_others(model)
    kinds = [kind for kind in found if kind.type != "Embedding"]
    presets = {
        preset: _picked(
            kinds, resolve(None, {"model": model, "data": "-", "preset": preset}).recipe.lora.target_modules
        )
        for preset in ("auto", "low-memory", "balanced", "max-quality")
    }
    return found, [{**asdict(k), "presets": [p for p, names in presets.items() if k.name in names]} for k in found]


def _picked(kinds: list[LinearKind], targets: str | list[str]) -> list[str]:
    """Nothing, where a model has no layers of such a set: a run with that preset would be refused."""
    try:
        return target_names(kinds, targets)
    except ModelError:
        return []


def _kinds_of_others(model: str) -> list[LinearKind]:
    """Of a family whose config does not name its layers: by the model itself, without its weights; by the headers of
    its weight files where torch is not installed."""
    source = locate(model)
    if not is_installed("torch"):
        if source.kind != "folder":
            raise ModelError(f"{model}: a family whose layers only torch can tell", fix="pip install torch")
        return linear_kinds_from_headers(source.path)
    from strop.models.introspect import embedding_kinds, linear_kinds
    from strop.models.load import load_without_weights

    bare = load_without_weights(source)
    return [*linear_kinds(bare), *embedding_kinds(bare)]
