"""bf16 matrix multiplication with AMX, which is several times as fast as AVX512-BF16 on CPUs that have it.

`emit_tile` implements tile.tile. `tiled_matmul` multiplies bf16 weights during decoding. Each thread of a kernel calls
`claim_tiles` before its first multiplication and `release_tiles` after its last.

AMX has eight tile registers (Intel's manual, volume 1, chapter 18). `emit_tile` uses 0 and 1 for sums, 2, 4 and 5 for
operands of 16 pairs, and 3, 6 and 7 for a remainder of 8 pairs.
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

ROWS = LANES = 16  # rows per register, and 32-bit elements per row
STEP = 16  # pairs per multiplication
COLUMNS = 4 * LANES  # input rows that are multiplied together
PREFETCH_ROWS = 2 * LANES  # prefetch distance in weight rows
DEEP = 4 * LANES  # weight rows whose results are written together
_REQUEST_PERMISSION, _TILE_DATA = 0x1023, 18  # arch_prctl's ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
_ARCH_PRCTL = 158
_BYTES = I8.as_pointer()
_WHOLE = [(16, 16)] * 8  # rows and pairs per row of each register
_WITH_HALVES = [(16, 16), (16, 16), (16, 16), (16, 8), (16, 16), (16, 16), (8, 16), (8, 16)]


def _is_available() -> bool:
    """Return whether the CPU has AMX for bf16, and request permission to use it from Linux."""
    is_linux = platform.system() == "Linux" and platform.machine() == "x86_64"
    if not is_linux or not {"amx_bf16", "avx512f"} <= set(vector_extensions()):
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0


AVAILABLE = _is_available()


def _amx(builder: Any, name: str, *args: Any) -> None:
    call_llvm(builder, f"llvm.x86.{name}", ir.VoidType(), *args)


def _claim_registers(registers: list[tuple[int, int]]) -> Any:
    """Return an intrinsic that configures the tile registers of the calling thread."""
    config = np.zeros(64, np.uint8)  # the operand of ldtilecfg: row length in bytes and number of rows of each register
    config[0] = 1
    for number, (rows, pairs) in enumerate(registers):
        config[16 + 2 * number], config[48 + number] = 4 * pairs, rows

    def typing(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
            if AVAILABLE:
                data = ir.Constant(ir.ArrayType(I8, 64), bytearray(config.tobytes()))
                address = builder.alloca(data.type)
                builder.store(data, address)
                _amx(builder, "ldtilecfg", builder.bitcast(address, _BYTES))

        return types.void(), generate

    return intrinsic(typing)


claim_tiles, _claim_whole_tiles = _claim_registers(_WITH_HALVES), _claim_registers(_WHOLE)


@intrinsic  # type: ignore[untyped-decorator]
def release_tiles(context: Any) -> Any:
    """Release the tile registers of the calling thread."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
        if AVAILABLE:
            _amx(builder, "tilerelease")

    return types.void(), generate


def _register(number: int) -> Any:
    return ir.Constant(I8, number)


def _load(builder: Any, number: int, address: Any, row_bytes: Any) -> None:
    _amx(builder, "tileloadd64", _register(number), builder.bitcast(address, _BYTES), row_bytes)


def _store(builder: Any, number: int, address: Any, row_bytes: Any) -> None:
    _amx(builder, "tilestored64", _register(number), builder.bitcast(address, _BYTES), row_bytes)


def _multiply_add(builder: Any, sums: int, left: int, right: int) -> None:
    _amx(builder, "tdpbf16ps", _register(sums), _register(left), _register(right))


def emit_tile(
    vectors: int, builder: Any, a_start: Any, lda: Any, b_start: Any, ldb: Any, c_start: Any, ldc: Any, num_pairs: Any,
    accumulate: Any,
) -> None:  # fmt: skip
    """Emit c[16, 16 vectors] = a[16, num_pairs] b[num_pairs, 16 vectors], or += if `accumulate`.

    vectors: tile registers with 16 columns of c. num_pairs: a multiple of 8.
    """
    a_row, b_row, c_row = (builder.mul(elements, I64(4)) for elements in (lda, ldb, ldc))
    outputs = [builder.gep(c_start, [I64(j * LANES)]) for j in range(vectors)]

    def add(k: Any, left: int, right: int) -> None:
        _load(builder, left, builder.gep(a_start, [k]), a_row)
        row = builder.gep(b_start, [builder.mul(k, ldb)])
        for j in range(vectors):
            _load(builder, right + j, builder.gep(row, [I64(j * LANES)]), b_row)
            _multiply_add(builder, j, left, right + j)

    def add_whole(k: Any, _: list[Any]) -> None:
        add(k, 2, 4)

    with builder.if_else(accumulate) as (then, otherwise):
        with then:
            for j, output in enumerate(outputs):
                _load(builder, j, output, c_row)
        with otherwise:
            for j in range(vectors):
                _amx(builder, "tilezero", _register(j))
    whole_steps = builder.and_(num_pairs, I64(-STEP))
    repeat(builder, whole_steps, STEP, [], add_whole, may_be_empty=True)
    with builder.if_then(builder.icmp_signed(">", num_pairs, whole_steps)):
        add(whole_steps, 3, 6)
    for j, output in enumerate(outputs):
        _store(builder, j, output, c_row)


def _tiles(vectors: int) -> Any:
    def typing(
        context: Any, a: Any, a_at: Any, lda: Any, b: Any, b_at: Any, c: Any, c_at: Any, ldc: Any,
        num_pairs: Any,
    ) -> Any:  # fmt: skip
        long = types.int64

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
            kinds, lda, num_pairs = signature.args, args[2], args[8]
            a_start, b_start, c_start = (pointer(context, builder, kinds[i], args[i], args[i + 1]) for i in (0, 3, 5))
            a_row, b_row, c_row = (builder.mul(elements, I64(4)) for elements in (lda, I64(COLUMNS), args[7]))
            prefetch_offset = builder.mul(lda, I64(PREFETCH_ROWS))
            for j in range(vectors):
                _amx(builder, "tilezero", _register(j))

            def body(k: Any, _: list[Any]) -> None:
                _load(builder, 4, builder.gep(a_start, [k]), a_row)
                row = builder.gep(b_start, [builder.mul(k, I64(COLUMNS))])
                for j in range(vectors):
                    _load(builder, 5 + j % 3, builder.gep(row, [I64(j * LANES)]), b_row)
                    _multiply_add(builder, j, 4, 5 + j % 3)
                for i in range(ROWS):
                    offset = builder.add(builder.add(k, prefetch_offset), builder.mul(lda, I64(i)))
                    prefetch(builder, builder.gep(a_start, [offset]))

            repeat(builder, num_pairs, STEP, [], body)
            for j in range(vectors):
                _store(builder, j, builder.gep(c_start, [I64(j * LANES)]), c_row)

        return types.void(a, long, long, b, long, c, long, long, long), generate

    typing.__doc__ = f"""Compute c[16, {16 * vectors}] = a[16, num_pairs] b[num_pairs, {16 * vectors}].

    num_pairs: a multiple of 16. Rows of b are COLUMNS elements apart. The other arguments are those of tile.tile.
    """
    return intrinsic(typing)


_tiles_1, _tiles_2, _tiles_3, _tiles_4 = (_tiles(vectors) for vectors in (1, 2, 3, 4))


@subroutine
def packed_buffer(z: Any) -> Any:
    """Allocate the output of `pack_rows` for z (T, k)."""
    return np.empty((len(z) + COLUMNS - 1) // COLUMNS * COLUMNS * (z.shape[1] // 2), np.uint32)


@kernel
def pack_rows(z: Any, out: Any, threads: Any) -> None:
    """Write z (T, k) in bf16 to `out` as transposed blocks (k / 2, COLUMNS) of pairs, one for each COLUMNS rows."""
    rows, half = z.shape[0], z.shape[1] // 2
    pairs = z.reshape(-1).view(np.uint32)
    for thread in prange(threads):
        low, high = thread * half // threads, (thread + 1) * half // threads
        for i in range(rows):
            begin = i // COLUMNS * COLUMNS * half + i % COLUMNS
            for j in range(low, high):
                out[begin + j * COLUMNS] = pairs[i * half + j]


@kernel
def tiled_matmul(weight: Any, packed: Any, y: Any, column: Any, threads: Any) -> None:
    """Compute y[:, column:] = z w^T, except for the last n % LANES columns.

    w is weight.w (n, k), bf16 bits, with k a multiple of 32. packed: z as packed by `pack_rows`. y (T, ..): fp32. Tiles
    hold w z^T and are transposed when written. The order of summation does not depend on the number of rows of z.
    """
    n, k = weight.w.shape
    rows, width = y.shape
    half, w, out, blocks = k // 2, weight.w.reshape(-1).view(np.uint32), y.reshape(-1), n // LANES
    for thread in prange(threads):
        _claim_whole_tiles()
        results = np.empty(DEEP * COLUMNS, np.float32)
        end = (thread + 1) * blocks // threads * LANES
        for begin in range(thread * blocks // threads * LANES, end, DEEP):
            num_rows = min(DEEP, end - begin)
            for first in range(0, rows, COLUMNS):
                count, packed_at = min(COLUMNS, rows - first), first * half
                for c in range(0, num_rows, LANES):
                    w_at, offset = (begin + c) * half, c * COLUMNS
                    if count > 3 * LANES:
                        _tiles_4(w, w_at, half, packed, packed_at, results, offset, COLUMNS, half)
                    elif count > 2 * LANES:
                        _tiles_3(w, w_at, half, packed, packed_at, results, offset, COLUMNS, half)
                    elif count > LANES:
                        _tiles_2(w, w_at, half, packed, packed_at, results, offset, COLUMNS, half)
                    else:
                        _tiles_1(w, w_at, half, packed, packed_at, results, offset, COLUMNS, half)
                for i in range(0, count, LANES):
                    for c in range(0, num_rows, LANES):
                        offset = (first + i) * width + column + begin + c
                        if i + LANES <= count:
                            transpose(results, c * COLUMNS + i, COLUMNS, out, offset, width)
                        else:
                            for row in range(count - i):
                                for j in range(LANES):
                                    out[offset + row * width + j] = results[(c + j) * COLUMNS + i + row]
        release_tiles()
