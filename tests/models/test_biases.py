"""With its adapter off, a model whose biases were trained is its base again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import strop
from strop.data.types import Message
from strop.errors import ModelError
from tests.support import tiny
from tests.support.serving import serving

ASKED = "what is 3"


@pytest.fixture
def biased(tmp_path: Path) -> Path:
    """A tiny Qwen 2, whose q, k and v have biases that are not zero."""
    folder = tiny.save_tiny(tmp_path / "qwen")
    config = {**tiny.config().to_dict(), "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**config))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    return folder


def trained(base: Path, rows: Path, out: Path, bias: str) -> Path:
    how = {"lora": {"r": 2, "bias": bias}, "train": {"max_steps": 8, "learning_rate": 0.1}}
    return strop.train(model={"name": str(base), "dtype": "fp32"}, data=rows, out=out, **how).folder


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(torch.arange(7, 20)[None]).logits
    return found


def test_the_base_is_the_base(biased: Path, rows_file: Path, tmp_path: Path) -> None:
    run = trained(biased, rows_file, tmp_path / "run", "all")
    bare, model = strop.load(biased, dtype="fp32"), strop.load(run, dtype="fp32")
    before = logits(model.module)
    with model.base():
        assert torch.equal(logits(model.module), logits(bare.module))
        assert model.generate(ASKED, max_new_tokens=6) == bare.generate(ASKED, max_new_tokens=6)
    assert torch.equal(logits(model.module), before) and not torch.allclose(before, logits(bare.module), atol=0.01)
    both = model.answer([model.renderer.prompt([Message("user", ASKED)])], max_new_tokens=6, both=True)
    assert [answer.text for answer in both] == [
        bare.generate(ASKED, max_new_tokens=6)[0], model.generate(ASKED, max_new_tokens=6)[0]
    ]  # fmt: skip
    found, alone = strop.evaluate(run, rows_file), strop.evaluate(biased, rows_file)
    assert found["base"]["loss"] == pytest.approx(alone["base"]["loss"], rel=1e-3)  # bf16
    assert found["base"]["loss"] != pytest.approx(found["tuned"]["loss"], rel=1e-2)


def test_it_shares_its_base_with_no_other(biased: Path, rows_file: Path, tmp_path: Path) -> None:
    plain, own = (trained(biased, rows_file, tmp_path / bias, bias) for bias in ("none", "lora_only"))
    for first, second in ((plain, own), (own, plain)):
        model = strop.load(first, dtype="fp32")
        with pytest.raises(ModelError, match="trained biases"):
            model.add(str(second))


def test_it_is_served_beside_its_base(biased: Path, rows_file: Path, tmp_path: Path) -> None:
    run = trained(biased, rows_file, tmp_path / "run", "all")
    bare, model = strop.load(biased, dtype="fp32"), strop.load(run, dtype="fp32")
    wanted = {
        "base": bare.generate(ASKED, max_new_tokens=6)[0],
        "run": model.generate(ASKED, max_new_tokens=6)[0],
    }
    with serving(run, "--dtype", "fp32") as server:
        for name in ("run", "base", "run"):
            messages = [{"role": "user", "content": ASKED}]
            body = {"model": name, "messages": messages, "max_tokens": 6, "temperature": 0}
            told = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
            assert told == wanted[name]
