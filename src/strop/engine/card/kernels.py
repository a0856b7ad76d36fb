"""The element-wise operations of eager.py (`functions.Ops`) as a card's own kernels, where it pays; the others are
PyTorch's."""

from __future__ import annotations

from strop.engine.card.loss import cross_entropy_
from strop.engine.card.rows import glu, glu_backward, rms_norm, rms_norm_backward
from strop.engine.eager import (
    from_heads,
    scale_columns_,
    scale_columns_backward,
    softmax_,
    softmax_backward_,
    to_heads,
)  # DoRA's, and those of attention without kernels of its own

__all__ = ["cross_entropy_", "from_heads", "glu", "glu_backward", "rms_norm", "rms_norm_backward"]
__all__ += ["scale_columns_", "scale_columns_backward", "softmax_", "softmax_backward_", "to_heads"]
