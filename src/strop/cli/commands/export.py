"""`strop export`: files for llama.cpp and Ollama, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from strop.cli.options import Data, Json, NoParity, Tuned
from strop.cli.progress import alive
from strop.cli.terminal import console, print_base, print_json, print_notes, print_parity
from strop.engine.kernels import warmup

if TYPE_CHECKING:
    from strop.export.gguf import Exported

Kind = Annotated[
    str | None,
    typer.Option("--type", help="f32, f16, bf16, q8_0 (the default); with llama.cpp: q6_k, q5_k_m, q4_k_m."),
]


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
    with alive(console, "loading the libraries") as sign:
        warmup.load(warmup.DECODE)
        from strop.export.gguf import export_gguf

        exported = export_gguf(run, out, kind=kind, adapter=adapter, data=data, measure=not no_parity, say=sign.say)
    _print_exported(exported)
    print_notes(exported.notes)
    console.print(f"[bold]exported[/] {escape(str(exported.out))}")
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
    with alive(console, "loading the libraries") as sign:
        warmup.load(warmup.DECODE)
        from strop.export.ollama import export_ollama

        prepared = export_ollama(run, out, kind=kind, data=data, measure=not no_parity, say=sign.say)
    _print_exported(prepared.exported)
    if prepared.rendered_by is not None:
        console.print(f"[bold]prompts[/]  {prepared.prompts} of {prepared.prompts} equal ({prepared.rendered_by})")
    print_notes(prepared.notes)
    console.print(f"[bold]exported[/] {escape(str(prepared.out))}; now:")
    for command in prepared.commands:
        console.print(f"  {command}", markup=False)
    print_json(prepared.as_json(), as_json)


def _print_exported(exported: Exported) -> None:
    print_base(exported.base, exported.base_losses)
    found = exported.found
    if found is None or found.parity is None:
        console.print(f"[bold]parity[/]   {escape(str(exported.unmeasured))}", style="yellow")
        return
    print_parity(found.parity)
    console.print(
        f"[bold]text[/]     {found.strings} of 200 strings tokenized alike, {found.conversations} prompts equal; "
        f"{found.answers_equal} of {found.answers} greedy answers equal, {found.answers_stopped} stopped"
    )
