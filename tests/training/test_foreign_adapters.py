"""Adapters that peft saved, and other programs changed: trained further, loaded, merged, or refused in words."""

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
from strop.export.weight_changes import changes
from strop.models.source import locate
from tests.models.walk import QUICK
from tests.support import tiny, tiny_families


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save_tiny(tmp_path / "base")


def saved(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter of plain peft on a tiny base, away from its start."""
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
    """What the recipe of a run says of lora that starts from an adapter; `strop plan` says the same."""
    rows = tiny.write_rows(folder.parent / "rows.jsonl", 4)
    strop.train(model=base, data=rows, out=folder, adapter=str(adapter), **QUICK)
    said: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text())["lora"]
    planned = strop.plan(model=base, data=rows, adapter=str(adapter), memory=8 << 30, **QUICK).resolved.recipe.lora
    assert planned.target_modules == said["target_modules"]
    return said


def test_a_pattern_of_layers_is_trained_further(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=r".*layers\.1.*(q_proj|up_proj)")
    assert goes_on(base, adapter, tmp_path / "run")["target_modules"] == ["q_proj", "up_proj"]


@pytest.mark.parametrize("targets", ["experts", ["experts.down_proj", "q_proj"]])
def test_an_adapter_on_experts_is_trained_further(targets: Any, tmp_path: Path) -> None:
    tiny_families.save("qwen3_moe", tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 4)
    strop.train(model=tmp_path / "base", data=rows, out=tmp_path / "a", **{**QUICK, "lora.target_modules": targets})
    found = goes_on(tmp_path / "base", tmp_path / "a", tmp_path / "b")["target_modules"]
    assert found == (["experts.down_proj", "experts.gate_up_proj"] if targets == "experts" else targets)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base_model_name_or_path": None}, "does not say which model it was trained on"),
        ({"r": None}, "r is None, not a number"),
        ({"r": 9}, r"does not fit .*size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', not a number"),
        ({"alora_invocation_tokens": [5, 6]}, "does not act on every token"),
        ({"arrow_config": {"top_k": 1}}, "does not act on every token"),
    ],
)
def test_what_cannot_answer_as_it_was_trained_is_refused(
    fields: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter, **fields)
    with pytest.raises(ModelError, match=said):
        strop.load(adapter, dtype="fp32", device="cpu")


@pytest.mark.parametrize(
    ("name", "said"), [("adapter_config.json", "not an object"), ("strop.json", "strop.json: damaged")]
)
def test_damaged_files_of_an_adapter_are_named(name: str, said: str, base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / name).write_text("[]" if name == "adapter_config.json" else "{")
    with pytest.raises(ModelError, match=said):
        strop.load(adapter, dtype="fp32", device="cpu")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_embedding_in_full_beside_a_head_that_was_its_own_is_not_merged(base: Path, tmp_path: Path) -> None:
    """The head stays what it was, and a merged model has one weight for both."""
    adapter = saved(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight was trained in full"):
        changes(locate(str(base)), adapter)
