"""Bad steps are skipped, rolled back or end the run; out of memory is retried; diagnosis of curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from strop.errors import DivergedError, MemoryLimitError, NonFiniteError
from strop.evaluation.diagnosis import diagnose
from strop.machine.memory import MemoryWatch, is_out_of_memory, load_measured, parse_memory
from strop.runs.events import read_events
from strop.training import guard
from strop.training.guard import Verdict, judge_step
from strop.training.loop import fit
from strop.training.state import Job, Progress
from tests.support import tiny
from tests.support.failures import curve, falling, starved
from tests.support.steps import changed_step


def with_loss(job: Job, change: Callable[[int, torch.Tensor], torch.Tensor]) -> Job:
    """Return the job with its token loss changed; `change` gets the number of the call, from 1."""
    good, calls = job.step.token_loss, iter(range(1, 10_000))
    return replace(job, step=changed_step(job.step, token_loss=lambda rows: change(next(calls), good(rows))))


def kinds(job: Job) -> list[str]:
    return [event["event"] for event in read_events(job.folder.events)]


def seen(*losses: float) -> Progress:
    progress = Progress()
    for loss in losses:
        judge_step(progress, loss, 1.0)
        progress.step += 1
    return progress


def test_no_loss_bound_before_enough_losses() -> None:
    progress = seen(*[1.0] * (guard.MIN_RECENT - 1))
    assert judge_step(progress, 1000.0, 1.0) is Verdict.GOOD


def test_three_doubtful_steps_in_a_row_roll_back() -> None:
    progress = seen(*[1.0, 1.1, 0.9, 1.05] * 5)
    assert [judge_step(progress, 2.5, 1.0) for _ in range(3)] == [Verdict.DOUBTFUL, Verdict.DOUBTFUL, Verdict.ROLL_BACK]
    progress = seen(*[1.0, 1.1, 0.9, 1.05] * 5)
    assert [judge_step(progress, loss, 1.0) for loss in (2.5, 2.5, 1.0, 2.5)][-2:] == [Verdict.GOOD, Verdict.DOUBTFUL]


def test_one_loss_far_beyond_the_bound_rolls_back() -> None:
    assert judge_step(seen(*[1.0, 1.1, 0.9, 1.05] * 5), 12.0, 1.0) is Verdict.ROLL_BACK


def test_noisy_and_tiny_losses_are_good() -> None:
    assert judge_step(seen(*[0.5, 3.0, 1.0, 2.5, 4.0] * 4), 8.0, 1.0) is Verdict.GOOD
    assert judge_step(seen(*[0.001] * 20), 0.4, 1.0) is Verdict.GOOD


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_non_finite_steps_are_never_applied(loss: float, norm: float) -> None:
    progress = Progress()
    assert [judge_step(progress, loss, norm) for _ in range(3)][::2] == [Verdict.NOT_FINITE, Verdict.ROLL_BACK]


def test_three_nan_steps_roll_back_skip_their_batches_and_lower_the_rate(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "r", tiny.examples(40), **{"train.max_steps": 12, "train.save_steps": 2})
    fit(with_loss(job, lambda call, loss: loss * (math.nan if call in (6, 7, 8) else 1.0)))
    events = read_events(job.folder.events)
    back = next(event for event in events if event["event"] == "rollback")
    assert (back["step"], back["to"], back["rate_scale"]) == (7, 4, guard.RATE_CUT)
    assert [batch["step"] for batch in back["passed"]] == [6, 7, 8] and len(back["passed"][0]["rows"]) == 8
    steps = [(event["step"], event["learning_rate"]) for event in events if event["event"] == "step"]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 5, 9, 10, 11, 12]
    assert steps[-1][1] == pytest.approx(guard.RATE_CUT * steps[0][1])
    assert job.state.progress.step == 12 and all(torch.isfinite(w).all() for w in job.state.weights.values())


def test_diverging_loss_rolls_back_once_then_raises(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "r", tiny.examples(40), **{"train.max_steps": 60, "train.save_steps": 5})
    with pytest.raises(DivergedError, match="far above") as raised:
        fit(with_loss(job, lambda call, loss: loss * (1.0 if call < 25 else 1.0 + 0.2 * (call - 24))))
    assert "--train.learning_rate 2.5e-05" in raised.value.fix  # 1e-3, times 0.25 by the rollback, divided by 10
    assert not isinstance(raised.value, NonFiniteError)
    assert kinds(job).count("rollback") == 1 and kinds(job)[-1] == "stop" and "doubt" in kinds(job)


def test_resumed_run_rolls_back_at_the_same_step(tmp_path: Path) -> None:
    """The guard's state is in the checkpoint: a run interrupted between two bad steps rolls back at the same step."""
    from strop.training import state

    options = {"train.max_steps": 12, "train.save_steps": 1}
    bad = {5: 1.0, 6: 1.0, 7: 1.0}
    whole = tiny.job(tmp_path / "whole", tiny.examples(40), **options)
    fit(with_loss(whole, lambda call, loss: loss * (math.nan if call in bad else 1.0)))
    cut = tiny.job(tmp_path / "cut", tiny.examples(40), **options)

    class Cut(Exception):
        pass

    def cutting(call: int, loss: torch.Tensor) -> torch.Tensor:
        if call == 7:
            raise Cut
        return loss * (math.nan if call in bad else 1.0)

    with pytest.raises(Cut):
        fit(with_loss(cut, cutting))
    again = tiny.job(tmp_path / "cut", tiny.examples(40), **options)
    state.restore_checkpoint(state.newest_checkpoint(again.folder, pytest.fail), again.state)
    assert again.state.progress.step == 4  # no doubtful state was saved
    fit(with_loss(again, lambda call, loss: loss * (math.nan if call in (1, 2, 3) else 1.0)))
    assert all(torch.equal(weight, whole.state.weights[name]) for name, weight in again.state.weights.items())


@pytest.mark.parametrize("options", [{}, {"train.micro_batch": None, "train.micro_batch_tokens": 400}])
def test_out_of_memory_retry_gives_the_same_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    train, more = tiny.examples(40), {"train.max_steps": 6, **options}
    whole, hungry = (tiny.job(tmp_path / name, train, **more) for name in ("whole", "hungry"))
    fit(whole)
    fit(starved(hungry, {3, 4}))
    shrunk = [event for event in read_events(hungry.folder.events) if event["event"] == "shrink"]
    assert len(shrunk) == 2 and "2 instead of 1" in shrunk[0]["to"] and "Tried to allocate" in shrunk[0]["why"]
    far = [(weight - whole.state.weights[name]).abs().max().item() for name, weight in hungry.state.weights.items()]
    assert max(far) < 1e-6 and hungry.state.progress.halvings >= 2


def test_out_of_memory_retry_uses_the_same_dropout(tmp_path: Path) -> None:
    """The micro-batches cannot shrink, so that only checkpointing changes and dropout must be the same."""
    options = {"train.max_steps": 4, "train.micro_batch": 1, "lora.dropout": 0.3}
    whole, hungry = (tiny.job(tmp_path / name, tiny.examples(16), **options) for name in ("whole", "hungry"))
    for job in (whole, starved(hungry, {12})):
        torch.manual_seed(3)
        fit(job)
    assert hungry.state.progress.recompute and hungry.state.progress.halvings == 0
    assert all(torch.equal(weight, whole.state.weights[name]) for name, weight in hungry.state.weights.items())


def test_out_of_memory_ends_with_checkpointing_then_an_error(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "r", tiny.examples(8), **{"train.max_steps": 2})
    requests: list[str] = []
    with pytest.raises(MemoryLimitError, match="smallest micro-batches") as raised:
        fit(starved(replace(job, memory_key="test"), set(range(1, 100)), requests))
    assert requests == ["recompute"] and raised.value.exit_code == 1
    assert load_measured("test") == {
        "micro_batch_tokens": None, "recompute": True, "offload": False, "streamed": False
    }  # fmt: skip


def test_out_of_memory_in_an_evaluation_is_retried(tmp_path: Path) -> None:
    options = {"train.max_steps": 2, "data.eval": "x", "train.eval_steps": 1}
    whole, hungry = (tiny.job(tmp_path / n, tiny.examples(8), tiny.examples(9, seed=4), **options) for n in "ab")
    fit(whole)
    fit(starved(hungry, {2}))
    losses = [[e["loss"] for e in read_events(job.folder.events) if e["event"] == "eval"] for job in (whole, hungry)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_other_runtime_errors_are_not_out_of_memory(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "r", tiny.examples(8))

    def broken(rows: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        fit(replace(job, step=changed_step(job.step, token_loss=broken)))
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shapes"))
    for text in (
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830',
    ):
        assert is_out_of_memory(RuntimeError(text)), text


def test_memory_watch_raises_before_the_limit() -> None:
    watch = MemoryWatch(1 << 40, 1 << 40)
    watch.begin()
    watch()
    tight = MemoryWatch(1 << 20, 1 << 40)
    tight.begin()
    with pytest.raises(MemoryError, match="allowed"):
        tight()


def test_parse_bytes_accepts_units_and_refuses_nonsense() -> None:
    assert (parse_memory("8GB"), parse_memory("512MiB"), parse_memory("2000000")) == (
        8_000_000_000,
        512 << 20,
        2_000_000,
    )
    from strop.errors import RecipeError

    for wrong in ("much", "-1GB", "0"):
        with pytest.raises(RecipeError, match="not a size"):
            parse_memory(wrong)
    for wrong in ("8", "5KB", "1000"):
        with pytest.raises(RecipeError, match=r"only .* bytes"):
            parse_memory(wrong)


def test_diagnosis_of_a_good_run_is_empty() -> None:
    events = curve("step", falling(3.0, 1.0)) + curve("eval", {20: 2.0, 40: 1.6, 60: 1.5})
    assert diagnose(events, 0.01) == []


def test_diagnosis_tells_a_spike_from_a_flat_loss() -> None:
    losses = [19.78, 18.74, 17.92, 13.55, 5.94, 5.72, 4.98, 5.04, 4.19, 3.8]
    losses += [3.38, 2.37, 3.22, 3.94, 2.94, 5.35, 15.59, 11.76, 6.36, 5.61]
    (result,) = diagnose(curve("step", dict(enumerate(losses, 1))), 0.01)
    assert (
        result.startswith("unstable: the training loss fell from 15.186 to") and "lower train.learning_rate" in result
    )


def test_diagnosis_says_if_no_update_was_applied() -> None:
    events = [{"event": "skip", "step": step, "why": "loss is not finite"} for step in range(1, 5)]
    assert diagnose(events, 0.0) == [
        "nothing was trained: all 4 updates were skipped, because the loss or a gradient was not finite"
    ]


def test_diagnosis_reports_overfitting() -> None:
    events = curve("step", falling(3.0, 0.2)) + curve("eval", {20: 1.5, 40: 1.9, 60: 2.6})
    (result,) = diagnose(events, 0.01)
    assert result.startswith("overfitting: the evaluation loss rose from 1.500 (step 20, kept) to 2.600")


def test_diagnosis_reports_a_flat_loss_with_its_cause() -> None:
    flat = curve("step", falling(2.0, 2.0))
    assert "learning rate is too small" in diagnose(flat, 1e-6)[0]
    assert "strop check" in diagnose(flat, 0.02)[0]


DIVERGED = (10.0, 15.0, 138.0)


@pytest.mark.parametrize(
    "losses",
    [
        DIVERGED,
        [2.3, 2.1, 2.5, 4.0, 8.0, 9.5, 8.6, 9.1, 8.8, 8.9],
        [2.0 + 0.1 * (n % 3) for n in range(20)] + [0.4 * n for n in range(6, 20)],
        [3.0 - 0.1 * n for n in range(20)] + [7.0 + n % 2 for n in range(20)],  # it fell at first
    ],
)
def test_diagnosis_reports_a_rising_loss(losses: Sequence[float]) -> None:
    events = [{**event, "learning_rate": 0.5} for event in curve("step", dict(enumerate(losses, 1)))]
    (result,) = diagnose(events, 0.01)
    assert result.startswith("diverging: the training loss rose from ") and "for example to 0.05 (see" in result


def test_noisy_losses_are_not_reported_as_rising() -> None:
    """Losses of batches with one row, which training does not change: an extreme case of a healthy run."""
    sources = {
        "gauss": lambda random: max(0.01, random.gauss(2.0, 0.8)),
        "lognormal": lambda random: math.exp(random.gauss(0.0, 1.0)),
        "one-token answers": lambda random: random.choice((0.05, 0.1, 2.0, 3.0, 4.0)),
    }
    random, numbers = Random(0), (2, 3, 4, 6, 8, 12, 19, 20, 40, 300)
    runs = [
        (name, n, [sources[name](random) for _ in range(n)]) for name in sources for n in numbers for _ in range(50)
    ]
    wrong = [
        (name, n) for name, n, losses in runs
        if any("rose" in text for text in diagnose(curve("step", dict(enumerate(losses, 1))), 0.01))
    ]  # fmt: skip
    assert len(wrong) <= len(runs) / 500, wrong


def test_steps_with_kept_rows_only_are_no_rise() -> None:
    """Their loss is a small divergence, so the next step would look like a rise."""
    events = [{"event": "step", "step": 1, "loss": 0.02, "kept": 0.02}, *curve("step", {2: 12.0, 3: 11.0})]
    assert diagnose(events, 0.01) == []


def test_diagnosis_reports_out_of_memory() -> None:
    events = [{"event": "shrink", "step": 3, "to": "micro-batches of 512 tokens, 2 in place of 1", "why": "x"}]
    assert "out of memory: continued with micro-batches of 512 tokens" in diagnose(events, None)[0]


def test_skipped_steps_do_not_count_against_patience(tmp_path: Path) -> None:
    """Unchanged weights have the same loss, which does not show that training no longer improves."""
    options = {"train.max_steps": 4, "data.eval": "x", "train.eval_steps": 1, "train.early_stopping": 2}
    job = tiny.job(tmp_path / "r", tiny.examples(40), tiny.examples(8, seed=1), **options)
    data_kind = iter(range(1, 10))

    def change(call: int, loss: torch.Tensor) -> torch.Tensor:
        return loss * (math.nan if torch.is_grad_enabled() and next(data_kind) in (2, 3) else 1.0)

    fit(with_loss(job, change))
    assert kinds(job).count("skip") == 2 and job.state.progress.step == 4
