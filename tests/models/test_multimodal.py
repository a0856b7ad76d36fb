"""Multimodal checkpoints: the text half is trained, names stay as published, other towers stay byte-identical."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import strop
from strop.exporting.merge import merge
from strop.models.introspect import text_filter, text_path
from strop.models.load import load_base, load_without_weights
from strop.models.source import locate
from tests.support import tiny_families
from tests.support.tiny import write_rows

MULTIMODAL = ("gemma3", "qwen3_5", "mistral3", "llama4", "qwen3_vl")
IDS = torch.randint(5, 500, (2, 16), generator=torch.Generator().manual_seed(0))


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of each tensor's bytes, by name."""
    digests = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            digests[name] = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return digests


def logits(model: Any, kind: str) -> torch.Tensor:
    """Return logits of plain transformers; Llama 4's whole class fails on text (transformers 5.24)."""
    whole = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    output: torch.Tensor = (whole.language_model if kind == "llama4" else model)(input_ids=IDS).logits
    return output


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_trained_and_merged_model_loads_in_plain_libraries(kind: str, tmp_path: Path) -> None:
    base, rows = tmp_path / "base", write_rows(tmp_path / "rows.jsonl", 6)
    tiny_families.save(kind, base, multimodal=True)
    bare = load_without_weights(locate(str(base)))
    prefix = text_path(bare)
    assert prefix
    events: list[dict[str, Any]] = []
    strop.train(
        model=base, data=rows, out=tmp_path / "run", train={"max_steps": 2, "learning_rate": 1e-2},
        callback=events.append, **{"model.dtype": "fp32", "lora.r": 2},
    )  # fmt: skip
    assert any("its text model is trained" in event.get("text", "") for event in events)
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert saved and all(name.startswith(f"base_model.model.{prefix}") for name in saved)

    published: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(published, str(tmp_path / "run/adapter")).eval()
    ours = strop.load(tmp_path / "run", dtype="fp32").module
    with torch.no_grad():
        expected = ours(input_ids=IDS).logits
        assert torch.allclose(logits(theirs, kind), expected, atol=2e-5)

    (base / "preprocessor_config.json").write_text('{"image_mean": [0.5]}', encoding="utf-8")
    merged = merge(str(tmp_path / "run"), tmp_path / "merged", dtype="fp32")
    assert merged.parity is not None and merged.parity.passed
    before, after = hashes(base), hashes(tmp_path / "merged")
    assert set(before) == set(after)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "merged")]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert (tmp_path / "merged/preprocessor_config.json").read_text() == '{"image_mean": [0.5]}'
    changed = {name for name in before if before[name] != after[name]}
    whole: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    is_text = text_filter(bare)
    others = [name for name, _ in bare.named_parameters() if not is_text(name)]
    assert others and changed
    again: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    now, was = dict(whole.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(now[name], was[name]) for name in others)
    assert not any(part in name for name in changed for part in ("vision", "visual", "projector"))
    with torch.no_grad():
        assert torch.allclose(logits(whole, kind), expected, atol=2e-4)


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_text_half_trains_in_4_bit(kind: str, tmp_path: Path) -> None:
    tiny_families.save(kind, tmp_path / "base", multimodal=True)
    source = locate(str(tmp_path / "base"))
    full = load_base(source, torch.float32, "cpu")(input_ids=IDS).logits
    packed = load_base(source, torch.float32, "cpu", quantization="nf4")
    rounded = packed(input_ids=IDS).logits
    assert not torch.equal(rounded, full) and torch.nn.functional.cosine_similarity(rounded, full, dim=-1).mean() > 0.8
    report = strop.train(
        model=tmp_path / "base", data=write_rows(tmp_path / "rows.jsonl", 6), out=tmp_path / "run",
        train={"max_steps": 1}, **{"model.dtype": "fp32", "lora.r": 2, "model.quantization": "nf4"},
    ).report  # fmt: skip
    assert report["steps"] == 1
