"""Pack the examples of a micro-batch into one row of tokens without padding. Planned in numpy.

A prefix that all examples share comes first and once, followed by the rest of each example. The prefix's tokens are
predicted and trained on once, with the sum of the examples' weights, so the loss is exactly the same. `pack_separately`
keeps the labels of each example apart, and examples with the same prompt share their common prefix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from strop.engine.train.buffers import copy_to_device
from strop.engine.train.dropout import token_keys

if TYPE_CHECKING:
    from strop.data.types import Example

Int64 = npt.NDArray[np.int64]
MIN_LENGTH_RATIO = 0.8  # a document shorter than this share of a group's longest starts another group
MIN_PREFIX = 8  # tokens; a shorter prefix saves less than its additional attention call costs
CALL_COST = 200 * 200  # of one more bucket, in query-key pairs (about 0.9 ms at 22 ns a pair of 9 heads)


@dataclass(frozen=True)
class Bucket:
    """Documents padded to one length for attention. queries (D, Sq), keys (D, Sk): packed rows, -1 for padding.

    The keys are the Sk - Sq rows of the prefix, then the rows of the queries.
    """

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Places:
    """The P padded positions of the queries, or keys, of all buckets, document after document.

    token (P,): packed row, -1 for padding. at (P,): position in its document. length (P,): padded length of its
    document. where[first[t] : first[t + 1]]: the padded positions of packed row t.
    """

    token: Tensor
    at: Tensor
    length: Tensor
    first: Tensor
    where: Tensor


@dataclass(frozen=True)
class Layout:
    """The buckets of a micro-batch, and the positions of its packed rows in them."""

    buckets: tuple[Bucket, ...]
    queries: Places
    keys: Places


@dataclass(frozen=True)
class Varlen:
    """Documents in the form of flash attention's variable-length interface.

    query_ends, key_ends (D + 1,): cumulative lengths from 0, int32. keys: the packed row of each key, document after
    document; None where these are all rows in order.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
    keys: Tensor | None


@dataclass(frozen=True)
class Documents:
    """The documents of a packed batch. A shared prefix is a document too.

    spans (D, 3): a document's first row, its number of rows, and the length of the prefix that it attends to. tokens:
    the number of packed rows. prefixes (D,): the first row of each document's prefix; None: row 0.
    """

    spans: Int64
    tokens: int
    device: torch.device
    prefixes: Int64 | None = None
    _thread_tasks: dict[tuple[int, int], tuple[Int64, Int64]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def table(self) -> Int64:
        """Spans, the first row of each document's prefix, and 1 for documents that are a prefix: shape (D, 5)."""
        prefixes = np.zeros(len(self.spans), np.int64) if self.prefixes is None else self.prefixes
        start, _, prefix = self.spans.T
        return np.column_stack([self.spans, prefixes, (prefix == 0) & np.isin(start, prefixes[prefix > 0])])

    @cached_property
    def layout(self) -> Layout:
        """The documents in buckets."""
        parts: list[tuple[Int64, Int64]] = []
        for prefix in sorted(set(self.spans[:, 2].tolist()), reverse=True):
            parts += _buckets(self.table[self.spans[:, 2] == prefix].tolist(), prefix)
        return build_layout(parts, self.tokens, self.device)

    @cached_property
    def padded_groups(self) -> tuple[list[Tensor], Tensor]:
        """Documents without prefixes, padded in groups of similar length.

        Returns the packed rows of each group (D, S), with any row as padding, and the position of each packed row (T,)
        in the concatenation of all groups.
        """
        groups: list[list[tuple[int, int]]] = []
        for start, own, _ in sorted(self.spans.tolist(), key=lambda span: -span[1]):
            if not groups or own < MIN_LENGTH_RATIO * groups[-1][0][1]:
                groups.append([])
            groups[-1].append((start, own))
        places, rows, at = np.zeros(self.tokens, np.int64), [], 0
        for group in groups:
            starts, own = np.array(group).T[:, :, None]
            position = np.arange(own[0, 0])
            valid, packed_row = position < own, starts + position
            rows.append(np.where(valid, packed_row, 0))
            places[packed_row[valid]] = at + np.flatnonzero(valid)
            at += valid.size
        *group_rows, row_places = copy_to_device([*rows, places], self.device)
        return group_rows, row_places

    @cached_property
    def varlen(self) -> Varlen:
        """The documents for flash attention, computed once a micro-batch on the host."""
        spans = self.table[np.argsort(self.spans[:, 0], kind="stable")]
        own, prefix = spans[:, 1], spans[:, 2]

        arrays = [np.cumsum([0, *lengths]).astype(np.int32) for lengths in (own, own + prefix)]
        if prefix.any():
            parts = [rows for s, n, p, first, _ in spans for rows in (np.arange(first, first + p), np.arange(s, s + n))]
            arrays.append(np.concatenate(parts))
        query_ends, key_ends, *keys = copy_to_device(arrays, self.device)
        longest = int(own.max()), int((own + prefix).max())
        return Varlen(query_ends, key_ends, *longest, keys[0] if keys else None)

    def shapes(self, *, in_buckets: bool) -> tuple[tuple[int, int, int], ...]:
        """Return (count, queries, keys) for each shape of document. in_buckets: with the padding of `layout`."""
        if in_buckets:
            return tuple((len(b.queries), b.queries.shape[1], b.keys.shape[1]) for b in self.layout.buckets)
        counts = Counter((int(own), int(own + prefix)) for _, own, prefix in self.spans)
        return tuple((count, queries, keys) for (queries, keys), count in sorted(counts.items()))

    def thread_tasks(self, key_value: int, threads: int) -> tuple[Int64, Int64]:
        """Distribute attention over threads. Returns the tasks, and the index of each thread's first one.

        A task is document * key_value + head. The largest go first, each to the thread with the least work. Cached,
        since the forward and backward of every layer use it.
        """
        if (key_value, threads) in self._thread_tasks:
            return self._thread_tasks[key_value, threads]
        costs = self.spans[:, 1] * (self.spans[:, 1] // 2 + self.spans[:, 2] + 32)
        lanes: list[list[int]] = [[] for _ in range(threads)]
        loads = [0] * threads
        for document in np.argsort(-costs, kind="stable"):
            for head in range(key_value):
                least = loads.index(min(loads))
                lanes[least].append(int(document) * key_value + head)
                loads[least] += int(costs[document])
        tasks = _int64([task for lane in lanes for task in lane]), _int64(np.cumsum([0, *map(len, lanes)]))
        return self._thread_tasks.setdefault((key_value, threads), tasks)


@dataclass(frozen=True)
class PackedBatch:
    """A packed micro-batch of T tokens with M labels. Integers are int64.

    ids, positions, keys (T,): token ids, positions, and the keys of dropout.token_keys. rows (N,): the packed rows that
    predict a supervised token, each once, ascending. label_rows (M,): the index into rows of each label. labels,
    weights (M,). label_examples (M,): the example of each label; None if labels of several examples are merged. ends:
    (example, packed row of its last token) of each example.
    """

    ids: Tensor
    positions: Tensor
    keys: Tensor
    documents: Documents
    rows: Tensor
    label_rows: Tensor
    labels: Tensor
    weights: Tensor
    label_examples: Tensor | None = None
    ends: tuple[tuple[int, int], ...] = ()


def _int64(values: Any) -> Any:
    return np.asarray(values, dtype=np.int64)


def build_layout(parts: Sequence[tuple[Any, Any]], tokens: int, device: torch.device) -> Layout:
    """Return the layout of `tokens` packed rows. parts: (queries, keys) of each bucket, int64 arrays as in Bucket."""

    def places(slots: list[Any]) -> list[Any]:
        token = np.concatenate([rows.ravel() for rows in slots])
        at = np.concatenate([np.broadcast_to(np.arange(rows.shape[1]), rows.shape).ravel() for rows in slots])
        length = np.concatenate([np.full(rows.size, rows.shape[1]) for rows in slots])
        counts = np.bincount(token[token >= 0], minlength=tokens)
        where = np.argsort(token, kind="stable")[np.count_nonzero(token < 0) :]
        return [token, at, length, np.concatenate([[0], np.cumsum(counts)]), where]

    queries, keys = places([queries for queries, _ in parts]), places([keys for _, keys in parts])
    arrays = [*map(_int64, [*queries, *keys]), *(_int64(array) for part in parts for array in part)]
    tensors = copy_to_device(arrays, device)
    buckets = tuple(map(Bucket, tensors[10::2], tensors[11::2]))
    return Layout(buckets, Places(*tensors[:5]), Places(*tensors[5:10]))


def pack(examples: Sequence[Example], *, prefix_sharing: bool, device: torch.device) -> PackedBatch:
    """Pack examples, sharing the prefix of all. Their labels in the prefix are merged."""
    prefix = shared_prefix(examples) if prefix_sharing else 0
    packer = _Packer()
    first, weights = examples[0], [example.weights[1:prefix] for example in examples]
    packer.add_labels(np.arange(max(prefix - 1, 0)), first.ids[1:prefix], np.sum(weights, axis=0, dtype=np.float32), 0)
    packer.add_group(enumerate(examples), prefix, merged=True)
    return packer.packed(device, separate=False)


def pack_separately(examples: Sequence[Example], *, prefix_sharing: bool, device: torch.device) -> PackedBatch:
    """Pack examples with the labels of each kept apart.

    Examples with the same prompt (the tokens before the first supervised one) share their common prefix.
    """
    groups: dict[bytes, list[int]] = {}
    for number, example in enumerate(examples):
        prompt = example.ids[: np.flatnonzero(example.weights)[0]].tobytes() if prefix_sharing else b"%d" % number
        groups.setdefault(prompt, []).append(number)
    packer = _Packer()
    for numbers in groups.values():
        group = [examples[number] for number in numbers]
        packer.add_group(zip(numbers, group, strict=True), shared_prefix(group), merged=False)
    return packer.packed(device, separate=True)


def pack_last_tokens(examples: Sequence[Example], *, prefix_sharing: bool, device: torch.device) -> PackedBatch:
    """Pack as pack_separately, with rows (N,) set to the examples' last tokens. labels and weights are unused."""
    packed = pack_separately(examples, prefix_sharing=prefix_sharing, device=device)
    last = {int(number): int(end) for number, end in packed.ends}
    ends = [last[number] for number in range(len(examples))]
    rows, label_rows = copy_to_device([_int64(ends), _int64(range(len(examples)))], device)
    return replace(packed, rows=rows, label_rows=label_rows)


class _Packer:
    """Collects packed rows, documents, and labels with the rows that predict them."""

    def __init__(self) -> None:
        self.ids: list[Any] = []
        self.positions: list[Any] = []
        self.keys: list[Any] = []
        self.tokens = 0
        self.spans: list[tuple[int, int, int]] = []
        self.prefixes: list[int] = []
        self.labels: list[tuple[Any, Any, Any, Any]] = []  # rows, labels, weights, examples
        self.ends: list[tuple[int, int]] = []  # (example, packed row of its last token)

    def add_labels(self, rows: Any, labels: Any, weights: Any, example: int) -> None:
        self.labels.append((rows, labels, weights, np.full(len(rows), example)))

    def add_group(self, numbered: Iterable[tuple[int, Example]], prefix: int, *, merged: bool) -> None:
        """Add numbered examples that share a prefix of this many tokens. merged: skip the labels in the prefix."""
        base, prefix_added, spans = self.tokens, False, []
        for number, example in numbered:
            if prefix and not prefix_added:
                self._add_rows(example.ids[:prefix], 0, token_keys(example.ids[:prefix]))
                prefix_added = True
            length, at = len(example), self.tokens
            assert length > prefix and not example.weights[0], "no position predicts the token at position 0"
            self._add_rows(example.ids[prefix:], prefix, token_keys(example.ids)[prefix:])
            spans.append((at, length - prefix, prefix))
            self.ends.append((number, self.tokens - 1))
            positions = np.arange(max(prefix, 1) if merged else 1, length)
            before = positions - 1  # the position that predicts it, in the prefix or after it
            rows = np.where(before < prefix, base + before, at + before - prefix)
            self.add_labels(rows, example.ids[positions], example.weights[positions], number)
        self.spans += spans
        self.prefixes += [base] * len(spans)
        if prefix:
            self.spans.append((base, prefix, 0))
            self.prefixes.append(base)

    def _add_rows(self, ids: Any, first: int, keys: Any) -> None:
        self.ids.append(ids)
        self.positions.append(np.arange(first, first + len(ids)))
        self.keys.append(keys)
        self.tokens += len(ids)

    def packed(self, device: torch.device, *, separate: bool) -> PackedBatch:
        """Return the batch. separate: with the example of each label."""
        rows, labels, weights, examples = (np.concatenate(part) for part in zip(*self.labels, strict=True))
        used = weights != 0
        unique_rows, label_rows = np.unique(rows[used], return_inverse=True)
        spans, prefixes = _int64(self.spans), _int64(self.prefixes)
        tokens = [np.concatenate(part) for part in (self.ids, self.positions, self.keys)]
        integers = [*tokens, unique_rows, label_rows, labels[used], *([examples[used]] if separate else [])]
        label_weights, *tensors = copy_to_device([weights[used], *map(_int64, integers)], device)
        documents = Documents(spans, self.tokens, device, prefixes if prefixes.any() else None)
        ids, positions, keys, predicting, row_of_label, label_ids = tensors[:6]
        label_examples, ends = tensors[6] if separate else None, tuple(self.ends)
        return PackedBatch(
            ids, positions, keys, documents, predicting, row_of_label, label_ids, label_weights, label_examples, ends
        )


def sum_by_example(log_probs: Tensor, weights: Tensor, label_examples: Tensor, number: int) -> Tensor:
    """Return the sum of weight * log-probability of the labels (M,) for each of `number` examples.

    The sum is in fp64 (fp32 on MPS), so that the order of the terms does not change the rounded result.
    """
    wide = torch.float32 if log_probs.device.type == "mps" else torch.float64
    sums = torch.zeros(number, dtype=wide, device=log_probs.device)
    return sums.index_add(0, label_examples, log_probs.to(wide) * weights)


def order_by_example(label_examples: Tensor) -> Tensor:
    """Return the permutation that sorts labels (M,) by example and keeps their order within each."""
    return torch.argsort(label_examples, stable=True)


def shared_prefix(examples: Sequence[Example]) -> int:
    """Return the length of the common prefix if sharing it is worthwhile, else 0. Each example keeps one more token."""
    length = min(len(example) for example in examples) - 1
    for example in examples[1:]:
        length = min(length, len(example) - 1)
        differs = np.flatnonzero(example.ids[:length] != examples[0].ids[:length])
        length = int(differs[0]) if len(differs) else length
    return length if len(examples) > 1 and length >= MIN_PREFIX else 0


def _buckets(documents: Sequence[Sequence[int]], prefix: int) -> list[tuple[Int64, Int64]]:
    """Split documents (rows of Documents.table) into buckets of minimal cost by dynamic programming."""
    order = sorted(documents, key=lambda document: document[1])
    best: list[tuple[int, int]] = [(0, 0)]  # for the first n of `order`: cost, and the start of the last bucket
    for end in range(1, len(order) + 1):
        longest = order[end - 1][1]
        area = longest * (longest + prefix)
        best.append(min((best[begin][0] + CALL_COST + (end - begin) * area, begin) for begin in range(end)))
    buckets, end = [], len(order)
    while end:
        begin = best[end][1]
        buckets.append(_bucket(order[begin:end], prefix))
        end = begin
    return buckets


def _bucket(documents: Sequence[Sequence[int]], prefix: int) -> tuple[Int64, Int64]:
    queries = np.full((len(documents), max(document[1] for document in documents)), -1, dtype=np.int64)
    for row, (start, length, *_) in zip(queries, documents, strict=True):
        row[:length] = np.arange(start, start + length)
    first = np.array([document[3] for document in documents], dtype=np.int64)
    return queries, np.concatenate([first[:, None] + np.arange(prefix), queries], axis=1)
