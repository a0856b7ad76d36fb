"""Direct preference optimization: Rafailov et al., arXiv:2305.18290, equation 7.

loss = -log sigmoid(beta ((log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))))

label_smoothing: conservative DPO. sft_weight: adds the chosen answer's cross entropy a token, which keeps it from
becoming less likely (RPO, arXiv:2404.19733, equation 1). length_normalized: changes a token instead of sums, so that a
long answer has no larger say (arXiv:2405.14734 and Tulu 3, arXiv:2411.15124, equation 6).
"""

from __future__ import annotations

from strop.config.schema import TrainSection
from strop.objectives.base_loss import Judged, Objective, Outcome, given, smoothed


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
    data_kind="pairs",
    reference=True,
    rate_share=0.01,
    options={"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0, "length_normalized": False},
    loss=loss,
    source="arXiv:2305.18290, equation 7",
)
