"""GGUF files: read back by transformers, and by llama.cpp if it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import ExitStack, nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM

import strop
from strop.data.rendering.render import Renderer
from strop.errors import FolderError, InputError, MemoryLimitError, ModelError, ParityError, RecipeError
from strop.exporting import gguf as module
from strop.exporting import gguf_tokenizer, llama_cpp
from strop.exporting.gguf import export_gguf
from strop.exporting.llama_cpp import SAMPLE_STRINGS, check_text
from strop.exporting.merge import TunedModel, merge
from strop.models.families.gguf import GgufLayout, interleave_heads
from strop.models.families.table import FAMILIES
from strop.models.load import load_config
from strop.models.source import Source, locate
from strop.models.tokenizer import load_tokenizer
from strop.testing import tiny_model
from tests.support import gguf_models
from tests.support.tiny import write_rows

needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_installed(), reason=f"no llama.cpp: {llama_cpp.INSTALL}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Provide base(family) and adapter(family), which return folders that are created once."""
    root = tmp_path_factory.mktemp("gguf")
    folders: dict[str, Path] = {}

    class Bases:
        def base(self, family: str) -> Path:
            if family not in folders:
                folders[family] = gguf_models.save(family, root / family)
            return folders[family]

        def adapter(self, family: str) -> Path:
            name = f"{family}-tuned"
            if name not in folders:
                folders[name] = gguf_models.adapt(self.base(family), root / name)
            return folders[name]

    return Bases()


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


def tensors(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read tensors by name, in fp32 and torch's order of dimensions."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("family", sorted(set(gguf_models.OPTIONS) - {"mistral"}))  # which is a llama in GGUF
def test_transformers_reads_the_tuned_model_from_gguf(
    bases: Any, rows: str, tmp_path: Path, family: str, no_llama_cpp: None
) -> None:
    """Uses the base's config: transformers does not read all settings from GGUF (rope scaling, head sizes)."""
    exported = export_gguf(str(bases.adapter(family)), tmp_path / "m.gguf", kind="f32", data=rows)
    assert exported.check is None
    config = load_config(locate(str(bases.base(family))))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    ours = strop.load(bases.adapter(family), dtype="fp32").module
    ids = torch.arange(30, 50)[None]
    with torch.no_grad():
        assert (theirs.eval()(ids).logits - ours(ids).logits).abs().max() < 1e-3


def test_export_without_llama_cpp_is_not_measured(bases: Any, rows: str, tmp_path: Path, no_llama_cpp: None) -> None:
    result = strop.export("gguf", bases.adapter("qwen2"), tmp_path / "m.gguf", data=rows).as_json()
    assert result["parity"] is None and "not installed" in result["not_measured"]
    assert result["files"] == ["m.gguf"] and result["type"] == "q8_0"
    with pytest.raises(RecipeError, match="quantizer"):
        export_gguf(str(bases.adapter("qwen2")), tmp_path / "n.gguf", kind="q4_k_m", data=rows)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_types_store_the_same_values(bases: Any, rows: str, tmp_path: Path, no_llama_cpp: None) -> None:
    values, kinds = {}, {}
    for kind in ("f32", "f16", "bf16", "q8_0"):
        file = tmp_path / f"{kind}.gguf"
        export_gguf(str(bases.adapter("qwen2")), file, kind=kind, data=rows)
        values[kind] = tensors(file)
        kinds[kind] = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
        assert fields(file)["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[kind]
        assert set(kinds[kind].values()) == {"F32", kind.upper()}
        assert all(kinds[kind][name] == "F32" for name in kinds[kind] if "norm" in name or name.endswith("bias"))
    for kind, tolerance in (("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)):
        for name, exact in values["f32"].items():
            assert np.abs(values[kind][name] - exact).max() <= tolerance * np.abs(exact).max(), (kind, name)


def test_rows_of_q_and_k_are_interleaved() -> None:
    weight = torch.arange(8.0)[:, None].repeat(1, 3)  # two heads of four rows: halves (0, 1) and (2, 3)
    assert interleave_heads(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_settings_that_gguf_cannot_store_are_refused() -> None:
    def layout(family: str, **changes: Any) -> GgufLayout:
        return GgufLayout(gguf_models.config(family, 1000, **changes))

    assert {layout(family).config.model_type for family in gguf_models.OPTIONS} == {
        name for name, row in FAMILIES.items() if row.gguf
    }
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("llama-2", {"rope_parameters": dynamic}, "rope scaling"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding window"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 6}, "order of sliding-window layers"),
        ("llama-2", {"hidden_act": "gelu"}, "activation"),
    ]
    for family, changes, setting in refused:
        with pytest.raises(ModelError, match=setting):
            layout(family, **changes)
    with pytest.raises(ModelError, match="no exporter for gpt2"):
        GgufLayout(gguf_models.transformers.GPT2Config())


def test_an_unknown_pre_tokenizer_is_refused(bases: Any, rows: str, tmp_path: Path) -> None:
    tokenizer = gguf_models.byte_level("chatml", (r"\w+|\W",), own=False)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    with pytest.raises(ModelError, match="unknown pre-tokenizer"):
        gguf_tokenizer.find_pre_tokenizer(state)
    with pytest.raises(ModelError, match="unknown pre-tokenizer"):
        gguf_tokenizer.find_pre_tokenizer({**state, "pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(ModelError, match="WordLevel tokenizers"):
        state["model"]["type"] = "WordLevel"
        renderer = Renderer(load_tokenizer(locate(str(bases.base("qwen2")))))
        backend = renderer.tokenizer.backend_tokenizer

        class Fake:
            backend_tokenizer = type("Backend", (), {"to_str": lambda self: json.dumps(state)})()

        gguf_tokenizer._build_entries(Fake(), renderer, backend.get_vocab_size())


def test_rows_are_asked_for_only_if_something_is_measured(bases: Any, tmp_path: Path, no_llama_cpp: None) -> None:
    exported = export_gguf(str(bases.adapter("qwen2")), tmp_path / "m.gguf")
    assert exported.unmeasured is not None and "llama.cpp is not installed" in exported.unmeasured


def test_invalid_exports_are_refused_before_writing(
    bases: Any, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = str(bases.adapter("qwen2"))
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(FolderError, match="already exists"):
        export_gguf(tuned, tmp_path / "there.gguf", data=rows)
    assert (tmp_path / "there.gguf").read_text() == "mine"
    with pytest.raises(RecipeError, match="no such type"):
        export_gguf(tuned, tmp_path / "m.gguf", kind="q3", data=rows)
    with pytest.raises(RecipeError, match=r"type q5: no such type \(did you mean q5_k_m\?\)"):
        export_gguf(tuned, tmp_path / "m.gguf", kind="q5", data=rows)
    with pytest.raises(FolderError, match="already exists"):  # as llama.cpp writes the type
        export_gguf(tuned, tmp_path / "there.gguf", kind="Q8_0", data=rows)
    with pytest.raises(RecipeError, match="stored in f32"):
        export_gguf(tuned, tmp_path / "m.gguf", kind="f16", adapter=True, data=rows)
    with monkeypatch.context() as patch, pytest.raises(ModelError, match="not a run, so it has no rows to measure on"):
        patch.setattr(llama_cpp, "is_installed", lambda: True)
        patch.setattr(llama_cpp, "check_import", lambda: None)
        export_gguf(str(bases.base("qwen2")), tmp_path / "m.gguf")
    with pytest.raises(InputError, match="not an adapter"):
        strop.export("ollama", tuned, tmp_path / "m.gguf", adapter=True)
    with pytest.raises(ModelError, match="no adapter there"):
        export_gguf(str(bases.base("qwen2")), tmp_path / "m.gguf", adapter=True, data=rows)
    dora = gguf_models.adapt(bases.base("qwen2"), tmp_path / "dora", use_dora=True)
    with pytest.raises(ModelError, match="cannot hold"):
        export_gguf(str(dora), tmp_path / "m.gguf", adapter=True, data=rows)
    assert not list(tmp_path.glob("*m.gguf*"))


def test_adapter_file_holds_the_difference_of_the_models(
    bases: Any, rows: str, tmp_path: Path, no_llama_cpp: None
) -> None:
    """B A, with llama.cpp's scale, is the difference between base and tuned model."""
    folder = gguf_models.adapt(
        bases.base("llama"),
        tmp_path / "tuned",
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 5},
    )
    export_gguf(str(folder), tmp_path / "lora.gguf", adapter=True, data=rows)
    export_gguf(str(folder), tmp_path / "tuned.gguf", kind="f32", data=rows)
    export_gguf(str(bases.base("llama")), tmp_path / "base.gguf", kind="f32", data=rows)
    alpha, parts = fields(tmp_path / "lora.gguf")["adapter.lora.alpha"], tensors(tmp_path / "lora.gguf")
    assert fields(tmp_path / "lora.gguf")["general.type"] == "adapter"
    base, tuned = tensors(tmp_path / "base.gguf"), tensors(tmp_path / "tuned.gguf")
    changed = {name.removesuffix(".lora_a") for name in parts if name.endswith(".lora_a")}
    assert len(changed) == 14 and 2 * len(changed) == len(parts)
    for name, weight in base.items():
        if name in changed:
            a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
            weight = weight + alpha / len(a) * b @ a
        assert np.abs(weight - tuned[name]).max() < 1e-5, name


@needs_llama_cpp
@pytest.mark.parametrize("family", sorted(gguf_models.OPTIONS))
def test_llama_cpp_computes_the_same_model(bases: Any, rows: str, tmp_path: Path, family: str) -> None:
    exported = export_gguf(str(bases.adapter(family)), tmp_path / "m.gguf", kind="f16", data=rows)
    check = exported.check
    assert check is not None and check.parity is not None and check.parity.passed
    assert check.parity.kl_mean < 1e-4 and check.parity.positions > 150
    assert (check.strings, check.conversations, check.answers) == (200, 10, 4)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    result = exported.as_json()
    assert result["not_measured"] is None and result["parity"]["passed"] and result["text"]["strings"] == 200
    base = export_gguf(str(bases.base(family)), tmp_path / "base.gguf", kind="f16", data=rows).check
    assert base is not None and base.parity is not None and base.parity.passed


@needs_llama_cpp
@pytest.mark.parametrize("name", sorted(set(gguf_tokenizer.PRE_TOKENIZERS.values())))
def test_named_pre_tokenizer_splits_strings_identically(tmp_path: Path, name: str) -> None:
    key = next(key for key, value in gguf_tokenizer.PRE_TOKENIZERS.items() if value == name)
    tokenizer = gguf_models.byte_level("chatml", *key)
    folder = tmp_path / "base"
    config = gguf_models.config("qwen2", len(tokenizer), hidden_size=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = locate(str(folder))
    renderer = Renderer(load_tokenizer(source))
    vocabulary = gguf_tokenizer.build_vocabulary(source, renderer, len(tokenizer))
    assert vocabulary.entries["tokenizer.ggml.pre"][0] == name
    file = write_model(folder, vocabulary, tmp_path / "m.gguf")
    with llama_cpp.LlamaCpp(file, vocab_only=True) as llama:
        check = check_text(llama, vocabulary, renderer, [])
    assert check.strings + len(check.strings_differ) == len(SAMPLE_STRINGS)
    assert not check.strings_differ or name in gguf_tokenizer.APPROXIMATE
    if name == "llama-bpe":  # with another name the check fails
        vocabulary.entries["tokenizer.ggml.pre"] = ("qwen2", *vocabulary.entries["tokenizer.ggml.pre"][1:])
        file = write_model(folder, vocabulary, tmp_path / "wrong.gguf")
        with (
            llama_cpp.LlamaCpp(file, vocab_only=True) as llama,
            pytest.raises(ParityError, match="strings are tokenized"),
        ):
            check_text(llama, vocabulary, renderer, [])


def write_model(folder: Path, vocabulary: gguf_tokenizer.Vocabulary, file: Path) -> Path:
    source = locate(str(folder))
    with ExitStack() as stack:
        writer = module._ModelWriter(
            TunedModel(str(folder), source), GgufLayout(load_config(source)), vocabulary, "m", stack
        )
        writer.write_model(file, "f16")
    return file


FAULTS = ["eos", "permutation", "template", "no adapter", "norms", "token types"]


@needs_llama_cpp
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_file_is_refused_and_removed(
    bases: Any, rows: str, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, arrange = gguf_tokenizer.Vocabulary.write, GgufLayout.convert

    def write_wrong(self: gguf_tokenizer.Vocabulary, writer: Any) -> None:
        changed = dict(self.entries)
        if fault == "eos":
            changed["tokenizer.ggml.eos_token_id"] = (7, gguf.GGUFValueType.UINT32, None)
        elif fault == "template":
            template = changed["tokenizer.chat_template"][0].replace("<|start_header_id|>", "<|start_header_id|> ")
            changed["tokenizer.chat_template"] = (template, gguf.GGUFValueType.STRING, None)
        elif fault == "token types":
            kinds = changed["tokenizer.ggml.token_type"]
            changed["tokenizer.ggml.token_type"] = ([1] * len(kinds[0]), *kinds[1:])
        write(gguf_tokenizer.Vocabulary(self.exact, changed, self.bos, self.eos, self.add_bos), writer)

    def arrange_wrong(self: GgufLayout, name: str, weight: torch.Tensor) -> torch.Tensor:
        if fault == "permutation":
            return weight
        arranged = arrange(self, name, weight)
        return arranged + 1 if fault == "norms" and name.endswith("norm.weight") else arranged

    monkeypatch.setattr(gguf_tokenizer.Vocabulary, "write", write_wrong)
    monkeypatch.setattr(GgufLayout, "convert", arrange_wrong)
    if fault == "no adapter":
        monkeypatch.setattr(TunedModel, "load_merger", lambda self: lambda name, weight: (weight, weight))
    errors = {
        "eos": "eos is 7",
        "template": "chat template gives another prompt",
        "token types": "tokenized|does not stop",
    }
    with pytest.raises(ParityError, match=errors.get(fault, "mean KL")):
        export_gguf(str(bases.adapter("llama")), tmp_path / "m.gguf", data=rows)
    assert not list(tmp_path.iterdir())


@needs_llama_cpp
def test_q8_0_and_adapter_files_pass_in_llama_cpp(bases: Any, rows: str, tmp_path: Path) -> None:
    exported = export_gguf(str(bases.adapter("llama")), tmp_path / "m.gguf", data=rows)
    assert exported.check is not None and exported.check.parity is not None
    assert exported.check.parity.limit == module.LIMITS["q8_0"]
    lora = export_gguf(str(bases.adapter("llama")), tmp_path / "lora.gguf", adapter=True, data=rows)
    assert lora.check is not None and lora.check.parity is not None and lora.check.parity.kl_mean < 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lora.gguf", "m.gguf"]


@needs_llama_cpp
def test_model_from_gguf_keeps_its_tokenizer(bases: Any, rows: str, tmp_path: Path) -> None:
    export_gguf(str(bases.base("qwen2")), tmp_path / "base.gguf", kind="f16", data=rows)
    tuned = gguf_models.adapt(tmp_path / "base.gguf", tmp_path / "tuned")
    export_gguf(str(tuned), tmp_path / "m.gguf", kind="f16", data=rows)
    before, after = fields(tmp_path / "base.gguf"), fields(tmp_path / "m.gguf")
    names = {name for name in before if name.startswith("tokenizer.")}
    assert {"tokenizer.ggml.pre", "tokenizer.ggml.merges", "tokenizer.chat_template"} <= names
    assert all(before[name] == after[name] for name in names)
    lora = export_gguf(str(tuned), tmp_path / "lora.gguf", adapter=True, data=rows)
    assert lora.check is not None and lora.check.parity is not None and lora.check.parity.kl_mean < 1e-3


@needs_llama_cpp
def test_adapter_on_a_gguf_that_transformers_reads_differently_is_refused(
    bases: Any, rows: str, tmp_path: Path
) -> None:
    """transformers ignores the rope scaling in a GGUF file, so the base in llama.cpp is not that of the training."""
    export_gguf(str(bases.base("smollm")), tmp_path / "base.gguf", kind="f16", data=rows)
    tuned = gguf_models.adapt(tmp_path / "base.gguf", tmp_path / "tuned")
    with pytest.raises(ParityError, match="not the same model"):
        export_gguf(str(tuned), tmp_path / "lora.gguf", adapter=True, data=rows)
    assert not (tmp_path / "lora.gguf").exists()


@needs_llama_cpp
def test_model_without_a_chat_template_is_exported(tmp_path: Path) -> None:
    base = gguf_models.save("qwen2", tmp_path / "base")
    tokenizer = load_tokenizer(locate(str(base)))
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"what is {n}, it is {n * n}!"}) + "\n" for n in range(20)))
    check = export_gguf(str(base), tmp_path / "m.gguf", kind="f16", data=str(rows)).check
    assert check is not None and check.strings == 200 and check.conversations == 0
    assert "tokenizer.chat_template" not in fields(tmp_path / "m.gguf")


ORACLE = ["llama", "llama-2", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]


# The converter identifies pre-tokenizers by the hash of a known vocabulary, and needs SentencePiece's file; neither is
# available here.
CONVERTER = """
import runpy, sys
folder = sys.argv[1]
sys.path[:0] = [folder, folder + "/gguf-py"]
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
from conversion import base, gemma, llama, phi
base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
for model in (base.TextModel, llama.LlamaModel, gemma.Gemma2Model, gemma.Gemma3Model, phi.Phi3MiniModel):
    model.set_vocab = lambda self: self._set_vocab_gpt2()
runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@pytest.mark.parametrize("family", ORACLE)
def test_llama_cpps_converter_writes_the_same_tensors(
    bases: Any, rows: str, tmp_path: Path, family: str, no_llama_cpp: None
) -> None:
    """STROP_LLAMA_CPP: the folder with convert_hf_to_gguf.py and its gguf-py (vendor/llama.cpp in the sdist)."""
    folder = os.environ.get("STROP_LLAMA_CPP")
    if not folder:
        pytest.skip("STROP_LLAMA_CPP is not set to llama.cpp's folder")
    merge(str(bases.adapter(family)), tmp_path / "merged", dtype="fp32", data=rows)
    for kind in ("f32", "f16", "q8_0"):
        export_gguf(str(bases.adapter(family)), tmp_path / f"ours-{kind}.gguf", kind=kind, data=rows)
        theirs = tmp_path / f"theirs-{kind}.gguf"
        process = subprocess.run(
            [sys.executable, "-c", CONVERTER, folder, tmp_path / "merged", "--outtype", kind, "--outfile", theirs],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-800:]
        ours = {t.name: t for t in gguf.GGUFReader(tmp_path / f"ours-{kind}.gguf").tensors}
        for tensor in gguf.GGUFReader(theirs).tensors:
            if tensor.name == "rope_freqs.weight":
                assert np.allclose(ours.pop(tensor.name).data, tensor.data, rtol=1e-6)
                continue
            our_tensor = ours.pop(tensor.name)
            assert our_tensor.tensor_type == tensor.tensor_type, tensor.name
            assert np.array_equal(our_tensor.data, tensor.data), tensor.name
        assert not ours
        our_fields, their_fields = fields(tmp_path / f"ours-{kind}.gguf"), fields(theirs)
        settings = {key for key in their_fields if key.startswith(f"{our_fields['general.architecture']}.")}
        assert all(our_fields[key] == pytest.approx(their_fields[key]) for key in settings), settings
        assert our_fields["general.file_type"] == their_fields["general.file_type"]


def test_second_export_to_the_same_file_is_refused(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two exports would write the same partial file, and the first to end would publish it."""
    write_model, out = module._ModelWriter.write_model, tmp_path / "model.gguf"

    def export_again(self: Any, file: Path, kind: str, **options: Any) -> None:
        with pytest.raises(FolderError, match="another process is writing it"):
            export_gguf(str(bases.base("llama")), out, kind="f32", measure=False)
        write_model(self, file, kind, **options)

    monkeypatch.setattr(module._ModelWriter, "write_model", export_again)
    export_gguf(str(bases.base("llama")), out, kind="f16", measure=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_models.save("qwen2", tmp_path_factory.mktemp("qwen2") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    return gguf_models.adapt(base, base.with_name("tuned"))


def test_yarn_without_truncation_is_refused() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256}
    for options in ({}, {"truncate": True}):  # llama.cpp always truncates
        layout = GgufLayout(gguf_models.config("llama-2", 1000, rope_parameters={**yarn, **options}))
        layout.write_metadata(Mock())
    config = gguf_models.config("llama-2", 1000, rope_parameters={**yarn, "truncate": False})
    with pytest.raises(ModelError, match="truncate: false"):
        GgufLayout(config).write_metadata(Mock())


def test_unknown_sentencepiece_steps_are_refused() -> None:
    spaces, prepend = normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    splitting, joined = (pre_tokenizers.Metaspace("▁", "first", split) for split in (True, False))
    cases: list[tuple[Any, Any, bool]] = [
        (normalizers.Sequence([prepend, spaces]), None, True),
        (spaces, split, True),
        (None, joined, True),
        (None, splitting, False),
        (None, None, False),
        (normalizers.Sequence([normalizers.NFKC(), spaces]), None, False),
        (spaces, pre_tokenizers.Digits(), False),
        (normalizers.Lowercase(), joined, False),
    ]
    backend = Tokenizer(models.BPE(byte_fallback=True))
    for normalizer, pre_tokenizer, supported in cases:
        backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
        with nullcontext() if supported else pytest.raises(ModelError, match="unknown pre-tokenizer"):
            gguf_tokenizer._check_sentencepiece(json.loads(backend.to_str()))


def test_a_byte_level_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    run = gguf_models.adapt(tiny_model(tmp_path / "base"), tmp_path / "tuned")
    with pytest.raises(ModelError, match="no byte-level tokenizer without merges"):
        export_gguf(str(run), tmp_path / "m.gguf", measure=False)


def test_adapter_on_a_tied_head_is_refused(base: Path, rows: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about tied weights
        tuned = gguf_models.adapt(base, tmp_path / "tuned", target_modules=["q_proj", "lm_head"])
    for adapter in (True, False):
        with pytest.raises(ModelError, match="trains lm_head"):
            export_gguf(str(tuned), tmp_path / "m.gguf", adapter=adapter, data=rows)
    assert not list(tmp_path.glob("*m.gguf*"))


def test_trained_biases_are_in_the_model_and_refused_in_an_adapter_file(
    base: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    tuned = gguf_models.adapt(base, tmp_path / "biased", bias="all")
    export_gguf(str(tuned), tmp_path / "m.gguf", kind="f32", data=rows)
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    saved = load_file(tuned / "adapter_model.safetensors")
    for layer, side in product(range(2), "qkv"):
        trained = saved[f"base_model.model.model.layers.{layer}.self_attn.{side}_proj.base_layer.bias"]
        assert (written[f"blk.{layer}.attn_{side}.bias"] == trained.numpy()).all()
    with pytest.raises(ModelError, match=r"cannot hold .*bias"):
        export_gguf(str(tuned), tmp_path / "a.gguf", adapter=True, data=rows)


def test_adapter_file_needs_the_template_of_its_base(base: Path, rows: str, tmp_path: Path) -> None:
    tuned = gguf_models.adapt(base, tmp_path / "tuned")
    template = tuned / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(ModelError, match="another chat template"):
        export_gguf(str(tuned), tmp_path / "m.gguf", adapter=True, data=rows)


def test_base_written_for_an_adapter_check_has_the_bases_vocabulary(tmp_path: Path) -> None:
    """The user's GGUF file of the base does not have the adapter's tokenizer."""
    base = gguf_models.save("llama", tmp_path / "base")
    tuned = gguf_models.adapt(base, tmp_path / "tuned")
    tokenizer = load_tokenizer(Source("tuned", "folder", tuned))
    tokenizer.eos_token = "<|eot_id|>"
    tokenizer.save_pretrained(tuned)
    source = locate(str(base))
    model = TunedModel("tuned", source, tuned)
    vocabulary = gguf_tokenizer.build_vocabulary(source, Renderer(model.load_tokenizer()), len(tokenizer))
    with ExitStack() as stack:
        writer = module._ModelWriter(model, GgufLayout(load_config(source)), vocabulary, "m", stack)
        writer.write_model(tmp_path / "tuned.gguf", "f16")
        writer.write_model(tmp_path / "base.gguf", "f16", base_only=True)
    files = [gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("tuned", "base")]
    eos_ids = [file.fields["tokenizer.ggml.eos_token_id"].contents() for file in files]
    assert eos_ids == [tokenizer.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "<|end_of_text|>")]


def test_no_parity_skips_measuring(tuned: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(llama_cpp, "check_import", lambda: None)
    result = strop.export("gguf", tuned, tmp_path / "m.gguf", measure=False).as_json()
    assert result["parity"] is None and "as asked" in result["not_measured"]
    with pytest.raises(RecipeError, match="measures nothing"):
        export_gguf(str(tuned), tmp_path / "n.gguf", data=rows, measure=False)
    monkeypatch.setattr("strop.exporting.merge.probe", lambda: type("Machine", (), {"free_bytes": 1 << 20})())
    with pytest.raises(MemoryLimitError, match="measuring takes") as raised:
        export_gguf(str(tuned), tmp_path / "n.gguf", data=rows)
    assert "--no-parity" in raised.value.fix and [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_broken_llama_cpp_is_reported(tuned: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('no shared library')")
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="cannot be imported: no shared library"):
        export_gguf(str(tuned), tmp_path / "m.gguf", data=rows)
    assert not list(tmp_path.glob("*m.gguf*"))


@pytest.mark.parametrize(
    ("tokenizer", "folder", "name"),
    [
        ("phi3", "Phi-4-mini", "phi-3 Phi-4-mini"),
        ("phi3", "my-phi-3-copy", "my-phi-3-copy"),
        ("qwen2", "Phi-4-mini", "Phi-4-mini"),
        ("qwen2", "my-phi-3-copy", "my-phi 3-copy"),
    ],
)
def test_llama_cpp_recognizes_phi_3_by_name_only_with_its_tokens(
    tokenizer: str, folder: str, name: str, tmp_path: Path
) -> None:
    """For a name with phi-3 it looks up </s>, and does not load the file if it is missing."""
    base = gguf_models.save("phi3", tmp_path / folder)
    if tokenizer != "phi3":
        gguf_models.TOKENIZERS[tokenizer]().save_pretrained(base)
    export_gguf(str(base), tmp_path / "m.gguf", kind="f16", measure=False)
    assert fields(tmp_path / "m.gguf")["general.name"] == name
