"""GGUF files as bases: their weights one at a time, the same as transformers reads all of them at once."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import strop
from strop.errors import FolderError, ModelError
from strop.export import llama_cpp
from strop.export.gguf import export_gguf
from strop.export.merge import merge
from strop.models.load import copies_needed, load_base
from strop.models.source import locate
from tests.support import gguf_models
from tests.support.tiny import write_rows


@pytest.mark.parametrize("family", ["llama", "llama-2", "smollm", "qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("kind", ["q8_0", "f32"])
def test_a_gguf_file_is_read_tensor_by_tensor_as_transformers_reads_it(
    tmp_path: Path, family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    rows = str(write_rows(tmp_path / "rows.jsonl", 24))
    # a head of 128 is the one that transformers takes of a Qwen 3's file, and of a Llama's it leaves biases out
    sizes = {"qwen3": {"head_dim": 128}, "llama-2": {"attention_bias": False, "mlp_bias": False}}.get(family, {})
    base = gguf_models.save(family, tmp_path / "base", **sizes)
    export_gguf(str(gguf_models.adapt(base, tmp_path / "tuned")), tmp_path / "m.gguf", kind=kind, data=rows)
    source = locate(str(tmp_path / "m.gguf"))
    found = []
    for theirs in (False, True):
        monkeypatch.setenv("STROP_CACHE", str(tmp_path / str(theirs)))
        assert copies_needed(source, "none", True, torch.bfloat16) == (True, False)
        assert copies_needed(source, "nf4", True, torch.bfloat16) == (True, True)
        if theirs:
            monkeypatch.setattr("strop.models.load.read_gguf_tensors", lambda *_: None)
        loaded = load_base(source, torch.bfloat16, "cpu")
        assert any((tmp_path / str(theirs)).rglob("bf16/model.safetensors")) == theirs  # in one piece
        assert copies_needed(source, "none", True, torch.bfloat16) == (False, False)
        assert copies_needed(source, "nf4", True, torch.bfloat16) == (False, True)
        found.append(dict(loaded.named_parameters()))
    assert list(found[0]) == list(found[1])
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def _number(key: str, value: int) -> Callable[[bytes], bytes]:
    """Another number in the header."""
    name = struct.pack("<Q", len(key)) + key.encode()
    return lambda raw: re.sub(
        re.escape(name) + rb"(.{4}).{4}", name + rb"\1" + struct.pack("<I", value), raw, flags=re.S
    )


def _renamed(name: str, other: str) -> Callable[[bytes], bytes]:
    old, new = (struct.pack("<Q", len(one)) + one.encode() for one in (name, other))
    return lambda raw: raw.replace(old, new)


def _typed(name: str, kind: int) -> Callable[[bytes], bytes]:
    """A tensor of two dimensions said to be of another type."""
    begin = re.escape(struct.pack("<Q", len(name)) + name.encode())
    return lambda raw: re.sub(rb"(" + begin + rb".{20}).{4}", rb"\1" + struct.pack("<I", kind), raw, flags=re.S)


UP = "blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_number("llama.block_count", 1), "tensors of 2 layers, 1 expected"),
        (_number("llama.block_count", 3), "tensors of 2 layers, 3 expected"),  # one part of several, for example
        (_number("llama.attention.head_count", 8), "can be read|of another shape"),  # by transformers' version
        (_renamed(UP, "blk.0.ffn_uq.weight"), "1 weights are missing, first model.layers.0.mlp.up_proj.weight"),
        (_renamed(UP, "blk.1.ffn_up.weight"), "can be read"),
        (
            _renamed("rope_freqs.weight", "blk.0.attn_q.bias"),
            "1 of its tensors have no place .*, first blk.0.attn_q.bias",
        ),
        (_typed(UP, 99), "can be read"),
        (_typed(UP, 26), "can be read"),
    ],
)
def test_a_gguf_file_that_would_make_another_model_is_refused(
    damage: Callable[[bytes], bytes], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers fills with random numbers what it does not find."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    rows = str(write_rows(tmp_path / "rows.jsonl", 4))
    adapter = gguf_models.adapt(gguf_models.save("llama", tmp_path / "base"), tmp_path / "tuned")
    file = tmp_path / "m.gguf"
    export_gguf(str(adapter), file, kind="f32", data=rows)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    with pytest.raises(ModelError, match=said):
        load_base(locate(str(file)), torch.bfloat16, "cpu")


def test_the_biases_of_a_llama_are_not_left_out_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header does not tell of them, and transformers builds the model without."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    rows = str(write_rows(tmp_path / "rows.jsonl", 4))
    adapter = gguf_models.adapt(gguf_models.save("llama-2", tmp_path / "base", attention_bias=True), tmp_path / "tuned")
    export_gguf(str(adapter), tmp_path / "m.gguf", kind="f32", data=rows)
    with pytest.raises(ModelError, match=r"8 of its tensors have no place .*, first blk\.0\.attn_k\.bias"):
        load_base(locate(str(tmp_path / "m.gguf")), torch.bfloat16, "cpu")


def test_a_merge_on_a_gguf_base_names_its_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a GGUF header does not, and servers look for."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    rows = str(write_rows(tmp_path / "rows.jsonl", 24))
    base = gguf_models.save("llama", tmp_path / "base")
    export_gguf(str(gguf_models.adapt(base, tmp_path / "first")), tmp_path / "m.gguf", kind="f32", data=rows)
    adapter = gguf_models.adapt(str(tmp_path / "m.gguf"), tmp_path / "second")
    merge(str(adapter), tmp_path / "merged", measure=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_disk_of_the_cache_has_room_for_the_copies_of_the_base(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    room = {tmp_path / "cache": 1000}
    monkeypatch.setattr("strop.training.preflight.free_bytes", lambda path: room.get(path, 1 << 40))
    options = {"model": str(tiny_folder), "data": str(rows_file), "train.max_steps": 1, "model.dtype": "fp32"}
    with pytest.raises(FolderError, match="copies of the base") as raised:
        strop.train(**options, out=tmp_path / "q", **{"model.quantization": "nf4"})
    assert "STROP_CACHE" in raised.value.fix and not (tmp_path / "q").exists()
    strop.train(**options, out=tmp_path / "whole")
