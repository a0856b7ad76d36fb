"""`strop dash` as an ASGI application and as a server: access rules, routes, streams and the files of the page."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
from strop.dash.dashboard import Dashboard, Services
from strop.dash.files import browse, run_path, split_names
from strop.dash.history import StreamPosition
from strop.dash.jobs import TOKEN_VARIABLE, Busy, forward, option
from strop.dash.runs import with_heartbeat_age
from strop.data.reading.json_reader import JsonError, loads
from strop.errors import FolderError, InputError, StropError
from strop.evaluation.metrics import METRICS
from strop.runs.folder import is_run, run_name
from strop.serve.server import AccessRules, Guard, Server, open_address

Endpoint = Callable[[Request], Awaitable[Any]]  # returns a response or a JSON value
Ask = Callable[..., Awaitable[Any]]
FLAG = re.compile(r"[a-z_-]+(\.[a-z_0-9]+)?")
STATUS = {Busy: 409, FolderError: 404, InputError: 400}
LOOK_S = 1.0
TABLE_S = 3.0
SYSTEM_S = 2.0
QUIET_S = 15.0  # seconds between keep-alive comments, which reveal lost connections
KEEP_ALIVE = b": .\n\n"
CHANGING = (  # fields of a row that change at every step
    "heartbeat", "updated", "step", "loss", "eval_loss", "tokens", "tokens_per_s", "seconds_left", "sparkline", "epoch",
    "bytes",
)  # fmt: skip


# --- requests and responses -------------------------------------------------------------------------------------


async def read_fields(request: Request, **fields: Any) -> list[Any]:
    """Return fields, given as type or (type, default), of the query or a POST's JSON body. Raises InputError."""
    post = request.method == "POST"
    given = await _read_body(request) if post else dict(request.query_params)
    values = []
    for name, wanted in fields.items():
        kind, *default = wanted if isinstance(wanted, tuple) else (wanted,)
        value = given.pop(name, None)
        if kind is float and not post:
            value = _parse_number(name, value)
        if value is None and default:
            value = default[0]
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{name}: {'is required' if value is None else f'is not {kind.__name__}'}")
        values.append(value)
    if given:
        raise InputError(f"unknown parameter: {next(iter(given))}")
    return values


async def _read_body(request: Request) -> dict[str, Any]:
    try:
        body = loads((await request.body()).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"the body is not UTF-8: {error.reason}") from None
    except JsonError as error:
        raise InputError(f"the body is not JSON: {error.what}") from None
    except RecursionError:
        raise InputError("the body is nested too deeply") from None
    if not isinstance(body, dict):
        raise InputError("the body is not a JSON object")
    return body


def _parse_number(name: str, text: str | None) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name}: {text[:80]!r} is not a number")
    return value


def _clean(value: Any) -> Any:
    """Replace NaN, which JSON lacks, and lone surrogates, which UTF-8 lacks."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except ValueError:
        return json.loads(json.dumps(value), parse_constant=lambda _: None)


def _sse_event(name: str, value: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(_clean(value), ensure_ascii=False)}\n\n".encode("utf-8", "replace")


_event_response = partial(StreamingResponse, media_type="text/event-stream")


def _action(ask: Ask, function: Callable[..., Any], **fields: Any) -> Endpoint:
    """Return the endpoint that calls a function with the names in the path and the fields of the request."""

    async def endpoint(request: Request) -> Any:
        values = await read_fields(request, **fields)
        return await ask(function, *request.path_params.values(), *values)

    return endpoint


def _routes(method: str, endpoints: dict[str, Endpoint]) -> list[BaseRoute]:
    """Return the routes of endpoints by path below /api; errors of strop become error responses."""

    def wrap(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            try:
                result = await endpoint(request)
            except StropError as error:
                status = next((number for kind, number in STATUS.items() if isinstance(error, kind)), 503)
                return JSONResponse({"error": error.as_json()}, status)
            return result if isinstance(result, Response) else JSONResponse(_clean(result))

        return respond

    return [Route(f"/api/{path}", wrap(endpoint), methods=[method]) for path, endpoint in endpoints.items()]


# --- routes -----------------------------------------------------------------------------------------------------


def read_routes(services: Services) -> list[BaseRoute]:
    dashboard, ask = services.dashboard, services.ask

    def read(function: Callable[..., Any]) -> Endpoint:
        """Return the endpoint that calls a function with the names in the path."""

        async def endpoint(request: Request) -> Any:
            return await ask(function, *request.path_params.values())

        return endpoint

    async def hello(_: Request) -> Any:
        return {
            "version": __version__, "folder": str(dashboard.root.absolute()), "shown": str(dashboard.root),
            "open": services.opened, "python": sys.executable, "pid": os.getpid(), "cwd": str(Path.cwd()),
            "metrics": list(METRICS),
        }  # fmt: skip

    async def runs(_: Request) -> Any:
        rows = [with_heartbeat_age(row) for row in await ask(dashboard.runs)]
        return {"runs": rows, "ignored": (await ask(dashboard.listing.names))[1]}

    async def runs_stream(_: Request) -> Response:
        return _event_response(stream_table(dashboard, ask))

    async def history(request: Request) -> Any:
        by, points, start, end, names = await read_fields(
            request, by=(str, "step"), points=(float, 800), **{"from": (float, None)}, to=(float, None),
            fields=(str, ""),
        )  # fmt: skip
        series = tuple(filter(None, names.split(",")))
        return await ask(dashboard.curves, request.path_params["name"], by, int(points), start, end, series)

    async def run_stream(request: Request) -> Response:
        by, points = await read_fields(request, by=(str, "step"), points=(float, 800))
        how = (request.path_params["name"], by, int(points))
        await ask(dashboard.curves, *how, None, None, ())  # raise errors before the stream starts
        return _event_response(stream_run(dashboard, ask, *how))

    async def system(request: Request) -> Any:
        return await ask(dashboard.look, request.query_params.get("run"))

    async def answers(request: Request) -> Any:
        wanted, order, search, offset, count = await read_fields(
            request, filter=(str, "all"), order=(str, "row"), search=(str, ""), offset=(float, 0), count=(float, 50)
        )
        page = max(0, int(offset)), min(max(0, int(count)), 500)
        return await ask(dashboard.answers, request.path_params["name"], wanted, order, search, *page)

    async def schema(_: Request) -> Any:
        return await services.planner.ask("schema")

    async def jobs(request: Request) -> Any:
        run, kind = await read_fields(request, run=(str, None), kind=(str, None))
        known = await ask(dashboard.jobs.all)
        return {"jobs": [job for job in known if run in (None, job["run"]) and kind in (None, job["kind"])]}

    async def job(request: Request) -> Any:
        name = request.path_params["id"]
        return {**await ask(dashboard.jobs.about, name), "log": (await ask(dashboard.jobs.log, name))[0]}

    async def job_stream(request: Request) -> Response:
        name = request.path_params["id"]
        await ask(dashboard.jobs.folder, name)
        return _event_response(stream_job(dashboard, ask, name))

    compare = _action(ask, lambda names: dashboard.compare(split_names(names)), runs=str)
    files = _action(ask, lambda path: browse([Path.cwd(), dashboard.root.absolute()], path), path=(str, ""))
    endpoints: dict[str, Endpoint] = {
        "hello": hello, "runs": runs, "stream": runs_stream, "runs/stream": runs_stream,
        "runs/{name}": read(dashboard.detail), "runs/{name}/history": history, "runs/{name}/stream": run_stream,
        "runs/{name}/log": read(dashboard.log), "runs/{name}/contents": read(dashboard.contents),
        "runs/{name}/duplicate": read(dashboard.duplicate), "runs/{name}/answers": answers,
        "runs/{name}/ballot": read(dashboard.ballot), "compare": compare, "schema": schema, "system": system,
        "jobs": jobs, "jobs/{id}": job, "jobs/{id}/stream": job_stream, "files": files,
        "machine": read(dashboard.machine), "talk": read(services.chat.about),
    }  # fmt: skip
    return _routes("GET", endpoints)


def action_routes(services: Services) -> list[BaseRoute]:
    dashboard, ask = services.dashboard, services.ask

    async def plan(request: Request) -> Any:
        options, out, memory, gpu, thorough = await read_fields(
            request, options=dict, name=(str, None), memory=(str, None), gpu=(str, None), thorough=(bool, False)
        )
        option_arguments(options)
        name = run_path(dashboard.root, out).name if out else await ask(dashboard.unused_run_name, stem(options))
        folder = str(dashboard.root / name)
        how = {"options": options, "memory": memory, "gpu": gpu, "out": folder, "thorough": thorough}
        return {**await services.planner.ask("plan", **how), "name": name, "out": folder}

    async def data(request: Request) -> Any:
        options, part, order, ids, offset, count = await read_fields(
            request, options=dict, part=(str, "train"), order=(str, "file"), ids=(bool, False), offset=(int, 0),
            count=(int, 20),
        )  # fmt: skip
        option_arguments(options)
        page = {"part": part, "order": order, "offset": max(0, offset), "count": max(0, count), "ids": ids}
        return await services.data.ask("rows", options=options, **page)

    async def start(request: Request) -> Any:
        options, name, memory = await read_fields(request, options=dict, name=(str, None), memory=(str, None))
        words = option_arguments(options) + ([f"--memory={memory}"] if memory else [])
        name = name or await ask(dashboard.unused_run_name, stem(options))
        return {"job": await ask(dashboard.train, name, words), "run": name}

    async def resume(request: Request) -> Any:
        allowed, options = await read_fields(request, allow_changed=(list, []), options=(dict, {}))
        words = [f"--allow-changed={text}" for text in allowed] + option_arguments(options)
        return await ask(dashboard.resume, request.path_params["name"], words)

    async def evaluate(request: Request) -> Any:
        data, metric, most, general = await read_fields(
            request, data=str, metric=(str, "exact"), max_new_tokens=(int, 80), general=(bool, False)
        )
        name = request.path_params["name"]
        words = ["eval", str(dashboard.root / name), f"--data={data}", f"--metric={metric}", f"--max-new-tokens={most}"]
        return await ask(dashboard.act, "evaluate", name, words + ["--general"] * general)

    async def export(request: Request) -> Any:
        kind, out, dtype, type_, data, unmeasured = await read_fields(
            request, kind=str, out=str, dtype=(str, None), type=(str, None), data=(str, None), no_parity=(bool, False)
        )
        if kind not in ("merge", "gguf", "ollama"):
            raise InputError(f"kind: {kind}: unknown export", fix="merge, gguf or ollama")
        name = request.path_params["name"]
        words = [*(["merge"] if kind == "merge" else ["export", kind]), str(dashboard.root / name), f"--out={out}"]
        words += [f"--{key}={value}" for key, value in (("dtype", dtype), ("type", type_), ("data", data)) if value]
        return await ask(dashboard.act, kind, name, words + ["--no-parity"] * unmeasured)

    async def chat_forward(request: Request) -> Response:
        where, body = await ask(services.chat.where), await request.body()
        status, kind, parts = await forward(where, request.method, request.url.path.removeprefix("/api/talk"), body)
        return StreamingResponse(parts, status, media_type=kind)

    endpoints: dict[str, Endpoint] = {
        "plan": plan,
        "data": data,
        "start": start,
        "runs/{name}/stop": _action(ask, dashboard.stop, force=(bool, False)),
        "runs/{name}/resume": resume,
        "runs/{name}/delete": _action(ask, dashboard.delete, confirm=str),
        "runs/{name}/evaluate": evaluate,
        "runs/{name}/export": export,
        "runs/{name}/vote": _action(ask, dashboard.vote, ballot=str, choice=str),
        "jobs/{id}/stop": _action(ask, lambda job: {"fields": dashboard.jobs.stop(job)}),
        "machine/doctor": _action(ask, dashboard.doctor),
        "talk/start": _action(ask, partial(dashboard.start_chat, services.chat), names=(list, []), model=(str, None)),
        "talk/stop": _action(ask, services.chat.stop),
        "talk/v1/chat/completions": chat_forward,
    }
    return [*_routes("POST", endpoints), *_routes("GET", {"talk/v1/models": chat_forward})]


def stem(options: dict[str, Any]) -> str:
    """Return the base name of a run on this data."""
    named = options.get("data.train", options.get("data"))
    first = named[0] if isinstance(named, list) and named else named
    return run_name(str(first or ""))


def option_arguments(options: dict[str, Any]) -> list[str]:
    """Return recipe fields as flags. Raises InputError for an invalid name; the CLI checks the rest."""
    wrong = next((name for name in options if not FLAG.fullmatch(name)), None)
    if wrong is not None or "out" in options:
        raise InputError(f"{wrong or 'out'}: not an option", fix="see /api/schema")
    return [word for field, value in options.items() for word in option(field, value)]


# --- streams ----------------------------------------------------------------------------------------------------


async def stream_table(dashboard: Dashboard, ask: Ask) -> AsyncIterator[bytes]:
    """Stream all runs, then those that changed."""
    sent: dict[str, dict[str, Any]] = {}
    quiet = 0.0
    while True:
        rows = await ask(dashboard.runs)  # reads only file times if nothing changed
        now = {row["name"]: row for row in rows}
        if not sent and quiet == 0.0:
            yield _sse_event("runs", {"runs": [with_heartbeat_age(row) for row in rows]})
        else:
            changed = [with_heartbeat_age(row) for name, row in now.items() if sent.get(name) != row]
            gone = [name for name in sent if name not in now]
            if changed or gone:
                yield _sse_event("changed", {"runs": changed, "gone": gone})
                quiet = 0.0
        sent = now
        quiet += TABLE_S
        if quiet > QUIET_S:
            yield KEEP_ALIVE
            quiet = TABLE_S
        await asyncio.sleep(TABLE_S)


async def stream_run(dashboard: Dashboard, ask: Ask, name: str, by: str, points: int) -> AsyncIterator[bytes]:
    """Stream one run: its details and curves, then updates, and the machine's state."""
    seen: StreamPosition | None = None
    before: Any = None
    looked = SYSTEM_S
    while True:
        try:
            now = await ask(_about, dashboard, name)
            if now != before:
                yield _sse_event("run", await ask(dashboard.detail, name))
                before = now
            kind, update, seen = await ask(dashboard.updates, name, by, points, seen)
            if update is not None:
                yield _sse_event(kind, update)
            looked += LOOK_S
            if looked >= SYSTEM_S:
                yield _sse_event("system", await ask(dashboard.look, name))
                looked = 0.0
        except StropError as error:
            yield _sse_event("gone", {"error": error.as_json()})
            return
        await asyncio.sleep(LOOK_S)


def _about(dashboard: Dashboard, name: str) -> Any:
    """Return what the page shows besides curves, without fields that change at every step."""
    row = dashboard.row(name)
    jobs = [(job["id"], job["state"]) for job in dashboard.jobs_of(name)]
    saves = dashboard.history(name).num_saves
    return {key: value for key, value in row.items() if key not in CHANGING}, saves, jobs


async def stream_job(dashboard: Dashboard, ask: Ask, name: str) -> AsyncIterator[bytes]:
    """Stream the state and output of a job until it ends."""
    before: Any = None
    place, quiet = None, 0.0
    while True:
        about = await ask(dashboard.jobs.about, name)
        text, place = await ask(dashboard.jobs.log, name, place)
        quiet = 0.0 if text or about != before else quiet + LOOK_S
        if text:
            yield _sse_event("log", {"text": text})
        if about != before:
            yield _sse_event("job", about)
            before = about
        if quiet >= QUIET_S:
            yield KEEP_ALIVE
            quiet = 0.0
        if about["state"] != "running":
            return
        await asyncio.sleep(LOOK_S)


# --- the server ------------------------------------------------------------------------------------------------

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
    folder = Path(__file__).with_name("static")
    files = [file for file in folder.rglob("*") if file.suffix in TYPES and file.is_file()]
    assets = {"/": folder / "index.html", **{f"/{file.relative_to(folder).as_posix()}": file for file in files}}

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        services.close()

    pages = [Route(path, _asset(place), methods=["GET"]) for path, place in assets.items()]
    app = Starlette(
        routes=[*read_routes(services), *action_routes(services), *pages],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    return Guard(app, AccessRules(hosts, token, max_body_bytes, frozenset(assets)))


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
    """Serve until a signal arrives and return its number. `ready` is called when requests are accepted."""
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
