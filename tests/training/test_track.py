"""What trackers are told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from strop.errors import RecipeError
from strop.training.track import tracking


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
        "--track trackio: gets no more numbers, events.jsonl has them all: ConnectionError: the server is gone",
        "--track trackio: gets no more numbers, events.jsonl has them all: TimeoutError: TimeoutError",
    ]
