"""Whether tokens see what stands behind them, tried before the first step on a row of the run's own.

A model that is no decoder sees the very token that it is to predict: its loss falls, and it has learned nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from strop.data.types import Example, Item
from strop.errors import ModelError
from strop.models.introspect import NOT_CAUSAL, why_not_causal
from strop.training.criteria import OfAnswers
from strop.training.job import Job

TOKENS = 32  # of the row that is tried: others stand in its second half, and then in its first quarter
NATS, SHARE = 5e-3, 0.15  # what the second half may change in the median, and beside what the first quarter does


def hold_to_order(job: Job, items: Sequence[Item]) -> None:
    """Raises ModelError where the plain step's tokens depend on those behind them. The fast step's never do, and a
    reward model may: it predicts none."""
    scored = isinstance(job.criterion, OfAnswers) and job.criterion.objective.scored
    if job.step.name != "plain" or scored:
        return
    config = cast(Any, job.model).config
    fix = "use a decoder-only language model; one of BERT's kind has is_decoder in its config"
    if why := why_not_causal(config):
        raise ModelError(why, fix=fix)
    rows = _rows(items)
    job.model.eval()
    with job.devices.together(), torch.no_grad():
        [found] = job.devices.turns(lambda rank: [rows], job.step.token_log_probs, backward=False)
    row, behind, in_front = found.view(3, -1)
    job.model.train()
    job.step.release()
    change, beside = (float((other - row).abs().median()) for other in (behind, in_front))
    if change > max(NATS, SHARE * beside):
        raise ModelError(f"{config.model_type}: {NOT_CAUSAL}", fix=fix)


def _rows(items: Sequence[Item]) -> list[Example]:
    """A row, and twice the same with other tokens. Supervised: what stands between these, and is predicted there."""
    longest = max((example for item in items for example in item.examples), key=len)
    half, quarter, places = TOKENS // 2, TOKENS // 4, np.arange(TOKENS)
    weights = ((places > quarter) & (places < half)).astype(np.float32)
    ids = np.resize(longest.ids, TOKENS)
    turned = [np.where(places >= half, ids[::-1], ids), np.where(places < quarter, ids[::-1], ids)]
    return [replace(longest, ids=one, weights=weights) for one in (ids, *turned)]
