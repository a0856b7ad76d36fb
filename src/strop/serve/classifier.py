"""Serve a classifier: POST /classify, with vLLM's request and response objects."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

from pydantic import Field

from strop.data.types import Example
from strop.engine.decode.model import Model, describe_classes
from strop.errors import InputError, ModelError
from strop.serve.server import ApiError
from strop.serve.text_models import INVALID_TEXTS, TextRequest, TextRoute, Texts, read_texts


class ClassifyRequest(TextRequest):
    input: Annotated[Texts | None, INVALID_TEXTS] = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, description="A conversation, instead of input.")


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
    if (body.input is None) == (body.messages is None):
        raise ApiError(400, "give either input or messages", param="input")
    try:
        if body.messages is not None:
            return model.encode_texts([body.messages])
        return read_texts(model, body.input, model.encode_texts)
    except (InputError, ModelError) as error:
        raise ApiError(400, str(error), param="messages" if body.input is None else "input") from None


def _describe(model: Model) -> dict[str, Any]:
    assert model.classes is not None
    return {"labels": list(model.classes.names)}


CLASSIFY = TextRoute("/classify", ClassifyRequest, "a classifier", _classify, _describe)
