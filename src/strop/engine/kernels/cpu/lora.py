"""LoRA's narrow matrix multiplications as compiled kernels, for CPUs with AVX512-BF16; specified by train/lora.py.

A matmul with a rank of 16 takes PyTorch as long to call as to compute, and a step has a thousand of them. Here one call
computes A and B, one block of rows after another (or A alone, where bf16_matmul.py does the rest), and one call
computes all gradients. The rank of an adapter is padded with zeros to a slot, a multiple of 16 columns. All sizes but
ranks and rows are multiples of 32.
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

from strop.engine.kernels.cpu.compiled import GAP, array, from_fp32, kernel, subroutine, to_fp32
from strop.engine.kernels.cpu.tile import COLUMNS, LANES, ROWS, STEP, claim, matmul, pair, release, round_pair, tile
from strop.engine.train.buffers import Allocate, heap_empty
from strop.engine.train.lora import Adapters

BLOCK = 32  # rows that are computed together
CHUNK = 256  # columns of outputs whose sums are computed together
PAIRS, WIDTH = 32, 512  # of a gradient: pairs of rows that are summed together, and columns


@subroutine
def _pair_columns(x: Any, scale: Any, out: Any, step: Any) -> None:
    """Write out[j * step + i] = the pair of scale x[i, 2 j] and scale x[i, 2 j + 1]; x (n, m) fp32, padded with 0."""
    n, m = x.shape
    for j in range(m // 2):
        to = out[j * step : j * step + n]
        for i in range(n):
            to[i] = round_pair(x[i, 2 * j] * scale, x[i, 2 * j + 1] * scale)
    if m % 2:
        for i in range(n):
            out[m // 2 * step + i] = round_pair(x[i, m - 1] * scale, np.float32(0.0))


@subroutine
def _pair_rows(x: Any, scale: Any, out: Any, step: Any) -> None:
    """Write out[i * step + j] = the pair of scale x[2 i, j] and scale x[2 i + 1, j]; x (n, m) fp32, padded with 0."""
    n, m = x.shape
    for i in range((n + 1) // 2):
        to, even, odd = out[i * step : i * step + m], x[2 * i], x[min(2 * i + 1, n - 1)]
        second = scale if 2 * i + 1 < n else np.float32(0.0)
        for j in range(m):
            to[j] = round_pair(even[j] * scale, odd[j] * second)


@subroutine
def _pack_forward(a: Any, b: Any, scale: Any, first: Any, rank: Any, second: Any) -> None:
    """Write one adapter's part of the two matrices of the forward: scale A^T (k, rank) and B^T (r, n)."""
    _pair_columns(a, scale, first, rank)
    _pair_columns(b, np.float32(1.0), second, len(b))


@subroutine
def _pack_backward(a: Any, b: Any, scale: Any, first: Any, slot: Any, second: Any) -> None:
    """Write one adapter's part of the two matrices of the backward: B (n, r) and scale A (rank, k)."""
    _pair_rows(b, np.float32(1.0), first, slot)
    _pair_rows(a, scale, second, a.shape[1])


@kernel
def _apply(x: Any, first: Any, enter: Any, second: Any, leave: Any, lanes: Any, thin: Any, onto: Any) -> None:
    """Compute thin (T, R) = x first, and onto = thin second; x (T, k), thin and onto (T, n) bf16.

    enter (N, 5), one row a block of `first`: its first column of x, how many, its first column of thin, how many, and
    where it begins in `first`. leave (N, 6): the same for `second`, from thin to onto, and whether to add to onto.
    """
    rows, rank = thin.shape
    step, share = x.shape[1], (rows + ROWS * lanes - 1) // (ROWS * lanes) * ROWS
    pairs = x.reshape(-1).view(np.uint32)
    for lane in prange(lanes):
        claim()
        tail = np.empty(ROWS * step, np.uint16)
        sums = np.empty(BLOCK * max(rank, CHUNK) + GAP, np.float32)
        rounded = np.empty(BLOCK * rank + GAP, np.uint16)
        tail_pairs, rounded_pairs = tail.view(np.uint32), rounded.view(np.uint32)
        top, end = lane * share, min((lane + 1) * share, rows)
        while top < end:
            count = min(BLOCK, end - top)
            if count > ROWS:
                count -= count % ROWS
            for i in range(count % ROWS):  # copy the last rows: a tile would read beyond the end
                for j in range(step):
                    tail[i * step + j] = x[top + i, j]
            for part in range(len(enter)):
                begin, many, to, columns, at = enter[part]
                a, a_at = (tail_pairs, begin) if count % ROWS else (pairs, top * step + begin)
                matmul(
                    a, a_at // 2, step // 2, first, at, columns, COLUMNS,
                    sums, to, rank, count, columns, many // 2, False,
                )  # fmt: skip
            for i in range(count):
                source, target = sums[i * rank : (i + 1) * rank], thin[top + i]
                rounded_row = rounded[i * rank : (i + 1) * rank]
                for j in range(rank):
                    rounded_row[j] = from_fp32(source[j], thin)
                for j in range(rank):
                    target[j] = rounded_row[j]
            for part in range(len(leave)):
                begin, many, to, columns, at, more = leave[part]
                for chunk in range(0, columns, CHUNK):
                    n = min(CHUNK, columns - chunk)
                    matmul(
                        rounded_pairs, begin // 2, rank // 2, second, at + chunk, columns, COLUMNS,
                        sums, 0, CHUNK, count, n, many // 2, False,
                    )  # fmt: skip
                    for i in range(count):
                        target, source = onto[top + i, to + chunk : to + chunk + n], sums[i * CHUNK : i * CHUNK + n]
                        if more:
                            for j in range(n):
                                target[j] = from_fp32(to_fp32(target[j]) + source[j], onto)
                        else:
                            for j in range(n):
                                target[j] = from_fp32(source[j], onto)
            top += count
        release()


@subroutine
def _load_pairs(x: Any, row: Any, begin: Any, n: Any, out: Any) -> None:
    """Write out[j] = the pair of x[row, begin + j] and x[row + 1, begin + j], 0 after the last row."""
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


@subroutine
def _gradient_columns(thin: Any, x: Any, spans: Any, factors: Any, lane: Any, lanes: Any, out: Any) -> None:
    """Compute one thread's columns of thin^T x, in fp32; thin (T, R), x (T, n).

    spans (N, 6): first column of thin, slot, first column of x, how many, rank, where the result begins in out. out:
    one-dimensional, for each span (slot, columns) times factors (R,), or (columns, rank) if `factors` is empty.
    """
    half_rows, num_units, widest = (len(x) + 1) // 2, 0, 0
    padded = (half_rows + STEP - 1) // STEP * STEP
    for part in range(len(spans)):
        num_units += spans[part, 3] // COLUMNS
        widest = max(widest, spans[part, 1])
    sums = np.empty(widest * WIDTH + GAP, np.float32)
    pairs = np.empty(PAIRS * WIDTH + GAP, np.uint32)
    thin_t = np.empty(widest * padded + GAP, np.uint32)
    low, high = num_units * lane // lanes, num_units * (lane + 1) // lanes
    for part in range(len(spans)):
        at, slot, begin, columns, rank, to = spans[part]
        start, end = max(low, 0) * COLUMNS, min(high, columns // COLUMNS) * COLUMNS
        low, high = low - columns // COLUMNS, high - columns // COLUMNS
        if start >= end:
            continue
        for r in range(slot):
            thin_t[r * padded + half_rows : (r + 1) * padded] = np.uint32(0)
        for i in range(half_rows):
            even, odd = thin[2 * i], thin[min(2 * i + 1, len(x) - 1)]
            mask = np.uint32(0xFFFFFFFF) if 2 * i + 1 < len(x) else np.uint32(0x0000FFFF)
            for r in range(slot):
                thin_t[r * padded + i] = pair(even[at + r], odd[at + r]) & mask
        chunks = (end - start + WIDTH - 1) // WIDTH
        width = ((end - start) // COLUMNS + chunks - 1) // chunks * COLUMNS
        for chunk in range(start, end, width):
            n = min(width, end - chunk)
            for top in range(0, padded, PAIRS):
                count = min(PAIRS, padded - top)
                for i in range(count):
                    _load_pairs(x, 2 * (top + i), begin + chunk, n, pairs[i * n : (i + 1) * n])
                for j in range(0, n, COLUMNS):
                    for r in range(0, slot, ROWS):
                        tile(thin_t, r * padded + top, padded, pairs, j, n, sums, r * n + j, n, count, top > 0)
            if len(factors) == 0:
                for j in range(n):
                    for r in range(rank):
                        out[to + (chunk + j) * rank + r] = sums[r * n + j]
            else:
                for r in range(slot):
                    target, source = out[to + r * columns + chunk :], sums[r * n : (r + 1) * n]
                    for j in range(n):
                        target[j] = source[j] * factors[at + r]


@kernel
def _gradients(
    grad: Any, z: Any, za: Any, grad_za: Any, of_a: Any, of_b: Any, factors: Any, lanes: Any, a: Any, b: Any
) -> None:  # fmt: skip
    for lane in prange(lanes):
        claim()
        lane_number = np.int64(lane)  # numba has two types for it, and would compile everything for each
        _gradient_columns(grad_za, z, of_a, factors, lane_number, lanes, a)
        _gradient_columns(za, grad, of_b, factors[:0], lane_number, lanes, b)
        release()


@dataclass(frozen=True)
class _Plan:
    """Layout of the adapters of a layer, and buffers for the matrices.

    `forward` and `backward` are (enter, leave) of _apply.
    """

    rank: int  # sum of all slots
    slot_starts: tuple[int, ...]
    filled: int  # number of outputs that an adapter adds to
    disjoint: bool  # no output has two adapters
    forward: tuple[Any, Any]
    backward: tuple[Any, Any]
    gradients: tuple[Any, Any]  # spans of A and B
    factors: Any
    matrices: tuple[Any, Any, Any, Any]  # first and second of the forward, then of the backward


@lru_cache(maxsize=64)
def _plan(thread: int, width: int, ranks: Any, columns: Any, scales: Any, separate_inputs: bool) -> _Plan:
    """Return the layout; thread: the owner of the buffers. z has `width` columns, an adapter if separate."""
    slots = [-(-rank // LANES) * LANES for rank in ranks]
    starts = [sum(slots[:i]) for i in range(len(slots))]
    counts = [end - start for start, end in columns]
    halves = [slot // 2 * count for slot, count in zip(slots, counts, strict=True)]
    offsets = [sum(halves[:i]) for i in range(len(halves))]
    sizes = [rank * count for rank, count in zip(ranks, counts, strict=True)]
    total, factors = sum(slots), np.zeros(sum(slots), np.float32)
    for at, rank, scale in zip(starts, ranks, scales, strict=True):
        factors[at : at + rank] = scale
    places = list(zip(starts, slots, [start for start, _ in columns], counts, strict=True))
    repeated = [span in columns[:i] for i, span in enumerate(columns)]
    out = [(*place, to, repeat) for place, to, repeat in zip(places, offsets, repeated, strict=True)]
    into = [(start, count, at, slot, to) for at, slot, start, count, to, _ in out]
    of_b = [(*place, rank, sum(sizes[:i])) for i, (place, rank) in enumerate(zip(places, ranks, strict=True))]

    # From z to thin, from thin to the gradient of z, and the gradient of A: all adapters at once, or each separately.
    enter, leave, of_a = [(0, width, 0, total, 0)], [(0, total, 0, width, 0, 0)], [(0, total, 0, width, total, 0)]
    if separate_inputs:
        separate = [(at, slot, i * width) for i, (at, slot) in enumerate(zip(starts, slots, strict=True))]
        enter = [(begin, width, at, slot, at * (width // 2)) for at, slot, begin in separate]
        leave = [(at, slot, begin, width, at // 2 * width, 0) for at, slot, begin in separate]
        of_a = [(at, slot, begin, width, slot, at * width) for at, slot, begin in separate]

    def buffer(size: int) -> Any:
        return np.zeros(size, np.uint32)

    all_a, all_b = total // 2 * width, sum(halves)
    return _Plan(
        total,
        tuple(starts),
        sum(count for count, repeat in zip(counts, repeated, strict=True) if not repeat),
        not any(repeated),
        (np.array(enter), np.array(out)),
        (np.array(into), np.array(leave)),
        (np.array(of_a), np.array(of_b)),
        factors,
        (buffer(all_a), buffer(all_b), buffer(all_b), buffer(all_a)),
    )


def _plan_of(adapters: Adapters) -> _Plan:
    shape = adapters.width, adapters.ranks, adapters.columns, adapters.scales, adapters.separate_inputs
    return _plan(threading.get_ident(), *shape)


@dataclass(frozen=True)
class LoraTerm:
    """The term that adapters add to an output, computed on demand (train.lora.Addend).

    x (T, k), first, enter, second, leave: as in _apply; thin (T, rank): computed by both methods.
    """

    x: Tensor
    first: Any
    enter: Any
    second: Any
    leave: Any
    thin: Tensor
    filled: int
    columns: tuple[tuple[int, int], ...] | None  # ranges of outputs; None: bf16_matmul cannot add the term to its sums

    def into(self, y: Tensor) -> None:
        if self.filled < y.shape[1]:
            y.zero_()
        self._pass(self.leave, y)

    def finish_projection(self) -> None:
        self._pass(self.leave[:0], self.thin)

    def _pass(self, leave: Any, onto: Tensor) -> None:
        lanes = get_num_threads()
        _apply(array(self.x), self.first, self.enter, self.second, leave, lanes, array(self.thin), array(onto))


def forward(
    z: Tensor, outputs: int, adapters: Adapters, new: Allocate = heap_empty
) -> tuple[LoraTerm, tuple[Tensor, ...]]:
    plan = _plan_of(adapters)
    first, second = plan.matrices[:2]
    for at, span, (a, b, scale) in zip(plan.slot_starts, plan.forward[1], adapters, strict=True):
        begin, step = (at * (adapters.width // 2), span[1]) if adapters.separate_inputs else (at, plan.rank)
        _pack_forward(array(a), array(b), np.float32(scale), first[begin:], step, second[span[4] :])
    thin = new(len(z), plan.rank, z)
    enter, leave = plan.forward
    columns = adapters.columns if plan.disjoint else None
    return LoraTerm(z, first, enter, second, leave, thin, plan.filled, columns), (thin,)


def backward(grad: Tensor, saved: tuple[Tensor, ...], adapters: Adapters) -> tuple[LoraTerm, Tensor]:
    plan, width = _plan_of(adapters), adapters.width
    first, second = plan.matrices[2:]
    for at, span, (a, b, scale) in zip(plan.slot_starts, plan.backward[0], adapters, strict=True):
        _pack_backward(array(a), array(b), np.float32(scale), first[span[4] :], span[3], second[at // 2 * width :])
    enter, leave = plan.backward
    thin = grad.new_empty(len(grad), plan.rank)
    columns = None if adapters.separate_inputs else ((0, width),)
    return LoraTerm(grad, first, enter, second, leave, thin, adapters.input_columns, columns), thin


def gradients(
    grad: Tensor, z: Tensor, grad_za: Tensor, saved: tuple[Tensor, ...], adapters: Adapters
) -> list[Tensor]:  # fmt: skip
    """Return the gradients in fp32, in which they are summed."""
    plan, width = _plan_of(adapters), adapters.width
    spans = plan.gradients[1]
    a, b = np.empty((plan.rank, width), np.float32), np.empty(spans[-1, 5] + spans[-1, 3] * spans[-1, 4], np.float32)
    lanes = get_num_threads()
    _gradients(
        array(grad), array(z), array(saved[0]), array(grad_za), *plan.gradients, plan.factors, lanes, a.reshape(-1), b
    )  # fmt: skip
    results: list[Tensor] = []
    for at, _, _, count, rank, to in spans:
        results += [torch.from_numpy(a[at : at + rank]), torch.from_numpy(b[to : to + count * rank].reshape(-1, rank))]
    return results
