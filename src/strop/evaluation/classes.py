"""Score a classifier: accuracy, F1, calibration, precision and recall of each class, and a TF-IDF baseline."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from strop.data.rendering.render import render_labelled
from strop.data.row_errors import RenderError
from strop.data.types import Classes, Conversation, Example, Mask
from strop.distributed.devices import SINGLE_PROCESS, Devices
from strop.engine.decode.classify import Compute
from strop.engine.decode.model import Model
from strop.errors import DataError, Location
from strop.evaluation.compare import Progress, check_positions
from strop.evaluation.metrics import paired_difference, wilson_interval

ACCURACY = "accuracy"
CALIBRATION_BINS = 15  # as in arXiv:1706.04599
BASELINE = "TF-IDF and logistic regression"
BASELINE_PACKAGE = "pip install scikit-learn"

Probabilities = npt.NDArray[np.float64]  # (N, C)


def compare_classes(
    model: Model,
    conversations: Sequence[Conversation],
    train_rows: Sequence[Conversation] | None = None,
    advance: Progress | None = None,
    devices: Devices = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Score a classifier on texts with labels, next to a TF-IDF baseline trained on `train_rows`.

    `tuned` and `baseline` of the result have `accuracy` (with several labels: all of a text's labels are right),
    `macro_f1`, `micro_f1` (with several labels), `loss` and `calibration_error`. `classes` has precision and recall of
    each class, and `confusion` the number of texts by label (row) and predicted label (column), of single labels.
    """
    classes = model.classes
    assert classes is not None
    check_labels(conversations, classes)
    targets = _make_targets(conversations, classes)
    probabilities = classify(model, conversations, advance, devices)
    sides = {"tuned": probabilities}
    notes = []
    if train_rows is None:
        notes.append(f"no baseline ({BASELINE}): the run's training rows are not known")
    elif not has_baseline():
        notes.append(f"no baseline ({BASELINE}): {BASELINE_PACKAGE}")
    else:
        sides = {
            "baseline": devices.run_on_main(lambda: _predict_baseline(train_rows, conversations, classes)),
            **sides,
        }
    predictions = {side: predict(values, classes.several) for side, values in sides.items()}
    hits = {side: (predicted == targets).all(1).tolist() for side, predicted in predictions.items()}
    result: dict[str, Any] = {"rows": len(conversations), "metric": ACCURACY}
    result |= {side: score_classes(values, targets, classes.several) for side, values in sides.items()}
    result["intervals"] = {side: list(wilson_interval(sum(values), len(values))) for side, values in hits.items()}
    if "baseline" in sides:
        result["baseline_name"] = BASELINE
        result["baseline_difference"] = asdict(paired_difference(hits["baseline"], hits["tuned"]))
    result["classes"] = list(_list_classes(predictions["tuned"], targets, classes.names))
    result["several_labels"] = classes.several
    if not classes.several:
        result["confusion"] = (targets.T.astype(np.int64) @ predictions["tuned"].astype(np.int64)).tolist()
    result["notes"] = notes
    result["samples"] = [
        {"place": row.place, "prompt": text_of(row), "gold": _join(targets[i], classes)}
        | {side: _join(predicted[i], classes) for side, predicted in predictions.items() if side == "tuned"}
        | {"tuned_hit": hits["tuned"][i]}
        for i, row in enumerate(conversations)
    ]
    return result


def check_labels(conversations: Sequence[Conversation], classes: Classes) -> None:
    """Raise DataError for rows whose label is not a class."""
    errors = [(row, classes.find_error(row.label) if row.label is not None else "no label") for row in conversations]
    where = [Location(row.file, row.line, what) for row, what in errors if what]
    if where:
        raise DataError(
            f"{len(where)} rows have a label that the run does not know",
            fix="correct or remove these rows",
            where=where,
        )


def classify(
    model: Model, conversations: Sequence[Conversation], advance: Progress | None = None,
    devices: Devices = SINGLE_PROCESS,
) -> Probabilities:  # fmt: skip
    """Return the probability of each class of each text, (N, C). Raises DataError for texts that cannot be encoded."""
    examples, invalid = list[Example](), list[Location]()
    for conversation, rendered in render_labelled(model.renderer, conversations):
        if isinstance(rendered, RenderError):
            invalid.append(Location(conversation.file, conversation.line, rendered.what))
        else:
            examples += rendered
    if invalid:
        raise DataError(f"{len(invalid)} texts cannot be classified", fix="correct or remove these rows", where=invalid)
    check_positions(model, examples)
    done = 0

    def run(
        batches: list[list[int]], compute: Compute, weight: Callable[[list[int]], float]
    ) -> list[list[list[float]]]:
        def compute_and_report(batch: list[int]) -> list[list[float]]:
            nonlocal done
            values = compute(batch)
            done += len(batch) * devices.world_size
            if advance is not None:
                advance("tuned", min(done, len(examples)), len(examples))
            return values

        return devices.map(batches, compute_and_report, weight)

    return model.classifier.probabilities(examples, run)


def predict(probabilities: Probabilities, several: bool) -> Mask:
    """Return the predicted classes (N, C): those above 1/2, or the most probable one."""
    if several:
        return probabilities > 0.5
    predicted = np.zeros(probabilities.shape, np.bool_)
    predicted[np.arange(len(predicted)), probabilities.argmax(1)] = True
    return predicted


def score_classes(probabilities: Probabilities, targets: Mask, several: bool) -> dict[str, float]:
    """Return the scores of a classifier. targets: (N, C), the right classes.

    macro_f1: mean over the classes that occur in labels or predictions. loss: in nats per text, without class weights.
    """
    predicted = predict(probabilities, several)
    right, counts = predicted & targets, predicted.sum(0) + targets.sum(0)
    occurring = counts > 0
    chosen = np.where(targets, probabilities, 1 - probabilities) if several else probabilities[targets][:, None]
    confidences = np.maximum(probabilities, 1 - probabilities) if several else probabilities.max(1, keepdims=True)
    confident_hits = predicted == targets if several else right.any(1, keepdims=True)
    return {
        ACCURACY: float((predicted == targets).all(1).mean()),
        "macro_f1": float((2 * right.sum(0)[occurring] / counts[occurring]).mean()) if occurring.any() else 1.0,
        **({"micro_f1": float(2 * right.sum() / counts.sum()) if occurring.any() else 1.0} if several else {}),
        "loss": float(-np.log(np.maximum(chosen, np.finfo(np.float64).tiny)).mean()),
        "calibration_error": calibration_error(confidences.ravel(), confident_hits.ravel()),
    }


def calibration_error(confidences: npt.NDArray[np.float64], hits: Mask) -> float:
    """Return the expected calibration error: the mean gap of confidence and accuracy over bins, weighted by rows.

    Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, equations 2 to 5. Bin m of M has the
    confidences in ((m - 1) / M, m / M]. With several labels, each pair of a text and a class counts.
    """
    bins = np.clip(np.ceil(confidences * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=confidences - hits, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def _list_classes(predicted: Mask, targets: Mask, names: Sequence[str]) -> Any:
    """Yield rows, precision and recall with Wilson intervals, and F1 of each class; None where nothing is counted."""
    for i, name in enumerate(names):
        right, guesses, rows = (int(x.sum()) for x in (predicted[:, i] & targets[:, i], predicted[:, i], targets[:, i]))
        scores: dict[str, Any] = {"label": name, "rows": rows, "predicted": guesses}
        for score, number in (("precision", guesses), ("recall", rows)):
            scores[score] = right / number if number else None
            scores[f"{score}_interval"] = list(wilson_interval(right, number)) if number else None
        yield {**scores, "f1": 2 * right / (guesses + rows) if guesses + rows else None}


def _make_targets(conversations: Sequence[Conversation], classes: Classes) -> Mask:
    targets = np.zeros((len(conversations), len(classes.names)), np.bool_)
    for row, conversation in enumerate(conversations):
        assert conversation.label is not None
        targets[row, list(classes.indices(conversation.label))] = True
    return targets


def _join(row: Mask, classes: Classes) -> str:
    return ", ".join(classes.names[i] for i in row.nonzero()[0])


def text_of(conversation: Conversation) -> str:
    """Return a text, or the contents of messages in one text."""
    return conversation.text or "\n".join(message.text for message in conversation.messages)


def has_baseline() -> bool:
    return importlib.util.find_spec("sklearn") is not None


def _predict_baseline(
    train_rows: Sequence[Conversation], rows: Sequence[Conversation], classes: Classes
) -> Probabilities:
    """Return the probabilities of logistic regression on TF-IDF of words, (N, C)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    has_words = any(re.search(r"\w", text_of(row)) for row in train_rows)
    vectorizer = TfidfVectorizer(token_pattern=r"\w+" if has_words else r"\S+")
    features = vectorizer.fit_transform([text_of(row) for row in train_rows])
    others, targets = vectorizer.transform([text_of(row) for row in rows]), _make_targets(train_rows, classes)
    probabilities = np.zeros((len(rows), len(classes.names)))
    columns = range(targets.shape[1]) if classes.several else [None]
    for column in columns:
        wanted = targets.argmax(1) if column is None else targets[:, column]
        known = np.unique(wanted)
        regression = LogisticRegression(C=10, max_iter=1000)
        values = regression.fit(features, wanted).predict_proba(others) if len(known) > 1 else np.ones((len(rows), 1))
        if column is None:
            probabilities[:, known] = values
        else:
            probabilities[:, column] = values[:, -1] * known[-1]
    return probabilities
