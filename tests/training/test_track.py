"""What trackers are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strop.training.track import tracking


class Recorder:
    """In the place of accelerate's Accelerator."""

    made: list[tuple[str, dict[str, Any]]]

    def __init__(self, **_: Any) -> None:
        pass

    def init_trackers(self, project: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        Recorder.made.append((project, init_kwargs))

    def end_training(self) -> None:
        pass


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
