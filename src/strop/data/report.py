"""The accounting of a data set: what became of every row, and what will be trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from strop.data.packing import pack
from strop.data.store import Indices
from strop.errors import DataError

PADDED_ROWS = 8  # the batch whose padding packing is compared to
PACKED_ROWS = 200_000  # rows of a large file that the comparison looks at


@dataclass(frozen=True)
class Tokens:
    """Tokens of the examples: all of them, the supervised ones, and lengths."""

    all: int
    supervised: int
    p50: int
    p95: int
    max: int
    examples: int

    @classmethod
    def of(cls, lengths: Indices, supervised: Indices) -> Tokens:
        if not len(lengths):
            return cls(0, 0, 0, 0, 0, 0)
        p50, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf")
        total, trained = int(lengths.sum()), int(supervised.sum())
        return cls(total, trained, int(p50), int(p95), int(lengths.max()), len(lengths))


@dataclass(frozen=True)
class DataReport:
    """Rows as read, used, truncated, split, dropped: read is the sum of the other four.

    dropped: {file, line, reason, what} of each. cut: {how, file, line, what} of each that was truncated or split.
    held_out: rows used that are for evaluation, not training.
    stop_token: rows whose last supervised token is a stop token, and their share of the rows not dropped.
    duplicates: within (rows beyond the first of equal content), across (eval rows that are also train rows), prompts
    (eval rows whose prompt train rows have too).
    padding: shares of padding in batches of 8 rows in the file's order and in packs of max_length tokens.
    template: sentences on how the chat template was used. refusal: why a run would not start on this.
    answers: of pairs {pairs, chosen_tokens, rejected_tokens, chosen_longer, length_accuracy}, the last what the better
    of "longer is better" and "shorter is better" scores; of judged answers {desirable, undesirable, and their tokens}.
    """

    rows: dict[str, int]
    by_reason: dict[str, int]
    dropped: list[dict[str, Any]]
    tokens: Tokens
    stop_token: dict[str, float]
    duplicates: dict[str, int]
    padding: dict[str, float]
    formats: dict[str, str]
    warnings: list[str]
    template: list[str]
    held_out: int = 0
    refusal: DataError | None = None
    eval: DataReport | None = None
    answers: dict[str, Any] = field(default_factory=dict)
    cut: list[dict[str, Any]] = field(default_factory=list)

    @property
    def would_refuse(self) -> bool:
        return self.refusal is not None or (self.eval is not None and self.eval.would_refuse)

    def as_json(self) -> dict[str, Any]:
        """With the field names of `strop check --json`."""
        return {
            "rows": self.rows,
            "by_reason": self.by_reason,
            "dropped": self.dropped,
            "cut": self.cut,
            "tokens": vars(self.tokens),
            "stop_token": self.stop_token,
            "duplicates": self.duplicates,
            "padding": self.padding,
            "formats": self.formats,
            "warnings": self.warnings,
            "template": self.template,
            "held_out": self.held_out,
            "answers": self.answers,
            "would_refuse": self.would_refuse,
            "refusal": self.refusal.as_json() if self.refusal else None,
            "eval": self.eval.as_json() if self.eval else None,
        }


def padding(lengths: Indices, max_length: int) -> dict[str, float]:
    """Shares of padding: in batches in order, in packs, and what packing saves."""
    lengths = lengths[:PACKED_ROWS]
    if not len(lengths):
        return {"batched": 0.0, "packed": 0.0, "saved": 0.0}
    tokens = int(lengths.sum())
    rest = -len(lengths) % PADDED_ROWS
    batches = np.concatenate([lengths, np.zeros(rest, lengths.dtype)]).reshape(-1, PADDED_ROWS)
    in_batch = np.full(len(batches), PADDED_ROWS)
    in_batch[-1] -= rest
    batched = 1 - tokens / int((batches.max(axis=1) * in_batch).sum())
    packs = pack(lengths.tolist(), max(max_length, int(lengths.max())))
    packed = 1 - tokens / (len(packs) * max(int(lengths[group].sum()) for group in packs))
    return {"batched": batched, "packed": packed, "saved": max(0.0, batched - packed)}
