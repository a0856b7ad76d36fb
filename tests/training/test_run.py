"""Whole runs on a tiny model folder, through the command line and through Python."""

from __future__ import annotations

import json
import signal
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import strop
from strop import testing
from strop.cli import app
from strop.engine.train import buffers as buffers_module
from strop.errors import InputError
from strop.models.adapters import save_adapter
from strop.runs.events import read_events
from tests.support import preferences, tiny, tiny_families
from tests.support.jobs import events
from tests.support.runs import QUICK, run


@pytest.fixture
def trained(tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "runs" / "one"
    code, _, err = run("train", "--model", tiny_folder, "--data", rows_file, "--out", out, *QUICK, capsys=capsys)
    assert code == 0, err
    return out


def test_adapter_on_a_head_that_shares_the_embeddings_is_noted(
    rows_file: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    options = {"lora.target_modules": ["q_proj", "lm_head"], "model.dtype": "fp32", "train.max_steps": 1}
    texts = []
    for tied in (True, False):
        base = tiny.save_tiny(tmp_path / f"tied-{tied}", tie_word_embeddings=tied)
        run = strop.train(model=base, data=rows_file, out=tmp_path / f"run-{tied}", **options)
        texts.append([event["text"] for event in run.events if event["event"] == "note"])
    assert any("cannot be merged" in text for text in texts[0]) and not any("merged" in text for text in texts[1])
    assert not any("tie_word_embeddings" in str(warning.message) for warning in recwarn)


def test_run_folder_has_the_documented_files(trained: Path, tiny_folder: Path) -> None:
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert recipe["train"]["max_steps"] == 6 and recipe["lora"]["alpha"] == 8.0
    lock = json.loads((trained / "lock.json").read_text())
    assert {"base", "data", "template", "recipe", "seed", "versions", "machine"} <= set(lock)
    report = json.loads((trained / "report.json").read_text())
    assert report["steps"] == 6 and report["exit"] == 0
    assert report["data"]["read"] == report["data"]["used"] == 24
    assert isinstance(report["memory"]["measured_peak_bytes"], int)  # above 0 only in a separate process
    kinds = [event["event"] for event in read_events(trained / "events.jsonl")]
    assert kinds[:4] == ["machine", "recipe", "data", "start"] and kinds[-1] == "end" and kinds.count("step") == 6
    steps = [event for event in read_events(trained / "events.jsonl") if event["event"] == "step"]
    assert report["loss"] == {"first": steps[0]["loss"], "last": steps[-1]["loss"]}
    assert report["tokens"] == steps[-1]["tokens"]
    assert "<html" in (trained / "report.html").read_text()
    assert not list(trained.rglob("*.tmp*")) and not (trained / "claim.json").exists()
    assert not [file for file in trained.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".pth")]
    adapter = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tiny_folder.resolve())


def test_adapter_folder_gives_the_same_logits_in_plain_peft(trained: Path, tiny_folder: Path) -> None:
    ids = torch.arange(5, 25)[None]
    ours = strop.load(trained, dtype="fp32")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), str(trained / "adapter"))
    with torch.no_grad():
        tuned = ours.module(ids).logits
        assert (tuned - theirs.eval()(ids).logits).abs().max() < 1e-5
        with ours.base():
            assert (tuned - ours.module(ids).logits).abs().max() > 1e-4


def test_steps_report_the_memory_of_the_process(trained: Path) -> None:
    sizes = [event["resident_bytes"] for event in events(trained, "step")]
    assert sizes and all(50 << 20 < size < 64 << 30 for size in sizes)
    assert "Process memory after each step, GiB" in (trained / "report.html").read_text(encoding="utf-8")


def test_buffers_of_the_steps_are_free_before_the_adapter_is_written(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers, allocated, held = list[Any](), buffers_module._new_buffer, list[int]()

    def allocate(size: int) -> torch.Tensor:
        buffer = allocated(size)
        buffers.append(weakref.ref(buffer))
        return buffer

    def save(*parts: Any) -> None:
        held.append(sum(buffer() is not None for buffer in buffers))
        save_adapter(*parts)

    monkeypatch.setattr(buffers_module, "_new_buffer", allocate)
    monkeypatch.setattr("strop.training.report.save_adapter", save)
    strop.train(model=tiny_folder, data=rows_file, out=tmp_path / "run", train={"max_steps": 2})
    assert buffers and held == [0]


def test_train_json_is_one_object_with_the_contract_fields(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        "--model",
        tiny_folder,
        "--data",
        rows_file,
        "--out",
        tmp_path / "r",
        "--eval",
        "20%",
        "--json",
        *QUICK,
    ]
    code, out, err = run(*words, capsys=capsys)
    assert code == 0 and "step" in err
    fields = json.loads(out)
    expected = (
        "run steps tokens supervised_tokens tokens_per_s supervised_tokens_per_s seconds loss eval_loss data memory"
    )
    assert {*expected.split(), "adapter", "exit"} <= set(fields)
    assert fields["eval_loss"] > 0 and {"read", "used", "truncated", "split", "dropped", "by_reason"} <= set(
        fields["data"]
    )


def test_eval_compares_base_and_tuned_and_adds_to_the_report(
    trained: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", trained, "--data", rows_file, "--metric", "contains", "--max-new-tokens", "5", "--json"]
    code, out, err = run(*words, capsys=capsys)
    assert code == 0
    result = json.loads(out)
    assert result["rows"] == 24 and result["metric"] == "contains" and result["run"] == str(trained)
    assert result["tuned"]["loss"] < result["base"]["loss"]
    assert {"contains", "loss", "stop_rate"} <= set(result["base"])
    assert (
        result["base"]["perplexity"] == pytest.approx(np.exp(result["base"]["loss"]))
        and result["base"]["tokens_per_s"] > 0
    )
    gained, lost = (len(result["changed"][name]) for name in ("gained", "lost"))
    assert gained - lost == round(24 * result["difference"]["value"])
    assert result["difference"]["low"] <= result["difference"]["value"] <= result["difference"]["high"]
    verdict, answers, *commands = err.splitlines()[-6:]
    assert verdict.startswith("not a fair test, because ") and " 24 of 24 rows are also training rows: " in verdict
    assert answers == f"answers  {trained}/report.html, or strop dash {trained}"
    assert commands == [
        f"next     strop chat {trained}",
        f"         strop merge {trained} --out {trained.name}-merged",
        f"         strop export gguf {trained} --out {trained.name}.gguf",
        f"         strop serve {trained}",
    ]
    assert json.loads((trained / "report.json").read_text())["evaluation"]["tuned"] == result["tuned"]


def test_eval_in_4_bit_uses_another_base(trained: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", trained, "--data", rows_file, "--max-new-tokens", "2", "--json"]
    losses = [
        json.loads(run(*words, "--quantization", scheme, capsys=capsys)[1])["base"]["loss"]
        for scheme in ("auto", "none", "nf4")
    ]
    assert losses[0] == losses[1] != losses[2]
    code, _, err = run(*words, "--quantization", "nf5", capsys=capsys)
    assert code == 2 and "nf5: no such scheme" in err


def test_python_api_trains_resumes_evaluates_and_chats(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    out = tmp_path / "api"
    built = strop.train(
        model=str(tiny_folder), data=str(rows_file), out=out, lora={"r": 2}, train={"max_steps": 3},
        callback=lambda event: seen.append(event["event"]),
    )  # fmt: skip
    assert built.report["steps"] == 3 and seen.count("step") == 3
    again = strop.resume(out)  # a finished run is returned unchanged
    assert again.report["steps"] == 3 and again.report["tokens"] == built.report["tokens"]
    assert strop.resume(out, **{"train.max_steps": 3}).report["steps"] == 3
    with pytest.raises(InputError, match="is finished"):
        strop.resume(out, **{"train.max_steps": 5})
    opened = strop.Run(out)
    result = strop.evaluate(out, str(rows_file), metric="exact", max_new_tokens=3)
    assert result["rows"] == 24 == opened.report["evaluation"]["rows"] and "steps=3" in repr(opened)
    with pytest.raises(strop.InputError, match="not a run folder"):
        strop.Run(tmp_path)
    model = strop.load(out)
    for _ in range(2):  # each call is a new conversation
        assert model.chat("what is 3", max_new_tokens=4) == model.generate(["what is 3"], max_new_tokens=4)[0]


@pytest.mark.parametrize("option", [("--lora.dropout", "0.1"), ("--lora.new_tokens", "what")])
def test_interrupted_then_resumed_run_is_bit_identical(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    """Through the command line, in the middle of an epoch; the run is cut by a callback that raises."""
    words = ["--model", tiny_folder, "--data", rows_file, *QUICK, *option, "--train.save_steps", "2"]
    assert run("train", *words, "--out", tmp_path / "whole", capsys=capsys)[0] == 0
    assert events(tmp_path / "whole", "start")[0]["engine"] == "fast"

    class Cut(Exception):
        pass

    def cut(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise Cut

    pairs: dict[str, Any] = {str(name): str(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    if "--lora.new_tokens" in pairs:
        pairs["--lora.new_tokens"] = [pairs["--lora.new_tokens"]]
    with pytest.raises(Cut):
        strop.train(
            **{name.removeprefix("--"): value for name, value in pairs.items()},
            out=tmp_path / "cut",
            callback=cut,
        )
    assert not (tmp_path / "cut" / "report.json").exists()
    torch.manual_seed(99)
    code, _, err = run("resume", tmp_path / "cut", capsys=capsys)
    assert code == 0 and "step-000004" in err
    assert "the run's recipe.yaml" in err and "seed = " not in err
    whole, resumed = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def unfinished(folder: Path, tiny_folder: Path, rows_file: Path) -> Path:
    """Return a run that was stopped after step 4 of 6."""

    class Cut(Exception):
        pass

    def cut(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == 4:
            raise Cut

    with pytest.raises(Cut):
        strop.train(
            model=str(tiny_folder), data=str(rows_file), out=folder, callback=cut, lora={"r": 4},
            train={"max_steps": 6, "batch_size": 4, "save_steps": 2}, **{"model.dtype": "fp32"},
        )  # fmt: skip
    return folder


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_resume_names_the_changed_setting_it_refuses(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = unfinished(tmp_path / "r", tiny_folder, rows_file)
    edit(out / "recipe.yaml", "learning_rate: 0.007", "learning_rate: 0.0001")
    edit(out / "recipe.yaml", "lr_scheduler: cosine", "lr_scheduler: linear")
    code, _, err = run("resume", out, capsys=capsys)
    assert code == 2 and "train.learning_rate has changed since the run was started: 0.007 then, 0.0001 now" in err
    assert "resume with --allow-changed 'train.learning_rate,train.lr_scheduler'" in err
    code, _, err = run("resume", out, "--allow-changed", "lr", capsys=capsys)
    assert code == 2 and "train.lr_scheduler" in err and "train.learning_rate is not" not in err
    code, _, err = run("resume", out, "--allow-changed", "lr", "--allow-changed", "schedule", capsys=capsys)
    assert code == 0 and "override train.learning_rate = 0.0001, was 0.007" in err
    events = read_events(out / "events.jsonl")
    last = [event for event in events if event["event"] == "step"][-1]
    assert last["step"] == 6 and last["learning_rate"] < 0.0001
    assert [event["field"] for event in events if event["event"] == "override"] == [
        "train.learning_rate",
        "train.lr_scheduler",
    ]
    lock = json.loads((out / "lock.json").read_text())
    assert lock["overrides"][0]["was"] == "0.007" and lock["values"]["train.learning_rate"] == 0.0001
    assert any(
        "resumed with train.learning_rate" in text
        for text in json.loads((out / "report.json").read_text())["diagnosis"]
    )


def test_resume_accepts_a_new_value_but_not_another_shape(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = unfinished(tmp_path / "r", tiny_folder, rows_file)
    code, _, err = run("resume", out, "--lora.r", "8", "--allow-changed", "lora.r", capsys=capsys)
    assert code == 2 and "lora.r has changed" in err and "start a new run" in err
    code, _, err = run("resume", out, "--train.learning_rate", "1e-4", capsys=capsys)
    assert code == 2 and "--allow-changed train.learning_rate" in err
    code, _, err = run("resume", out, "--allow-changed", "learning_rte", capsys=capsys)
    assert code == 2 and "--allow-changed learning_rte: no such name (did you mean learning_rate?)" in err
    words = ["--train.learning_rate", "1e-4", "--train.log_steps", "2", "--allow-changed", "learning_rate"]
    assert run("resume", out, *words, capsys=capsys)[0] == 0
    assert "learning_rate: 0.0001  # option" in (out / "recipe.yaml").read_text()


def test_resume_refuses_another_base_template_and_major_version(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = unfinished(tmp_path / "r", tiny_folder, rows_file)
    lock = json.loads((out / "lock.json").read_text())
    for name, value in (
        ("base", {"name": "other", "fingerprint": "0" * 64}),
        ("template", "0" * 64),
        ("versions", {**lock["versions"], "torch": "1.13.0"}),
    ):
        (out / "lock.json").write_text(json.dumps({**lock, name: value}))
        code, _, err = run("resume", out, capsys=capsys)
        assert code == 2 and f"{name} has changed since the run was started" in err
    assert run("resume", out, "--allow-changed", "versions", capsys=capsys)[0] == 0


def test_resume_accepts_more_data_where_allowed(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = unfinished(tmp_path / "r", tiny_folder, rows_file)
    tiny.write_rows(rows_file, 30)
    assert run("resume", out, capsys=capsys)[0] == 2
    assert run("resume", out, "--allow-changed", "data", capsys=capsys)[0] == 0
    assert json.loads((out / "report.json").read_text())["steps"] == 6


def test_time_budget_ends_with_an_adapter_and_can_be_resumed(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    words = ["--model", tiny_folder, "--data", rows_file, "--out", out, "--lora.r", "4", "--train.epochs", "400"]
    assert run("train", *words, "--max-time", "0.5s", capsys=capsys)[0] == 0
    first = json.loads((out / "report.json").read_text())
    assert first["ended"] == "time" and 0 < first["steps"] < 1200 and (out / "adapter").is_dir()
    code, listed, _ = run("runs", tmp_path, "--json", capsys=capsys)
    assert json.loads(listed)["runs"][0]["finished"] is False
    code, _, err = run("resume", out, capsys=capsys)
    second = json.loads((out / "report.json").read_text())
    assert code == 0 and second["steps"] > first["steps"] and second["ended"] == "time", err
    assert run("resume", out, capsys=capsys)[0] == 0  # a third budget is as long as the second
    third = json.loads((out / "report.json").read_text())
    spent = [sum(one[part] for part in ("seconds", "eval_seconds", "save_seconds")) for one in (second, third)]
    assert spent[1] - spent[0] >= 0.45  # time between steps is not counted


def test_json_of_a_failed_run_has_partial_results(
    tiny_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from strop.errors import DiskError
    from strop.training import loop

    def full(job: Any) -> None:
        if job.state.progress.step == 4:
            raise DiskError("full")

    monkeypatch.setattr(loop, "save", full)
    words = ["train", "--model", tiny_folder, "--data", rows_file, "--out", tmp_path / "r", "--train.save_steps", "2"]
    code, out, _ = run(*words, *QUICK, "--json", capsys=capsys)
    text = json.loads(out)
    assert code == text["exit"] == 1 and text["error"]["kind"] == "DiskError"
    assert text["run"] == str(tmp_path / "r") and text["steps"] == 4 and text["tokens"] > 0 and text["loss"]["last"] > 0


def test_full_disk_is_refused_before_loading(
    tiny_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("strop.training.preflight.free_bytes", lambda path: 1_000_000)
    monkeypatch.chdir(tmp_path)
    code, _, err = run("train", "--model", tiny_folder, "--data", rows_file, capsys=capsys)
    assert code == 2 and "1 MiB are free" in err and not (tmp_path / "runs").exists()
    assert "keep_checkpoints" not in err  # one checkpoint would need more
    monkeypatch.setattr("strop.training.preflight.free_bytes", lambda path: 40_000_000)
    kept = ["--train.keep_checkpoints", "1000"]
    code, _, err = run("train", "--model", tiny_folder, "--data", rows_file, *kept, capsys=capsys)
    assert code == 2 and "or lower --train.keep_checkpoints" in err
    monkeypatch.setattr("strop.training.preflight.free_bytes", lambda path: 1_000_000)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes.txt").touch()
    assert run("train", "--model", tiny_folder, "--data", rows_file, capsys=capsys)[0] == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["notes.txt"]


def test_folder_of_a_killed_start_is_not_a_run(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    out.mkdir()
    for name in (".claim.lock", "claim.json", "recipe.yaml", ".lock.json.tmp-123"):
        (out / name).write_text("{}")
    strop.train(model=str(tiny_folder), data=str(rows_file), out=out, train={"max_steps": 1})
    assert not list(out.rglob("*.tmp-*"))


def test_tilde_in_a_recipes_out_is_expanded(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    file = here / "recipe.yaml"
    file.write_text(
        f"model: {{name: {tiny_folder}, dtype: fp32}}\ndata: {{train: {rows_file}}}\n"
        "train: {max_steps: 1}\nout: ~/runs/mine\n"
    )
    built = strop.train(file)
    assert built.folder == home / "runs" / "mine" and not (here / "~").exists()


def test_out_with_a_newline_is_refused(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(strop.InputError, match="not a valid name"):
        strop.train(model=str(tiny_folder), data=str(rows_file), out=tmp_path / "a\nb")


def test_resume_refuses_other_data(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", tiny_folder, "--data", rows_file, *QUICK, "--out", tmp_path / "r"]
    assert run("train", *words, capsys=capsys)[0] == 0
    (tmp_path / "r" / "report.json").unlink()  # as if it had been killed before its report
    tiny.write_rows(rows_file, 23)
    code, _, err = run("resume", tmp_path / "r", capsys=capsys)
    assert code == 2 and "data has changed since the run was started" in err


def test_training_starts_from_an_adapter(trained: Path, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    more = strop.train(
        model=str(tiny_folder), data=str(rows_file), out=tmp_path / "more", adapter=str(trained), train={"max_steps": 1}
    )
    first = read_events(more.folder / "events.jsonl")
    start = next(event for event in first if event["event"] == "step")
    end = [event for event in read_events(trained / "events.jsonl") if event["event"] == "step"]
    assert start["loss"] < end[0]["loss"]  # it started from the adapter
    chosen = yaml.safe_load((more.folder / "recipe.yaml").read_text())["lora"]
    assert chosen["r"] == 4 and "as in the adapter" in (more.folder / "recipe.yaml").read_text()
    with pytest.raises(strop.InputError, match="the adapter to start from has 4"):
        strop.train(
            model=str(tiny_folder), data=str(rows_file), out=tmp_path / "x", adapter=str(trained), lora={"r": 8}
        )


def rebase(adapter: Path, base: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(base)}))


def test_adapter_of_another_base_is_refused(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny.model(seed=5).save_pretrained(other)
    tiny.tokenizer("chatml").save_pretrained(other)
    rebase(trained / "adapter", other)
    with pytest.raises(strop.InputError, match="on which it was trained"):
        strop.load(trained / "adapter")


def test_base_that_changed_in_place_is_named_once(rows_file: Path, tmp_path: Path) -> None:
    base = testing.tiny_model(tmp_path / "base")
    run = testing.tiny_run(tmp_path, model=base, data=rows_file, **{"train.max_steps": 1})
    testing.tiny_model(base, seed=1)
    with pytest.raises(strop.InputError) as error:
        strop.load(run.folder)
    assert f"{run.folder}/adapter: its base {base} has changed since training (fingerprint" in str(error.value)
    assert "restore" in str(error.value.fix)


def test_force_loads_an_adapter_on_another_base_with_a_note(
    trained: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    tiny.model(seed=5).save_pretrained(other)
    tiny.tokenizer("chatml").save_pretrained(other)
    rebase(trained / "adapter", other)
    words = ["eval", trained / "adapter", "--data", rows_file, "--max-new-tokens", "2"]
    assert run(*words, capsys=capsys)[0] == 2
    code, out, _ = run(*words, "--force", capsys=capsys)
    assert code == 0 and "note" in out and "on which it was trained" in out and "expected" in out


def test_changed_adapter_file_is_refused_with_both_hashes(trained: Path) -> None:
    file = trained / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(strop.InputError, match=r"sha256 \w{12}, \w{12} expected"):
        strop.load(trained)
    file.write_bytes(data[:-10])
    with pytest.raises(strop.InputError, match="damaged"):
        strop.load(trained)


@pytest.mark.parametrize("layers", [1, 4])
def test_adapter_of_another_depth_is_refused(trained: Path, tmp_path: Path, layers: int) -> None:
    """peft loads a 2-layer adapter onto 4 layers with a warning, and onto 1 layer silently."""
    other = tmp_path / "other"
    tiny.model(num_hidden_layers=layers).save_pretrained(other)
    tiny.tokenizer("chatml").save_pretrained(other)
    (trained / "adapter" / "strop.json").unlink()  # as another tool's adapter
    rebase(trained / "adapter", other)
    with pytest.raises(strop.InputError, match="missing for" if layers == 4 else "14 of its tensors"):
        strop.load(trained / "adapter")


def test_adapter_with_nan_is_refused(trained: Path) -> None:
    file = trained / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights[next(iter(weights))][0, 0] = np.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(strop.InputError, match="NaN"):
        strop.load(trained)


def test_tensorboard_gets_the_losses(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "tracked"
    strop.train(model=str(tiny_folder), data=str(rows_file), out=out, track=["tensorboard"], train={"max_steps": 3})
    folders = {file.parent for file in out.rglob("events.out.tfevents*")}
    result = {}
    for folder in folders:
        reader = EventAccumulator(str(folder)).Reload()
        for tag in reader.Tags()["scalars"]:
            result[tag] = [point.value for point in reader.Scalars(tag)]
    steps = [event["loss"] for event in read_events(out / "events.jsonl") if event["event"] == "step"]
    assert result["train/loss"] == pytest.approx(steps, rel=1e-6)


def test_chat_through_a_pipe(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("what is 2\nand 3\n"))
    code, out, _ = run("chat", trained, "--max-new-tokens", "4", capsys=capsys)
    assert code == 0 and len(out.splitlines()) >= 2


def test_chat_commands_through_a_pipe(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    def text(*lines: str) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        code, out, err = run("chat", trained, "--max-new-tokens", "4", capsys=capsys)
        assert code == 0
        return out.splitlines(), err

    tuned, _ = text("what is 2")
    base, _ = text("/base", "what is 2")
    both, err = text("/compare", "what is 2")
    assert "answers: without the adapter and with it" in err and text("/base what is 2")[0] == base
    assert tuned != base and both == [f"base: {base[0]}", f"tuned: {tuned[0]}"]
    again, _ = text(
        "what is 2", "/reset", "what is 2", "/base", "/tuned", "/reset", "what is 2", "/quit", "never asked"
    )
    assert again == 3 * tuned
    other, _ = text("/system be brief", "what is 2")
    assert other != tuned
    _, err = text("/tunde", "/help")
    assert "did you mean /tuned?" in err and "/compare" in err


def test_modules_lists_layers_with_their_shapes(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("modules", tiny_folder, "--json", capsys=capsys)
    result = {row["name"]: row for row in json.loads(out)["modules"]}
    assert result["embed_tokens"]["kept_16_bit"] == "embedding" and not result["embed_tokens"]["presets"]
    assert code == 0
    assert (result["k_proj"]["in_features"], result["k_proj"]["out_features"], result["k_proj"]["count"]) == (32, 16, 2)
    assert result["q_proj"]["presets"] == ["auto", "low-memory", "balanced", "max-quality"]
    assert result["gate_proj"]["presets"] == ["auto", "balanced", "max-quality"]
    assert result["down_proj"]["presets"] == ["auto", "max-quality"] and result["lm_head"]["presets"] == []
    assert result["lm_head"]["kept_16_bit"] == "output head" and result["q_proj"]["kept_16_bit"] is None


def test_option_none_removes_a_recipe_value(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{name: {tiny_folder}}}\ndata: {{train: x.jsonl, eval: held.jsonl}}\n")
    code, out, _ = run("train", recipe, "--eval", "none", "--print-recipe", capsys=capsys)
    assert code == 0 and "  eval: null  # option" in out


@pytest.mark.parametrize(
    ("words", "tracks"),
    [
        ((), ["wandb"]),
        (("--track", "none"), []),
        (("--track", "tensorboard,trackio"), ["tensorboard", "trackio"]),
        (("--track", "tensorboard", "--track", "trackio"), ["tensorboard", "trackio"]),
    ],
)
def test_option_track_replaces_the_recipes_trackers(
    words: tuple[str, ...], tracks: list[str], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: {tiny_folder}}}\ndata: {{train: rows.jsonl}}\ntrack: [wandb]\n")
    code, out, _ = run("train", recipe, *words, "--print-recipe", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["recipe"]["track"] == tracks


def test_runs_lists_runs_and_print_recipe_shows_origins(
    trained: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run("runs", trained.parent, "--json", capsys=capsys)
    (listed,) = json.loads(out)["runs"]
    assert code == 0 and {"run": str(trained), "finished": True, "step": 6}.items() <= listed.items()
    assert listed["loss"] > 0 and listed["seconds"] > 0 and listed["score"] is None and listed["data"]
    code, text, _ = run("runs", trained.parent, capsys=capsys)
    assert code == 0 and trained.name in text and f"{listed['loss']:.3f}" in text
    code, out, _ = run("train", "--model", tiny_folder, "--data", "x.jsonl", "--print-recipe", capsys=capsys)
    assert code == 0
    words = ["train", "--model", tiny_folder, "--data", "x.jsonl", "--print-recipe", "--json"]
    text = json.loads(run(*words, capsys=capsys)[1])
    assert text["recipe"]["lora"]["r"] == 16
    assert {"field": "lora.alpha", "value": 32.0, "origin": "plan", "why": "twice the rank"} in text["choices"]
    assert (
        "r: 16  # default" in out and "alpha: 32.0  # plan: twice the rank" in out and "train: x.jsonl  # option" in out
    )


def test_interrupted_import_exits_as_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A KeyboardInterrupt during the import of an extension module becomes an ImportError."""

    def interrupted() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(app, "COMMANDS", {**app.COMMANDS, "schema": interrupted})
    code, _, err = run("schema", capsys=capsys)
    assert code == 130 and "complete before are kept" in err


@pytest.mark.parametrize(("warmup", "noted"), [(2, True), (30, True), (1, False), (0.9, False)])
def test_warmup_as_long_as_the_run_is_noted(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, warmup: float, noted: bool
) -> None:
    options = {"train.max_steps": 2, "train.warmup": warmup, "train.learning_rate": 1e-3, "model.dtype": "fp32"}
    out = strop.train(model=str(tiny_folder), data=str(rows_file), out=tmp_path / "r", **options).folder
    text = f"train.warmup {warmup}: the run has 2 steps, so its learning rate never reaches its peak"
    assert (text in [event["text"] for event in events(out, "note")]) is noted
    assert (max(event["learning_rate"] for event in events(out, "step")) < 1e-3) is (noted or warmup == 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train.eval_steps": 1}, "train.eval_steps 1 has no effect without data.eval"),
        ({"train.eval_steps": 1, "data.eval": "30%"}, None),
        ({"lora.bias": "all"}, "lora.bias all has no effect: this model has no such bias"),
        (
            {"model.double_quantization": False},
            "model.double_quantization false has no effect: the base is not in 4 bit",
        ),
        ({"model.double_quantization": False, "model.quantization": "nf4"}, None),
        ({"model.placement": "sharded"}, "model.placement sharded has no effect on a single device"),
        ({"train.timeout": "5m"}, "train.timeout 5m has no effect on a single device"),
    ],
)
def test_option_without_effect_is_noted(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, options: dict[str, Any], message: str | None
) -> None:
    settings = {"train.max_steps": 1, "model.dtype": "fp32", **options}
    out = strop.train(model=str(tiny_folder), data=str(rows_file), out=tmp_path / "r", **settings).folder
    assert [event["text"] for event in events(out, "note")] == ([message] if message else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora.r": 64},
            ["lora.alpha 32: set by the recipe; with --lora.r 64 it would be 128 (--lora.alpha none)"],
        ),
        (
            {"lora.alpha": 128},
            ["train.learning_rate 0.004: set by the recipe; with --lora.alpha 128.0 it would be 0.002 "
             "(--train.learning_rate none)"],
        ),
        (
            {"train.learning_rate": 0.5},
            ["train.learning_rate 0.5: 125 times the default of this recipe (0.004); from 4 times on, runs diverged "
             "(docs/learning_rate.md)"],
        ),
        ({"lora.r": 64, "lora.alpha": None, "train.learning_rate": None}, []),
        (
            {"lora.r": 16, "train.batch_size": 8, "train.epochs": 1},
            ["train.epochs 1 is not used: train.max_steps 1 replaces it"],
        ),
    ],
)  # fmt: skip
def test_recipe_values_that_would_be_chosen_otherwise_are_noted(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, options: dict[str, Any], message: list[str]
) -> None:
    """recipe.yaml of a run sets all values, so an option that would change derived values does not."""
    recipe = tmp_path / "recipe.yaml"
    settings = {"model": {"name": str(tiny_folder), "dtype": "fp32"}, "data": {"train": str(rows_file)}}
    values = {"lora": {"r": 16, "alpha": 32.0}, "train": {"learning_rate": 0.004, "max_steps": 1}}
    recipe.write_text(yaml.safe_dump({**settings, **values}), encoding="utf-8")
    out = strop.train(recipe, out=tmp_path / "r", **options).folder
    assert [event["text"] for event in events(out, "note")] == message


def test_recipe_values_of_another_objective_are_noted(tiny_folder: Path, tmp_path: Path) -> None:
    rows = preferences.write_pairs(tmp_path / "rows.jsonl", 8)
    words = {"model": str(tiny_folder), "data": str(rows), "train.max_steps": 1, "model.dtype": "fp32"}
    first = strop.train(**words, objective="dpo", out=tmp_path / "dpo").folder
    options = {"objective": "ipo", "train.label_smoothing": None, "out": tmp_path / "ipo"}
    notes = [event["text"] for event in events(strop.train(first / "recipe.yaml", **options).folder, "note")]
    text = "train.length_normalized false: set by the recipe; with --train.objective ipo it would be true"
    assert f"{text} (--train.length_normalized none)" in notes
    options |= {"train.length_normalized": None, "out": tmp_path / "other"}
    notes = [event["text"] for event in events(strop.train(first / "recipe.yaml", **options).folder, "note")]
    assert not any("length_normalized" in note for note in notes)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_trained_biases_are_not_noted_as_missing(kind: str, rows_file: Path, tmp_path: Path) -> None:
    tiny_families.save(kind, tmp_path / "base")
    options: dict[str, Any] = {"train.max_steps": 1, "lora.bias": "lora_only", "model.dtype": "fp32"}
    out = strop.train(model=str(tmp_path / "base"), data=str(rows_file), out=tmp_path / "r", **options).folder
    assert not any("lora.bias" in event["text"] for event in events(out, "note"))


def test_interrupt_before_the_recipe_leaves_no_folder(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("strop.training.run.set_up_on_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        strop.train(model=str(tiny_folder), data=str(rows_file), out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_diverging_run_is_reported_in_the_terminal_and_in_the_report(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The losses are not those of the tiny model, which are bounded."""
    rising = [{"event": "step", "step": n, "loss": 6.0 * 10**n, "learning_rate": 0.5} for n in (1, 2, 3)]
    monkeypatch.setattr("strop.training.report.read_events", lambda path: rising)
    words = ["--model", tiny_folder, "--data", rows_file, "--out", tmp_path / "run", *QUICK]
    code, out, err = run("train", *words, capsys=capsys)
    assert code == 0, err
    after = out.split("done ", 1)[1].splitlines()
    finding = next(line for line in after if "training loss rose from 60.000 to 6000.000" in line)
    assert finding.startswith("finding  diverging: ") and "for example to 0.05 (see" in finding
    text = finding.removeprefix("finding  ")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["diagnosis"] == [text]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f'<p class="verdict unclear">{text}</p>' in page
