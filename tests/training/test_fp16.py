"""Training in fp16, as on GPUs without bf16: losses are scaled in the backward, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import strop
from strop.runs.folder import RunFolder, read_events, read_json
from strop.training import guard
from strop.training.state import Progress

OPTIONS: dict[str, Any] = {
    "model.device": "cpu", "train.max_steps": 8, "train.batch_size": 4, "train.learning_rate": 3e-3, "lora.r": 4,
    "progress": False,
}  # fmt: skip


def steps(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(RunFolder(folder).events) if event["event"] == "step"]


def trained(model: Path, rows: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    strop.train(model=str(model), data=str(rows), out=out, **{**OPTIONS, **options})
    return steps(out)


def state(run: Path) -> dict[str, Any]:
    return read_json(sorted((run / "checkpoints").iterdir())[-1] / "state.json")


def test_losses_in_fp16_equal_those_in_fp32(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    half, whole = (
        trained(tiny_folder, rows_file, tmp_path / dtype, **{"model.dtype": dtype}) for dtype in ("fp16", "fp32")
    )
    assert [step["loss"] for step in half] == pytest.approx([step["loss"] for step in whole], rel=0.01)
    assert [step["grad_norm"] for step in half] == pytest.approx([step["grad_norm"] for step in whole], rel=0.05)
    assert state(tmp_path / "fp16")["loss_scale"] > 1 and state(tmp_path / "fp32")["loss_scale"] == 1
    (start,) = [event for event in read_events(RunFolder(tmp_path / "fp16").events) if event["event"] == "start"]
    assert start["engine"] == "fast"


def test_an_overflow_lowers_the_scale_and_repeats_the_step(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = trained(tiny_folder, rows_file, tmp_path / "usual", **{"model.dtype": "fp16"})
    monkeypatch.setattr(guard, "FIRST_LOSS_SCALE", 2.0**40)
    high = trained(tiny_folder, rows_file, tmp_path / "high", **{"model.dtype": "fp16"})
    assert [step["loss"] for step in high] == pytest.approx([step["loss"] for step in usual], rel=2e-3)
    saved = state(tmp_path / "high")
    assert 1 < saved["loss_scale"] < 2**40 and saved["skipped_steps"] == 0 and not saved["passed"]
    monkeypatch.setattr(guard, "SCALE_GROWTH_STEPS", 4)
    monkeypatch.setattr(guard, "FIRST_LOSS_SCALE", 4.0)
    trained(tiny_folder, rows_file, tmp_path / "low", **{"model.dtype": "fp16"})
    assert state(tmp_path / "low")["loss_scale"] == 16, "doubled after 4 and 8 steps"


def test_a_resumed_run_has_the_same_scale_and_weights(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "FIRST_LOSS_SCALE", 2.0**30)
    options = {"model.dtype": "fp16", "train.save_steps": 3}
    trained(tiny_folder, rows_file, tmp_path / "whole", **options)
    cut = tmp_path / "cut"

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, strop.Stopped)):
        trained(tiny_folder, rows_file, cut, callback=stop, **options)
    strop.resume(cut)
    kept = ("loss_scale", "scale_steps", "step")
    assert [state(cut)[name] for name in kept] == [state(tmp_path / "whole")[name] for name in kept]
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (cut, tmp_path / "whole"))
    assert all((one[name] == other[name]).all() for name in other)


def test_a_gradient_that_is_not_finite_for_another_reason_keeps_the_scale() -> None:
    progress = Progress(loss_scale=8.0)
    assert guard.lower_loss_scale(progress, 1.0, float("inf")) and progress.loss_scale == 4
    assert not guard.lower_loss_scale(progress, float("nan"), float("nan")), "the forward overflows"
    assert not guard.lower_loss_scale(progress, 1.0, 2.0)
    progress.loss_scale = 1.0
    assert not guard.lower_loss_scale(progress, 1.0, float("nan"))
