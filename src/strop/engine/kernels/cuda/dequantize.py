"""Dequantize weights in 4 and 8 bits on a GPU, in one kernel, directly to their destination."""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.launch import kernel, launch, next_power_of_2

TILE = 2048  # bytes of a program


@dataclass(frozen=True)
class Nested:
    """Quantization of the blocks' constants: constant i is levels[byte i] * scale[i // block] + offset."""

    levels: Tensor  # (256,) fp32
    scale: Tensor  # fp32
    block: int
    offset: float


@kernel(unspecialized=("blocks",))
def _four_bit(
    packed: tensor, code: tensor, constants: tensor, levels: tensor, scale: tensor, out: tensor,
    blocks: tensor, bytes: tensor, count: tensor, offset: tensor,
    NESTED: constexpr, NESTED_BLOCK: constexpr, PAIRS: constexpr, WIDE: constexpr, BLOCKS: constexpr,
) -> None:  # fmt: skip
    """Dequantize BLOCKS blocks of PAIRS bytes each, the upper half of a byte first; WIDE: a power of two >= PAIRS."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    if NESTED:
        byte = tl.load(constants + block, mask=block < blocks, other=0).to(tl.int32)
        constant = tl.load(levels + byte) * tl.load(scale + block // NESTED_BLOCK, mask=block < blocks, other=0.0)
        constant = constant + offset
    else:
        constant = tl.load(constants + block, mask=block < blocks, other=0.0).to(tl.float32)
    pair = tl.arange(0, WIDE)[None, :]
    first = block.to(tl.int64)[:, None] * PAIRS
    inside = (pair < PAIRS) & (first + pair < bytes)
    two = tl.load(packed + first + pair, mask=inside, other=0).to(tl.int32)
    values = tl.interleave(tl.load(code + (two >> 4)), tl.load(code + (two & 15))).to(tl.float32) * constant[:, None]
    place = tl.arange(0, 2 * WIDE)[None, :]
    inside = (place < 2 * PAIRS) & (2 * first + place < count)
    tl.store(out + 2 * first + place, values.to(out.dtype.element_ty), mask=inside)


def four_bit(packed: Tensor, code: Tensor, constants: Tensor, block: int, nested: Nested | None, out: Tensor) -> Tensor:
    """Write code[half byte] * the block's constant to `out` (n, k), contiguous; computed in fp32, rounded once.

    packed: bytes of two elements each, the first in the upper half. code (16,) fp32. constants: one a block, fp32, or
    bytes if they are quantized (`nested`). block: elements of a block. The bits are those of bitsandbytes.
    """
    assert out.is_contiguous() and block % 2 == 0
    pairs, blocks = block // 2, -(-out.numel() // block)
    wide = next_power_of_2(pairs)
    blocks_per_program = max(1, TILE // wide)
    tables = (nested.levels, nested.scale) if nested else (constants, constants)
    grid, count = (-(-blocks // blocks_per_program),), out.numel()
    launch(
        _four_bit, grid, out, packed, code, constants, *tables, out, blocks, -(-count // 2), count,
        nested.offset if nested else 0.0, NESTED=nested is not None, NESTED_BLOCK=nested.block if nested else 1,
        PAIRS=pairs, WIDE=wide, BLOCKS=blocks_per_program, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@kernel()
def _eight_bit(weight: tensor, scale: tensor, out: tensor, N: constexpr, BLOCK: constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(weight + row * N + column, mask=column < N, other=0).to(tl.float32)
    unit = tl.div_rn(tl.load(scale + row), 127.0)
    tl.store(out + row * N + column, (value * unit).to(out.dtype.element_ty), mask=column < N)


def eight_bit(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Write weight, int8 (n, k), times scale (n,) / 127 to `out` (n, k), contiguous; in fp32, rounded once."""
    assert out.is_contiguous() and weight.is_contiguous()
    rows, n = weight.shape
    block = min(TILE, next_power_of_2(n))
    constants = {"N": n, "BLOCK": block, "num_warps": max(1, min(4, block // 256))}
    launch(_eight_bit, (rows, -(-n // block)), out, weight, scale.contiguous(), out, **constants)
    return out
