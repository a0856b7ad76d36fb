"""The routes of `strop dash`. Reading folders is done by one thread, so that nothing need be locked."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from strop import __version__
from strop.dash import streams
from strop.dash.answering import Fields, answer, body_of, query, told
from strop.dash.desk import Desk
from strop.dash.jobs import option
from strop.dash.listing import aged
from strop.dash.reading import browse
from strop.errors import InputError
from strop.serve.guard import Guard, Rules

RELOAD_VARIABLE = "STROP_DASH_RELOAD"  # read the page's files at each request: for who works on them
TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png", ".json": "application/json",
    ".woff2": "font/woff2", ".txt": "text/plain; charset=utf-8", ".map": "application/json",
}  # fmt: skip
FLAG = re.compile(r"[a-z_]+(\.[a-z_0-9]+)?")


class Room:
    """What the routes share: the desk, and the thread that uses it."""

    def __init__(self, root: Path, opened: str | None) -> None:
        self.desk = Desk(root)
        self.opened = opened
        self.reader = ThreadPoolExecutor(1, "strop-dash-reader")

    async def ask(self, make: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What `make` gives, in the reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.reader, partial(make, *arguments, **named))


def create_app(root: Path, opened: str | None, hosts: frozenset[str], token: str, max_body_bytes: int) -> Guard:
    """The whole server as an ASGI application. root: the folder of runs; opened: the run to show first."""
    room = Room(root, opened)
    assets = _assets()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        room.reader.shutdown(cancel_futures=True)

    app = Starlette(
        routes=[*_routes(room), *(Route(path, _asset(path, place), methods=["GET"]) for path, place in assets.items())],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    return Guard(app, Rules(hosts, token, max_body_bytes, frozenset(assets)))


def _routes(room: Room) -> list[BaseRoute]:
    desk, ask = room.desk, room.ask

    async def hello(_: Request) -> Response:
        about: dict[str, Any] = {"version": __version__, "folder": str(desk.root.absolute()), "shown": str(desk.root)}
        about |= {"open": room.opened, "python": sys.executable, "pid": os.getpid(), "cwd": str(Path.cwd())}
        return answer(about)

    async def runs(_: Request) -> Response:
        rows = await ask(desk.runs)
        return answer({"runs": [aged(row) for row in rows], "ignored": (await ask(desk.listing.names))[1]})

    async def runs_stream(_: Request) -> Response:
        return _stream(streams.table(desk, ask))

    async def one(request: Request) -> Response:
        return answer(await ask(desk.detail, request.path_params["name"]))

    async def history(request: Request) -> Response:
        asked = query(request)
        by, points = asked.take("by", str, "step"), asked.number("points", 800)
        start, end = asked.number("from", None), asked.number("to", None)
        fields = tuple(filter(None, asked.take("fields", str, "").split(",")))
        asked.end()
        name = request.path_params["name"]
        return answer(await ask(desk.drawn, name, by, int(points or 0), start, end, fields))

    async def run_stream(request: Request) -> Response:
        asked, name = query(request), request.path_params["name"]
        by, points = asked.take("by", str, "step"), int(asked.number("points", 800) or 0)
        asked.end()
        await ask(desk.drawn, name, by, points, None, None, ())  # errors are told as an answer, not inside a stream
        return _stream(streams.run(desk, ask, name, by, points))

    async def log(request: Request) -> Response:
        return answer(await ask(desk.log, request.path_params["name"]))

    async def system(request: Request) -> Response:
        return answer(await ask(desk.look, query(request).take("run", str, None)))

    async def run_contents(request: Request) -> Response:
        return answer(await ask(desk.contents, request.path_params["name"]))

    async def duplicate(request: Request) -> Response:
        return answer(await ask(desk.duplicate, request.path_params["name"]))

    async def stop(request: Request) -> Response:
        asked = Fields(await body_of(request))
        force = asked.take("force", bool, False)
        asked.end()
        return answer(await ask(desk.stop, request.path_params["name"], force=force))

    async def resume(request: Request) -> Response:
        asked = Fields(await body_of(request))
        allowed, options = asked.take("allow_changed", list, []), asked.take("options", dict, {})
        asked.end()
        words = [f"--allow-changed={text}" for text in allowed] + options_words(options)
        return answer(await ask(desk.resume, request.path_params["name"], words))

    async def delete(request: Request) -> Response:
        asked = Fields(await body_of(request))
        confirmed = asked.take("confirm", str)
        asked.end()
        return answer(await ask(desk.delete, request.path_params["name"], confirmed))

    async def evaluate(request: Request) -> Response:
        asked, name = Fields(await body_of(request)), request.path_params["name"]
        data, metric = asked.take("data", str), asked.take("metric", str, "exact")
        longest, general = asked.take("max_new_tokens", int, 80), asked.take("general", bool, False)
        asked.end()
        words = ["eval", str(desk.root / name), f"--data={data}", f"--metric={metric}", f"--max-new-tokens={longest}"]
        return answer(await ask(desk.act, "evaluate", name, [*words, *(["--general"] if general else [])]))

    async def export(request: Request) -> Response:
        asked, name = Fields(await body_of(request)), request.path_params["name"]
        return answer(await ask(desk.act, *_export(asked, name, str(desk.root / name))))

    async def jobs(request: Request) -> Response:
        asked = query(request)
        wanted = {name: asked.take(name, str, None) for name in ("run", "kind")}
        asked.end()
        found = await ask(desk.jobs.all)
        return answer({"jobs": [job for job in found if all(v is None or job[k] == v for k, v in wanted.items())]})

    async def job(request: Request) -> Response:
        name = request.path_params["id"]
        about = await ask(desk.jobs.about, name)
        return answer({**about, "log": (await ask(desk.jobs.log, name))[0]})

    async def job_stream(request: Request) -> Response:
        name = request.path_params["id"]
        await ask(desk.jobs.folder, name)
        return _stream(streams.job(desk, ask, name))

    async def job_stop(request: Request) -> Response:
        Fields(await body_of(request)).end()
        return answer({"asked": await ask(desk.jobs.stop, request.path_params["id"])})

    async def listed(request: Request) -> Response:
        asked = query(request)
        path = asked.take("path", str, "")
        asked.end()
        return answer(await ask(browse, [Path.cwd(), desk.root.absolute()], path))

    get: list[tuple[str, Any]] = [
        ("/api/hello", hello), ("/api/runs", runs), ("/api/runs/stream", runs_stream), ("/api/runs/{name}", one),
        ("/api/runs/{name}/history", history), ("/api/runs/{name}/stream", run_stream), ("/api/runs/{name}/log", log),
        ("/api/runs/{name}/contents", run_contents), ("/api/runs/{name}/duplicate", duplicate),
        ("/api/system", system), ("/api/jobs", jobs), ("/api/jobs/{id}", job), ("/api/jobs/{id}/stream", job_stream),
        ("/api/files", listed),
    ]  # fmt: skip
    post: list[tuple[str, Any]] = [
        ("/api/runs/{name}/stop", stop), ("/api/runs/{name}/resume", resume), ("/api/runs/{name}/delete", delete),
        ("/api/runs/{name}/evaluate", evaluate), ("/api/runs/{name}/export", export),
        ("/api/jobs/{id}/stop", job_stop),
    ]  # fmt: skip
    return [
        *(Route(path, told(endpoint), methods=["GET"]) for path, endpoint in get),
        *(Route(path, told(endpoint), methods=["POST"]) for path, endpoint in post),
    ]


def options_words(options: dict[str, Any]) -> list[str]:
    """A recipe's fields as flags. Raises InputError for a name that is none; the CLI checks the rest."""
    wrong = next((name for name in options if not FLAG.fullmatch(name)), None)
    if wrong is not None or "out" in options:
        raise InputError(f"{wrong or 'out'}: not an option here", fix="see /api/schema")
    return [word for field, value in options.items() for word in option(field, value)]


def _export(asked: Fields, name: str, run: str) -> tuple[str, str, list[str]]:
    kind, out = asked.take("kind", str), asked.take("out", str)
    dtype, type_ = asked.take("dtype", str, None), asked.take("type", str, None)
    data, unmeasured = asked.take("data", str, None), asked.take("no_parity", bool, False)
    asked.end()
    if kind not in ("merge", "gguf", "ollama"):
        raise InputError(f"kind: {kind}: no such export", fix="merge, gguf or ollama")
    words = ["merge", run] if kind == "merge" else ["export", kind, run]
    words += [f"--out={out}"] + ([f"--dtype={dtype}"] if dtype else []) + ([f"--type={type_}"] if type_ else [])
    words += ([f"--data={data}"] if data else []) + (["--no-parity"] if unmeasured else [])
    return kind, name, words


def _stream(events: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream")


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


def _asset(path: str, place: Path) -> Callable[[Request], Any]:
    kind = TYPES[Path(place.name).suffix]
    content = None if os.environ.get(RELOAD_VARIABLE) else place.read_bytes()

    async def asset(_: Request) -> Response:
        return Response(place.read_bytes() if content is None else content, media_type=kind)

    return asset


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {"kind": "HTTPError", "message": str(error.detail), "fix": "", "where": []}
    return JSONResponse({"error": told}, error.status_code)
