"""bf16 matrix multiplication in AMX tiles, several times the rate of AVX512-BF16 where the CPU has them.

`generate` is the tile of tile.py, in AMX instructions. `tiled_matmul` multiplies bf16 weights by rows during decoding.
A kernel calls `claim` before its first multiplication, in the thread that computes it, and `release` after its last.
Tile registers (Intel's manual, volume 1, chapter 18) are named by number: 0 and 1 hold sums; 2, 4, 5 take 16 pairs at
a time; 3, 6, 7 take the last 8.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.compiled import (
    I8,
    I64,
    call_llvm,
    kernel,
    pointer,
    prefetch,
    repeat,
    subroutine,
    transpose,
)
from strop.machine.probe import vector_extensions

ROWS = LANES = 16  # rows of a register, and 32-bit elements of a row
STEP = 16  # pairs at a time
COLUMNS = 4 * LANES  # input rows that are multiplied together
PREFETCH_ROWS = 2 * LANES  # distance of prefetching, in weight rows
DEEP = 4 * LANES  # weight rows whose results are written together
_REQUEST_PERMISSION, _TILE_DATA = 0x1023, 18  # arch_prctl's ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
_ARCH_PRCTL = 158
_BYTES = I8.as_pointer()
_WHOLE = [(16, 16)] * 8  # rows and pairs of each register
_WITH_HALVES = [(16, 16), (16, 16), (16, 16), (16, 8), (16, 16), (16, 16), (8, 16), (8, 16)]


def _is_available() -> bool:
    """Return whether the CPU has AMX for bf16 and Linux lets this process use it."""
    if (
        platform.system() != "Linux"
        or platform.machine() != "x86_64"
        or not {"amx_bf16", "avx512f"} <= set(vector_extensions())
    ):
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0


AVAILABLE = _is_available()


def _amx(b: Any, name: str, *args: Any) -> None:
    call_llvm(b, f"llvm.x86.{name}", ir.VoidType(), *args)


def _claim(registers: list[tuple[int, int]]) -> Any:
    """Return an intrinsic that configures the tile registers of the thread."""
    config = np.zeros(64, np.uint8)  # as ldtilecfg reads it: bytes of a row and rows, for each register
    config[0] = 1
    for number, (rows, pairs) in enumerate(registers):
        config[16 + 2 * number], config[48 + number] = 4 * pairs, rows

    def typing(context: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            if AVAILABLE:
                data = ir.Constant(ir.ArrayType(I8, 64), bytearray(config.tobytes()))
                place = b.alloca(data.type)
                b.store(data, place)
                _amx(b, "ldtilecfg", b.bitcast(place, _BYTES))
            return context.get_dummy_value()

        return types.void(), generate

    return intrinsic(typing)


claim, _claim_whole = _claim(_WITH_HALVES), _claim(_WHOLE)


@intrinsic  # type: ignore[untyped-decorator]
def release(context: Any) -> Any:
    """Give the tile registers of the thread back."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if AVAILABLE:
            _amx(b, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def _register(number: int) -> Any:
    return ir.Constant(I8, number)


def _load(b: Any, number: int, place: Any, row_bytes: Any) -> None:
    _amx(b, "tileloadd64", _register(number), b.bitcast(place, _BYTES), row_bytes)


def _store(b: Any, number: int, place: Any, row_bytes: Any) -> None:
    _amx(b, "tilestored64", _register(number), b.bitcast(place, _BYTES), row_bytes)


def _multiply_add(b: Any, sums: int, left: int, right: int) -> None:
    _amx(b, "tdpbf16ps", _register(sums), _register(left), _register(right))


def generate(
    vectors: int, b: Any, a_start: Any, lda: Any, b_start: Any, ldb: Any, c_start: Any, ldc: Any, pairs: Any,
    accumulate: Any,
) -> None:  # fmt: skip
    """Emit c[16, 16 vectors] = a[16, pairs] b[pairs, 16 vectors], or += with `accumulate`; pairs: a multiple of 8."""
    a_row, b_row, c_row = (b.mul(elements, I64(4)) for elements in (lda, ldb, ldc))
    places = [b.gep(c_start, [I64(j * LANES)]) for j in range(vectors)]

    def add(k: Any, left: int, right: int) -> None:
        _load(b, left, b.gep(a_start, [k]), a_row)
        row = b.gep(b_start, [b.mul(k, ldb)])
        for j in range(vectors):
            _load(b, right + j, b.gep(row, [I64(j * LANES)]), b_row)
            _multiply_add(b, j, left, right + j)

    def add_whole(k: Any, _: list[Any]) -> list[Any]:
        add(k, 2, 4)
        return []

    with b.if_else(accumulate) as (existing, fresh):
        with existing:
            for j, place in enumerate(places):
                _load(b, j, place, c_row)
        with fresh:
            for j in range(vectors):
                _amx(b, "tilezero", _register(j))
    whole = b.and_(pairs, I64(-STEP))
    repeat(b, whole, STEP, [], add_whole, may_be_empty=True)
    with b.if_then(b.icmp_signed(">", pairs, whole)):
        add(whole, 3, 6)
    for j, place in enumerate(places):
        _store(b, j, place, c_row)


def _tiles(vectors: int) -> Any:
    def typing(
        context: Any, a: Any, a_at: Any, lda: Any, b: Any, b_at: Any, c: Any, c_at: Any, ldc: Any, pairs: Any
    ) -> Any:  # fmt: skip
        long = types.int64

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds, lda, pairs = signature.args, args[2], args[8]
            a_start, b_start, c_start = (pointer(context, b, kinds[i], args[i], args[i + 1]) for i in (0, 3, 5))
            a_row, b_row, c_row = (b.mul(elements, I64(4)) for elements in (lda, I64(COLUMNS), args[7]))
            ahead = b.mul(lda, I64(PREFETCH_ROWS))
            for j in range(vectors):
                _amx(b, "tilezero", _register(j))

            def body(k: Any, _: list[Any]) -> list[Any]:
                _load(b, 4, b.gep(a_start, [k]), a_row)
                row = b.gep(b_start, [b.mul(k, I64(COLUMNS))])
                for j in range(vectors):
                    _load(b, 5 + j % 3, b.gep(row, [I64(j * LANES)]), b_row)
                    _multiply_add(b, j, 4, 5 + j % 3)
                for i in range(ROWS):
                    prefetch(b, b.gep(a_start, [b.add(b.add(k, ahead), b.mul(lda, I64(i)))]))
                return []

            repeat(b, pairs, STEP, [], body)
            for j in range(vectors):
                _store(b, j, b.gep(c_start, [I64(j * LANES)]), c_row)
            return context.get_dummy_value()

        return types.void(a, long, long, b, long, c, long, long, long), generate

    typing.__doc__ = f"""Compute c[16, {16 * vectors}] = a[16, pairs] b[pairs, {16 * vectors}] with whole registers.

    b has rows of COLUMNS pairs; pairs: a multiple of 16; the rest as in tile.tile.
    """
    return intrinsic(typing)


_tiles_1, _tiles_2, _tiles_3, _tiles_4 = (_tiles(vectors) for vectors in (1, 2, 3, 4))


@subroutine
def packed_buffer(z: Any) -> Any:
    """Allocate what `pack_rows` writes to."""
    return np.empty((len(z) + COLUMNS - 1) // COLUMNS * COLUMNS * (z.shape[1] // 2), np.uint32)


@kernel
def pack_rows(z: Any, out: Any, lanes: Any) -> None:
    """Pack z (T, k) in bf16 for AMX, in blocks of COLUMNS rows, the first pair of each row, then the second, ..."""
    rows, half = z.shape[0], z.shape[1] // 2
    pairs = z.reshape(-1).view(np.uint32)
    for lane in prange(lanes):
        low, high = lane * half // lanes, (lane + 1) * half // lanes
        for i in range(rows):
            begin = i // COLUMNS * COLUMNS * half + i % COLUMNS
            for j in range(low, high):
                out[begin + j * COLUMNS] = pairs[i * half + j]


@kernel
def tiled_matmul(part: Any, packed: Any, y: Any, column: Any, lanes: Any) -> None:
    """Compute y[:, column:] = z w^T of z as `pack_rows` packed it, for whole blocks of LANES rows of w.

    part.w (n, k): bf16 bits, k a multiple of 32; y (T, ..): fp32. A tile holds 16 rows of w and is transposed as it is
    written. The order of each sum does not depend on the number of rows of z.
    """
    n, k = part.w.shape
    rows, width = y.shape
    half, w, out, blocks = k // 2, part.w.reshape(-1).view(np.uint32), y.reshape(-1), n // LANES
    for lane in prange(lanes):
        _claim_whole()
        results = np.empty(DEEP * COLUMNS, np.float32)
        end = (lane + 1) * blocks // lanes * LANES
        for begin in range(lane * blocks // lanes * LANES, end, DEEP):
            deep = min(DEEP, end - begin)
            for first in range(0, rows, COLUMNS):
                count, source = min(COLUMNS, rows - first), first * half
                for c in range(0, deep, LANES):
                    at, to = (begin + c) * half, c * COLUMNS
                    if count > 3 * LANES:
                        _tiles_4(w, at, half, packed, source, results, to, COLUMNS, half)
                    elif count > 2 * LANES:
                        _tiles_3(w, at, half, packed, source, results, to, COLUMNS, half)
                    elif count > LANES:
                        _tiles_2(w, at, half, packed, source, results, to, COLUMNS, half)
                    else:
                        _tiles_1(w, at, half, packed, source, results, to, COLUMNS, half)
                for i in range(0, count, LANES):
                    for c in range(0, deep, LANES):
                        to = (first + i) * width + column + begin + c
                        if i + LANES <= count:
                            transpose(results, c * COLUMNS + i, COLUMNS, out, to, width)
                        else:
                            for row in range(count - i):
                                for j in range(LANES):
                                    out[to + row * width + j] = results[(c + j) * COLUMNS + i + row]
        release()
