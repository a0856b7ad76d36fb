"""Products of a few rows with linear layers, and the adapters on them: dense weights, or straight from 8 or 4 bit.

A weight in 8 or 4 bit is made whole a few rows at a time, in the cache, and multiplied there: the same numbers as of
the whole weight, and a half or a quarter of its way from memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from strop.engine.cpu.compiled import chosen, inline, loop, together
from strop.engine.cpu.dots import LANES, block, edge, mix
from strop.engine.cpu.unpack import ROUNDS, STRETCH, TURN, VECTORS, from_eight, from_four, packed_block


class Dense(NamedTuple):
    """w (n, k): fp32, or bf16's bits."""

    w: Any


class EightBit(NamedTuple):
    """w (n, k) int8, times scale (n,)."""

    w: Any
    scale: Any


class FourBit(NamedTuple):
    """w (n k / 2,): two numbers a byte, the first in its upper half, as places in `code` (16,); each `share` of them
    times one of `scale`. No share goes over the end of a row."""

    w: Any
    scale: Any
    code: Any
    share: Any
    n: Any


class Linear(NamedTuple):
    """Linear layers that share their input, side by side, with all adapters on them.

    weights: a tuple of Dense, EightBit or FourBit. bias (n,) or (0,). a (R, k): the factors A of all adapters; `rows`
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


@loop
def dense(part: Any, z: Any, y: Any, column: Any, lanes: Any) -> None:
    """y[:, column:] = z w^T; z (T, k), y (T, ..) fp32."""
    n, k = part.w.shape
    rows, width = y.shape
    w, x, out, blocks = part.w.reshape(-1), z.reshape(-1), y.reshape(-1), (n + LANES - 1) // LANES
    for lane in prange(lanes):
        for at in range(lane * blocks // lanes * LANES, (lane + 1) * blocks // lanes * LANES, LANES):
            if at + LANES <= n:
                block(w, at * k, k, x, 0, k, out, column + at, width, rows, k)
            else:
                edge(w, at * k, k, n - at, x, 0, k, out, column + at, width, rows, k)


@loop
def eight_bit(part: Any, like: Any, z: Any, y: Any, column: Any, lanes: Any) -> None:
    """The same of a weight in 8 bit; like: an array of the type that the weight has when it is whole."""
    n, k = part.w.shape
    rows, width = y.shape
    x, out, blocks, code = z.reshape(-1), y.reshape(-1), (n + LANES - 1) // LANES, np.empty(0, np.float32)
    w, scales, straight = part.w.reshape(-1), part.scale, _straight(rows, k, k, like, z)
    for lane in prange(lanes):
        held = np.empty(LANES * k, like.dtype)
        for at in range(lane * blocks // lanes * LANES, (lane + 1) * blocks // lanes * LANES, LANES):
            there = min(LANES, n - at)
            if straight and there == LANES:
                packed_block(w, at, scales, k, code, x, out, column + at, width, rows, k)
                continue
            for i in range(there):
                from_eight(w, (at + i) * k, scales[at + i], code, held, i * k, k)
            if there == LANES:
                block(held, 0, k, x, 0, k, out, column + at, width, rows, k)
            else:
                edge(held, 0, k, there, x, 0, k, out, column + at, width, rows, k)


@loop
def four_bit(part: Any, like: Any, z: Any, y: Any, column: Any, lanes: Any) -> None:
    """The same of a weight in 4 bit."""
    n, k = part.n, z.shape[1]
    rows, width = y.shape
    x, out, blocks = z.reshape(-1), y.reshape(-1), (n + LANES - 1) // LANES
    w, scales, code, share = part.w, part.scale, part.code, part.share
    straight = _straight(rows, k, share, like, z)
    for lane in prange(lanes):
        held = np.empty(LANES * k, like.dtype)
        for at in range(lane * blocks // lanes * LANES, (lane + 1) * blocks // lanes * LANES, LANES):
            there = min(LANES, n - at)
            if straight and there == LANES:
                packed_block(w, at, scales, share, code, x, out, column + at, width, rows, k)
                continue
            for number in range(at * k // share, (at + there) * k // share):
                from_four(w, number * share // 2, scales[number], code, held, number * share - at * k, share)
            if there == LANES:
                block(held, 0, k, x, 0, k, out, column + at, width, rows, k)
            else:
                edge(held, 0, k, there, x, 0, k, out, column + at, width, rows, k)


@inline
def _straight(rows: Any, k: Any, share: Any, like: Any, z: Any) -> Any:
    """Rows so few that a weight is multiplied as it is taken apart: for more it is made whole once."""
    able = ROUNDS if like.itemsize == 2 else VECTORS
    even = k % TURN == 0 and (share == k or (share >= STRETCH and share & (share - 1) == 0))
    return able and like.itemsize == z.itemsize and rows <= 4 and even


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


def _weigh(part: Any, like: Any, z: Any, y: Any, column: Any, lanes: Any) -> Any:
    """One weight's product, by its kind; gives its rows."""


@chosen(_weigh)
def _weighed(part: Any, like: Any, z: Any, y: Any, column: Any, lanes: Any) -> Any:
    def whole(part: Any, like: Any, z: Any, y: Any, column: Any, lanes: Any) -> Any:
        dense(part, z, y, column, lanes)
        return len(part.w)

    def in_eight(part: Any, like: Any, z: Any, y: Any, column: Any, lanes: Any) -> Any:
        eight_bit(part, like, z, y, column, lanes)
        return len(part.w)

    def in_four(part: Any, like: Any, z: Any, y: Any, column: Any, lanes: Any) -> Any:
        four_bit(part, like, z, y, column, lanes)
        return part.n

    return {Dense: whole, EightBit: in_eight, FourBit: in_four}[part.instance_class]


@together
def products(linear: Any, like: Any, z: Any, own: Any, y: Any, u: Any, lanes: Any) -> None:
    """y (T, n) of z (T, k): the weights' products, what the adapters add, and the bias. u: room for z A^T, fp32."""
    column = 0
    for part in linear.weights:
        column += _weigh(part, like, z, y, column, lanes)
    most = 0
    for adapter in range(len(linear.rows)):
        most = max(most, linear.rows[adapter, 1])
    thin = u[: len(z) * most].reshape(len(z), most)
    for adapter in range(len(linear.rows)):
        (begin, end), (first, count) = own[adapter], linear.rows[adapter]
        if begin < end and count:
            dense(Dense(linear.a[first : first + count]), z[begin:end], thin[begin:end], 0, lanes)
    if len(linear.spans) or len(linear.bias):
        add(linear.b, linear.spans, linear.gains, linear.bias, thin, own, y, lanes)
