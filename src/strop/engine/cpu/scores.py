"""Rows of attention's scores on their way to probabilities and back, in fp32: parts of the loops of attention_tiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from strop.engine.cpu.compiled import exp, greater, inline, narrow, tanh
from strop.engine.cpu.tile import narrow_pair


@inline
def bend(scores: Any, softcap: Any) -> None:
    for j in range(len(scores)):
        scores[j] = softcap * tanh(scores[j] / softcap)


@inline
def exps(scores: Any, begin: Any, end: Any, probs: Any) -> Any:
    """probs = exp(scores - top) of what is seen, 0 elsewhere; returns top and their sum. scores is written over."""
    seen, top, total = scores[begin:end], np.float32(-3e38), np.float32(0.0)
    for j in range(len(seen)):
        top = greater(top, seen[j])
    for j in range(len(seen)):
        seen[j] = exp(seen[j] - top)
    for j in range(len(seen)):
        total += seen[j]
    probs[:begin] = 0
    probs[end:] = 0
    to = probs[begin:end]
    for j in range(len(seen)):
        to[j] = narrow(seen[j], probs)
    return top, total


@inline
def slopes_of(
    scores: Any, slopes: Any, begin: Any, end: Any, top: Any, along: Any, softcap: Any, out: Any
) -> None:  # fmt: skip
    """scores become probabilities, slopes (the gradients of these) the gradients of the scores; out: theirs in bf16."""
    none = np.float32(0.0)
    scores[:begin] = none
    scores[end:] = none
    slopes[:begin] = none
    slopes[end:] = none
    # Loops from 0 on slices: numba looks for negative places in others, and they are not vectorised.
    probs, grads = scores[begin:end], slopes[begin:end]
    if softcap > 0:
        for j in range(len(probs)):
            bent = tanh(probs[j] / softcap)
            probs[j] = exp(-greater(top - softcap * bent, none))
            grads[j] = probs[j] * (grads[j] - along) * (np.float32(1.0) - bent * bent)
    else:
        for j in range(len(probs)):
            # Above 0 by rounding alone: exp is made for what is not positive.
            probs[j] = exp(-greater(top - probs[j], none))
        for j in range(len(probs)):
            grads[j] = probs[j] * (grads[j] - along)
    for j in range(len(slopes)):
        out[j] = narrow(slopes[j], out)


@inline
def row_pairs(even: Any, odd: Any, out: Any) -> None:
    """Two rows of fp32 as pairs in bf16."""
    for j in range(len(even)):
        out[j] = narrow_pair(even[j], odd[j])
