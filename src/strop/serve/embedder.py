"""Serve a model of embeddings: POST /v1/embeddings, with OpenAI's request and response objects."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from pydantic import Field

from strop.engine.decode.model import Model
from strop.errors import InputError
from strop.serve.protocol import fail_with
from strop.serve.server import ApiError
from strop.serve.text_models import INVALID_TEXTS, TextRequest, TextRoute, Texts, read_texts


class EmbeddingsRequest(TextRequest):
    input: Annotated[Texts, INVALID_TEXTS]
    encoding_format: Annotated[Literal["float", "base64"] | None, fail_with("must be float or base64")] = None
    dimensions: int | None = Field(None, ge=1, description="Only the size of the model's vectors.")


def _embed(model: Model, model_id: str, body: EmbeddingsRequest) -> dict[str, Any]:
    size = count_dimensions(model)
    if body.dimensions not in (None, size):
        message = f"dimensions: the vectors of {model_id} have {size} dimensions, and cannot be shortened"
        raise ApiError(400, message, param="dimensions")
    try:
        examples = read_texts(model, body.input, lambda texts: model.encode_texts(texts, function="embed"))
    except InputError as error:
        raise ApiError(400, str(error), param="input") from None
    vectors = model.embedder.embed(examples)
    values = (
        [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        if body.encoding_format == "base64"
        else vectors.tolist()
    )
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    tokens = sum(map(len, examples))
    return {
        "object": "list", "data": data, "model": model_id, "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }  # fmt: skip


def count_dimensions(model: Model) -> int:
    return int(model.module.get_output_embeddings().weight.shape[1])


EMBED = TextRoute(
    "/v1/embeddings", EmbeddingsRequest, "a model of embeddings", _embed,
    lambda model: {"dimensions": count_dimensions(model)},
)  # fmt: skip
