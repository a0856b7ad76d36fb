"""Scores of classifiers, compared with values computed by hand and with scikit-learn where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from strop.data.types import Classes, Conversation
from strop.evaluation import classes as evaluation
from strop.evaluation.classes import calibration_error, predict, score_classes
from strop.objectives.classification import class_weights

CLASSES = Classes(("a", "b", "c"))


def test_scores_of_four_texts_by_hand() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    targets = np.eye(3, dtype=bool)[[0, 0, 1, 2]]  # the second text is wrong
    scores = score_classes(probabilities, targets, several=False)
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert scores["loss"] == pytest.approx(-sum(map(math.log, (0.7, 0.4, 0.8, 0.6))) / 4)
    assert scores["calibration_error"] == pytest.approx((0.3 + 0.5 + 0.2 + 0.4) / 4)  # each in a bin of its own


def test_scores_of_several_labels_by_hand() -> None:
    probabilities = np.array([[0.9, 0.6, 0.2], [0.3, 0.1, 0.4]])
    targets = np.array([[True, False, False], [False, False, True]])
    scores = score_classes(probabilities, targets, several=True)
    assert scores["accuracy"] == 0 and scores["micro_f1"] == pytest.approx(2 * 1 / (2 + 2))
    assert scores["macro_f1"] == pytest.approx((1 + 0 + 0) / 3)
    assert scores["loss"] == pytest.approx(-sum(map(math.log, (0.9, 0.4, 0.8, 0.7, 0.9, 0.4))) / 6)


def test_nothing_predicted_where_no_text_has_a_label_is_right() -> None:
    scores = score_classes(np.full((3, 2), 0.1), np.zeros((3, 2), bool), several=True)
    assert scores["accuracy"] == scores["macro_f1"] == scores["micro_f1"] == 1


def test_calibration_error_sums_gaps_within_a_bin() -> None:
    confidences = np.array([0.95, 0.95, 0.95, 0.95, 1 / 15])
    assert calibration_error(confidences, np.array([1, 1, 1, 0, 0], bool)) == pytest.approx((0.8 + 1 / 15) / 5)
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0


def test_class_weights_are_those_of_scikit_learn() -> None:
    counts = {"a": 90, "b": 10, "c": 0}
    assert class_weights("balanced", counts) == [pytest.approx(100 / 270), pytest.approx(100 / 30), 1.0]
    assert class_weights("none", counts) == class_weights(None, counts) == [1, 1, 1]
    assert class_weights({"b": 4.0}, counts) == [1, 4, 1]


def rows(labels: list[str | tuple[str, ...]]) -> list[Conversation]:
    words = {"a": "apple tart", "b": "brown bread", "c": "cold cream"}
    texts = [" ".join(words[name] for name in ([label] if isinstance(label, str) else label)) for label in labels]
    return [Conversation("d", n, (), text=text or "nothing", label=label) for n, (text, label) in
            enumerate(zip(texts, labels, strict=True), 1)]  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "labels"),
    [(CLASSES, ["a", "b", "a", "b"]), (Classes(CLASSES.names, several=True), [("a",), ("a", "b"), (), ("b",)])],
)
def test_baseline_has_a_probability_for_every_class(classes: Classes, labels: list[str | tuple[str, ...]]) -> None:
    """Class c has no training rows, as with train.labels."""
    pytest.importorskip("sklearn", reason="the baseline needs scikit-learn: pip install scikit-learn")
    probabilities = evaluation._predict_baseline(rows(labels), rows(labels), classes)
    assert probabilities.shape == (4, 3) and not probabilities[:, 2].any()
    if not classes.several:
        assert probabilities.sum(1) == pytest.approx(1)
    right = evaluation._make_targets(rows(labels), classes)
    assert (predict(probabilities, classes.several) == right).all()


def test_scores_equal_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="compares with scikit-learn")
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(5), 200)
    labels = random.integers(0, 4, 200)  # one class has no rows
    scores = score_classes(probabilities, np.eye(5, dtype=bool)[labels], several=False)
    assert scores["macro_f1"] == pytest.approx(metrics.f1_score(labels, probabilities.argmax(1), average="macro"))
    assert scores["loss"] == pytest.approx(metrics.log_loss(labels, probabilities, labels=range(5)))
