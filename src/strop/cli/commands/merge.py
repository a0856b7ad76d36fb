"""`strop merge`: merge an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from strop import api
from strop.cli.options import AdapterName, Data, Json, NoParity
from strop.cli.progress import status_line
from strop.cli.tables import console, print_base, print_json, print_parity
from strop.engine.kernels import warmup


def merge(
    run: AdapterName,
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    data: Data = None,
    no_parity: NoParity = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, and compare the merged model with the tuned one."""
    with status_line("loading the libraries") as status:
        warmup.load(warmup.DECODE)
        merged = api.merge(run, out, dtype=dtype, data=data, measure=not no_parity, progress=status.print)
    print_base(merged.base, merged.base_losses)
    print_parity(merged.parity)
    console.print(f"[bold]merged[/]   {escape(str(merged.out))}")
    print_json(merged.as_json(), as_json)
