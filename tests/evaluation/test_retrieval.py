"""Scores of retrieval, compared with scikit-learn's and with ranks counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score

from strop.evaluation.metrics import mean_interval, wilson_interval
from strop.evaluation.retrieval import Retrieval, _embed_baseline, score_retrieval, summarize_scores
from tests.support import triplets


def unit(number: int, size: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(number, size))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def task_of(matches: np.ndarray, excluded: np.ndarray | None = None) -> Retrieval:
    anchors, candidates = matches.shape
    return Retrieval(
        np.arange(anchors), np.arange(candidates), matches, np.zeros_like(matches) if excluded is None else excluded
    )


@pytest.mark.parametrize("several", [False, True])
def test_scores_equal_those_of_scikit_learn(several: bool) -> None:
    anchors, candidates = unit(300, 12, 0), unit(40, 12, 1)
    random = np.random.default_rng(2)
    matches = np.zeros((300, 40), np.bool_)
    matches[np.arange(300), random.integers(0, 40, 300)] = True
    if several:
        matches |= random.random(matches.shape) < 0.1
    scores = score_retrieval(task_of(matches), (anchors, candidates))
    products = anchors @ candidates.T
    assert scores["ndcg_at_10"].mean() == pytest.approx(ndcg_score(matches, products, k=10))
    order = np.argsort(-products, axis=1)
    found = np.take_along_axis(matches, order, axis=1)
    assert scores["mrr"] == pytest.approx(1 / (1 + found.argmax(1)))
    assert scores["recall_at_10"] == pytest.approx(found[:, :10].sum(1) / matches.sum(1))
    assert scores["accuracy_at_1"].tolist() == found[:, 0].astype(float).tolist()
    if not several:
        assert scores["mrr"].mean() == pytest.approx(label_ranking_average_precision_score(matches, products))
        for name, k in (("accuracy_at_1", 1), ("recall_at_10", 10)):
            expected = top_k_accuracy_score(matches.argmax(1), products, k=k, labels=range(40))
            assert scores[name].mean() == pytest.approx(expected)
    summary = summarize_scores(scores)
    hits = int(scores["accuracy_at_1"].sum())
    assert summary["accuracy_at_1_interval"] == list(wilson_interval(hits, 300))
    assert summary["mrr_interval"] == pytest.approx(mean_interval(scores["mrr"].tolist()))


def test_ties_count_against_the_model_and_an_anchor_is_not_its_own_candidate() -> None:
    same = np.ones((1, 1))
    one = score_retrieval(task_of(np.array([[False, True, False]])), (same, np.repeat(same, 3, 0)))
    assert one["mrr"].tolist() == [1 / 3] and one["accuracy_at_1"].tolist() == [0]
    excluded = np.array([[True, False, True]])
    two = score_retrieval(task_of(np.array([[False, True, False]]), excluded), (same, np.repeat(same, 3, 0)))
    assert two["mrr"].tolist() == [1.0]


def test_task_has_each_text_once_and_all_matches_of_an_anchor() -> None:
    a, b, c, d = (example for row in triplets.triplets(2, negatives=0) for example in row.examples)
    task = Retrieval.from_rows([[a, b, c], [a, d], [c, b]])
    assert task.anchors.tolist() == [0, 5] and task.candidates.tolist() == [1, 2, 4]  # b, c, d
    assert task.matches.tolist() == [[True, False, True], [True, False, False]]
    assert task.excluded.tolist() == [[False, False, False], [False, True, False]]  # c
    values = np.array(list("abcadcb"))
    assert [part.tolist() for part in task.select(values)] == [["a", "c"], ["b", "c", "d"]]


def test_baseline_is_the_cosine_of_tf_idf() -> None:
    anchors, candidates = ["the red car", "a blue boat"], ["a car that is red", "boats", "the blue boat", "x"]
    ours = [vectors.toarray() for vectors in _embed_baseline(anchors, candidates)]
    theirs = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit(candidates)
    assert ours[0] @ ours[1].T == pytest.approx((theirs.transform(anchors) @ theirs.transform(candidates).T).toarray())
    scores = score_retrieval(task_of(np.eye(4, dtype=bool)[[0, 2]]), tuple(_embed_baseline(anchors, candidates)))
    assert scores["accuracy_at_1"].tolist() == [1, 1]
