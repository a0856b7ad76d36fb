"""How the examples of a micro-batch are laid out in one row of tokens, without padding; pure numpy planning.

A prefix that all examples share stands first and once; then each example's own part. A token before the prefix's end
is predicted and trained on once, with the sum of the examples' weights: the same loss, to the last term. Where each
example's log-probability is asked for (`pack_separately`), those with one prompt share what they begin with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from strop.engine.train.buffers import copy_to_device
from strop.engine.train.dropout import token_keys

if TYPE_CHECKING:
    from strop.data.types import Example

LIKE = 0.8  # of the longest row's length: a shorter one is not padded to it, but to others of its kind
MIN_PREFIX = 8  # tokens; a shorter prefix saves less than its own attention call costs
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
class Varlen:
    """Documents as flash attention takes them: where each one's queries and keys end, from 0, int32.

    keys: the packed row of each key, document after document; None where it is each row once.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
    keys: Tensor | None


@dataclass(frozen=True)
class Documents:
    """Which packed rows belong together. spans (D, 3): a document's first row, its rows, and the rows of the prefix
    that it sees as well; a prefix is a document too. tokens: of all. prefixes (D,): the first row of that prefix; None:
    row 0 for each."""

    spans: np.typing.NDArray[np.int64]
    tokens: int
    device: torch.device
    prefixes: np.typing.NDArray[np.int64] | None = None
    _shares: dict[tuple[int, int], Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def table(self) -> np.typing.NDArray[np.int64]:
        """(D, 5): spans; the first row of each document's prefix; 1 for a document that is the prefix of others."""
        prefixes = np.zeros(len(self.spans), np.int64) if self.prefixes is None else self.prefixes
        start, _, prefix = self.spans.T
        return np.column_stack([self.spans, prefixes, (prefix == 0) & np.isin(start, prefixes[prefix > 0])])

    @cached_property
    def layout(self) -> Layout:
        """The documents in buckets."""
        parts: list[_Rows] = []
        for prefix in sorted(set(self.spans[:, 2].tolist()), reverse=True):
            parts += _buckets(self.table[self.spans[:, 2] == prefix].tolist(), prefix)
        return lay_out(parts, self.tokens, self.device)

    @cached_property
    def beside(self) -> tuple[list[Tensor], Tensor]:
        """Documents without prefixes, those of like length as rows of one: of each such group, the packed row at each
        place (D, S), any where there is none; and the place of each packed row (T,), counted over all groups."""
        groups: list[list[tuple[int, int]]] = []
        for start, own, _ in sorted(self.spans.tolist(), key=lambda span: -span[1]):
            if not groups or own < LIKE * groups[-1][0][1]:
                groups.append([])
            groups[-1].append((start, own))
        places, rows, at = np.zeros(self.tokens, np.int64), [], 0
        for group in groups:
            starts, own = np.array(group).T[:, :, None]
            place = np.arange(own[0, 0])
            there, of = place < own, starts + place
            rows.append(np.where(there, of, 0))
            places[of[there]] = at + np.flatnonzero(there)
            at += there.size
        *rows_, places_ = copy_to_device([*rows, places], self.device)
        return rows_, places_

    @cached_property
    def varlen(self) -> Varlen:
        """Made once a micro-batch, on the host."""
        spans = self.table[np.argsort(self.spans[:, 0], kind="stable")]
        own, prefix = spans[:, 1], spans[:, 2]

        def ends(lengths: np.typing.NDArray[np.int64]) -> Any:
            return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

        made = [ends(own), ends(own + prefix)]
        if prefix.any():
            parts = [rows for s, n, p, first, _ in spans for rows in (np.arange(first, first + p), np.arange(s, s + n))]
            made.append(np.concatenate(parts))
        query_ends, key_ends, *keys = copy_to_device(made, self.device)
        longest = int(own.max()), int((own + prefix).max())
        return Varlen(query_ends, key_ends, *longest, keys[0] if keys else None)

    def shapes(self, *, in_buckets: bool) -> tuple[tuple[int, int, int], ...]:
        """(number, queries, keys) of the documents of each shape; in_buckets: as `layout` pads them."""
        if in_buckets:
            return tuple((len(b.queries), b.queries.shape[1], b.keys.shape[1]) for b in self.layout.buckets)
        counted = Counter((int(own), int(own + prefix)) for _, own, prefix in self.spans)
        return tuple((number, queries, keys) for (queries, keys), number in sorted(counted.items()))

    def shares(self, key_value: int, threads: int) -> tuple[np.typing.NDArray[np.int64], np.typing.NDArray[np.int64]]:
        """(tasks, where each thread's begin): document * key_value + head, the largest first to who has least.

        Every layer asks, forward and backward: dealt out once a micro-batch.
        """
        if (key_value, threads) not in self._shares:
            self._shares[key_value, threads] = self._dealt_out(key_value, threads)
        tasks, lanes = self._shares[key_value, threads]
        return tasks, lanes

    def _dealt_out(self, key_value: int, threads: int) -> tuple[Any, Any]:
        costs = self.spans[:, 1] * (self.spans[:, 1] // 2 + self.spans[:, 2] + 32)
        lanes: list[list[int]] = [[] for _ in range(threads)]
        loads = [0] * threads
        for document in np.argsort(-costs, kind="stable"):
            for head in range(key_value):
                least = loads.index(min(loads))
                lanes[least].append(int(document) * key_value + head)
                loads[least] += int(costs[document])
        ends = np.cumsum([0, *map(len, lanes)])
        return np.array([task for lane in lanes for task in lane], dtype=np.int64), ends.astype(np.int64)


@dataclass(frozen=True)
class PackedBatch:
    """ids, positions, keys (T,), keys as dropout.token_keys makes them; rows (N,): packed rows that predict a
    supervised token, each once, rising; picked (M,): index into rows for each label; labels, weights (M,). owners (M,):
    the example that each label belongs to, where they are kept apart; else None. ends: (example, packed row of its last
    token) of each."""

    ids: Tensor
    positions: Tensor
    keys: Tensor
    documents: Documents
    rows: Tensor
    picked: Tensor
    labels: Tensor
    weights: Tensor
    owners: Tensor | None = None
    ends: tuple[tuple[int, int], ...] = ()


def _long(values: Any) -> Any:
    return np.asarray(values, dtype=np.int64)


def lay_out(parts: Sequence[tuple[Any, Any]], tokens: int, device: torch.device) -> Layout:
    """parts: (queries, keys) of each bucket, int64 arrays as in Bucket, over `tokens` packed rows."""

    def places(slots: list[Any]) -> list[Any]:
        token = np.concatenate([rows.ravel() for rows in slots])
        at = np.concatenate([np.broadcast_to(np.arange(rows.shape[1]), rows.shape).ravel() for rows in slots])
        length = np.concatenate([np.full(rows.size, rows.shape[1]) for rows in slots])
        counts = np.bincount(token[token >= 0], minlength=tokens)
        where = np.argsort(token, kind="stable")[np.count_nonzero(token < 0) :]
        return [token, at, length, np.concatenate([[0], np.cumsum(counts)]), where]

    queries, keys = places([queries for queries, _ in parts]), places([keys for _, keys in parts])
    found = copy_to_device(
        [*map(_long, [*queries, *keys]), *(_long(array) for part in parts for array in part)], device
    )
    buckets = tuple(map(Bucket, found[10::2], found[11::2]))
    return Layout(buckets, Places(*found[:5]), Places(*found[5:10]))


def pack(examples: Sequence[Example], *, prefix_sharing: bool, device: torch.device) -> PackedBatch:
    """Lays the examples out; integer tensors are int64."""
    prefix = shared_prefix(examples) if prefix_sharing else 0
    laid = _Laid()
    first, weights = examples[0], [example.weights[1:prefix] for example in examples]
    laid.predicted(np.arange(max(prefix - 1, 0)), first.ids[1:prefix], np.sum(weights, axis=0, dtype=np.float32), 0)
    laid.group(enumerate(examples), prefix, merged=True)
    return laid.packed(device, owned=False)


def pack_separately(examples: Sequence[Example], *, prefix_sharing: bool, device: torch.device) -> PackedBatch:
    """Lays the examples out so that the labels of each stay its own; those with one prompt (the tokens in front of the
    first supervised one) share what they have in common."""
    groups: dict[bytes, list[int]] = {}
    for number, example in enumerate(examples):
        prompt = example.ids[: np.flatnonzero(example.weights)[0]].tobytes() if prefix_sharing else b"%d" % number
        groups.setdefault(prompt, []).append(number)
    laid = _Laid()
    for numbers in groups.values():
        together = [examples[number] for number in numbers]
        laid.group(zip(numbers, together, strict=True), shared_prefix(together), merged=False)
    return laid.packed(device, owned=True)


def pack_last_tokens(examples: Sequence[Example], *, prefix_sharing: bool, device: torch.device) -> PackedBatch:
    """As pack_apart, but what is asked for is the last token of each example: rows (N,) are theirs, in order; labels
    and weights mean nothing."""
    packed = pack_separately(examples, prefix_sharing=prefix_sharing, device=device)
    last = {int(number): int(end) for number, end in packed.ends}
    ends = [last[number] for number in range(len(examples))]
    rows, picked = copy_to_device([_long(ends), _long(range(len(examples)))], device)
    return replace(packed, rows=rows, picked=picked)


class _Laid:
    """A layout in the making: packed rows, documents, and labels with the rows that predict them."""

    def __init__(self) -> None:
        self.ids: list[Any] = []
        self.positions: list[Any] = []
        self.keys: list[Any] = []
        self.tokens = 0
        self.spans: list[tuple[int, int, int]] = []
        self.prefixes: list[int] = []
        self.labels: list[tuple[Any, Any, Any, Any]] = []  # rows, labels, weights, owners
        self.ends: list[tuple[int, int]] = []  # an example's number, and the packed row of its last token

    def predicted(self, rows: Any, labels: Any, weights: Any, owner: int) -> None:
        self.labels.append((rows, labels, weights, np.full(len(rows), owner)))

    def group(self, numbered: Iterable[tuple[int, Example]], prefix: int, *, merged: bool) -> None:
        """Examples that share a prefix of that many tokens, with their numbers. merged: the labels of the prefix are
        put down elsewhere."""
        base, shared = self.tokens, False
        spans = []
        for number, example in numbered:
            if prefix and not shared:
                self._rows(example.ids[:prefix], 0, token_keys(example.ids[:prefix]))
                shared = True
            length, at = len(example), self.tokens
            assert length > prefix and not example.weights[0], "position 0 is predicted by nothing"
            self._rows(example.ids[prefix:], prefix, token_keys(example.ids)[prefix:])
            spans.append((at, length - prefix, prefix))
            self.ends.append((number, self.tokens - 1))
            own = np.arange(max(prefix, 1) if merged else 1, length)
            before = own - 1  # the position that predicts it, in the prefix or in the example's own rows
            rows = np.where(before < prefix, base + before, at + before - prefix)
            self.predicted(rows, example.ids[own], example.weights[own], number)
        self.spans += spans
        self.prefixes += [base] * len(spans)
        if prefix:
            self.spans.append((base, prefix, 0))
            self.prefixes.append(base)

    def _rows(self, ids: Any, first: int, keys: Any) -> None:
        self.ids.append(ids)
        self.positions.append(np.arange(first, first + len(ids)))
        self.keys.append(keys)
        self.tokens += len(ids)

    def packed(self, device: torch.device, *, owned: bool) -> PackedBatch:
        rows, labels, weights, owners = (np.concatenate(part) for part in zip(*self.labels, strict=True))
        used = weights != 0
        row, picked = np.unique(rows[used], return_inverse=True)
        spans, prefixes = np.array(self.spans, dtype=np.int64), np.array(self.prefixes, dtype=np.int64)
        whole = [np.concatenate(part) for part in (self.ids, self.positions, self.keys)]
        numbers = [*whole, row, picked, labels[used], *([owners[used]] if owned else [])]
        weight, *there = copy_to_device([weights[used], *map(_long, numbers)], device)
        ids, positions, keys, row_of, pick, label = there[:6]
        documents = Documents(spans, self.tokens, device, prefixes if prefixes.any() else None)
        owner = there[6] if owned else None
        return PackedBatch(ids, positions, keys, documents, row_of, pick, label, weight, owner, tuple(self.ends))


def sum_by_owner(log_probs: Tensor, weights: Tensor, owners: Tensor, number: int) -> Tensor:
    """weight * log-probability of the labels (M,) summed for each of `number` owners, in fp64 (fp32 where a device has
    no other): the order of the sum does not show in the result."""
    wide = torch.float32 if log_probs.device.type == "mps" else torch.float64
    return torch.zeros(number, dtype=wide, device=log_probs.device).index_add(0, owners, log_probs.to(wide) * weights)


def order_by_owner(owners: Tensor) -> Tensor:
    """The order in which labels (M,) stand one example after the other, each example's as they follow each other."""
    return torch.argsort(owners, stable=True)


def shared_prefix(examples: Sequence[Example]) -> int:
    """Length of the prefix that is worth sharing, leaving each example a token of its own; 0: none."""
    length = min(len(example) for example in examples) - 1
    for example in examples[1:]:
        length = min(length, len(example) - 1)
        differs = np.flatnonzero(example.ids[:length] != examples[0].ids[:length])
        length = int(differs[0]) if len(differs) else length
    return length if len(examples) > 1 and length >= MIN_PREFIX else 0


_Rows = tuple["np.typing.NDArray[np.int64]", "np.typing.NDArray[np.int64]"]


def _buckets(documents: Sequence[Sequence[int]], prefix: int) -> list[_Rows]:
    """Cuts documents (rows of Documents.table) into buckets of least cost, by dynamic programming."""
    order = sorted(documents, key=lambda document: document[1])
    best: list[tuple[int, int]] = [(0, 0)]  # for the first n of `order`: cost, and where their last bucket begins
    for end in range(1, len(order) + 1):
        longest = order[end - 1][1]
        area = longest * (longest + prefix)
        best.append(min((best[begin][0] + CALL_COST + (end - begin) * area, begin) for begin in range(end)))
    found, end = [], len(order)
    while end:
        begin = best[end][1]
        found.append(_bucket(order[begin:end], prefix))
        end = begin
    return found


def _bucket(documents: Sequence[Sequence[int]], prefix: int) -> _Rows:
    queries = np.full((len(documents), max(document[1] for document in documents)), -1, dtype=np.int64)
    for row, (start, length, *_) in zip(queries, documents, strict=True):
        row[:length] = np.arange(start, start + length)
    first = np.array([document[3] for document in documents], dtype=np.int64)
    return queries, np.concatenate([first[:, None] + np.arange(prefix), queries], axis=1)
