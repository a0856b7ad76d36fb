"""Direct preference optimization: Rafailov et al., arXiv:2305.18290, equation 7.

loss = -log sigmoid(beta ((log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))))

label_smoothing: conservative DPO. sft_weight: adds the chosen answer's cross entropy a token, which keeps it from
becoming less likely (RPO, arXiv:2404.19733, equation 1). length_normalized: changes a token instead of sums, so that a
long answer has no larger say (arXiv:2405.14734 and Tulu 3, arXiv:2411.15124, equation 6).
"""

from __future__ import annotations

from strop.config.schema import TrainSection
from strop.objectives.objective import Judged, Objective, Outcome, given, smoothed


def loss(judged: Judged, options: TrainSection) -> Outcome:
    chosen, rejected = judged.answers
    beta = given(options.beta)
    rewards = [
        beta * (side.change / side.counts if options.length_normalized else side.change) for side in (chosen, rejected)
    ]
    losses = smoothed(rewards[0] - rewards[1], given(options.label_smoothing))
    return Outcome(losses - given(options.sft_weight) * chosen.mean, (rewards[0], rewards[1]))


DPO = Objective(
    name="dpo",
    learning="pairs",
    reference=True,
    rate_share=0.01,
    options={"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0, "length_normalized": False},
    loss=loss,
    source="arXiv:2305.18290, equation 7",
)


# ---- from strop.objectives.ipo ----
"""Identity preference optimization: Azar et al., arXiv:2310.12036, equation 17; beta is the paper's tau.

loss = (h - 1 / (2 beta))^2, h = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))

length_normalized (on): h of means over tokens. With sums the square grows with the length of the answers; the paper's
own results are of means, as its authors told TRL's.
"""

from __future__ import annotations

from strop.config.schema import TrainSection
from strop.objectives.objective import Judged, Objective, Outcome, given


def loss(judged: Judged, options: TrainSection) -> Outcome:
    chosen, rejected = judged.answers
    gained = [side.change / side.counts if options.length_normalized else side.change for side in (chosen, rejected)]
    beta = given(options.beta)
    losses = (gained[0] - gained[1] - 1 / (2 * beta)).square() - given(options.sft_weight) * chosen.mean
    return Outcome(losses, (beta * gained[0], beta * gained[1]))


IPO = Objective(
    name="ipo",
    learning="pairs",
    reference=True,
    rate_share=0.01,
    options={"beta": 0.1, "sft_weight": 0.0, "length_normalized": True},
    loss=loss,
    source="arXiv:2310.12036, equation 17",
)


# ---- from strop.objectives.kto ----
"""Kahneman-Tversky optimization: Ethayarajh et al., arXiv:2402.01306, equations 7 and 8.

loss = w_d (1 - sigmoid(beta (r - z)))   for a desirable answer,   r = log pi(y|x) - log ref(y|x)
       w_u (1 - sigmoid(beta (z - r)))   for an undesirable one

z: the estimate of the divergence from the reference, max(0, mean of r over answers to other prompts), of the whole
effective batch and without a gradient (section 4.1 of the paper). The paper wants the weights in proportion to the
rarer kind: w_d n_d / (w_u n_u) between 1 and 4/3.
"""

from __future__ import annotations

from strop.config.schema import TrainSection
from strop.objectives.objective import Judged, Objective, Outcome, given


def loss(judged: Judged, options: TrainSection) -> Outcome:
    (answer,) = judged.answers
    sign = judged.desirable.double() * 2 - 1
    desirable, undesirable = given(options.desirable_weight), given(options.undesirable_weight)
    weight = judged.desirable.double() * (desirable - undesirable) + undesirable
    beta = given(options.beta)
    losses = weight * (1 - (beta * sign * (answer.change - judged.level)).sigmoid())
    return Outcome(losses, (beta * answer.change,))


KTO = Objective(
    name="kto",
    learning="labels",
    reference=True,
    rate_share=0.01,
    options={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    loss=loss,
    level=True,
    source="arXiv:2402.01306, equations 7 and 8",
)


# ---- from strop.objectives.orpo ----
"""Odds ratio preference optimization: Hong et al., arXiv:2403.07691, equations 4 to 7; beta is the paper's lambda.

loss = -log p_w - beta log sigmoid(log odds(y_w) - log odds(y_l)),   odds = p / (1 - p)

log p: the mean log-probability a token of an answer. The first term runs over the answer alone, as supervised
fine-tuning does here. There is no reference.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from strop.config.schema import TrainSection
from strop.objectives.objective import Judged, Objective, Outcome, given, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

CERTAIN = -1e-12  # an answer of probability 1 has no odds


def loss(judged: Judged, options: TrainSection) -> Outcome:
    chosen, rejected = judged.answers
    beta = given(options.beta)
    ratio = _log_odds(chosen.mean) - _log_odds(rejected.mean)
    return Outcome(-chosen.mean - beta * log_sigmoid(ratio), (beta * chosen.mean, beta * rejected.mean))


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0.

    log(1 - exp(x)) loses all digits near 0 in one form and near -infinity in the other (M. Maechler, "Accurately
    computing log(1 - exp(-|a|))", 2012). Each form gets only what it is for: the other's gradient would be NaN.
    """
    log_p = log_p.clamp(max=CERTAIN)
    near = log_p > -math.log(2)
    one = (-log_p.masked_fill(~near, -1.0).expm1()).log()
    other = (-log_p.masked_fill(near, -1.0).exp()).log1p()
    return log_p - one.where(near, other)


ORPO = Objective(
    name="orpo",
    learning="pairs",
    reference=False,
    rate_share=0.5,
    options={"beta": 0.1},
    loss=loss,
    source="arXiv:2403.07691, equations 4 to 7",
)


# ---- from strop.objectives.simpo ----
"""Simple preference optimization: Meng et al., arXiv:2405.14734, equation 6.

loss = -log sigmoid(beta (log p_w - log p_l) - gamma),   log p: the mean log-probability a token of an answer

There is no reference: sft_weight adds the chosen answer's cross entropy a token (CPO, arXiv:2401.08417, equation 5),
which keeps the model from drifting. label_smoothing: as for DPO.
"""

from __future__ import annotations

from strop.config.schema import TrainSection
from strop.objectives.objective import Judged, Objective, Outcome, given, smoothed


def loss(judged: Judged, options: TrainSection) -> Outcome:
    chosen, rejected = judged.answers
    rewards = [given(options.beta) * side.mean for side in (chosen, rejected)]
    losses = smoothed(rewards[0] - rewards[1] - given(options.gamma), given(options.label_smoothing))
    return Outcome(losses - given(options.sft_weight) * chosen.mean, (rewards[0], rewards[1]))


SIMPO = Objective(
    name="simpo",
    learning="pairs",
    reference=False,
    rate_share=0.01,
    options={"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0, "sft_weight": 0.0},
    loss=loss,
    source="arXiv:2405.14734, equation 6",
)


# ---- from strop.objectives.reward ----
"""A reward model by Bradley and Terry, "Rank analysis of incomplete block designs" (Biometrika 39, 1952).

loss = -log sigmoid(s(y_w) - s(y_l)),   s: one number for prompt and answer, from a head on the last token

As in Ouyang et al., arXiv:2203.02155, equation 1.
"""

from __future__ import annotations

from strop.config.schema import TrainSection
from strop.objectives.objective import Judged, Objective, Outcome, log_sigmoid


def loss(judged: Judged, options: TrainSection) -> Outcome:
    chosen, rejected = (side.sums for side in judged.answers)
    return Outcome(-log_sigmoid(chosen - rejected), (chosen, rejected))


REWARD = Objective(
    name="reward",
    learning="pairs",
    reference=False,
    rate_share=0.5,
    options={},
    loss=loss,
    scored=True,
    source="arXiv:2203.02155, equation 1",
)
