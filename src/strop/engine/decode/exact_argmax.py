"""The head in 8 bit beside the head, for answers that want the likeliest token and nothing else (engine.cpu.screen)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strop.engine.kernels.dispatch import screening_loops

WORTH = 0.1  # the head is at least so much of what is read for a token
PAUSE_PASSES = 16  # passes after one in which too many tokens could be the likeliest
_NUMBERS = 1 << 20  # of the head that are made small together


class ExactArgmax:
    """weight: the head's (V, h), and the same as loops take it; scale: of the logits. It is made small when it is
    asked for the first time."""

    def __init__(self, weight: Tensor, whole: Any, scale: float) -> None:
        self._loops: Any = screening_loops()
        self._weight, self._whole, self._scale = weight.detach(), whole, np.float32(scale)
        self._lanes = torch.get_num_threads()
        self._small: tuple[Any, Any] | None = None
        self._pause = 0

    def likeliest(self, z: Any) -> Any:
        """The places (P,) of the greatest logits of rows z (P, h); None where all logits must be computed."""
        if self._pause:
            self._pause -= 1
            return None
        found = self._argmax(z)
        if found is None:
            self._pause = PAUSE_PASSES
        return found

    def _argmax(self, z: Any) -> Any:
        loops, lanes, count = self._loops, self._lanes, len(z)
        if self._small is None:
            numbers, scales, reach = quantize_head(self._weight, loops.LANES)
            nothing = np.empty(0, np.float32)
            self._small = loops.Packed(numbers, scales, nothing, z.shape[1], len(scales)), reach
        small, reach = self._small
        near = np.empty((count, small.n), np.float32)
        if z.dtype == np.uint16:
            x, scales = np.empty(z.shape, np.int16), np.empty(count, np.float32)
            loops.in_whole(z, x, scales)
            loops.integers(small, x, scales, near, 0, lanes)
        else:
            loops.packed(small, z[:0, 0], z, near, 0, lanes)
        lengths, counts = np.empty(count, np.float32), np.empty(count, np.int64)
        chosen = np.empty((count, loops.MOST), np.int64)
        loops.within_reach(near, reach, z, lengths, chosen, counts)
        if not np.isfinite(lengths).all() or not np.isfinite(reach[0]) or counts.max() > loops.MOST:
            return None
        places = np.unique(np.concatenate([one[:many] for one, many in zip(chosen, counts, strict=True)]))
        if not 0 < len(places) <= loops.MOST:
            return None
        whole = np.append(places, np.repeat(places[-1:], -len(places) % loops.LANES))  # in whole blocks
        logits = np.empty((count, len(whole)), np.float32)
        loops.alone(loops.Dense(self._whole[whole]), z, logits, lanes)
        own = logits[:, : len(places)] * self._scale
        return places[own.argmax(1)] if np.isfinite(own).all() else None


def quantize_head(weight: Tensor, lanes: int) -> tuple[Any, Any, Any]:
    """Rows in 8 bit (N h,), their scales (N,), N being V in whole lanes, and (V,) how far a logit from them may be off
    for a row of length 1: what 8 bit leave out, and what sums in fp32 and a row in 16 bit may lose. NaN where there is
    a number that is not finite."""
    n, k = weight.shape
    whole = -(-n // lanes) * lanes
    numbers, scales = np.zeros((whole, k), np.int8), np.zeros(whole, np.float32)
    reach = np.empty(n, np.float32)
    lost, together = k * 2.0**-22 + k**0.5 / 65_534, max(1, _NUMBERS // k)
    for begin in range(0, n, together):
        rows = slice(begin, min(n, begin + together))
        some = weight[rows].float()
        scale = some.abs().amax(1) / 127
        small = (some / torch.where(scale > 0, scale, 1.0)[:, None]).round_()
        numbers[rows], scales[rows] = small.to(torch.int8).numpy(), scale.numpy()
        left_out, length = torch.linalg.vector_norm(some - small * scale[:, None], dim=1), some.norm(dim=1)
        reach[rows] = (1.01 * (left_out + lost * (length + left_out))).numpy()
    if not np.isfinite(reach).all():
        reach[:] = np.nan
    return numbers.reshape(-1), scales, reach


def exact_argmax_for(
    head: nn.Linear, whole: Any, z: Any, scale: float, softcap: float | None, read: int
) -> ExactArgmax | None:
    """The head's, where it is worth it. z: of the type of what enters the head; read: bytes of all other weights."""
    loops, (n, k) = screening_loops(), head.weight.shape
    plain = head.bias is None and not softcap and scale > 0
    exact = z.dtype == np.float32 or (loops.AS_HELD and loops.fits(k) and (not loops.TILES or n % loops.LANES == 0))
    worth = head.weight.nbytes > WORTH * (head.weight.nbytes + read)
    return ExactArgmax(head.weight, whole, scale) if plain and exact and worth else None
