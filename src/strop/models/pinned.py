"""Pinned host memory, to and from which a GPU copies without the host's help."""

from __future__ import annotations

import torch
from torch import Tensor

from strop.machine.probe import free_bytes

RESERVE = 1 << 30  # bytes of host memory that stay free
PIECE = 32 << 20  # bytes; PyTorch rounds the sizes of pinned memory up to powers of two


def allocate_piece(pinned: bool, what: str) -> Tensor:
    """Return PIECE bytes of host memory. Raise MemoryError if little is left, as Linux would end the process.

    what: names what it is for in the error.
    """
    if (available := free_bytes()) < RESERVE + PIECE:
        raise MemoryError(f"out of memory on the host: {available / 2**20:,.0f} MiB left for {what}")
    return torch.empty(PIECE, dtype=torch.uint8, pin_memory=pinned)
