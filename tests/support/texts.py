"""Texts with their classes, as data files and in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from strop.data.types import Example, LabelledText
from tests.support.families import tokenizer

NAMES = ("music", "weather", "table")
WORDS = (("play", "listen", "song"), ("rain", "sunny", "wind"), ("book", "seat", "dinner"))


def texts(number: int, seed: int = 0, several: bool = False, longest: int = 24) -> list[LabelledText]:
    """Return random texts with random classes of NAMES, one of them with a single token."""
    random = np.random.default_rng(seed)
    rows = []
    for line in range(number):
        length = int(random.integers(2, longest)) if line else 1
        ids = random.integers(5, len(tokenizer("chatml")), length).astype(np.int32)
        weights = np.zeros(length, np.float32)
        weights[-1] = 1
        chosen = random.random(3) < 0.4 if several else np.arange(3) == line % 3
        classes = tuple(int(i) for i in chosen.nonzero()[0])
        rows.append(LabelledText((Example(ids, weights, "random", line + 1),), classes=classes))
    return rows


def rows(number: int, several: bool = False) -> list[dict[str, Any]]:
    """Return rows of three classes whose texts are all different."""
    return [
        {"text": f"{WORDS[n % 3][n % 2]} the {n} of {n * 7}", "label": sorted({NAMES[n % 3], NAMES[n % 2]})[: n % 4]}
        if several
        else {"text": f"{WORDS[n % 3][n % 2]} the {n} of {n * 7}", "label": NAMES[n % 3]}
        for n in range(number)
    ]


def write(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path
