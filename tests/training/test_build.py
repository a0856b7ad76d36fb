"""Runs that start from an adapter: what comes from the adapter and what from the recipe; notes on what is trained."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

import strop
from strop import testing
from strop.data.prepare import add_tokens
from strop.data.types import Message
from strop.errors import RecipeError
from strop.planning.plan import start_adapter
from strop.runs.events import read_events
from tests.support import tiny
from tests.support.families import tokenizer
from tests.support.runs import run as run_command

FIELDS = {"model.dtype": "fp32", "train.max_steps": 2, "train.batch_size": 4, "train.learning_rate": 1e-2}


class Chain:
    """Train a first adapter and others that start from it; calling it returns a run folder."""

    def __init__(self, model: Path, rows: Path, folder: Path) -> None:
        self.of, self.folder = {"model.name": str(model), "data": str(rows)}, folder

    def __call__(self, name: str, start: Path | None = None, **options: Any) -> Path:
        more = {"lora.r": 4} if start is None else {"model.adapter": str(start)}
        return strop.train(out=self.folder / name, **{**self.of, **FIELDS, **more, **options}).folder


@pytest.fixture
def chain(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> Chain:
    return Chain(tiny_folder, rows_file, tmp_path)


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == "step"]


def notes(run: Path) -> list[str]:
    return [event["text"] for event in read_events(run / "events.jsonl") if event["event"] == "note"]


def dropouts(run: Path) -> tuple[float, float]:
    """Return (dropout in recipe.yaml, dropout in adapter_config.json)."""
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    return yaml.safe_load((run / "recipe.yaml").read_text())["lora"]["dropout"], adapter["lora_dropout"]


def with_dropout(run: Path, folder: Path, share: float) -> Path:
    """Copy an adapter with another dropout in its config."""
    shutil.copytree(run / "adapter", folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_dropout": share}))
    return folder


def test_dropout_defaults_to_that_of_the_start_adapter(chain: Chain, tmp_path: Path) -> None:
    none = chain("none")
    some = with_dropout(none, tmp_path / "some", 0.3)
    bare, own = chain("bare", none), chain("own", some)
    assert dropouts(bare) == (0.0, 0.0) and dropouts(own) == (0.3, 0.3) and losses(own) != losses(bare)
    assert "dropout: 0.3  # plan: as in the adapter it starts from" in (own / "recipe.yaml").read_text()
    off, on = chain("off", some, **{"lora.dropout": 0.0}), chain("on", none, **{"lora.dropout": 0.3})
    assert dropouts(off) == (0.0, 0.0) and losses(off) == losses(bare)
    assert dropouts(on) == (0.3, 0.3) and losses(on) == losses(own)


@pytest.mark.parametrize("init", ["gaussian", "loftq"])
def test_init_with_a_start_adapter_is_refused(chain: Chain, init: str) -> None:
    first = chain("first")
    with pytest.raises(RecipeError, match=f"lora.init {init}"):
        chain("next", first, **{"lora.init": init, "model.quantization": "nf4"})


def test_new_tokens_come_from_the_start_adapter(chain: Chain) -> None:
    first = chain("first", **{"lora.new_tokens": ["<call>", "<done>"]})
    again = chain("again", first)
    new_tokens = yaml.safe_load((again / "recipe.yaml").read_text())["lora"]["new_tokens"]
    planned = start_adapter(tiny.recipe(**{"model.adapter": str(first)}).recipe)
    assert planned is not None and new_tokens == planned["new_tokens"] == ["<call>", "<done>"]
    result = strop.evaluate(again, chain.of["data"], max_new_tokens=2)
    note = f"base is the model without adapters, so what {first} had learned before this run counts too"
    assert note in result["notes"] and note not in strop.evaluate(first, chain.of["data"], max_new_tokens=2)["notes"]
    with pytest.raises(RecipeError, match="new_tokens"):
        chain("other", first, **{"lora.new_tokens": ["<else>"]})


def test_new_tokens_are_trained_where_rows_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"say {n}", "completion": f"<call>{n}"} for n in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = testing.tiny_run(tmp_path, data=data, **{"lora.new_tokens": ["<call>", "<done>"]})
    [change] = [
        weight for name, weight in load_file(run.folder / "adapter" / "adapter_model.safetensors").items()
        if "trainable_tokens" in name
    ]  # fmt: skip
    saved = AutoTokenizer.from_pretrained(run.folder / "adapter")
    ids = saved.convert_tokens_to_ids(["<call>", "<done>"])
    assert not torch.allclose(change[0], change[1], atol=1e-3)  # both begin as the mean of all embeddings
    model = strop.load(run.folder)
    assert ids[0] in model.renderer.prompt([Message("user", "use <call>")])
    assert saved.decode(ids, skip_special_tokens=True) == "<call><done>"  # text of answers
    warning = "lora.new_tokens: <done> occurs in 0 of 8 training rows, so the model does not learn it"
    assert warning in json.loads((run.folder / "report.json").read_text())["data_report"]["warnings"]
    assert warning in (run.folder / "report.html").read_text().replace("&lt;", "<").replace("&gt;", ">")
    options = ["--model", tmp_path / "model", "--data", data, "--lora.new_tokens", "<call>,<done>"]
    _, out, _ = run_command("check", *options, capsys=capsys)
    assert warning in " ".join(out.split()) and "<call> occurs" not in out


def test_new_tokens_that_the_template_writes_are_special() -> None:
    """Text of rows cannot contain them, and they are not part of an answer."""
    tokens = ["<|im_start|>", "<|im_end|>", "<call>"]
    bare = copy.deepcopy(tokenizer("llama3"))
    add_tokens(bare, tokens, "chatml")
    flags = {token.content: token.special for token in bare.added_tokens_decoder.values()}
    assert [flags[token] for token in tokens] == [True, True, False]


def test_other_quantization_of_the_start_adapters_base_is_noted(chain: Chain) -> None:
    first = chain("first", **{"model.quantization": "nf4"})
    same, other = chain("same", first, **{"model.quantization": "nf4"}), chain("other", first)
    assert not any("nf4" in text for text in notes(same))
    text = next(text for text in notes(other) if "nf4" in text)
    assert "on the base in nf4, and here the base is not quantized" in text and "--model.quantization nf4" in text


def test_modules_to_save_name_with_several_matches_is_noted(chain: Chain) -> None:
    text = "lora.modules_to_save norm: all 5 modules with this suffix are trained in full"
    assert [note for note in notes(chain("norms", **{"lora.modules_to_save": ["norm"]})) if text in note]
    assert not any("in full" in note for note in notes(chain("last", **{"lora.modules_to_save": ["model.norm"]})))
