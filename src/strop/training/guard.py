"""Keeps a bad step from the weights: looks at each loss and gradient norm before the optimizer moves.

It adds no work on the device: both numbers are read once a step anyway. Its whole memory is in Progress, so that a
resumed run decides as the unbroken one would have.
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

IN_A_ROW = 3  # bad steps in a row that call for more than passing them over
RATE_CUT = 0.25  # what the learning rate is multiplied by after a roll-back
RECENT = 64  # good losses that the bound is made of
ENOUGH = 16  # of them, before there is a bound
SIGMAS, NATS = 8.0, 1.0  # the bound lies this far above their median, whichever is more
FALLEN = 1.0  # nats a token that good answers may lose before it is told
MOST_OFF = 0.1  # nats a token between the engine that drew an answer and the step
SAME = 1e-6
FAR = 10.0  # one loss beyond this many times that distance is enough


class Verdict(Enum):
    """What becomes of a step. DOUBTFUL: the loss is beyond the bound, the step is still taken."""

    GOOD = "good"
    DOUBTFUL = "doubtful"
    NOT_FINITE = "not finite"
    ROLL_BACK = "roll back"


class Diverged(Exception):
    """The run must go back to its last good checkpoint. `progress.streak` holds the steps to blame."""

    def __init__(self, why: str, *, finite: bool) -> None:
        super().__init__(why)
        self.why = why
        self.finite = finite


def look(progress: Progress, loss: float, grad_norm: float) -> Verdict:
    """The verdict on the step that is about to be taken, noted in `progress`."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        verdict = Verdict.NOT_FINITE
    else:
        middle, reach = _bound(progress.recent)
        if loss <= middle + reach:
            progress.recent = [*progress.recent[-RECENT + 1 :], loss]
            progress.streak = []
            return Verdict.GOOD
        verdict = Verdict.ROLL_BACK if loss > middle + FAR * reach else Verdict.DOUBTFUL
    progress.streak = [*progress.streak, progress.step]
    return Verdict.ROLL_BACK if len(progress.streak) >= IN_A_ROW else verdict


def _bound(recent: list[float]) -> tuple[float, float]:
    """(median, distance) of good losses; the spread is the median absolute deviation, which outliers do not move."""
    if len(recent) < ENOUGH:
        return 0.0, math.inf
    middle = statistics.median(recent)
    spread = 1.4826 * statistics.median(abs(loss - middle) for loss in recent)
    return middle, max(SIGMAS * spread, NATS)


def advice(progress: Progress, rate: float, dtype: str, trouble: Diverged) -> list[str]:
    """What the numbers say about the cause, most likely first. rate: the learning rate of the last step."""
    said = []
    rising = len(progress.recent) >= 4 and statistics.mean(progress.recent[-2:]) > 1.5 * min(progress.recent)
    if dtype == "fp16":
        said.append("fp16 overflows above 65,504: use --model.dtype bf16 or fp32")
    if trouble.finite or rising or not progress.recent:
        said.append(f"the learning rate may be too high: try --train.learning_rate {rate / 10:.2g}")
    if not trouble.finite:
        said.append("the same rows each time (events.jsonl names them) mean that the rows are the cause")
        said.append("a base that gives NaN on its own is damaged or of the wrong type: try --model.dtype fp32")
    return said


@contextmanager
def moving(state: TrainState, grad_norm: float, *, watched: bool, quiet: bool = False) -> Iterator[None]:
    """Around the optimizer's step: the first one of an objective of answers must move the adapters. Its loss says
    nothing of that: it is the same for any model that equals its reference.

    quiet: a gradient of zero is as it should be, since no reward differs.
    Raises RunError for a gradient of zero, or weights that the step leaves as they are.
    """
    first = watched and state.progress.step == 0 and bool(grad_norm or not quiet)
    before = [weight.detach().clone() for weight in state.weights.values()] if first else []
    yield
    if not first:
        return
    where = "the objective does not reach the weights"
    if not grad_norm:
        raise RunError(f"the gradient of the first step is zero: {where}", fix="please report it")
    if all(torch.equal(old, new) for old, new in zip(before, state.weights.values(), strict=True)):
        raise RunError("the first step has moved no weight", fix="raise --train.learning_rate")


def drawn_right(progress: Progress, figures: Mapping[str, float], grad_norm: float) -> None:
    """Before the update on answers that the model drew itself: the step finds them as likely as the engine that drew
    them did, the model equals its reference at the beginning, and rewards that differ have a gradient.

    Raises RunError.
    """
    if "off" not in figures:
        return
    if figures["off"] > MOST_OFF:
        what = (
            f"step {progress.step + 1}: the answers' log-probabilities differ by {figures['off']:.3f} nats a token "
            f"between the engine that drew them and the step, more than {MOST_OFF:g}"
        )
        raise RunError(what, fix="use --model.dtype fp32; if it happens again, please report it")
    if not progress.step and figures.get("kl", 0.0) > SAME:
        what = f"before the first step the divergence from the reference is {figures['kl']:.2e}, not 0"
        raise RunError(what, fix="start the run again; if it happens again, please report it")
    if figures["equal_groups"] < 1 and not grad_norm:
        what = f"step {progress.step + 1}: rewards differ and the gradient is zero: it does not reach the weights"
        raise RunError(what, fix="please report it")


def unheard(progress: Progress, figures: Mapping[str, float]) -> str | None:
    """That a step's rewards teach nothing, as all answers of each group got the same; once for each cause."""
    if figures.get("equal_groups", 0.0) < 1:
        return None
    cut_off = figures["stop_rate"] == 0
    if (cause := "cut off" if cut_off else "equal rewards") in progress.told:
        return None
    progress.told = [*progress.told, cause]
    said = f"all answers of each group got the same reward (mean {figures['reward']:.3g}): nothing is learned from them"
    if cut_off:
        return f"{said}; every answer was cut off at its longest: raise --train.answer_tokens"
    return f"{said}; prompts that are sometimes answered well teach more, as do rewards with steps between 0 and 1"


def falling(progress: Progress, figures: Mapping[str, float]) -> str | None:
    """That good answers become less likely, once: both sides may fall while the margin between them grows."""
    name = next((name for name in ("chosen", "desirable") if f"{name}_change" in figures), None)
    if name is None or name in progress.told or figures[f"{name}_change"] > -FALLEN:
        return None
    progress.told = [*progress.told, name]
    fix = "a lower learning rate or a larger --train.beta keeps the model nearer to its start"
    if name == "chosen":
        fix = f"--train.sft_weight 1 holds them up; {fix}"
    return f"{name} answers are {-figures[f'{name}_change']:.1f} nats a token less likely than at the start: {fix}"
