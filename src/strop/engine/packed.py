"""How the examples of a micro-batch are laid out in one row of tokens, without padding; pure numpy planning.

A prefix that all examples share stands first and once; then each example's own part. A token before the prefix's end
is predicted and trained on once, with the sum of the examples' weights: the same loss, to the last term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from strop.data.conversation import Example

LEAST_PREFIX = 8  # tokens; a shorter prefix saves less than its own attention call costs
CALL_COST = 200 * 200  # of one more bucket, in query-key pairs (about 0.9 ms at 22 ns a pair of 9 heads)


@dataclass(frozen=True)
class Bucket:
    """Documents attended together. queries (D, Sq), keys (D, Sk): packed row of each place, -1 for padding.

    The keys are the Sk - Sq rows of the prefix and then the documents' own rows.
    """

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Places:
    """The places (P) of all buckets' queries, or keys, one document after the other.

    token (P,): packed row, -1 for padding; at (P,): place in its document; length (P,): places of its document.
    where[first[t] : first[t + 1]]: the places that packed row t has.
    """

    token: Tensor
    at: Tensor
    length: Tensor
    first: Tensor
    where: Tensor


@dataclass(frozen=True)
class Layout:
    """The buckets of a micro-batch, and where its packed rows stand in them."""

    buckets: tuple[Bucket, ...]
    queries: Places
    keys: Places


@dataclass(frozen=True)
class Packed:
    """ids, positions (T,); rows (N,): packed rows that predict a supervised token, each once, rising;
    picked (M,): index into rows for each label; labels, weights (M,)."""

    ids: Tensor
    positions: Tensor
    layout: Layout
    rows: Tensor
    picked: Tensor
    labels: Tensor
    weights: Tensor


def _tensor(values: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)


def lay_out(parts: Sequence[tuple[Any, Any]], tokens: int, device: torch.device) -> Layout:
    """parts: (queries, keys) of each bucket, int64 arrays as in Bucket, over `tokens` packed rows."""
    tensor = partial(_tensor, device=device)

    def places(slots: list[Any]) -> Places:
        token = np.concatenate([rows.ravel() for rows in slots])
        at = np.concatenate([np.broadcast_to(np.arange(rows.shape[1]), rows.shape).ravel() for rows in slots])
        length = np.concatenate([np.full(rows.size, rows.shape[1]) for rows in slots])
        counts = np.bincount(token[token >= 0], minlength=tokens)
        where = np.argsort(token, kind="stable")[np.count_nonzero(token < 0) :]
        return Places(*map(tensor, (token, at, length, np.concatenate([[0], np.cumsum(counts)]), where)))

    buckets = tuple(Bucket(tensor(queries), tensor(keys)) for queries, keys in parts)
    return Layout(buckets, places([queries for queries, _ in parts]), places([keys for _, keys in parts]))


def pack(examples: Sequence[Example], *, prefix_sharing: bool, device: torch.device) -> Packed:
    """Lays the examples out; integer tensors are int64."""
    prefix = shared_prefix(examples) if prefix_sharing else 0
    first = examples[0].ids[:prefix]
    ids, positions = [first], [np.arange(prefix)]
    rows, labels = [np.arange(max(prefix - 1, 0))], [first[1:]]
    weights = [np.sum([example.weights[1:prefix] for example in examples], axis=0, dtype=np.float32)]
    starts, at = [], prefix
    for example in examples:
        length = len(example)
        assert length > prefix and not example.weights[0], "position 0 is predicted by nothing"
        own = np.arange(prefix, length)
        starts.append(at)
        ids.append(example.ids[prefix:])
        positions.append(own)
        predicted = own[own > 0]
        before = predicted - 1  # the position that predicts it, in the prefix or in the example's own rows
        rows.append(np.where(before < prefix, before, at + before - prefix))
        labels.append(example.ids[predicted])
        weights.append(example.weights[predicted])
        at += length - prefix
    weight = np.concatenate(weights)
    used = weight != 0
    row, picked = np.unique(np.concatenate(rows)[used], return_inverse=True)
    parts = _buckets(starts, [len(example) - prefix for example in examples], prefix)
    if prefix:
        parts.append(_bucket([(0, prefix)], 0))

    tensor = partial(_tensor, device=device)
    return Packed(
        tensor(np.concatenate(ids)),
        tensor(np.concatenate(positions)),
        lay_out(parts, at, device),
        tensor(row),
        tensor(picked),
        tensor(np.concatenate(labels)[used]),
        torch.from_numpy(weight[used]).to(device),
    )


def shared_prefix(examples: Sequence[Example]) -> int:
    """Length of the prefix that is worth sharing, leaving each example a token of its own; 0: none."""
    length = min(len(example) for example in examples) - 1
    for example in examples[1:]:
        length = min(length, len(example) - 1)
        differs = np.flatnonzero(example.ids[:length] != examples[0].ids[:length])
        length = int(differs[0]) if len(differs) else length
    return length if len(examples) > 1 and length >= LEAST_PREFIX else 0


_Rows = tuple["np.typing.NDArray[np.int64]", "np.typing.NDArray[np.int64]"]


def _buckets(starts: Sequence[int], lengths: Sequence[int], prefix: int) -> list[_Rows]:
    """Cuts documents (first packed row and length of each) into buckets of least cost, by dynamic programming."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best: list[tuple[int, int]] = [(0, 0)]  # for the first n of `order`: cost, and where their last bucket begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        area = longest * (longest + prefix)
        best.append(min((best[begin][0] + CALL_COST + (end - begin) * area, begin) for begin in range(end)))
    found, end = [], len(order)
    while end:
        begin = best[end][1]
        found.append(_bucket([(starts[i], lengths[i]) for i in order[begin:end]], prefix))
        end = begin
    return found


def _bucket(docs: Sequence[tuple[int, int]], prefix: int) -> _Rows:
    queries = np.full((len(docs), max(length for _, length in docs)), -1, dtype=np.int64)
    for row, (start, length) in zip(queries, docs, strict=True):
        row[:length] = np.arange(start, start + length)
    shared = np.broadcast_to(np.arange(prefix, dtype=np.int64), (len(docs), prefix))
    return queries, np.concatenate([shared, queries], axis=1)
