"""`strop push`: upload an adapter or a model to the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from strop import api
from strop.cli.options import Json
from strop.cli.progress import status_line
from strop.cli.tables import console, print_json


def push(
    run: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="Run, adapter folder, or merged model.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository; created if it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; default: private.")] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Hub id of the base, if it was trained from a folder or a file.", metavar="OWNER/NAME"),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    as_json: Json = False,
) -> None:
    """Upload an adapter or a merged model with its model card to the Hugging Face Hub, private by default."""
    with status_line("loading the libraries") as status:
        pushed = api.push(run, repo, public=public, base=base, message=message, progress=status.print)
    for file in pushed.left_out:
        console.print(f"not sent {file}", markup=False)
    for file in pushed.removed:
        console.print(f"removed  {file}, left by an earlier push", markup=False)
    console.print(
        f"[bold]pushed[/]   {pushed.url} ({'private' if pushed.private else 'public'}): {len(pushed.files)} files, "
        f"{pushed.size_bytes / 1e6:.1f} MB, each verified against the Hub's copy"
    )
    print_json(pushed.as_json(), as_json)
