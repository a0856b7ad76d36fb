"""Listing, comparing and combining adapters, and several adapters on one base."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

import strop
from strop.data.types import Message
from strop.engine.decode.generate import Sampling
from strop.errors import FolderError, InputError, ModelError, RecipeError
from strop.exporting.adapters import combine, compare, compute_norm, read_info
from strop.serve.models import load_models
from tests.support import tiny
from tests.support.runs import run
from tests.support.serving import save_adapters


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train runs runs on one base with different seeds and ranks."""
    folder = tmp_path_factory.mktemp("runs") / "runs"
    rows = tiny.write_rows(folder.parent / "rows.jsonl", 24)
    for name, seed, rank, steps in (("a", 0, 4, 4), ("b", 1, 2, 30)):
        strop.train(
            model=str(tiny_folder), data=str(rows), out=folder / name, seed=seed, lora={"r": rank},
            train={"max_steps": steps, "learning_rate": 2e-2}, **{"model.dtype": "fp32"},
        )  # fmt: skip
    return folder / "a", folder / "b"


def test_adapters_are_listed_and_described(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("adapters", runs[0].parent, "--json", capsys=capsys)
    listed = json.loads(out)["adapters"]
    assert code == 0 and [Path(info["folder"]).parent.name for info in listed] == ["a", "b"] and "adapter" in err
    code, out, _ = run("adapters", runs[0], "--json", capsys=capsys)
    info = json.loads(out)
    report = json.loads((runs[0] / "report.json").read_text())
    text = " ".join(run("adapters", runs[0], capsys=capsys)[1].split())
    assert f"size {info['size_bytes'] / 2**20:.1f} MiB" in text and ", ".join(info["target_modules"]) in text
    assert code == 0 and info["rank"] == 4 and info["data"] == report["lock"]["data"]
    assert info["norm"] == pytest.approx(frobenius(runs[0]), rel=1e-4) and info["norm"] > 0


def test_adapter_that_is_not_supported_does_not_stop_the_list(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_adapter(runs[0], tmp_path / "good", {})
    copy_adapter(runs[0], tmp_path / "other", {"peft_type": "IA3"})
    code, out, err = run("adapters", tmp_path, "--json", capsys=capsys)
    [good, other] = json.loads(out)["adapters"]
    assert (
        code == 0
        and good["rank"] == 4
        and other == {"folder": str(tmp_path / "other"), "problem": "an adapter of type IA3"}
    )
    assert "an adapter of type IA3" in " ".join(err.split())


def delta(name: Path) -> dict[str, torch.Tensor]:
    """Return what peft adds to each module."""
    model = strop.load(name, dtype="fp32").module
    layers = {key: layer for key, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    return {key: layer.get_delta_weight("default").detach() for key, layer in layers.items()}


def frobenius(name: Path) -> float:
    return float(torch.stack([weight.pow(2).sum() for weight in delta(name).values()]).sum().sqrt())


def test_compare_reports_settings_and_cosine(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    result = compare(*map(str, runs))
    a, b = (torch.cat([weight.flatten() for weight in delta(name).values()]) for name in runs)
    assert result["cosine"] == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, 0)), abs=1e-5)
    assert result["same_base"] and result["same_data"] and result["settings"] == {"r": [4, 2], "lora_alpha": [8, 4]}
    assert compare(str(runs[0]), str(runs[0]))["cosine"] == pytest.approx(1.0)
    code, out, err = run("adapters", *runs, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["settings"]["r"] == [4, 2] and "cosine" in err
    assert run("adapters", runs[0], runs[1], runs[0], capsys=capsys)[0] == 2


@pytest.mark.parametrize(
    ("option", "tensor"),
    [
        ({"lora.use_dora": True}, "lora_magnitude_vector"),
        ({"lora.modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"lora.new_tokens": ["<call>"]}, "trainable_tokens_delta"),
        ({"lora.bias": "all"}, "k_proj.bias"),
    ],
)
def test_adapters_beyond_plain_lora_have_no_norm_and_no_cosine(
    runs: tuple[Path, Path], option: dict[str, object], tensor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    tiny.model(attention_bias=True, tie_word_embeddings=False).save_pretrained(base)
    tiny.tokenizer("chatml").save_pretrained(base)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 8)
    options: dict[str, Any] = {"train.max_steps": 1, "model.dtype": "fp32", "lora.target_modules": ["q_proj"], **option}
    folder = strop.train(model=str(base), data=str(rows), out=tmp_path / "run", **options).folder
    result = compare(str(runs[0]), str(folder))
    assert result["norms"] == [compute_norm(str(runs[0])), None] and result["cosine"] is None and not result["modules"]
    assert result["not_measured"].endswith(tensor)
    code, out, err = run("adapters", folder, "--json", capsys=capsys)
    info = json.loads(out)
    assert code == 0 and info["norm"] is None and info["not_measured"].endswith(tensor) and "plain LoRA" in err


def test_weighted_sum_adds_the_changes(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run("adapters", *runs, "--out", tmp_path / "sum", "--weights", "0.7,0.3", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["rank"] == 6
    a, b, mixed = delta(runs[0]), delta(runs[1]), delta(tmp_path / "sum")
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, 0.7 * a[name] + 0.3 * b[name], rtol=1e-4, atol=1e-6)
    combine([str(runs[0])], [0.5], tmp_path / "half")
    for name, weight in delta(tmp_path / "half").items():
        torch.testing.assert_close(weight, 0.5 * a[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(RecipeError, match="2 adapters, 1 weights"):
        combine(list(map(str, runs)), [1.0], tmp_path / "other")
    with pytest.raises(FolderError):
        combine(list(map(str, runs)), [1.0, 1.0], tmp_path / "sum")
    assert run("adapters", *runs, "--out", tmp_path / "x", "--weights", "much", capsys=capsys)[0] == 2
    with pytest.raises(RecipeError, match="not all are finite"):
        combine(list(map(str, runs)), [float("nan"), 1.0], tmp_path / "other")
    assert compute_norm(str(tmp_path / "sum")) > 0 and read_info(str(tmp_path / "sum"))["data"] is None


def test_sum_of_adapters_with_different_prompts_has_a_note(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run("adapters", *runs, "--out", tmp_path / "sum", "--weights", "1,1", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["notes"] == []
    shutil.copytree(runs[1] / "adapter", tmp_path / "other")
    file = tmp_path / "other" / "strop.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "template": "0" * 64, "system": "Be brief."}))
    command = ("adapters", runs[0], tmp_path / "other", "--out", tmp_path / "mixed", "--weights", "1,1", "--json")
    code, out, err = run(*command, capsys=capsys)
    notes = " ".join(json.loads(out)["notes"])
    assert code == 0 and "another chat template" in notes and "another system prompt" in notes
    assert "another chat template" in " ".join(err.split())


@pytest.mark.parametrize(
    "setting", [{"trainable_token_indices": {"embed_tokens": [7]}}, {"use_dora": True}, {"bias": "all"}]
)
def test_adapters_without_a_sum_are_refused_before_weights_load(
    runs: tuple[Path, Path], setting: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strop.exporting.adapters.load_base", lambda *args, **options: pytest.fail("weights loaded"))
    adapter = copy_adapter(runs[1], tmp_path / "other", setting)
    with pytest.raises(ModelError, match="have no weighted sum"):
        combine([str(runs[0]), str(adapter)], [0.5, 0.5], tmp_path / "sum")


def test_compare_reports_another_alpha_pattern(runs: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = copy_adapter(runs[0], tmp_path / "other", {"alpha_pattern": {"q_proj": 5}})
    assert compare(str(runs[0]), str(adapter))["settings"] == {"alpha_pattern": [{}, {"q_proj": 5}]}


def copy_adapter(run: Path, out: Path, setting: dict[str, object]) -> Path:
    """Copy a run's adapter with another setting."""
    shutil.copytree(run / "adapter", out)
    config = out / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **setting}))
    return out


def test_adapters_on_one_base_answer_as_if_alone(runs: tuple[Path, Path], tmp_path: Path) -> None:
    model = strop.load(runs[0], dtype="fp32")
    alone = {name: strop.load(name, dtype="fp32").generate(["what is 7"], max_new_tokens=6) for name in runs}
    model.add(str(runs[1]))
    for name in (runs[1], runs[0], runs[1]):
        model.use(str(name))
        assert model.generate(["what is 7"], max_new_tokens=6) == alone[name]
    adapter = copy_adapter(runs[1], tmp_path / "other", {})
    identity = json.loads((adapter / "strop.json").read_text())
    (adapter / "strop.json").write_text(json.dumps({**identity, "template": "another"}))
    with pytest.raises(ModelError, match="another chat template"):
        model.add(str(adapter))
    with pytest.raises(ModelError, match="not an adapter"):
        model.add(str(tmp_path))
    for folder in runs:
        with pytest.raises(ModelError, match="is already loaded"):
            model.add(str(folder))


def test_adapters_of_another_tool_on_different_bases_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    other = tiny.save_tiny(tmp_path / "base")
    tiny.model(seed=5).save_pretrained(other)
    [first, second], [foreign, _] = save_adapters(tmp_path, tiny_folder), save_adapters(tmp_path / "there", other)
    for folder in (first, second, foreign):
        (folder / "strop.json").unlink()
    model = strop.load(first, dtype="fp32")
    model.add(str(second))
    with pytest.raises(ModelError, match="another base"):
        model.add(str(foreign))
    with pytest.raises(ModelError, match="another base"):
        load_models([str(second), str(foreign)], device="cpu", dtype="fp32", quantization="auto", force=False)
    with pytest.raises(ModelError, match="another base"):
        combine([str(first), str(foreign)], [0.5, 0.5], tmp_path / "sum")


def test_chat_switches_adapters(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["what is 7", "/reset", f"/adapter {runs[1]}", "what is 7", "/adapter nobody", "/adapter"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    code, out, err = run("chat", runs[0], "--adapter", runs[1], "--max-new-tokens", "6", capsys=capsys)
    first, second = out.splitlines()[0], out.splitlines()[-1]
    assert code == 0 and first != second and "/adapter nobody: not loaded" in err and f"{runs[0]}\n{runs[1]}" in err


def test_chat_samples_with_the_models_generation_config(
    runs: tuple[Path, Path], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20).save_pretrained(model)
    for scheme in ("none", "nf4"):  # loaded by different code
        assert strop.load(model, quantization=scheme).sampling == Sampling(0.6, 0.9, 20)
    assert strop.load(runs[0]).sampling == Sampling()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    _, _, err = run("chat", model, "--max-new-tokens", "2", "--top-k", "0", capsys=capsys)
    assert "answers: temperature 0.6, top_p 0.9" in err and "top_k" not in err
    assert Sampling.from_generation_config(GenerationConfig(do_sample=True)) == Sampling(1.0, 1.0, 50)
    assert (
        "repetition penalty 1.2" in Sampling.from_generation_config(GenerationConfig(repetition_penalty=1.2)).describe()
    )


def test_weighted_sum_of_rslora_adapters_adds_the_changes(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        strop.train(
            model=str(tiny_folder), data=str(rows_file), out=tmp_path / name, lora={"r": 4, "use_rslora": True},
            train={"max_steps": 3, "learning_rate": 1e-2}, **{"model.dtype": "fp32"},
        )  # fmt: skip
    parts = [delta(tmp_path / name) for name in ("a", "b")]
    combine([str(tmp_path / "a"), str(tmp_path / "b")], [1.0, 0.5], tmp_path / "sum")
    for name, weight in delta(tmp_path / "sum").items():
        torch.testing.assert_close(weight, parts[0][name] + 0.5 * parts[1][name], rtol=1e-4, atol=1e-6)


def test_part_of_one_adapter_keeps_the_rank_of_each_module(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    ranks, alphas = {"q_proj": 2, "layers.1.mlp.down_proj": 8}, {"k_proj": 32}
    strop.train(
        model=str(tiny_folder), data=str(rows_file), out=tmp_path / "run",
        lora={"r": 4, "rank_pattern": ranks, "alpha_pattern": alphas}, train={"max_steps": 3, "learning_rate": 1e-2},
        **{"model.dtype": "fp32"},
    )  # fmt: skip
    assert combine([str(tmp_path / "run")], [-0.5], tmp_path / "half")["rank"] == 4
    whole, half = (delta(tmp_path / name) for name in ("run", "half"))
    for name, weight in half.items():
        torch.testing.assert_close(weight, -0.5 * whole[name], rtol=1e-4, atol=1e-6)
    sizes = {
        name: len(x)
        for name, x in load_file(tmp_path / "half" / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert sorted(set(sizes.values())) == [2, 4, 8]
    assert strop.load(str(tmp_path / "half")).generate("what is 3", max_new_tokens=2)


def test_adapters_of_models_with_different_sizes_have_no_cosine(runs: tuple[Path, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.model(hidden_size=48, num_attention_heads=4).save_pretrained(base)
    tiny.tokenizer("chatml").save_pretrained(base)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 8)
    strop.train(model=str(base), data=str(rows), out=tmp_path / "c", train={"max_steps": 1}, **{"model.dtype": "fp32"})
    result = compare(str(runs[0]), str(tmp_path / "c"))
    assert result["same_base"] is False and result["cosine"] is None


def test_cosine_of_adapters_on_other_modules_counts_them_as_unchanged(
    tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    options = {"train.max_steps": 3, "model.dtype": "fp32", "train.learning_rate": 0.02}
    targets = {"a": ["q_proj", "v_proj"], "b": ["v_proj", "up_proj"]}
    for name, modules in targets.items():
        strop.train(
            model=str(tiny_folder),
            data=str(rows_file),
            out=tmp_path / name,
            **{"lora.target_modules": modules},
            **options,
        )
    a, b = (delta(tmp_path / name) for name in targets)
    inner = sum(float((a[name] * b[name]).sum()) for name in a.keys() & b.keys())
    expected = inner / (frobenius(tmp_path / "a") * frobenius(tmp_path / "b"))
    result = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert result["cosine"] == pytest.approx(expected, abs=1e-5) and list(result["modules"]) == ["v_proj"]


def test_added_adapters_read_and_write_their_own_new_tokens(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, folders = {}, [str(tmp_path / name) for name in ("plain", "tool", "zap")]
    for folder, tokens in zip(folders, ([], ["<tool>"], ["<zap>"]), strict=True):
        rows = tmp_path / f"{Path(folder).name}.jsonl"
        row = {"prompt": "red sky", "completion": f"{'ok ' if not tokens else tokens[0]} ok"}
        rows.write_text(f"{json.dumps(row)}\n" * 8, encoding="utf-8")
        strop.train(
            model=str(tiny_folder), data=str(rows), out=folder, lora={"r": 4, "new_tokens": tokens},
            train={"max_steps": 12, "learning_rate": 2e-2, "batch_size": 8}, **{"model.dtype": "fp32"},
        )  # fmt: skip
        answers[folder] = strop.load(folder, dtype="fp32", device="cpu").generate("red sky", max_new_tokens=3)
    plain, tool, zap = folders
    assert "<tool>" in answers[tool][0] and "<zap>" in answers[zap][0]
    for first, second in ((tool, zap), (zap, tool)):
        model = strop.load(first, dtype="fp32", device="cpu")
        model.add(second)
        model.use(second)
        assert model.generate("red sky", max_new_tokens=3) == answers[second]
        assert len(model.renderer.prompt([Message("user", "<zap>")])) == len(
            strop.load(second, dtype="fp32").renderer.prompt([Message("user", "<zap>")])
        )
        model.use(first)
        assert model.generate("red sky", max_new_tokens=3) == answers[first]
    with pytest.raises(ModelError, match="has more tokens than the model"):
        strop.load(plain, dtype="fp32", device="cpu").add(zap)
    bare = strop.load(tiny_folder)
    with pytest.raises(ModelError, match="was loaded without an adapter"):
        bare.add(plain)
    with pytest.raises(InputError, match="is its own base"), bare.base():
        pass
