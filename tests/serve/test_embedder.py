"""A served model of embeddings: OpenAI's /v1/embeddings, refused requests and other routes."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import requests
import torch

import strop
from strop.errors import InputError, ModelError
from strop.exporting.hub import _read_folder
from strop.models.adapters import save_adapter
from strop.models.load import load_base
from strop.models.lora import add_lora, trainable_parameters
from strop.models.source import fingerprint, locate
from tests.support import tiny
from tests.support.families import tokenizer
from tests.support.serving import Server, serving

QUERIES = ["hello there", "play", "the weather in Paris today"]
ROUTE = "/v1/embeddings"


def save_embedder(folder: Path, base: Path, pooling: Literal["last", "mean"] = "last") -> Path:
    """Save a random model of embeddings."""
    source = locate(str(base))
    torch.manual_seed(0)
    lora = tiny.recipe().recipe.lora
    model = add_lora(load_base(source, torch.float32, "cpu"), lora, None, task="FEATURE_EXTRACTION")
    for weight in trainable_parameters(model).values():
        torch.nn.init.normal_(weight, std=0.05)
    identity = {"base": {"name": source.name, "fingerprint": fingerprint(source)}, "dtype": "fp32", "pooling": pooling}
    save_adapter(model, tokenizer("chatml"), folder, identity)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("served") / "vectors", tiny_folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as started:
        yield started


def test_vectors_are_those_of_python(server: Server, folder: Path) -> None:
    answer = server.post(ROUTE, {"model": "vectors", "input": QUERIES}).json()
    expected = strop.load(folder, dtype="fp32").embed(QUERIES)
    assert answer["object"] == "list" and answer["model"] == "vectors"
    tokens = sum(len(tokenizer("chatml")(query)["input_ids"]) for query in QUERIES)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    assert np.array([entry["embedding"] for entry in answer["data"]]) == pytest.approx(expected, abs=1e-5)
    assert expected.dtype == np.float32 and np.linalg.norm(expected, axis=1) == pytest.approx(1)
    ids = tokenizer("chatml")(QUERIES[0])["input_ids"]
    for given in (QUERIES[0], ids, [ids]):
        body = {"input": given, "encoding_format": "base64", "dimensions": expected.shape[1]}
        [entry] = server.post(ROUTE, body).json()["data"]
        vector = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
        assert vector == pytest.approx(expected[0], abs=1e-5)
    [model] = requests.get(server.url + "/v1/models", timeout=10).json()["data"]
    assert model["id"] == "vectors" and model["dimensions"] == expected.shape[1] == server.about["dimensions"]
    assert server.metric("strop_requests_total") > 3


def test_openai_client(server: Server, folder: Path) -> None:
    openai = pytest.importorskip("openai")
    expected = strop.load(folder, dtype="fp32").embed(QUERIES)
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        for options in ({}, {"encoding_format": "float"}):  # by default it asks for base64
            answer = client.embeddings.create(model="vectors", input=QUERIES, **options)
            assert np.array([entry.embedding for entry in answer.data]) == pytest.approx(expected, abs=1e-5)
        assert answer.usage.total_tokens > 5
        with pytest.raises(openai.BadRequestError, match="cannot be shortened"):
            client.embeddings.create(model="vectors", input="x", dimensions=3)
        with pytest.raises(openai.NotFoundError, match="'x' not found"):
            client.embeddings.create(model="x", input="x")


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (ROUTE, {"inputs": "x"}, 400, "input: Field required"),
        (ROUTE, {"input": "x", "truncate": 3}, 400, "unknown parameter: truncate"),
        (ROUTE, {"input": ""}, 400, "must be a text that is not empty"),
        (ROUTE, {"input": "  "}, 400, "text 1 is empty"),
        (ROUTE, {"input": []}, 400, "must be a text that is not empty"),
        (ROUTE, {"input": [10**6]}, 400, "token ids must be below"),
        (ROUTE, {"input": "word " * 2000}, 400, "and the model supports 512"),
        (ROUTE, {"input": "x", "encoding_format": "int8"}, 400, "must be float or base64"),
        (ROUTE, {"model": "other", "input": "x"}, 404, "available: vectors"),
        ("/v1/chat/completions", {"model": "vectors", "messages": []}, 400, "is a model of embeddings"),
        ("/v1/completions", {"model": "vectors", "prompt": "x"}, 400, "use POST /v1/embeddings"),
    ],
)
def test_wrong_requests_are_refused(server: Server, path: str, body: Any, status: int, message: str) -> None:
    response = server.post(path, body)
    assert response.status_code == status and message in response.json()["error"]["message"]


def test_a_push_includes_the_files_of_sentence_transformers(folder: Path) -> None:
    contents, left_out = _read_folder(folder)
    modules = {
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    }
    assert modules < contents.keys() and not left_out


def test_other_uses_are_refused(folder: Path, tiny_folder: Path) -> None:
    model = strop.load(folder)
    with pytest.raises(ModelError, match="generates no text"):
        model.chat("hello")
    with pytest.raises(InputError, match="text 2 is empty"):
        model.embed(["a", ""])
    with pytest.raises(ModelError, match="not a classifier"):
        model.classify("hello")
    with pytest.raises(ModelError, match="not a model of embeddings"):
        strop.load(tiny_folder).embed("hello")
