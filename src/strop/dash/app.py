"""The ASGI application and the server of `strop dash`."""

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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from strop import __version__
from strop.dash.dashboard import Dashboard, Services
from strop.dash.files import browse, display_path, split_names
from strop.dash.history import StreamPosition
from strop.dash.jobs import TOKEN_VARIABLE, Busy, forward, option_flags
from strop.dash.runs import with_heartbeat_age
from strop.dash.transfer import MAX_UPLOAD_BYTES, Upload
from strop.data.reading.json_reader import JsonError, loads
from strop.errors import FolderError, InputError, StropError
from strop.evaluation.metrics import METRICS, PREFERENCE
from strop.runs.events import STEP_TITLES
from strop.runs.folder import is_run, run_name
from strop.serve.server import AccessRules, Guard, Server, open_address

Endpoint = Callable[[Request], Awaitable[Any]]  # returns a response or a JSON value
Call = Callable[..., Awaitable[Any]]  # calls a function in the reader thread
OPTION_NAME = re.compile(r"[a-z_-]+(\.[a-z_0-9]+)?")
ERROR_STATUS = {Busy: 409, FolderError: 404, InputError: 400}
RUN_POLL_S = 1.0
TABLE_POLL_S = 3.0
SYSTEM_POLL_S = 2.0
KEEP_ALIVE = b": .\n\n"  # an SSE comment, which reveals a lost connection
STEP_FIELDS = (  # fields of a row that change at every step
    "heartbeat", "updated", "step", "loss", "eval_loss", "tokens", "tokens_per_s", "seconds_left", "step_time",
    "sparkline", "epoch", "bytes",
)  # fmt: skip


# --- requests and responses -------------------------------------------------------------------------------------


async def read_fields(request: Request, **fields: Any) -> list[Any]:
    """Read fields, given as type or (type, default), from the query or the JSON body of a POST. Raises InputError."""
    post = request.method == "POST"
    parameters = await _read_body(request) if post else dict(request.query_params)
    values = []
    for name, spec in fields.items():
        kind, *default = spec if isinstance(spec, tuple) else (spec,)
        value = parameters.pop(name, None)
        if kind is float and not post:
            value = _parse_number(name, value)
        if value is None and default:
            value = default[0]
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{name}: {'is required' if value is None else f'is not {kind.__name__}'}")
        values.append(value)
    if parameters:
        raise InputError(f"unknown parameter: {next(iter(parameters))}")
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


def _make_endpoint(call: Call, function: Callable[..., Any], **fields: Any) -> Endpoint:
    """Return an endpoint that calls a function with the path parameters and the fields of the request."""

    async def endpoint(request: Request) -> Any:
        values = await read_fields(request, **fields) if fields or request.method == "POST" else []
        return await call(function, *request.path_params.values(), *values)

    return endpoint


def _routes(method: str, endpoints: dict[str, Endpoint]) -> list[BaseRoute]:
    """Return routes for endpoints by path below /api, which turn a StropError into an error response."""

    def wrap(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            try:
                result = await endpoint(request)
            except StropError as error:
                status = next((number for kind, number in ERROR_STATUS.items() if isinstance(error, kind)), 503)
                return JSONResponse({"error": error.as_json()}, status)
            return result if isinstance(result, Response) else JSONResponse(_clean(result))

        return respond

    return [Route(f"/api/{path}", wrap(endpoint), methods=[method]) for path, endpoint in endpoints.items()]


# --- routes -----------------------------------------------------------------------------------------------------


def get_routes(services: Services) -> list[BaseRoute]:
    dashboard, call = services.dashboard, services.call
    endpoint = partial(_make_endpoint, call)

    async def hello(_: Request) -> Any:
        return {
            "version": __version__, "folder": str(dashboard.root.absolute()), "shown": str(dashboard.root),
            "open": services.opened, "python": sys.executable, "pid": os.getpid(), "cwd": str(Path.cwd()),
            "metrics": [*METRICS, PREFERENCE], "titles": STEP_TITLES, "max_upload_bytes": MAX_UPLOAD_BYTES,
            "has_llama_cpp": find_spec("llama_cpp") is not None,  # without importing it
        }  # fmt: skip

    async def runs(_: Request) -> Any:
        rows = [with_heartbeat_age(row) for row in await call(dashboard.runs)]
        return {"runs": rows, "ignored": (await call(dashboard.listing.names))[1]}

    async def runs_stream(_: Request) -> Response:
        return _event_response(stream_table(dashboard, call))

    async def run_stream(request: Request) -> Response:
        by, points = await read_fields(request, by=(str, "step"), points=(float, 800))
        curve = (request.path_params["name"], by, int(points))
        await call(dashboard.curves, *curve, None, None, "")  # raise errors before the stream starts
        return _event_response(stream_run(dashboard, call, *curve))

    async def sweep_stream(request: Request) -> Response:
        name = request.path_params["name"]
        await call(dashboard.sweep, name)
        return _event_response(stream_sweep(dashboard, call, name))

    async def schema(_: Request) -> Any:
        return await services.schema()

    def jobs(run: str | None, kind: str | None) -> Any:
        all_jobs = dashboard.jobs.all()
        return {"jobs": [job for job in all_jobs if run in (None, job["run"]) and kind in (None, job["kind"])]}

    def job(name: str) -> Any:
        return {**dashboard.jobs.status(name), "log": dashboard.jobs.log(name)[0]}

    async def job_stream(request: Request) -> Response:
        name = request.path_params["id"]
        await call(dashboard.jobs.folder, name)
        return _event_response(stream_job(dashboard, call, name))

    history = endpoint(
        dashboard.curves, by=(str, "step"), points=(float, 800), **{"from": (float, None)}, to=(float, None),
        fields=(str, ""),
    )  # fmt: skip
    answers = endpoint(
        dashboard.answers, filter=(str, "all"), order=(str, "row"), search=(str, ""), offset=(float, 0),
        count=(float, 50),
    )  # fmt: skip
    compare = endpoint(lambda names: dashboard.compare(split_names(names)), runs=str)
    folders = [Path.cwd(), dashboard.root.absolute(), dashboard.data_folder]
    files = endpoint(lambda path, kind: browse(folders, path, kind), path=(str, ""), kind=(str, ""))

    async def download(request: Request) -> Response:
        chunks = await call(dashboard.download, *request.path_params.values())
        return StreamingResponse(chunks, media_type="application/octet-stream")

    async def download_export(request: Request) -> Response:
        chunks = await call(dashboard.download_export, *request.path_params.values())
        return StreamingResponse(chunks, media_type="application/octet-stream")

    endpoints: dict[str, Endpoint] = {
        "hello": hello, "runs": runs, "stream": runs_stream, "runs/stream": runs_stream,
        "runs/{name}": endpoint(dashboard.detail), "runs/{name}/history": history, "runs/{name}/stream": run_stream,
        "runs/{name}/log": endpoint(dashboard.log), "runs/{name}/contents": endpoint(dashboard.contents),
        "runs/{name}/duplicate": endpoint(dashboard.duplicate), "runs/{name}/answers": answers,
        "runs/{name}/download/{kind}": download,
        "runs/{name}/samples": endpoint(dashboard.samples, step=(float, None)),
        "sweeps/{name}": endpoint(dashboard.sweep), "sweeps/{name}/stream": sweep_stream,
        "runs/{name}/ballot": endpoint(dashboard.ballot), "compare": compare, "schema": schema,
        "system": endpoint(dashboard.system_state, run=(str, None)),
        "jobs": endpoint(jobs, run=(str, None), kind=(str, None)), "jobs/{id}": endpoint(job),
        "jobs/{id}/stream": job_stream, "jobs/{id}/download": download_export, "files": files,
        "machine": endpoint(dashboard.machine), "chat": endpoint(services.chat.status),
    }  # fmt: skip
    return _routes("GET", endpoints)


def post_routes(services: Services) -> list[BaseRoute]:
    dashboard, call = services.dashboard, services.call
    endpoint = partial(_make_endpoint, call)

    async def plan(request: Request) -> Any:
        options, given_name, memory, gpu, thorough = await read_fields(
            request, options=dict, name=(str, None), memory=(str, None), gpu=(str, None), thorough=(bool, False)
        )
        option_arguments(options)
        name = given_name or await call(dashboard.unused_run_name, stem(options))
        await call(dashboard.new_run_path, name)
        folder = str(dashboard.root / name)
        parameters = {"options": options, "memory": memory, "gpu": gpu, "out": folder, "thorough": thorough}
        planned = await services.planner.call("plan", **parameters)
        return {**planned, "name": name, "out": folder, "training": await call(dashboard.running_names)}

    async def data(request: Request) -> Any:
        options, part, order, ids, offset, count = await read_fields(
            request, options=dict, part=(str, "train"), order=(str, "file"), ids=(bool, False), offset=(int, 0),
            count=(int, 20),
        )  # fmt: skip
        option_arguments(options)
        page = {"part": part, "order": order, "offset": max(0, offset), "count": max(0, count), "ids": ids}
        return await services.data.call("rows", options=options, **page)

    def start(options: dict[str, Any], name: str | None, memory: str | None) -> Any:
        arguments = option_arguments(options) + ([f"--memory={memory}"] if memory else [])
        name = name or dashboard.unused_run_name(stem(options))
        return {"job": dashboard.train(name, arguments), "run": name}

    def resume(name: str, allowed: list[Any], options: dict[str, Any]) -> Any:
        return dashboard.resume(name, [f"--allow-changed={text}" for text in allowed] + option_arguments(options))

    async def evaluate(request: Request) -> Any:
        data, metric, max_tokens, general = await read_fields(
            request, data=str, metric=(str, None), max_new_tokens=(int, None), general=(bool, False)
        )
        if not data:
            raise InputError("data: no file is chosen", fix="choose a file of rows that the run was not trained on")
        if max_tokens is not None and max_tokens < 1:
            raise InputError("max-new-tokens: must be at least 1")
        name = request.path_params["name"]
        path = await call(dashboard.adapter_path, name)
        await services.data.call("check_inputs", models=[path], data=[data], metrics=[metric or None])
        arguments = ["eval", path, f"--data={data}"]
        arguments += [f"--metric={metric}"] if metric else []
        arguments += [f"--max-new-tokens={max_tokens}"] if max_tokens is not None else []
        arguments += ["--general"] if general else []
        return await call(dashboard.jobs.start, "evaluate", arguments, name)

    async def export(request: Request) -> Any:
        kind, out, no_parity, dtype, gguf_type, data = await read_fields(
            request, kind=str, out=str, no_parity=(bool, False), dtype=(str, None), type=(str, None), data=(str, None)
        )
        if kind not in ("merge", "gguf", "ollama"):
            raise InputError(f"kind: {kind}: unknown export", fix="merge, gguf or ollama")
        if not out:
            raise InputError("out: no path is given", fix="give the path of a new file or folder")
        name = request.path_params["name"]
        path = await call(dashboard.adapter_path, name)
        suffix = ".gguf" if kind == "gguf" else ""
        await services.data.call("check_inputs", models=[path], data=[data], out=out, suffix=suffix)
        arguments = [*(["merge"] if kind == "merge" else ["export", kind]), path, f"--out={out}"]
        options = {"dtype": dtype, "type": gguf_type, "data": data}
        arguments += [f"--{option}={value}" for option, value in options.items() if value]
        arguments += ["--no-parity"] if no_parity else []
        return await call(dashboard.jobs.start, kind, arguments, name)

    async def upload(request: Request) -> Any:
        with Upload(dashboard.data_folder, request.query_params.get("name", "")).receive() as file:
            async for chunk in request.stream():
                file.write(chunk)
            path = await asyncio.to_thread(file.finish)
        return {"path": display_path(path), "bytes": file.num_bytes}

    async def held_out(request: Request) -> Any:
        name = request.path_params["name"]
        options = (await call(dashboard.duplicate, name))["options"]
        text = await services.data.call("held_out", options=options)
        with Upload(dashboard.data_folder, f"{name}-held-out.jsonl").receive() as file:
            file.write(text.encode())
            return {"path": display_path(file.finish()), "rows": text.count("\n")}

    async def chat_forward(request: Request) -> Response:
        address, path = await call(services.chat.address), request.url.path.removeprefix("/api/chat")
        status, content_type, chunks = await forward(address, request.method, path, await request.body())
        return StreamingResponse(chunks, status, media_type=content_type)

    endpoints: dict[str, Endpoint] = {
        "plan": plan,
        "data": data,
        "upload": upload,
        "start": endpoint(start, options=dict, name=(str, None), memory=(str, None)),
        "runs/{name}/stop": endpoint(dashboard.stop, force=(bool, False)),
        "runs/{name}/resume": endpoint(resume, allow_changed=(list, []), options=(dict, {})),
        "runs/{name}/notes": endpoint(dashboard.set_notes, note=(str, ""), tags=(list, []), to=(str, None)),
        "runs/{name}/rename": endpoint(dashboard.rename, to=str),
        "runs/{name}/delete": endpoint(dashboard.delete, confirm=str),
        "runs/{name}/evaluate": evaluate,
        "runs/{name}/held-out": held_out,
        "runs/{name}/export": export,
        "sweeps/{name}/train": endpoint(dashboard.train_winner, name=(str, "")),
        "runs/{name}/vote": endpoint(dashboard.vote, ballot=str, choice=str),
        "jobs/{id}/stop": endpoint(lambda job: {"sent": dashboard.jobs.stop(job)}),
        "machine/doctor": endpoint(dashboard.doctor),
        "chat/start": endpoint(partial(dashboard.start_chat, services.chat), names=(list, []), model=(str, None)),
        "chat/stop": endpoint(services.chat.stop),
        "chat/v1/chat/completions": chat_forward,
    }
    return [*_routes("POST", endpoints), *_routes("GET", {"chat/v1/models": chat_forward})]


def stem(options: dict[str, Any]) -> str:
    """Return the name, without its number, of a run on this data."""
    data = options.get("data.train", options.get("data"))
    first = data[0] if isinstance(data, list) and data else data
    return run_name(str(first or ""))


def option_arguments(options: dict[str, Any]) -> list[str]:
    """Return recipe fields as flags. Raises InputError for an invalid name; the CLI checks the rest."""
    invalid = next((name for name in options if not OPTION_NAME.fullmatch(name)), None)
    if invalid is not None or "out" in options:
        raise InputError(f"{invalid or 'out'}: not an option", fix="see /api/schema")
    return [flag for field, value in options.items() for flag in option_flags(field, value)]


# --- streams ----------------------------------------------------------------------------------------------------


async def stream_table(dashboard: Dashboard, call: Call) -> AsyncIterator[bytes]:
    """Send all runs, then the changed and removed ones."""
    sent: dict[str, dict[str, Any]] | None = None
    while True:
        rows = {row["name"]: row for row in await call(dashboard.runs)}  # reads only file times if nothing changed
        if sent is None:
            yield _sse_event("runs", {"runs": [with_heartbeat_age(row) for row in rows.values()]})
        else:
            changed = [with_heartbeat_age(row) for name, row in rows.items() if sent.get(name) != row]
            removed = [name for name in sent if name not in rows]
            if changed or removed:
                yield _sse_event("changed", {"runs": changed, "gone": removed})
            else:
                yield KEEP_ALIVE
        sent = rows
        await asyncio.sleep(TABLE_POLL_S)


async def stream_run(dashboard: Dashboard, call: Call, name: str, by: str, points: int) -> AsyncIterator[bytes]:
    """Send the details and curves of a run and their updates, and the state of the machine."""
    sent: StreamPosition | None = None
    previous: Any = None
    system_age_s = SYSTEM_POLL_S
    while True:
        try:
            summary = await call(_run_summary, dashboard, name)
            if summary != previous:
                yield _sse_event("run", await call(dashboard.detail, name))
                previous = summary
            kind, update, sent = await call(dashboard.updates, name, by, points, sent)
            if update is not None:
                yield _sse_event(kind, update)
            system_age_s += RUN_POLL_S
            if system_age_s >= SYSTEM_POLL_S:
                yield _sse_event("system", await call(dashboard.system_state, name))
                system_age_s = 0.0
        except StropError as error:
            yield _sse_event("gone", {"error": error.as_json()})
            return
        await asyncio.sleep(RUN_POLL_S)


def _run_summary(dashboard: Dashboard, name: str) -> Any:
    """Return values that differ when the details of a run must be sent again. Curves are sent separately."""
    row = dashboard.row(name)
    jobs = [
        (job["id"], job["state"], job["activity"], job["activity_since"], job["asked"])
        for job in dashboard.jobs_of(name)
    ]
    history = dashboard.history(name)
    fields = {key: value for key, value in row.items() if key not in STEP_FIELDS}
    return fields, history.num_saves, list(history.samples), jobs


async def stream_sweep(dashboard: Dashboard, call: Call, name: str) -> AsyncIterator[bytes]:
    """Send a sweep, again when it has changed."""
    sent: Any = None
    while True:
        try:
            state = await call(dashboard.sweep, name)
        except StropError as error:
            yield _sse_event("gone", {"error": error.as_json()})
            return
        yield _sse_event("sweep", state) if state != sent else KEEP_ALIVE
        sent = state
        await asyncio.sleep(RUN_POLL_S)


async def stream_job(dashboard: Dashboard, call: Call, name: str) -> AsyncIterator[bytes]:
    """Send the state and output of a job until it ends."""
    sent: Any = None
    offset = None
    while True:
        job = await call(dashboard.jobs.status, name)
        text, offset = await call(dashboard.jobs.log, name, offset)
        yield _sse_event("log", {"text": text}) if text else KEEP_ALIVE
        if job != sent:
            yield _sse_event("job", job)
            sent = job
        if job["state"] != "running":
            return
        await asyncio.sleep(RUN_POLL_S)


# --- the server ------------------------------------------------------------------------------------------------

MAX_BODY_BYTES = 1 << 20
UPLOADS = {"/api/upload": MAX_UPLOAD_BYTES}
SHUTDOWN_S = 1  # short, because event streams do not end by themselves
RELOAD_VARIABLE = "STROP_DASH_RELOAD"  # if set, files of the page are read at each request, for development
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # fmt: skip


def create_app(root: Path, opened: str | None, hosts: frozenset[str], token: str, max_body_bytes: int) -> Guard:
    """Create the ASGI application. root: the folder of runs; opened: the run to show first."""
    services = Services(root, opened)
    folder = Path(__file__).with_name("static")
    files = [file for file in folder.rglob("*") if file.suffix in CONTENT_TYPES and file.is_file()]
    assets = {"/": folder / "index.html", **{f"/{file.relative_to(folder).as_posix()}": file for file in files}}

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(services.schema())
        yield
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        services.close()

    pages = [Route(path, _serve_file(file), methods=["GET"]) for path, file in assets.items()]
    app = Starlette(
        routes=[*get_routes(services), *post_routes(services), *pages],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    return Guard(app, AccessRules(hosts, token, max_body_bytes, frozenset(assets), UPLOADS))


def _serve_file(file: Path) -> Callable[[Request], Any]:
    content = None if os.environ.get(RELOAD_VARIABLE) else file.read_bytes()

    async def respond(_: Request) -> Response:
        return Response(file.read_bytes() if content is None else content, media_type=CONTENT_TYPES[file.suffix])

    return respond


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    result = {"kind": "HTTPError", "message": str(error.detail), "fix": "", "where": []}
    return JSONResponse({"error": result}, error.status_code)


def dash(
    folder: Path, *, host: str, port: int, more_hosts: Sequence[str], ready: Callable[[dict[str, Any]], None]
) -> int:
    """Serve until a signal arrives, and return its number. `ready` is called when requests are accepted."""
    opened = folder.name if is_run(folder) else None
    root = folder.parent if opened else folder
    if root.exists() and not root.is_dir():
        raise FolderError(f"{root}: not a folder", fix="give the folder that holds runs")
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
    if not token.isascii() or any(character.isspace() for character in token):
        raise InputError(f"{TOKEN_VARIABLE}: must be ASCII characters without spaces", fix="openssl rand -hex 24")
    address = open_address(host, port, token, more_hosts)
    app = create_app(root, opened, address.hosts, token, MAX_BODY_BYTES)
    url, path = f"{address.url}/#token={token}", str(root.absolute())
    started = {"url": url, "token": token, "folder": path, "pid": os.getpid()}
    server = Server(app, lambda: ready(started), shutdown_timeout=SHUTDOWN_S)
    server.run(sockets=[address.socket])
    return server.signal
