"""`strop export-script`: the run as a plain script."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from strop.cli.options import Json
from strop.cli.progress import alive
from strop.cli.terminal import console, print_json, print_notes


def export_script(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
    out: Annotated[Path, typer.Option(help="The new folder: train.py, rows.jsonl, tokenizer/.")],
    as_json: Json = False,
) -> None:
    """Write the run as a plain transformers and peft script that trains the same, without strop."""
    with alive(console, "loading the libraries"):
        from strop.export.script import export_script as write

        written = write(run, out)
    how = "the script renders them by the chat template" if written.encoded else "they hold their tokens"
    console.print(
        f"[bold]wrote[/]    {escape(str(written.out))}: {', '.join(written.files)}; {written.rows} rows, {how}"
    )
    print_notes(written.notes)
    console.print(f"next     python {shlex.quote(str(written.out))}/train.py", markup=False)
    print_json(written.as_json(), as_json)
