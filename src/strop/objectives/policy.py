"""Policy losses, which train on sampled completions and their rewards: GRPO and its variants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from strop.config.schema import TrainSection
from strop.objectives import Objective, require

if TYPE_CHECKING:
    from torch import Tensor

STD_EPS = 1e-4  # added to a group's standard deviation, as in TRL
REWARD_TOLERANCE = 1e-9  # rewards that differ by less are equal


@dataclass(frozen=True)
class SampledTokens:
    """Input of a policy loss, one entry per sampled token, all of shape (M,) and fp64.

    logprobs: under the current policy, differentiable. old_logprobs: when the token was sampled. ref_logprobs: under
    the reference model. advantages: advantage of the token's completion.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class TokenLosses:
    """Output of a policy loss, of shape (M,)."""

    losses: Tensor
    kl: Tensor  # estimate of the KL divergence from the reference model
    clipped: Tensor  # bool; whether clipping removed the token's gradient


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(Objective):
    """An objective that learns from rewards.

    The loss of an effective batch is the weighted sum of its token losses, divided by `divisor`.
    """

    compute: Callable[[SampledTokens, TrainSection], TokenLosses]
    advantages: Callable[[Sequence[float], TrainSection], list[float]]  # of a group of completions, from their rewards
    token_weight: Callable[[int, TrainSection], float]  # weight of a token, from the length of its completion
    divisor: Callable[[Sequence[int], TrainSection], float]  # from the lengths of all completions


def grpo(tokens: SampledTokens, options: TrainSection) -> TokenLosses:
    """Compute group relative policy optimization per token (Shao et al., arXiv:2402.03300, equations 3 and 4).

    loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta r k3
    r    = pi / old: ratio of the probabilities now and when sampled
    A    = advantage of the completion
    k3   = ref / pi - log(ref / pi) - 1 (J. Schulman, "Approximating KL divergence", 2020; equation 4)

    With the factor r, the second term has the gradient of the KL divergence; k3 alone does not (DeepSeek-V3.2,
    arXiv:2512.02556; also TRL's default). Separate clip bounds are from DAPO (arXiv:2503.14476, section 3.1).
    """
    low, high = require(options.clip_low), require(options.clip_high)
    ratio = (tokens.logprobs - tokens.old_logprobs).exp()
    unclipped = ratio * tokens.advantages
    clipped = ratio.clamp(1 - low, 1 + high) * tokens.advantages
    log_ratio = tokens.ref_logprobs - tokens.logprobs
    kl = log_ratio.exp() - log_ratio - 1
    return TokenLosses(require(options.beta) * ratio * kl - unclipped.minimum(clipped), kl, clipped < unclipped)


def group_advantages(rewards: Sequence[float], options: TrainSection) -> list[float]:
    """Return (reward - mean) / standard deviation of two or more rewards; all 0 if the rewards are equal.

    `group_loss: dr_grpo` does not divide by the standard deviation, because that gives more weight to prompts that are
    nearly always or nearly never answered well (Liu et al., arXiv:2503.20783, section 3.2).
    """
    if rewards_equal(rewards):
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    scale = 1.0 if options.group_loss == "dr_grpo" else stdev(rewards) + STD_EPS
    return [(reward - mean) / scale for reward in rewards]


def rewards_equal(rewards: Sequence[float]) -> bool:
    return max(rewards) - min(rewards) < REWARD_TOLERANCE


def group_token_weight(length: int, options: TrainSection) -> float:
    """Return the weight of each token of a completion of `length` tokens.

    `group_loss: grpo` weights completions equally (equation 3), so tokens of long completions count less. `dapo` (DAPO,
    section 3.3) and `dr_grpo` weight tokens equally.
    """
    return 1 / length if options.group_loss == "grpo" else 1.0


def group_divisor(lengths: Sequence[int], options: TrainSection) -> float:
    """Return the divisor of the weighted loss sum.

    It is the number of completions (grpo), of tokens (dapo), or of completions times the most tokens that each may have
    (dr_grpo): train.answer_tokens, in an environment for each of train.turns.
    """
    if options.group_loss == "dapo":
        return float(sum(lengths))
    turns = require(options.turns) if options.environment is not None else 1
    longest = require(options.answer_tokens) * turns
    return float(len(lengths)) * (1 if options.group_loss == "grpo" else longest)


GRPO = PolicyLoss(
    name="grpo", data_kind="prompts", source="arXiv:2402.03300, equations 3 and 4",
    learning_rate_factor=0.1, reference=True,
    compute=grpo, advantages=group_advantages, token_weight=group_token_weight, divisor=group_divisor,
    options={
        "beta": 0.04, "rewards": None, "environment": None, "turns": 4, "reward_timeout": 60.0, "group": 8,
        "answer_tokens": 256, "group_loss": "dapo",
        "clip_low": 0.2, "clip_high": 0.28, "updates": 1,
    },
    option_sources={
        "beta": "arXiv:2402.03300, section 4.2",
        **dict.fromkeys(("group_loss", "clip_low", "clip_high"), "DAPO, arXiv:2503.14476, sections 3.1 and 3.3"),
    },
)  # fmt: skip
