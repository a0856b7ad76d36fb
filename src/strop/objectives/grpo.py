"""Group relative policy optimization: Shao et al., arXiv:2402.03300, equations 3 and 4, token by token.

loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta r k3
r    = pi(token) / drawn(token), by the engine that drew the answer
k3   = ref / pi - log(ref / pi) - 1 (J. Schulman, "Approximating KL divergence", 2020; equation 4)
A    = (reward - mean of the group) / deviation of the group

The r in front of k3 makes its gradient that of the divergence, which k3 alone does not have (DeepSeek-V3.2,
arXiv:2512.02556; TRL's default too). The two bounds differ as in DAPO, arXiv:2503.14476, section 3.1.

How tokens add up (group_loss): `grpo` gives each answer the same weight (equation 3), so that a token of a long answer
counts less; `dapo` gives each token the same (DAPO, section 3.3); `dr_grpo` does so too, divides by the longest answer
there may be, which no answer changes, and leaves the deviation out, which gives more to prompts that are nearly always
or never answered well (Liu et al., arXiv:2503.20783, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from strop.config.schema import TrainSection
from strop.objectives.base_loss import Objective, given

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-4  # added to a deviation, as TRL has it
ALIKE = 1e-9  # rewards that differ by less are equal


@dataclass(frozen=True)
class Tokens:
    """Of each token that was drawn, all (M,) and fp64: its log-probability now (differentiable), when it was drawn,
    and under the reference; the advantage of its answer."""

    now: Tensor
    drawn: Tensor
    reference: Tensor
    advantage: Tensor


@dataclass(frozen=True)
class TokenLosses:
    """losses, kl (M,): of each token. clipped (M,): bool, where the bound took the gradient away."""

    losses: Tensor
    kl: Tensor
    clipped: Tensor


def loss(tokens: Tokens, options: TrainSection) -> TokenLosses:
    low, high = given(options.clip_low), given(options.clip_high)
    ratio = (tokens.now - tokens.drawn).exp()
    free = ratio * tokens.advantage
    bounded = ratio.clamp(1 - low, 1 + high) * tokens.advantage
    off = tokens.reference - tokens.now
    kl = off.exp() - off - 1
    return TokenLosses(given(options.beta) * ratio * kl - free.minimum(bounded), kl, bounded < free)


def advantages(rewards: Sequence[float], options: TrainSection) -> list[float]:
    """Of the answers of one group, two at least; all 0 where the rewards are equal."""
    if equal(rewards):
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    scale = 1.0 if options.group_loss == "dr_grpo" else stdev(rewards) + EPS
    return [(reward - mean) / scale for reward in rewards]


def equal(rewards: Sequence[float]) -> bool:
    return max(rewards) - min(rewards) < ALIKE


def token_weight(length: int, options: TrainSection) -> float:
    """Of each token of an answer of `length` tokens, in the sum over an effective batch."""
    return 1 / length if options.group_loss == "grpo" else 1.0


def divisor(lengths: Sequence[int], options: TrainSection) -> float:
    """What that sum is divided by. lengths: of all answers of the effective batch."""
    if options.group_loss == "dapo":
        return float(sum(lengths))
    return float(len(lengths)) * (1 if options.group_loss == "grpo" else given(options.answer_tokens))


GRPO = Objective(
    name="grpo",
    data_kind="prompts",
    reference=True,
    rate_share=0.1,
    options={
        "beta": 0.04,
        "rewards": None,
        "group": 8,
        "answer_tokens": 256,
        "group_loss": "dapo",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "updates": 1,
    },
    loss=loss,
    source="arXiv:2402.03300, equations 3 and 4",
)
