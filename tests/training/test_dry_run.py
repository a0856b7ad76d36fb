"""The largest micro-batch before the first step: tried where memory may be short, with no trace in the numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import strop
from strop.data.batching import BatchStream
from strop.errors import MemoryLimitError
from strop.machine.memory import start_peak
from strop.models.families.shape import ModelShape
from strop.planning.activations import at_peak
from strop.planning.workload import Setting
from strop.runs.events import read_events
from strop.training import dry_run
from strop.training.dry_run import batch_of, forecast, rehearse
from strop.training.job import Job, stream_of
from strop.training.loop import fit
from strop.training.oom import micro_batches
from tests.support import tiny
from tests.support.failures import starved

QUICK = {"train.max_steps": 3, "train.batch_size": 4, "lora.r": 4, "model.dtype": "fp32", "lora.dropout": 0.1}
SHAPE = ModelShape.from_config(tiny.config().to_dict())


def setting(job: Job) -> Setting:
    recipe = job.recipe.model_copy(update={"model": job.recipe.model.model_copy(update={"device": "cpu"})})
    return Setting.of(recipe, SHAPE)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_rehearsed_run_is_bit_identical(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose random numbers the rehearsal draws and gives back."""
    found = []
    for name, share in (("plain", 0.5), ("rehearsed", 0.0)):
        monkeypatch.setattr(dry_run, "FAR_BELOW", share)
        run = strop.train(model=str(tiny_folder), data=str(rows_file), out=str(tmp_path / name), **QUICK)
        (event,) = [e for e in read_events(run.folder / "events.jsonl") if e["event"] == "rehearsal"]
        assert event["done"] == (share == 0.0) and event["predicted_bytes"] < event["usable_bytes"]
        memory = json.loads((run.folder / "report.json").read_text())["memory"]
        calibrated = memory["calibrated_peak_bytes"]
        if event["done"]:  # what comes after the rehearsal is little
            assert calibrated == pytest.approx(max(calibrated, event["measured_bytes"]), rel=0.5) and calibrated > 0
        else:
            assert calibrated is None
        assert memory["predicted_peak_bytes"] == event["predicted_bytes"] > 0  # one number, wherever it is told
        assert memory["predicted"]["train"]["parts"]["adapters"] > 0
        found.append((weights(run.folder), run.report["loss"]))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())


def test_the_largest_micro_batch_of_all_steps_is_tried(tmp_path: Path) -> None:
    examples = tiny.examples(24, longest=24)
    examples[13] = replace(examples[13], ids=examples[0].ids.repeat(9), weights=examples[0].weights.repeat(9))
    job = tiny.job(tmp_path / "r", examples, **{"train.micro_batch": 2})
    expected = forecast(job, setting(job), 8 << 30)
    assert examples[13] in [*expected.items] and expected.batch.more
    assert expected.batch.tokens == len(expected.items) * len(examples[13])  # the plain step pads


def test_it_is_the_largest_by_what_is_predicted_in_any_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every step of the run; each epoch is put in order once."""
    examples = tiny.examples(30, longest=60)
    job = tiny.job(tmp_path / "r", examples, **{"train.micro_batch": 3, "train.batch_size": 6, "train.epochs": 4})
    stream, sizes = stream_of(job.recipe, len(examples)), []
    for step in stream_of(job.recipe, len(examples)):
        rows = [examples[row] for row in step.rows]
        for group in micro_batches(job, rows):
            batch = batch_of(job, [rows[row] for row in group], True, False)
            sizes.append((at_peak(setting(job).but(step=job.step.name), batch).total, step.epoch))
    orders, known = [], BatchStream.order
    monkeypatch.setattr(BatchStream, "order", lambda self, epoch: orders.append(epoch) or known(self, epoch))
    found = forecast(job, setting(job), 8 << 30)
    assert at_peak(setting(job).but(step=job.step.name), found.batch).total == max(sizes)[0]
    assert max(size for size, epoch in sizes if epoch == 0) < max(sizes)[0], "a later epoch has the largest"
    assert orders == [0, 1, 2, 3] and stream.steps_per_epoch == 5


def test_the_forecast_is_moved_by_what_the_rehearsal_needed(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "r", tiny.examples(8), **{"train.max_steps": 1})
    expected = forecast(job, setting(job), 8 << 30)
    assert expected.calibrated_bytes("cpu") is None
    found = rehearse(job, expected, 1, start_peak("cpu"))
    (event,) = [e for e in read_events(job.folder.events) if e["event"] == "rehearsal"]
    off = event["measured_bytes"] - expected.rehearsed_bytes("cpu")
    assert found.off_bytes == off and found.calibrated_bytes("cpu") == max(0, expected.peak_bytes("cpu") + off)


def test_it_shrinks_before_the_first_step_or_refuses(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train.max_steps": 2}
    job = starved(tiny.job(tmp_path / "a", tiny.examples(8), **options), {1})
    rehearse(job, forecast(job, setting(job), 8 << 30), 1, start_peak("cpu"))
    assert job.state.progress.halvings == 1 and all(w.grad is None for w in job.state.weights.values())
    fit(job)
    kinds = [event["event"] for event in read_events(job.folder.events)]
    assert kinds.index("shrink") < kinds.index("rehearsal") < kinds.index("step") and kinds.count("shrink") == 1
    hopeless = starved(tiny.job(tmp_path / "b", tiny.examples(8), **options), set(range(1, 99)))
    with pytest.raises(MemoryLimitError):
        rehearse(hopeless, forecast(hopeless, setting(hopeless), 8 << 30), 1, start_peak("cpu"))


def test_layers_computed_again_change_nothing_but_memory(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    found = []
    for again in ("off", 1, "on"):
        options = {**QUICK, "lora.dropout": 0.0, "train.gradient_checkpointing": again}
        run = strop.train(model=str(tiny_folder), data=str(rows_file), out=str(tmp_path / str(again)), **options)
        memory = run.report["memory"]["predicted"]["train"]["parts"]
        found.append((weights(run.folder), sum(memory[part] for part in ("saved_activations", "live_layer", "head"))))
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())
    assert found[0][1] > found[1][1] >= found[2][1]


def test_it_is_rehearsed_as_the_steps_will_be_computed(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "r", tiny.examples(8), **{"train.max_steps": 1, "train.gradient_checkpointing": 1})
    asked: list[Any] = []
    job.state.progress.recompute = True
    step = replace(job.step, checkpoint=asked.append, recompute=lambda: asked.append("all"))
    job = replace(job, step=step)
    rehearse(job, forecast(job, setting(job), 8 << 30), 1, start_peak("cpu"))
    assert asked == [1, "all"]


def test_few_rows_many_times_are_looked_at_some_of_these_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny.job(
        tmp_path / "r", tiny.examples(8), **{"train.epochs": 1000, "train.batch_size": 4, "train.micro_batch": 4}
    )
    looked: list[int] = []
    cut = dry_run.micro_batches
    monkeypatch.setattr(dry_run, "micro_batches", lambda job, items: looked.append(len(items)) or cut(job, items))
    monkeypatch.setattr(dry_run, "LOOKED_AT_ROWS", 40)
    forecast(job, setting(job), 8 << 30)
    assert looked == [4] * 10
    monkeypatch.setattr(dry_run, "LOOKED_AT_ROWS", 1)  # an epoch always
    forecast(job, setting(job), 8 << 30)
    assert looked[10:] == [4] * 2
