"""Odds ratio preference optimization: Hong et al., arXiv:2403.07691, equations 4 to 7; beta is the paper's lambda.

loss = -log p_w - beta log sigmoid(log odds(y_w) - log odds(y_l)),   odds = p / (1 - p)

log p: the mean log-probability a token of an answer. The first term runs over the answer alone, as supervised
fine-tuning does here. There is no reference.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from strop.config.schema import TrainSection
from strop.objectives.base_loss import Judged, Objective, Outcome, given, log_sigmoid

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
    data_kind="pairs",
    reference=False,
    rate_share=0.5,
    options={"beta": 0.1},
    loss=loss,
    source="arXiv:2403.07691, equations 4 to 7",
)
