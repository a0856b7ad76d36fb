"""HTTP routes of the dashboard: reading, actions, and event streams.

Actions that change a run start the CLI as a child process, with the arguments a user would type.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from strop import __version__
from strop.dash.dashboard import Dashboard, Services, StreamPosition
from strop.dash.files import browse, run_path, split_names
from strop.dash.jobs import Busy, forward, option
from strop.dash.runs import with_heartbeat_age
from strop.data.reading.json_reader import JsonError, loads
from strop.errors import FolderError, InputError, StropError
from strop.evaluation.metrics import METRICS
from strop.runs.folder import run_name

Endpoint = Callable[[Request], Awaitable[Response]]
Value = TypeVar("Value")


async def read_body(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request body. Raises InputError."""
    try:
        found = loads((await request.body()).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"the body is not UTF-8: {error.reason}") from None
    except JsonError as error:
        raise InputError(f"the body is not JSON: {error.what}") from None
    except RecursionError:
        raise InputError("the body is nested too deeply") from None
    if not isinstance(found, dict):
        raise InputError("the body is not a JSON object")
    return found


class Fields:
    """The fields of a body or query. Each is taken once and checked for its type; the rest is rejected."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._left = dict(given)

    def take(self, name: str, kind: type[Value] | tuple[type, ...], default: Any = ...) -> Any:
        value = self._left.pop(name, None)
        if value is None and default is not ...:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind_.__name__ for kind_ in kinds)
            raise InputError(f"{name}: {'is required' if value is None else f'is not {wanted}'}")
        return value

    def number(self, name: str, default: float | None) -> float | None:
        """Return a number from a query, whose values are text."""
        text = self._left.pop(name, None)
        if text in (None, ""):
            return default
        try:
            value = float(str(text))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{name}: {str(text)[:80]!r} is not a number")
        return value

    def reject_unknown(self) -> None:
        if self._left:
            raise InputError(f"unknown parameter: {next(iter(self._left))}")


def query_fields(request: Request) -> Fields:
    return Fields(dict(request.query_params))


def json_response(value: Any, status: int = 200) -> Response:
    return JSONResponse(_clean(value), status)


def _clean(value: Any) -> Any:
    """Replace NaN, which JSON lacks, and lone surrogates, which UTF-8 lacks."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except ValueError:
        return json.loads(json.dumps(value), parse_constant=lambda _: None)


def sse_event(name: str, value: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(_clean(value), ensure_ascii=False)}\n\n".encode("utf-8", "replace")


def error_response(error: StropError, status: int | None = None) -> Response:
    if status is None:
        kinds = {Busy: 409, FolderError: 404, InputError: 400}
        status = next((number for kind, number in kinds.items() if isinstance(error, kind)), 503)
    return JSONResponse({"error": error.as_json()}, status)


def handle_errors(endpoint: Endpoint) -> Endpoint:
    """Turn strop's errors in an endpoint into error responses."""

    async def run(request: Request) -> Response:
        try:
            return await endpoint(request)
        except StropError as error:
            return error_response(error)

    return run


Events = AsyncIterator[bytes]


def event_response(events: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream")


def read_routes(services: Services) -> list[BaseRoute]:
    dashboard, ask = services.dashboard, services.ask

    async def hello(_: Request) -> Response:
        about: dict[str, Any] = {
            "version": __version__,
            "folder": str(dashboard.root.absolute()),
            "shown": str(dashboard.root),
        }
        about |= {"open": services.opened, "python": sys.executable, "pid": os.getpid(), "cwd": str(Path.cwd())}
        about["metrics"] = list(METRICS)
        return json_response(about)

    async def runs(_: Request) -> Response:
        rows = await ask(dashboard.runs)
        return json_response(
            {"runs": [with_heartbeat_age(row) for row in rows], "ignored": (await ask(dashboard.listing.names))[1]}
        )

    async def runs_stream(_: Request) -> Response:
        return event_response(stream_table(dashboard, ask))

    async def one(request: Request) -> Response:
        return json_response(await ask(dashboard.detail, request.path_params["name"]))

    async def history(request: Request) -> Response:
        fields = query_fields(request)
        by, points = fields.take("by", str, "step"), fields.number("points", 800)
        start, end = fields.number("from", None), fields.number("to", None)
        series = tuple(filter(None, fields.take("fields", str, "").split(",")))
        fields.reject_unknown()
        name = request.path_params["name"]
        return json_response(await ask(dashboard.drawn, name, by, int(points or 0), start, end, series))

    async def run_stream(request: Request) -> Response:
        fields, name = query_fields(request), request.path_params["name"]
        by, points = fields.take("by", str, "step"), int(fields.number("points", 800) or 0)
        fields.reject_unknown()
        await ask(dashboard.drawn, name, by, points, None, None, ())  # raise errors before the stream starts
        return event_response(stream_run(dashboard, ask, name, by, points))

    async def log(request: Request) -> Response:
        return json_response(await ask(dashboard.log, request.path_params["name"]))

    async def system(request: Request) -> Response:
        return json_response(await ask(dashboard.look, query_fields(request).take("run", str, None)))

    async def run_contents(request: Request) -> Response:
        return json_response(await ask(dashboard.contents, request.path_params["name"]))

    async def duplicate(request: Request) -> Response:
        return json_response(await ask(dashboard.duplicate, request.path_params["name"]))

    async def answers(request: Request) -> Response:
        fields = query_fields(request)
        wanted, order = fields.take("filter", str, "all"), fields.take("order", str, "row")
        search = fields.take("search", str, "")
        offset, count = int(fields.number("offset", 0) or 0), int(fields.number("count", 50) or 0)
        fields.reject_unknown()
        name, page = request.path_params["name"], (max(0, offset), min(max(0, count), 500))
        return json_response(await ask(dashboard.answers, name, wanted, order, search, *page))

    async def ballot(request: Request) -> Response:
        return json_response(await ask(dashboard.ballot, request.path_params["name"]))

    async def compare(request: Request) -> Response:
        fields = query_fields(request)
        names = split_names(fields.take("runs", str))
        fields.reject_unknown()
        return json_response(await ask(dashboard.compare, names))

    async def schema(_: Request) -> Response:
        return json_response(await services.planner.ask("schema"))

    async def jobs(request: Request) -> Response:
        fields = query_fields(request)
        wanted = {name: fields.take(name, str, None) for name in ("run", "kind")}
        fields.reject_unknown()
        found = await ask(dashboard.jobs.all)
        return json_response(
            {"jobs": [job for job in found if all(v is None or job[k] == v for k, v in wanted.items())]}
        )

    async def job(request: Request) -> Response:
        name = request.path_params["id"]
        about = await ask(dashboard.jobs.about, name)
        return json_response({**about, "log": (await ask(dashboard.jobs.log, name))[0]})

    async def job_stream(request: Request) -> Response:
        name = request.path_params["id"]
        await ask(dashboard.jobs.folder, name)
        return event_response(stream_job(dashboard, ask, name))

    async def listed(request: Request) -> Response:
        fields = query_fields(request)
        path = fields.take("path", str, "")
        fields.reject_unknown()
        return json_response(await ask(browse, [Path.cwd(), dashboard.root.absolute()], path))

    async def machine(_: Request) -> Response:
        return json_response(await ask(dashboard.machine))

    async def talk(_: Request) -> Response:
        return json_response(await ask(services.talk.about))

    found: list[tuple[str, Any]] = [
        ("hello", hello), ("runs", runs), ("stream", runs_stream), ("runs/stream", runs_stream), ("runs/{name}", one),
        ("runs/{name}/history", history), ("runs/{name}/stream", run_stream), ("runs/{name}/log", log),
        ("runs/{name}/contents", run_contents), ("runs/{name}/duplicate", duplicate),
        ("runs/{name}/answers", answers), ("runs/{name}/ballot", ballot), ("compare", compare), ("schema", schema),
        ("system", system), ("jobs", jobs), ("jobs/{id}", job), ("jobs/{id}/stream", job_stream), ("files", listed),
        ("machine", machine), ("talk", talk),
    ]  # fmt: skip
    return [Route(f"/api/{path}", handle_errors(endpoint), methods=["GET"]) for path, endpoint in found]


FLAG = re.compile(r"[a-z_-]+(\.[a-z_0-9]+)?")


def action_routes(services: Services) -> list[BaseRoute]:
    dashboard, ask = services.dashboard, services.ask

    async def plan(request: Request) -> Response:
        fields = Fields(await read_body(request))
        options, out = fields.take("options", dict), fields.take("name", str, None)
        memory, gpu = fields.take("memory", str, None), fields.take("gpu", str, None)
        thorough = fields.take("thorough", bool, False)
        fields.reject_unknown()
        option_arguments(options)
        name = run_path(dashboard.root, out).name if out else await ask(dashboard.unused_run_name, stem(options))
        found = await services.planner.ask(
            "plan", options=options, memory=memory, gpu=gpu, out=str(dashboard.root / name), thorough=thorough
        )
        return json_response({**found, "name": name, "out": str(dashboard.root / name)})

    async def data(request: Request) -> Response:
        fields = Fields(await read_body(request))
        options, part = fields.take("options", dict), fields.take("part", str, "train")
        order, ids = fields.take("order", str, "file"), fields.take("ids", bool, False)
        offset, count = fields.take("offset", int, 0), fields.take("count", int, 20)
        fields.reject_unknown()
        option_arguments(options)
        page = {"part": part, "order": order, "offset": max(0, offset), "count": max(0, count), "ids": ids}
        return json_response(await services.data.ask("rows", options=options, **page))

    async def start(request: Request) -> Response:
        fields = Fields(await read_body(request))
        options, name = fields.take("options", dict), fields.take("name", str, None)
        memory = fields.take("memory", str, None)
        fields.reject_unknown()
        words = option_arguments(options) + ([f"--memory={memory}"] if memory else [])
        name = name or await ask(dashboard.unused_run_name, stem(options))
        job = await ask(dashboard.train, name, words)
        return json_response({"job": job, "run": name})

    async def stop(request: Request) -> Response:
        fields = Fields(await read_body(request))
        force = fields.take("force", bool, False)
        fields.reject_unknown()
        return json_response(await ask(dashboard.stop, request.path_params["name"], force=force))

    async def resume(request: Request) -> Response:
        fields = Fields(await read_body(request))
        allowed, options = fields.take("allow_changed", list, []), fields.take("options", dict, {})
        fields.reject_unknown()
        words = [f"--allow-changed={text}" for text in allowed] + option_arguments(options)
        return json_response(await ask(dashboard.resume, request.path_params["name"], words))

    async def delete(request: Request) -> Response:
        fields = Fields(await read_body(request))
        confirmed = fields.take("confirm", str)
        fields.reject_unknown()
        return json_response(await ask(dashboard.delete, request.path_params["name"], confirmed))

    async def evaluate(request: Request) -> Response:
        fields, name = Fields(await read_body(request)), request.path_params["name"]
        data, metric = fields.take("data", str), fields.take("metric", str, "exact")
        longest, general = fields.take("max_new_tokens", int, 80), fields.take("general", bool, False)
        fields.reject_unknown()
        words = [
            "eval",
            str(dashboard.root / name),
            f"--data={data}",
            f"--metric={metric}",
            f"--max-new-tokens={longest}",
        ]
        return json_response(await ask(dashboard.act, "evaluate", name, [*words, *(["--general"] if general else [])]))

    async def export(request: Request) -> Response:
        fields, name = Fields(await read_body(request)), request.path_params["name"]
        return json_response(await ask(dashboard.act, *_export(fields, name, str(dashboard.root / name))))

    async def job_stop(request: Request) -> Response:
        Fields(await read_body(request)).reject_unknown()
        return json_response({"fields": await ask(dashboard.jobs.stop, request.path_params["id"])})

    async def vote(request: Request) -> Response:
        fields = Fields(await read_body(request))
        ballot, choice = fields.take("ballot", str), fields.take("choice", str)
        fields.reject_unknown()
        return json_response(await ask(dashboard.vote, request.path_params["name"], ballot, choice))

    async def doctor(request: Request) -> Response:
        Fields(await read_body(request)).reject_unknown()
        return json_response(await ask(dashboard.doctor))

    async def start_chat(request: Request) -> Response:
        fields = Fields(await read_body(request))
        names, model = fields.take("names", list, []), fields.take("model", str, None)
        fields.reject_unknown()
        return json_response(await ask(dashboard.start_chat, services.talk, names, model))

    async def talk_stop(request: Request) -> Response:
        Fields(await read_body(request)).reject_unknown()
        return json_response(await ask(services.talk.stop))

    async def talked(request: Request) -> Response:
        where, body = await ask(services.talk.where), await request.body()
        status, kind, parts = await forward(where, request.method, request.url.path.removeprefix("/api/talk"), body)
        return StreamingResponse(parts, status, media_type=kind)

    found: list[tuple[str, Any]] = [
        ("plan", plan), ("data", data), ("start", start), ("runs/{name}/stop", stop), ("runs/{name}/resume", resume),
        ("runs/{name}/delete", delete), ("runs/{name}/evaluate", evaluate), ("runs/{name}/export", export),
        ("runs/{name}/vote", vote), ("jobs/{id}/stop", job_stop), ("machine/doctor", doctor),
        ("talk/start", start_chat), ("talk/stop", talk_stop), ("talk/v1/chat/completions", talked),
    ]  # fmt: skip
    changing = [Route(f"/api/{path}", handle_errors(endpoint), methods=["POST"]) for path, endpoint in found]
    return [*changing, Route("/api/talk/v1/models", handle_errors(talked), methods=["GET"])]


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


def _export(fields: Fields, name: str, run: str) -> tuple[str, str, list[str]]:
    kind, out = fields.take("kind", str), fields.take("out", str)
    dtype, type_ = fields.take("dtype", str, None), fields.take("type", str, None)
    data, unmeasured = fields.take("data", str, None), fields.take("no_parity", bool, False)
    fields.reject_unknown()
    if kind not in ("merge", "gguf", "ollama"):
        raise InputError(f"kind: {kind}: unknown export", fix="merge, gguf or ollama")
    words = ["merge", run] if kind == "merge" else ["export", kind, run]
    words += [f"--out={out}"] + ([f"--dtype={dtype}"] if dtype else []) + ([f"--type={type_}"] if type_ else [])
    words += ([f"--data={data}"] if data else []) + (["--no-parity"] if unmeasured else [])
    return kind, name, words


LOOK_S = 1.0
TABLE_S = 3.0
SYSTEM_S = 2.0
QUIET_S = 15.0  # seconds between keep-alive comments, which reveal lost connections
MOVING = (
    "heartbeat", "updated", "step", "loss", "eval_loss", "tokens", "tokens_per_s", "seconds_left", "sparkline", "epoch",
    "bytes",
)  # fmt: skip

Ask = Callable[..., Awaitable[Any]]


async def stream_table(dashboard: Dashboard, ask: Ask) -> AsyncIterator[bytes]:
    """Stream all runs, then those that changed."""
    sent: dict[str, dict[str, Any]] = {}
    quiet = 0.0
    while True:
        rows = await ask(dashboard.runs)  # reads only file times if nothing changed
        now = {row["name"]: row for row in rows}
        if not sent and quiet == 0.0:
            yield sse_event("runs", {"runs": [with_heartbeat_age(row) for row in rows]})
        else:
            changed = [with_heartbeat_age(row) for name, row in now.items() if sent.get(name) != row]
            gone = [name for name in sent if name not in now]
            if changed or gone:
                yield sse_event("changed", {"runs": changed, "gone": gone})
                quiet = 0.0
        sent = now
        quiet += TABLE_S
        if quiet > QUIET_S:
            yield b": .\n\n"
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
                yield sse_event("run", await ask(dashboard.detail, name))
                before = now
            kind, news, seen = await ask(dashboard.news, name, by, points, seen)
            if news is not None:
                yield sse_event(kind, news)
            looked += LOOK_S
            if looked >= SYSTEM_S:
                yield sse_event("system", await ask(dashboard.look, name))
                looked = 0.0
        except StropError as error:
            yield sse_event("gone", {"error": error.as_json()})
            return
        await asyncio.sleep(LOOK_S)


def _about(dashboard: Dashboard, name: str) -> Any:
    """Return what the page shows besides curves, without fields that change at every step."""
    row = dashboard.row(name)
    jobs = [(job["id"], job["state"]) for job in dashboard.jobs_of(name)]
    saves = dashboard.history(name).num_saves
    return {key: value for key, value in row.items() if key not in MOVING}, saves, jobs


async def stream_job(dashboard: Dashboard, ask: Ask, name: str) -> AsyncIterator[bytes]:
    """Stream the state and output of a job until it ends."""
    before: Any = None
    place, quiet = None, 0.0
    while True:
        about = await ask(dashboard.jobs.about, name)
        text, place = await ask(dashboard.jobs.log, name, place)
        quiet = 0.0 if text or about != before else quiet + LOOK_S
        if text:
            yield sse_event("log", {"text": text})
        if about != before:
            yield sse_event("job", about)
            before = about
        if quiet >= QUIET_S:
            yield b": .\n\n"
            quiet = 0.0
        if about["state"] != "running":
            return
        await asyncio.sleep(LOOK_S)
