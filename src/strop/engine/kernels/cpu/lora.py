"""Compiled kernels for the LoRA matmuls, for CPUs with AVX512-BF16. train/lora.py is their specification.

Calling PyTorch for a matmul of rank 16 takes as long as computing it, and a training step has a thousand of them. Here
one call multiplies by A and B of all adapters of a layer (only by A if bf16_matmul.py multiplies by B), and one call
computes all their gradients. Each rank is padded with zeros to a multiple of 16, the adapter's slot. The numbers of
inputs and outputs must be multiples of 32.
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
from strop.engine.kernels.cpu.tile import (
    COLUMNS,
    LANES,
    ROWS,
    STEP,
    claim_tiles,
    matmul,
    pair,
    release_tiles,
    round_pair,
    tile,
)
from strop.engine.train.buffers import Allocate, allocate_from_heap
from strop.engine.train.lora import Adapters

BLOCK = 32  # rows that are computed together
CHUNK = 256  # output columns that are computed together
PAIRS, WIDTH = 32, 512  # in gradients: pairs of rows that are summed together, and columns that are computed together


@subroutine
def _pair_columns(x: Any, scale: Any, out: Any, step: Any) -> None:
    """Pack adjacent columns of scale * x (n, m), fp32: out[j * step + i] holds x[i, 2 j] and x[i, 2 j + 1]."""
    n, m = x.shape
    for j in range(m // 2):
        target = out[j * step : j * step + n]
        for i in range(n):
            target[i] = round_pair(x[i, 2 * j] * scale, x[i, 2 * j + 1] * scale)
    if m % 2:
        for i in range(n):
            out[m // 2 * step + i] = round_pair(x[i, m - 1] * scale, np.float32(0.0))


@subroutine
def _pair_rows(x: Any, scale: Any, out: Any, step: Any) -> None:
    """Pack adjacent rows of scale * x (n, m), fp32: out[i * step + j] holds x[2 i, j] and x[2 i + 1, j]."""
    n, m = x.shape
    for i in range((n + 1) // 2):
        target, even, odd = out[i * step : i * step + m], x[2 * i], x[min(2 * i + 1, n - 1)]
        odd_scale = scale if 2 * i + 1 < n else np.float32(0.0)
        for j in range(m):
            target[j] = round_pair(even[j] * scale, odd[j] * odd_scale)


@subroutine
def _pack_forward(a: Any, b: Any, scale: Any, first: Any, rank: Any, second: Any) -> None:
    """Write one adapter's blocks of the forward matrices: scale A^T to `first` and B^T to `second`."""
    _pair_columns(a, scale, first, rank)
    _pair_columns(b, np.float32(1.0), second, len(b))


@subroutine
def _pack_backward(a: Any, b: Any, scale: Any, first: Any, slot: Any, second: Any) -> None:
    """Write one adapter's blocks of the backward matrices: B to `first` and scale A to `second`."""
    _pair_rows(b, np.float32(1.0), first, slot)
    _pair_rows(a, scale, second, a.shape[1])


@kernel
def _apply(
    x: Any, first: Any, first_spans: Any, second: Any, second_spans: Any, threads: Any, projected: Any, out: Any
) -> None:  # fmt: skip
    """Compute projected (T, R) = x first, and out = projected second; x (T, k) and out (T, n), all bf16.

    first_spans (N, 5), one row for each block of `first`: first column of x, number of these columns, first column of
    projected, number of these columns, start in `first`. second_spans (N, 6): the same for `second`, from projected to
    out, and 1 if the result is added to out.
    """
    rows, rank = projected.shape
    step, rows_per_thread = x.shape[1], (rows + ROWS * threads - 1) // (ROWS * threads) * ROWS
    pairs = x.reshape(-1).view(np.uint32)
    for thread in prange(threads):
        claim_tiles()
        last_rows = np.empty(ROWS * step, np.uint16)
        sums = np.empty(BLOCK * max(rank, CHUNK) + GAP, np.float32)  # GAP: see compiled.py
        rounded = np.empty(BLOCK * rank + GAP, np.uint16)
        last_pairs, rounded_pairs = last_rows.view(np.uint32), rounded.view(np.uint32)
        row, end = thread * rows_per_thread, min((thread + 1) * rows_per_thread, rows)
        while row < end:
            count = min(BLOCK, end - row)
            if count > ROWS:
                count -= count % ROWS
            for i in range(count % ROWS):  # copy the last rows, because a tile would read beyond the end of x
                for j in range(step):
                    last_rows[i * step + j] = x[row + i, j]
            for index in range(len(first_spans)):
                begin, num_inputs, column, columns, start = first_spans[index]
                inputs, input_start = (last_pairs, begin) if count % ROWS else (pairs, row * step + begin)
                matmul(
                    inputs, input_start // 2, step // 2, first, start, columns, COLUMNS,
                    sums, column, rank, count, columns, num_inputs // 2, False,
                )  # fmt: skip
            for i in range(count):
                source, target = sums[i * rank : (i + 1) * rank], projected[row + i]
                rounded_row = rounded[i * rank : (i + 1) * rank]
                for j in range(rank):
                    rounded_row[j] = from_fp32(source[j], projected)
                for j in range(rank):
                    target[j] = rounded_row[j]
            for index in range(len(second_spans)):
                begin, num_inputs, column, columns, start, accumulate = second_spans[index]
                for chunk in range(0, columns, CHUNK):
                    n = min(CHUNK, columns - chunk)
                    matmul(
                        rounded_pairs, begin // 2, rank // 2, second, start + chunk, columns, COLUMNS,
                        sums, 0, CHUNK, count, n, num_inputs // 2, False,
                    )  # fmt: skip
                    for i in range(count):
                        source = sums[i * CHUNK : i * CHUNK + n]
                        target = out[row + i, column + chunk : column + chunk + n]
                        if accumulate:
                            for j in range(n):
                                target[j] = from_fp32(to_fp32(target[j]) + source[j], out)
                        else:
                            for j in range(n):
                                target[j] = from_fp32(source[j], out)
            row += count
        release_tiles()


@subroutine
def _load_pairs(x: Any, row: Any, begin: Any, n: Any, out: Any) -> None:
    """Pack two rows from column `begin`: out[j] holds x[row, begin + j] and x[row + 1, begin + j]."""
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
def _gradient_columns(projected: Any, x: Any, spans: Any, factors: Any, thread: Any, threads: Any, out: Any) -> None:
    """Compute one thread's columns of projected^T x in fp32; projected (T, R), x (T, n).

    spans (N, 6): first column of projected, slot width, first column of x, number of these columns, rank, start in out.
    out: one-dimensional, for each span a matrix (slot, columns) times factors (R,), or (columns, rank) without factors.
    """
    half_rows, num_units, max_slot = (len(x) + 1) // 2, 0, 0
    padded = (half_rows + STEP - 1) // STEP * STEP
    for index in range(len(spans)):
        num_units += spans[index, 3] // COLUMNS
        max_slot = max(max_slot, spans[index, 1])
    sums = np.empty(max_slot * WIDTH + GAP, np.float32)
    pairs = np.empty(PAIRS * WIDTH + GAP, np.uint32)
    projected_t = np.empty(max_slot * padded + GAP, np.uint32)
    low, high = num_units * thread // threads, num_units * (thread + 1) // threads
    for index in range(len(spans)):
        first, slot, begin, columns, rank, out_start = spans[index]
        start, end = max(low, 0) * COLUMNS, min(high, columns // COLUMNS) * COLUMNS
        low, high = low - columns // COLUMNS, high - columns // COLUMNS
        if start >= end:
            continue
        for r in range(slot):
            projected_t[r * padded + half_rows : (r + 1) * padded] = np.uint32(0)
        for i in range(half_rows):
            even, odd = projected[2 * i], projected[min(2 * i + 1, len(x) - 1)]
            mask = np.uint32(0xFFFFFFFF) if 2 * i + 1 < len(x) else np.uint32(0x0000FFFF)
            for r in range(slot):
                projected_t[r * padded + i] = pair(even[first + r], odd[first + r]) & mask
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
                        tile(projected_t, r * padded + top, padded, pairs, j, n, sums, r * n + j, n, count, top > 0)
            if len(factors) == 0:
                for j in range(n):
                    for r in range(rank):
                        out[out_start + (chunk + j) * rank + r] = sums[r * n + j]
            else:
                for r in range(slot):
                    target, source = out[out_start + r * columns + chunk :], sums[r * n : (r + 1) * n]
                    for j in range(n):
                        target[j] = source[j] * factors[first + r]


@kernel
def _gradients(
    grad: Any, z: Any, za: Any, grad_za: Any, a_spans: Any, b_spans: Any, factors: Any, threads: Any, a: Any, b: Any
) -> None:  # fmt: skip
    for thread in prange(threads):
        claim_tiles()
        number = np.int64(thread)  # numba would otherwise compile _gradient_columns for two integer types
        _gradient_columns(grad_za, z, a_spans, factors, number, threads, a)
        _gradient_columns(za, grad, b_spans, factors[:0], number, threads, b)
        release_tiles()


@dataclass(frozen=True)
class _Plan:
    """The layout of a layer's adapters, and buffers for their matrices."""

    rank: int  # sum of all slots
    slot_starts: tuple[int, ...]
    num_outputs: int  # number of outputs with an adapter
    disjoint: bool  # no output has two adapters
    forward: tuple[Any, Any]  # first_spans and second_spans of _apply
    backward: tuple[Any, Any]
    gradients: tuple[Any, Any]  # spans of _gradient_columns for A and B
    factors: Any
    matrices: tuple[Any, ...]  # first and second matrix of the forward, then of the backward


@lru_cache(maxsize=64)
def _plan(thread: int, width: int, ranks: Any, columns: Any, scales: Any, separate_inputs: bool) -> _Plan:
    """Return the layout for an input of `width` columns, per adapter if separate_inputs.

    thread: the id of the calling thread, so that each thread has its own buffers.
    """
    slots = [-(-rank // LANES) * LANES for rank in ranks]
    starts = [sum(slots[:i]) for i in range(len(slots))]
    counts = [end - start for start, end in columns]
    halves = [slot // 2 * count for slot, count in zip(slots, counts, strict=True)]
    offsets = [sum(halves[:i]) for i in range(len(halves))]
    sizes = [rank * count for rank, count in zip(ranks, counts, strict=True)]
    total, factors = sum(slots), np.zeros(sum(slots), np.float32)
    for start, rank, scale in zip(starts, ranks, scales, strict=True):
        factors[start : start + rank] = scale
    spans = list(zip(starts, slots, [start for start, _ in columns], counts, strict=True))
    repeated = [span in columns[:i] for i, span in enumerate(columns)]
    to_outputs = [(*span, offset, repeat) for span, offset, repeat in zip(spans, offsets, repeated, strict=True)]
    from_outputs = [(column, count, start, slot, offset) for start, slot, column, count, offset, _ in to_outputs]
    b_spans = [(*span, rank, sum(sizes[:i])) for i, (span, rank) in enumerate(zip(spans, ranks, strict=True))]

    # From z to za, from grad_za to the gradient of z, and the gradient of A: all adapters at once, or each separately.
    from_z, to_z, a_spans = [(0, width, 0, total, 0)], [(0, total, 0, width, 0, 0)], [(0, total, 0, width, total, 0)]
    if separate_inputs:
        separate = [(start, slot, i * width) for i, (start, slot) in enumerate(zip(starts, slots, strict=True))]
        from_z = [(column, width, start, slot, start * (width // 2)) for start, slot, column in separate]
        to_z = [(start, slot, column, width, start // 2 * width, 0) for start, slot, column in separate]
        a_spans = [(start, slot, column, width, slot, start * width) for start, slot, column in separate]

    a_size, b_size = total // 2 * width, sum(halves)
    return _Plan(
        total,
        tuple(starts),
        sum(count for count, repeat in zip(counts, repeated, strict=True) if not repeat),
        not any(repeated),
        (np.array(from_z), np.array(to_outputs)),
        (np.array(from_outputs), np.array(to_z)),
        (np.array(a_spans), np.array(b_spans)),
        factors,
        tuple(np.zeros(size, np.uint32) for size in (a_size, b_size, b_size, a_size)),
    )


def _plan_of(adapters: Adapters) -> _Plan:
    shape = adapters.width, adapters.ranks, adapters.columns, adapters.scales, adapters.separate_inputs
    return _plan(threading.get_ident(), *shape)


@dataclass(frozen=True)
class LoraTerm:
    """The term that adapters add to an output, computed on demand. Implements train.lora.Addend.

    x to projected: as in _apply. num_outputs: number of outputs with an adapter. columns: their ranges, or None if
    bf16_matmul cannot compute the term.
    """

    x: Tensor
    first: Any
    first_spans: Any
    second: Any
    second_spans: Any
    projected: Tensor
    num_outputs: int
    columns: tuple[tuple[int, int], ...] | None

    def into(self, y: Tensor) -> None:
        if self.num_outputs < y.shape[1]:
            y.zero_()
        self._run(self.second_spans, y)

    def finish_projection(self) -> None:
        self._run(self.second_spans[:0], self.projected)

    def _run(self, second_spans: Any, out: Tensor) -> None:
        inputs = array(self.x), self.first, self.first_spans, self.second, second_spans
        _apply(*inputs, get_num_threads(), array(self.projected), array(out))


def forward(
    z: Tensor, outputs: int, adapters: Adapters, new: Allocate = allocate_from_heap
) -> tuple[LoraTerm, tuple[Tensor, ...]]:
    plan = _plan_of(adapters)
    first, second = plan.matrices[:2]
    for start, span, (a, b, scale) in zip(plan.slot_starts, plan.forward[1], adapters, strict=True):
        begin, step = (start * (adapters.width // 2), span[1]) if adapters.separate_inputs else (start, plan.rank)
        _pack_forward(array(a), array(b), np.float32(scale), first[begin:], step, second[span[4] :])
    za = new(len(z), plan.rank, z)
    first_spans, second_spans = plan.forward
    columns = adapters.columns if plan.disjoint else None
    return LoraTerm(z, first, first_spans, second, second_spans, za, plan.num_outputs, columns), (za,)


def backward(grad: Tensor, saved: tuple[Tensor, ...], adapters: Adapters) -> tuple[LoraTerm, Tensor]:
    plan, width = _plan_of(adapters), adapters.width
    first, second = plan.matrices[2:]
    for start, span, (a, b, scale) in zip(plan.slot_starts, plan.backward[0], adapters, strict=True):
        _pack_backward(array(a), array(b), np.float32(scale), first[span[4] :], span[3], second[start // 2 * width :])
    first_spans, second_spans = plan.backward
    grad_za = grad.new_empty(len(grad), plan.rank)
    columns = None if adapters.separate_inputs else ((0, width),)
    term = LoraTerm(grad, first, first_spans, second, second_spans, grad_za, adapters.input_columns, columns)
    return term, grad_za


def gradients(
    grad: Tensor, z: Tensor, grad_za: Tensor, saved: tuple[Tensor, ...], adapters: Adapters
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of A and B of each adapter, in fp32."""
    plan, width = _plan_of(adapters), adapters.width
    spans = plan.gradients[1]
    a, b = np.empty((plan.rank, width), np.float32), np.empty(spans[-1, 5] + spans[-1, 3] * spans[-1, 4], np.float32)
    inputs = array(grad), array(z), array(saved[0]), array(grad_za)
    _gradients(*inputs, *plan.gradients, plan.factors, get_num_threads(), a.reshape(-1), b)
    results: list[Tensor] = []
    for start, _, _, count, rank, offset in spans:
        grad_b = b[offset : offset + count * rank].reshape(-1, rank)
        results += [torch.from_numpy(a[start : start + rank]), torch.from_numpy(grad_b)]
    return results
