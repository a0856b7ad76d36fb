"""Detect bad steps from the loss and the gradient norm, before the optimizer's update.

The state of the checks is part of Progress, so that a resumed run makes the same decisions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING

import torch

from strop.errors import RunError

if TYPE_CHECKING:
    from strop.training.state import Progress, TrainState

FIRST_LOSS_SCALE, SCALE_GROWTH_STEPS = 2.0**16, 2000  # as in torch.amp.GradScaler (arXiv:1710.03740)
MAX_STREAK = 3  # consecutive bad steps that cause a rollback
RATE_CUT = 0.25  # factor of the learning rate after a rollback
MAX_RECENT = 64  # number of good losses from which the bound is computed
MIN_RECENT = 16  # minimum number of good losses to compute a bound
BOUND_SIGMAS, MIN_BOUND_NATS = 8.0, 1.0  # distance of the bound from the median loss is the larger of the two
MAX_LIKELIHOOD_DROP = 1.0  # decrease in log-probability of good answers that causes a warning, in nats per token
MAX_LOGPROB_GAP = 0.1  # maximum difference between the sampling engine and the training step, in nats per token
MAX_START_KL = 1e-6  # maximum KL divergence from the reference before the first step
ROLLBACK_FACTOR = 10.0  # multiple of the distance above which a loss causes a rollback at once


class Verdict(Enum):
    GOOD = "good"
    DOUBTFUL = "doubtful"  # the loss is above the bound, but the update is applied
    NOT_FINITE = "not finite"
    ROLL_BACK = "roll back"


class Diverged(Exception):
    """Raised when the run must return to its last good checkpoint."""

    def __init__(self, why: str, *, finite: bool) -> None:
        super().__init__(why)
        self.why = why
        self.finite = finite


def judge_step(progress: Progress, loss: float | None, grad_norm: float) -> Verdict:
    """Judge a step before its update, and record the result in `progress`. loss: None for a step without own rows."""
    if not (math.isfinite(loss or 0.0) and math.isfinite(grad_norm)):
        verdict = Verdict.NOT_FINITE
    elif loss is None:
        return Verdict.GOOD
    else:
        median, distance = _loss_bound(progress.recent)
        if loss <= median + distance:
            progress.recent = [*progress.recent[-MAX_RECENT + 1 :], loss]
            progress.streak = []
            return Verdict.GOOD
        verdict = Verdict.ROLL_BACK if loss > median + ROLLBACK_FACTOR * distance else Verdict.DOUBTFUL
    progress.streak = [*progress.streak, progress.step]
    return Verdict.ROLL_BACK if len(progress.streak) >= MAX_STREAK else verdict


def lower_loss_scale(progress: Progress, loss: float, grad_norm: float) -> bool:
    """Halve the loss scale if gradients overflow in fp16, and return whether the step must be computed again."""
    if progress.loss_scale <= 1 or math.isfinite(grad_norm) or not math.isfinite(loss):
        return False
    progress.loss_scale, progress.scale_steps = progress.loss_scale / 2, 0
    return True


def raise_loss_scale(progress: Progress) -> None:
    """Count a step in fp16, and double the loss scale after SCALE_GROWTH_STEPS without an overflow."""
    progress.scale_steps += 1
    if progress.scale_steps >= SCALE_GROWTH_STEPS:
        progress.loss_scale, progress.scale_steps = progress.loss_scale * 2, 0


def _loss_bound(recent: list[float]) -> tuple[float, float]:
    """Return the median of good losses and the distance of the bound, from their median absolute deviation."""
    if len(recent) < MIN_RECENT:
        return 0.0, math.inf
    median = statistics.median(recent)
    spread = 1.4826 * statistics.median(abs(loss - median) for loss in recent)
    return median, max(BOUND_SIGMAS * spread, MIN_BOUND_NATS)


def suggest_fixes(progress: Progress, rate: float, dtype: str, diverged: Diverged) -> list[str]:
    """Return fixes for a diverged run, the most likely first. rate: the learning rate of the last step."""
    fixes = []
    rising = len(progress.recent) >= 4 and statistics.mean(progress.recent[-2:]) > 1.5 * min(progress.recent)
    if dtype == "fp16":
        fixes.append("fp16 overflows above 65,504: use --model.dtype bf16 or fp32")
    if diverged.finite or rising or not progress.recent:
        fixes.append(f"the learning rate may be too high: try --train.learning_rate {rate / 10:.2g}")
    if not diverged.finite:
        fixes.append("if it is the same rows each time (see events.jsonl), these rows are the cause")
        fixes.append("a base that gives NaN without training is damaged or needs another dtype: try --model.dtype fp32")
    return fixes


@contextmanager
def check_update(state: TrainState, grad_norm: float, *, enabled: bool, zero_expected: bool = False) -> Iterator[None]:
    """Raise RunError if the first optimizer step, inside this block, changes no weights.

    zero_expected: the gradient may be zero, because all rewards are equal.
    """
    check = enabled and state.progress.step == 0 and bool(grad_norm or not zero_expected)
    before = [weight.detach().clone() for weight in state.weights.values()] if check else []
    yield
    if not check:
        return
    if not grad_norm:
        what = "the gradient of the first step is zero: the objective does not depend on the weights"
        raise RunError(what, fix="please report it")
    if all(torch.equal(old, new) for old, new in zip(before, state.weights.values(), strict=True)):
        raise RunError("the first step did not change any weight", fix="raise --train.learning_rate")


def check_rollouts(progress: Progress, metrics: Mapping[str, float], grad_norm: float) -> None:
    """Raise RunError if metrics of sampled completions show a bug, before the update."""
    if "off" not in metrics:
        return
    if metrics["off"] > MAX_LOGPROB_GAP:
        what = (
            f"step {progress.step + 1}: log-probabilities of completions differ by {metrics['off']:.3f} nats per token "
            f"between the engine that sampled them and the training step, more than {MAX_LOGPROB_GAP:g}"
        )
        raise RunError(what, fix="use --model.dtype fp32; if it happens again, please report it")
    if not progress.step and metrics.get("kl", 0.0) > MAX_START_KL:
        what = f"before the first step the KL divergence from the reference is {metrics['kl']:.2e}, not 0"
        raise RunError(what, fix="start the run again; if it happens again, please report it")
    if metrics.get("equal_groups", 0.0) < 1 and not grad_norm:
        what = f"step {progress.step + 1}: rewards differ, but the gradient is zero"
        raise RunError(what, fix="please report it")


def equal_rewards_warning(progress: Progress, metrics: Mapping[str, float]) -> str | None:
    """Return a warning if the rewards in each group are equal, once per cause."""
    if metrics.get("equal_groups", 0.0) < 1 or "teacher_kl" in metrics:
        return None
    cut_off = metrics["stop_rate"] == 0
    if (cause := "cut off" if cut_off else "equal rewards") in progress.told:
        return None
    progress.told = [*progress.told, cause]
    text = f"all completions of each group have the same reward (mean {metrics['reward']:.3g}): nothing is learned"
    if cut_off:
        return f"{text}; every completion reached the length limit: raise --train.answer_tokens"
    return f"{text}; use prompts that are sometimes answered well, or rewards with values between 0 and 1"


def likelihood_drop_warning(progress: Progress, metrics: Mapping[str, float]) -> str | None:
    """Return a warning, once per run, if good answers become less likely, even if the margin grows."""
    name = next((name for name in ("chosen", "desirable") if f"{name}_change" in metrics), None)
    if name is None or name in progress.told or metrics[f"{name}_change"] > -MAX_LIKELIHOOD_DROP:
        return None
    progress.told = [*progress.told, name]
    fix = "a lower learning rate or a larger --train.beta keeps the model closer to the reference"
    if name == "chosen":
        fix = f"--train.sft_weight 1 prevents it; {fix}"
    return f"{name} answers are {-metrics[f'{name}_change']:.1f} nats per token less likely than at the start: {fix}"
