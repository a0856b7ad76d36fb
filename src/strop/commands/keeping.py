"""Commands that make other files of what was trained. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strop.errors import RecipeError
from strop.flags import Json, numbers
from strop.terminal import console, print_adapters, print_json, print_pairs


def adapters(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FOLDER|ADAPTER...]", help="None or a folder: list; one or two: show."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a weighted sum of the adapters here.")] = None,
    weights: Annotated[str, typer.Option(help="Of the sum, one for each adapter: 0.7,0.3.")] = "",
    as_json: Json = False,
) -> None:
    """List adapters, show one, compare two, or add several up."""
    from dataclasses import asdict

    from strop.export import adapters as known

    names = names or ["runs"]
    if out is not None:
        made = known.combine(names, numbers(weights), out)
        console.print(f"[bold]wrote[/]    {made.folder}: rank {made.rank}")
        print_json(asdict(made), as_json)
    elif len(names) == 1 and not known.is_adapter(names[0]):
        found = known.found_in(Path(names[0]))
        print_adapters([asdict(one) for one in found])
        print_json({"adapters": [asdict(one) for one in found]}, as_json)
    elif len(names) == 1:
        shown = {**asdict(known.facts(names[0])), "norm": known.norm(names[0])}
        print_pairs(shown)
        print_json(shown, as_json)
    elif len(names) == 2:
        compared = known.compare(*names)
        print_pairs(compared)
        print_json(compared, as_json)
    else:
        raise RecipeError(f"{len(names)} adapters: two can be compared", fix="add --out and --weights to add them up")


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run or adapter folder.")],
    out: Annotated[Path, typer.Option(help="The new model folder.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    data: Annotated[str | None, typer.Option("--data", help="Rows to measure on; default: the run's own.")] = None,
    no_parity: Annotated[
        bool, typer.Option("--no-parity", help="Do not measure the result: for a model too large to compute here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge the adapter into its base, and measure that it is still the same model."""
    from strop.export.merge import merge as merge_into

    merged = merge_into(run, out, dtype=dtype, data=data, measure=not no_parity, say=console.print)
    for base, loss in merged.base_losses.items():
        console.print(f"[bold]base[/]     {base}: loss {loss:.4f}{' (taken)' if base == merged.base else ''}")
    parity = merged.parity
    console.print(
        "[bold]parity[/]   not measured"
        if parity is None
        else f"[bold]parity[/]   mean KL {parity.kl_mean:.2g}, at most {parity.kl_max:.2g}; top-1 agreement "
        f"{parity.top1_agreement:.2%} of {parity.positions:,} positions; loss {parity.loss_difference:+.1e}"
    )
    console.print(f"[bold]merged[/]   {merged.out}")
    print_json(merged.as_json(), as_json)
