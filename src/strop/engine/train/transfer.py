"""Numbers made on the host, on their way to the device of a step: in one copy, for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNED = 16  # bytes between the beginnings of what is sent together


def sent(arrays: Sequence[Any], device: torch.device) -> list[Tensor]:
    """The arrays (numpy, of any shapes and types) as tensors on the device.

    To a card they go side by side in pinned memory (a copy out of any other keeps the host waiting), which PyTorch
    holds until the copy is done.
    """
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    places, end = [], 0
    for array in arrays:
        places.append(end)
        end += -(-array.nbytes // ALIGNED) * ALIGNED
    host = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    room = host.numpy()
    for array, place in zip(arrays, places, strict=True):
        room[place : place + array.nbytes] = array.reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[place : place + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, place in zip(arrays, places, strict=True)
    ]
