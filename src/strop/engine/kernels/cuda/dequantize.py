"""Triton kernels that dequantize 4-bit and 8-bit weights, computing in fp32 and rounding once."""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from strop.engine.kernels.cuda.launch import kernel, launch, next_power_of_2

TILE = 2048  # maximum number of bytes that a program reads


@dataclass(frozen=True)
class Nested:
    """Double quantization: constant i is levels[constants[i]] * scale[i // block] + offset."""

    levels: Tensor  # (256,) fp32
    scale: Tensor  # fp32, one value per group of `block` constants
    block: int
    offset: float


@kernel(unspecialized=("blocks",))
def _four_bit(
    packed: tensor, code: tensor, constants: tensor, levels: tensor, scale: tensor, out: tensor,
    blocks: tensor, bytes: tensor, count: tensor, offset: tensor,
    NESTED: constexpr, NESTED_BLOCK: constexpr, PAIRS: constexpr, WIDE: constexpr, BLOCKS: constexpr,
) -> None:  # fmt: skip
    """Dequantize BLOCKS blocks of PAIRS bytes each. WIDE: the power of two >= PAIRS."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    if NESTED:
        byte = tl.load(constants + block, mask=block < blocks, other=0).to(tl.int32)
        constant = tl.load(levels + byte) * tl.load(scale + block // NESTED_BLOCK, mask=block < blocks, other=0.0)
        constant = constant + offset
    else:
        constant = tl.load(constants + block, mask=block < blocks, other=0.0).to(tl.float32)
    pair = tl.arange(0, WIDE)[None, :]
    first_byte = block.to(tl.int64)[:, None] * PAIRS
    mask = (pair < PAIRS) & (first_byte + pair < bytes)
    pair_byte = tl.load(packed + first_byte + pair, mask=mask, other=0).to(tl.int32)
    values = (
        tl.interleave(tl.load(code + (pair_byte >> 4)), tl.load(code + (pair_byte & 15))).to(tl.float32)
        * constant[:, None]
    )
    element = tl.arange(0, 2 * WIDE)[None, :]
    mask = (element < 2 * PAIRS) & (2 * first_byte + element < count)
    tl.store(out + 2 * first_byte + element, values.to(out.dtype.element_ty), mask=mask)


def four_bit(packed: Tensor, code: Tensor, constants: Tensor, block: int, nested: Nested | None, out: Tensor) -> Tensor:
    """Dequantize a 4-bit weight into `out` (n, k), contiguous. The result is bitwise equal to that of bitsandbytes.

    Args:
        packed: uint8, two elements per byte, the first in the upper half. An element is an index into `code`.
        code: the 16 values of the 4-bit data type, fp32.
        constants: the factor of each block, fp32; uint8 if the factors are quantized too (`nested`).
        block: the number of elements per block.
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
    step = tl.div_rn(tl.load(scale + row), 127.0)
    tl.store(out + row * N + column, (value * step).to(out.dtype.element_ty), mask=column < N)


def eight_bit(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Write weight (n, k), int8, times scale (n,) / 127 to `out` (n, k), contiguous."""
    assert out.is_contiguous() and weight.is_contiguous()
    rows, n = weight.shape
    block = min(TILE, next_power_of_2(n))
    constants = {"N": n, "BLOCK": block, "num_warps": max(1, min(4, block // 256))}
    launch(_eight_bit, (rows, -(-n // block)), out, weight, scale.contiguous(), out, **constants)
    return out
