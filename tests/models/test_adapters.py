"""Adapters with trained biases: disabling the adapter restores the base's biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import strop
from strop.data.types import Message
from strop.errors import ModelError
from tests.support import tiny
from tests.support.runs import run
from tests.support.serving import serving

PROMPT = "what is 3"


@pytest.fixture
def biased(tmp_path: Path) -> Path:
    """Return a tiny Qwen 2 whose q, k and v have nonzero biases."""
    folder = tiny.save_tiny(tmp_path / "qwen")
    config = {**tiny.config().to_dict(), "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**config))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    return folder


def train(base: Path, rows: Path, out: Path, bias: str) -> Path:
    options = {"lora": {"r": 2, "bias": bias}, "train": {"max_steps": 8, "learning_rate": 0.1}}
    return strop.train(model={"name": str(base), "dtype": "fp32"}, data=rows, out=out, **options).folder


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = module(torch.arange(7, 20)[None]).logits
    return output


def test_disabled_adapter_restores_base_biases(biased: Path, rows_file: Path, tmp_path: Path) -> None:
    run = train(biased, rows_file, tmp_path / "run", "all")
    bare, model = strop.load(biased, dtype="fp32"), strop.load(run, dtype="fp32")
    before = logits(model.module)
    with model.base():
        assert torch.equal(logits(model.module), logits(bare.module))
        assert model.generate(PROMPT, max_new_tokens=6) == bare.generate(PROMPT, max_new_tokens=6)
    assert torch.equal(logits(model.module), before) and not torch.allclose(before, logits(bare.module), atol=0.01)
    both = model.answer([model.renderer.prompt([Message("user", PROMPT)])], max_new_tokens=6, both=True)
    assert [answer.text for answer in both] == [
        bare.generate(PROMPT, max_new_tokens=6)[0], model.generate(PROMPT, max_new_tokens=6)[0]
    ]  # fmt: skip
    evaluation, base_evaluation = strop.evaluate(run, rows_file), strop.evaluate(biased, rows_file)
    assert evaluation["base"]["loss"] == pytest.approx(base_evaluation["base"]["loss"], rel=1e-3)  # bf16
    assert evaluation["base"]["loss"] != pytest.approx(evaluation["tuned"]["loss"], rel=1e-2)


def test_adapter_with_biases_cannot_share_base(biased: Path, rows_file: Path, tmp_path: Path) -> None:
    plain, biased_run = (train(biased, rows_file, tmp_path / bias, bias) for bias in ("none", "lora_only"))
    for first, second in ((plain, biased_run), (biased_run, plain)):
        model = strop.load(first, dtype="fp32")
        with pytest.raises(ModelError, match="trained biases"):
            model.add(str(second))


def test_server_answers_with_base_and_adapter_biases(biased: Path, rows_file: Path, tmp_path: Path) -> None:
    run = train(biased, rows_file, tmp_path / "run", "all")
    bare, model = strop.load(biased, dtype="fp32"), strop.load(run, dtype="fp32")
    expected = {
        "base": bare.generate(PROMPT, max_new_tokens=6)[0],
        "run": model.generate(PROMPT, max_new_tokens=6)[0],
    }
    with serving(run, "--dtype", "fp32") as server:
        for name in ("run", "base", "run"):
            messages = [{"role": "user", "content": PROMPT}]
            body = {"model": name, "messages": messages, "max_tokens": 6, "temperature": 0}
            reply = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
            assert reply == expected[name]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_gpt2_are_trained_in_fp32_on_a_bf16_base(rows_file: Path, tmp_path: Path, bias: str) -> None:
    base = tiny.save_tiny(tmp_path / "gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=tiny.config().vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    ).save_pretrained(base)
    options: dict[str, Any] = {"lora": {"r": 2, "bias": bias}, "train": {"max_steps": 8, "learning_rate": 0.1}}
    losses = {}
    for dtype in ("bf16", "fp32"):
        model = {"name": str(base), "dtype": dtype}
        run = strop.train(model=model, data=rows_file, out=tmp_path / dtype, **options)
        losses[dtype] = run.report["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    parity = strop.merge(tmp_path / "bf16", tmp_path / "merged", dtype="fp32").parity
    assert parity is not None and parity.kl_mean < 1e-6


def test_a_run_without_an_adapter_is_being_trained_or_ended_too_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("recipe.yaml", "lock.json"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match="ended before it saved its adapter") as raised:
        strop.load(tmp_path)
    assert "strop.resume" in str(raised.value)
    monkeypatch.setattr("strop.runs.folder.RunFolder.holder", 7)
    with pytest.raises(ModelError, match="is being trained by process 7") as raised:
        strop.load(tmp_path)
    assert "a LoRA run then saves its adapter" in str(raised.value)


def test_a_run_that_is_being_trained_is_refused_before_libraries_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("recipe.yaml", "lock.json"):
        (tmp_path / name).touch()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setattr("strop.runs.folder.RunFolder.holder", 7)
    monkeypatch.setattr("strop.engine.kernels.warmup.load", lambda *_: pytest.fail("the libraries were loaded"))
    for words in (["eval", tmp_path, "--data", rows], ["chat", tmp_path], ["serve", tmp_path]):
        code, _, err = run(*words, capsys=capsys)
        assert code == 2 and "is being trained by process 7" in err
