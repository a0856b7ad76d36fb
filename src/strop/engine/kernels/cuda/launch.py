"""Compile and launch Triton kernels. They compute in fp32 and round the result once, as eager.py does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

ELEMENTS_PER_THREAD = 8  # 16 bytes of a 16-bit dtype: the widest memory access of a thread


def kernel(*, unspecialized: Sequence[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator that compiles a function in Triton's language as a kernel.

    unspecialized: integer arguments that change from call to call; the kernel is not recompiled for their divisors.
    """
    compiled: Callable[[Callable[..., None]], Any] = triton.jit(do_not_specialize=list(unspecialized))
    return compiled


def device_function(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call."""
    return triton.jit(function)


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch `grid` programs of a kernel on the device of `like`; do nothing if the grid is empty."""
    if 0 in grid:
        return
    if like.device.type == "cuda" and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            enqueue(kernel, grid, arguments, constants)
    else:
        enqueue(kernel, grid, arguments, constants)


def enqueue(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any]) -> None:
    """Launch a kernel on the current device. All launches go through this function."""
    kernel[grid](*arguments, **constants)


def next_power_of_2(n: int) -> int:
    """Return the least power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def warps_for(elements: int) -> int:
    """Return the number of warps for a program of this many elements, from 1 to 16."""
    return min(16, max(1, elements // (32 * ELEMENTS_PER_THREAD)))


def rows_of(x: Tensor) -> Tensor:
    """Return x (.., n) as (T, n) with contiguous rows; a view if x allows it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
