"""Serve a classifier: POST /classify, with vLLM's request and response objects."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from pydantic import Field

from strop.data.types import Example
from strop.engine.decode.model import Model, describe_classes, load
from strop.errors import InputError, ModelError
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

CLASSIFY = "/classify"
SHUTDOWN_SECONDS = 5
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]


class ClassifyRequest(StrictBody):
    model: str | None = Field(None, description="The id from /v1/models.")
    input: Annotated[
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1)]
        | None,
        fail_with("must be a text that is not empty, a list of such texts, or token ids"),
    ] = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, description="A conversation, instead of input.")
    user: str | None = None


def serve_classifier(
    name: str, address: Address, *, queue: int, max_body_bytes: int, options: dict[str, Any],
    on_ready: Callable[[dict[str, Any]], None],
) -> int:  # fmt: skip
    """Serve a classifier until a signal arrives, and return its number. options: of `load`. See `run.serve`."""
    thread = create_engine_thread()  # loads the model and runs it
    try:
        model: Model = thread.submit(load, name, **options).result()
        thread.submit(model.classify, "a").result()  # compiles the kernels
    except BaseException:
        thread.shutdown(wait=False, cancel_futures=True)
        address.socket.close()
        raise
    assert model.classes is not None
    [model_id] = check_names([name])
    metrics = Metrics()
    rules = AccessRules(address.hosts, address.key, max_body_bytes, ("/health",))
    app = create_classifier_app(model, model_id, thread, queue, rules, metrics)
    info = {
        "url": address.url, "models": [model_id], "labels": list(model.classes.names), "dtype": model.dtype,
        "key": address.key is not None, "pid": os.getpid(), "notes": list(model.notes),
    }  # fmt: skip
    server = Server(app, lambda: on_ready(info), shutdown_timeout=SHUTDOWN_SECONDS)
    server.run(sockets=[address.socket])
    thread.shutdown(wait=False, cancel_futures=True)
    return server.signal


def create_classifier_app(
    model: Model, model_id: str, thread: ThreadPoolExecutor, queue: int, rules: AccessRules, metrics: Metrics
) -> Guard:
    app, router, started = new_app(), APIRouter(route_class=StrictRoute), int(time.time())
    add_error_handlers(app, {CLASSIFY: ClassifyRequest})
    waiting = 0

    @router.post(CLASSIFY, responses=RESPONSES, response_model=None)
    async def classify(body: ClassifyRequest) -> dict[str, Any]:
        nonlocal waiting
        if body.model not in (None, model_id):
            message = f"model {str(body.model)[:80]!r} not found; available: {model_id}"
            raise ApiError(404, message, code="model_not_found", param="model")
        if (body.input is None) == (body.messages is None):
            raise ApiError(400, "give either input or messages", param="input")
        if waiting > queue:
            raise ApiError(429, "the request queue is full", code="queue_full", headers={"retry-after": "1"})
        waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, _classify, model, model_id, body)
        finally:
            waiting -= 1

    async def refuse() -> None:
        raise ApiError(400, f"{model_id} is a classifier, which generates no text: use POST {CLASSIFY}", param="model")

    for path in (CHAT, COMPLETIONS):
        router.add_api_route(path, refuse, methods=["POST"], responses=RESPONSES, response_model=None)

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        assert model.classes is not None
        entry = {"id": model_id, "object": "model", "created": started, "owned_by": "strop"}
        return {"object": "list", "data": [{**entry, "labels": list(model.classes.names)}]}

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    add_metrics(router, metrics)
    app.include_router(router)
    paths = {CLASSIFY, CHAT, COMPLETIONS, "/v1/models", "/health", "/metrics", "/openapi.json"}
    return Guard(app, rules, make_counter(metrics, paths))


def _classify(model: Model, model_id: str, body: ClassifyRequest) -> dict[str, Any]:
    assert model.classes is not None
    examples = _encode(model, body)
    data = []
    for index, probabilities in enumerate(model.classifier.probabilities(examples).tolist()):
        labels = describe_classes(model.classes, probabilities)
        best = next(iter(labels["probabilities"]))
        several = {"labels": labels["labels"]} if model.classes.several else {}
        entry = {"index": index, "label": best, "probs": probabilities, "num_classes": len(probabilities)}
        data.append({**entry, **several})
    tokens = sum(map(len, examples))
    usage = {
        "prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None
    }  # fmt: skip
    common = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model_id}
    return {**common, "data": data, "usage": usage}


def _encode(model: Model, body: ClassifyRequest) -> list[Example]:
    given: Any = [body.messages] if body.input is None else body.input
    items = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    try:
        if isinstance(items[0], list) and isinstance(items[0][0], int):
            return [_encode_tokens(model, ids) for ids in items]
        return model.encode_texts(items)
    except (InputError, ModelError) as error:
        raise ApiError(400, str(error), param="messages" if body.input is None else "input") from None


def _encode_tokens(model: Model, ids: list[int]) -> Example:
    vocabulary = int(model.module.get_input_embeddings().num_embeddings)
    if max(ids) >= vocabulary:
        raise ApiError(400, f"input: token ids must be below {vocabulary}, the size of the vocabulary", param="input")
    limit = max_positions(model.module)
    if limit is not None and len(ids) > limit:
        raise ApiError(400, f"input: {len(ids)} tokens, and the model supports {limit}", param="input")
    weights = np.zeros(len(ids), np.float32)
    weights[-1] = 1.0
    return Example(np.array(ids, np.int32), weights, "input", 1)
