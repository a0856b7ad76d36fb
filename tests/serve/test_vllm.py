"""vLLM as the engine: what is refused before it starts; and the real one, where STROP_VLLM_PYTHON names its Python."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests

from strop.errors import InputError, ModelError, RunError
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from strop.models.vllm import find_vllm_python, max_lora_rank, query_vllm
from strop.serve.address import Address
from strop.serve.vllm import (
    Same,
    _ask,
    _until_told,
    _with_own_tokenizer,
    lora_module,
)
from tests.support.serving import CHAT, save_adapters, serving


def test_ranks_that_vllm_knows() -> None:
    def rank(**config: object) -> int:
        return max_lora_rank({"peft_type": "LORA", "r": 4, **config}, "an adapter", "merge it")

    assert [rank(), rank(r=8), rank(r=9), rank(rank_pattern={"q_proj": 40})] == [8, 8, 16, 64]
    for odd in ({"r": 600}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ModelError, match="vLLM does not support"):
            rank(**odd)


def test_a_python_without_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such program"):
        find_vllm_python("/no/such/python")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no vllm on the PATH"):
        find_vllm_python(None)
    if os.environ.get("STROP_VLLM_PYTHON") != sys.executable:
        with pytest.raises(InputError, match="vLLM does not start there"):
            query_vllm(sys.executable, "LlamaForCausalLM", lora=True)


def test_when_it_is_the_same_model() -> None:
    def passed(mean: float, control: float | None, limit: float = 0.05) -> bool:
        return Same("m", 9, mean, 1.0, control, limit).passed

    assert passed(0.02, None) and passed(0.02, 0.5)
    assert not passed(0.06, None) and not passed(0.06, 0.5) and not passed(float("inf"), None)
    assert passed(0.02, 0.02)  # what training changed is too little to be told apart within the limit
    assert not passed(0.05, 0.1)  # as near to the base as to the tuned model


def test_a_vllm_that_ends_by_itself(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen([sys.executable, "-c", "raise ValueError('no room')"], stderr=log)
        process.wait()
        with pytest.raises(RunError, match="ValueError: no room"):
            _until_told(process, log)


def test_an_adapter_by_any_name() -> None:
    told = json.loads(lora_module("a=b,c", Path("/runs/a=b,c/adapter")))
    assert told == {"name": "a=b,c", "path": "/runs/a=b,c/adapter"}


def test_an_adapter_without_a_tokenizer_has_its_bases(tiny_folder: Path, tmp_path: Path) -> None:
    [folder, _] = save_adapters(tmp_path, tiny_folder)
    assert _with_own_tokenizer(str(folder)).path == folder
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert _with_own_tokenizer(str(folder)).path == tiny_folder


def test_the_key_goes_with_requests_alone_and_errors_are_told() -> None:
    seen: list[tuple[str, str | None]] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(200 if self.path == "/health" else 422)
            self.send_header("Content-Length", "0" if self.path == "/health" else "4")
            self.end_headers()
            self.wfile.write(b"" if self.path == "/health" else b"what")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server, socket.socket() as unused:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = Address("127.0.0.1", server.server_port, "secret", frozenset(), unused)
        try:
            assert _ask(address, "/health") is None
            with pytest.raises(RunError, match="/v1/x with 422: what"):
                _ask(address, "/v1/x", {})
        finally:
            server.shutdown()
            thread.join()
    assert seen == [("/health", None), ("/v1/x", "Bearer secret")]
    with pytest.raises(RunError, match="does not answer"):
        _ask(address, "/health")


@pytest.mark.skipif("STROP_VLLM_PYTHON" not in os.environ, reason="STROP_VLLM_PYTHON is not set (`make vllm`)")
def test_the_real_vllm_serves_base_and_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STROP_CACHE")  # the demo model is large enough to be kept
    [folder, _] = save_adapters(tmp_path, Path("demo"), load_tokenizer(locate("demo")), std=0.05)
    options = ["--engine", "vllm", "--vllm-python", os.environ["STROP_VLLM_PYTHON"], "--context", "512", "--slots", "4"]
    with serving(folder, *options) as server:
        [same] = server.about["parity"]
        assert same["passed"] and same["mean"] < 1e-3 and same["control"] > 20 * same["mean"]
        messages = [{"role": "user", "content": "hello"}]
        texts = [
            server.post(CHAT, {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}).json()
            for model in ("calm", "base")
        ]
        assert texts[0]["choices"] != texts[1]["choices"]
        assert server.stop() == 130
    with pytest.raises(requests.ConnectionError):
        requests.get(server.url + "/health", timeout=5)
