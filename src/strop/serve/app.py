"""The routes, and the way of a request: its JSON -> a Job for the engine -> pieces -> OpenAI's JSON or events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from strop import __version__
from strop.data.reading.strictjson import Refused, loads
from strop.data.types import Ids
from strop.engine.decode.sampling import Mask, Sampling, Token
from strop.errors import nearest
from strop.serve.engine import Engine, Full, Job, Metrics, Piece, tell_each
from strop.serve.grammar import Grammars
from strop.serve.guard import AccessRules, ApiError, Guard, error_body
from strop.serve.models import Served
from strop.serve.protocol import ChatRequest, Common, CompletionRequest, Writer, usage

COMPLETION_TOKENS = 16  # of a plain completion that does not say how many; OpenAI's default
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, type[Common]] = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest}
ASSETS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
OPEN = ("/health", *ASSETS)
FAILURES = {
    "failed": (500, "the server failed while it answered"),
    "format": (400, "response_format: the answer cannot go on as it says"),
    "memory": (503, "out of memory: ask for less, or start the server with fewer --slots or a shorter --context"),
    "closed": (503, "the server is closing"),
}
STATUSES: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": {"application/json": {}}}
    for status, what in {
        400: "a parameter, a message or the length of the prompt is wrong",
        401: "no API key",
        403: "foreign Host or Origin",
        404: "no such model",
        408: "the body was too slow",
        413: "the body is too large",
        415: "not JSON",
        429: "as many requests wait as may",
        503: "closing, or out of memory",
    }.items()
}


@dataclass(frozen=True)
class Room:
    """All that the routes share. context: tokens of prompt and answer together; sampling: the model's own."""

    engine: Engine
    models: dict[str, Served]
    sampling: Sampling
    grammars: Grammars
    context: int
    vocabulary: int
    started: int


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return loads((await self.body()).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ApiError(400, f"the body is not UTF-8: {error.reason}") from None
        except Refused as error:
            raise ApiError(400, f"the body is not JSON: {error.what}") from None


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            try:
                return await handler(_StrictRequest(request.scope, request.receive))
            except HTTPException as error:
                if isinstance(error.__cause__, ApiError):  # FastAPI wraps what a body's reader raises
                    raise error.__cause__ from None
                raise

        return strict


def create_app(room: Room, rules: AccessRules, metrics: Metrics) -> Guard:
    """The whole server as an ASGI application."""
    renderers = ThreadPoolExecutor(1, "strop-prompts")  # long prompts must not hold up the others' tokens

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def deliver(pieces: Sequence[tuple[Job, Piece]]) -> None:
            if pieces and not loop.is_closed():
                loop.call_soon_threadsafe(tell_each, pieces)

        room.engine.start(deliver)
        yield
        await asyncio.to_thread(room.engine.close)
        renderers.shutdown(cancel_futures=True)

    app = FastAPI(
        title="strop serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        separate_input_output_schemas=False,
    )  # fmt: skip
    app.add_exception_handler(ApiError, _refusal)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    router = APIRouter(route_class=_StrictRoute)

    @router.post(CHAT, responses=STATUSES, response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        served = _served(room, body.model)
        tools = body.tools if body.tool_choice != "none" else None
        ids = await _prompt(renderers, served.prompt, body.messages, tools, body.chat_template_kwargs)
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if body.max_tokens is not None and body.max_tokens != limit:
            raise ApiError(400, "max_tokens and max_completion_tokens are two numbers: give one", param="max_tokens")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        mask = await _prompt(renderers, room.grammars.mask, served, body.response_format)
        wanted = (body.top_logprobs or 0) if body.logprobs else None
        return await _respond(room, request, body, served, ids, limit, wanted, mask, chat=True)

    @router.post(COMPLETIONS, responses=STATUSES, response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        served = _served(room, body.model)
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        prompt = body.prompt
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            if max(int(token) for token in prompt) >= room.vocabulary:
                raise ApiError(400, f"prompt: a token id beyond the vocabulary of {room.vocabulary}", param="prompt")
            ids = np.array(prompt, np.int32)
        else:
            ids = await _prompt(renderers, served.text, prompt if isinstance(prompt, str) else prompt[0])
        limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return await _respond(room, request, body, served, ids, limit, body.logprobs, None, chat=False)

    @router.get("/v1/models", responses={401: STATUSES[401], 403: STATUSES[403]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(room, served) for served in room.models.values()]}

    @router.get("/v1/models/{name:path}", responses={401: STATUSES[401], 403: STATUSES[403], 404: STATUSES[404]})
    async def model(name: str) -> dict[str, Any]:
        return _card(room, _served(room, name))

    @router.get("/health", responses={403: STATUSES[403], 503: STATUSES[503]})
    async def health() -> dict[str, str]:
        if room.engine.failed:
            raise ApiError(503, FAILURES["failed"][1])
        return {"status": "ok"}

    @router.get("/metrics", include_in_schema=False)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, (name, kind) in ASSETS.items():
        router.add_api_route(path, _asset(name, kind), methods=["GET"], include_in_schema=False)
    app.include_router(router)
    paths = {*BODIES, "/v1/models", "/health", "/metrics", "/openapi.json", *ASSETS}

    def answered(path: str, status: int) -> None:
        known = path if path in paths else "other"  # or anyone could fill the memory
        metrics.requests.labels(known, str(status)).inc()

    return Guard(app, rules, answered)


def _asset(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    content = files("strop.serve").joinpath(name).read_bytes()

    async def asset() -> Response:
        return Response(content, media_type=kind)

    return asset


def _served(room: Room, model: str) -> Served:
    if model not in room.models:
        what = f"no model {model[:80]!r}{nearest(model[:80], room.models)}: there are {', '.join(room.models)}"
        raise ApiError(404, what, code="model_not_found", param="model")
    return room.models[model]


def _card(room: Room, served: Served) -> dict[str, Any]:
    return {
        "id": served.id, "object": "model", "created": room.started, "owned_by": "strop",
        "max_model_len": room.context, "system": served.system,
    }  # fmt: skip


async def _prompt(executor: ThreadPoolExecutor, make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` gives, made in the thread of prompts. Raises Refusal."""
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, make, *arguments)
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None


async def _respond(
    room: Room, request: Request, body: Common, served: Served, ids: Ids, limit: int | None,
    logprobs: int | None, mask: Mask | None, *, chat: bool,
) -> Response:  # fmt: skip
    left = room.context - len(ids)
    if len(ids) == 0:
        raise ApiError(400, "the prompt is empty", param="prompt")
    if left < (limit or 1):
        asked = f"{len(ids)} tokens of prompt and {limit or 1} of answer are asked for"
        raise ApiError(400, f"the context is {room.context} tokens: {asked}", code="context_length_exceeded")
    pieces: asyncio.Queue[Piece] = asyncio.Queue()
    job = Job(
        model=served.id, tokenizer=served.tokenizer, stop_ids=served.ends, ids=ids, adapter=served.adapter,
        max_new_tokens=min(limit or left, left),
        sampling=room.sampling.changed(body.temperature, body.top_p, body.seed), told=pieces.put_nowait,
        stops=body.stops, logprobs=logprobs, mask=mask, goes_on=not chat,
    )  # fmt: skip
    try:
        room.engine.submit(job)
    except Full:
        headers = {"retry-after": "1"}
        raise ApiError(429, "as many requests wait as may", code="queue_full", headers=headers) from None
    writer = Writer(served.id, served.tokenizer, ids.tolist(), chat=chat, logprobs=logprobs is not None)
    if body.stream:
        events = _events(room.engine, job, pieces, writer, chat=chat, with_usage=body.usage_in_stream)
        return StreamingResponse(events, media_type="text/event-stream")
    return await _whole(room.engine, job, pieces, writer, request)


async def _whole(engine: Engine, job: Job, pieces: asyncio.Queue[Piece], writer: Writer, request: Request) -> Response:
    text: list[str] = []
    tokens: list[Token] = []
    gone = asyncio.create_task(_disconnected(request))
    try:
        while True:
            following = asyncio.create_task(pieces.get())
            await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                return Response(status_code=499)  # nobody reads it
            piece = following.result()
            if piece.end in FAILURES:
                raise ApiError(*FAILURES[piece.end])
            text.append(piece.text)
            tokens += piece.tokens
            if piece.end is not None:
                used = usage(len(job.ids), job.kept_tokens, len(tokens))
                return JSONResponse(writer.whole("".join(text), tokens, piece.end, used))
    finally:
        gone.cancel()
        engine.cancel(job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    engine: Engine, job: Job, pieces: asyncio.Queue[Piece], writer: Writer, *, chat: bool, with_usage: bool
) -> AsyncIterator[str]:
    new_tokens = 0
    try:
        if chat:
            yield _event(writer.opening())
        while True:
            piece = await pieces.get()
            if piece.end in FAILURES:
                yield _event(error_body(*FAILURES[piece.end]))
                return
            new_tokens += len(piece.tokens)
            yield _event(writer.chunk(piece.text, piece.tokens, piece.end))
            if piece.end is not None:
                if with_usage:
                    yield _event(writer.usage(usage(len(job.ids), job.kept_tokens, new_tokens)))
                yield "data: [DONE]\n\n"
                return
    finally:
        engine.cancel(job)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """The first fault of a body that does not fit, in words."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    path = [str(part) for part in fault["loc"] if part not in ("body",)]
    param = path[0] if path else None
    if fault["type"] == "extra_forbidden":
        known = BODIES[request.scope["path"]].model_fields if len(path) == 1 else ()
        what = f"unknown parameter: {'.'.join(path)}{nearest(path[-1], known)}"
    else:
        what = f"{'.'.join(path) or 'body'}: {fault['msg']}"
    return JSONResponse(error_body(400, what[:500], param=param), 400)
