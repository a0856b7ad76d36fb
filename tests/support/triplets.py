"""Anchors with positives and negatives, as data files and in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from strop.data.rendering.render import text_example
from strop.data.types import Triplet
from tests.support.families import tokenizer

VERBS, THINGS = ("play", "book", "cancel", "find", "rate"), ("a song", "a table", "a film", "a book", "the weather")


def triplets(number: int, seed: int = 0, negatives: int | None = 1, longest: int = 24) -> list[Triplet]:
    """Return random triplets, one of whose texts has a single token. negatives: of each; None for 0, 1, 2 in turn."""
    random = np.random.default_rng(seed)
    rows = []
    for line in range(number):
        count = 2 + (line % 3 if negatives is None else negatives)
        lengths = [1 if line == index == 0 else int(random.integers(2, longest)) for index in range(count)]
        ids = [random.integers(5, len(tokenizer("chatml")), length).astype(np.int32) for length in lengths]
        rows.append(Triplet(tuple(text_example(row, "random", line + 1) for row in ids)))
    return rows


def rows(number: int, negatives: bool = False) -> list[dict[str, Any]]:
    """Return rows whose anchors and positives share a verb, a thing and a number."""
    values = []
    for n in range(number):
        verb, thing = VERBS[n % 5], THINGS[n // 5 % 5]
        row = {"anchor": f"{verb} {thing} {n}", "positive": f"{n}: {thing} to {verb}"}
        values.append(row | ({"negative": f"{n}: {thing} to {VERBS[(n + 1) % 5]}"} if negatives else {}))
    return values
