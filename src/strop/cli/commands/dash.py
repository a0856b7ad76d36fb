"""`strop dash`: show runs in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from strop.cli.options import Json
from strop.cli.tables import console, print_json


def dash(
    folder: Annotated[Path, typer.Argument(help="Folder that contains run folders.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8800,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Additional host name that browsers may use; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show runs in a browser: view, compare, start, stop and export them."""
    from strop.dash.app import dash as run_server
    from strop.serve.server import exit_code

    def ready(about: dict[str, Any]) -> None:
        console.print(f"[bold]page[/]     {about['url']}", soft_wrap=True)
        console.print("the address contains the access key: keep it secret  (Ctrl-C stops the page; runs continue)")
        print_json(about, as_json)

    ended = run_server(folder, host=host, port=port, more_hosts=allow_host or [], ready=ready)
    console.print("[bold]stopped[/]")
    raise typer.Exit(exit_code(ended))
