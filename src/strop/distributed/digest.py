"""Whether ranks hold the same tensors: one number of each, which any single change of an element changes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """int64 (n,) on the CPU: of each tensor the sum of its bits as integers, times 1, 3, 5, ... modulo 2^64.

    An odd factor loses no bit, so one element that differs, by however little, gives another number.
    """
    return torch.tensor([_one(tensor) for tensor in tensors], dtype=torch.int64)


def _one(tensor: Tensor) -> int:
    bits = tensor.detach().contiguous().flatten().view(_WORDS[tensor.element_size()]).long()
    return int((bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()) if len(bits) else 0
