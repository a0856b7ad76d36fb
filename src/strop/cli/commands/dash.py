"""`strop dash`: a page over run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from strop.cli.options import Json
from strop.cli.terminal import console, print_json


def dash(
    folder: Annotated[Path, typer.Argument(help="The folder that holds run folders.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8800,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name that browsers may call the server by.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show runs in a browser: look, compare, start, stop and export them."""
    from strop.dash.app import dash as run_server
    from strop.serve.address import exit_code

    def ready(about: dict[str, Any]) -> None:
        console.print(f"[bold]page[/]     {about['url']}", soft_wrap=True)
        console.print("the address holds the key to it: give it to nobody  (Ctrl-C ends the page; runs go on)")
        print_json(about, as_json)

    ended = run_server(folder, host=host, port=port, more_hosts=allow_host or [], ready=ready)
    console.print("[bold]stopped[/]")
    raise typer.Exit(exit_code(ended))
