"""`strop push`: an adapter or a model onto the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.cli.options import Json
from strop.cli.progress import alive
from strop.cli.terminal import console, print_json


def push(
    run: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A run, an adapter folder, or a merged model.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made where there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may load it. Without it: you alone.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Hub id of the base, where it was a folder or a file.", metavar="OWNER/NAME")
    ] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    as_json: Json = False,
) -> None:
    """Send an adapter or a merged model, with its card, to the Hugging Face Hub; private unless you say otherwise."""
    with alive(console, "loading the libraries") as sign:
        from strop.export.hub import push as push_to

        pushed = push_to(run, repo, public=public, base=base, message=message, say=sign.say)
    for file in pushed.left_out:
        console.print(f"not sent {file}", markup=False)
    for file in pushed.removed:
        console.print(f"removed  {file}, which an earlier push had left", markup=False)
    console.print(
        f"[bold]pushed[/]   {pushed.url} ({'private' if pushed.private else 'public'}): {len(pushed.files)} files, "
        f"{pushed.size_bytes / 1e6:.1f} MB, each compared with what the Hub has"
    )
    print_json(pushed.as_json(), as_json)
