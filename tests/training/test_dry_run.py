"""The dry run of the largest micro-batch is skipped if memory is ample, and does not change results."""

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
from strop.planning import microbatch
from strop.planning.activations import peak_live_bytes
from strop.planning.workload import Workload
from strop.runs.events import read_events
from strop.training import dry_run
from strop.training.dry_run import describe_batch, forecast, try_largest_batch
from strop.training.gradients import micro_batches
from strop.training.loop import fit
from strop.training.state import Job, batch_stream
from tests.support import tiny
from tests.support.failures import starved
from tests.support.steps import changed_step

QUICK = {"train.max_steps": 3, "train.batch_size": 4, "lora.r": 4, "model.dtype": "fp32", "lora.dropout": 0.1}
SHAPE = ModelShape.from_config(tiny.config().to_dict())


def setting(job: Job) -> Workload:
    recipe = job.recipe.model_copy(update={"model": job.recipe.model.model_copy(update={"device": "cpu"})})
    return Workload.from_recipe(recipe, SHAPE)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_dry_run_does_not_change_the_result(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random generators, which dropout uses, are restored after the dry run."""
    result = []
    for name, share in (("plain", 0.5), ("rehearsed", 0.0)):
        monkeypatch.setattr(dry_run, "SAFE_SHARE", share)
        run = strop.train(model=str(tiny_folder), data=str(rows_file), out=str(tmp_path / name), **QUICK)
        (event,) = [e for e in read_events(run.folder / "events.jsonl") if e["event"] == "rehearsal"]
        assert event["done"] == (share == 0.0) and event["predicted_bytes"] < event["usable_bytes"]
        memory = json.loads((run.folder / "report.json").read_text())["memory"]
        calibrated = memory["calibrated_peak_bytes"]
        if event["done"]:  # the dry run needs nearly all of the peak
            assert calibrated == pytest.approx(max(calibrated, event["measured_bytes"]), rel=0.5) and calibrated > 0
        else:
            assert calibrated is None
        assert (
            memory["predicted_peak_bytes"] == event["predicted_bytes"] > 0
        )  # the same number in the report and the event
        assert memory["predicted"]["train"]["parts"]["adapters"] > 0
        result.append((weights(run.folder), run.report["loss"]))
    assert result[0][1] == result[1][1]
    assert all(torch.equal(tensor, result[1][0][name]) for name, tensor in result[0][0].items())


def test_forecast_uses_the_largest_micro_batch(tmp_path: Path) -> None:
    examples = tiny.examples(24, longest=24)
    examples[13] = replace(examples[13], ids=examples[0].ids.repeat(9), weights=examples[0].weights.repeat(9))
    job = tiny.job(tmp_path / "r", examples, **{"train.micro_batch": 2})
    expected = forecast(job, setting(job), 8 << 30)
    assert examples[13] in [*expected.items] and expected.batch.more
    assert expected.batch.tokens == len(expected.items) * len(examples[13])  # the plain step pads


def test_forecast_searches_all_epochs_for_the_largest_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of the run is searched; the order of each epoch is computed once."""
    examples = tiny.examples(30, longest=60)
    job = tiny.job(tmp_path / "r", examples, **{"train.micro_batch": 3, "train.batch_size": 6, "train.epochs": 4})
    stream, sizes = batch_stream(job.recipe, len(examples)), []
    for step in batch_stream(job.recipe, len(examples)):
        rows = [examples[row] for row in step.rows]
        for group in micro_batches(job, rows):
            batch = describe_batch(job, [rows[row] for row in group], True, False)
            sizes.append((peak_live_bytes(setting(job).replace(step=job.step.name), batch).total, step.epoch))
    orders, known = [], BatchStream.order
    monkeypatch.setattr(BatchStream, "order", lambda self, epoch: orders.append(epoch) or known(self, epoch))
    result = forecast(job, setting(job), 8 << 30)
    assert peak_live_bytes(setting(job).replace(step=job.step.name), result.batch).total == max(sizes)[0]
    assert max(size for size, epoch in sizes if epoch == 0) < max(sizes)[0], "a later epoch has the largest"
    assert orders == [0, 1, 2, 3] and stream.steps_per_epoch == 5


def test_dry_run_calibrates_the_forecast(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "r", tiny.examples(8), **{"train.max_steps": 1})
    expected = forecast(job, setting(job), 8 << 30)
    assert expected.calibrated_bytes("cpu") is None
    result = try_largest_batch(job, expected, 1, start_peak("cpu"))
    (event,) = [e for e in read_events(job.folder.events) if e["event"] == "rehearsal"]
    off = event["measured_bytes"] - expected.dry_run_bytes("cpu")
    assert result.error_bytes == off and result.calibrated_bytes("cpu") == max(0, expected.peak_bytes("cpu") + off)


def test_dry_run_out_of_memory_shrinks_or_raises(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train.max_steps": 2}
    job = starved(tiny.job(tmp_path / "a", tiny.examples(8), **options), {1})
    try_largest_batch(job, forecast(job, setting(job), 8 << 30), 1, start_peak("cpu"))
    assert job.state.progress.halvings == 1 and all(w.grad is None for w in job.state.weights.values())
    fit(job)
    kinds = [event["event"] for event in read_events(job.folder.events)]
    assert kinds.index("shrink") < kinds.index("rehearsal") < kinds.index("step") and kinds.count("shrink") == 1
    hopeless = starved(tiny.job(tmp_path / "b", tiny.examples(8), **options), set(range(1, 99)))
    with pytest.raises(MemoryLimitError):
        try_largest_batch(hopeless, forecast(hopeless, setting(hopeless), 8 << 30), 1, start_peak("cpu"))


def test_gradient_checkpointing_changes_only_memory(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    result = []
    for again in ("off", 1, "on"):
        options = {**QUICK, "lora.dropout": 0.0, "train.gradient_checkpointing": again}
        run = strop.train(model=str(tiny_folder), data=str(rows_file), out=str(tmp_path / str(again)), **options)
        memory = run.report["memory"]["predicted"]["train"]["parts"]
        result.append((weights(run.folder), sum(memory[part] for part in ("saved_activations", "live_layer", "head"))))
    assert all(torch.equal(tensor, result[1][0][name]) for name, tensor in result[0][0].items())
    assert result[0][1] > result[1][1] >= result[2][1]


def test_dry_run_applies_the_memory_options_of_the_run(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "r", tiny.examples(8), **{"train.max_steps": 1, "train.gradient_checkpointing": 1})
    calls: list[Any] = []
    job.state.progress.recompute = True
    step = changed_step(job.step, checkpoint=lambda layers="all": calls.append(layers))
    job = replace(job, step=step)
    try_largest_batch(job, forecast(job, setting(job), 8 << 30), 1, start_peak("cpu"))
    assert calls == [1, "all"]


def test_forecast_searches_only_some_of_many_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny.job(
        tmp_path / "r", tiny.examples(8), **{"train.epochs": 1000, "train.batch_size": 4, "train.micro_batch": 4}
    )
    looked: list[int] = []
    cut = dry_run.micro_batches
    monkeypatch.setattr(dry_run, "micro_batches", lambda job, items: looked.append(len(items)) or cut(job, items))
    monkeypatch.setattr(microbatch, "MAX_ROWS", 40)
    forecast(job, setting(job), 8 << 30)
    assert looked == [4] * 10
    monkeypatch.setattr(microbatch, "MAX_ROWS", 1)  # at least one epoch
    forecast(job, setting(job), 8 << 30)
    assert looked[10:] == [4] * 2


@pytest.mark.parametrize(
    "options",
    [{}, {"train.batch_size": 16, "train.micro_batch_tokens": 64}, {"lora.dropout": 0.1, "train.micro_batch": 2}],
    ids=["one micro-batch", "several", "padded"],
)
def test_plan_predicts_the_memory_that_the_run_predicts(
    options: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    """Except for the padding of attention in fp32, which depends on the documents of each micro-batch."""
    rows_file = tmp_path / "rows.jsonl"
    texts = [("Say nothing but the words that follow: ", f"{row} " * (60 if row == 13 else 5)) for row in range(40)]
    rows_file.write_text("".join(json.dumps({"prompt": a + b, "completion": b}) + "\n" for a, b in texts))
    recipe = {"model": str(tiny_folder), "data": str(rows_file), "max_steps": 6, "model.dtype": "fp32", **options}
    run = strop.train(**recipe, out=str(tmp_path / "run"))
    predicted, planned = run.report["memory"]["predicted"]["train"]["parts"], strop.plan(**recipe).phases["train"].parts
    live, constant = ("saved_activations", "live_layer", "head"), ("weights", "adapters", "optimizer", "framework")
    assert sum(planned[part] for part in live) == pytest.approx(sum(predicted[part] for part in live), rel=0.2)
    assert all(planned[part] == predicted[part] for part in constant)


def test_plan_predicts_the_time_that_the_run_predicts(tiny_folder: Path, tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.jsonl"  # rows share a prefix, which is computed once
    texts = [("Say nothing but the words that follow, each of them once: ", f"{row} " * 5) for row in range(40)]
    rows_file.write_text("".join(json.dumps({"prompt": a + b, "completion": b}) + "\n" for a, b in texts))
    recipe = {"model": str(tiny_folder), "data": str(rows_file), "max_steps": 3, "model.dtype": "fp32"}
    run = strop.train(**recipe, out=str(tmp_path / "run"))
    assert run.report["predicted_seconds"] == pytest.approx(strop.plan(**recipe).seconds)
