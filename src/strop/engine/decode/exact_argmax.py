"""The most likely token without all logits: an int8 copy of the head selects candidates, the head itself decides.

The result is exact: the error of each approximate logit is bounded, and every token within the bound is a candidate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strop.engine.kernels.dispatch import argmax_kernels

MIN_HEAD_SHARE = 0.1  # of the bytes read a token; for a smaller head it is not worth it
PAUSE_PASSES = 16  # skipped after a pass with too many candidates
_CHUNK_ELEMENTS = 1 << 20  # of the head that are quantized at a time


class ExactArgmax:
    """Argmax of the logits of hidden states. The int8 copy is made at the first call.

    weight: of the head, (V, h). array: the same in the form that the kernels take. scale: factor of the logits.
    """

    def __init__(self, weight: Tensor, array: Any, scale: float) -> None:
        self._kernels: Any = argmax_kernels()
        self._weight, self._array, self._scale = weight.detach(), array, np.float32(scale)
        self._num_threads = torch.get_num_threads()
        self._quantized: tuple[Any, Any] | None = None
        self._pause = 0

    def argmax(self, z: Any) -> Any:
        """Return the token with the greatest logit of each row of z (P, h), as (P,); None if all logits are needed."""
        if self._pause:
            self._pause -= 1
            return None
        tokens = self._argmax(z)
        if tokens is None:
            self._pause = PAUSE_PASSES
        return tokens

    def _argmax(self, z: Any) -> Any:
        kernels, num_threads, num_rows = self._kernels, self._num_threads, len(z)
        if self._quantized is None:
            values, scales, bounds = quantize_head(self._weight, kernels.LANES)
            self._quantized = (
                kernels.Quantized(values, scales, np.empty(0, np.float32), z.shape[1], len(scales)), bounds,
            )  # fmt: skip
        head, bounds = self._quantized
        approximate = np.empty((num_rows, head.n), np.float32)
        if z.dtype == np.uint16:
            x, scales = np.empty(z.shape, np.int16), np.empty(num_rows, np.float32)
            kernels.quantize_rows(z, x, scales)
            kernels.int8_matmul(head, x, scales, approximate, 0, num_threads)
        else:
            kernels.quantized_matmul(head, z[:0, 0], z, approximate, 0, num_threads)
        norms, counts = np.empty(num_rows, np.float32), np.empty(num_rows, np.int64)
        chosen = np.empty((num_rows, kernels.MAX_CANDIDATES), np.int64)
        kernels.find_candidates(approximate, bounds, z, norms, chosen, counts)
        if not np.isfinite(norms).all() or not np.isfinite(bounds[0]) or counts.max() > kernels.MAX_CANDIDATES:
            return None
        tokens = np.unique(np.concatenate([row[:count] for row, count in zip(chosen, counts, strict=True)]))
        if not 0 < len(tokens) <= kernels.MAX_CANDIDATES:
            return None
        padded = np.append(tokens, np.repeat(tokens[-1:], -len(tokens) % kernels.LANES))
        logits = np.empty((num_rows, len(padded)), np.float32)
        kernels.dense_matmul(kernels.Dense(self._array[padded]), z, logits, num_threads)
        candidates = logits[:, : len(tokens)] * self._scale
        return tokens[candidates.argmax(1)] if np.isfinite(candidates).all() else None


def quantize_head(weight: Tensor, lanes: int) -> tuple[Any, Any, Any]:
    """Quantize a head (V, h) to int8, row by row, and bound the error of its logits: (values, scales, bounds).

    values (N h,), int8, N: V rounded up to a multiple of `lanes`. scales (N,), fp32. bounds (V,), fp32: greatest error
    of a logit for a hidden state of norm 1, from quantization, from sums in fp32 and from rounding the hidden state to
    16 bits; NaN if a value is not finite.
    """
    n, k = weight.shape
    num_rows = -(-n // lanes) * lanes
    values, scales = np.zeros((num_rows, k), np.int8), np.zeros(num_rows, np.float32)
    bounds = np.empty(n, np.float32)
    rounding, step = k * 2.0**-22 + k**0.5 / 65_534, max(1, _CHUNK_ELEMENTS // k)
    for begin in range(0, n, step):
        rows = slice(begin, min(n, begin + step))
        part = weight[rows].float()
        scale = part.abs().amax(1) / 127
        quantized = (part / torch.where(scale > 0, scale, 1.0)[:, None]).round_()
        values[rows], scales[rows] = quantized.to(torch.int8).numpy(), scale.numpy()
        error, norm = torch.linalg.vector_norm(part - quantized * scale[:, None], dim=1), part.norm(dim=1)
        bounds[rows] = (1.01 * (error + rounding * (norm + error))).numpy()
    if not np.isfinite(bounds).all():
        bounds[:] = np.nan
    return values.reshape(-1), scales, bounds


def exact_argmax_for(
    head: nn.Linear, array: Any, z: Any, scale: float, softcap: float | None, other_bytes: int
) -> ExactArgmax | None:
    """Return an ExactArgmax for a head, if that is exact and worth it.

    z: an array of the type of the hidden states. other_bytes: size of all other weights.
    """
    kernels, (n, k) = argmax_kernels(), head.weight.shape
    linear = head.bias is None and not softcap and scale > 0
    exact = z.dtype == np.float32 or (
        kernels.INT8_DOTS and kernels.supports_width(k) and (not kernels.USES_AMX or n % kernels.LANES == 0)
    )
    worth = head.weight.nbytes > MIN_HEAD_SHARE * (head.weight.nbytes + other_bytes)
    return ExactArgmax(head.weight, array, scale) if linear and exact and worth else None
