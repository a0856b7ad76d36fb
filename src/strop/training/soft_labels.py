"""Distributions over tokens as labels: computed by a model, stored with a run, and attached to rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from strop.data.batching import group_by_length, in_row_order, pack
from strop.data.types import Example, SoftLabels
from strop.engine.step import step_for
from strop.models.adapter_config import WEIGHTS_FILE
from strop.models.source import Source, fingerprint
from strop.runs.folder import write_atomic
from strop.runs.lock import sha256_file

BATCH_TOKENS = 1024  # of a batch whose probabilities are computed together

LOG = logging.getLogger(__name__)

# "ids" and "probs": the most likely token ids, int32, and their probabilities, fp32, both of shape (S, K), for the S
# supervised tokens of all rows in order
Distributions = dict[str, npt.NDArray[Any]]


def find_distributions(
    rows: Sequence[Example], module: Any, k: int, message: str, temperature: float = 1
) -> Distributions:
    """Return the k most likely tokens for each supervised token, with their probabilities at a temperature.

    module: the model. message: logged with the number of finished rows and of all rows.
    """
    step, parts, done = step_for(module), list[list[tuple[Any, Any]]](), 0
    lengths = [len(row) for row in rows]
    packed = step.packed and pack(lengths, max(BATCH_TOKENS, *lengths))
    batches = packed or group_by_length(lengths, tokens=BATCH_TOKENS)
    for batch in batches:
        LOG.info(message, done, len(rows))
        ids, probs = step.top_probs([rows[row] for row in batch], k, temperature)
        ends = np.cumsum([rows[row].supervised for row in batch])[:-1]
        split = (np.split(ids.cpu().numpy().astype(np.int32), ends), np.split(probs.cpu().numpy(), ends))
        parts.append(list(zip(*split, strict=True)))
        done += len(batch)
    all_ids, all_probs = zip(*in_row_order(batches, parts), strict=True)
    return {"ids": np.concatenate(all_ids), "probs": np.concatenate(all_probs)}


def soften(
    row: Example, ids: npt.NDArray[Any], probs: npt.NDArray[Any], weight: float = 1, temperature: float = 1
) -> Example:
    """Return the row with distributions next to its labels. ids, probs: (S, K), for the row's supervised tokens.

    weight, temperature: as in SoftLabels.
    """
    supervised = row.weights > 0
    ids, probs = ids.copy(), probs / np.maximum(1, np.maximum(probs, 0).sum(1, keepdims=True))
    labels = row.ids[supervised, None]
    missing = ~(ids == labels).any(1)
    ids[missing, -1], probs[missing, -1] = labels[missing, 0], 0  # the label is always among the ids
    shape = len(row), ids.shape[1]
    soft = SoftLabels(np.zeros(shape, np.int32), np.zeros(shape, np.float32), weight, temperature)
    soft.ids[supervised], soft.probs[supervised] = ids, probs
    return replace(row, soft=soft)


def read_or_compute(
    file: Path, key: str, tokens: int, cached: Callable[[], Path], compute: Callable[[], Distributions],
    store: Callable[[Path, bytes], None] = write_atomic,
) -> Distributions:  # fmt: skip
    """Return the distributions in a file of a run. If they are not there, they are read from the cache or computed.

    key: the rows that they are of. tokens: the number of supervised tokens. cached: the file in the cache.
    store: called with the file of the run and its new content.
    """
    if (found := _read(file, key, tokens)) is None:
        path = cached()
        if (found := _read(path, key, tokens)) is None:
            found = compute()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save(found, metadata={"key": key}))
        store(file, path.read_bytes())
    return found


def _read(file: Path, key: str, tokens: int) -> Distributions | None:
    """Return the distributions in a file, or None if it does not exist, is damaged, or has those of other rows."""
    try:
        with safe_open(file, framework="numpy") as opened:
            stored = (opened.metadata() or {}).get("key", key)  # files of the first runs have none
            found = {name: opened.get_tensor(name) for name in ("ids", "probs")}
    except (OSError, SafetensorError):
        return None
    return found if stored == key and len(found["ids"]) == tokens else None


def model_key(source: Source, adapter: Path | None) -> list[Any]:
    """Return a value that identifies a base and its adapter."""
    hashes = adapter and [sha256_file(adapter / name) for name in (WEIGHTS_FILE, "adapter_config.json")]
    return [fingerprint(source), hashes]
