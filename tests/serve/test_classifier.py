"""A served classifier: vLLM's /classify, refused requests and other routes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

import strop
from strop.errors import InputError, ModelError
from strop.models.adapters import save_adapter
from strop.models.load import load_base
from strop.models.lora import add_lora, trainable_parameters
from strop.models.source import fingerprint, locate
from tests.support import texts, tiny
from tests.support.families import tokenizer
from tests.support.serving import Server, serving


def save_classifier(folder: Path, base: Path, several: bool = False) -> Path:
    """Save a random classifier of NAMES."""
    source = locate(str(base))
    torch.manual_seed(0)
    model = add_lora(load_base(source, torch.float32, "cpu"), tiny.recipe().recipe.lora, None, outputs=len(texts.NAMES))
    for name, weight in trainable_parameters(model).items():
        torch.nn.init.normal_(weight, std=0.05 if "lora" in name else 0.3)
    identity = {"base": {"name": source.name, "fingerprint": fingerprint(source)}, "dtype": "fp32"}
    save_adapter(model, tokenizer("chatml"), folder, {**identity, "labels": texts.NAMES, "several_labels": several})
    return folder


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("served") / "moods", tiny_folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as started:
        yield started


def test_answers_have_the_fields_of_vllm_and_the_probabilities_of_python(server: Server, folder: Path) -> None:
    queries = ["hello there", "play", "the weather in Paris today"]
    answer = server.post("/classify", {"model": "moods", "input": queries}).json()
    assert answer["id"].startswith("classify-") and answer["object"] == "list" and answer["model"] == "moods"
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 5
    for index, (entry, expected) in enumerate(
        zip(answer["data"], strop.load(folder, dtype="fp32").classify(queries), strict=True)
    ):
        assert entry.keys() == {"index", "label", "probs", "num_classes"} and entry["index"] == index
        assert entry["label"] == expected["label"] and entry["num_classes"] == 3
        assert dict(zip(texts.NAMES, entry["probs"], strict=True)) == pytest.approx(expected["probabilities"], abs=1e-5)
    [one] = server.post("/classify", {"input": queries[0]}).json()["data"]
    ids = tokenizer("chatml")(queries[0])["input_ids"]
    for body in (ids, [ids]):
        [same] = server.post("/classify", {"input": body}).json()["data"]
        assert same["probs"] == pytest.approx(one["probs"], abs=1e-6)
        assert same["probs"] == pytest.approx(answer["data"][0]["probs"], abs=1e-5)
    assert server.post("/classify", {"messages": [{"role": "user", "content": "hello"}]}).status_code == 200
    [model] = requests.get(server.url + "/v1/models", timeout=10).json()["data"]
    assert model["id"] == "moods" and model["labels"] == list(texts.NAMES) == server.about["labels"]
    assert server.metric("strop_requests_total") > 4


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/classify", {"inputs": "x"}, 400, "unknown parameter: inputs (did you mean input?)"),
        ("/classify", {"input": ""}, 400, "must be a text that is not empty"),
        ("/classify", {"input": "  "}, 400, "text 1 is empty"),
        ("/classify", {"input": []}, 400, "must be a text that is not empty"),
        ("/classify", {"input": [10**6]}, 400, "token ids must be below"),
        ("/classify", {"input": "word " * 2000}, 400, "and the model supports 512"),
        ("/classify", {}, 400, "give either input or messages"),
        ("/classify", {"messages": [{"role": "assistant", "content": "x"}]}, 400, "not the user's"),
        ("/classify", {"model": "other", "input": "x"}, 404, "available: moods"),
        ("/v1/chat/completions", {"model": "moods", "messages": []}, 400, "is a classifier, which generates no text"),
        ("/v1/completions", {"model": "moods", "prompt": "x"}, 400, "use POST /classify"),
    ],
)
def test_wrong_requests_are_refused(server: Server, path: str, body: Any, status: int, message: str) -> None:
    response = server.post(path, body)
    assert response.status_code == status and message in response.json()["error"]["message"]


def test_several_labels_and_other_uses(tiny_folder: Path, tmp_path: Path) -> None:
    model = strop.load(save_classifier(tmp_path / "tags", tiny_folder, several=True))
    [row] = model.classify("hello there")
    assert row["labels"] == [name for name, share in row["probabilities"].items() if share > 0.5]
    assert list(row["probabilities"].values()) == sorted(row["probabilities"].values(), reverse=True)
    assert sum(row["probabilities"].values()) != pytest.approx(1)
    with pytest.raises(ModelError, match="generates no text"):
        model.chat("hello")
    with pytest.raises(InputError, match="text 2 is empty"):
        model.classify(["a", ""])
    with pytest.raises(ModelError, match="not a classifier"):
        strop.load(tiny_folder).classify("hello")
