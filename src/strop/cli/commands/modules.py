"""`strop modules`: the layers that an adapter can sit on."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.cli.options import Json
from strop.cli.progress import alive
from strop.cli.terminal import console, print_json


def modules(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, run folder, or demo.")],
    as_json: Json = False,
) -> None:
    """List the linear layers an adapter can sit on, and what picks them."""
    from rich.table import Table

    with alive(console, "reading the model's config"):
        from strop.planning.model_facts import list_layers

        found, rows = list_layers(model)
    table = Table("name", "type", "in", "out", "count", "picked by preset", "quantized")
    for kind, row in zip(found, rows, strict=True):
        sizes = (str(kind.in_features), str(kind.out_features), str(kind.count))
        quantized = f"no: {kind.kept_16_bit}" if kind.kept_16_bit else "yes"
        table.add_row(kind.name, kind.type, *sizes, ", ".join(row["presets"]) or "none", quantized)
    console.print(table)
    print_json({"modules": rows}, as_json)
