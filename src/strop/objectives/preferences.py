"""Preference losses: DPO, IPO, KTO, ORPO, SimPO and the Bradley-Terry loss of reward models.

A loss receives the log-probabilities (or scores) of whole answers, and is independent of model and training loop.

Notation: y_w is the chosen answer, y_l the rejected one, pi the policy, ref the reference model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strop.config.schema import TrainSection
from strop.objectives import Objective, require

if TYPE_CHECKING:
    from torch import Tensor

LOG_P_MAX = -1e-12  # limit for ORPO, because the odds of probability 1 are infinite


@dataclass(frozen=True)
class AnswerLogprobs:
    """Log-probabilities of one answer per row, each of shape (N,) and fp64."""

    sums: Tensor  # weighted sum over the supervised tokens, differentiable; for a reward model, the score
    counts: Tensor  # sum of the weights
    reference: Tensor  # `sums` under the reference model, or 0 without one

    @property
    def mean(self) -> Tensor:
        """Log-probability per token."""
        return self.sums / self.counts

    @property
    def log_ratio(self) -> Tensor:
        """Log-ratio of policy and reference, in nats."""
        return self.sums - self.reference

    @property
    def log_ratio_per_token(self) -> Tensor:
        return self.log_ratio / self.counts


@dataclass(frozen=True)
class PreferenceBatch:
    """Input of a preference loss."""

    answers: tuple[AnswerLogprobs, ...]  # chosen and rejected, or labelled answers
    desirable: Tensor  # the labels, bool of shape (N,)
    divergence: float = 0.0  # KTO: estimate of the KL divergence from the reference model over the effective batch


@dataclass(frozen=True)
class PreferenceResult:
    """Output of a preference loss."""

    losses: Tensor  # loss of each row, shape (N,)
    rewards: tuple[Tensor, ...]  # implicit rewards, shape (N,) for each of `PreferenceBatch.answers`


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(Objective):
    """An objective that learns from pairs or labelled answers."""

    compute: Callable[[PreferenceBatch, TrainSection], PreferenceResult]
    needs_divergence: bool = False  # whether `compute` reads PreferenceBatch.divergence


def dpo(batch: PreferenceBatch, options: TrainSection) -> PreferenceResult:
    """Compute direct preference optimization (Rafailov et al., arXiv:2305.18290, equation 7).

    loss = -log sigmoid(beta ((log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))))

    label_smoothing: conservative DPO. sft_weight: adds the chosen answer's cross entropy per token, which keeps it from
    becoming less likely (RPO, arXiv:2404.19733, equation 1). length_normalized: uses log-ratios per token instead of
    sums, so that long answers do not count more (arXiv:2405.14734; Tulu 3, arXiv:2411.15124, equation 6).
    """
    chosen, rejected = (require(options.beta) * log_ratio for log_ratio in _log_ratios(batch, options))
    losses = _smoothed_log_loss(chosen - rejected, require(options.label_smoothing))
    return PreferenceResult(losses - require(options.sft_weight) * batch.answers[0].mean, (chosen, rejected))


def ipo(batch: PreferenceBatch, options: TrainSection) -> PreferenceResult:
    """Compute identity preference optimization (Azar et al., arXiv:2310.12036, equation 17; beta is the paper's tau).

    loss = (h - 1 / (2 beta))^2, h = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))

    length_normalized (default): h uses means over tokens, because with sums the square grows with the answers' length.
    The paper's results use means, according to its authors (TRL's documentation of `loss_type="ipo"`).
    """
    chosen, rejected = _log_ratios(batch, options)
    beta, sft_weight = require(options.beta), require(options.sft_weight)
    losses = (chosen - rejected - 1 / (2 * beta)).square() - sft_weight * batch.answers[0].mean
    return PreferenceResult(losses, (beta * chosen, beta * rejected))


def _log_ratios(batch: PreferenceBatch, options: TrainSection) -> list[Tensor]:
    """Return the log-ratios of policy and reference for chosen and rejected answers."""
    return [side.log_ratio_per_token if options.length_normalized else side.log_ratio for side in batch.answers]


def kto(batch: PreferenceBatch, options: TrainSection) -> PreferenceResult:
    """Compute Kahneman-Tversky optimization (Ethayarajh et al., arXiv:2402.01306, equations 7 and 8).

    loss = w_d (1 - sigmoid(beta (r - z)))   for a desirable answer,   r = log pi(y|x) - log ref(y|x)
           w_u (1 - sigmoid(beta (z - r)))   for an undesirable one

    w_d and w_u are `desirable_weight` and `undesirable_weight`. z is `batch.divergence`: max(0, mean of r over answers
    to other prompts) in the effective batch, without a gradient (section 4.1). The paper recommends
    w_d n_d / (w_u n_u) between 1 and 4/3, where n_d and n_u are the numbers of answers.
    """
    (answer,) = batch.answers
    sign = batch.desirable.double() * 2 - 1
    desirable, undesirable = require(options.desirable_weight), require(options.undesirable_weight)
    weight = batch.desirable.double() * (desirable - undesirable) + undesirable
    beta = require(options.beta)
    losses = weight * (1 - (beta * sign * (answer.log_ratio - batch.divergence)).sigmoid())
    return PreferenceResult(losses, (beta * answer.log_ratio,))


def orpo(batch: PreferenceBatch, options: TrainSection) -> PreferenceResult:
    """Compute odds ratio preference optimization (Hong et al., arXiv:2403.07691, equations 4 to 7).

    loss = -log p_w - beta log sigmoid(log odds(y_w) - log odds(y_l)),   odds = p / (1 - p)

    log p is an answer's mean log-probability per token, log p_w that of the chosen answer. beta is the paper's lambda.
    The first term covers only the answer, as in supervised fine-tuning.
    """
    chosen, rejected = batch.answers
    beta = require(options.beta)
    ratio = _log_odds(chosen.mean) - _log_odds(rejected.mean)
    return PreferenceResult(-chosen.mean - beta * _log_sigmoid(ratio), (beta * chosen.mean, beta * rejected.mean))


def simpo(batch: PreferenceBatch, options: TrainSection) -> PreferenceResult:
    """Compute simple preference optimization (Meng et al., arXiv:2405.14734, equation 6).

    loss = -log sigmoid(beta (log p_w - log p_l) - gamma),   log p: mean log-probability per token

    There is no reference model. sft_weight adds the chosen answer's cross entropy per token, which limits the drift of
    the policy (CPO, arXiv:2401.08417, equation 5). label_smoothing: as for DPO.
    """
    chosen, rejected = batch.answers
    rewards = [require(options.beta) * side.mean for side in (chosen, rejected)]
    losses = _smoothed_log_loss(rewards[0] - rewards[1] - require(options.gamma), require(options.label_smoothing))
    return PreferenceResult(losses - require(options.sft_weight) * chosen.mean, (rewards[0], rewards[1]))


def bradley_terry(batch: PreferenceBatch, options: TrainSection) -> PreferenceResult:
    """Compute the reward model loss (Bradley and Terry, Biometrika 39, 1952; Ouyang et al., arXiv:2203.02155).

    loss = -log sigmoid(s(y_w) - s(y_l)),   s: score of prompt and answer, from a head on the last token
    """
    chosen, rejected = (side.sums for side in batch.answers)
    return PreferenceResult(-_log_sigmoid(chosen - rejected), (chosen, rejected))


def _log_sigmoid(x: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def _smoothed_log_loss(margin: Tensor, smoothing: float) -> Tensor:
    """Return the expected -log sigmoid(margin) if a fraction `smoothing` of the labels is flipped (conservative DPO: E.
    Mitchell, "A note on DPO with noisy preferences", 2023)."""
    loss = -_log_sigmoid(margin)
    return loss if not smoothing else (1 - smoothing) * loss - smoothing * _log_sigmoid(-margin)


def _log_odds(log_p: Tensor) -> Tensor:
    """Return log(p / (1 - p)) for log p <= 0.

    log(1 - exp(x)) is computed with expm1 near 0 and with log1p elsewhere, because each loses precision in the other
    range (M. Maechler, "Accurately computing log(1 - exp(-|a|))", 2012). Values outside a form's range are replaced
    first, because its gradient would be NaN there.
    """
    log_p = log_p.clamp(max=LOG_P_MAX)
    near_zero = log_p > -math.log(2)
    by_expm1 = (-log_p.masked_fill(~near_zero, -1.0).expm1()).log()
    by_log1p = (-log_p.masked_fill(near_zero, -1.0).exp()).log1p()
    return log_p - by_expm1.where(near_zero, by_log1p)


DPO = PreferenceLoss(
    name="dpo", data_kind="pairs", compute=dpo, source="arXiv:2305.18290, equation 7",
    learning_rate_factor=0.01, reference=True,
    options={"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0, "length_normalized": False},
)  # fmt: skip
IPO = PreferenceLoss(
    name="ipo", data_kind="pairs", compute=ipo, source="arXiv:2310.12036, equation 17",
    learning_rate_factor=0.01, reference=True,
    options={"beta": 0.1, "sft_weight": 0.0, "length_normalized": True},
)  # fmt: skip
KTO = PreferenceLoss(
    name="kto", data_kind="labels", compute=kto, source="arXiv:2402.01306, equations 7 and 8",
    learning_rate_factor=0.01,
    reference=True, needs_divergence=True,
    options={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
)  # fmt: skip
ORPO = PreferenceLoss(
    name="orpo", data_kind="pairs", compute=orpo, source="arXiv:2403.07691, equations 4 to 7", learning_rate_factor=0.5,
    reference=False, options={"beta": 0.1},
)  # fmt: skip
SIMPO = PreferenceLoss(
    name="simpo", data_kind="pairs", compute=simpo, source="arXiv:2405.14734, equation 6", learning_rate_factor=0.01,
    reference=False, options={"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0, "sft_weight": 0.0},
)  # fmt: skip
REWARD = PreferenceLoss(
    name="reward", data_kind="pairs", compute=bradley_terry, source="arXiv:2203.02155, equation 1",
    learning_rate_factor=0.5,
    reference=False, scored=True, options={},
)  # fmt: skip
