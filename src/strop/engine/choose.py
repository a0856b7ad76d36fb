"""Which step trains a model: the fast one where it applies, else the model's own forward, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from strop.engine.patch import FastLoss, unsupported
from strop.engine.plain import PlainLoss

if TYPE_CHECKING:
    from strop.data.conversation import Example


def token_loss_for(
    model: nn.Module, *, checkpointing: bool = False
) -> tuple[Callable[[Sequence[Example]], Tensor], str, str]:
    """(loss of a micro-batch, name of the step, why this one).

    checkpointing: keep each layer's input only, and compute the layer again in the backward pass.
    """
    why, whole = unsupported(model), cast(Any, model)
    if why is None:
        return FastLoss(model, checkpoint_layers=whole.config.num_hidden_layers if checkpointing else 0), "fast", ""
    if checkpointing:
        whole.gradient_checkpointing_enable({"use_reentrant": False})
    return PlainLoss(model), "plain", why
