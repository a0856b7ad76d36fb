"""The loop compared with transformers.Trainer, and with other micro-batches, resumes and optimizers."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import strop
from strop.data.types import Example
from strop.errors import NonFiniteError, Stopped
from strop.runs.events import read_events
from strop.training import loop, state
from strop.training.gradients import micro_batches
from strop.training.loop import _seconds_left, fit, parse_seconds
from strop.training.optim import rate_factor, warmup_steps
from strop.training.state import Job, batch_stream
from tests.support import tiny
from tests.support.steps import changed_step


def values(job: Job) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in job.state.weights.items()}


def losses(job: Job) -> list[float]:
    return [event["loss"] for event in read_events(job.folder.events) if event["event"] == "step"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # the Trainer's default
def test_same_losses_and_weights_as_transformers_trainer(tmp_path: Path) -> None:
    """fp32, 20 steps, accumulation 4, rows of various lengths: loss within 1e-5, every adapter weight within 1e-4."""
    train = tiny.examples(40)
    ours = tiny.job(tmp_path / "ours", train, **{"train.max_steps": 20, "train.micro_batch": 2})
    theirs = tiny.job(tmp_path / "theirs", train)
    order = [row for batch in batch_stream(ours.recipe, len(train)) for row in batch.rows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"), max_steps=20, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
        logging_nan_inf_filter=False, optim="adamw_torch", dataloader_pin_memory=False,
    )  # fmt: skip

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=theirs.model, args=arguments, train_dataset=[train[row] for row in order], data_collator=_collate
    )
    trainer.train()
    fit(ours)
    their_losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(their_losses) == len(losses(ours)) == 20
    assert max(abs(a - b) for a, b in zip(their_losses, losses(ours), strict=True)) < 1e-5
    their_values = values(theirs)
    assert max((their_values[name] - weight).abs().max().item() for name, weight in values(ours).items()) < 1e-4
    assert losses(ours)[-1] < losses(ours)[0]


def _collate(rows: list[Example]) -> dict[str, torch.Tensor]:
    longest = max(len(row) for row in rows)
    batch = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    tensors = {name: torch.full((len(rows), longest), pad, dtype=torch.long) for name, pad in batch.items()}
    for place, row in enumerate(rows):
        ids = torch.from_numpy(row.ids.astype(np.int64))
        tensors["input_ids"][place, : len(row)] = ids
        tensors["attention_mask"][place, : len(row)] = 1
        tensors["labels"][place, : len(row)] = torch.where(torch.from_numpy(row.weights > 0), ids, -100)
    return tensors


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "cut",
    [
        {"train.micro_batch": 1},
        {"train.micro_batch": 2},
        {"train.micro_batch": 4},
        {"train.micro_batch": None, "train.micro_batch_tokens": 60},
    ],
)
def test_micro_batches_of_any_size_give_the_same_gradient(tmp_path: Path, cut: dict[str, Any], packed: bool) -> None:
    """1x8, 2x4 and 4x2 compared with 8x1: nonzero gradients within 1e-5."""
    train = tiny.examples(8)

    def gradients(name: str, **options: Any) -> dict[str, torch.Tensor]:
        job = _packed(tiny.job(tmp_path / name, train, **options), packed)
        result: dict[str, torch.Tensor] = {}
        job.state.optimizer.step = lambda: result.update({n: w.grad.clone() for n, w in job.state.weights.items()})  # type: ignore[method-assign]
        loop.train_step(job, next(iter(batch_stream(job.recipe, 8))), 1e-3)
        return result

    whole, pieces = gradients("whole"), gradients("pieces", **cut)
    parts = micro_batches(_packed(tiny.job(tmp_path / "cut", train, **cut), packed), train)
    assert len(parts) > 1 and sorted(i for part in parts for i in part) == list(range(8))
    assert whole and max(gradient.abs().max().item() for gradient in whole.values()) > 1e-3
    assert max((whole[name] - pieces[name]).abs().max().item() for name in whole) < 1e-5


def _packed(job: Job, packed: bool) -> Job:
    return replace(job, step=changed_step(job.step, name="fast" if packed else "plain", packed=packed))


@pytest.mark.parametrize("stop_after", range(1, 12))
def test_resumed_at_any_step_is_bit_identical(tmp_path: Path, stop_after: int) -> None:
    """12 steps over 2.4 epochs with dropout 0.1 and accumulation, stopped after each step in turn."""
    options = {"train.max_steps": 12, "lora.dropout": 0.1, "train.micro_batch": 3, "train.warmup": 3}
    train = tiny.examples(40)
    unbroken = tiny.job(tmp_path / "unbroken", train, **options)
    fit(unbroken)
    first = tiny.job(tmp_path / "broken", train, **options)
    numbers = iter(range(1, 100))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "stop_signals", _after(stop_after, numbers))
        fit(first)
    second = tiny.job(tmp_path / "broken", train, **options)
    torch.manual_seed(12345)  # a new process has another random state
    state.restore_checkpoint(state.newest_checkpoint(second.folder, pytest.fail), second.state)
    assert second.state.progress.step == stop_after
    fit(second)
    expected = values(unbroken)
    assert all(torch.equal(weight, expected[name]) for name, weight in values(second).items())
    assert losses(second) == losses(unbroken)


OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "lion", "sgd")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_optimizer_learns_and_resumes_bit_identically(tmp_path: Path, optimizer: str) -> None:
    """At r 128, weights have more than 4,096 elements, which the 8-bit optimizer stores in 8 bits."""
    rate = {"sgd": 0.5, "lion": 3e-4}.get(optimizer, 2e-3)
    options = {"train.max_steps": 8, "train.optimizer": optimizer, "train.learning_rate": rate, "lora.r": 128}
    train = tiny.examples(8)  # each step sees all rows
    unbroken, first, second = (tiny.job(tmp_path / name, train, **options) for name in ("whole", "cut", "cut"))
    fit(unbroken)
    assert losses(unbroken)[-1] < losses(unbroken)[0] - 0.01
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "stop_signals", _after(4, iter(range(1, 100))))
        fit(first)
    state.restore_checkpoint(state.newest_checkpoint(second.folder, pytest.fail), second.state)
    fit(second)
    expected = values(unbroken)
    assert all(torch.equal(weight, expected[name]) for name, weight in values(second).items())
    for weight in first.state.weights.values():
        optimizer_state = first.state.optimizer.state.get(weight, {})
        if optimizer == "adamw_8bit" and weight.numel() >= 4096:
            assert optimizer_state["state1"].dtype == torch.uint8


def test_paged_optimizer_without_cuda_becomes_8_bit_and_sgd_needs_a_rate(
    tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    import strop

    words = {"model": str(tiny_folder), "data": str(rows_file), "train.max_steps": 2}
    run = strop.train(**words, out=tmp_path / "paged", **{"train.optimizer": "paged_adamw_8bit"})
    chosen = next(choice for choice in run.report["recipe"] if choice["field"] == "train.optimizer")
    assert chosen["value"] == "adamw_8bit" and chosen["origin"] == "plan" and "CUDA" in chosen["why"]
    with pytest.raises(strop.InputError, match="no rule for its learning rate"):
        strop.train(**words, out=tmp_path / "sgd", **{"train.optimizer": "sgd"})


def _after(step: int, numbers: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def signals() -> Any:
        yield lambda: next(numbers) >= step

    return signals


def test_dropout_is_active_and_seeded(tmp_path: Path) -> None:
    train = tiny.examples(8)
    plain = tiny.job(tmp_path / "a", train, **{"train.max_steps": 2})
    dropped = tiny.job(tmp_path / "b", train, **{"train.max_steps": 2, "lora.dropout": 0.5})
    again = tiny.job(tmp_path / "c", train, **{"train.max_steps": 2, "lora.dropout": 0.5})
    for job in (plain, dropped, again):
        torch.manual_seed(1)
        fit(job)
    assert losses(dropped) == losses(again) != losses(plain)


def test_non_finite_step_never_reaches_the_weights(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "nan", tiny.examples(8), **{"train.max_steps": 5})
    before, calls = values(job), iter(range(100))
    good = job.step.token_loss

    def bad_at_second(rows: Any) -> torch.Tensor:
        return good(rows) * (math.nan if next(calls) == 1 else 1.0)

    fit(_with(job, bad_at_second))
    events = read_events(job.folder.events)
    assert [event["step"] for event in events if event["event"] == "skip"] == [2]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 3, 4, 5]
    assert all(torch.isfinite(weight).all() for weight in values(job).values())
    assert any(not torch.equal(weight, before[name]) for name, weight in values(job).items())
    assert job.state.progress.skipped_steps == 1


def test_three_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "nan", tiny.examples(8), **{"train.max_steps": 9})
    before, good = values(job), job.step.token_loss
    with pytest.raises(NonFiniteError, match="3 bad steps in a row"):
        fit(_with(job, lambda rows: good(rows) * math.nan))
    assert all(torch.equal(weight, before[name]) for name, weight in values(job).items())


def _with(job: Job, token_loss: Any) -> Job:
    return replace(job, step=changed_step(job.step, token_loss=token_loss))


def test_evaluation_keeps_the_best_and_stops_early(tmp_path: Path) -> None:
    """The learning rate is far too large, so the loss rises, the best step is the first, and patience ends the run."""
    options = {"train.epochs": 20, "train.learning_rate": 0.5, "data.eval": "unused", "train.early_stopping": 2}
    job = tiny.job(tmp_path / "early", tiny.examples(16), tiny.examples(6, seed=9), **options)
    fit(job)
    evals = [event for event in read_events(job.folder.events) if event["event"] == "eval"]
    best = min(range(len(evals)), key=lambda n: evals[n]["loss"])
    assert job.state.progress.best_step == evals[best]["step"]
    assert job.folder.checkpoint(evals[best]["step"]).is_dir()
    assert len(evals) == best + 1 + 2 < 20


def test_evaluation_does_not_change_training(tmp_path: Path) -> None:
    train, held_out = tiny.examples(16), tiny.examples(5, seed=3)
    plain = tiny.job(tmp_path / "a", train, **{"train.max_steps": 4, "lora.dropout": 0.1})
    torch.manual_seed(7)
    fit(plain)
    watched = tiny.job(
        tmp_path / "b",
        train,
        held_out,
        **{"train.max_steps": 4, "lora.dropout": 0.1, "data.eval": "x", "train.eval_steps": 1},
    )
    torch.manual_seed(7)
    fit(watched)
    assert losses(plain) == losses(watched)


def test_sigterm_finishes_the_step_and_saves(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "term", tiny.examples(16), **{"train.max_steps": 50})
    good, calls = job.step.token_loss, iter(range(1000))

    def interrupted(rows: Any) -> Any:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return good(rows)

    with pytest.raises(Stopped) as stopped:
        fit(_with(job, interrupted))
    assert stopped.value.exit_code == 130
    assert [step for step, _ in job.folder.checkpoints()][-1] == 4
    assert state.checkpoint_error(job.folder.checkpoint(4)) is None


def test_time_budget_ends_with_a_saved_state(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "time", tiny.examples(16), **{"train.epochs": 1000, "train.max_time": "0.2s"})
    fit(job)
    assert 0 < job.state.progress.step < 2000
    assert job.folder.checkpoints()[-1][0] == job.state.progress.step


def test_checkpoints_are_pruned_and_damaged_ones_skipped(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "keep", tiny.examples(16), **{"train.max_steps": 6, "train.save_steps": 1})
    fit(job)
    assert [step for step, _ in job.folder.checkpoints()] == [5, 6]
    newest = job.folder.checkpoint(6)
    data = bytearray((newest / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "weights.safetensors").write_bytes(data)
    notes: list[str] = []
    assert state.newest_checkpoint(job.folder, notes.append) == job.folder.checkpoint(5)
    assert len(notes) == 1 and "weights.safetensors is damaged" in notes[0]


def test_lora_plus_moves_b_faster(tmp_path: Path) -> None:
    train = tiny.examples(8)
    moved = {}
    for ratio in (1.0, 16.0):
        job = tiny.job(tmp_path / str(ratio), train, **{"train.max_steps": 1, "train.lora_plus_ratio": ratio})
        before = values(job)
        fit(job)
        change = {name: (weight - before[name]).abs().mean().item() for name, weight in values(job).items()}
        moved[ratio] = [sum(c for name, c in change.items() if part in name) for part in ("lora_A", "lora_B")]
    assert moved[16.0][0] == pytest.approx(moved[1.0][0], rel=1e-3)
    assert moved[16.0][1] == pytest.approx(16 * moved[1.0][1], rel=1e-2)


def test_learning_rate_schedules_and_durations() -> None:
    assert [rate_factor(step, 10, 2, "linear") for step in (0, 1, 2, 6)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])
    assert rate_factor(5, 10, 0, "cosine") == pytest.approx(0.5)
    assert rate_factor(9, 10, 0, "constant") == 1.0
    assert warmup_steps(0.03, 100) == 3 and warmup_steps(5, 100) == 5 and warmup_steps(0, 100) == 0
    assert [parse_seconds(text) for text in ("90s", "30m", "2h", "1.5d", "7")] == [90, 1800, 7200, 129600, 7]


def test_adapter_loads_in_plain_peft_with_the_same_logits(tmp_path: Path) -> None:
    from strop.models.adapters import save_adapter

    job = tiny.job(tmp_path / "run", tiny.examples(16), **{"train.max_steps": 5})
    fit(job)
    job.model.config._name_or_path = "tiny"
    save_adapter(job.model, tiny.tokenizer("chatml"), tmp_path / "adapter", {})  # type: ignore[arg-type]
    theirs = peft.PeftModel.from_pretrained(tiny.model(), str(tmp_path / "adapter")).eval()
    job.model.eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours_logits, their_logits, base_logits = job.model(ids).logits, theirs(ids).logits, tiny.model()(ids).logits
    assert (ours_logits - their_logits).abs().max() < 1e-5
    assert (ours_logits - base_logits).abs().max() > 1e-3


def test_time_left_includes_the_evaluations_and_samples_that_follow() -> None:
    progress = SimpleNamespace(seconds=8.0, eval_seconds=306.0, compile_seconds=300.0)
    train = SimpleNamespace(eval_steps=2, batch_size=1, epochs=1.0, max_steps=None)
    recipe = SimpleNamespace(train=train, seed=0)
    job: Any = SimpleNamespace(state=SimpleNamespace(progress=progress), eval=[1], recipe=recipe, train=[1] * 8)
    assert _seconds_left(job, 4, 8) == 4 * 2 + 3 * 6  # step 4 is followed by the second of four evaluations
    progress.eval_seconds = progress.compile_seconds = 0.0
    assert _seconds_left(job, 2, 8) == 6 * 4  # not known before the first one
    job.eval = None
    assert _seconds_left(job, 4, 8) == 4 * 2


def test_evaluation_and_samples_report_how_far_they_are(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "strop")
    options: dict[str, Any] = {"eval": rows_file, "max_steps": 1, "batch_size": 4, "dtype": "fp32", "lora": {"r": 4}}
    strop.train(model=tiny_folder, data=rows_file, out=tmp_path / "run", progress=False, **options)
    assert any(re.match(r"evaluating: 0 of \d+ batches", message) for message in caplog.messages)
    sampled = [message for message in caplog.messages if message.startswith("sampling: ")]
    assert sampled[0] == "sampling: 0 of 4 completions" and sampled[-1] == "sampling: 4 of 4 completions"
