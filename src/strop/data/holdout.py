"""Which of the train rows are held out for evaluation, where data.eval is a share of them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from strop.data.examples import JUDGED, Learning
from strop.data.types import Mask
from strop.errors import DataError


def share_of(spec: str | list[str] | None) -> float | None:
    """data.eval as a share of the train rows, or None where it names files. Raises DataError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", spec) if isinstance(spec, str) else None
    if match is None:
        return None
    share = float(match[1]) / 100
    if not 0 < share < 1:
        raise DataError(f"data.eval: {spec} leaves no rows on one side", fix="choose a share between 0% and 100%")
    return share


def group_of(prompt: int, learning: Learning, first: int | None) -> int | None:
    """The hash that a conversation is held out by: of pairs and judged answers that of the prompt, else that of the
    first conversation of the same row of the file (None: it is the first itself)."""
    return prompt if learning in JUDGED else first


def held_out(records: npt.NDArray[Any], share: float) -> Mask:
    """Of the rows (n,) of a store, those that are held out: whole groups, one at least.

    By hash, so that adding rows moves none. Where no row would be left to train on (all are of one group), each is
    chosen by its own content.
    """
    chosen: Mask = np.zeros(len(records), np.bool_)
    for name in ("group", "digest") if len(records) else ():
        hashes = records[name]
        chosen = hashes < np.uint64(share * 2**64)
        if not chosen.any():
            chosen = hashes == hashes.min()
        if not chosen.all():
            break
    return chosen
