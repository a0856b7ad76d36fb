"""Score embeddings by retrieval: for each anchor, the rank of the texts that match it among all texts of the rows."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from strop.data.rendering.render import render_triplets
from strop.data.row_errors import RenderError
from strop.data.types import Conversation, Example, Indices, Mask
from strop.distributed.devices import SINGLE_PROCESS, Devices
from strop.engine.decode.embed import Compute, Vectors
from strop.engine.decode.model import Model
from strop.errors import DataError, Location
from strop.evaluation.compare import Progress, check_positions
from strop.evaluation.metrics import RETRIEVAL_SCORES, compare_hits, mean_interval, paired_difference, wilson_interval

NEAREST = RETRIEVAL_SCORES[0]  # the share of anchors whose nearest text matches
CUTOFF = 10  # of recall and nDCG
BASELINE = "TF-IDF"
BASELINE_PACKAGE = "pip install scikit-learn"
BLOCK = 256  # anchors that are compared with all texts at once
SAMPLE_CHARACTERS = 400

Scores = dict[str, npt.NDArray[np.float64]]  # score of each anchor, (Q,), by name


@dataclass(frozen=True)
class Retrieval:
    """A retrieval task over T texts: Q different anchors, D different candidates, and which of them match.

    Texts are equal if their tokens are. first_rows: index of the first text with these tokens among those of all rows,
    row after row, of each anchor and each candidate. matches (Q, D). excluded (Q, D): the anchor itself.
    """

    anchors: Indices
    candidates: Indices
    matches: Mask
    excluded: Mask

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[Example]]) -> Retrieval:
        """Return the task of rows of anchor, positive and negatives. All positives and negatives are candidates."""
        anchors: dict[bytes, int] = {}  # tokens -> number of the anchor
        candidates: dict[bytes, int] = {}
        places: tuple[list[int], list[int]] = [], []
        pairs: list[tuple[int, int]] = []
        number = 0
        for row in rows:
            for index, example in enumerate(row):
                known, key = (candidates if index else anchors), example.ids.tobytes()
                if key not in known:
                    known[key] = len(known)
                    places[bool(index)].append(number)
                number += 1
            pairs.append((anchors[row[0].ids.tobytes()], candidates[row[1].ids.tobytes()]))
        matches, excluded = (np.zeros((len(anchors), len(candidates)), np.bool_) for _ in range(2))
        matches[tuple(np.array(pairs).T)] = True
        for key in anchors.keys() & candidates.keys():
            excluded[anchors[key], candidates[key]] = True
        return cls(np.array(places[0]), np.array(places[1]), matches, excluded & ~matches)

    def with_anchors(self, chosen: Sequence[bool]) -> Retrieval:
        """Return the task of the chosen anchors, (Q,), among the same candidates."""
        mask = np.array(chosen, np.bool_)
        return Retrieval(self.anchors[mask], self.candidates, self.matches[mask], self.excluded[mask])

    def select(self, values: Any) -> tuple[Any, Any]:
        """Return the values of the anchors and of the candidates. values: (T, ...), of all texts of the rows."""
        return values[self.anchors], values[self.candidates]


def score_retrieval(task: Retrieval, vectors: tuple[Any, Any]) -> Scores:
    """Return the scores of each anchor, (Q,). vectors: of anchors (Q, h) and candidates (D, h), of unit length.

    A candidate that does not match counts as nearer than one that matches at the same similarity. `recall_at_10` is the
    share of the matching texts among the 10 nearest, `ndcg_at_10` as in Järvelin and Kekäläinen (ACM TOIS 20 (2002),
    422-446) with gain 1 for a match, `mrr` the reciprocal rank of the nearest match.
    """
    columns: dict[str, list[float]] = {name: [] for name in RETRIEVAL_SCORES}
    discounts = 1 / np.log2(np.arange(2, CUTOFF + 2))
    for begin in range(0, len(task.matches), BLOCK):
        block = slice(begin, begin + BLOCK)
        product = vectors[0][block] @ vectors[1].T
        similarities = product.toarray() if hasattr(product, "toarray") else product
        for values, matches, excluded in zip(similarities, task.matches[block], task.excluded[block], strict=True):
            ranks = _rank_matches(values, matches, excluded)
            gain = discounts[ranks[ranks <= CUTOFF] - 1].sum() / discounts[: len(ranks)].sum()
            row = float(ranks[0] == 1), float((ranks <= CUTOFF).mean()), float(gain), 1 / float(ranks[0])
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return {name: np.array(column) for name, column in columns.items()}


def _rank_matches(values: npt.NDArray[Any], matches: Mask, excluded: Mask) -> Indices:
    """Return the ranks of the matching candidates from 1, ascending. values: similarities, (D,)."""
    others = values[~matches & ~excluded]
    sorted_matches = np.sort(values[matches])[::-1]
    nearer = np.array([(others >= value).sum() for value in sorted_matches], np.int64)
    return nearer + np.arange(1, len(sorted_matches) + 1)


def summarize_scores(scores: Scores) -> dict[str, Any]:
    """Return the mean of each score and, under NAME_interval, its 95 % interval over anchors."""
    result: dict[str, Any] = {}
    for name, values in scores.items():
        result[name] = float(values.mean())
        if (interval := _interval(values)) is not None:
            result[f"{name}_interval"] = interval
    return result


def _interval(values: npt.NDArray[np.float64]) -> list[float] | None:
    """Return Wilson's interval of hits and misses, and Student's of other scores; None for a single one."""
    if np.isin(values, (0, 1)).all():
        return list(wilson_interval(int(values.sum()), len(values)))
    if len(values) < 2:
        return None
    low, high = mean_interval(values.tolist())
    return [max(low, 0.0), min(high, 1.0)]


def compare_retrieval(
    model: Model,
    conversations: Sequence[Conversation],
    advance: Progress | None = None,
    devices: Devices = SINGLE_PROCESS,
    *,
    with_base: bool = True,
    train_rows: Sequence[Conversation] | None = None,
    queries: Sequence[Conversation] = (),
) -> dict[str, Any]:
    """Score a model of embeddings, its base with the same pooling, and TF-IDF, on rows of texts that match.

    queries: the rows whose anchors are scored; all if there are none. The texts of all rows are candidates.
    `rows` of the result is the number of different anchors and `texts` that of the candidates. `base`, `tuned` and
    `baseline` have the scores of `score_retrieval`, and `score_intervals` their intervals. `known_texts` is the number
    of candidates that are also texts of `train_rows`.
    """
    rows, invalid = list[list[Example]](), list[Location]()
    for conversation, rendered in render_triplets(model.renderer, conversations):
        if isinstance(rendered, RenderError):
            invalid.append(Location(conversation.file, conversation.line, rendered.what))
        else:
            rows.append(rendered)
    if invalid:
        raise DataError(f"{len(invalid)} rows cannot be embedded", fix="correct or remove these rows", where=invalid)
    check_positions(model, (example for row in rows for example in row))
    task = Retrieval.from_rows(rows)
    texts = np.array([text for row in conversations for text in row.texts], dtype=object)
    if queries:
        asked = {row.text or "" for row in queries}
        task = task.with_anchors([text in asked for text in task.select(texts)[0]])
    anchors, candidates = task.select(texts)
    examples = [example for row in rows for example in row]
    chosen = [examples[index] for index in (*task.anchors, *task.candidates)]
    vectors: dict[str, tuple[Any, Any]] = {}
    for side in ("base", "tuned") if with_base else ("tuned",):
        with model.base() if side == "base" else nullcontext():
            found = _embed(model, chosen, side, advance, devices)
        vectors[side] = found[: len(anchors)], found[len(anchors) :]
    notes = []
    if with_base and not has_baseline():
        notes.append(f"no baseline ({BASELINE}): {BASELINE_PACKAGE}")
    elif with_base:
        vectors = {"baseline": devices.run_on_main(lambda: _embed_baseline(anchors, candidates)), **vectors}
    scores = {side: score_retrieval(task, pair) for side, pair in vectors.items()}
    hits = {side: (values[NEAREST] > 0).tolist() for side, values in scores.items()}
    first_rows = np.cumsum([0, *map(len, rows)])[:-1]
    sources = [conversations[int(row)] for row in np.searchsorted(first_rows, task.anchors)]
    result: dict[str, Any] = {"rows": len(anchors), "texts": len(candidates), "metric": NEAREST}
    result |= {side: {name: float(x.mean()) for name, x in values.items()} for side, values in scores.items()}
    result |= compare_hits({side: hits[side] for side in ("base", "tuned") if side in hits}, sources)
    result["intervals"] |= {side: list(wilson_interval(sum(x), len(x))) for side, x in hits.items()}
    result["score_intervals"] = {side: {k: _interval(x) for k, x in values.items()} for side, values in scores.items()}
    if "base" in scores and len(anchors) > 1:
        changes = {name: values - scores["base"][name] for name, values in scores["tuned"].items()}
        result["score_differences"] = {
            name: dict(zip(("value", "low", "high"), (float(x.mean()), *mean_interval(x.tolist())), strict=True))
            for name, x in changes.items()
        } | {NEAREST: result["difference"]}
    if "baseline" in hits:
        result["baseline_name"] = BASELINE
        result["baseline_difference"] = vars(paired_difference(hits["baseline"], hits["tuned"]))
    if train_rows is not None:
        known = {text for row in train_rows for text in row.texts}
        result["known_texts"] = sum(text in known for text in candidates)
        if result["known_texts"]:
            notes.append(f"{result['known_texts']:,} of {len(candidates):,} texts are also texts of the training rows")
    result["notes"] = notes
    result["samples"] = list(_make_samples(task, vectors, sources, candidates, hits))
    return result


def _embed(model: Model, examples: Sequence[Example], side: str, advance: Progress | None, devices: Devices) -> Vectors:
    done = 0

    def run(batches: list[list[int]], compute: Compute, weight: Callable[[list[int]], float]) -> list[Vectors]:
        def compute_and_report(batch: list[int]) -> Vectors:
            nonlocal done
            vectors = compute(batch)
            done += len(batch) * devices.world_size
            if advance is not None:
                advance(side, min(done, len(examples)), len(examples))
            return vectors

        return devices.map(batches, compute_and_report, weight)

    return model.make_embedder().embed(examples, run)


def has_baseline() -> bool:
    return importlib.util.find_spec("sklearn") is not None


def _embed_baseline(anchors: Sequence[str], candidates: Sequence[str]) -> tuple[Any, Any]:
    """Return sparse TF-IDF vectors of words, of unit length. The weights are those of the candidates."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    has_words = any(re.search(r"\w", text) for text in candidates)
    vectorizer = TfidfVectorizer(token_pattern=r"\w+" if has_words else r"\S+", sublinear_tf=True)
    vectors = vectorizer.fit_transform(candidates)
    return vectorizer.transform(anchors), vectors


def _make_samples(
    task: Retrieval, vectors: dict[str, tuple[Any, Any]], rows: Sequence[Conversation], candidates: Sequence[str],
    hits: dict[str, list[bool]],
) -> Any:  # fmt: skip
    """Yield samples for the report: an anchor, its positive, and the nearest text by the base and the tuned model."""
    sides = [side for side in ("base", "tuned") if side in vectors]
    nearest = {
        side: [
            int(np.where(task.excluded[index], -np.inf, vectors[side][1] @ anchor).argmax())
            for index, anchor in enumerate(vectors[side][0])
        ]
        for side in sides
    }
    for index, row in enumerate(rows):
        sample: dict[str, Any] = {"place": row.place, "prompt": row.text, "gold": row.passages[0]}
        for side in sides:
            sample |= {side: candidates[nearest[side][index]], f"{side}_hit": hits[side][index]}
        yield {name: x[:SAMPLE_CHARACTERS] if isinstance(x, str) else x for name, x in sample.items()}
