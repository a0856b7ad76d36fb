"""`strop merge`: the adapter into its base, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from strop.cli.options import Data, Json, NoParity, Tuned
from strop.cli.progress import alive
from strop.cli.terminal import console, print_base, print_json, print_parity
from strop.engine.kernels import warmup


def merge(
    run: Tuned,
    out: Annotated[Path, typer.Option(help="The new model folder.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    data: Data = None,
    no_parity: NoParity = False,
    as_json: Json = False,
) -> None:
    """Merge the adapter into its base, and measure that it is still the same model."""
    with alive(console, "loading the libraries") as sign:
        warmup.load(warmup.DECODE)
        from strop.export.merge import merge as merge_into

        merged = merge_into(run, out, dtype=dtype, data=data, measure=not no_parity, say=sign.say)
    print_base(merged.base, merged.base_losses)
    print_parity(merged.parity)
    console.print(f"[bold]merged[/]   {escape(str(merged.out))}")
    print_json(merged.as_json(), as_json)
