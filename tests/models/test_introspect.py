"""Learned positions, and texts longer than the model's maximum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

import strop
from strop.errors import DataError, InputError
from strop.models.introspect import learned_positions
from tests.support import tiny, tiny_families
from tests.support.families import tokenizer
from tests.support.groups import write_prompts, write_reward
from tests.support.runs import QUICK, run


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neo"])
def test_learned_positions_are_detected(kind: str) -> None:
    model = tiny_families.build(kind)
    assert learned_positions(model) == model.config.max_position_embeddings == 256


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "falcon", "bloom", "mpt", "mamba", "phi"])
def test_other_models_have_no_learned_positions(kind: str) -> None:
    assert learned_positions(tiny_families.build(kind)) is None


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """Return a model with 32 learned positions."""
    folder = tiny.save_tiny(tmp_path / "short")
    base: Any = tiny_families.build("gpt2")
    sizes = {**base.config.to_dict(), "n_positions": 32, "vocab_size": tiny.config().vocab_size}
    type(base)(type(base.config)(**sizes)).save_pretrained(folder)
    return folder


LONG = {"messages": [{"role": "user", "content": "what is 3 " * 6}, {"role": "assistant", "content": "it is 3 " * 6}]}


def test_rows_beyond_learned_positions_are_refused(short: Path, tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 4)
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(LONG) + "\n")
    with pytest.raises(DataError, match=r"1 of 5 rows are longer than the 32 tokens ") as raised:
        strop.train(model=short, data=rows, out=tmp_path / "run")
    assert "max_length=32" in raised.value.lines()[-1]
    cut = {"data": {"train": str(rows), "max_length": 32, "overlong": "drop"}, "train": {"max_steps": 2}}
    assert strop.train(model=short, out=tmp_path / "run", **cut).report["steps"] == 2


def test_generation_stops_at_the_last_position(short: Path) -> None:
    model = strop.load(short)
    [answer] = model.answer([np.arange(7, 37, dtype=np.int32)], max_new_tokens=80)
    assert answer.tokens == 2  # after 30 of 32
    with pytest.raises(InputError, match="the model supports 32"):
        model.generate("what is 3 " * 20)


def test_rows_beyond_max_positions_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_tiny(tmp_path / "base")
    tiny.model(max_position_embeddings=32).save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(LONG) + "\n", encoding="utf-8")
    message = "1 of 1 rows are longer than the 32 tokens that the model was made for"
    assert message in " ".join(run("check", "--model", folder, "--data", rows, capsys=capsys)[2].split())
    words = ["train", "--model", folder, "--data", rows, "--out", tmp_path / "run"]
    code, _, err = run(*words, *QUICK, capsys=capsys)
    assert code == 0 and message in " ".join(err.split())
    plan = strop.plan(model=folder, data=rows)
    assert plan.data["beyond"] == message and plan.largest["max_length"] == 32


def test_completions_count_towards_max_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt of 22 tokens leaves room for a completion of 42 in 64 positions; learned positions are a hard limit."""
    learned, rotary, rows = tmp_path / "learned", tmp_path / "rotary", write_prompts(tmp_path / "rows.jsonl", 4)
    tiny.save_tiny(rotary)
    tiny.model(max_position_embeddings=64).save_pretrained(rotary)
    tokenizer("chatml").save_pretrained(learned)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer("chatml")), **sizes)).save_pretrained(learned)
    reward = ["--train.objective", "grpo", "--train.group", "2", "--train.rewards", write_reward(tmp_path / "own.py")]
    message = "4 of 4 rows, with a completion of 43 tokens, are longer than the 64 tokens that the model was made for"
    for folder, most, code in ((learned, "43", 2), (learned, "42", 0), (rotary, "43", 0)):
        words = ["--model", folder, "--data", rows, *reward, "--train.answer_tokens", most]
        out = tmp_path / f"{folder.name}-{most}"
        exit_code, _, err = run("train", *words, "--out", out, *QUICK, "--train.max_steps", "1", capsys=capsys)
        assert exit_code == code and (message in " ".join(err.split())) == (most == "43"), err
        assert (message in " ".join(run("check", *words, capsys=capsys)[2].split())) == (most == "43")
        assert code == 0 or "lower --train.answer_tokens" in err
