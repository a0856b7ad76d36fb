"""Merging: the merged folder computes the tuned model, and wrong merges are refused."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import strop
from strop.data.types import Example
from strop.errors import DataError, FolderError, MemoryLimitError, ModelError, ParityError, RecipeError, Stopped
from strop.exporting import merge as module
from strop.exporting.merge import TunedModel, merge
from strop.exporting.parity import compute_in_fp32, select_rows
from strop.machine.probe import probe
from tests.support import preferences, tiny, tiny_families
from tests.support.runs import run as run_command


@pytest.fixture
def trained(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Path]:
    def train(**options: Any) -> Path:
        defaults = {"train.max_steps": 8, "lora.r": 4, "model.dtype": "fp32", "train.learning_rate": 0.01}
        data, out = str(rows_file), tmp_path / "run"
        return strop.train(model=str(tiny_folder), data=data, out=out, **{**defaults, **options}).folder

    return train


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora and patterns": {
        "lora.use_rslora": True,
        "lora.rank_pattern": {"q_proj": 2},
        "lora.alpha_pattern": {"v_proj": 9},
    },
    "dora": {"lora.use_dora": True},
    "bias": {"lora.bias": "lora_only"},
    "attention": {"lora.target_modules": "attention"},
    "new tokens": {"lora.new_tokens": ["<call>", "<done>"]},
    "nf4": {"model.quantization": "nf4"},
    "int8": {"model.quantization": "int8"},
    "nf4, plain constants": {"model.quantization": "nf4", "model.double_quantization": False},
    "nf4 in bf16": {"model.quantization": "nf4", "model.dtype": "bf16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_merge_equals_the_tuned_model(trained: Callable[..., Path], tmp_path: Path, variant: str) -> None:
    run = trained(**VARIANTS[variant])
    merged = merge(str(run), tmp_path / "merged", dtype="fp32")
    assert merged.parity.passed and merged.parity.kl_mean < 1e-6 and merged.parity.top1_agreement == 1
    assert merged.parity.positions > 200 and abs(merged.parity.loss_difference) < 1e-4
    if variant == "nf4 in bf16":  # in fp32 its base would not be rounded as in training
        return
    quantized = "quantization" in str(VARIANTS[variant])
    assert set(merged.base_losses) == ({"original", "dequantized"} if quantized else set())
    ids = torch.arange(5, 25)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    scheme = VARIANTS[variant].get("model.quantization", "none") if merged.base == "dequantized" else "none"
    ours = strop.load(run, dtype="fp32", quantization="none" if scheme == "none" else "auto")
    with torch.no_grad():
        assert (theirs(ids).logits - ours.module(ids).logits).abs().max() < 1e-4
        if variant == "bias":  # peft cannot disable trained biases
            return
        with ours.base():
            assert (theirs(ids).logits - ours.module(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox", "gpt2"])
@pytest.mark.parametrize(
    "bias_options",
    [
        {"lora.bias": "all"}, {"lora.bias": "lora_only", "lora.use_dora": True},
        {"lora.bias": "all", "lora.modules_to_save": "the last norm"},  # whose bias PEFT saves three times
    ],
)  # fmt: skip
def test_trained_biases_of_adapted_layers_are_merged(
    kind: str, bias_options: dict[str, Any], rows_file: Path, tmp_path: Path
) -> None:
    """Merges without measuring, so that only the weights are compared."""
    tiny_families.save(kind, tmp_path / "base")
    options: dict[str, Any] = {"train.max_steps": 4, "lora.r": 2, "model.dtype": "fp32", "train.learning_rate": 0.03}
    options |= bias_options
    if "lora.modules_to_save" in options:
        options["lora.modules_to_save"] = [{"qwen2": "norm", "gpt_neox": "final_layer_norm", "gpt2": "ln_f"}[kind]]
    run = strop.train(model=str(tmp_path / "base"), data=str(rows_file), out=tmp_path / "run", **options).folder
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("base_layer.bias") and weight.abs().max() > 0.01 for name, weight in saved.items())
    merge(str(run), tmp_path / "merged", dtype="fp32", measure=False)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        assert (theirs - strop.load(run, dtype="fp32").module(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "stray", ["layers.0.self_attn.q_proj.lora_B.bias", "layers.9.mlp.up_proj.lora_A.weight", "layers.0.mlp.gate.bias"]
)
def test_tensors_without_a_place_in_the_base_are_refused(
    trained: Callable[..., Path], tmp_path: Path, stray: str
) -> None:
    adapter = trained() / "adapter"
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.model.{stray}": torch.ones(4)}, file, {"format": "pt"})
    (adapter / "strop.json").unlink()
    with pytest.raises(ModelError, match=f"model.{stray} cannot be merged"):
        merge(str(adapter), tmp_path / "merged", measure=False)
    assert not list(tmp_path.glob("merged*"))


def _edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _edit_tensors(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    file = folder / "adapter_model.safetensors"
    changed = {name: change(name, weight) for name, weight in load_file(file).items()}
    save_file({name: weight for name, weight in changed.items() if weight is not None}, file, {"format": "pt"})


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "another rank": (lambda folder: _edit_config(folder, r=8), "does not fit"),
    "a rank pattern": (lambda folder: _edit_config(folder, rank_pattern={"q_proj": 2}), "does not fit"),
    "more targets": (
        lambda folder: _edit_config(folder, target_modules=["q_proj", "k_proj"]),
        "4 of its tensors are missing",
    ),
    "half of its layers": (
        lambda folder: _edit_tensors(folder, lambda n, w: w if ".0." in n else None),
        "2 of its tensors are mis",
    ),
    "A without B": (
        lambda folder: _edit_tensors(folder, lambda n, w: w if "lora_A" in n else None),
        "2 of its tensors are m",
    ),
    "nothing": (lambda folder: _edit_tensors(folder, lambda n, w: None), "4 of its tensors are missing"),
    "missing rows": (lambda folder: _edit_config(folder, trainable_token_indices=[3]), "embedding rows|does not fit"),
    "integers": (lambda folder: _edit_tensors(folder, lambda n, w: (w * 99).int()), "stored as I32"),
    "8 bit": (lambda folder: _edit_tensors(folder, lambda n, w: w.to(torch.float8_e5m2)), "stored as F8_E5M2"),
    "beyond fp32": (lambda folder: _edit_tensors(folder, lambda n, w: w.double() * 1e200), "NaN or infinity"),
    "alpha NaN": (lambda folder: _edit_config(folder, lora_alpha=float("nan")), "lora_alpha is nan"),
    "rank 0": (lambda folder: _edit_config(folder, r=0), "r is 0"),
    "text in a pattern": (
        lambda folder: _edit_config(folder, alpha_pattern={"q_proj": "x"}),
        "alpha_pattern q_proj is 'x'",
    ),
    "no targets": (lambda folder: _edit_config(folder, target_modules=[]), "does not fit"),
    "targets as a number": (lambda folder: _edit_config(folder, target_modules=3), "target_modules is 3"),
    "options of Megatron": (
        lambda folder: _edit_config(folder, megatron_config={"a": 1}, megatron_core="nowhere"),
        "does not fit",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_adapter_that_differs_from_its_config_is_refused(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    damage, error = UNFIT[kind]
    folder = tmp_path / "adapter"
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config).save_pretrained(folder)
    damage(folder)
    with pytest.raises(ModelError, match=error):
        merge(str(folder), tmp_path / "merged", measure=False)
    with pytest.raises(ModelError, match=error):
        strop.load(folder, device="cpu", dtype="fp32")
    assert not list(tmp_path.glob("merged*"))


def test_pissa_adapter_is_refused(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """peft subtracts the initial PiSSA weights from the base, so on the stored base the adapter is another model."""
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "pissa")
    for use in (
        lambda name: merge(name, tmp_path / "merged", measure=False),
        lambda name: strop.export("gguf", name, tmp_path / "m.gguf", measure=False),
        strop.load,
    ):
        with pytest.raises(ModelError, match="init_lora_weights pissa"):
            use(str(tmp_path / "pissa"))
    assert not (tmp_path / "merged").exists()
    assert strop.load(tmp_path / "pissa", force=True).notes


def test_adapter_on_a_vision_tower_is_merged(tmp_path: Path) -> None:
    """strop does not train vision towers, but other tools do."""
    tiny_families.save("gemma3", tmp_path / "base", multimodal=True)
    base: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    before = {name: weight.clone() for name, weight in base.named_parameters() if "vision_tower" in name}
    config = peft.LoraConfig(r=2, target_modules=".*vision_tower.*q_proj", init_lora_weights=False, bias="lora_only")
    tuned: Any = peft.get_peft_model(base, config)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    expected = dict(tuned.merge_and_unload().named_parameters())
    merge(str(tmp_path / "adapter"), tmp_path / "merged", dtype="fp32", measure=False)
    merged: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    after = dict(merged.named_parameters())
    assert {name for name in before if not torch.equal(after[name], before[name])} == {
        name for name in before if name.endswith("q_proj.weight")
    }
    for name in before:
        torch.testing.assert_close(after[name], expected[name])


def test_new_tokens_of_an_untied_head_are_deterministic(rows_file: Path, tmp_path: Path) -> None:
    """transformers initializes new rows at random."""
    base = tmp_path / "base"
    tiny.model(tie_word_embeddings=False).save_pretrained(base)
    tiny.tokenizer("chatml").save_pretrained(base)
    options: dict[str, Any] = {"train.max_steps": 4, "model.dtype": "fp32", "train.learning_rate": 0.01}
    run = strop.train(
        model=str(base), data=str(rows_file), out=tmp_path / "run", **{"lora.new_tokens": ["<call>"]}, **options
    ).folder
    continued = strop.train(
        model={"name": str(base), "adapter": str(run)}, data=str(rows_file), out=tmp_path / "continued", **options
    )
    for trained in (run, continued.folder):
        ours = strop.load(trained, dtype="fp32")
        ids = torch.tensor([[5, 6, ours.tokenizer.convert_tokens_to_ids("<call>"), 7]])
        merge(str(trained), tmp_path / f"merged-{trained.name}", dtype="fp32")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{trained.name}")
        with torch.no_grad():
            logits, again = ours.module(ids).logits, strop.load(trained, dtype="fp32").module(ids).logits
            assert torch.equal(logits, again) and (theirs(ids).logits - logits).abs().max() < 1e-4
        assert theirs.config.vocab_size == logits.shape[-1] == len(ours.tokenizer)
    rows = {
        name: weight
        for name, weight in load_file(run / "adapter" / "adapter_model.safetensors").items()
        if "token" in name
    }
    assert sorted(name.split(".")[-3] for name in rows) == ["embed_tokens", "lm_head"]


def test_rows_with_bad_labels_are_not_measured_on(tiny_folder: Path, tmp_path: Path) -> None:
    rows = preferences.write_labelled(tmp_path / "judged.jsonl", 12)
    lines = rows.read_text().splitlines()
    good = [number for number, line in enumerate(lines, 1) if json.loads(line)["label"]]
    assert 0 < len(good) < len(lines)
    options: dict[str, Any] = {"train.max_steps": 1, "model.dtype": "fp32", "train.objective": "kto"}
    run = strop.train(model=str(tiny_folder), data=str(rows), out=tmp_path / "run", **options).folder
    assert sorted(example.line for example in TunedModel.open(str(run)).load_rows(None).examples) == good


def test_merged_folder_has_config_and_tokenizer(
    trained: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, out = trained(), tmp_path / "merged"
    caplog.clear()
    with caplog.at_level("INFO", "strop"):
        merged = merge(str(run), out)
    messages = [record.getMessage() for record in caplog.records]
    steps = [text.split()[0] for text in messages]
    assert steps[-1] == "measuring" and steps.count("loading") == 2
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= names and sorted(names) == merged.files
    assert not {"strop.json", "adapter_config.json", "merge.json"} & names
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (run / "adapter", out))
    turns = [{"role": "user", "content": "what is 3"}]
    assert before.apply_chat_template(turns, tokenize=False) == after.apply_chat_template(turns, tokenize=False)
    assert {t.dtype for file in out.glob("*.safetensors") for t in load_file(file).values()} == {torch.bfloat16}


def test_generation_config_has_the_end_tokens_of_a_custom_template(
    trained: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<done>{% endfor %}"
    (tmp_path / "custom.jinja").write_text(turns + "{% if add_generation_prompt %}[assistant]{% endif %}")
    run = trained(**{"data.template": str(tmp_path / "custom.jinja"), "lora.new_tokens": ["<done>"]})
    merge(str(run), tmp_path / "merged", measure=False)
    done = AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<done>")
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).generation_config for folder in (tiny_folder, tmp_path / "merged")
    )
    assert {done, before.eos_token_id} <= set(after.eos_token_id)


@pytest.mark.parametrize(("dtype", "small"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_rounding_keeps_the_mean_of_a_small_change_and_is_deterministic(dtype: torch.dtype, small: float) -> None:
    base = torch.randn(200, 200).bfloat16().float()
    change = small * base.abs()
    first, again = (module.round_weight("x", base + change, base, dtype).float() for _ in range(2))
    assert torch.equal(first, again)
    assert (first - base).mean() == pytest.approx(change.mean().item(), rel=0.1)
    nearest = (base + change).to(dtype).float()
    assert (nearest - base).mean() < 0.2 * change.mean()
    assert torch.equal(module.round_weight("x", base, base, dtype).float(), base)


def test_fp16_rounding_moves_values_by_less_than_a_step() -> None:
    whole = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    whole = whole[whole.isfinite()]
    assert torch.equal(module.round_weight("x", whole, whole + 1, torch.float16).float(), whole)
    between = torch.cat([8 * torch.randn(5000), 6e-5 * torch.randn(5000), 3e-8 * torch.randn(5000)])
    rounded = module.round_weight("x", between, between + 1, torch.float16).float()
    step = 2.0 ** (between.double().abs().log2().floor().clamp(min=-14) - 10)
    assert ((rounded - between).abs() < step).all() and (rounded != between.half()).any()
    assert not module.round_weight("x", torch.tensor([1e6]), torch.zeros(1), torch.float16).isfinite().any()


def test_changed_adapter_is_refused(trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained()
    _edit_tensors(run / "adapter", lambda name, weight: weight * (1.5 if "lora_B" in name else 1))
    with pytest.raises(ModelError, match="not the file that was saved"):
        merge(str(run), tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("fault", ["scale", "zero", "noise"])
def test_wrong_merge_is_refused(
    trained: Callable[..., Path], tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, load_merger = trained(), module.load_merger

    def load_wrong_merger(*args: Any) -> Callable[[str, torch.Tensor], torch.Tensor]:
        merge_tensor = load_merger(*args)

        def merge_wrong(name: str, weight: torch.Tensor) -> torch.Tensor:
            merged = merge_tensor(name, weight)
            if merged is weight or fault == "zero":
                return weight
            if fault == "scale":
                return weight + 1.5 * (merged - weight)
            return merged + 0.05 * weight.std() * torch.randn_like(merged)

        return merge_wrong

    monkeypatch.setattr(module, "load_merger", load_wrong_merger)
    with pytest.raises(ParityError, match="mean KL"):
        merge(str(run), tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_measurement_shows_what_is_measured_and_how_far(
    trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = trained()
    caplog.set_level(logging.INFO, "strop")
    code, _, err = run_command("merge", folder, "--out", tmp_path / "merged", capsys=capsys)
    assert code == 0 and "(--no-parity skips it)" in err
    for name in ("the tuned model", "the base", "the result"):
        shown = [message for message in caplog.messages if message.startswith(f"measuring {name}: ")]
        assert shown == [f"measuring {name}: {number} of {len(shown)} rows" for number in range(len(shown))]
        assert len(shown) > 1
    code, _, err = run_command("merge", folder, "--out", tmp_path / "again", "--no-parity", capsys=capsys)
    assert code == 0 and "measuring" not in err


def test_interrupted_merge_resumes(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained()
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    whole = merge(str(run), tmp_path / "whole")
    shards = [name for name in whole.files if name.startswith("model-")]
    assert len(shards) > 2
    written: list[str] = []

    def save(tensors: Any, file: Path, metadata: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        save_file(tensors, file, metadata)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(Stopped, match="the same command continues from") as error,
    ):
        patch.setattr(module, "save_file", save)
        merge(str(run), tmp_path / "cut")
    assert not (tmp_path / "cut").exists() and (tmp_path / "cut.partial").is_dir()
    assert str(tmp_path / "cut.partial") in error.value.fix
    again: list[str] = []
    monkeypatch.setattr(module, "save_file", lambda t, file, m: (again.append(file.name), save_file(t, file, m)))
    merge(str(run), tmp_path / "cut")
    assert not set(again) & set(written) and set(again) | set(written) == set(shards)
    for name in shards:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_second_merge_into_the_same_folder_is_refused(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, synced = trained(), tmp_path / "merged", set[str]()
    fsync = os.fsync

    def merge_again(tensors: Any, file: Path, metadata: Any) -> None:
        with pytest.raises(FolderError, match="another process is writing it"):
            merge(str(run), out, dtype="fp32", measure=False)
        save_file(tensors, file, metadata)

    def record_sync(handle: int) -> None:
        if sys.platform == "linux":
            synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(module, "save_file", merge_again)
    monkeypatch.setattr(os, "fsync", record_sync)
    merged = merge(str(run), out, measure=False)
    assert synced >= set(merged.files) or sys.platform != "linux"  # complete after a power failure
    assert not list(tmp_path.glob(".merged*"))


def test_invalid_merges_are_refused_before_writing(
    trained: Callable[..., Path], tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = trained()
    (tmp_path / "there").mkdir()
    with pytest.raises(FolderError, match="already exists"):
        merge(str(run), tmp_path / "there")
    with pytest.raises(RecipeError, match="no such type"):
        merge(str(run), tmp_path / "m", dtype="int4")
    with pytest.raises(ModelError, match="no adapter there"):
        merge(str(tiny_folder), tmp_path / "m")
    with pytest.raises(ModelError, match="no rows to measure on"):
        merge(str(run / "adapter"), tmp_path / "m")
    assert merge(str(run / "adapter"), tmp_path / "m", data=str(rows_file)).parity.passed
    other = tmp_path / "other"
    tiny.model(seed=5).save_pretrained(other)
    tiny.tokenizer("chatml").save_pretrained(other)
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(other)}))
    with pytest.raises(ModelError, match="on which it was trained"):
        merge(str(run), tmp_path / "n")


def test_too_little_memory_is_reported_before_merging(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(**{"model.quantization": "nf4"})
    monkeypatch.setattr(module, "probe", lambda: replace(probe(), free_bytes=1 << 20))
    with pytest.raises(MemoryLimitError, match="measuring takes") as raised:
        strop.merge(run, tmp_path / "merged")
    assert "measure=False" in raised.value.fix and not list(tmp_path.glob("merged*"))
    merged = strop.merge(run, tmp_path / "merged", dtype="fp32", measure=False)
    assert str(merged).splitlines()[-2:] == ["parity   not measured", f"merged   {merged.out}"]
    assert repr(merged) == f"Merged({str(merged.out)!r}, dtype='fp32')" and "not measured" in merged._repr_html_()
    assert merged.parity is None and merged.as_json()["parity"] is None and merged.base == "dequantized"
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        assert (theirs - strop.load(run, dtype="fp32").module(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_fp32_compute_on_bf16_weights_equals_an_fp32_model(tied: bool) -> None:
    whole = tiny.model(tie_word_embeddings=tied).bfloat16().float()
    narrow = compute_in_fp32(tiny.model(tie_word_embeddings=tied).bfloat16())
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(narrow(ids).logits, whole(ids).logits, rtol=0, atol=0)
    assert narrow.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_shared_prefixes_count_once() -> None:
    def row(*ids: int) -> Example:
        return Example(np.array(ids, np.int32), np.ones(len(ids), np.float32), "f", 1)

    rows = [row(1, 2, 3, 4), row(1, 2, 5), row(1, 2, 3, 4), row(9, 2, 3)]
    assert select_rows(rows) == (rows, [0, 2, 3, 0])


def test_missing_rows_are_named_with_a_fix(trained: Callable[..., Path], rows_file: Path, tmp_path: Path) -> None:
    run = trained()
    rows_file.rename(rows_file.with_name("elsewhere.jsonl"))
    with pytest.raises(DataError, match="no such file") as error:
        merge(str(run), tmp_path / "merged", dtype="fp32")
    assert "give data" in str(error.value) and not (tmp_path / "merged").exists()
    with pytest.raises(DataError) as error:
        merge(str(run), tmp_path / "merged", dtype="fp32", data=str(rows_file))
    assert "the run's rows" not in str(error.value)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    with pytest.raises(DataError) as error:
        merge(str(run), tmp_path / "merged", dtype="fp32", data=str(pairs))
    assert "give rows with answers, such as" in str(error.value) and "objective" not in str(error.value.fix)


@pytest.fixture
def run_on_bf16(rows_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train on a base that is stored in bf16, with an untied head."""
    base = tmp_path / "base"
    tiny.model(tie_word_embeddings=False).bfloat16().save_pretrained(base)
    tiny.tokenizer("chatml").save_pretrained(base)

    def train(name: str, adapter: Path | None = None, **options: Any) -> Path:
        defaults = {"train.max_steps": 4, "lora.r": 4, "model.dtype": "bf16", "train.learning_rate": 0.02}
        model = {"name": str(base), **({"adapter": str(adapter)} if adapter else {})}
        options = {**defaults, **options}
        return strop.train(model=model, data=str(rows_file), out=tmp_path / name, **options).folder

    return train


TRAINED_IN_FULL: dict[str, dict[str, Any]] = {
    "new tokens": {"lora.new_tokens": ["<call>"]},
    "head": {"lora.modules_to_save": ["lm_head"]},
    "norms": {"lora.modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("kind", TRAINED_IN_FULL)
def test_weights_trained_in_fp32_are_not_rounded_to_the_bases_dtype(
    run_on_bf16: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    run = run_on_bf16("run", **TRAINED_IN_FULL[kind])
    parity = merge(str(run), tmp_path / "merged", dtype="fp32").parity
    assert parity is not None and parity.kl_mean < 2e-7
    continued = run_on_bf16("continued", run, **{"train.max_steps": 1, "train.learning_rate": 1e-12})
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, continued))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9, msg=name)


def test_adapters_that_cannot_share_a_base_say_so(run_on_bf16: Callable[..., Path]) -> None:
    model = strop.load(run_on_bf16("full", **{"lora.modules_to_save": ["lm_head"]}))
    with pytest.raises(ModelError, match="cannot load it on a base with another adapter") as raised:
        model.add(str(run_on_bf16("lora", **{"lora.target_modules": ["q_proj", "lm_head"]})))
    assert raised.value.fix == "load each by itself"
