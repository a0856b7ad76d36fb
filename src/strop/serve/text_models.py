"""Serve a model that reads texts and generates none, with one route: a classifier or a model of embeddings."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from pydantic import Field

from strop.data.rendering.render import text_example
from strop.data.types import Example
from strop.engine.decode.model import Model, load
from strop.models.introspect import max_positions
from strop.serve.app import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    StrictRoute,
    add_error_handlers,
    add_metrics,
    make_counter,
    new_app,
)
from strop.serve.engine import Metrics, create_engine_thread
from strop.serve.models import check_names
from strop.serve.protocol import StrictBody, TokenId, fail_with
from strop.serve.server import AccessRules, Address, ApiError, Guard, Server

SHUTDOWN_SECONDS = 5
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]
INVALID_TEXTS = fail_with("must be a text that is not empty, a list of such texts, or token ids")


class TextRequest(StrictBody):
    model: str | None = Field(None, description="The id from /v1/models.")
    user: str | None = None


@dataclass(frozen=True)
class TextRoute:
    """The route of a kind of model."""

    path: str
    body: type[TextRequest]
    what: str  # the kind of model, for messages
    respond: Callable[[Model, str, Any], dict[str, Any]]  # (model, its id, body) -> response; runs the model
    describe: Callable[[Model], dict[str, Any]]  # the fields of the kind in /v1/models and of `strop serve --json`


def serve_texts(
    name: str, route: TextRoute, address: Address, *, queue: int, max_body_bytes: int, options: dict[str, Any],
    on_ready: Callable[[dict[str, Any]], None],
) -> int:  # fmt: skip
    """Serve a model until a signal arrives, and return its number. options: of `load`. See `run.serve`."""
    thread = create_engine_thread()  # loads the model and runs it
    [model_id] = check_names([name])
    try:
        model: Model = thread.submit(load, name, **options).result()
        body = route.body.model_validate({"input": "a"})
        thread.submit(route.respond, model, model_id, body).result()  # compiles the kernels
    except BaseException:
        thread.shutdown(wait=False, cancel_futures=True)
        address.socket.close()
        raise
    metrics = Metrics()
    rules = AccessRules(address.hosts, address.key, max_body_bytes, ("/health",))
    app = create_text_app(model, model_id, route, thread, queue, rules, metrics)
    info = {
        "url": address.url, "models": [model_id], **route.describe(model), "dtype": model.dtype,
        "key": address.key is not None, "pid": os.getpid(), "notes": list(model.notes),
    }  # fmt: skip
    server = Server(app, lambda: on_ready(info), shutdown_timeout=SHUTDOWN_SECONDS)
    server.run(sockets=[address.socket])
    thread.shutdown(wait=False, cancel_futures=True)
    return server.signal


def create_text_app(
    model: Model, model_id: str, route: TextRoute, thread: ThreadPoolExecutor, queue: int, rules: AccessRules,
    metrics: Metrics,
) -> Guard:  # fmt: skip
    app, router, started = new_app(), APIRouter(route_class=StrictRoute), int(time.time())
    add_error_handlers(app, {route.path: route.body})
    waiting = 0

    async def respond(body: Any) -> dict[str, Any]:
        nonlocal waiting
        if body.model not in (None, model_id):
            message = f"model {str(body.model)[:80]!r} not found; available: {model_id}"
            raise ApiError(404, message, code="model_not_found", param="model")
        if waiting > queue:
            raise ApiError(429, "the request queue is full", code="queue_full", headers={"retry-after": "1"})
        waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, route.respond, model, model_id, body)
        finally:
            waiting -= 1

    respond.__annotations__["body"] = route.body  # FastAPI reads the schema of the body from it
    router.add_api_route(route.path, respond, methods=["POST"], responses=RESPONSES, response_model=None)

    async def refuse() -> None:
        message = f"{model_id} is {route.what}, which generates no text: use POST {route.path}"
        raise ApiError(400, message, param="model")

    for path in (CHAT, COMPLETIONS):
        router.add_api_route(path, refuse, methods=["POST"], responses=RESPONSES, response_model=None)

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        entry = {"id": model_id, "object": "model", "created": started, "owned_by": "strop"}
        return {"object": "list", "data": [{**entry, **route.describe(model)}]}

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    add_metrics(router, metrics)
    app.include_router(router)
    paths = {route.path, CHAT, COMPLETIONS, "/v1/models", "/health", "/metrics", "/openapi.json"}
    return Guard(app, rules, make_counter(metrics, paths))


def read_texts(model: Model, given: Any, encode: Callable[[list[str]], list[Example]]) -> list[Example]:
    """Return the examples of an `input`. encode: of texts. Raises InputError, and ApiError for invalid token ids."""
    items = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    if isinstance(items[0], list) and isinstance(items[0][0], int):
        return [_encode_tokens(model, ids) for ids in items]
    return encode(items)


def _encode_tokens(model: Model, ids: list[int]) -> Example:
    vocabulary = int(model.module.get_input_embeddings().num_embeddings)
    if max(ids) >= vocabulary:
        raise ApiError(400, f"input: token ids must be below {vocabulary}, the size of the vocabulary", param="input")
    limit = max_positions(model.module)
    if limit is not None and len(ids) > limit:
        raise ApiError(400, f"input: {len(ids)} tokens, and the model supports {limit}", param="input")
    return text_example(np.array(ids, np.int32), "input", 1)
