"""Runs that start from an adapter: what comes from the adapter and what from the recipe; notes on what is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import strop
from strop.errors import RecipeError
from strop.planning.plan import start_adapter
from strop.runs.events import read_events
from tests.support import tiny

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
    with pytest.raises(RecipeError, match="new_tokens"):
        chain("other", first, **{"lora.new_tokens": ["<else>"]})


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
