"""Adapters on disk: listed, shown, compared, added up, several on one base."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import strop
from strop.engine.decode.generate import Sampling
from strop.errors import FolderError, ModelError, RecipeError
from strop.export.adapters import combine, compare, facts, norm
from strop.serve.models import load_models
from tests.support import tiny
from tests.support.runs import run
from tests.support.serving import save_adapters


@pytest.fixture(scope="module")
def two(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on one base: other seeds and ranks."""
    folder = tmp_path_factory.mktemp("two") / "runs"
    rows = tiny.write_rows(folder.parent / "rows.jsonl", 24)
    for name, seed, rank, steps in (("a", 0, 4, 4), ("b", 1, 2, 30)):
        strop.train(
            model=str(tiny_folder), data=str(rows), out=folder / name, seed=seed, lora={"r": rank},
            train={"max_steps": steps, "learning_rate": 2e-2}, **{"model.dtype": "fp32"},
        )  # fmt: skip
    return folder / "a", folder / "b"


def test_list_and_show(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("adapters", two[0].parent, "--json", capsys=capsys)
    found = json.loads(out)["adapters"]
    assert code == 0 and [Path(one["folder"]).parent.name for one in found] == ["a", "b"] and "adapter" in err
    code, out, _ = run("adapters", two[0], "--json", capsys=capsys)
    shown = json.loads(out)
    report = json.loads((two[0] / "report.json").read_text())
    said = " ".join(run("adapters", two[0], capsys=capsys)[2].split())
    assert f"size {shown['size_bytes'] / 1e6:.1f} MB" in said and ", ".join(shown["target_modules"]) in said
    assert code == 0 and shown["rank"] == 4 and shown["data"] == report["lock"]["data"]
    assert shown["norm"] == pytest.approx(frobenius(two[0]), rel=1e-4) and shown["norm"] > 0


def delta(name: Path) -> dict[str, torch.Tensor]:
    """What peft says an adapter adds, module by module."""
    model = strop.load(name, dtype="fp32").module
    layers = {key: layer for key, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    return {key: layer.get_delta_weight("default").detach() for key, layer in layers.items()}


def frobenius(name: Path) -> float:
    return float(torch.stack([weight.pow(2).sum() for weight in delta(name).values()]).sum().sqrt())


def test_two_are_compared(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(*map(str, two))
    a, b = (torch.cat([weight.flatten() for weight in delta(name).values()]) for name in two)
    assert found["cosine"] == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, 0)), abs=1e-5)
    assert found["same_base"] and found["same_data"] and found["settings"] == {"r": [4, 2], "lora_alpha": [8, 4]}
    assert compare(str(two[0]), str(two[0]))["cosine"] == pytest.approx(1.0)
    code, out, err = run("adapters", *two, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["settings"]["r"] == [4, 2] and "cosine" in err
    assert run("adapters", two[0], two[1], two[0], capsys=capsys)[0] == 2


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ({"lora.use_dora": True}, "lora_magnitude_vector"),
        ({"lora.modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"lora.new_tokens": ["<call>"]}, "trainable_tokens_delta"),
        ({"lora.bias": "all"}, "k_proj.bias"),
    ],
)
def test_more_than_plain_lora_has_no_norm_and_no_cosine(
    two: tuple[Path, Path], option: dict[str, object], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    tiny.model(attention_bias=True, tie_word_embeddings=False).save_pretrained(base)
    tiny.tokenizer("chatml").save_pretrained(base)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 8)
    options: dict[str, Any] = {"train.max_steps": 1, "model.dtype": "fp32", "lora.target_modules": ["q_proj"], **option}
    more = strop.train(model=str(base), data=str(rows), out=tmp_path / "more", **options).folder
    found = compare(str(two[0]), str(more))
    assert found["norms"] == [norm(str(two[0])), None] and found["cosine"] is None and not found["modules"]
    assert found["not_measured"].endswith(f"{what} too")
    code, out, err = run("adapters", more, "--json", capsys=capsys)
    shown = json.loads(out)
    assert code == 0 and shown["norm"] is None and f"{what} too" in shown["not_measured"] and "plain LoRA" in err


def test_a_weighted_sum_is_the_sum(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("adapters", *two, "--out", tmp_path / "sum", "--weights", "0.7,0.3", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["rank"] == 6
    a, b, mixed = delta(two[0]), delta(two[1]), delta(tmp_path / "sum")
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, 0.7 * a[name] + 0.3 * b[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(RecipeError, match="2 adapters, 1 weights"):
        combine(list(map(str, two)), [1.0], tmp_path / "other")
    with pytest.raises(FolderError):
        combine(list(map(str, two)), [1.0, 1.0], tmp_path / "sum")
    assert run("adapters", *two, "--out", tmp_path / "x", "--weights", "much", capsys=capsys)[0] == 2
    with pytest.raises(RecipeError, match="not all are finite"):
        combine(list(map(str, two)), [float("nan"), 1.0], tmp_path / "other")
    assert norm(str(tmp_path / "sum")) > 0 and facts(str(tmp_path / "sum")).data is None


def test_a_sum_of_what_was_asked_in_other_ways_says_so(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run("adapters", *two, "--out", tmp_path / "sum", "--weights", "1,1", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["notes"] == []
    shutil.copytree(two[1] / "adapter", tmp_path / "other")
    file = tmp_path / "other" / "strop.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "template": "0" * 64, "system": "Be brief."}))
    words = ("adapters", two[0], tmp_path / "other", "--out", tmp_path / "mixed", "--weights", "1,1", "--json")
    code, out, err = run(*words, capsys=capsys)
    told = " ".join(json.loads(out)["notes"])
    assert code == 0 and "another chat template" in told and "another system prompt" in told
    assert "another chat template" in " ".join(err.split())


@pytest.mark.parametrize(
    "setting", [{"trainable_token_indices": {"embed_tokens": [7]}}, {"use_dora": True}, {"bias": "all"}]
)
def test_what_has_no_sum_is_refused_before_weights_load(
    two: tuple[Path, Path], setting: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strop.export.adapters.load_base", lambda *args, **more: pytest.fail("weights were loaded"))
    other = changed(two[1], tmp_path / "other", setting)
    with pytest.raises(ModelError, match="have no weighted sum"):
        combine([str(two[0]), str(other)], [0.5, 0.5], tmp_path / "sum")


def test_another_alpha_pattern_is_told(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = changed(two[0], tmp_path / "other", {"alpha_pattern": {"q_proj": 5}})
    assert compare(str(two[0]), str(other))["settings"] == {"alpha_pattern": [{}, {"q_proj": 5}]}


def changed(run: Path, out: Path, setting: dict[str, object]) -> Path:
    """A copy of a run's adapter with another setting."""
    shutil.copytree(run / "adapter", out)
    config = out / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **setting}))
    return out


def test_several_adapters_on_one_base(two: tuple[Path, Path], tmp_path: Path) -> None:
    model = strop.load(two[0], dtype="fp32")
    alone = {name: strop.load(name, dtype="fp32").generate(["what is 7"], max_new_tokens=6) for name in two}
    model.add(str(two[1]))
    for name in (two[1], two[0], two[1]):
        model.use(str(name))
        assert model.generate(["what is 7"], max_new_tokens=6) == alone[name]
    changed = tmp_path / "other"
    changed.mkdir()
    for file in (two[1] / "adapter").iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    identity = json.loads((changed / "strop.json").read_text())
    (changed / "strop.json").write_text(json.dumps({**identity, "template": "another"}))
    with pytest.raises(ModelError, match="another chat template"):
        model.add(str(changed))
    with pytest.raises(ModelError, match="no adapter"):
        model.add(str(tmp_path))
    for known in two:
        with pytest.raises(ModelError, match="loaded already"):
            model.add(str(known))


def test_adapters_of_another_tool_are_told_apart_by_their_bases(tiny_folder: Path, tmp_path: Path) -> None:
    other = tiny.save_tiny(tmp_path / "base")
    tiny.model(seed=5).save_pretrained(other)
    [one, same], [stranger, _] = save_adapters(tmp_path, tiny_folder), save_adapters(tmp_path / "there", other)
    for folder in (one, same, stranger):
        (folder / "strop.json").unlink()
    model = strop.load(one, dtype="fp32")
    model.add(str(same))
    with pytest.raises(ModelError, match="another base"):
        model.add(str(stranger))
    with pytest.raises(ModelError, match="another base"):
        load_models([str(same), str(stranger)], device="cpu", dtype="fp32", quantization="auto", force=False)


def test_chat_switches_adapters(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["what is 7", "/reset", f"/adapter {two[1]}", "what is 7", "/adapter nobody", "/adapter"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    code, out, err = run("chat", two[0], "--adapter", two[1], "--max-new-tokens", "6", capsys=capsys)
    first, second = out.splitlines()[0], out.splitlines()[-1]
    assert code == 0 and first != second and "/adapter nobody: not loaded" in err and f"{two[0]}\n{two[1]}" in err


def test_chat_draws_as_the_model_asks_for(
    two: tuple[Path, Path], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own = tmp_path / "own"
    own.mkdir()
    for file in tiny_folder.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20).save_pretrained(own)
    for scheme in ("none", "nf4"):  # whose weights come in by another way
        assert strop.load(own, quantization=scheme).sampling == Sampling(0.6, 0.9, 20)
    assert strop.load(two[0]).sampling == Sampling()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    _, _, err = run("chat", own, "--max-new-tokens", "2", "--top-k", "0", capsys=capsys)
    assert "answers: temperature 0.6, top_p 0.9" in err and "top_k" not in err
    assert Sampling.from_generation_config(GenerationConfig(do_sample=True)) == Sampling(1.0, 1.0, 50)
    assert (
        "repetition penalty 1.2" in Sampling.from_generation_config(GenerationConfig(repetition_penalty=1.2)).describe()
    )


def test_the_sum_of_rslora_adapters_is_the_sum(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        strop.train(
            model=str(tiny_folder), data=str(rows_file), out=tmp_path / name, lora={"r": 4, "use_rslora": True},
            train={"max_steps": 3, "learning_rate": 1e-2}, **{"model.dtype": "fp32"},
        )  # fmt: skip
    parts = [delta(tmp_path / name) for name in ("a", "b")]
    combine([str(tmp_path / "a"), str(tmp_path / "b")], [1.0, 0.5], tmp_path / "sum")
    for name, weight in delta(tmp_path / "sum").items():
        torch.testing.assert_close(weight, parts[0][name] + 0.5 * parts[1][name], rtol=1e-4, atol=1e-6)


def test_adapters_of_models_of_other_sizes_are_compared(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "base"
    tiny.model(hidden_size=48, num_attention_heads=4).save_pretrained(other)
    tiny.tokenizer("chatml").save_pretrained(other)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 8)
    strop.train(model=str(other), data=str(rows), out=tmp_path / "c", train={"max_steps": 1}, **{"model.dtype": "fp32"})
    found = compare(str(two[0]), str(tmp_path / "c"))
    assert found["same_base"] is False and found["cosine"] is None
