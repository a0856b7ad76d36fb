"""The element-wise operations of eager.py (`functions.Ops`) as a card's own kernels, where it pays; the others are
PyTorch's."""

from __future__ import annotations

from strop.engine.kernels.cuda.loss import cross_entropy_
from strop.engine.kernels.cuda.norms import (
    glu,
    glu_backward,
    rms_norm,
    rms_norm_backward,
    scale_columns_,
    scale_columns_backward,
)
from strop.engine.kernels.eager import (  # attention's, which cards do otherwise
    from_heads,
    softmax_,
    softmax_backward_,
    to_heads,
)

__all__ = ["cross_entropy_", "from_heads", "glu", "glu_backward", "rms_norm", "rms_norm_backward"]
__all__ += ["scale_columns_", "scale_columns_backward", "softmax_", "softmax_backward_", "to_heads"]
