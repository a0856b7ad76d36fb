"""`strop dash` as an ASGI application: the door, the routes, the page's files."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from strop.dash import action_routes, read_routes
from strop.dash.responses import Room
from strop.serve.guard import AccessRules, Guard

RELOAD_VARIABLE = "STROP_DASH_RELOAD"  # read the page's files at each request: for who works on them
TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png", ".json": "application/json",
    ".woff2": "font/woff2", ".txt": "text/plain; charset=utf-8", ".map": "application/json",
}  # fmt: skip


def create_app(root: Path, opened: str | None, hosts: frozenset[str], token: str, max_body_bytes: int) -> Guard:
    """The whole server as an ASGI application. root: the folder of runs; opened: the run to show first."""
    room = Room(root, opened)
    assets = _assets()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        room.close()

    files = [Route(path, _asset(place), methods=["GET"]) for path, place in assets.items()]
    app = Starlette(
        routes=[*read_routes.routes(room), *action_routes.routes(room), *files],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    return Guard(app, AccessRules(hosts, token, max_body_bytes, frozenset(assets)))


def _assets() -> dict[str, Path]:
    """Addresses of the page's files."""
    root = Path(__file__).with_name("static")
    found: dict[str, Path] = {}
    for place in root.rglob("*"):
        if place.suffix in TYPES and place.is_file():
            found[f"/{place.relative_to(root).as_posix()}"] = place
    if "/index.html" in found:
        found["/"] = found["/index.html"]
    return found


def _asset(place: Path) -> Callable[[Request], Any]:
    kind = TYPES[Path(place.name).suffix]
    content = None if os.environ.get(RELOAD_VARIABLE) else place.read_bytes()

    async def asset(_: Request) -> Response:
        return Response(place.read_bytes() if content is None else content, media_type=kind)

    return asset


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {"kind": "HTTPError", "message": str(error.detail), "fix": "", "where": []}
    return JSONResponse({"error": told}, error.status_code)
