"""`strop export-script`: write a run as a Python script without strop."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from strop.cli.options import Json
from strop.cli.progress import status_line
from strop.cli.tables import console, print_json, print_notes


def export_script(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write: train.py, rows.jsonl, tokenizer/.")],
    as_json: Json = False,
) -> None:
    """Write a run as a plain transformers and peft script that trains the same way without strop."""
    with status_line("loading the libraries"):
        from strop.export.script import export_script as write

        written = write(run, out)
    rows = "rendered by the script with the chat template" if written.encoded else "stored as tokens"
    console.print(
        f"[bold]wrote[/]    {escape(str(written.out))}: {', '.join(written.files)}; {written.rows} rows, {rows}"
    )
    print_notes(written.notes)
    console.print(f"next     python {shlex.quote(str(written.out))}/train.py", markup=False)
    print_json(written.as_json(), as_json)
