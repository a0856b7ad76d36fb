"""GGUF files as bases: reading tensor by tensor gives the weights that transformers reads."""

from __future__ import annotations

import json
import re
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM

import strop
from strop.errors import FolderError, ModelError
from strop.exporting import llama_cpp
from strop.exporting.adapters import read_info
from strop.exporting.gguf import export_gguf
from strop.exporting.hub import _read_adapter
from strop.exporting.merge import merge
from strop.models.adapter_config import STROP_FILE
from strop.models.load import copies_needed, load_base
from strop.models.source import locate
from tests.support import gguf_models
from tests.support.tiny import write_rows


@pytest.mark.parametrize("family", ["llama", "llama-2", "smollm", "qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("kind", ["q8_0", "f32"])
def test_tensors_equal_those_read_by_transformers(
    tmp_path: Path, family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    rows = str(write_rows(tmp_path / "rows.jsonl", 24))
    # transformers assumes a head size of 128 for Qwen 3, and ignores a Llama's biases
    sizes = {"qwen3": {"head_dim": 128}, "llama-2": {"attention_bias": False, "mlp_bias": False}}.get(family, {})
    base = gguf_models.save(family, tmp_path / "base", **sizes)
    export_gguf(str(gguf_models.adapt(base, tmp_path / "tuned")), tmp_path / "m.gguf", kind=kind, data=rows)
    source = locate(str(tmp_path / "m.gguf"))
    loaded_weights = []
    for by_transformers in (False, True):
        monkeypatch.setenv("STROP_CACHE", str(tmp_path / str(by_transformers)))
        assert copies_needed(source, "none", True, torch.bfloat16) == (True, False)
        assert copies_needed(source, "nf4", True, torch.bfloat16) == (True, True)
        if by_transformers:
            monkeypatch.setattr("strop.models.load.read_gguf_tensors", lambda *_: None)
        loaded = load_base(source, torch.bfloat16, "cpu")
        assert any((tmp_path / str(by_transformers)).rglob("bf16/model.safetensors")) == by_transformers  # one shard
        assert copies_needed(source, "none", True, torch.bfloat16) == (False, False)
        assert copies_needed(source, "nf4", True, torch.bfloat16) == (False, True)
        loaded_weights.append(dict(loaded.named_parameters()))
    first, second = loaded_weights
    assert list(first) == list(second)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def _set_number(key: str, value: int) -> Callable[[bytes], bytes]:
    """Change a number in the header."""
    name = struct.pack("<Q", len(key)) + key.encode()
    return lambda raw: re.sub(
        re.escape(name) + rb"(.{4}).{4}", name + rb"\1" + struct.pack("<I", value), raw, flags=re.S
    )


def _rename(name: str, new_name: str) -> Callable[[bytes], bytes]:
    old, new = (struct.pack("<Q", len(text)) + text.encode() for text in (name, new_name))
    return lambda raw: raw.replace(old, new)


def _set_type(name: str, type_id: int) -> Callable[[bytes], bytes]:
    """Change the type of a two-dimensional tensor."""
    begin = re.escape(struct.pack("<Q", len(name)) + name.encode())
    return lambda raw: re.sub(rb"(" + begin + rb".{20}).{4}", rb"\1" + struct.pack("<I", type_id), raw, flags=re.S)


UP = "blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set_number("llama.block_count", 1), "tensors of 2 layers, 1 expected"),
        (
            _set_number("llama.block_count", 3),
            "tensors of 2 layers, 3 expected",
        ),  # for example one part of a split file
        (
            _set_number("llama.attention.head_count", 8),
            "not a readable GGUF|of another shape",
        ),  # depends on transformers' version
        (_rename(UP, "blk.0.ffn_uq.weight"), "1 weights are missing, first model.layers.0.mlp.up_proj.weight"),
        (_rename(UP, "blk.1.ffn_up.weight"), "not a readable GGUF"),
        (
            _rename("rope_freqs.weight", "blk.0.attn_q.bias"),
            "1 tensors are not part of .*, first blk.0.attn_q.bias",
        ),
        (_set_type(UP, 99), "not a readable GGUF"),
        (_set_type(UP, 26), "not a readable GGUF"),
    ],
)
def test_gguf_file_of_another_model_is_refused(
    damage: Callable[[bytes], bytes], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would fill missing weights with random values."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    rows = str(write_rows(tmp_path / "rows.jsonl", 4))
    adapter = gguf_models.adapt(gguf_models.save("llama", tmp_path / "base"), tmp_path / "tuned")
    file = tmp_path / "m.gguf"
    export_gguf(str(adapter), file, kind="f32", data=rows)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    with pytest.raises(ModelError, match=message):
        load_base(locate(str(file)), torch.bfloat16, "cpu")


def test_llama_biases_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header does not mention them, so transformers builds the model without biases."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    rows = str(write_rows(tmp_path / "rows.jsonl", 4))
    adapter = gguf_models.adapt(gguf_models.save("llama-2", tmp_path / "base", attention_bias=True), tmp_path / "tuned")
    export_gguf(str(adapter), tmp_path / "m.gguf", kind="f32", data=rows)
    with pytest.raises(ModelError, match=r"8 tensors are not part of .*, first blk\.0\.attn_k\.bias"):
        load_base(locate(str(tmp_path / "m.gguf")), torch.bfloat16, "cpu")


def test_merge_on_gguf_base_names_its_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A GGUF header does not name the class, which servers need.
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    rows = str(write_rows(tmp_path / "rows.jsonl", 24))
    base = gguf_models.save("llama", tmp_path / "base")
    export_gguf(str(gguf_models.adapt(base, tmp_path / "first")), tmp_path / "m.gguf", kind="f32", data=rows)
    adapter = gguf_models.adapt(str(tmp_path / "m.gguf"), tmp_path / "second")
    merge(str(adapter), tmp_path / "merged", measure=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_full_cache_disk_is_refused_before_training(
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


def test_peft_loads_the_adapter_of_a_run_on_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    rows = str(write_rows(tmp_path / "rows.jsonl", 8))
    file = tmp_path / "m.gguf"
    export_gguf(str(gguf_models.adapt(gguf_models.save("llama", tmp_path / "base"), tmp_path / "t")), file, data=rows)
    small = {"train.max_steps": 2, "train.learning_rate": 1e-2, "lora.r": 2, "model.dtype": "fp32"}
    run = Path(strop.train(model=file, data=rows, out=tmp_path / "r", **small))
    adapter = run / "adapter"
    model = strop.load(run)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        tuned = model.module(ids).logits
        # peft adds a row for the token that transformers adds to this tokenizer
        plain = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)(ids).logits[
            ..., : tuned.shape[-1]
        ]
        assert torch.allclose(plain, tuned, atol=1e-5)
        with model.base():
            assert not torch.allclose(plain, model.module(ids).logits, atol=1e-3)
    config, record = adapter / "adapter_config.json", adapter / STROP_FILE
    folder, name = json.loads(config.read_text())["base_model_name_or_path"], str(locate(str(file)).name)
    assert Path(folder).is_dir()
    assert read_info(str(run))["base"] == name
    monkeypatch.setattr("strop.exporting.hub._check_sizes", lambda *_: None)
    pushed = _read_adapter(adapter, "me/base")[0].values()
    assert not [content for content in pushed if isinstance(content, bytes) and str(tmp_path).encode() in content]
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "another-machine"))  # strop does not need the folder
    assert merge(str(run), tmp_path / "merged", dtype="fp32").parity is not None
    # adapters of earlier versions name the GGUF file in PEFT's config
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": name}))
    stored = json.loads(record.read_text())
    record.write_text(json.dumps({**stored, "base": {"name": name, "fingerprint": stored["base"]["fingerprint"]}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(strop.load(run).module(ids).logits, model.module(ids).logits)
    moved = shutil.copytree(folder, tmp_path / "moved")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(moved)}))
    assert read_info(str(run))["base"] == str(moved)  # a name that the user writes counts


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("command", ["check", "plan", "train"])
def test_missing_template_is_reported_before_the_tokenizer_loads(
    tmp_path: Path, kind: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = gguf_models.save("llama", tmp_path / "base")
    rows = str(write_rows(tmp_path / "rows.jsonl", 24))
    if kind == "gguf":
        model = tmp_path / "m.gguf"
        export_gguf(str(gguf_models.adapt(base, tmp_path / "tuned")), model, measure=False)
        content = model.read_bytes()
        assert b"tokenizer.chat_template" in content
        model.write_bytes(content.replace(b"tokenizer.chat_template", b"tokenizer.none_template"))
    else:
        model = base
        (base / "chat_template.jinja").unlink()
    monkeypatch.setattr("strop.models.tokenizer._tokenizer_class", lambda folder: pytest.fail("the tokenizer loads"))
    options = {"model": str(model), "data": rows, **({"out": str(tmp_path / "run")} if command == "train" else {})}
    with pytest.raises(ModelError, match="chat template") as raised:
        getattr(strop, command)(**options)
    assert 'template="chatml"' in raised.value.fix


def test_base_without_template_trains_on_texts(tmp_path: Path) -> None:
    base = gguf_models.save("llama", tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a line of a book"}) + "\n")
    assert strop.check(model=str(base), data=str(tmp_path / "texts.jsonl"))["rows"]["used"] == 1
