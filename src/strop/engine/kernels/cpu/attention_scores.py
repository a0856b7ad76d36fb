"""Rows of attention's scores that are bent (soft caps), in fp32: parts of the loops of attention_tiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from strop.engine.kernels.cpu.compiled import exp, greater, inline, narrow, tanh


@inline
def bend(scores: Any, softcap: Any) -> None:
    for j in range(len(scores)):
        scores[j] = softcap * tanh(scores[j] / softcap)


@inline
def bent_slopes(
    scores: Any, slopes: Any, begin: Any, end: Any, top: Any, along: Any, softcap: Any, out: Any
) -> None:  # fmt: skip
    """As vectors.slopes_of, where scores are bent first."""
    none = np.float32(0.0)
    scores[:begin] = none
    scores[end:] = none
    slopes[:begin] = none
    slopes[end:] = none
    # Loops from 0 on slices: numba looks for negative places in others, and they are not vectorised.
    probs, grads = scores[begin:end], slopes[begin:end]
    for j in range(len(probs)):
        bent = tanh(probs[j] / softcap)
        # Above 0 by rounding alone: exp is made for what is not positive.
        probs[j] = exp(-greater(top - softcap * bent, none))
        grads[j] = probs[j] * (grads[j] - along) * (np.float32(1.0) - bent * bent)
    for j in range(len(slopes)):
        out[j] = narrow(slopes[j], out)
