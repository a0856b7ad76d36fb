"""Kahneman-Tversky optimization: Ethayarajh et al., arXiv:2402.01306, equations 7 and 8.

loss = w_d (1 - sigmoid(beta (r - z)))   for a desirable answer,   r = log pi(y|x) - log ref(y|x)
       w_u (1 - sigmoid(beta (z - r)))   for an undesirable one

z: the estimate of the divergence from the reference, max(0, mean of r over answers to other prompts), of the whole
effective batch and without a gradient (section 4.1 of the paper). The paper wants the weights in proportion to the
rarer kind: w_d n_d / (w_u n_u) between 1 and 4/3.
"""

from __future__ import annotations

from strop.config.schema import TrainSection
from strop.objectives.base_loss import Judged, Objective, Outcome, given


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
    data_kind="labels",
    reference=True,
    rate_share=0.01,
    options={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    loss=loss,
    level=True,
    source="arXiv:2402.01306, equations 7 and 8",
)
