"""vLLM as the engine: checks before it starts, and the real vLLM if STROP_VLLM_PYTHON names its Python."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import strop
from strop.engine.decode.model import load, load_renderer
from strop.errors import InputError, ModelError, RunError
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from strop.models.vllm import find_vllm_python, max_lora_rank, query_vllm
from strop.serve import vllm
from strop.serve.server import Address
from strop.serve.vllm import (
    NUM_ROWS,
    ParityResult,
    _check_adapter,
    _compute_reference,
    _locate_model_tokenizer,
    _request,
    _select_rows,
    _wait_for_signal,
    lora_module_argument,
)
from tests.engine.test_images import write_rows
from tests.support import seeing, tiny
from tests.support.serving import CHAT, save_adapters, serving


def test_rank_is_rounded_up_to_one_that_vllm_supports() -> None:
    def rank(**config: object) -> int:
        return max_lora_rank({"peft_type": "LORA", "r": 4, **config}, "an adapter", "merge it")

    assert [rank(), rank(r=8), rank(r=9), rank(rank_pattern={"q_proj": 40})] == [8, 8, 16, 64]
    for odd in ({"r": 600}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ModelError, match="vLLM does not support"):
            rank(**odd)


def test_python_without_vllm_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such program"):
        find_vllm_python("/no/such/python")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no vllm on the PATH"):
        find_vllm_python(None)
    if os.environ.get("STROP_VLLM_PYTHON") != sys.executable:
        with pytest.raises(InputError, match="vLLM does not start there"):
            query_vllm(sys.executable, "LlamaForCausalLM", lora=True)


def test_parity_needs_a_small_difference_and_a_larger_control() -> None:
    def passed(mean: float, control: float | None, limit: float = 0.05) -> bool:
        return ParityResult("m", 9, mean, 1.0, control, limit).passed

    assert passed(0.02, None) and passed(0.02, 0.5)
    assert not passed(0.06, None) and not passed(0.06, 0.5) and not passed(float("inf"), None)
    assert passed(0.02, 0.02)  # training changed less than the limit, so the control is not used
    assert not passed(0.05, 0.1)  # as close to the base as to the tuned model


def test_vllm_that_ends_raises_with_its_error_line(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen([sys.executable, "-c", "raise ValueError('no room')"], stderr=log)
        process.wait()
        with pytest.raises(RunError, match="ValueError: no room"):
            _wait_for_signal(process, log)


def test_adapter_names_may_contain_separators() -> None:
    argument = json.loads(lora_module_argument("a=b,c", Path("/runs/a=b,c/adapter")))
    assert argument == {"name": "a=b,c", "path": "/runs/a=b,c/adapter"}


def test_adapter_without_a_tokenizer_uses_that_of_its_base(tiny_folder: Path, tmp_path: Path) -> None:
    [folder, _] = save_adapters(tmp_path, tiny_folder)
    assert _locate_model_tokenizer(str(folder)).path == folder
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert _locate_model_tokenizer(str(folder)).path == tiny_folder


def test_reference_of_a_bf16_base_is_computed_in_fp32(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    shutil.copytree(tiny_folder, tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 8)
    options = {"train.max_steps": 4, "train.learning_rate": 1e-2, "model.dtype": "fp32"}
    run = strop.train(model=str(tmp_path / "base"), data=str(rows), out=tmp_path / "run", **options)
    loaded: list[Any] = []
    monkeypatch.setattr(vllm, "load", lambda *args, **named: loaded.append(load(*args, **named)) or loaded[-1])
    found, tuned, base = _compute_reference(str(run.folder), 100)
    weights = dict(loaded[0].module.named_parameters())
    linear = next(weight for name, weight in weights.items() if name.endswith("up_proj.base_layer.weight"))
    assert base is not None and linear.dtype == torch.bfloat16
    reference = PeftModel.from_pretrained(model.float(), run.folder / "adapter").eval()
    for row, values, untrained in zip(found, tuned, base, strict=True):
        ids = torch.tensor(row.ids.astype(int))[None]
        with torch.no_grad():
            logprobs = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert np.allclose(values, logprobs, atol=1e-5) and not np.allclose(untrained, logprobs, atol=1e-3)


def test_api_key_is_sent_with_a_body_only_and_errors_raise() -> None:
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(200 if self.path == "/health" else 422)
            self.send_header("Content-Length", "0" if self.path == "/health" else "4")
            self.end_headers()
            self.wfile.write(b"" if self.path == "/health" else b"what")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server, socket.socket() as unused:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = Address("127.0.0.1", server.server_port, "secret", frozenset(), unused)
        try:
            assert _request(address, "/health") is None
            with pytest.raises(RunError, match="/v1/x with 422: what"):
                _request(address, "/v1/x", {})
        finally:
            server.shutdown()
            thread.join()
    assert seen == [("/health", None), ("/v1/x", "Bearer secret")]
    with pytest.raises(RunError, match="does not respond"):
        _request(address, "/health")


@pytest.mark.skipif("STROP_VLLM_PYTHON" not in os.environ, reason="STROP_VLLM_PYTHON is not set (`make vllm`)")
def test_real_vllm_serves_base_and_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STROP_CACHE")  # so that the demo model is found in the usual cache
    [folder, _] = save_adapters(tmp_path, Path("demo"), load_tokenizer(locate("demo")), std=0.05)
    options = ["--engine", "vllm", "--vllm-python", os.environ["STROP_VLLM_PYTHON"], "--context", "512", "--slots", "4"]
    with serving(folder, *options) as server:
        [result] = server.about["parity"]
        assert result["passed"] and result["mean"] < 1e-3 and result["control"] > 20 * result["mean"]
        messages = [{"role": "user", "content": "hello"}]
        texts = [
            server.post(CHAT, {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}).json()
            for model in ("calm", "base")
        ]
        assert texts[0]["choices"] != texts[1]["choices"]
        assert server.stop() == 130
    with pytest.raises(requests.ConnectionError):
        requests.get(server.url + "/health", timeout=5)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on rows with images, with attention heads of a size that vLLM supports on CPUs."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    monkeypatch.setattr(seeing, "TEXT", {**seeing.TEXT, **sizes})
    base = seeing.save_seeing(tmp_path / "base", "idefics3")
    write_rows(tmp_path, several=True)
    options = {"train.max_steps": 8, "train.learning_rate": 1e-2, "model.dtype": "fp32", "data.max_length": 4000}
    strop.train(model=str(base), data=str(tmp_path / "rows.jsonl"), out=tmp_path / "run", **options)
    return tmp_path / "run"


def test_rows_with_images_are_compared_as_messages(pictures: Path) -> None:
    renderer = load_renderer(str(pictures))
    one, several, text = _select_rows(str(pictures), renderer, 4000)
    assert [row.path for row in (one, several, text)] == [CHAT, CHAT, "/v1/completions"]
    urls = [part["image_url"]["url"] for part in several.body["messages"][0]["content"] if "image_url" in part]
    assert len(urls) == 2 and all(url.startswith("data:image/png;base64,") for url in urls)
    assert one.compared.tolist() == [i for i in range(len(one.ids)) if i >= len(one.ids) - len(one.compared)]
    assert [row.path for row in _select_rows(str(pictures), renderer, 20)] == ["/v1/completions"]  # too long for it
    write_rows(pictures.parent, several=True)
    (rows := pictures.parent / "rows.jsonl").write_text(rows.read_text(encoding="utf-8").splitlines()[0], "utf-8")
    options = {"train.max_steps": 1, "data.max_length": 4000, "model.dtype": "fp32"}
    run = strop.train(model=str(pictures.parent / "base"), data=str(rows), out=pictures.parent / "one", **options)
    asked = _select_rows(str(run.folder), load_renderer(str(run.folder)), 20)  # questions, as no row fits
    assert len(asked) == NUM_ROWS and all(row.path == "/v1/completions" and len(row.ids) == 19 for row in asked)


def test_adapters_in_the_image_encoder_are_refused(pictures: Path) -> None:
    rows = pictures.parent / "rows.jsonl"
    options = {"train.max_steps": 1, "data.max_length": 4000, "lora.vision": "all"}
    run = strop.train(model=str(pictures.parent / "base"), data=str(rows), out=pictures.parent / "all", **options)
    with pytest.raises(ModelError, match="does not support adapters in the image encoder"):
        _check_adapter(run.folder / "adapter", locate(str(pictures.parent / "base")))


@pytest.mark.skipif("STROP_VLLM_PYTHON" not in os.environ, reason="STROP_VLLM_PYTHON is not set (`make vllm`)")
def test_real_vllm_reads_images(pictures: Path) -> None:
    options = ["--engine", "vllm", "--vllm-python", os.environ["STROP_VLLM_PYTHON"], "--context", "512", "--slots", "2"]
    rows = _select_rows(str(pictures), load_renderer(str(pictures)), 512)
    with serving(pictures, *options) as server:
        [result] = server.about["parity"]
        assert result["passed"] and result["mean"] < 1e-3 and result["control"] > 20 * result["mean"]
        assert result["tokens"] == sum(len(row.compared) for row in rows)
        body = {**rows[0].body, "messages": rows[0].body["messages"][:1], "model": "run", "max_tokens": 8}
        body |= {"temperature": 0, "add_generation_prompt": True}
        assert server.post(CHAT, body).json()["choices"][0]["message"]["content"].startswith("red")
        assert server.stop() == 130
