"""The HTTP routes: convert requests to jobs of the engine, and the completions to OpenAI's responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from strop import __version__
from strop.data.reading.json_reader import JsonError, loads
from strop.data.types import Ids
from strop.engine.decode.sampling import Mask, Sampling, Token
from strop.errors import suggest
from strop.serve.engine import Engine, Job, Metrics, Piece, QueueFull, deliver_each
from strop.serve.models import Grammars, ServedModel
from strop.serve.protocol import NO_EFFECT, ChatRequest, CommonRequest, CompletionRequest, ResponseWriter, usage
from strop.serve.server import AccessRules, ApiError, Guard, error_body

DEFAULT_MAX_TOKENS = 16  # for plain completions, as in OpenAI's API
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, type[CommonRequest]] = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest}
ASSETS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
OPEN_PATHS = ("/health", *ASSETS)
FAILURES = {  # finish reason: (status, message)
    "failed": (500, "internal error while decoding"),
    "format": (400, "response_format: the completion cannot continue in this format"),
    "memory": (503, "out of memory: send a shorter request, or start the server with fewer --slots or less --context"),
    "closed": (503, "the server is shutting down"),
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {}}}
    for status, description in {
        400: "Invalid parameter or message, or the prompt is too long",
        401: "Missing or invalid API key",
        403: "Host or Origin not allowed",
        404: "Model not found",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "The content type is not JSON",
        429: "The request queue is full",
        503: "Shutting down, or out of memory",
    }.items()
}


@dataclass(frozen=True)
class ServerState:
    engine: Engine
    models: dict[str, ServedModel]
    sampling: Sampling  # the model's defaults
    grammars: Grammars
    context: int  # maximum tokens of prompt and completion together
    vocabulary: int
    started: int  # Unix time


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return loads((await self.body()).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ApiError(400, f"the body is not UTF-8: {error.reason}") from None
        except JsonError as error:
            raise ApiError(400, f"the body is not valid JSON: {error.what}") from None


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            try:
                return await handler(_StrictRequest(request.scope, request.receive))
            except HTTPException as error:
                if isinstance(error.__cause__, ApiError):  # FastAPI wraps exceptions of Request.json
                    raise error.__cause__ from None
                raise

        return strict


def new_app(lifespan: Any = None) -> FastAPI:
    return FastAPI(
        title="strop serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        separate_input_output_schemas=False,
    )  # fmt: skip


def add_error_handlers(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Make errors OpenAI's objects. bodies: the schemas of the routes, to suggest names of parameters."""
    app.add_exception_handler(ApiError, _api_error_response)
    app.add_exception_handler(RequestValidationError, partial(_validation_error_response, bodies))
    app.add_exception_handler(HTTPException, _http_error_response)


def add_metrics(router: APIRouter, metrics: Metrics) -> None:
    @router.get("/metrics", include_in_schema=False)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def make_counter(metrics: Metrics, paths: Collection[str]) -> Callable[[str, int], None]:
    """Return a function that counts a response. Other paths share a label, because labels stay in memory."""

    def count_response(path: str, status: int) -> None:
        metrics.requests.labels(path if path in paths else "other", str(status)).inc()

    return count_response


def create_app(state: ServerState, rules: AccessRules, metrics: Metrics) -> Guard:
    renderers = ThreadPoolExecutor(1, "strop-prompts")  # long prompts must not block the event loop

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def deliver(pieces: Sequence[tuple[Job, Piece]]) -> None:
            if pieces and not loop.is_closed():
                loop.call_soon_threadsafe(deliver_each, pieces)

        state.engine.start(deliver)
        yield
        await asyncio.to_thread(state.engine.close)
        renderers.shutdown(cancel_futures=True)

    app = new_app(lifespan)
    add_error_handlers(app, BODIES)
    router = APIRouter(route_class=StrictRoute)

    @router.post(CHAT, responses=RESPONSES, response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        model = _find_model(state, body.model)
        tools = body.tools if body.tool_choice != "none" else None
        ids = await _run_in(renderers, model.prompt, body.messages, tools, body.chat_template_kwargs)
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if body.max_tokens is not None and body.max_tokens != limit:
            raise ApiError(400, "max_tokens and max_completion_tokens differ: set only one", param="max_tokens")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs requires logprobs: true", param="top_logprobs")
        mask = await _run_in(renderers, state.grammars.mask, model, body.response_format)
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await _respond(state, request, body, model, ids, limit, num_logprobs, mask, chat=True)

    @router.post(COMPLETIONS, responses=RESPONSES, response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        model = _find_model(state, body.model)
        prompt = body.prompt
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            if max(int(token) for token in prompt) >= state.vocabulary:
                message = f"prompt: token ids must be below {state.vocabulary}, the size of the vocabulary"
                raise ApiError(400, message, param="prompt")
            ids = np.array(prompt, np.int32)
        else:
            ids = await _run_in(renderers, model.tokenize, prompt if isinstance(prompt, str) else prompt[0])
        limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        return await _respond(state, request, body, model, ids, limit, body.logprobs, None, chat=False)

    @router.get("/v1/models", responses={401: RESPONSES[401], 403: RESPONSES[403]})
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe_model(state, model) for model in state.models.values()]}

    @router.get("/v1/models/{name:path}", responses={status: RESPONSES[status] for status in (401, 403, 404)})
    async def get_model(name: str) -> dict[str, Any]:
        return _describe_model(state, _find_model(state, name))

    @router.get("/health", responses={403: RESPONSES[403], 503: RESPONSES[503]})
    async def health() -> dict[str, str]:
        if state.engine.failed:
            raise ApiError(503, FAILURES["failed"][1])
        return {"status": "ok"}

    add_metrics(router, metrics)
    for path, (name, media_type) in ASSETS.items():
        router.add_api_route(path, _make_asset_handler(name, media_type), methods=["GET"], include_in_schema=False)
    app.include_router(router)
    paths = {*BODIES, "/v1/models", "/health", "/metrics", "/openapi.json", *ASSETS}
    return Guard(app, rules, make_counter(metrics, paths))


def _make_asset_handler(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    content = files("strop.serve").joinpath(name).read_bytes()

    async def asset() -> Response:
        return Response(content, media_type=media_type)

    return asset


def _find_model(state: ServerState, name: str) -> ServedModel:
    if name not in state.models:
        suggestion = suggest(name[:80], state.models)
        message = f"model {name[:80]!r} not found{suggestion}; available: {', '.join(state.models)}"
        raise ApiError(404, message, code="model_not_found", param="model")
    return state.models[name]


def _describe_model(state: ServerState, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id, "object": "model", "created": state.started, "owned_by": "strop",
        "max_model_len": state.context, "system": model.system,
    }  # fmt: skip


async def _run_in(executor: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in the executor. Raises ApiError if the body is nested too deeply."""
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None


async def _respond(
    state: ServerState, request: Request, body: CommonRequest, model: ServedModel, ids: Ids, limit: int | None,
    num_logprobs: int | None, mask: Mask | None, *, chat: bool,
) -> Response:  # fmt: skip
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options requires stream: true", param="stream_options")
    remaining = state.context - len(ids)
    if len(ids) == 0:
        raise ApiError(400, "the prompt is empty", param="prompt")
    if remaining < (limit or 1):
        message = f"the context is {state.context} tokens, but the request has {len(ids)} prompt tokens and asks for "
        message += f"{limit or 1} completion tokens"
        raise ApiError(400, message, code="context_length_exceeded")
    pieces: asyncio.Queue[Piece] = asyncio.Queue()
    job = Job(
        model=model.id, tokenizer=model.tokenizer, stop_ids=model.stop_ids, ids=ids, adapter=model.adapter,
        max_new_tokens=min(limit or remaining, remaining), on_piece=pieces.put_nowait,
        sampling=state.sampling.override(
            seed=body.seed, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k,
            repetition_penalty=body.repetition_penalty,
        ),
        stop_strings=body.stop_strings, num_logprobs=num_logprobs, mask=mask, continues_prompt=not chat,
        load_images=model.image_loader(ids),
    )  # fmt: skip
    try:
        state.engine.submit(job)
    except QueueFull:
        headers = {"retry-after": "1"}
        raise ApiError(429, "the request queue is full", code="queue_full", headers=headers) from None
    writer = ResponseWriter(model.id, model.tokenizer, ids.tolist(), chat=chat, logprobs=num_logprobs is not None)
    if body.stream:
        events = _stream_events(state.engine, job, pieces, writer, chat=chat, with_usage=body.usage_in_stream)
        return StreamingResponse(events, media_type="text/event-stream")
    return await _collect(state.engine, job, pieces, writer, request)


async def _collect(
    engine: Engine, job: Job, pieces: asyncio.Queue[Piece], writer: ResponseWriter, request: Request
) -> Response:
    """Return a response with the whole completion, unless the client disconnects."""
    text: list[str] = []
    tokens: list[Token] = []
    disconnected = asyncio.create_task(_wait_for_disconnect(request))
    try:
        while True:
            next_piece = asyncio.create_task(pieces.get())
            await asyncio.wait({next_piece, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if not next_piece.done():
                next_piece.cancel()
                return Response(status_code=499)  # counted in the metrics; the client has disconnected
            piece = next_piece.result()
            if piece.finish_reason in FAILURES:
                raise ApiError(*FAILURES[piece.finish_reason])
            text.append(piece.text)
            tokens += piece.tokens
            if piece.finish_reason is not None:
                job_usage = usage(len(job.ids), job.num_cached, len(tokens))
                return JSONResponse(writer.response("".join(text), tokens, piece.finish_reason, job_usage))
    finally:
        disconnected.cancel()
        engine.cancel(job)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream_events(
    engine: Engine, job: Job, pieces: asyncio.Queue[Piece], writer: ResponseWriter, *, chat: bool, with_usage: bool
) -> AsyncIterator[str]:
    new_tokens = 0
    try:
        if chat:
            yield _format_event(writer.first_chunk())
        while True:
            piece = await pieces.get()
            if piece.finish_reason in FAILURES:
                yield _format_event(error_body(*FAILURES[piece.finish_reason]))
                return
            new_tokens += len(piece.tokens)
            yield _format_event(writer.chunk(piece.text, piece.tokens, piece.finish_reason))
            if piece.finish_reason is not None:
                if with_usage:
                    yield _format_event(writer.usage_chunk(usage(len(job.ids), job.num_cached, new_tokens)))
                yield "data: [DONE]\n\n"
                return
    finally:
        engine.cancel(job)


def _format_event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _api_error_response(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error_response(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)


async def _validation_error_response(
    bodies: Mapping[str, type[BaseModel]], request: Request, error: Exception
) -> Response:
    """Respond with the first error of a body that does not match the schema."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    param = path[0] if path else None
    if first["type"] == "extra_forbidden":
        fields = bodies[request.scope["path"]].model_fields if len(path) == 1 else {}
        known = [name for name, field in fields.items() if NO_EFFECT not in field.metadata]
        message = f"unknown parameter: {'.'.join(path)}{suggest(path[-1], known)}"
    else:
        message = f"{'.'.join(path) or 'body'}: {first['msg']}"
    return JSONResponse(error_body(400, message[:500], param=param), 400)
