"""`strop dash`: from a folder to a server that runs until it is told to stop."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from strop.dash.app import create_app
from strop.dash.jobs import TOKEN_VARIABLE
from strop.errors import FolderError, InputError
from strop.runs.folder import is_run
from strop.serve.address import Server, open_address

MAX_BODY_BYTES = 1 << 20
CLOSING_SECONDS = 1  # a stream has no end of its own


def dash(
    folder: Path, *, host: str, port: int, more_hosts: Sequence[str], ready: Callable[[dict[str, Any]], None]
) -> int:
    """Serves until a signal comes; gives its number. `ready` is called when requests can come.

    Raises FolderError for a folder that is a file, InputError for an address that cannot be used.
    """
    opened = folder.name if is_run(folder) else None
    root = folder.parent if opened else folder
    if root.exists() and not root.is_dir():
        raise FolderError(f"{root}: not a folder", fix="give the folder that holds runs")
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
    if not token.isascii() or any(sign.isspace() for sign in token):
        raise InputError(f"{TOKEN_VARIABLE}: must be plain characters without blanks", fix="openssl rand -hex 24")
    address = open_address(host, port, token, more_hosts)
    app = create_app(root, opened, address.hosts, token, MAX_BODY_BYTES)
    about = {"url": f"{address.url}/#token={token}", "token": token, "folder": str(root.absolute()), "pid": os.getpid()}
    server = Server(app, lambda: ready(about), closing_s=CLOSING_SECONDS)
    server.run(sockets=[address.socket])
    return server.signal
