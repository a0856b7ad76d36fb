"""`strop modules`: the layers that an adapter can sit on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from strop.errors import ModelError
from strop.flags import Json
from strop.terminal import console, print_json

if TYPE_CHECKING:
    from strop.model.targets import LinearKind


def modules(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, run folder, or demo.")],
    as_json: Json = False,
) -> None:
    """List the linear layers an adapter can sit on, and what picks them."""
    from rich.table import Table

    found, rows = found_in(model)
    table = Table("name", "type", "in", "out", "count", "picked by preset", "quantized")
    for kind, row in zip(found, rows, strict=True):
        sizes = (str(kind.in_features), str(kind.out_features), str(kind.count))
        quantized = f"no: {kind.kept_16_bit}" if kind.kept_16_bit else "yes"
        table.add_row(kind.name, kind.type, *sizes, ", ".join(row["presets"]) or "none", quantized)
    console.print(table)
    print_json({"modules": rows}, as_json)


def found_in(model: str) -> tuple[list[LinearKind], list[dict[str, Any]]]:
    """The kinds of layers of a model, and of each its fields of `strop modules --json`."""
    from dataclasses import asdict

    from strop.config.load import resolve
    from strop.model.shape import peek
    from strop.model.targets import embedding_kind

    shape = peek(model).shape
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
    from strop.model.targets import target_names

    try:
        return target_names(kinds, targets)
    except ModelError:
        return []


def _kinds_of_others(model: str) -> list[LinearKind]:
    """Of a family whose config does not name its layers: by the model itself, without its weights; by the headers of
    its weight files where torch is not installed."""
    from strop.machine.doctor import installed
    from strop.model.facts import locate
    from strop.model.shape import header_kinds

    source = locate(model)
    if not installed("torch"):
        if source.kind != "folder":
            raise ModelError(f"{model}: a family whose layers only torch can tell", fix="pip install torch")
        return header_kinds(source.path)
    from strop.model.load import skeleton
    from strop.model.lora import embedding_kinds, linear_kinds

    bare = skeleton(source)
    return [*linear_kinds(bare), *embedding_kinds(bare)]
