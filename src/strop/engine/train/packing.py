"""Pack the examples of a micro-batch into one sequence of T rows, one per token, without padding.

`pack` finds groups of examples with a common prefix. It stores the prefix of a group once, and the rest of each example
after it. The labels in a prefix are merged by adding their weights, which does not change the loss. `pack_separately`
keeps the labels of each example apart, and shares the common prefix of examples with the same prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from strop.data.prefixes import MIN_PREFIX, PrefixGroup, group_by_prefix, shared_length
from strop.engine.train.buffers import copy_to_device
from strop.engine.train.dropout import token_keys

if TYPE_CHECKING:
    from strop.data.types import Example, SoftLabels

Int64 = npt.NDArray[np.int64]
MIN_LENGTH_RATIO = 0.8  # minimum ratio of the shortest to the longest document of a padded group
CALL_COST = 200 * 200  # cost of an attention call in query-key pairs (0.9 ms at 22 ns per pair, with 9 heads)


@dataclass(frozen=True)
class Bucket:
    """D documents padded to one length for attention.

    queries (D, Sq), keys (D, Sk): packed rows, -1 for padding. The keys are the Sk - Sq rows of the shared prefix,
    followed by the rows of the queries.
    """

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Slots:
    """The P padded places (slots) for the queries or for the keys in all buckets, document after document.

    rows (P,): packed row of each slot, -1 for padding. positions (P,): position in the document. lengths (P,): padded
    length of the document. slots_by_row[starts[t] : starts[t + 1]]: indices of the slots of packed row t.
    """

    rows: Tensor
    positions: Tensor
    lengths: Tensor
    starts: Tensor
    slots_by_row: Tensor


@dataclass(frozen=True)
class Layout:
    """The buckets of a micro-batch, and the slots of its packed rows in them."""

    buckets: tuple[Bucket, ...]
    queries: Slots
    keys: Slots


@dataclass(frozen=True)
class Varlen:
    """The arguments of flash attention's interface for sequences of variable length.

    query_ends, key_ends (D + 1,): cumulative lengths, starting with 0, int32. keys: the packed row of each key,
    document after document; None if these are all packed rows in order.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
    keys: Tensor | None


@dataclass(frozen=True)
class Documents:
    """The D documents of a packed batch: the examples without their shared prefixes, and the shared prefixes.

    spans (D, 3): first row of the document, number of rows, and length of the prefix that it attends to. tokens: number
    of packed rows. prefixes (D,): first row of the document's prefix; None if all prefixes start at row 0.
    """

    spans: Int64
    tokens: int
    device: torch.device
    prefixes: Int64 | None = None
    _thread_tasks: dict[tuple[int, int], tuple[Int64, Int64]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def table(self) -> Int64:
        """The columns of spans, the first row of the prefix, and 1 for documents that are a prefix, else 0: (D, 5)."""
        prefixes = np.zeros(len(self.spans), np.int64) if self.prefixes is None else self.prefixes
        start, _, prefix = self.spans.T
        return np.column_stack([self.spans, prefixes, (prefix == 0) & np.isin(start, prefixes[prefix > 0])])

    @cached_property
    def layout(self) -> Layout:
        parts: list[tuple[Int64, Int64]] = []
        for prefix in sorted(set(self.spans[:, 2].tolist()), reverse=True):
            parts += _make_buckets(self.table[self.spans[:, 2] == prefix].tolist(), prefix)
        return build_layout(parts, self.tokens, self.device)

    @cached_property
    def padded_groups(self) -> tuple[list[Tensor], Tensor]:
        """The packed rows of documents without prefixes, padded in groups of similar length.

        Returns the packed rows of each group (D, S), with arbitrary rows as padding, and the index of each packed row
        (T,) in the concatenation of all groups.
        """
        groups: list[list[tuple[int, int]]] = []
        for start, length, _ in sorted(self.spans.tolist(), key=lambda span: -span[1]):
            if not groups or length < MIN_LENGTH_RATIO * groups[-1][0][1]:
                groups.append([])
            groups[-1].append((start, length))
        indices, group_rows, offset = np.zeros(self.tokens, np.int64), [], 0
        for group in groups:
            starts, lengths = np.array(group).T[:, :, None]
            positions = np.arange(lengths[0, 0])
            valid, rows = positions < lengths, starts + positions
            group_rows.append(np.where(valid, rows, 0))
            indices[rows[valid]] = offset + np.flatnonzero(valid)
            offset += valid.size
        *rows_on_device, indices_on_device = copy_to_device([*group_rows, indices], self.device)
        return rows_on_device, indices_on_device

    @cached_property
    def varlen(self) -> Varlen:
        """The documents in the order of their rows, for flash attention."""
        spans = self.table[np.argsort(self.spans[:, 0], kind="stable")]
        queries, prefix = spans[:, 1], spans[:, 2]
        arrays = [np.cumsum([0, *lengths]).astype(np.int32) for lengths in (queries, queries + prefix)]
        if prefix.any():
            parts = [rows for s, n, p, first, _ in spans for rows in (np.arange(first, first + p), np.arange(s, s + n))]
            arrays.append(np.concatenate(parts))
        query_ends, key_ends, *keys = copy_to_device(arrays, self.device)
        longest = int(queries.max()), int((queries + prefix).max())
        return Varlen(query_ends, key_ends, *longest, keys[0] if keys else None)

    def shapes(self, *, in_buckets: bool) -> tuple[tuple[int, int, int], ...]:
        """Return (documents, queries, keys) for each document shape. in_buckets: padded to the buckets of `layout`."""
        if in_buckets:
            return tuple((len(b.queries), b.queries.shape[1], b.keys.shape[1]) for b in self.layout.buckets)
        counts = Counter((int(length), int(length + prefix)) for _, length, prefix in self.spans)
        return tuple((count, queries, keys) for (queries, keys), count in sorted(counts.items()))

    def thread_tasks(self, num_kv_heads: int, threads: int) -> tuple[Int64, Int64]:
        """Distribute attention over threads. Return the tasks, thread by thread, and the index of each thread's first.

        A task is a document and a key-value head, as document * num_kv_heads + head. The tasks are assigned in
        descending order of cost, each to the thread with the lowest total. The result is cached for the other layers.
        """
        if (num_kv_heads, threads) in self._thread_tasks:
            return self._thread_tasks[num_kv_heads, threads]
        costs = self.spans[:, 1] * (self.spans[:, 1] // 2 + self.spans[:, 2] + 32)
        by_thread: list[list[int]] = [[] for _ in range(threads)]
        totals = [0] * threads
        for document in np.argsort(-costs, kind="stable"):
            for head in range(num_kv_heads):
                thread = totals.index(min(totals))
                by_thread[thread].append(int(document) * num_kv_heads + head)
                totals[thread] += int(costs[document])
        tasks = _int64([task for tasks in by_thread for task in tasks]), _int64(np.cumsum([0, *map(len, by_thread)]))
        return self._thread_tasks.setdefault((num_kv_heads, threads), tasks)


@dataclass(frozen=True)
class SoftTargets:
    """Distributions over k token ids next to S of the labels of a batch.

    Attributes:
        rows: the labels that have one, ascending, (S,), int64, on the CPU.
        ids, probs: different token ids, among them the label, and their probabilities, (S, k), as in SoftLabels.
        weight, temperature: as in SoftLabels, the same for all.
    """

    rows: Tensor
    ids: Tensor
    probs: Tensor
    weight: float
    temperature: float
    losses: list[Tensor] = field(default_factory=list)  # their sums in each chunk of the output head


@dataclass(frozen=True)
class PackedBatch:
    """A packed micro-batch of T tokens with M labels. Integers are int64.

    Attributes:
        ids, positions, token_keys: token ids, positions, and the keys for dropout (dropout.token_keys), (T,).
        rows: the packed rows that predict a supervised token, without duplicates, ascending, (N,).
        label_rows: the index into `rows` of each label, (M,).
        in_row_order: whether label i is predicted by row i of `rows`, so that label_rows is 0, 1, ..., M - 1.
        labels, weights: the token id and the loss weight of each label, (M,).
        label_examples: the example of each label, (M,); None if labels of several examples are merged.
        soft: the soft labels; None if there are none, or with `label_examples`.
        ends: (example, packed row of its last token) of each example.
    """

    ids: Tensor
    positions: Tensor
    token_keys: Tensor
    documents: Documents
    rows: Tensor
    label_rows: Tensor
    in_row_order: bool
    labels: Tensor
    weights: Tensor
    label_examples: Tensor | None = None
    soft: SoftTargets | None = None
    ends: tuple[tuple[int, int], ...] = ()


def _int64(values: Any) -> Any:
    return np.asarray(values, dtype=np.int64)


def build_layout(parts: Sequence[tuple[Any, Any]], tokens: int, device: torch.device) -> Layout:
    """Return the layout of `tokens` packed rows. parts: the queries and keys of each bucket, as NumPy arrays."""

    def make_slots(row_arrays: list[Any]) -> list[Any]:
        rows = np.concatenate([x.ravel() for x in row_arrays])
        positions = np.concatenate([np.broadcast_to(np.arange(x.shape[1]), x.shape).ravel() for x in row_arrays])
        lengths = np.concatenate([np.full(x.size, x.shape[1]) for x in row_arrays])
        counts = np.bincount(rows[rows >= 0], minlength=tokens)
        slots = np.argsort(rows, kind="stable")[np.count_nonzero(rows < 0) :]
        return [rows, positions, lengths, np.concatenate([[0], np.cumsum(counts)]), slots]

    queries, keys = make_slots([queries for queries, _ in parts]), make_slots([keys for _, keys in parts])
    arrays = [*map(_int64, [*queries, *keys]), *(_int64(array) for part in parts for array in part)]
    tensors = copy_to_device(arrays, device)
    buckets = tuple(map(Bucket, tensors[10::2], tensors[11::2]))
    return Layout(buckets, Slots(*tensors[:5]), Slots(*tensors[5:10]))


def pack(examples: Sequence[Example], *, prefix_sharing: bool, device: torch.device) -> PackedBatch:
    """Pack examples. With prefix_sharing, a prefix that some of them share is packed once, with merged labels."""
    packer, groups = _Packer(), [PrefixGroup(tuple(range(len(examples))), 0)]
    if prefix_sharing:
        groups = group_by_prefix([example.ids for example in examples], [*map(_longest_prefix, examples)])
    for group in groups:
        rows, prefix, base = [examples[i] for i in group.rows], group.prefix, packer.tokens
        weights = np.sum([example.weights[1:prefix] for example in rows], axis=0, dtype=np.float32)
        packer.add_labels(base + np.arange(max(prefix - 1, 0)), rows[0].ids[1:prefix], weights, 0)
        packer.add_group(group.rows, rows, prefix, skip_prefix_labels=True)
    return packer.build(device, with_examples=False)


def pack_separately(examples: Sequence[Example], *, prefix_sharing: bool, device: torch.device) -> PackedBatch:
    """Pack examples without merging labels.

    With prefix_sharing, examples with the same prompt (the tokens before the first label) share their common prefix.
    """
    groups: dict[bytes, list[int]] = {}
    for i, example in enumerate(examples):
        prompt = example.ids[: np.flatnonzero(example.weights)[0]].tobytes() if prefix_sharing else b"%d" % i
        groups.setdefault(prompt, []).append(i)
    packer = _Packer()
    for indices in groups.values():
        group = [examples[i] for i in indices]
        packer.add_group(indices, group, shared_prefix_length(group), skip_prefix_labels=False)
    return packer.build(device, with_examples=True)


def pack_last_tokens(examples: Sequence[Example], *, prefix_sharing: bool, device: torch.device) -> PackedBatch:
    """Pack like pack_separately, with `rows` set to each example's last token. Its labels and weights are not valid."""
    packed = pack_separately(examples, prefix_sharing=prefix_sharing, device=device)
    ends = [row for _, row in sorted(packed.ends)]
    rows, label_rows = copy_to_device([_int64(ends), _int64(range(len(examples)))], device)
    return replace(packed, rows=rows, label_rows=label_rows, in_row_order=True)


def pack_all_tokens(examples: Sequence[Example], *, device: torch.device) -> PackedBatch:
    """Pack without prefix sharing, with `rows` set to all tokens and `label_examples` to the example of each, (T,).

    The labels and weights are not valid.
    """
    packed = pack_separately(examples, prefix_sharing=False, device=device)
    numbers = np.repeat(np.arange(len(examples)), [len(example) for example in examples])
    rows, label_examples = copy_to_device([np.arange(len(numbers)), numbers], device)
    return replace(packed, rows=rows, label_rows=rows, in_row_order=True, label_examples=label_examples)


def mean_by_example(values: Tensor, examples: Tensor, number: int) -> Tensor:
    """Return the mean of the values (T, h) of each of `number` examples, (number, h), fp32. examples: (T,)."""
    sums = values.new_zeros(number, values.shape[1], dtype=torch.float32).index_add(0, examples, values.float())
    return sums / torch.bincount(examples, minlength=number)[:, None]


class _Packer:
    """Collects the rows, documents and labels of a PackedBatch."""

    def __init__(self) -> None:
        self.ids: list[Any] = []
        self.positions: list[Any] = []
        self.token_keys: list[Any] = []
        self.tokens = 0
        self.spans: list[tuple[int, int, int]] = []
        self.prefixes: list[int] = []
        self.labels: list[tuple[Any, Any, Any, Any]] = []  # arrays: predicting rows, labels, weights, examples
        self.soft: list[tuple[int, Any, SoftLabels]] = []  # index in `labels`, and the positions in the example
        self.ends: list[tuple[int, int]] = []  # as in PackedBatch

    def add_labels(self, rows: Any, labels: Any, weights: Any, example: int) -> None:
        self.labels.append((rows, labels, weights, np.full(len(rows), example)))

    def add_group(
        self, indices: Sequence[int], examples: Sequence[Example], prefix: int, *, skip_prefix_labels: bool
    ) -> None:
        """Add examples that share a prefix of `prefix` tokens. indices: their indices in the micro-batch."""
        base, spans = self.tokens, []
        if prefix:
            self._add_rows(examples[0], 0, prefix)
        for i, example in zip(indices, examples, strict=True):
            length, start = len(example), self.tokens
            is_single = length == 1  # the last token of a text to classify
            assert length > prefix and (is_single or not example.weights[0]), "no position predicts position 0"
            self._add_rows(example, prefix, length)
            spans.append((start, length - prefix, prefix))
            self.ends.append((i, self.tokens - 1))
            positions = np.arange(max(prefix, 1) if skip_prefix_labels else 1, length)
            predicting = positions - 1
            rows = np.where(predicting < prefix, base + predicting, start + predicting - prefix)
            if example.soft is not None:
                self.soft.append((len(self.labels), positions, example.soft))
            self.add_labels(rows, example.ids[positions], example.weights[positions], i)
        if prefix:
            spans.append((base, prefix, 0))
        self.spans += spans
        self.prefixes += [base] * len(spans)

    def _add_rows(self, example: Example, start: int, end: int) -> None:
        self.ids.append(example.ids[start:end])
        self.positions.append(np.arange(start, end))
        self.token_keys.append(token_keys(example.ids[:end])[start:])
        self.tokens += end - start

    def build(self, device: torch.device, *, with_examples: bool) -> PackedBatch:
        """Return the batch. with_examples: set label_examples."""
        predicting, label_ids, weights, examples = (np.concatenate(part) for part in zip(*self.labels, strict=True))
        used = weights != 0
        unique_rows, row_indices = np.unique(predicting[used], return_inverse=True)
        spans, prefixes = _int64(self.spans), _int64(self.prefixes)
        tokens = [np.concatenate(part) for part in (self.ids, self.positions, self.token_keys)]
        integers = [*tokens, unique_rows, row_indices, label_ids[used], *([examples[used]] if with_examples else [])]
        label_weights, *tensors = copy_to_device([weights[used], *map(_int64, integers)], device)
        ids, positions, keys, rows, label_rows, labels, *label_examples = tensors
        documents = Documents(spans, self.tokens, device, prefixes if prefixes.any() else None)
        return PackedBatch(
            ids, positions, keys, documents, rows, label_rows, np.array_equal(row_indices, np.arange(len(unique_rows))),
            labels, label_weights,
            label_examples[0] if with_examples else None, None if with_examples else self._soft_targets(used, device),
            tuple(self.ends),
        )  # fmt: skip

    def _soft_targets(self, used: Any, device: torch.device) -> SoftTargets | None:
        if not self.soft:
            return None
        starts = np.cumsum([0, *(len(rows) for rows, *_ in self.labels)])
        labels = np.concatenate([starts[part] + np.arange(len(positions)) for part, positions, _ in self.soft])
        ids = np.concatenate([soft.ids[positions] for _, positions, soft in self.soft])
        probs = np.concatenate([soft.probs[positions] for _, positions, soft in self.soft])
        ((weight, temperature),) = {(soft.weight, soft.temperature) for *_, soft in self.soft}
        kept, index = used[labels], np.cumsum(used) - 1  # of all labels, and among those that are used
        on_device = copy_to_device([_int64(ids[kept]), np.ascontiguousarray(probs[kept])], device)
        rows = torch.from_numpy(_int64(index[labels[kept]]))
        return SoftTargets(rows, on_device[0], on_device[1], weight, temperature)


def sum_by_example(log_probs: Tensor, weights: Tensor, label_examples: Tensor, number: int) -> Tensor:
    """Return the sums of weight * log-probability over the labels (M,) of each of `number` examples.

    They are computed in fp64 (fp32 on MPS), so that the order of the labels does not change the rounded result.
    """
    wide = torch.float32 if log_probs.device.type == "mps" else torch.float64
    sums = torch.zeros(number, dtype=wide, device=log_probs.device)
    return sums.index_add(0, label_examples, log_probs.to(wide) * weights)


def shared_prefix_length(examples: Sequence[Example]) -> int:
    """Return the length of the common prefix if sharing it is worthwhile, else 0."""
    length = min(map(_longest_prefix, examples))
    for example in examples[1:]:
        length = shared_length(example.ids[:length], examples[0].ids[:length])
    return length if len(examples) > 1 and length >= MIN_PREFIX else 0


def _longest_prefix(example: Example) -> int:
    """Return how many tokens may be shared: not the last one, and no soft labels, which cannot be merged."""
    return len(example) - 1 if example.soft is None else min(len(example) - 1, example.prompt_length)


def _make_buckets(documents: Sequence[Sequence[int]], prefix: int) -> list[tuple[Int64, Int64]]:
    """Split documents (rows of Documents.table) into buckets of minimum total cost, by dynamic programming."""
    order = sorted(documents, key=lambda document: document[1])
    best: list[tuple[int, int]] = [(0, 0)]  # best[n]: cost of the first n documents, and start of their last bucket
    for end in range(1, len(order) + 1):
        longest = order[end - 1][1]
        area = longest * (longest + prefix)
        best.append(min((best[begin][0] + CALL_COST + (end - begin) * area, begin) for begin in range(end)))
    buckets, end = [], len(order)
    while end:
        begin = best[end][1]
        buckets.append(_make_bucket(order[begin:end], prefix))
        end = begin
    return buckets


def _make_bucket(documents: Sequence[Sequence[int]], prefix: int) -> tuple[Int64, Int64]:
    queries = np.full((len(documents), max(document[1] for document in documents)), -1, dtype=np.int64)
    for row, (start, length, *_) in zip(queries, documents, strict=True):
        row[:length] = np.arange(start, start + length)
    first = np.array([document[3] for document in documents], dtype=np.int64)
    return queries, np.concatenate([first[:, None] + np.arange(prefix), queries], axis=1)
