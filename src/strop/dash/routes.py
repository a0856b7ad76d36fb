"""Routes that only look: runs, one run, what a run would be, its rows, its answers, the machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from strop import __version__
from strop.dash import event_stream
from strop.dash.files import browse, parted
from strop.dash.http import answer, query, told
from strop.dash.responses import Room, stream
from strop.dash.runs import aged
from strop.evaluation.metrics import METRICS


def routes(room: Room) -> list[BaseRoute]:
    desk, ask = room.desk, room.ask

    async def hello(_: Request) -> Response:
        about: dict[str, Any] = {"version": __version__, "folder": str(desk.root.absolute()), "shown": str(desk.root)}
        about |= {"open": room.opened, "python": sys.executable, "pid": os.getpid(), "cwd": str(Path.cwd())}
        about["metrics"] = list(METRICS)
        return answer(about)

    async def runs(_: Request) -> Response:
        rows = await ask(desk.runs)
        return answer({"runs": [aged(row) for row in rows], "ignored": (await ask(desk.listing.names))[1]})

    async def runs_stream(_: Request) -> Response:
        return stream(event_stream.table(desk, ask))

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
        return stream(event_stream.run(desk, ask, name, by, points))

    async def log(request: Request) -> Response:
        return answer(await ask(desk.log, request.path_params["name"]))

    async def system(request: Request) -> Response:
        return answer(await ask(desk.look, query(request).take("run", str, None)))

    async def run_contents(request: Request) -> Response:
        return answer(await ask(desk.contents, request.path_params["name"]))

    async def duplicate(request: Request) -> Response:
        return answer(await ask(desk.duplicate, request.path_params["name"]))

    async def answers(request: Request) -> Response:
        asked = query(request)
        wanted, order = asked.take("filter", str, "all"), asked.take("order", str, "row")
        search = asked.take("search", str, "")
        offset, count = int(asked.number("offset", 0) or 0), int(asked.number("count", 50) or 0)
        asked.end()
        name, page = request.path_params["name"], (max(0, offset), min(max(0, count), 500))
        return answer(await ask(desk.answers, name, wanted, order, search, *page))

    async def ballot(request: Request) -> Response:
        return answer(await ask(desk.ballot, request.path_params["name"]))

    async def compare(request: Request) -> Response:
        asked = query(request)
        names = parted(asked.take("runs", str))
        asked.end()
        return answer(await ask(desk.compare, names))

    async def schema(_: Request) -> Response:
        return answer(await room.planner.ask("schema"))

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
        return stream(event_stream.job(desk, ask, name))

    async def listed(request: Request) -> Response:
        asked = query(request)
        path = asked.take("path", str, "")
        asked.end()
        return answer(await ask(browse, [Path.cwd(), desk.root.absolute()], path))

    async def machine(_: Request) -> Response:
        return answer(await ask(desk.machine))

    async def talk(_: Request) -> Response:
        return answer(await ask(room.talk.about))

    found: list[tuple[str, Any]] = [
        ("hello", hello), ("runs", runs), ("stream", runs_stream), ("runs/stream", runs_stream), ("runs/{name}", one),
        ("runs/{name}/history", history), ("runs/{name}/stream", run_stream), ("runs/{name}/log", log),
        ("runs/{name}/contents", run_contents), ("runs/{name}/duplicate", duplicate),
        ("runs/{name}/answers", answers), ("runs/{name}/ballot", ballot), ("compare", compare), ("schema", schema),
        ("system", system), ("jobs", jobs), ("jobs/{id}", job), ("jobs/{id}/stream", job_stream), ("files", listed),
        ("machine", machine), ("talk", talk),
    ]  # fmt: skip
    return [Route(f"/api/{path}", told(endpoint), methods=["GET"]) for path, endpoint in found]
