"""Identity preference optimization: Azar et al., arXiv:2310.12036, equation 17; beta is the paper's tau.

loss = (h - 1 / (2 beta))^2, h = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))

length_normalized (on): h of means over tokens. With sums the square grows with the length of the answers; the paper's
own results are of means, as its authors told TRL's.
"""

from __future__ import annotations

from strop.config.schema import TrainSection
from strop.objectives.base_loss import Judged, Objective, Outcome, given


def loss(judged: Judged, options: TrainSection) -> Outcome:
    chosen, rejected = judged.answers
    gained = [side.change / side.counts if options.length_normalized else side.change for side in (chosen, rejected)]
    beta = given(options.beta)
    losses = (gained[0] - gained[1] - 1 / (2 * beta)).square() - given(options.sft_weight) * chosen.mean
    return Outcome(losses, (beta * gained[0], beta * gained[1]))


IPO = Objective(
    name="ipo",
    data_kind="pairs",
    reference=True,
    rate_share=0.01,
    options={"beta": 0.1, "sft_weight": 0.0, "length_normalized": True},
    loss=loss,
    source="arXiv:2310.12036, equation 17",
)
