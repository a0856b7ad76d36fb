"""Commands that make other files of what was trained. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strop.errors import RecipeError
from strop.flags import Json, numbers
from strop.terminal import console, print_adapters, print_json, print_notes, print_pairs

if TYPE_CHECKING:
    from strop.exporting.gguf import Exported
    from strop.exporting.parity import Parity

Tuned = Annotated[str, typer.Argument(metavar="RUN", help="A run or adapter folder.")]
Kind = Annotated[
    str | None,
    typer.Option("--type", help="f32, f16, bf16, q8_0 (the default); with llama.cpp: q6_k, q5_k_m, q4_k_m."),
]
NoParity = Annotated[
    bool, typer.Option("--no-parity", help="Do not measure the result: for a model too large to compute here.")
]
Data = Annotated[str | None, typer.Option("--data", help="Rows to measure on; default: the run's own.")]


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

    from strop.exporting import adapters as known

    names = names or ["runs"]
    if weights and out is None:
        raise RecipeError("--weights: of a sum that is written nowhere", fix="give --out")
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
    run: Tuned,
    out: Annotated[Path, typer.Option(help="The new model folder.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    data: Data = None,
    no_parity: NoParity = False,
    as_json: Json = False,
) -> None:
    """Merge the adapter into its base, and measure that it is still the same model."""
    from strop.exporting.merge import merge as merge_into

    merged = merge_into(run, out, dtype=dtype, data=data, measure=not no_parity, say=console.print)
    _print_base(merged.base, merged.base_losses)
    _print_parity(merged.parity)
    console.print(f"[bold]merged[/]   {merged.out}")
    print_json(merged.as_json(), as_json)


def gguf(
    run: Tuned,
    out: Annotated[Path, typer.Option(help="The new file.")],
    kind: Kind = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The LoRA adapter alone, for a base that is in GGUF already.")
    ] = False,
    data: Data = None,
    no_parity: NoParity = False,
    as_json: Json = False,
) -> None:
    """One GGUF file for llama.cpp, and whether llama.cpp makes the same model of it."""
    from strop.exporting.gguf import export_gguf

    exported = export_gguf(run, out, kind=kind, adapter=adapter, data=data, measure=not no_parity, say=console.print)
    _print_exported(exported)
    print_notes(exported.notes)
    console.print(f"[bold]exported[/] {exported.out}")
    print_json(exported.as_json(), as_json)


def ollama(
    run: Tuned,
    out: Annotated[Path, typer.Option(help="The new folder.")],
    kind: Kind = None,
    data: Data = None,
    no_parity: NoParity = False,
    as_json: Json = False,
) -> None:
    """A folder for `ollama create`: GGUF and Modelfile, and whether its prompts are the trained ones."""
    from strop.exporting.ollama import export_ollama

    prepared = export_ollama(run, out, kind=kind, data=data, measure=not no_parity, say=console.print)
    _print_exported(prepared.exported)
    if prepared.rendered_by is not None:
        console.print(f"[bold]prompts[/]  {prepared.prompts} of {prepared.prompts} equal ({prepared.rendered_by})")
    print_notes(prepared.notes)
    console.print(f"[bold]exported[/] {prepared.out}; now:")
    for command in prepared.commands:
        console.print(f"  {command}", markup=False)
    print_json(prepared.as_json(), as_json)


def _print_exported(exported: Exported) -> None:
    _print_base(exported.base, exported.base_losses)
    found = exported.found
    if found is None or found.parity is None:
        console.print(f"[bold]parity[/]   {exported.unmeasured}", style="yellow")
        return
    _print_parity(found.parity)
    console.print(
        f"[bold]text[/]     {found.strings} of 200 strings tokenized alike, {found.conversations} prompts equal; "
        f"{found.answers_equal} of {found.answers} greedy answers equal, {found.answers_stopped} stopped"
    )


def _print_base(base: str, losses: dict[str, float]) -> None:
    for tried, loss in losses.items():
        console.print(f"[bold]base[/]     {tried}: loss {loss:.4f}{' (taken)' if base == tried else ''}")


def _print_parity(parity: Parity | None) -> None:
    console.print(
        "[bold]parity[/]   not measured"
        if parity is None
        else f"[bold]parity[/]   mean KL {parity.kl_mean:.2g}, at most {parity.kl_max:.2g}; top-1 agreement "
        f"{parity.top1_agreement:.2%} of {parity.positions:,} positions; loss {parity.loss_difference:+.1e}"
    )
