"""Whole sweeps of a tiny model: files, output, failures, pruning, kills, several processes, and Python."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import strop
from strop import api
from strop.errors import DivergedError, InputError, RecipeError
from strop.evaluation.diagnosis import changes_measure
from strop.runs.events import read_events
from strop.runs.folder import read_json
from strop.sweeping import loop
from strop.sweeping.tables import describe_trial
from tests import ROOT
from tests.support.forks import Forks
from tests.support.pages import blocks
from tests.support.runs import run
from tests.support.slow import slow_except
from tests.sweeping.support import without_times, words, write_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sweep_by_the_command_line(here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    over = ("--over", "lora.r=2,16", "--over", "lr=3e-4,1e-2", "--seeds", "2", "--out", "s")
    code, out, err = run(*words(tiny_folder, *over, "--json"), capsys=capsys)
    assert code == 0, err
    result = json.loads(out)
    assert result["sweep"] == "s" and {**result, "sweep": None} == {
        **read_json(here / "s" / "sweep.json"),
        "sweep": None,
    }
    assert result["request"]["sampler"] == "grid" and result["metric"] == "accuracy"
    trials = result["trials"]
    assert [trial["state"] for trial in trials] == ["finished"] * 5  # the default has another rate
    assert trials[0]["setting"]["lora.r"] == 16 and trials[0]["setting"]["train.learning_rate"] > 0
    assert len({json.dumps(trial["setting"]) for trial in trials}) == 5
    assert len({trial["score"] for trial in trials}) > 1
    best = max(trials, key=lambda trial: (trial["score"], -trial["loss"]))
    ranking = result["selection"]["ranking"]
    assert best["number"] in ranking[0]["trials"] and ranking[0]["standing"] == "best"
    for number in range(5):  # normal run folders
        assert (here / "s" / "trials" / f"{number:03d}" / "adapter" / "adapter_config.json").is_file()
    # the terminal
    assert re.search(r"rows     \d+ train, \d+ selection, \d+ test\n", err)
    assert re.search(r"memory   \d\.\d\d GiB at most \(.+\), \d+\.\d GiB usable\n", err)
    assert re.search(
        r"trial    000 \(1 of 5\)  the default  accuracy \d+\.\d%  loss \d\.\d{3}  [\w. ]+, at most [\w. ]+ left\n",
        err,
    )
    assert re.search(r"trial    004 \(5 of 5\)  lora\.r 16, learning_rate 0\.01  accuracy", err)
    assert f"verdict  {result['result']['sentence']}" in err
    assert "train s/winner.yaml --out runs/mine" in err
    # a second resume prints the result
    code, out, err = run("sweep", "--resume", "s", "--json", capsys=capsys)
    assert code == 0 and json.loads(out) == result and "verdict" in err
    # the winner trains on all rows
    winner = yaml.safe_load((here / "s" / "winner.yaml").read_text())
    assert winner["data"]["train"] == "rows.jsonl" and winner["train"]["keep"] in ("off", False)  # as all trials
    code, _, err = run("train", "s/winner.yaml", "--out", "mine", "--max-steps", "2", capsys=capsys)
    assert code == 0 and "150 rows read, 150 used" in err
    # the runs of the sweep are runs for the other commands
    code, out, _ = run("runs", "s/trials", "--json", capsys=capsys)
    assert len(json.loads(out)["runs"]) == 5
    code, out, _ = run("eval", "s/trials/001", "--data", "s/data/selection.jsonl", "--json", capsys=capsys)
    assert json.loads(out)["tuned"]["accuracy"] == trials[1]["score"]
    assert json.loads(out)["train_rows"] == 0


def test_text_is_scored_with_the_metric(here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"say a {i}", "completion": "a"} for i in range(120)]
    (here / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["sweep", "--model", str(tiny_folder), "--data", "chat.jsonl", "--epochs", "1", "--model.dtype", "fp32"]
    more = ["--over", "lora.r=2,4", "--metric", "contains", "--max-new-tokens", "4", "--seeds", "1", "--out", "s"]
    code, out, err = run(*command, *more, "--json", capsys=capsys)
    assert code == 0, err
    result = json.loads(out)
    assert result["metric"] == "contains" and len(result["trials"]) == 3
    assert "one seed cannot tell a setting from luck" in err or "keep the default" in err
    answers = read_json(here / "s" / "trials" / "001" / "answers.json")
    hits = [row["tuned_hit"] for row in answers["samples"]]
    assert sum(hits) / len(hits) == result["trials"][1]["score"] and "base" not in answers["samples"][0]


def test_dry_run_prints_the_plan_only(here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        *words(tiny_folder, "--over", "lora.r=2..64", "--dry-run", "--out", "s", "--json"), capsys=capsys
    )
    assert code == 0 and not (here / "s").exists()
    plan = json.loads(out)["plan"]
    assert plan["trials"] == 12 and plan["fits"] and plan["largest"] == {"lora.r": 64}
    assert "over     lora.r: 2 to 64 (log)" in err and "trials   12 (tpe)" in err


def test_what_does_not_fit_is_refused_before_training(
    here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(*words(tiny_folder, "--over", "lora.r=2,2048", "--memory", "90MB", "--out", "s"), capsys=capsys)
    assert code == 1 and "a trial does not fit in memory" in err and not (here / "s").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--over", "lora.rr=1,2"], "did you mean lora.r?"),
        (["--over", "out=a,b"], "every trial has its own folder"),
        (["--over", "data.max_length=64,128", "--prune"], "by their evaluation loss, which data.max_length changes"),
        (["--over", "train.class_weights=none,balanced", "--prune"], "loss, which train.class_weights changes"),
        (["--over", "lora.r=2,4", "--sampler", "grit"], "did you mean grid?"),
        (["--over", "lora.r=2..4", "--sampler", "grid"], "lora.r is a range"),
        (["--over", "lora.r=2,4,8", "--sampler", "grid", "--trials", "2"], "the grid with the default has 4 settings"),
        (["--over", "train.objective=classify,dpo"], "they train on different rows"),
        (["--over", "lora.r=2,4", "--metric", "exac"], "did you mean exact?"),
        ([], "--over is required"),
    ],
)
def test_wrong_options_exit_with_2(
    more: list[str], expected: str, here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(*words(tiny_folder, *more, "--out", "s"), capsys=capsys)
    assert code == 2 and expected in err and not (here / "s").exists()


def test_missing_optuna_is_refused(
    here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(*words(tiny_folder, "--over", "lora.r=2,4"), capsys=capsys)
    assert code == 2 and "pip install optuna" in err


def sweep(model: Path, **options: Any) -> strop.Sweep:
    settings = {"model": model, "data": "rows.jsonl", "objective": "classify", "epochs": 1, "dtype": "fp32", "out": "s"}
    return strop.sweep(**{**settings, "seeds": 1, "progress": False, **options})


def write_pairs(path: Path) -> Path:
    rows = [{"prompt": f"which one {i}", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("objective", slow_except(["dpo", "reward", "kto"], ["dpo"]))
def test_pairs_are_compared_by_preference(objective: str, here: Path, tiny_folder: Path) -> None:
    data = write_pairs(here / "pairs.jsonl")
    over = {"train.learning_rate": [1e-3, 1e-2]}
    result = sweep(tiny_folder, data=data, objective=objective, over=over, max_steps=3, seeds=2, lr=1e-3)
    assert result.state["metric"] == "preference" and len(result.state["trials"]) == 2
    assert all(0 <= trial["score"] <= 1 for trial in result.state["trials"])


def test_prompts_are_compared_by_the_metric(here: Path, tiny_folder: Path) -> None:
    rows = [{"prompt": f"say {i}", "completion": "a"} for i in range(120)]
    (here / "asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data": "asks.jsonl", "objective": "grpo", "rewards": "contains", "group": 2, "answer_tokens": 4}
    over = {"lora.r": [2, 16]}
    result = sweep(tiny_folder, **settings, over=over, max_steps=1, metric="contains", max_new_tokens=4)
    assert result.state["metric"] == "contains" and result.result is not None
    (here / "bare.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"no row ends with an answer|have no answer"):
        sweep(tiny_folder, **{**settings, "data": "bare.jsonl", "out": "t"}, over=over)


def test_changed_inputs_and_options_are_refused(here: Path, tiny_folder: Path) -> None:
    done = sweep(tiny_folder, over={"lora.r": [2, 16]})
    with pytest.raises(InputError, match="contains a sweep"):
        sweep(tiny_folder, over={"lora.r": [2, 16]})
    again = sweep(tiny_folder, over={"lora.r": [2, 16]}, resume_existing=True)
    assert again.state == done.state
    with pytest.raises(InputError, match="over changed since the sweep was started"):
        sweep(tiny_folder, over={"lora.r": [4, 16]}, resume_existing=True)
    with pytest.raises(InputError, match=r"train\.epochs changed"):
        sweep(tiny_folder, over={"lora.r": [2, 16]}, epochs=2, resume_existing=True)
    with pytest.raises(RecipeError, match="keeps its options"):
        strop.sweep("s", over={"lora.r": [2, 4]}, resume_existing=True)
    with pytest.raises(InputError, match="contains a sweep"):
        strop.sweep("s")
    write_rows(here / "rows.jsonl", 160)
    with pytest.raises(InputError, match="data changed"):
        strop.sweep("s", resume_existing=True)


def test_python_returns_a_printable_sweep_and_calls_back(here: Path, tiny_folder: Path) -> None:
    events: list[dict[str, Any]] = []
    result = sweep(tiny_folder, over={"train.learning_rate": (1e-3, 1e-2)}, trials=2, callback=events.append)
    assert os.fspath(result) == "s" and result.result is not None
    assert {event["event"] for event in events} >= {"start", "step", "eval", "end"}
    assert "verdict" in str(result) and "default: learning_rate" in str(result)
    rates = [trial["setting"]["train.learning_rate"] for trial in result.state["trials"]]
    assert 1e-3 <= rates[1] <= 1e-2 and rates[1] == float(f"{rates[1]:.3g}")


def test_a_failed_trial_does_not_end_the_sweep(
    here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = api.train

    def fail(**options: Any) -> Any:
        if options.get("lora.r") == 2:
            raise DivergedError("step 3: the loss is not finite", fix="lower the rate")
        return train(**options)

    monkeypatch.setattr(api, "train", fail)
    code, out, err = run(
        *words(tiny_folder, "--over", "lora.r=2,16,8", "--seeds", "1", "--out", "s", "--json"), capsys=capsys
    )
    assert code == 0
    states = {trial["setting"]["lora.r"]: trial["state"] for trial in json.loads(out)["trials"]}
    assert states == {16: "finished", 2: "failed", 8: "finished"}
    assert "failed: step 3: the loss is not finite" in err and "failed   001: step 3" in err


def test_all_failed_trials_exit_with_1(
    here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: Any) -> Any:
        raise DivergedError("step 3: the loss is not finite", fix="lower the rate")

    monkeypatch.setattr(api, "train", fail)
    code, out, err = run(*words(tiny_folder, "--over", "lora.r=2,16", "--out", "s", "--json"), capsys=capsys)
    assert code == 1 and "all 2 trials failed; the first one: step 3" in err
    assert [trial["state"] for trial in json.loads(out)["trials"]] == ["failed", "failed"]


def test_trials_that_differ_by_their_seed_are_one_setting(here: Path, tiny_folder: Path) -> None:
    result = sweep(tiny_folder, over={"seed": [0, 1, 2, 3]})
    assert [entry["trials"] for entry in result.state["selection"]["ranking"]] == [[0, 1, 2, 3]]
    assert result.result is not None and result.result["verdict"] == "default"
    assert "their differences are noise" in result.result["sentence"]


def test_evaluations_of_a_trial_by_the_user_do_not_change_the_comparison(
    here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"over": {"lora.r": [2, 4]}, "seeds": 1, "out": "s"}
    original = loop.SweepFolder.select

    def evaluate_first(folder: loop.SweepFolder) -> bool:
        if not any(row["state"] in loop.UNFINISHED for row in folder.state["trials"]):
            few = here / "few.jsonl"
            few.write_text("".join((here / "rows.jsonl").read_text("utf-8").splitlines(True)[:9]), encoding="utf-8")
            strop.evaluate(folder.trial_folder(0), str(few), metric="accuracy")
        return original(folder)

    plain = sweep(tiny_folder, **{**options, "out": "plain"})
    monkeypatch.setattr(loop.SweepFolder, "select", evaluate_first)
    changed = sweep(tiny_folder, **options)
    assert without_times(changed.state["selection"]) == without_times(plain.state["selection"])


def test_a_moved_sweep_is_resumed_and_another_model_is_refused(here: Path, tiny_folder: Path) -> None:
    model = shutil.copytree(tiny_folder, here / "model")
    stopped: list[int] = []

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            stopped.append(1)
            if len(stopped) == 2:
                raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017
        sweep(model, over={"lora.r": [2, 4]}, seeds=1, out="s", callback=stop)
    (here / "s").rename(here / "moved")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
    config = (model / "config.json").read_text("utf-8")
    (model / "config.json").write_text(config.replace("{", '{"changed": 1,', 1), encoding="utf-8")
    with pytest.raises(InputError, match="models changed since the sweep was started"):
        strop.sweep("moved", resume_existing=True, progress=False)
    (model / "model.safetensors").write_bytes(weights)
    (model / "config.json").write_text(config, encoding="utf-8")
    resumed = strop.sweep("moved", resume_existing=True, progress=False)
    assert [trial["state"] for trial in resumed.state["trials"]] == ["finished"] * 3
    assert resumed.state["result"] is not None


def test_a_repeated_setting_is_trained_once(here: Path, tiny_folder: Path) -> None:
    result = sweep(tiny_folder, over={"lora.r": [2, 16]}, trials=5, sampler="random")
    repeated = [trial for trial in result.state["trials"] if trial["same_as"] is not None]
    assert len(repeated) == 3
    for trial in repeated:
        assert trial["score"] == result.state["trials"][trial["same_as"]]["score"]
        assert not (here / "s" / "trials" / f"{trial['number']:03d}").exists()


def test_values_that_the_plan_chooses_are_trained_once(here: Path, tiny_folder: Path) -> None:
    """The default of lora.alpha is twice the rank."""
    result = sweep(tiny_folder, over={"lora.alpha": [32, 8]}, epochs=1)
    assert [trial["same_as"] for trial in result.state["trials"]] == [None, 0, None]
    assert result.state["trials"][1]["score"] == result.state["trials"][0]["score"]
    assert not (here / "s" / "trials" / "001").exists()
    assert [entry["trials"] for entry in result.state["selection"]["ranking"]] in ([[0], [2]], [[2], [0]])


def test_pruning_is_refused_only_where_losses_differ() -> None:
    changing = ("train.beta", "train.temperature", "train.rewards", "train.objective", "data.loss")
    same = ("train.group", "train.pooling", "lora.alpha", "train.learning_rate")
    assert all(map(changes_measure, changing)) and not any(map(changes_measure, same))


def test_pruned_trials_end_early_with_a_complete_report(here: Path, tiny_folder: Path) -> None:
    over = {"train.learning_rate": [1e-2, 1e-6, 2e-6, 5e-3]}
    result = sweep(tiny_folder, over=over, epochs=3, prune=True, lr=5e-3)
    pruned = [trial for trial in result.state["trials"] if trial["state"] == "pruned"]
    assert {trial["setting"]["train.learning_rate"] for trial in pruned} >= {1e-6, 2e-6}
    steps = {trial["steps"] for trial in result.state["trials"] if trial["state"] == "finished"}
    for trial in pruned:
        report = read_json(here / "s" / trial["run"] / "report.json")
        assert report["ended"] == "pruned" and report["steps"] == min(steps) / 3
        assert read_events(here / "s" / trial["run"] / "events.jsonl")[-2]["why"] == "pruned"
        assert strop.resume(here / "s" / trial["run"], progress=False).report["steps"] == report["steps"]
    assert result.state["trials"][0]["state"] == "finished"


def test_data_is_prepared_once(here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from strop.data import prepare

    written: list[Any] = []
    write = prepare._write_rows
    monkeypatch.setattr(prepare, "_write_rows", lambda *args: written.append(args) or write(*args))
    monkeypatch.setenv("STROP_CACHE", str(here / "cache"))
    sweep(tiny_folder, over={"lora.r": [2, 16]}, seeds=1, max_steps=1)
    counts = len(written)
    assert counts <= 8  # all rows for checks and plans, then training and selection rows once
    sweep(tiny_folder, over={"lora.r": [2, 8, 16]}, seeds=2, max_steps=1, out="t")
    assert len(written) - counts <= counts


# --- processes ----------------------------------------------------------------------------------------------------


IN_A_FORK = (
    "from pathlib import Path; from tests.sweeping.processes import *; {case}(Path({folder!r}), Path({model!r}))"
)


@pytest.mark.slow
def test_a_killed_sweep_resumes_to_the_same_result(tiny_folder: Path, tmp_path: Path, forks: Forks) -> None:
    """Kill a sweep with TPE and pruning at random instants; trials, adapters and result equal those without kills."""
    run_in_a_fork(forks, "kill_a_sweep", tmp_path, tiny_folder)


def test_ctrl_c_saves_the_trial_and_names_the_command_to_continue(
    tiny_folder: Path, tmp_path: Path, forks: Forks
) -> None:
    run_in_a_fork(forks, "interrupt_a_sweep", tmp_path, tiny_folder)


@pytest.mark.slow
def test_two_processes_share_a_sweep(tiny_folder: Path, tmp_path: Path, forks: Forks) -> None:
    run_in_a_fork(forks, "share_a_sweep", tmp_path, tiny_folder)


def run_in_a_fork(forks: Forks, case: str, folder: Path, model: Path) -> None:
    code = f"from pathlib import Path; from tests.sweeping.processes import {case} as case; "
    forks.run(f"{code}case(Path({str(folder)!r}), Path({str(model)!r}))", folder, seconds=600)


def test_the_guide_works_from_its_first_command_to_its_last(
    here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of docs/sweep.md run in order, with a tiny model and short runs."""
    rows = [{"prompt": f"buy {i} eggs", "completion": f'{{"number": {i}}}'} for i in range(100)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown: list[Any] = []
    for block in blocks(ROOT / "docs" / "sweep.md"):
        if block.language == "python":
            text = block.text.replace('"demo"', repr(str(tiny_folder)))
            text = text.replace("trials=4", "trials=2, seeds=1, max_steps=2, dtype='fp32', max_new_tokens=4")
            exec(text, {"print": lambda *values: shown.append(values)})
        for line in block.commands:
            if line[0] != "strop":
                continue
            command = [str(tiny_folder) if word == "demo" else word for word in line[1:]]
            if command[0] == "train" or "--over" in command:
                command += ["--max-steps", "2", "--model.dtype", "fp32"]
            if "--over" in command:
                command += ["--seeds", "1", "--trials", "2", "--max-new-tokens", "4"]
            code, _, err = run(*command, capsys=capsys)
            assert code == 0, err
    assert shown[0][0] in ("default", "one seed") and (here / "runs" / "sweep-2" / "winner.yaml").is_file()


def test_setting_of_which_a_seed_was_pruned_is_not_compared() -> None:
    """The mean of the seeds that were not pruned would be too high."""

    def trial(number: int, state: str, rank: int, seed: int) -> Any:
        attributes = {"setting": {"lora.r": rank, "seed": seed}, "result": {"hits": "11", "loss": 1.0}}
        return SimpleNamespace(number=number, state=SimpleNamespace(name=state), user_attrs=attributes)

    trials = [trial(0, "COMPLETE", 8, 0), trial(1, "COMPLETE", 4, 0), trial(2, "PRUNED", 4, 1)]
    trials += [trial(3, "COMPLETE", 2, 0), trial(4, "COMPLETE", 2, 1), trial(5, "PRUNED", 8, 1)]
    folder: Any = SimpleNamespace(
        trials=SimpleNamespace(all=lambda: trials), _planner=SimpleNamespace(cost=lambda _: (1.0, 1.0, 1.0))
    )
    assert [x.numbers for x in loop.SweepFolder.candidates(folder)] == [(0,), (3, 4)]
    trials[:] = trials[1:3]
    assert [x.numbers for x in loop.SweepFolder.candidates(folder)] == [(1,)]  # nothing else is left


def test_a_trial_that_is_killed_while_it_is_pruned_is_pruned_when_it_is_resumed(
    here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends after the checkpoint of a pruned trial, before its report."""
    from strop.training import run as training

    over = {"train.learning_rate": [1e-2, 1e-6]}
    options = {"over": over, "epochs": 3, "prune": True, "lr": 5e-3}
    whole = sweep(tiny_folder, **options, out="whole")
    assert [trial["state"] for trial in whole.state["trials"]][-1] == "pruned"
    finish = training.finish

    def kill(job: Any, *rest: Any) -> Any:
        if rest[3] == "pruned":
            raise SystemExit("killed")
        return finish(job, *rest)

    monkeypatch.setattr(training, "finish", kill)
    with pytest.raises(SystemExit):
        sweep(tiny_folder, **options)
    monkeypatch.setattr(training, "finish", finish)
    again = sweep(tiny_folder, **options, resume_existing=True)
    assert without_times(again.state["trials"]) == without_times(whole.state["trials"])
    assert without_times(again.state["selection"]) == without_times(whole.state["selection"])


def test_time_of_the_first_trial_is_not_that_of_the_others() -> None:
    trials = [
        {"seconds": seconds, "state": "finished", "same_as": None, "score": 0.5, "loss": None, "setting": {}}
        for seconds in (540, 10, 12)
    ]
    state = {"trials": [*trials, {"seconds": None, "state": "waiting"}], "plan": {"final_runs": 3}}
    assert describe_trial({**state, "request": {"metric": "exact"}, "metric": "exact"}, 2).endswith("at most 44 s left")
