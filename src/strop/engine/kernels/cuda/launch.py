"""How the kernels of this room are compiled and started. They compute in fp32 and round once, as eager.py does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

THREAD = 8  # numbers that a thread holds of a row: 16 bytes in 16 bit, the widest access there is


def kernel(*, free: Sequence[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """Makes a kernel of a function in Triton's language. free: numbers that change from call to call, for whose
    divisors it is not compiled anew."""
    compiled: Callable[[Callable[..., None]], Any] = triton.jit(do_not_specialize=list(free))
    return compiled


def part(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return triton.jit(function)


def start(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Starts `grid` programs of a kernel on the device of `like`; nothing where the grid is empty."""
    if 0 in grid:
        return
    if like.device.type == "cuda" and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            launch(kernel, grid, arguments, constants)
    else:
        launch(kernel, grid, arguments, constants)


def launch(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any]) -> None:
    """The one place where a kernel of this room is started, on the current device."""
    kernel[grid](*arguments, **constants)


def power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def warps(numbers: int) -> int:
    """For this many numbers a program, THREAD a thread: from 1 to 16."""
    return min(16, max(1, numbers // (32 * THREAD)))


def rows_of(x: Tensor) -> Tensor:
    """x (.., n) as (T, n) with its numbers side by side in each row: a view where that can be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
