"""Weights in 4 and 8 bit as numbers again, on a card: one kernel, straight to where they are wanted."""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.launch import kernel, power, start

TILE = 2048  # bytes a program


@dataclass(frozen=True)
class Nested:
    """How the constants of blocks are quantized: constant i is levels[byte i] * scale[i // block] + offset."""

    levels: Tensor  # (256,) fp32
    scale: Tensor  # fp32
    block: int
    offset: float


@kernel(free=("blocks",))
def _four_bit(
    packed: tensor, code: tensor, constants: tensor, levels: tensor, scale: tensor, out: tensor,
    blocks: tensor, bytes: tensor, count: tensor, offset: tensor,
    NESTED: constexpr, NESTED_BLOCK: constexpr, PAIRS: constexpr, WIDE: constexpr, BLOCKS: constexpr,
) -> None:  # fmt: skip
    """A block has PAIRS bytes, of which the upper halves stand first; WIDE: a power of two from PAIRS on."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    if NESTED:
        byte = tl.load(constants + block, mask=block < blocks, other=0).to(tl.int32)
        constant = tl.load(levels + byte) * tl.load(scale + block // NESTED_BLOCK, mask=block < blocks, other=0.0)
        constant = constant + offset
    else:
        constant = tl.load(constants + block, mask=block < blocks, other=0.0).to(tl.float32)
    pair = tl.arange(0, WIDE)[None, :]
    first = block.to(tl.int64)[:, None] * PAIRS
    there = (pair < PAIRS) & (first + pair < bytes)
    two = tl.load(packed + first + pair, mask=there, other=0).to(tl.int32)
    numbers = tl.interleave(tl.load(code + (two >> 4)), tl.load(code + (two & 15))).to(tl.float32) * constant[:, None]
    place = tl.arange(0, 2 * WIDE)[None, :]
    there = (place < 2 * PAIRS) & (2 * first + place < count)
    tl.store(out + 2 * first + place, numbers.to(out.dtype.element_ty), mask=there)


def four_bit(packed: Tensor, code: Tensor, constants: Tensor, block: int, nested: Nested | None, out: Tensor) -> Tensor:
    """out (n, k) without gaps gets code[half byte] * constant of its block of numbers, in fp32, rounded once.

    packed: bytes with two numbers in it each, the first in the upper half. code (16,) fp32. constants: of each block,
    fp32, or bytes where they are `nested`. The bits are those of bitsandbytes.
    """
    assert out.is_contiguous() and block % 2 == 0
    pairs, blocks = block // 2, -(-out.numel() // block)
    wide = power(pairs)
    many = max(1, TILE // wide)
    known = (nested.levels, nested.scale) if nested else (constants, constants)
    grid, count = (-(-blocks // many),), out.numel()
    start(
        _four_bit, grid, out, packed, code, constants, *known, out, blocks, -(-count // 2), count,
        nested.offset if nested else 0.0, NESTED=nested is not None, NESTED_BLOCK=nested.block if nested else 1,
        PAIRS=pairs, WIDE=wide, BLOCKS=many, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@kernel()
def _eight_bit(weight: tensor, scale: tensor, out: tensor, N: constexpr, BLOCK: constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of = tl.load(weight + row * N + column, mask=column < N, other=0).to(tl.float32)
    share = tl.div_rn(tl.load(scale + row), 127.0)
    tl.store(out + row * N + column, (of * share).to(out.dtype.element_ty), mask=column < N)


def eight_bit(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out (n, k) without gaps gets weight, int8 (n, k), times scale (n,) / 127, in fp32, rounded once."""
    assert out.is_contiguous() and weight.is_contiguous()
    rows, n = weight.shape
    block = min(TILE, power(n))
    constants = {"N": n, "BLOCK": block, "num_warps": max(1, min(4, block // 256))}
    start(_eight_bit, (rows, -(-n // block)), out, weight, scale.contiguous(), out, **constants)
    return out
