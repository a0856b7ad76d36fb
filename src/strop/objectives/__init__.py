"""Base class of the training objectives.

The planner reads objectives without torch, so the modules of this package import torch only inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strop.data.types import DataKind


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base class of all objectives except supervised fine-tuning."""

    name: str  # value of `train.objective`
    data_kind: DataKind
    source: str  # paper and equation
    options: Mapping[str, Any]  # fields of `train` that the objective reads, and their defaults
    learning_rate_factor: float  # factor of the default learning rate of supervised fine-tuning
    reference: bool  # whether it needs log-probabilities under the reference model
    option_sources: Mapping[str, str] | None = None  # papers with the defaults of options; None: `source` has them all
    scored: bool = False  # whether it trains a score head (reward model, classifier) instead of log-probabilities


def require(value: float | None) -> float:
    """Return the value of an option, which the plan has set if the recipe did not."""
    assert value is not None, "options are set before a run starts"
    return value
