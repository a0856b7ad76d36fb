"""Whole runs on a tiny model folder, through the command line and through Python."""

from __future__ import annotations

import json
import sys
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
from strop import cli
from strop.runs.events import read_events
from tests import tiny

QUICK = ["--train.max_steps", "6", "--train.batch_size", "4", "--lora.r", "4", "--model.dtype", "fp32"]


def run(*words: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a strop command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["strop", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


@pytest.fixture
def trained(tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "runs" / "one"
    code, _, err = run("train", "--model", tiny_folder, "--data", rows_file, "--out", out, *QUICK, capsys=capsys)
    assert code == 0, err
    return out


def test_a_run_leaves_what_the_contract_names(trained: Path, tiny_folder: Path) -> None:
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert recipe["train"]["max_steps"] == 6 and recipe["lora"]["alpha"] == 8.0
    lock = json.loads((trained / "lock.json").read_text())
    assert {"base", "data", "template", "recipe", "seed", "versions", "machine"} <= set(lock)
    report = json.loads((trained / "report.json").read_text())
    assert report["steps"] == 6 and report["exit"] == 0
    assert report["data"]["read"] == report["data"]["used"] == 24
    assert report["memory"]["measured_peak_bytes"] > 0
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
    wanted = (
        "run steps tokens supervised_tokens tokens_per_s supervised_tokens_per_s seconds loss eval_loss data memory"
    )
    assert {*wanted.split(), "adapter", "exit"} <= set(fields)
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
    assert result["difference"]["low"] <= result["difference"]["value"] <= result["difference"]["high"]
    assert "tuned minus base" in err
    assert json.loads((trained / "report.json").read_text())["evaluation"]["tuned"] == result["tuned"]


def test_python_api_trains_resumes_evaluates_and_chats(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    out = tmp_path / "api"
    made = strop.train(
        model=str(tiny_folder), data=str(rows_file), out=out, lora={"r": 2}, train={"max_steps": 3},
        callback=lambda event: seen.append(event["event"]),
    )  # fmt: skip
    assert made.report["steps"] == 3 and seen.count("step") == 3
    again = strop.resume(out)  # a finished run is returned as it is
    assert again.report["steps"] == 3 and again.report["tokens"] == made.report["tokens"]
    result = strop.evaluate(out, str(rows_file), metric="exact", max_new_tokens=3)
    assert result["rows"] == 24
    model = strop.load(out)
    assert model.chat("what is 3", max_new_tokens=4) == model.generate(["what is 3"], max_new_tokens=4)[0]
    assert len(model.history) == 2


def test_cut_short_then_resumed_is_bit_identical(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line, in the middle of an epoch; the run is cut by a callback that raises."""
    words = ["--model", tiny_folder, "--data", rows_file, *QUICK, "--lora.dropout", "0.1", "--train.save_steps", "2"]
    assert run("train", *words, "--out", tmp_path / "whole", capsys=capsys)[0] == 0

    class Cut(Exception):
        pass

    def cut(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise Cut

    pairs = dict(zip(words[::2], words[1::2], strict=True))
    with pytest.raises(Cut):
        strop.train(
            **{str(name).removeprefix("--"): str(value) for name, value in pairs.items()},
            out=tmp_path / "cut",
            callback=cut,
        )
    assert not (tmp_path / "cut" / "report.json").exists()
    torch.manual_seed(99)
    code, _, err = run("resume", tmp_path / "cut", capsys=capsys)
    assert code == 0 and "step-000004" in err
    whole, resumed = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resume_refuses_other_data(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", tiny_folder, "--data", rows_file, *QUICK, "--out", tmp_path / "r"]
    assert run("train", *words, capsys=capsys)[0] == 0
    (tmp_path / "r" / "report.json").unlink()  # as if it had been killed before the end
    tiny.write_rows(rows_file, 23)
    code, _, err = run("resume", tmp_path / "r", capsys=capsys)
    assert code == 2 and "data is not what the run was started with" in err


def test_training_starts_from_an_adapter(trained: Path, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    more = strop.train(
        model=str(tiny_folder), data=str(rows_file), out=tmp_path / "more", adapter=str(trained), train={"max_steps": 1}
    )
    first = read_events(more.folder / "events.jsonl")
    start = next(event for event in first if event["event"] == "step")
    end = [event for event in read_events(trained / "events.jsonl") if event["event"] == "step"]
    assert start["loss"] < end[0]["loss"]  # it did not start from the base again
    chosen = yaml.safe_load((more.folder / "recipe.yaml").read_text())["lora"]
    assert chosen["r"] == 4 and "as in the adapter" in (more.folder / "recipe.yaml").read_text()
    with pytest.raises(strop.InputError, match="the adapter to start from has 4"):
        strop.train(
            model=str(tiny_folder), data=str(rows_file), out=tmp_path / "x", adapter=str(trained), lora={"r": 8}
        )


def test_adapter_of_another_base_is_refused(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny.model(seed=5).save_pretrained(other)
    tiny.tokenizer("chatml").save_pretrained(other)
    config = trained / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(other)}))
    with pytest.raises(strop.InputError, match="trained on"):
        strop.load(trained / "adapter")


def test_adapter_with_nan_is_refused(trained: Path) -> None:
    file = trained / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights[next(iter(weights))][0, 0] = np.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(strop.InputError, match="NaN"):
        strop.load(trained)


def test_trackers_get_the_numbers(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "tracked"
    strop.train(model=str(tiny_folder), data=str(rows_file), out=out, track=["tensorboard"], train={"max_steps": 3})
    folders = {file.parent for file in out.rglob("events.out.tfevents*")}
    found = {}
    for folder in folders:
        reader = EventAccumulator(str(folder)).Reload()
        for tag in reader.Tags()["scalars"]:
            found[tag] = [point.value for point in reader.Scalars(tag)]
    steps = [event["loss"] for event in read_events(out / "events.jsonl") if event["event"] == "step"]
    assert found["train/loss"] == pytest.approx(steps, rel=1e-6)


def test_chat_through_a_pipe(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("what is 2\nand 3\n"))
    code, out, _ = run("chat", trained, "--max-new-tokens", "4", capsys=capsys)
    assert code == 0 and len(out.splitlines()) >= 2


def test_modules_lists_layers_with_their_shapes(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("modules", tiny_folder, "--json", capsys=capsys)
    found = {row["name"]: row for row in json.loads(out)["modules"]}
    assert code == 0
    assert (found["k_proj"]["in_features"], found["k_proj"]["out_features"], found["k_proj"]["count"]) == (32, 16, 2)
    assert found["q_proj"]["presets"] == ["auto", "low-memory", "balanced", "max-quality"]
    assert found["gate_proj"]["presets"] == ["auto", "balanced", "max-quality"]
    assert found["down_proj"]["presets"] == ["auto", "max-quality"] and found["lm_head"]["presets"] == []


def test_runs_and_print_recipe(trained: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("runs", trained.parent, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["runs"] == [{"run": str(trained), "finished": True, "step": 6}]
    code, out, _ = run("train", "--model", tiny_folder, "--data", "x.jsonl", "--print-recipe", capsys=capsys)
    assert code == 0
    assert "r: 16  # default" in out and "alpha: 32.0  # plan: 2 r" in out and "train: x.jsonl  # option" in out
