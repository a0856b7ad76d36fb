"""`strop export`: write files for llama.cpp and Ollama."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from strop import api
from strop.cli.options import AdapterName, Data, Json, NoParity
from strop.cli.progress import status_line
from strop.cli.tables import console, print_base, print_json, print_notes, print_parity
from strop.engine.kernels import warmup

if TYPE_CHECKING:
    from strop.exporting.gguf import Exported

Type = Annotated[
    str | None,
    typer.Option("--type", help="f32, f16, bf16 or q8_0 (default); with llama.cpp also q6_k, q5_k_m, q4_k_m."),
]


def gguf(
    run: AdapterName,
    out: Annotated[Path, typer.Option(help="File to write.")],
    kind: Type = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write only the LoRA adapter, for a base that is already in GGUF.")
    ] = False,
    data: Data = None,
    no_parity: NoParity = False,
    as_json: Json = False,
) -> None:
    """Write a GGUF file for llama.cpp, and compare its output there with the tuned model."""
    with status_line("loading the libraries") as status:
        warmup.load(warmup.DECODE)
        exported = api.export(
            "gguf", run, out, type=kind, adapter=adapter, data=data, measure=not no_parity, progress=status.print
        )
    _print_exported(exported)
    print_notes(exported.notes)
    console.print(f"[bold]exported[/] {escape(str(exported.out))}")
    print_json(exported.as_json(), as_json)


def ollama(
    run: AdapterName,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    kind: Type = None,
    data: Data = None,
    no_parity: NoParity = False,
    as_json: Json = False,
) -> None:
    """Write a folder for `ollama create` (GGUF and Modelfile), and compare its prompts with those of training."""
    with status_line("loading the libraries") as status:
        warmup.load(warmup.DECODE)
        prepared = api.export("ollama", run, out, type=kind, data=data, measure=not no_parity, progress=status.print)
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
    check = exported.check
    if check is None or check.parity is None:
        console.print(f"[bold]parity[/]   {escape(str(exported.unmeasured))}", style="yellow")
        return
    print_parity(check.parity)
    console.print(
        f"[bold]text[/]     {check.strings} of 200 strings tokenized identically, {check.conversations} prompts equal; "
        f"{check.answers_equal} of {check.answers} greedy answers equal, {check.answers_stopped} stopped"
    )
