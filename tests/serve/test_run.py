"""Errors of `strop serve` before the server starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from strop import testing
from strop.cli.app import build
from strop.errors import InputError, ModelError, RecipeError
from strop.serve import run as serve_run
from strop.serve.models import check_names, load_models
from strop.serve.server import exit_code, open_address
from tests.support import tiny
from tests.support.serving import save_adapters
from tests.support.tiny import save_tiny


def test_other_address_needs_an_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STROP_API_KEY", raising=False)
    with pytest.raises(InputError, match="without a key"):
        open_address("0.0.0.0", 0, None, [])
    with pytest.raises(InputError, match="api_key"):
        open_address("127.0.0.1", 0, "two words", [])
    address = open_address("0.0.0.0", 0, "secret", ["Box.Example"])
    address.socket.close()
    assert {"box.example", f"box.example:{address.port}", f"127.0.0.1:{address.port}"} <= address.hosts
    assert "secret" not in address.hosts and address.url == f"http://127.0.0.1:{address.port}"


def test_used_port_raises() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(InputError, match="another program uses this port"):
            open_address("127.0.0.1", other.getsockname()[1], None, [])
    first = open_address("127.0.0.1", 0, None, [])  # bound, but not serving yet
    with pytest.raises(InputError, match="another program uses this port"):
        open_address("127.0.0.1", first.port, None, [])
    first.socket.close()
    with pytest.raises(InputError, match="cannot be bound"):
        open_address("no.such.host.invalid", 0, "key", [])


def test_context_below_that_of_the_model_is_noted(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_run, "DEFAULT_MAX_CONTEXT", 64)
    how = {"device": "cpu", "dtype": "fp32", "quantization": "auto", "force": False}
    for context, is_noted in ((None, True), (64, False)):
        *_, used, notes = serve_run._prepare([str(tiny_folder)], 1, context, **how)
        expected = "the context is 64 of the model's 512 tokens; --context sets it"
        assert used == 64 and (expected in notes) == is_noted


def test_several_models_must_be_runs_of_one_base(tiny_folder: Path, tmp_path: Path) -> None:
    calm, bold = save_adapters(tmp_path, tiny_folder)
    with pytest.raises(ModelError, match="id calm"):
        check_names([str(calm), str(calm)])
    with pytest.raises(ModelError, match="no adapter"):
        check_names([str(calm), str(tiny_folder)])
    calm.rename(tmp_path / "base")
    with pytest.raises(ModelError, match="id base"):
        check_names([str(tmp_path / "base")])
    import torch

    other = save_tiny(tmp_path / "other")
    tiny.model(seed=5).save_pretrained(other)
    [stranger, _] = save_adapters(tmp_path / "there", other)
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ModelError, match="another base"):
        load_models([str(bold), str(stranger)], device="cpu", dtype="fp32", quantization="auto", force=False)


def test_runs_with_new_tokens_are_served_in_any_order(tmp_path: Path) -> None:
    model, padded = testing.tiny_model(tmp_path / "model"), tiny.model(vocab_size=320)  # as most models are
    padded.save_pretrained(model)
    options = [{"lora.new_tokens": ["<A>"]}, {}, {"lora.new_tokens": ["<B>", "<C>"]}]
    runs = [
        testing.tiny_run(tmp_path, model=model, out=tmp_path / name, **{"train.max_steps": 1, **more})
        for name, more in zip(("one", "none", "two"), options, strict=True)
    ]
    loaded = load_models(
        [str(run.folder) for run in runs], device="cpu", dtype="fp32", quantization="auto", force=False
    )
    assert list(loaded.models) == ["one", "none", "two", "base"]
    tokens = ["<A>", "<B>", "<C>"]
    known = {id: [token for token in tokens if token in each.tokenizer.vocab] for id, each in loaded.models.items()}
    assert known == {"one": ["<A>"], "none": [], "two": ["<B>", "<C>"], "base": []}


def test_exit_code_of_signals() -> None:
    assert (exit_code(2), exit_code(15)) == (130, 0)


@pytest.mark.parametrize(
    "options",
    [
        ["--engine", "vlm"],
        ["--engine", "vllm", "--queue", "3"],
        ["--vllm-python", "python3"],
        ["--dtype", "fp8"],
        ["--device", "gpu"],
        ["--engine", "vllm", "--dtype", "float16"],
        ["--engine", "vllm", "--device", "cuda:x"],
    ],
)
def test_invalid_or_ineffective_options_raise(options: list[str], tiny_folder: Path) -> None:
    with pytest.raises(RecipeError):
        build(["serve"])(["serve", str(tiny_folder), *options], standalone_mode=False)
