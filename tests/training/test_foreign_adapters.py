"""Adapters saved by plain peft, some of them edited: trained further, loaded, merged, or refused with a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml

import strop
from strop.errors import ModelError
from strop.exporting.adapter_weights import load_merger
from strop.models.source import locate
from tests.models.walk import QUICK
from tests.support import tiny, tiny_families


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save_tiny(tmp_path / "base")


def saved(base: Path, folder: Path, **options: Any) -> Path:
    """Save a plain peft adapter with nonzero B on a tiny base."""
    model = tiny.model()
    model.name_or_path = str(base)
    torch.manual_seed(1)
    tuned: Any = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    for weight in tuned.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    tuned.save_pretrained(folder)
    return folder


def edit(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def goes_on(base: Path, adapter: Path, folder: Path) -> dict[str, Any]:
    """Return the recipe's lora section of a run that starts from an adapter; check that the plan agrees."""
    rows = tiny.write_rows(folder.parent / "rows.jsonl", 4)
    strop.train(model=base, data=rows, out=folder, adapter=str(adapter), **QUICK)
    text: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text())["lora"]
    planned = strop.plan(model=base, data=rows, adapter=str(adapter), memory=8 << 30, **QUICK).resolved.recipe.lora
    assert planned.target_modules == text["target_modules"]
    return text


def test_adapter_with_a_regex_of_layers_can_be_trained(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=r".*layers\.1.*(q_proj|up_proj)")
    assert goes_on(base, adapter, tmp_path / "run")["target_modules"] == ["q_proj", "up_proj"]


@pytest.mark.parametrize("targets", ["experts", ["experts.down_proj", "q_proj"]])
def test_adapter_on_experts_can_be_trained(targets: Any, tmp_path: Path) -> None:
    tiny_families.save("qwen3_moe", tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 4)
    strop.train(model=tmp_path / "base", data=rows, out=tmp_path / "a", **{**QUICK, "lora.target_modules": targets})
    result = goes_on(tmp_path / "base", tmp_path / "a", tmp_path / "b")["target_modules"]
    assert result == (["experts.down_proj", "experts.gate_up_proj"] if targets == "experts" else targets)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model_name_or_path": None}, "does not say which model it was trained on"),
        ({"r": None}, "r is None, not a number"),
        ({"r": 9}, r"does not fit .*size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', not a number"),
        ({"alora_invocation_tokens": [5, 6]}, "does not act on every token"),
        ({"arrow_config": {"top_k": 1}}, "does not act on every token"),
    ],
)
def test_invalid_adapter_config_is_refused(fields: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter, **fields)
    with pytest.raises(ModelError, match=message):
        strop.load(adapter, dtype="fp32", device="cpu")


@pytest.mark.parametrize(
    ("name", "message"), [("adapter_config.json", "not an object"), ("strop.json", "strop.json: damaged")]
)
def test_damaged_adapter_files_are_named(name: str, message: str, base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / name).write_text("[]" if name == "adapter_config.json" else "{")
    with pytest.raises(ModelError, match=message):
        strop.load(adapter, dtype="fp32", device="cpu")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_merging_a_trained_embedding_with_an_untrained_tied_head_is_refused(base: Path, tmp_path: Path) -> None:
    """The head is not trained, and a merged model has one weight for both."""
    adapter = saved(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight was trained in full"):
        load_merger(locate(str(base)), adapter)
