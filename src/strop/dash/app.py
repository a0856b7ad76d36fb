"""`strop dash` as an ASGI application and as a server: access rules, routes and the files of the page."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from strop.dash.dashboard import Services
from strop.dash.jobs import TOKEN_VARIABLE
from strop.dash.routes import action_routes, read_routes
from strop.errors import FolderError, InputError
from strop.runs.folder import is_run
from strop.serve.server import AccessRules, Guard, Server, open_address

MAX_BODY_BYTES = 1 << 20
CLOSING_SECONDS = 1  # event streams never end by themselves
RELOAD_VARIABLE = "STROP_DASH_RELOAD"  # read the page's files at each request, for development
TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png", ".json": "application/json",
    ".woff2": "font/woff2", ".txt": "text/plain; charset=utf-8", ".map": "application/json",
}  # fmt: skip


def create_app(root: Path, opened: str | None, hosts: frozenset[str], token: str, max_body_bytes: int) -> Guard:
    """Create the ASGI application. root: the folder of runs; opened: the run to show first."""
    services = Services(root, opened)
    assets = _assets()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        services.close()

    files = [Route(path, _asset(place), methods=["GET"]) for path, place in assets.items()]
    app = Starlette(
        routes=[*read_routes(services), *action_routes(services), *files],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    return Guard(app, AccessRules(hosts, token, max_body_bytes, frozenset(assets)))


def _assets() -> dict[str, Path]:
    """Return the files of the page by URL path."""
    root = Path(__file__).with_name("static")
    files = [file for file in root.rglob("*") if file.suffix in TYPES and file.is_file()]
    return {"/": root / "index.html", **{f"/{file.relative_to(root).as_posix()}": file for file in files}}


def _asset(place: Path) -> Callable[[Request], Any]:
    kind = TYPES[Path(place.name).suffix]
    content = None if os.environ.get(RELOAD_VARIABLE) else place.read_bytes()

    async def asset(_: Request) -> Response:
        return Response(place.read_bytes() if content is None else content, media_type=kind)

    return asset


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    result = {"kind": "HTTPError", "message": str(error.detail), "fix": "", "where": []}
    return JSONResponse({"error": result}, error.status_code)


def dash(
    folder: Path, *, host: str, port: int, more_hosts: Sequence[str], ready: Callable[[dict[str, Any]], None]
) -> int:
    """Serve until a signal arrives and return its number. `ready` is called when requests are accepted.

    Raises FolderError if the folder is a file, InputError for an unusable address.
    """
    opened = folder.name if is_run(folder) else None
    root = folder.parent if opened else folder
    if root.exists() and not root.is_dir():
        raise FolderError(f"{root}: not a folder", fix="give the folder that holds runs")
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
    if not token.isascii() or any(sign.isspace() for sign in token):
        raise InputError(f"{TOKEN_VARIABLE}: must be ASCII characters without spaces", fix="openssl rand -hex 24")
    address = open_address(host, port, token, more_hosts)
    app = create_app(root, opened, address.hosts, token, MAX_BODY_BYTES)
    about = {"url": f"{address.url}/#token={token}", "token": token, "folder": str(root.absolute()), "pid": os.getpid()}
    server = Server(app, lambda: ready(about), shutdown_timeout=CLOSING_SECONDS)
    server.run(sockets=[address.socket])
    return server.signal
