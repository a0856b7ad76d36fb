"""The element-wise operations of eager.py, each compiled by PyTorch into one kernel: for cards.

The first call of each takes seconds; lengths may differ from call to call.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch

from strop.engine import eager
from strop.engine.eager import (
    from_heads,
    scale_columns_,
    scale_columns_backward,
    softmax_,
    softmax_backward_,
    to_heads,
)  # attention's, which cards do otherwise, and DoRA's

__all__ = ["available", "cross_entropy_", "from_heads", "glu", "glu_backward", "rms_norm", "rms_norm_backward"]
__all__ += ["scale_columns_", "scale_columns_backward", "softmax_", "softmax_backward_", "to_heads"]

Operation = TypeVar("Operation", bound=Callable[..., Any])


def available() -> bool:
    """Triton, which PyTorch compiles for cards with, is there."""
    return find_spec("triton") is not None


def _fused(operation: Operation) -> Operation:
    return cast(Operation, torch.compile(operation, dynamic=True, fullgraph=True))


rms_norm = _fused(eager.rms_norm)
rms_norm_backward = _fused(eager.rms_norm_backward)
glu = _fused(eager.glu)
glu_backward = _fused(eager.glu_backward)
cross_entropy_ = _fused(eager.cross_entropy_)
