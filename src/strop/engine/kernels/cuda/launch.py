"""Compile and launch Triton kernels, which compute in fp32 and round the result once, like kernels/eager.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

ELEMENTS_PER_THREAD = 8  # in 16-bit dtypes these are 16 bytes, the widest memory access of a thread


def kernel(*, unspecialized: Sequence[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator like triton.jit. unspecialized: arguments whose values do not cause a recompilation."""
    compiled: Callable[[Callable[..., None]], Any] = triton.jit(do_not_specialize=list(unspecialized))
    return compiled


def device_function(function: Callable[..., Any]) -> Any:
    """Compile a function that is called from kernels."""
    return triton.jit(function)


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of `like`, unless the grid is empty."""
    if 0 in grid:
        return
    if like.device.type == "cuda" and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            enqueue(kernel, grid, arguments, constants)
    else:
        enqueue(kernel, grid, arguments, constants)


def enqueue(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any]) -> None:
    """Launch a kernel on the current device. Tests replace this function to record all launches."""
    kernel[grid](*arguments, **constants)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def warps_for(elements: int) -> int:
    """Return the number of warps, from 1 to 16, for a program that processes this many elements."""
    return min(16, max(1, elements // (32 * ELEMENTS_PER_THREAD)))


def as_rows(x: Tensor) -> Tensor:
    """Return x (..., n) as (T, n) with contiguous rows: a view if possible, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
