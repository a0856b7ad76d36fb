"""What an export to GGUF refuses, and what it leaves out where it is asked to."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import ExitStack, nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import strop
from strop.data.rendering.render import Renderer
from strop.errors import InputError, MemoryLimitError, ModelError, RecipeError
from strop.exporting import gguf as module
from strop.exporting import gguf_tokenizer, llama_cpp
from strop.exporting.gguf import export_gguf
from strop.exporting.tuned import Trained, Tuned
from strop.models.families.gguf import GgufLayout
from strop.models.load import load_config
from strop.models.source import Source, locate
from strop.models.tokenizer import load_tokenizer
from strop.testing import tiny_model
from tests.support import gguf_models
from tests.support.tiny import write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_models.save("qwen2", tmp_path_factory.mktemp("qwen2") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    return gguf_models.adapt(base, base.with_name("tuned"))


def test_yarn_rounds_its_range_in_llama_cpp() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256}
    for more in ({}, {"truncate": True}):
        layout = GgufLayout(gguf_models.config("llama-2", 1000, rope_parameters={**yarn, **more}))
        layout.write_metadata(Mock())
    with pytest.raises(ModelError, match="truncate: false"):
        GgufLayout(gguf_models.config("llama-2", 1000, rope_parameters={**yarn, "truncate": False})).write_metadata(
            Mock()
        )


def test_a_sentencepiece_tokenizer_that_does_more_is_refused() -> None:
    blanks, prepend = normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")
    late = pre_tokenizers.Split(" ", "merged_with_previous")
    one, whole = (pre_tokenizers.Metaspace("▁", "first", split) for split in (True, False))
    shapes: list[tuple[Any, Any, bool]] = [
        (normalizers.Sequence([prepend, blanks]), None, True),
        (blanks, late, True),
        (None, whole, True),
        (None, one, False),
        (None, None, False),
        (normalizers.Sequence([normalizers.NFKC(), blanks]), None, False),
        (blanks, pre_tokenizers.Digits(), False),
        (normalizers.Lowercase(), whole, False),
    ]
    backend = Tokenizer(models.BPE(byte_fallback=True))
    for normalizer, pre, known in shapes:
        backend.normalizer, backend.pre_tokenizer = normalizer, pre
        with nullcontext() if known else pytest.raises(ModelError, match="no such pre-tokenizer"):
            gguf_tokenizer._check_blanks(json.loads(backend.to_str()))


def test_a_byte_level_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    run = gguf_models.adapt(tiny_model(tmp_path / "base"), tmp_path / "tuned")
    with pytest.raises(ModelError, match="no byte-level tokenizer without merges"):
        export_gguf(str(run), tmp_path / "m.gguf", measure=False)


def test_a_tied_head_has_no_place_of_its_own(base: Path, rows: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of the tie
        tuned = gguf_models.adapt(base, tmp_path / "odd", target_modules=["q_proj", "lm_head"])
    for adapter in (True, False):
        with pytest.raises(ModelError, match="trains lm_head, which has no weight of its own"):
            export_gguf(str(tuned), tmp_path / "m.gguf", adapter=adapter, data=rows)
    assert not list(tmp_path.glob("*m.gguf*"))


def test_trained_biases_are_in_the_model_and_have_no_place_in_an_adapter_file(
    base: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    tuned = gguf_models.adapt(base, tmp_path / "biased", bias="all")
    export_gguf(str(tuned), tmp_path / "m.gguf", kind="f32", data=rows)
    written = {found.name: found.data for found in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    saved = load_file(tuned / "adapter_model.safetensors")
    for layer, side in product(range(2), "qkv"):
        trained = saved[f"base_model.model.model.layers.{layer}.self_attn.{side}_proj.base_layer.bias"]
        assert (written[f"blk.{layer}.attn_{side}.bias"] == trained.numpy()).all()
    with pytest.raises(ModelError, match=r"no place for .*bias"):
        export_gguf(str(tuned), tmp_path / "a.gguf", adapter=True, data=rows)


def test_an_adapter_file_needs_the_template_of_its_base(base: Path, rows: str, tmp_path: Path) -> None:
    tuned = gguf_models.adapt(base, tmp_path / "odd")
    template = tuned / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(ModelError, match="another chat template"):
        export_gguf(str(tuned), tmp_path / "m.gguf", adapter=True, data=rows)


def test_the_base_that_an_adapter_is_proved_on_has_its_own_vocabulary(tmp_path: Path) -> None:
    """Whatever the adapter's tokenizer says: the user's GGUF of the base is made of the base."""
    base = gguf_models.save("llama", tmp_path / "base")
    tuned = gguf_models.adapt(base, tmp_path / "tuned")
    tokenizer = load_tokenizer(Source("tuned", "folder", tuned))
    tokenizer.eos_token = "<|eot_id|>"
    tokenizer.save_pretrained(tuned)
    source = locate(str(base))
    own = Tuned(source, tuned, Trained("none", True, torch.float32), "original", {}, [])
    words = gguf_tokenizer.vocabulary(source, Renderer(own.tokenizer), len(tokenizer))
    with ExitStack() as stack:
        model = module._Model(own, GgufLayout(load_config(source)), words, "m", stack)
        model.write(tmp_path / "tuned.gguf", "f16")
        model.write(tmp_path / "base.gguf", "f16", base=True)
    files = [gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("tuned", "base")]
    ends = [file.fields["tokenizer.ggml.eos_token_id"].contents() for file in files]
    assert ends == [tokenizer.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "<|end_of_text|>")]


def test_without_measuring(tuned: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(llama_cpp, "check_loads", lambda: None)
    told = strop.export("gguf", tuned, tmp_path / "m.gguf", measure=False).as_json()
    assert told["parity"] is None and "--no-parity" in told["not_measured"]
    with pytest.raises(RecipeError, match="measures nothing"):
        export_gguf(str(tuned), tmp_path / "n.gguf", data=rows, measure=False)
    monkeypatch.setattr("strop.exporting.merge.probe", lambda: type("Machine", (), {"free_bytes": 1 << 20})())
    with pytest.raises(MemoryLimitError, match="measuring takes") as raised:
        export_gguf(str(tuned), tmp_path / "n.gguf", data=rows)
    assert "--no-parity" in raised.value.fix and [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_a_llama_cpp_that_does_not_load(
    tuned: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('no shared library')")
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="does not load: no shared library"):
        export_gguf(str(tuned), tmp_path / "m.gguf", data=rows)
    assert not list(tmp_path.glob("*m.gguf*"))
