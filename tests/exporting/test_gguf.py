"""Exported GGUF files: read back by transformers, and by real llama.cpp where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import strop
from strop.data.rendering.render import Renderer
from strop.errors import FolderError, InputError, ModelError, ParityError, RecipeError
from strop.exporting import gguf as module
from strop.exporting import gguf_tokenizer, llama_cpp
from strop.exporting.gguf import export_gguf
from strop.exporting.merge import merge
from strop.exporting.template_strings import STRINGS
from strop.exporting.tuned import Trained, Tuned
from strop.exporting.verify_gguf import check_text
from strop.models.families.gguf import GgufLayout, interleave_heads
from strop.models.families.table import FAMILIES
from strop.models.load import load_config
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from tests.support import gguf_models
from tests.support.tiny import write_rows

needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_installed(), reason=f"no llama.cpp: {llama_cpp.INSTALL}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """base(family) -> its folder; adapter(family) -> a folder with an adapter on it. Each made once."""
    root = tmp_path_factory.mktemp("gguf")
    made: dict[str, Path] = {}

    class Bases:
        def base(self, family: str) -> Path:
            if family not in made:
                made[family] = gguf_models.save(family, root / family)
            return made[family]

        def adapter(self, family: str) -> Path:
            name = f"{family}-tuned"
            if name not in made:
                made[name] = gguf_models.adapt(self.base(family), root / name)
            return made[name]

    return Bases()


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


def tensors(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """By name, as fp32 in torch's order of dimensions."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def fields(file: Path) -> dict[str, Any]:
    return {name: found.contents() for name, found in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("family", sorted(set(gguf_models.OPTIONS) - {"mistral"}))  # a llama there, and known as one
def test_transformers_reads_back_the_tuned_model(
    bases: Any, rows: str, tmp_path: Path, family: str, no_llama_cpp: None
) -> None:
    """Its tensors, under the base's config: of the settings it reads too few (rope scaling, head sizes)."""
    exported = export_gguf(str(bases.adapter(family)), tmp_path / "m.gguf", kind="f32", data=rows)
    assert exported.found is None
    config = load_config(locate(str(bases.base(family))))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    ours = strop.load(bases.adapter(family), dtype="fp32").module
    ids = torch.arange(30, 50)[None]
    with torch.no_grad():
        assert (theirs.eval()(ids).logits - ours(ids).logits).abs().max() < 1e-3


def test_without_llama_cpp_nothing_is_claimed(bases: Any, rows: str, tmp_path: Path, no_llama_cpp: None) -> None:
    told = strop.export("gguf", bases.adapter("qwen2"), tmp_path / "m.gguf", data=rows).as_json()
    assert told["parity"] is None and "not installed" in told["not_measured"]
    assert told["files"] == ["m.gguf"] and told["type"] == "q8_0"
    with pytest.raises(RecipeError, match="own quantizer"):
        export_gguf(str(bases.adapter("qwen2")), tmp_path / "n.gguf", kind="q4_k_m", data=rows)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_types(bases: Any, rows: str, tmp_path: Path, no_llama_cpp: None) -> None:
    found, kinds = {}, {}
    for kind in ("f32", "f16", "bf16", "q8_0"):
        file = tmp_path / f"{kind}.gguf"
        export_gguf(str(bases.adapter("qwen2")), file, kind=kind, data=rows)
        found[kind] = tensors(file)
        kinds[kind] = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
        assert fields(file)["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[kind]
        assert set(kinds[kind].values()) == {"F32", kind.upper()}
        assert all(kinds[kind][name] == "F32" for name in kinds[kind] if "norm" in name or name.endswith("bias"))
    for kind, close in (("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)):
        for name, exact in found["f32"].items():
            assert np.abs(found[kind][name] - exact).max() <= close * np.abs(exact).max(), (kind, name)


def test_rows_of_q_and_k_lie_in_pairs() -> None:
    weight = torch.arange(8.0)[:, None].repeat(1, 3)  # two heads of four rows: halves (0, 1) and (2, 3)
    assert interleave_heads(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_llama_cpp_has_no_place_for_is_refused() -> None:
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
        ("gemma3_text", {"layer_types": ["full_attention"] * 6}, "order of layers"),
        ("llama-2", {"hidden_act": "gelu"}, "activation"),
    ]
    for family, changes, what in refused:
        with pytest.raises(ModelError, match=what):
            layout(family, **changes)
    with pytest.raises(ModelError, match="no exporter for gpt2"):
        GgufLayout(gguf_models.transformers.GPT2Config())


def test_an_unknown_pre_tokenizer_is_refused(bases: Any, rows: str, tmp_path: Path) -> None:
    own = gguf_models.byte_level("chatml", (r"\w+|\W",), own=False)
    state = json.loads(own.backend_tokenizer.to_str())
    with pytest.raises(ModelError, match="no such pre-tokenizer"):
        gguf_tokenizer.pre_tokenizer(state)
    with pytest.raises(ModelError, match="no such pre-tokenizer"):
        gguf_tokenizer.pre_tokenizer({**state, "pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(ModelError, match="no exporter for WordLevel"):
        state["model"]["type"] = "WordLevel"
        renderer = Renderer(load_tokenizer(locate(str(bases.base("qwen2")))))
        backend = renderer.tokenizer.backend_tokenizer

        class Fake:
            backend_tokenizer = type("Backend", (), {"to_str": lambda self: json.dumps(state)})()

        gguf_tokenizer._rebuilt(Fake(), renderer, backend.get_vocab_size())


def test_what_is_refused_before_anything_is_written(bases: Any, rows: str, tmp_path: Path) -> None:
    tuned = str(bases.adapter("qwen2"))
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(FolderError, match="already exists"):
        export_gguf(tuned, tmp_path / "there.gguf", data=rows)
    assert (tmp_path / "there.gguf").read_text() == "mine"
    with pytest.raises(RecipeError, match="no such type"):
        export_gguf(tuned, tmp_path / "m.gguf", kind="q3", data=rows)
    with pytest.raises(RecipeError, match="stored in f32"):
        export_gguf(tuned, tmp_path / "m.gguf", kind="f16", adapter=True, data=rows)
    with pytest.raises(ModelError, match="no rows to measure on"):
        export_gguf(tuned, tmp_path / "m.gguf")
    with pytest.raises(InputError, match="not an adapter"):
        strop.export("ollama", tuned, tmp_path / "m.gguf", adapter=True)
    with pytest.raises(ModelError, match="no adapter there"):
        export_gguf(str(bases.base("qwen2")), tmp_path / "m.gguf", adapter=True, data=rows)
    dora = gguf_models.adapt(bases.base("qwen2"), tmp_path / "dora", use_dora=True)
    with pytest.raises(ModelError, match="no place for"):
        export_gguf(str(dora), tmp_path / "m.gguf", adapter=True, data=rows)
    assert not list(tmp_path.glob("*m.gguf*"))


def test_an_adapter_file(bases: Any, rows: str, tmp_path: Path, no_llama_cpp: None) -> None:
    """A and B multiplied out, and scaled as llama.cpp does, are the difference between base and tuned."""
    odd = gguf_models.adapt(
        bases.base("llama"), tmp_path / "odd", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}
    )
    export_gguf(str(odd), tmp_path / "lora.gguf", adapter=True, data=rows)
    export_gguf(str(odd), tmp_path / "tuned.gguf", kind="f32", data=rows)
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
def test_llama_cpp_makes_the_same_model_of_it(bases: Any, rows: str, tmp_path: Path, family: str) -> None:
    exported = export_gguf(str(bases.adapter(family)), tmp_path / "m.gguf", kind="f16", data=rows)
    found = exported.found
    assert found is not None and found.parity is not None and found.parity.passed
    assert found.parity.kl_mean < 1e-4 and found.parity.positions > 150
    assert (found.strings, found.conversations, found.answers) == (200, 10, 4)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    told = exported.as_json()
    assert told["not_measured"] is None and told["parity"]["passed"] and told["text"]["strings"] == 200
    base = export_gguf(str(bases.base(family)), tmp_path / "base.gguf", kind="f16", data=rows).found
    assert base is not None and base.parity is not None and base.parity.passed


@needs_llama_cpp
@pytest.mark.parametrize("name", sorted(set(gguf_tokenizer.PRE_TOKENIZERS.values())))
def test_each_pre_tokenizer_by_its_name(tmp_path: Path, name: str) -> None:
    """llama.cpp, given the name, cuts two hundred strings as the tokenizer does."""
    key = next(key for key, value in gguf_tokenizer.PRE_TOKENIZERS.items() if value == name)
    tokenizer = gguf_models.byte_level("chatml", *key)
    folder = tmp_path / "base"
    config = gguf_models.config("qwen2", len(tokenizer), hidden_size=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = locate(str(folder))
    renderer = Renderer(load_tokenizer(source))
    words = gguf_tokenizer.vocabulary(source, renderer, len(tokenizer))
    assert words.entries["tokenizer.ggml.pre"][0] == name
    file = write_model(folder, words, tmp_path / "m.gguf")
    with llama_cpp.LlamaCpp(file, vocab_only=True) as llama:
        found = check_text(llama, words, renderer, [])
    assert found.strings + len(found.strings_differ) == len(STRINGS)
    assert not found.strings_differ or name in gguf_tokenizer.APPROXIMATE
    if name == "llama-bpe":  # the check can fail: another name cuts other pieces
        words.entries["tokenizer.ggml.pre"] = ("qwen2", *words.entries["tokenizer.ggml.pre"][1:])
        file = write_model(folder, words, tmp_path / "wrong.gguf")
        with (
            llama_cpp.LlamaCpp(file, vocab_only=True) as llama,
            pytest.raises(ParityError, match="strings are tokenized"),
        ):
            check_text(llama, words, renderer, [])


def write_model(folder: Path, words: gguf_tokenizer.Vocabulary, file: Path) -> Path:
    source = locate(str(folder))
    tuned = Tuned(source, None, Trained("none", True, torch.float32), "original", {}, [])
    with ExitStack() as stack:
        module._Model(tuned, GgufLayout(load_config(source)), words, "m", stack).write(file, "f16")
    return file


FAULTS = ["eos", "permutation", "template", "adapter left out", "norms", "token types"]


@needs_llama_cpp
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_another_model_is_refused(
    bases: Any, rows: str, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, describe = gguf_tokenizer.Vocabulary.write, GgufLayout.convert

    def wrong_words(self: gguf_tokenizer.Vocabulary, writer: Any) -> None:
        changed = dict(self.entries)
        if fault == "eos":
            changed["tokenizer.ggml.eos_token_id"] = (7, gguf.GGUFValueType.UINT32, None)
        elif fault == "template":
            other = self.template.replace("<|start_header_id|>", "<|start_header_id|> ")
            changed["tokenizer.chat_template"] = (other, gguf.GGUFValueType.STRING, None)
        elif fault == "token types":
            kinds = changed["tokenizer.ggml.token_type"]
            changed["tokenizer.ggml.token_type"] = ([1] * len(kinds[0]), *kinds[1:])
        write(gguf_tokenizer.Vocabulary(self.carried, changed, "", self.bos, self.eos, self.eot, self.add_bos), writer)

    def wrong_rows(self: GgufLayout, name: str, weight: torch.Tensor) -> torch.Tensor:
        if fault == "permutation":
            return weight
        arranged = describe(self, name, weight)
        return arranged + 1 if fault == "norms" and name.endswith("norm.weight") else arranged

    monkeypatch.setattr(gguf_tokenizer.Vocabulary, "write", wrong_words)
    monkeypatch.setattr(GgufLayout, "convert", wrong_rows)
    if fault == "adapter left out":
        monkeypatch.setattr(module.Tuned, "merging", lambda self: lambda name, weight: (weight, weight))
    says = {
        "eos": "eos is 7",
        "template": "chat template gives another prompt",
        "token types": "tokenized|does not stop",
    }
    with pytest.raises(ParityError, match=says.get(fault, "mean KL")):
        export_gguf(str(bases.adapter("llama")), tmp_path / "m.gguf", data=rows)
    assert not list(tmp_path.iterdir())


@needs_llama_cpp
def test_q8_0_and_an_adapter_through_llama_cpp(bases: Any, rows: str, tmp_path: Path) -> None:
    exported = export_gguf(str(bases.adapter("llama")), tmp_path / "m.gguf", data=rows)
    assert exported.found is not None and exported.found.parity is not None
    assert exported.found.parity.limit == module.LIMITS["q8_0"]
    lora = export_gguf(str(bases.adapter("llama")), tmp_path / "lora.gguf", adapter=True, data=rows)
    assert lora.found is not None and lora.found.parity is not None and lora.found.parity.kl_mean < 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lora.gguf", "m.gguf"]


@needs_llama_cpp
def test_what_came_from_a_gguf_keeps_its_tokenizer(bases: Any, rows: str, tmp_path: Path) -> None:
    export_gguf(str(bases.base("qwen2")), tmp_path / "base.gguf", kind="f16", data=rows)
    tuned = gguf_models.adapt(tmp_path / "base.gguf", tmp_path / "tuned")
    export_gguf(str(tuned), tmp_path / "m.gguf", kind="f16", data=rows)
    before, after = fields(tmp_path / "base.gguf"), fields(tmp_path / "m.gguf")
    kept = {name for name in before if name.startswith("tokenizer.")}
    assert {"tokenizer.ggml.pre", "tokenizer.ggml.merges", "tokenizer.chat_template"} <= kept
    assert all(before[name] == after[name] for name in kept)
    lora = export_gguf(str(tuned), tmp_path / "lora.gguf", adapter=True, data=rows)
    assert lora.found is not None and lora.found.parity is not None and lora.found.parity.kl_mean < 1e-3


@needs_llama_cpp
def test_an_adapter_on_a_gguf_that_is_not_what_it_was_trained_on(bases: Any, rows: str, tmp_path: Path) -> None:
    """transformers reads a GGUF without its rope scaling: what was trained on is not what llama.cpp makes of it."""
    export_gguf(str(bases.base("smollm")), tmp_path / "base.gguf", kind="f16", data=rows)
    tuned = gguf_models.adapt(tmp_path / "base.gguf", tmp_path / "tuned")
    with pytest.raises(ParityError, match="not the same model"):
        export_gguf(str(tuned), tmp_path / "lora.gguf", adapter=True, data=rows)
    assert not (tmp_path / "lora.gguf").exists()


@needs_llama_cpp
def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    base = gguf_models.save("qwen2", tmp_path / "base")
    tokenizer = load_tokenizer(locate(str(base)))
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"what is {n}, it is {n * n}!"}) + "\n" for n in range(20)))
    found = export_gguf(str(base), tmp_path / "m.gguf", kind="f16", data=str(rows)).found
    assert found is not None and found.strings == 200 and found.conversations == 0
    assert "tokenizer.chat_template" not in fields(tmp_path / "m.gguf")


ORACLE = ["llama", "llama-2", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]


# It knows pre-tokenizers by a hash of a known vocabulary, and wants SentencePiece's own file: both are left out here.
CONVERTER = """
import runpy, sys
folder = sys.argv[1]
sys.path[:0] = [folder, folder + "/gguf-py"]
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
from conversion import base, gemma, llama, phi
base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
for found in (base.TextModel, llama.LlamaModel, gemma.Gemma2Model, gemma.Gemma3Model, phi.Phi3MiniModel):
    found.set_vocab = lambda self: self._set_vocab_gpt2()
runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@pytest.mark.parametrize("family", ORACLE)
def test_llama_cpps_own_converter_writes_the_same(
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
        told = subprocess.run(
            [sys.executable, "-c", CONVERTER, folder, tmp_path / "merged", "--outtype", kind, "--outfile", theirs],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert told.returncode == 0, told.stderr[-800:]
        ours = {t.name: t for t in gguf.GGUFReader(tmp_path / f"ours-{kind}.gguf").tensors}
        for tensor in gguf.GGUFReader(theirs).tensors:
            if tensor.name == "rope_freqs.weight":
                assert np.allclose(ours.pop(tensor.name).data, tensor.data, rtol=1e-6)
                continue
            own = ours.pop(tensor.name)
            assert own.tensor_type == tensor.tensor_type and np.array_equal(own.data, tensor.data), tensor.name
        assert not ours
        same, other = fields(tmp_path / f"ours-{kind}.gguf"), fields(theirs)
        settings = {key for key in other if key.startswith(f"{same['general.architecture']}.")}
        assert all(same[key] == pytest.approx(other[key]) for key in settings), settings
        assert same["general.file_type"] == other["general.file_type"]


def test_two_exports_to_one_file_do_not_mix(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would write the same half-made file, and the first to end would publish it."""
    write, out = module._Model.write, tmp_path / "model.gguf"

    def writing(self: Any, file: Path, kind: str, **more: Any) -> None:
        with pytest.raises(FolderError, match="another process is writing it"):
            export_gguf(str(bases.base("llama")), out, kind="f32", measure=False)
        write(self, file, kind, **more)

    monkeypatch.setattr(module._Model, "write", writing)
    export_gguf(str(bases.base("llama")), out, kind="f16", measure=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
