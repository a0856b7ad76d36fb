"""Products of a few rows with linear layers, and the adapters on them: dense weights, or straight from 8 or 4 bit.

A weight in 8 or 4 bit is made whole a few rows at a time, in the cache, and multiplied there: the same numbers as of
the whole weight, and a half or a quarter of its way from memory. In 8 bit, behind what enters in bf16, it is multiplied
as it is held (integer_dots).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange, types

from strop.engine.kernels.cpu import amx
from strop.engine.kernels.cpu.amx import lay_out, room_for
from strop.engine.kernels.cpu.compiled import chosen, inline, loop, together
from strop.engine.kernels.cpu.dequantize import TURN, able, make_whole, packed_block
from strop.engine.kernels.cpu.dots import AHEAD, LANES, block, edge, mix, one_in_order
from strop.engine.kernels.cpu.int8_dots import AS_HELD, STRETCH, fits, in_whole, whole_block, whole_block_in_order


class Dense(NamedTuple):
    """w (n, k): fp32, or bf16's bits."""

    w: Any


class Packed(NamedTuple):
    """n rows in 8 or 4 bit. w: int8, and `code` (0,); or two numbers a byte, the first in its upper half, as places in
    `code` (16,). Each `share` of the numbers times one of `scale`: in 8 bit a row, in 4 bit no more than one."""

    w: Any
    scale: Any
    code: Any
    share: Any
    n: Any


class Linear(NamedTuple):
    """Linear layers that share their input, side by side, with all adapters on them.

    weights: a tuple of Dense or Packed. bias (n,) or (0,). a (R, k): the factors A of all adapters; `rows`
    (adapters, 2): the first of an adapter's, and how many. b: their factors B^T times the scale, one behind the other;
    spans (N, 6): adapter, first of its rows of A, rank, first column, columns, where in b. gains (adapters, n) or
    (0, 0): DoRA's.
    """

    weights: Any
    bias: Any
    a: Any
    rows: Any
    b: Any
    spans: Any
    gains: Any


@inline
def share_of(lane: Any, lanes: Any, n: Any) -> Any:
    """The columns of a lane, from and to."""
    blocks = (n + LANES - 1) // LANES
    return lane * blocks // lanes * LANES, min(n, (lane + 1) * blocks // lanes * LANES)


TILES = amx.THERE  # AMX multiplies: the same numbers for a row however many there are, and other than `block` gives
if TILES:
    from strop.engine.kernels.cpu.amx import tiled
else:

    @together
    def tiled(part: Any, laid: Any, y: Any, column: Any, lanes: Any) -> None:
        """There are no tiles."""


@inline
def in_tiles(w: Any, z: Any) -> Any:
    """Whether a weight (n, k) is multiplied in tiles by z (T, k)."""
    return TILES and w.itemsize == 2 and z.itemsize == 2 and z.shape[1] % 32 == 0


@together
def dense(part: Any, z: Any, laid: Any, y: Any, column: Any, lanes: Any) -> None:
    """y[:, column:] = z w^T; z (T, k), y (T, ..) fp32. laid: z laid out, where it is multiplied in tiles."""
    n = len(part.w)
    whole = 0
    if in_tiles(part.w, z):
        tiled(part, laid, y, column, lanes)
        whole = n // LANES * LANES
    if whole < n and len(z) == 1 and z.shape[1] % (2 * LANES) == 0:
        dots_of_one(Dense(part.w[whole:]), z, y, column + whole, lanes)
    elif whole < n:
        dots(Dense(part.w[whole:]), z, y, column + whole, lanes)


@together
def alone(part: Any, z: Any, y: Any, lanes: Any) -> None:
    """The same of a z that is not laid out yet."""
    laid = room_for(z if in_tiles(part.w, z) else z[:0])
    if in_tiles(part.w, z):
        lay_out(z, laid, lanes)
    dense(part, z, laid, y, 0, lanes)


@loop
def dots(part: Any, z: Any, y: Any, column: Any, lanes: Any) -> None:
    """y[:, column:] = z w^T; z (T, k), y (T, ..) fp32."""
    n, k = part.w.shape
    rows, width = y.shape
    w, x, out = part.w.reshape(-1), z.reshape(-1), y.reshape(-1)
    for lane in prange(lanes):
        low, high = share_of(lane, lanes, n)
        for at in range(low, high, LANES):
            if at + LANES <= n:
                until = min(at + AHEAD + LANES, high) * k
                block(w, at * k, k, x, 0, k, out, column + at, width, rows, k, w, (at + AHEAD) * k, until)
            else:
                edge(w, at * k, k, n - at, x, 0, k, out, column + at, width, rows, k)


@loop
def dots_of_one(part: Any, z: Any, y: Any, column: Any, lanes: Any) -> None:
    """The same of a single row, of numbers in whole steps of dots.Kind."""
    n, k = part.w.shape
    w, x, out = part.w.reshape(-1), z.reshape(-1), y.reshape(-1)
    for lane in prange(lanes):
        low, high = share_of(lane, lanes, n)
        for at in range(low, high, LANES):
            if at + LANES <= n:
                one_in_order(w, at * k, k, x, 0, out, column + at, k)
            else:
                edge(w, at * k, k, n - at, x, 0, k, out, column + at, y.shape[1], 1, k)


@loop
def packed(part: Any, like: Any, z: Any, y: Any, column: Any, lanes: Any) -> None:
    """The same of a weight in 8 or 4 bit; like: an array of the type that the weight has when it is whole."""
    n, k = part.n, z.shape[1]
    rows, width = y.shape
    x, out = z.reshape(-1), y.reshape(-1)
    w, scale, code, share = part.w, part.scale, part.code, part.share
    row = k // 2 if len(code) else k
    straight = _straight(rows, k, share, like, z)
    for lane in prange(lanes):
        held = np.empty(LANES * k, like.dtype)
        low, high = share_of(lane, lanes, n)
        for at in range(low, high, LANES):
            there = min(LANES, n - at)
            if straight and there == LANES:
                packed_block(w, at, scale, share, code, x, out, column + at, width, rows, k)
                continue
            for i in range(there):
                make_whole(w, at + i, scale, share, code, held, i * k, k)
            if there == LANES:
                until = min(at + AHEAD + LANES, high) * row
                block(held, 0, k, x, 0, k, out, column + at, width, rows, k, w, (at + AHEAD) * row, until)
            else:
                edge(held, 0, k, there, x, 0, k, out, column + at, width, rows, k)


@loop
def integers(part: Any, x: Any, scales: Any, y: Any, column: Any, lanes: Any) -> None:
    """y[:, column:] = z w^T of a weight in 8 bit, for n in whole blocks of LANES; x, scales: z as in_whole gives it."""
    rows, width = y.shape
    k = x.shape[1]
    n = part.n // LANES * LANES
    numbers, out, w, w_scales = x.reshape(-1), y.reshape(-1), part.w, part.scale
    for lane in prange(lanes):
        low, high = share_of(lane, lanes, n)
        more = np.empty(rows * LANES if k > STRETCH else 0, np.float32)
        for at in range(low, high, LANES):
            ask, until = (at + AHEAD) * k, min(at + AHEAD + LANES, high) * k
            to, count = column + at, min(k, STRETCH)
            if rows <= 2:
                whole_block_in_order(w, at, k, w_scales, numbers, scales, out, to, width, rows, 0, count)
            else:
                whole_block(w, at, k, w_scales, numbers, scales, out, to, width, rows, 0, count, ask, until)
            for first in range(STRETCH, k, STRETCH):
                ask, count = ask + LANES * STRETCH, min(STRETCH, k - first)
                whole_block(w, at, k, w_scales, numbers, scales, more, 0, LANES, rows, first, count, ask, until)
                for i in range(rows):
                    for j in range(LANES):
                        out[i * width + to + j] += more[i * LANES + j]


@inline
def _straight(rows: Any, k: Any, share: Any, like: Any, z: Any) -> Any:
    """Rows so few that a weight is multiplied as it is taken apart: for more, and for 3, which would be 2 and 1, it is
    made whole once."""
    even = k % TURN == 0 and (share == k or share & (share - 1) == 0)
    return able(share, like) and even and like.itemsize == z.itemsize and rows <= 4 and rows != 3


@loop
def add(b: Any, spans: Any, all_gains: Any, bias: Any, u: Any, own: Any, y: Any, lanes: Any) -> None:
    """What adapters add to y (T, n), and the bias; b and what follows: of a Linear. u (T, ..): z A^T, of each row by
    its own adapter."""
    n = y.shape[1]
    ys, us = y.reshape(-1), u.reshape(-1)
    for lane in prange(lanes):
        low, high = share_of(lane, lanes, n)
        for part in range(len(spans)):
            adapter, first, rank, column, columns, at = spans[part]
            begin, end = own[adapter]
            left, right = max(low, column), min(high, column + columns)
            if begin < end and left < right:
                whole = (right - left) // LANES * LANES
                mix(
                    us, begin * u.shape[1] + first, u.shape[1], b, at + left - column, columns,
                    ys, begin * n + left, n, end - begin, rank, whole,
                )  # fmt: skip
                for i in range(begin, end):
                    for c in range(left + whole, right):
                        total = y[i, c]
                        for j in range(rank):
                            total += u[i, first + j] * b[at + j * columns + c - column]
                        y[i, c] = total
        for adapter in range(len(all_gains)):
            gains = all_gains[adapter]
            for i in range(own[adapter, 0], own[adapter, 1]):
                for c in range(low, high):
                    y[i, c] *= gains[c]
        if len(bias):
            for i in range(len(y)):
                for c in range(low, high):
                    y[i, c] += bias[c]


def _weigh(part: Any, room: Any, z: Any, laid: Any, y: Any, column: Any, lanes: Any) -> Any:
    """One weight's product, by its kind; gives its rows."""


@chosen(_weigh)
def _weighed(part: Any, room: Any, z: Any, laid: Any, y: Any, column: Any, lanes: Any) -> Any:
    def whole(part: Any, room: Any, z: Any, laid: Any, y: Any, column: Any, lanes: Any) -> Any:
        dense(part, z, laid, y, column, lanes)
        return len(part.w)

    def in_parts(part: Any, room: Any, z: Any, laid: Any, y: Any, column: Any, lanes: Any) -> Any:
        packed(part, room.like, z, y, column, lanes)
        return part.n

    def as_held(part: Any, room: Any, z: Any, laid: Any, y: Any, column: Any, lanes: Any) -> Any:
        n, k = part.n // LANES * LANES if fits(z.shape[1]) else 0, z.shape[1]
        if n:
            integers(part, room.x[: z.size].reshape(z.shape), room.scales, y, column, lanes)
        if n < part.n:
            rest = Packed(part.w[n * k :], part.scale[n:], part.code, part.share, part.n - n)
            packed(rest, room.like, z, y, column + n, lanes)
        return part.n

    if part.instance_class is Packed and _in_integers(part, z):
        return as_held
    return {Dense: whole, Packed: in_parts}[part.instance_class]


def _in_integers(part: Any, z: Any) -> bool:
    """By their types: a weight in 8 bit is multiplied as it is held."""
    return AS_HELD and part.types[part.fields.index("w")].dtype == types.int8 and z.dtype == types.uint16


def _round(weights: Any, room: Any, z: Any) -> None:
    """Makes z whole numbers, where the first of the weights wants them."""


@chosen(_round)
def _rounded(weights: Any, room: Any, z: Any) -> Any:
    def whole(weights: Any, room: Any, z: Any) -> None:
        if fits(z.shape[1]):
            in_whole(z, room.x[: z.size].reshape(z.shape), room.scales)

    def nothing(weights: Any, room: Any, z: Any) -> None:
        pass

    first = weights.types[0]
    return whole if first.instance_class is Packed and _in_integers(first, z) else nothing


@together
def products(linear: Any, room: Any, z: Any, own: Any, y: Any, lanes: Any) -> None:
    """y (T, n) of z (T, k): the weights' products, what the adapters add, and the bias. room: passes.Room."""
    column, laid = 0, room_for(z if in_tiles(z, z) else z[:0])
    if in_tiles(z, z):
        lay_out(z, laid, lanes)
    _round(linear.weights, room, z)
    for part in linear.weights:
        column += _weigh(part, room, z, laid, y, column, lanes)
    most = 0
    for adapter in range(len(linear.rows)):
        most = max(most, linear.rows[adapter, 1])
    thin = room.u[: len(z) * most].reshape(len(z), most)
    for adapter in range(len(linear.rows)):
        (begin, end), (first, count) = own[adapter], linear.rows[adapter]
        if begin < end and count:
            own_rows = z[begin:end]
            if end - begin < len(z) and in_tiles(z, z):
                lay_out(own_rows, laid, lanes)
            dense(Dense(linear.a[first : first + count]), own_rows, laid, thin[begin:end], 0, lanes)
    if len(linear.spans) or len(linear.bias):
        add(linear.b, linear.spans, linear.gains, linear.bias, thin, own, y, lanes)
