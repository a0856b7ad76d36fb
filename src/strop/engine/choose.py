"""Which step trains a model: the fast one where it applies, else the model's own forward, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from strop.engine.plain import PlainLoss

if TYPE_CHECKING:
    from strop.data.conversation import Example


def token_loss_for(model: nn.Module) -> tuple[Callable[[Sequence[Example]], Tensor], str, str]:
    """(loss of a micro-batch, name of the step, why this one)."""
    return PlainLoss(model), "plain", "the model's own forward"
