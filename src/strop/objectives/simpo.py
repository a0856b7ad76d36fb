"""Simple preference optimization: Meng et al., arXiv:2405.14734, equation 6.

loss = -log sigmoid(beta (log p_w - log p_l) - gamma),   log p: the mean log-probability a token of an answer

There is no reference: sft_weight adds the chosen answer's cross entropy a token (CPO, arXiv:2401.08417, equation 5),
which keeps the model from drifting. label_smoothing: as for DPO.
"""

from __future__ import annotations

from strop.config.schema import TrainSection
from strop.objectives.base_loss import Judged, Objective, Outcome, given, smoothed


def loss(judged: Judged, options: TrainSection) -> Outcome:
    chosen, rejected = judged.answers
    rewards = [given(options.beta) * side.mean for side in (chosen, rejected)]
    losses = smoothed(rewards[0] - rewards[1] - given(options.gamma), given(options.label_smoothing))
    return Outcome(losses - given(options.sft_weight) * chosen.mean, (rewards[0], rewards[1]))


SIMPO = Objective(
    name="simpo",
    data_kind="pairs",
    reference=False,
    rate_share=0.01,
    options={"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0, "sft_weight": 0.0},
    loss=loss,
    source="arXiv:2405.14734, equation 6",
)
