"""What every objective is made of: the log-probabilities of answers, and losses from them. No model, no loop.

Torch is imported where it computes: the plan reads the objectives' facts without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strop.config.schema import TrainSection
from strop.data.types import DataKind

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """One answer of each of N units, all of shape (N,) and fp64.

    sums: its log-probability, summed over its supervised tokens (by weight), differentiable. counts: their number (by
    weight). reference: the same sum under the model as it was when training began; 0 where an objective has none.
    """

    sums: Tensor
    counts: Tensor
    reference: Tensor

    @property
    def mean(self) -> Tensor:
        """Log-probability a token."""
        return self.sums / self.counts

    @property
    def change(self) -> Tensor:
        """How much likelier the answer has become since training began, in nats."""
        return self.sums - self.reference


@dataclass(frozen=True)
class Judged:
    """What an objective is given. answers: chosen and rejected, or the one that was judged. desirable (N,): bool, the
    judgements. level: what `before` gave for the whole effective batch."""

    answers: tuple[Answers, ...]
    desirable: Tensor
    level: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """losses (N,): of each unit, to be divided by their number. rewards: what the objective makes of each answer, (N,)
    each; the larger, the better."""

    losses: Tensor
    rewards: tuple[Tensor, ...]


@dataclass(frozen=True)
class Objective:
    """One way to learn from comparisons, judgements or rewards. loss: of Judged an Outcome; of drawn tokens see grpo.

    reference: whether it compares with the model as it was when training began. rate_share: its learning rate as a
    share of that of supervised fine-tuning. options: the fields of `train` that it reads, with their defaults.
    level: whether it needs the mean change of answers to other prompts, over the effective batch. scored: whether it
    learns a score of its own for each answer, in the place of log-probabilities.
    """

    name: str
    data_kind: DataKind
    reference: bool
    rate_share: float
    options: Mapping[str, Any]
    loss: Callable[[Any, TrainSection], Any]
    source: str
    level: bool = False
    scored: bool = False


def log_sigmoid(x: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def smoothed(x: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid(x), with that share of the labels taken to be the other way round (E. Mitchell, "A note on DPO with
    noisy preferences", 2023: conservative DPO)."""
    loss = -log_sigmoid(x)
    return loss if not smoothing else (1 - smoothing) * loss - smoothing * log_sigmoid(-x)


def given(value: float | None) -> float:
    """An option that the plan has filled in."""
    assert value is not None, "options are decided before a run begins"
    return value
