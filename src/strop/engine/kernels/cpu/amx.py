"""The tile product of bf16 in AMX's own instructions, for numba's loops: several times AVX512-BF16's rate, where it is.

A loop says `claim` before its first product, in the thread that computes it, and `release` behind its last. Registers
(Intel's manual, volume 1, chapter 18) go by number: 0 and 1 hold sums; 2, 4, 5 take 16 pairs at a time; 3, 6, 7 the
last 8.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from strop.engine.kernels.cpu.dots import prefetch
from strop.machine.probe import vector_extensions

ROWS = LANES = 16  # of a register, of 64 bytes each
STEP = 16  # pairs at a time
_ASK_FOR_STATE, _TILE_DATA = 0x1023, 18  # arch_prctl's request to use the registers, and what they are to Linux
_ARCH_PRCTL = 158

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_PLACE = _I8.as_pointer()


def _allowed() -> bool:
    """The CPU has AMX for bf16, and Linux lets this process use it."""
    if (
        platform.system() != "Linux"
        or platform.machine() != "x86_64"
        or not {"amx_bf16", "avx512f"} <= set(vector_extensions())
    ):
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA)) == 0


THERE = _allowed()


WHOLE = [(16, 16)] * 8
WITH_HALVES = [(16, 16), (16, 16), (16, 16), (16, 8), (16, 16), (16, 16), (8, 16), (8, 16)]


def _shapes(registers: list[tuple[int, int]]) -> Any:
    """What ldtilecfg reads: for each register, bytes a row and rows."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    for register, (rows, pairs) in enumerate(registers):
        config[16 + 2 * register], config[48 + register] = 4 * pairs, rows
    return config


def _do(b: Any, name: str, *args: Any) -> None:
    name = f"llvm.x86.{name}"
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


def _claim(registers: list[tuple[int, int]]) -> Any:
    def typing(context: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            if THERE:
                data = ir.Constant(ir.ArrayType(_I8, 64), bytearray(_shapes(registers).tobytes()))
                place = b.alloca(data.type)
                b.store(data, place)
                _do(b, "ldtilecfg", b.bitcast(place, _PLACE))
            return context.get_dummy_value()

        return types.void(), generate

    return intrinsic(typing)


claim, claim_whole = _claim(WITH_HALVES), _claim(WHOLE)


@intrinsic  # type: ignore[untyped-decorator]
def release(context: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if THERE:
            _do(b, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def register(number: int) -> Any:
    return ir.Constant(_I8, number)


def load(b: Any, number: int, place: Any, row_to_row: Any) -> None:
    """row_to_row: in bytes."""
    _do(b, "tileloadd64", register(number), b.bitcast(place, _PLACE), row_to_row)


def generate_wide(
    vectors: int, b: Any, a_start: Any, lda: Any, b_start: Any, ldb: Any, c_start: Any, ldc: Any, pairs: Any, ahead: Any
) -> None:
    """c[16, 16 vectors] = a[16, pairs] b[pairs, 16 vectors], at most 4 vectors and pairs a multiple of 16, with all
    registers whole. Memory is asked for the rows of a that lie `ahead` of these."""
    a_row, b_row, c_row = (b.mul(words, _I64(4)) for words in (lda, ldb, ldc))
    further = b.mul(lda, ahead)
    for j in range(vectors):
        _do(b, "tilezero", register(j))
    before, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    k = b.phi(_I64)
    k.add_incoming(_I64(0), before)
    load(b, 4, b.gep(a_start, [k]), a_row)
    row = b.gep(b_start, [b.mul(k, ldb)])
    for j in range(vectors):
        load(b, 5 + j % 3, b.gep(row, [_I64(j * LANES)]), b_row)
        _do(b, "tdpbf16ps", register(j), register(4), register(5 + j % 3))
    for i in range(ROWS):
        prefetch(b, b.gep(a_start, [b.add(b.add(k, further), b.mul(lda, _I64(i)))]))
    after = b.add(k, _I64(STEP))
    k.add_incoming(after, loop)
    b.cbranch(b.icmp_signed("<", after, pairs), loop, done)
    b.position_at_end(done)
    for j in range(vectors):
        place = b.gep(c_start, [_I64(j * LANES)])
        _do(b, "tilestored64", register(j), b.bitcast(place, _PLACE), c_row)


def generate(
    vectors: int, b: Any, a_start: Any, lda: Any, b_start: Any, ldb: Any, c_start: Any, ldc: Any, pairs: Any, onto: Any
) -> None:  # fmt: skip
    """c[16, 16 vectors] = a[16, pairs] b[pairs, 16 vectors], or += with `onto`; pairs a multiple of 8."""

    a_row, b_row, c_row = (b.mul(words, _I64(4)) for words in (lda, ldb, ldc))
    places = [b.gep(c_start, [_I64(j * LANES)]) for j in range(vectors)]

    def add(k: Any, left: int, right: int) -> None:
        load(b, left, b.gep(a_start, [k]), a_row)
        row = b.gep(b_start, [b.mul(k, ldb)])
        for j in range(vectors):
            load(b, right + j, b.gep(row, [_I64(j * LANES)]), b_row)
            _do(b, "tdpbf16ps", register(j), register(left), register(right + j))

    with b.if_else(onto) as (there, fresh):
        with there:
            for j, place in enumerate(places):
                load(b, j, place, c_row)
        with fresh:
            for j in range(vectors):
                _do(b, "tilezero", register(j))
    whole, before = b.and_(pairs, _I64(-STEP)), b.block
    loop, rest, half, done = (b.append_basic_block(name) for name in ("loop", "rest", "half", "done"))
    b.cbranch(b.icmp_signed(">", whole, _I64(0)), loop, rest)
    b.position_at_end(loop)
    k = b.phi(_I64)
    k.add_incoming(_I64(0), before)
    add(k, 2, 4)
    after = b.add(k, _I64(STEP))
    k.add_incoming(after, b.block)
    b.cbranch(b.icmp_signed("<", after, whole), loop, rest)
    b.position_at_end(rest)
    b.cbranch(b.icmp_signed(">", pairs, whole), half, done)
    b.position_at_end(half)
    add(whole, 3, 6)
    b.branch(done)
    b.position_at_end(done)
    for j, place in enumerate(places):
        _do(b, "tilestored64", register(j), b.bitcast(place, _PLACE), c_row)
