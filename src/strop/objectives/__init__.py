"""The facts that every training objective declares.

The planner reads them, so modules of this package import torch only where they compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strop.data.types import DataKind


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all objectives except supervised fine-tuning.

    name: value of `train.objective`. learning: kind of rows it trains on. source: paper and equation.
    options: the fields of `train` that it reads, with their defaults.
    rate_share: default learning rate as a share of the default for supervised fine-tuning.
    reference: whether it needs log-probabilities under the model as it was before training.
    scored: whether it trains a reward model's score instead of log-probabilities.
    """

    name: str
    data_kind: DataKind
    source: str
    options: Mapping[str, Any]
    rate_share: float
    reference: bool
    scored: bool = False


def require(value: float | None) -> float:
    """Return the value of an option that planning has set."""
    assert value is not None, "options are set before a run starts"
    return value
