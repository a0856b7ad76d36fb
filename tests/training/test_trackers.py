"""What trackers are told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from strop import testing
from strop.errors import RecipeError
from strop.training.trackers import check_trackers, tracking


class Recorder:
    """In the place of accelerate's Accelerator."""

    made: list[tuple[str, dict[str, Any]]]

    def __init__(self, **_: Any) -> None:
        pass

    def init_trackers(self, project: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        print("as trackio does")
        Recorder.made.append((project, init_kwargs))

    def end_training(self) -> None:
        print("as trackio does")


class NoLogin(Exception):
    """In the place of wandb.errors.Error."""


@pytest.fixture(autouse=True)
def wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of the package as is looked at, whether it is installed or not."""
    errors = ModuleType("wandb.errors")
    errors.Error = NoLogin  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb.errors", errors)


@pytest.mark.parametrize(
    ("names", "environment", "told"),
    [
        (["wandb"], {}, ("mine", {})),
        (["wandb"], {"WANDB_PROJECT": "ours"}, ("ours", {"wandb": {"name": "mine"}})),
        (["wandb"], {"WANDB_PROJECT": "ours", "WANDB_NAME": "first"}, ("ours", {"wandb": {"name": "first"}})),
        (["tensorboard"], {"WANDB_PROJECT": "ours"}, ("mine", {})),
    ],
)
def test_wandb_gets_the_project_of_the_environment(
    names: list[str], environment: dict[str, str], told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorder.made = []
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    with tracking(names, tmp_path / "mine", {"model.device": "cpu"}):
        pass
    assert Recorder.made == [told]


def test_what_a_tracker_prints_is_not_among_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Recorder.made = []
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    with tracking(["trackio"], tmp_path / "mine", {"model.device": "cpu"}):
        print("{}")
    assert capsys.readouterr() == ("{}\n", "as trackio does\n" * 2)


def test_wandb_without_a_login_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NoLogin("No API key configured.")

    monkeypatch.setattr(Recorder, "init_trackers", refuse)
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    began = tracking(["wandb"], tmp_path / "mine", {"model.device": "cpu"})
    with pytest.raises(RecipeError, match="--track wandb: No API key configured"):
        began.__enter__()


def test_a_tracker_that_does_not_begin_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Recorder, "init_trackers", refuse)
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    with (
        pytest.raises(RecipeError, match=r"--track tensorboard: .*Permission denied"),
        tracking(["tensorboard"], tmp_path / "mine", {"model.device": "cpu"}),
    ):
        pass


def test_a_tracker_that_fails_later_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []

    def log(_: Recorder, values: dict[str, Any], step: int) -> None:
        told.append(step)
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
    assert told == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "--track trackio: stopped; events.jsonl still has all metrics: ConnectionError: the server is gone",
        "--track trackio: stopped; events.jsonl still has all metrics: TimeoutError: TimeoutError",
    ]


def test_where_a_tracker_does_not_begin_the_folder_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(Recorder, "init_trackers", refuse)
    with monkeypatch.context() as failing:
        failing.setattr("accelerate.Accelerator", Recorder)
        with pytest.raises(RecipeError, match="--track tensorboard: no network"):
            testing.tiny_run(tmp_path, track=["tensorboard"])
    assert not (tmp_path / "run").exists()
    testing.tiny_run(tmp_path)


def test_the_tracker_that_writes_into_the_folder_begins_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr(Recorder, "__init__", lambda _, log_with, **__: told.append(log_with))
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    Recorder.made = []
    with tracking(["tensorboard", "trackio", "wandb"], tmp_path / "mine", {"model.device": "cpu"}):
        pass
    assert told == [["trackio", "wandb", "tensorboard"]]


@pytest.mark.parametrize("back", [{"event": "rollback", "step": 4, "to": 2}, {"event": "resume", "step": 2}])
def test_a_curve_does_not_show_steps_that_were_undone(back: dict[str, Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking(["tensorboard"], tmp_path / "mine", {"model.device": "cpu"}) as (listen,):
        for event in ({"step": 1}, {"step": 2}, {"step": 3}, {"step": 4}, back, {"step": 4}):
            listen({"event": "step", "loss": 1.0, **event})
    reader = EventAccumulator(str(tmp_path / "mine" / "mine")).Reload()
    assert [point.step for point in reader.Scalars("train/loss")] == [1, 2, 4]


def test_a_folder_of_its_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb leaves one where it has run; accelerate says nothing, and nothing would be told."""
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match="the package no_such_tracker is not installed"):
        check_trackers(["no_such_tracker"])
