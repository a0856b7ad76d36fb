"""A reward model by Bradley and Terry, "Rank analysis of incomplete block designs" (Biometrika 39, 1952).

loss = -log sigmoid(s(y_w) - s(y_l)),   s: one number for prompt and answer, from a head on the last token

As in Ouyang et al., arXiv:2203.02155, equation 1.
"""

from __future__ import annotations

from strop.config.schema import TrainSection
from strop.objectives.base_loss import Judged, Objective, Outcome, log_sigmoid


def loss(judged: Judged, options: TrainSection) -> Outcome:
    chosen, rejected = (side.sums for side in judged.answers)
    return Outcome(-log_sigmoid(chosen - rejected), (chosen, rejected))


REWARD = Objective(
    name="reward",
    data_kind="pairs",
    reference=False,
    rate_share=0.5,
    options={},
    loss=loss,
    scored=True,
    source="arXiv:2203.02155, equation 1",
)
