"""Experiment trackers: the values they receive, and handling of their errors."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from strop import testing
from strop.errors import RecipeError
from strop.training.preflight import check_trackers
from strop.training.report import tracking


class Recorder:
    """Stand-in for accelerate's Accelerator."""

    made: list[tuple[str, dict[str, Any]]]

    def __init__(self, **_: Any) -> None:
        pass

    def init_trackers(self, project: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        print("as trackio does")
        Recorder.made.append((project, init_kwargs))

    def end_training(self) -> None:
        print("as trackio does")


class NoLogin(Exception):
    """Stand-in for wandb.errors.Error."""


@pytest.fixture(autouse=True)
def wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for the parts of the package that are used."""
    errors = ModuleType("wandb.errors")
    errors.Error = NoLogin  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb.errors", errors)


@pytest.mark.parametrize(
    ("names", "environment", "noted"),
    [
        (["wandb"], {}, ("mine", {})),
        (["wandb"], {"WANDB_PROJECT": "ours"}, ("ours", {"wandb": {"name": "mine"}})),
        (["wandb"], {"WANDB_PROJECT": "ours", "WANDB_NAME": "first"}, ("ours", {"wandb": {"name": "first"}})),
        (["tensorboard"], {"WANDB_PROJECT": "ours"}, ("mine", {})),
    ],
)
def test_wandb_gets_the_project_of_the_environment(
    names: list[str], environment: dict[str, str], noted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorder.made = []
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    with tracking(names, tmp_path / "mine", {"model.device": "cpu"}):
        pass
    assert Recorder.made == [noted]


def test_tracker_output_does_not_go_to_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Recorder.made = []
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    with tracking(["trackio"], tmp_path / "mine", {"model.device": "cpu"}):
        print("{}")
    assert capsys.readouterr() == ("{}\n", "as trackio does\n" * 2)


def test_wandb_without_login_raises_recipe_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NoLogin("No API key configured.")

    monkeypatch.setattr(Recorder, "init_trackers", refuse)
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    began = tracking(["wandb"], tmp_path / "mine", {"model.device": "cpu"})
    with pytest.raises(RecipeError, match="track wandb: No API key configured"):
        began.__enter__()


def test_tracker_that_does_not_start_raises_recipe_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Recorder, "init_trackers", refuse)
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    with (
        pytest.raises(RecipeError, match=r"track tensorboard: .*Permission denied"),
        tracking(["tensorboard"], tmp_path / "mine", {"model.device": "cpu"}),
    ):
        pass


def test_tracker_that_fails_later_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    facts: list[int] = []

    def log(_: Recorder, values: dict[str, Any], step: int) -> None:
        facts.append(step)
        if step == 2:
            raise ConnectionError("the server is gone")

    def end(_: Recorder) -> None:
        raise TimeoutError

    Recorder.made = []
    monkeypatch.setattr(Recorder, "log", log, raising=False)
    monkeypatch.setattr(Recorder, "end_training", end)
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    with tracking(["trackio"], tmp_path / "mine", {"model.device": "cpu"}) as listeners:
        for step in (1, 2, 3):
            listeners[0]({"event": "step", "step": step, "loss": 1.0})
    assert facts == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "--track trackio: stopped; events.jsonl still has all metrics: ConnectionError: the server is gone",
        "--track trackio: stopped; events.jsonl still has all metrics: TimeoutError: TimeoutError",
    ]


def test_folder_is_released_if_a_tracker_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(Recorder, "init_trackers", refuse)
    with monkeypatch.context() as failing:
        failing.setattr("accelerate.Accelerator", Recorder)
        with pytest.raises(RecipeError, match="track tensorboard: no network"):
            testing.tiny_run(tmp_path, track=["tensorboard"])
    assert not (tmp_path / "run").exists()
    testing.tiny_run(tmp_path)


def test_tensorboard_starts_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts: list[list[str]] = []
    monkeypatch.setattr(Recorder, "__init__", lambda _, log_with, **__: facts.append(log_with))
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    Recorder.made = []
    with tracking(["tensorboard", "trackio", "wandb"], tmp_path / "mine", {"model.device": "cpu"}):
        pass
    assert facts == [["trackio", "wandb", "tensorboard"]]


@pytest.mark.parametrize("back", [{"event": "rollback", "step": 4, "to": 2}, {"event": "resume", "step": 2}])
def test_tensorboard_hides_undone_steps(back: dict[str, Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking(["tensorboard"], tmp_path / "mine", {"model.device": "cpu"}) as (listen,):
        for event in ({"step": 1}, {"step": 2}, {"step": 3}, {"step": 4}, back, {"step": 4}):
            listen({"event": "step", "loss": 1.0, **event})
    reader = EventAccumulator(str(tmp_path / "mine" / "mine")).Reload()
    assert [point.step for point in reader.Scalars("train/loss")] == [1, 2, 4]


def test_folder_with_a_trackers_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb creates such a folder; accelerate would silently log nothing."""
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match="the package no_such_tracker is not installed"):
        check_trackers(["no_such_tracker"])
