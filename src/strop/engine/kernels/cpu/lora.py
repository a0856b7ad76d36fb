"""LoRA's narrow products as compiled loops, for CPUs with AVX512-BF16; what they must equal is in lora.py.

A product with a rank of 16 takes PyTorch as long to call as to compute, and a step has a thousand of them. Here one
call goes through the rank and back out, block of rows by block of rows (or in alone, where frozen.py does the rest),
and one makes all gradients. An adapter's rank takes a slot, a multiple of 16 columns, with zeros behind it. All sizes
but ranks and rows are multiples of 32.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import get_num_threads, prange
from torch import Tensor

from strop.engine.kernels.cpu.compiled import GAP, array, inline, loop, narrow, wide
from strop.engine.kernels.cpu.tile import COLUMNS, LANES, ROWS, STEP, claim, narrow_pair, pair, product, release, tile
from strop.engine.train.buffers import Allocate, heap_empty
from strop.engine.train.lora import Adapters

BLOCK = 32  # rows that go through together
CHUNK = 256  # columns whose sums are held together
PAIRS, HELD = 32, 512  # pairs of rows that are summed together for a gradient, and columns whose sums are held


@inline
def _over(x: Any, scale: Any, out: Any, step: Any) -> None:
    """x (n, m) fp32: out[j * step + i] = the pair of scale x[i, 2 j] and scale x[i, 2 j + 1], 0 behind the last."""
    n, m = x.shape
    for j in range(m // 2):
        to = out[j * step : j * step + n]
        for i in range(n):
            to[i] = narrow_pair(x[i, 2 * j] * scale, x[i, 2 * j + 1] * scale)
    if m % 2:
        for i in range(n):
            out[m // 2 * step + i] = narrow_pair(x[i, m - 1] * scale, np.float32(0.0))


@inline
def _along(x: Any, scale: Any, out: Any, step: Any) -> None:
    """x (n, m) fp32: out[i * step + j] = the pair of scale x[2 i, j] and scale x[2 i + 1, j], 0 behind the last."""
    n, m = x.shape
    for i in range((n + 1) // 2):
        to, even, odd = out[i * step : i * step + m], x[2 * i], x[min(2 * i + 1, n - 1)]
        second = scale if 2 * i + 1 < n else np.float32(0.0)
        for j in range(m):
            to[j] = narrow_pair(even[j] * scale, odd[j] * second)


@inline
def _lay_forward(a: Any, b: Any, scale: Any, first: Any, rank: Any, second: Any) -> None:
    """One adapter's place in the two matrices that z passes: scale A^T (k, rank) and B^T (r, n)."""
    _over(a, scale, first, rank)
    _over(b, np.float32(1.0), second, len(b))


@inline
def _lay_backward(a: Any, b: Any, scale: Any, first: Any, slot: Any, second: Any) -> None:
    """The same for the gradient: B (n, r) and scale A (rank, k)."""
    _along(b, np.float32(1.0), first, slot)
    _along(a, scale, second, a.shape[1])


@loop
def _through(x: Any, first: Any, enter: Any, second: Any, leave: Any, lanes: Any, thin: Any, onto: Any) -> None:
    """thin (T, R) = x first, and onto = thin second; x (T, k), thin and onto (T, n) bf16.

    enter (N, 5): for each block of `first`: (begin of its rows in x, how many, begin of its columns in thin, how many,
    where it stands in `first`); leave (N, 6): the same of `second`, from thin to onto, and whether it is added there.
    """
    rows, rank = thin.shape
    step, share = x.shape[1], (rows + ROWS * lanes - 1) // (ROWS * lanes) * ROWS
    pairs = x.reshape(-1).view(np.uint32)
    for lane in prange(lanes):
        claim()
        tail = np.empty(ROWS * step, np.uint16)
        sums = np.empty(BLOCK * max(rank, CHUNK) + GAP, np.float32)
        held = np.empty(BLOCK * rank + GAP, np.uint16)
        tail_pairs, held_pairs = tail.view(np.uint32), held.view(np.uint32)
        top, end = lane * share, min((lane + 1) * share, rows)
        while top < end:
            count = min(BLOCK, end - top)
            if count > ROWS:
                count -= count % ROWS
            for i in range(count % ROWS):  # the last rows, where a tile would read behind the end
                for j in range(step):
                    tail[i * step + j] = x[top + i, j]
            for part in range(len(enter)):
                begin, many, to, columns, at = enter[part]
                a, a_at = (tail_pairs, begin) if count % ROWS else (pairs, top * step + begin)
                product(
                    a, a_at // 2, step // 2, first, at, columns, COLUMNS,
                    sums, to, rank, count, columns, many // 2, False,
                )  # fmt: skip
            for i in range(count):
                source, kept, target = sums[i * rank : (i + 1) * rank], held[i * rank : (i + 1) * rank], thin[top + i]
                for j in range(rank):
                    kept[j] = narrow(source[j], thin)
                for j in range(rank):
                    target[j] = kept[j]
            for part in range(len(leave)):
                begin, many, to, columns, at, more = leave[part]
                for chunk in range(0, columns, CHUNK):
                    n = min(CHUNK, columns - chunk)
                    product(
                        held_pairs, begin // 2, rank // 2, second, at + chunk, columns, COLUMNS,
                        sums, 0, CHUNK, count, n, many // 2, False,
                    )  # fmt: skip
                    for i in range(count):
                        target, source = onto[top + i, to + chunk : to + chunk + n], sums[i * CHUNK : i * CHUNK + n]
                        if more:
                            for j in range(n):
                                target[j] = narrow(wide(target[j]) + source[j], onto)
                        else:
                            for j in range(n):
                                target[j] = narrow(source[j], onto)
            top += count
        release()


@inline
def _paired(x: Any, row: Any, begin: Any, n: Any, out: Any) -> None:
    """out[j] = the pair of x[row, begin + j] and what is under it, 0 under the last row."""
    if row >= len(x):
        out[:n] = np.uint32(0)
        return
    even = x[row, begin : begin + n]
    if row + 1 < len(x):
        odd = x[row + 1, begin : begin + n]
        for j in range(n):
            out[j] = pair(even[j], odd[j])
    else:
        for j in range(n):
            out[j] = pair(even[j], np.uint16(0))


@inline
def _outer(thin: Any, x: Any, spans: Any, factors: Any, lane: Any, lanes: Any, out: Any) -> None:
    """One lane's columns of thin^T x, in fp32. thin (T, R), x (T, n).

    spans (N, 6): (begin in thin, slot, begin in x, columns, rank, where in out). out: flat, for each span
    (slot, columns) times factors (R,), or where these are (0,) (columns, rank).
    """
    own, units, widest = (len(x) + 1) // 2, 0, 0
    half = (own + STEP - 1) // STEP * STEP
    for part in range(len(spans)):
        units += spans[part, 3] // COLUMNS
        widest = max(widest, spans[part, 1])
    sums = np.empty(widest * HELD + GAP, np.float32)
    pairs = np.empty(PAIRS * HELD + GAP, np.uint32)
    turned = np.empty(widest * half + GAP, np.uint32)
    low, high = units * lane // lanes, units * (lane + 1) // lanes
    for part in range(len(spans)):
        at, slot, begin, columns, rank, to = spans[part]
        start, end = max(low, 0) * COLUMNS, min(high, columns // COLUMNS) * COLUMNS
        low, high = low - columns // COLUMNS, high - columns // COLUMNS
        if start >= end:
            continue
        for r in range(slot):
            turned[r * half + own : (r + 1) * half] = np.uint32(0)
        for i in range(own):
            even, odd = thin[2 * i], thin[min(2 * i + 1, len(x) - 1)]
            there = np.uint32(0xFFFFFFFF) if 2 * i + 1 < len(x) else np.uint32(0x0000FFFF)
            for r in range(slot):
                turned[r * half + i] = pair(even[at + r], odd[at + r]) & there
        chunks = (end - start + HELD - 1) // HELD
        width = ((end - start) // COLUMNS + chunks - 1) // chunks * COLUMNS
        for chunk in range(start, end, width):
            n = min(width, end - chunk)
            for top in range(0, half, PAIRS):
                many = min(PAIRS, half - top)
                for i in range(many):
                    _paired(x, 2 * (top + i), begin + chunk, n, pairs[i * n : (i + 1) * n])
                for j in range(0, n, COLUMNS):
                    for r in range(0, slot, ROWS):
                        tile(turned, r * half + top, half, pairs, j, n, sums, r * n + j, n, many, top > 0)
            if len(factors) == 0:
                for j in range(n):
                    for r in range(rank):
                        out[to + (chunk + j) * rank + r] = sums[r * n + j]
            else:
                for r in range(slot):
                    target, source = out[to + r * columns + chunk :], sums[r * n : (r + 1) * n]
                    for j in range(n):
                        target[j] = source[j] * factors[at + r]


@loop
def _gradients(
    grad: Any, z: Any, za: Any, grad_za: Any, of_a: Any, of_b: Any, factors: Any, lanes: Any, a: Any, b: Any
) -> None:  # fmt: skip
    for lane in prange(lanes):
        claim()
        one = np.int64(lane)  # numba has two types for it, and would compile all for each
        _outer(grad_za, z, of_a, factors, one, lanes, a)
        _outer(za, grad, of_b, factors[:0], one, lanes, b)
        release()


@dataclass(frozen=True)
class _Plan:
    """Where everything lies, and room for the matrices: `forward` and `backward` are (enter, leave) of _through."""

    rank: int  # of all slots
    ats: tuple[int, ...]  # where each slot begins
    filled: int  # outputs that an adapter adds to
    alone: bool  # none of them has two adapters
    forward: tuple[Any, Any]
    backward: tuple[Any, Any]
    gradients: tuple[Any, Any]  # spans of A and of B
    factors: Any
    matrices: tuple[Any, Any, Any, Any]  # first and second of the forward, first and second of the backward


@lru_cache(maxsize=64)
def _plan(thread: int, width: int, ranks: Any, columns: Any, scales: Any, separate_inputs: bool) -> _Plan:
    """thread: whose room it is. apart: each adapter has its own `width` columns of z."""
    slots = [-(-rank // LANES) * LANES for rank in ranks]
    ats = [sum(slots[:i]) for i in range(len(slots))]
    counts = [end - start for start, end in columns]
    halves = [slot // 2 * count for slot, count in zip(slots, counts, strict=True)]
    offsets = [sum(halves[:i]) for i in range(len(halves))]
    sizes = [rank * count for rank, count in zip(ranks, counts, strict=True)]
    total, factors = sum(slots), np.zeros(sum(slots), np.float32)
    for at, rank, scale in zip(ats, ranks, scales, strict=True):
        factors[at : at + rank] = scale
    each = list(zip(ats, slots, [start for start, _ in columns], counts, strict=True))
    more = [span in columns[:i] for i, span in enumerate(columns)]
    out = [(*place, to, again) for place, to, again in zip(each, offsets, more, strict=True)]
    into = [(start, count, at, slot, to) for at, slot, start, count, to, _ in out]
    of_b = [(*place, rank, sum(sizes[:i])) for i, (place, rank) in enumerate(zip(each, ranks, strict=True))]

    # Of z to thin, of thin to the gradient of z, and of the gradient of A: all adapters at once, or each its own.
    enter, leave, of_a = [(0, width, 0, total, 0)], [(0, total, 0, width, 0, 0)], [(0, total, 0, width, total, 0)]
    if separate_inputs:
        own = [(at, slot, i * width) for i, (at, slot) in enumerate(zip(ats, slots, strict=True))]
        enter = [(begin, width, at, slot, at * (width // 2)) for at, slot, begin in own]
        leave = [(at, slot, begin, width, at // 2 * width, 0) for at, slot, begin in own]
        of_a = [(at, slot, begin, width, slot, at * width) for at, slot, begin in own]

    def room(size: int) -> Any:
        return np.zeros(size, np.uint32)

    all_a, all_b = total // 2 * width, sum(halves)
    return _Plan(
        total,
        tuple(ats),
        sum(count for count, again in zip(counts, more, strict=True) if not again),
        not any(more),
        (np.array(enter), np.array(out)),
        (np.array(into), np.array(leave)),
        (np.array(of_a), np.array(of_b)),
        factors,
        (room(all_a), room(all_b), room(all_b), room(all_a)),
    )


def _plan_of(adapters: Adapters) -> _Plan:
    about = adapters.width, adapters.ranks, adapters.columns, adapters.scales, adapters.separate_inputs
    return _plan(threading.get_ident(), *about)


@dataclass(frozen=True)
class Addend:
    """lora.Added: x (T, k), `first`, enter, `second` and leave as in _through, thin (T, rank) to be computed."""

    x: Tensor
    first: Any
    enter: Any
    second: Any
    leave: Any
    thin: Tensor
    filled: int
    columns: tuple[tuple[int, int], ...] | None  # of leave, from and to; None: product's sums cannot take them

    def into(self, y: Tensor) -> None:
        if self.filled < y.shape[1]:
            y.zero_()
        self._pass(self.leave, y)

    def finish_projection(self) -> None:
        self._pass(self.leave[:0], self.thin)

    def _pass(self, leave: Any, onto: Tensor) -> None:
        lanes = get_num_threads()
        _through(array(self.x), self.first, self.enter, self.second, leave, lanes, array(self.thin), array(onto))


def forward(
    z: Tensor, outputs: int, adapters: Adapters, new: Allocate = heap_empty
) -> tuple[Addend, tuple[Tensor, ...]]:
    plan = _plan_of(adapters)
    first, second = plan.matrices[:2]
    for at, span, (a, b, scale) in zip(plan.ats, plan.forward[1], adapters, strict=True):
        begin, step = (at * (adapters.width // 2), span[1]) if adapters.separate_inputs else (at, plan.rank)
        _lay_forward(array(a), array(b), np.float32(scale), first[begin:], step, second[span[4] :])
    thin = new(len(z), plan.rank, z)
    enter, leave = plan.forward
    columns = adapters.columns if plan.alone else None
    return Addend(z, first, enter, second, leave, thin, plan.filled, columns), (thin,)


def backward(grad: Tensor, kept: tuple[Tensor, ...], adapters: Adapters) -> tuple[Addend, Tensor]:
    plan, width = _plan_of(adapters), adapters.width
    first, second = plan.matrices[2:]
    for at, span, (a, b, scale) in zip(plan.ats, plan.backward[0], adapters, strict=True):
        _lay_backward(array(a), array(b), np.float32(scale), first[span[4] :], span[3], second[at // 2 * width :])
    enter, leave = plan.backward
    thin = grad.new_empty(len(grad), plan.rank)
    columns = None if adapters.separate_inputs else ((0, width),)
    return Addend(grad, first, enter, second, leave, thin, adapters.input_columns, columns), thin


def gradients(
    grad: Tensor, z: Tensor, grad_za: Tensor, kept: tuple[Tensor, ...], adapters: Adapters
) -> list[Tensor]:  # fmt: skip
    """In fp32, as the sums are."""
    plan, width = _plan_of(adapters), adapters.width
    spans = plan.gradients[1]
    a, b = np.empty((plan.rank, width), np.float32), np.empty(spans[-1, 5] + spans[-1, 3] * spans[-1, 4], np.float32)
    lanes = get_num_threads()
    _gradients(
        array(grad), array(z), array(kept[0]), array(grad_za), *plan.gradients, plan.factors, lanes, a.reshape(-1), b
    )  # fmt: skip
    found: list[Tensor] = []
    for at, _, _, count, rank, to in spans:
        found += [torch.from_numpy(a[at : at + rank]), torch.from_numpy(b[to : to + count * rank].reshape(-1, rank))]
    return found
