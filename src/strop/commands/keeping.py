"""Commands that make other files of what was trained. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strop.flags import Json
from strop.terminal import console, print_json


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run or adapter folder.")],
    out: Annotated[Path, typer.Option(help="The new model folder.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    data: Annotated[str | None, typer.Option("--data", help="Rows to measure on; default: the run's own.")] = None,
    as_json: Json = False,
) -> None:
    """Merge the adapter into its base, and measure that it is still the same model."""
    from strop.export.merge import merge as merge_into

    merged = merge_into(run, out, dtype=dtype, data=data)
    for base, loss in merged.base_losses.items():
        console.print(f"[bold]base[/]     {base}: loss {loss:.4f}{' (taken)' if base == merged.base else ''}")
    parity = merged.parity
    console.print(
        f"[bold]parity[/]   mean KL {parity.kl_mean:.2g}, at most {parity.kl_max:.2g}; top-1 agreement "
        f"{parity.top1_agreement:.2%} of {parity.positions:,} positions; loss {parity.loss_difference:+.1e}"
    )
    console.print(f"[bold]merged[/]   {merged.out}")
    print_json(merged.as_json(), as_json)
