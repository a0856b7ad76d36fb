"""Routes that make something happen: plan, start, stop, resume, delete, evaluate, export, vote, talk.

Everything that changes a run is the CLI as a child process, with the words that a person would type.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from strop.dash.chat import pass_on
from strop.dash.files import inside
from strop.dash.http import Fields, answer, body_of, told
from strop.dash.jobs import option
from strop.dash.responses import Room
from strop.errors import InputError
from strop.runs.folder import run_name

FLAG = re.compile(r"[a-z_-]+(\.[a-z_0-9]+)?")


def routes(room: Room) -> list[BaseRoute]:
    desk, ask = room.desk, room.ask

    async def plan(request: Request) -> Response:
        asked = Fields(await body_of(request))
        options, out = asked.take("options", dict), asked.take("name", str, None)
        memory, gpu = asked.take("memory", str, None), asked.take("gpu", str, None)
        thorough = asked.take("thorough", bool, False)
        asked.end()
        options_words(options)
        name = inside(desk.root, out).name if out else await ask(desk.free_name, stem(options))
        found = await room.planner.ask(
            "plan", options=options, memory=memory, gpu=gpu, out=str(desk.root / name), thorough=thorough
        )
        return answer({**found, "name": name, "out": str(desk.root / name)})

    async def data(request: Request) -> Response:
        asked = Fields(await body_of(request))
        options, part = asked.take("options", dict), asked.take("part", str, "train")
        order, ids = asked.take("order", str, "file"), asked.take("ids", bool, False)
        offset, count = asked.take("offset", int, 0), asked.take("count", int, 20)
        asked.end()
        options_words(options)
        page = {"part": part, "order": order, "offset": max(0, offset), "count": max(0, count), "ids": ids}
        return answer(await room.data.ask("rows", options=options, **page))

    async def start(request: Request) -> Response:
        asked = Fields(await body_of(request))
        options, name = asked.take("options", dict), asked.take("name", str, None)
        memory = asked.take("memory", str, None)
        asked.end()
        words = options_words(options) + ([f"--memory={memory}"] if memory else [])
        name = name or await ask(desk.free_name, stem(options))
        job = await ask(desk.train, name, words)
        return answer({"job": job, "run": name})

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

    async def job_stop(request: Request) -> Response:
        Fields(await body_of(request)).end()
        return answer({"asked": await ask(desk.jobs.stop, request.path_params["id"])})

    async def vote(request: Request) -> Response:
        asked = Fields(await body_of(request))
        ballot, choice = asked.take("ballot", str), asked.take("choice", str)
        asked.end()
        return answer(await ask(desk.vote, request.path_params["name"], ballot, choice))

    async def doctor(request: Request) -> Response:
        Fields(await body_of(request)).end()
        return answer(await ask(desk.doctor))

    async def talk_start(request: Request) -> Response:
        asked = Fields(await body_of(request))
        names, model = asked.take("names", list, []), asked.take("model", str, None)
        asked.end()
        return answer(await ask(desk.talk_start, room.talk, names, model))

    async def talk_stop(request: Request) -> Response:
        Fields(await body_of(request)).end()
        return answer(await ask(room.talk.stop))

    async def talked(request: Request) -> Response:
        where, body = await ask(room.talk.where), await request.body()
        status, kind, parts = await pass_on(where, request.method, request.url.path.removeprefix("/api/talk"), body)
        return StreamingResponse(parts, status, media_type=kind)

    found: list[tuple[str, Any]] = [
        ("plan", plan), ("data", data), ("start", start), ("runs/{name}/stop", stop), ("runs/{name}/resume", resume),
        ("runs/{name}/delete", delete), ("runs/{name}/evaluate", evaluate), ("runs/{name}/export", export),
        ("runs/{name}/vote", vote), ("jobs/{id}/stop", job_stop), ("machine/doctor", doctor),
        ("talk/start", talk_start), ("talk/stop", talk_stop), ("talk/v1/chat/completions", talked),
    ]  # fmt: skip
    changing = [Route(f"/api/{path}", told(endpoint), methods=["POST"]) for path, endpoint in found]
    return [*changing, Route("/api/talk/v1/models", told(talked), methods=["GET"])]


def stem(options: dict[str, Any]) -> str:
    """What a run on this data is called, without its number."""
    named = options.get("data.train", options.get("data"))
    first = named[0] if isinstance(named, list) and named else named
    return run_name(str(first or ""))


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
