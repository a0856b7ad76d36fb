"""Training losses: supervised fine-tuning, preference objectives and classification (rollouts.py has GRPO).

A row of a preference objective is an ExampleGroup. Its sides are the trained answers, such as chosen and rejected.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from strop.config.schema import TrainSection
from strop.data.batching import in_row_order
from strop.data.store import LabelledTexts
from strop.data.types import Example, ExampleGroup, Item, LabelledText
from strop.distributed.devices import SINGLE_PROCESS, Devices
from strop.engine.decode.classify import to_probabilities
from strop.engine.step import Step, compute_scores
from strop.engine.train.buffers import copy_like
from strop.evaluation.classes import ACCURACY, score_classes
from strop.evaluation.compare import mean_loss
from strop.evaluation.metrics import mean_interval, wilson_interval
from strop.models.lora import find_score_head
from strop.objectives.classification import class_losses, class_weights
from strop.objectives.preferences import AnswerLogprobs, PreferenceBatch, PreferenceLoss, PreferenceResult
from strop.objectives.table import objective_of

R = TypeVar("R")
Metrics = dict[str, Tensor]  # a value of each metric per row that has it
Split = Callable[[Sequence[Item]], list[list[int]]]  # splits rows into micro-batches of indices
EVALUATING = "evaluating"  # in the status line
KEPT = "kept"  # metric: divergence of the rows of train.keep from the model before training, in nats per token
BLOCK = 64  # number of rows that are split into micro-batches together, outside of training steps


class Criterion(ABC):
    """The objective that training minimizes."""

    @property
    def has_metrics(self) -> bool:
        """True if `loss` returns metrics."""
        return True

    @property
    def updates(self) -> int:
        """Optimizer steps on one effective batch."""
        return 1

    @property
    def prepares(self) -> bool:
        """True if `prepare` computes something."""
        return False

    def prepare(self, step: Step, items: Sequence[Item], index: int, split: Split) -> list[Item]:
        """Return the items that step `index` (from 0) trains on, by default its rows."""
        return list(items)

    def longest(self, item: Item) -> Item:
        """Return the longest item that `prepare` can return for a row."""
        return item

    def batch_statistic(self, step: Step, items: Sequence[Item], split: Split) -> float:
        """Return a statistic of the whole effective batch that the loss of each micro-batch needs."""
        return 0.0

    def separate(self, items: Sequence[Item], loss: float, metrics: Mapping[str, float]) -> tuple[float | None, float]:
        """Return the mean loss of the recipe's rows, if there are any, and the divergence of kept tokens, in nats."""
        kept = kept_rows(items)
        total, weight = metrics[KEPT] * len(kept), self.divisor(kept)
        own = self.divisor(items) - weight
        mean = (loss * (own + weight) - total) / own if len(kept) < len(items) else None
        return mean, total / sum(float(example.weights.sum()) for example in kept)

    @abstractmethod
    def divisor(self, items: Sequence[Item]) -> float:
        """Return the divisor of the loss sum of an effective batch."""

    @abstractmethod
    def loss(self, step: Step, items: Sequence[Item], statistic: float) -> tuple[Tensor, Metrics]:
        """Return the differentiable loss sum of a micro-batch, and metrics for the log."""

    @abstractmethod
    def evaluate(self, step: Step, items: Sequence[Item], split: Split) -> dict[str, Any]:
        """Return the loss and other metrics of held-out rows."""


@dataclass(frozen=True)
class SupervisedCriterion(Criterion):
    """Cross entropy of supervised tokens, divided by their total weight. keeps: there are rows of train.keep."""

    devices: Devices = SINGLE_PROCESS
    keeps: bool = False

    @property
    def has_metrics(self) -> bool:
        return self.keeps

    def divisor(self, items: Sequence[Item]) -> float:
        return sum(float(example.weights.sum()) for example in _as_examples(items))

    def loss(self, step: Step, items: Sequence[Item], statistic: float) -> tuple[Tensor, Metrics]:
        total = step.token_loss(_as_examples(items))
        number = len(kept_rows(items)) if self.keeps else 0  # soft labels may be those of a teacher
        return total, {KEPT: (step.soft_loss / number).expand(number)} if number else {}

    def evaluate(self, step: Step, items: Sequence[Item], split: Split) -> dict[str, Any]:
        return {"loss": mean_loss(step.token_loss, _as_examples(items), split, self.devices, EVALUATING)}


@dataclass(frozen=True)
class PreferenceCriterion(Criterion):
    """A preference objective, and the divergence of rows of train.keep, divided by the number of rows."""

    objective: PreferenceLoss
    options: TrainSection
    head: nn.Module | None = None  # the score head of a reward model
    devices: Devices = SINGLE_PROCESS

    def divisor(self, items: Sequence[Item]) -> float:
        return float(len(items))

    def batch_statistic(self, step: Step, items: Sequence[Item], split: Split) -> float:
        """Return KTO's KL estimate, max(0, mean log-ratio of mismatched answers), or 0 for other objectives."""
        if not self.objective.needs_divergence:
            return 0.0

        def log_ratios(rows: Sequence[int]) -> list[float]:
            groups = [group for group in _as_groups(own_rows([items[row] for row in rows])) if group.kl_examples]
            if not groups:
                return []
            sums = mismatched_logprobs(step, groups)
            (reference,) = copy_like([_references(groups, 1)], sums)
            ratios: list[float] = (sums - reference).tolist()
            return ratios

        with torch.no_grad():
            all_ratios = [ratio for ratios in self._map(items, split, log_ratios) for ratio in ratios]
        return max(0.0, float(torch.tensor(all_ratios, dtype=torch.float64).mean())) if all_ratios else 0.0

    def _map(
        self, items: Sequence[Item], split: Split, compute: Callable[[Sequence[int]], R], activity: str = ""
    ) -> list[R]:
        batches = list(micro_batches_of(items, split))
        return self.devices.map(batches, compute, lambda rows: sum(len(items[row]) for row in rows), activity)

    def loss(self, step: Step, items: Sequence[Item], statistic: float) -> tuple[Tensor, Metrics]:
        if kept := kept_rows(items):
            assert len(kept) == len(items), "rows of train.keep have their own micro-batches"
            divergence = step.token_loss(kept)
            return divergence, {KEPT: (divergence.detach() / len(kept)).expand(len(kept))}
        groups = _as_groups(items)
        return self.loss_of_sums(self.sums(step, groups), groups, statistic)

    def loss_of_sums(
        self, sums: Sequence[Tensor], groups: Sequence[ExampleGroup], statistic: float
    ) -> tuple[Tensor, Metrics]:
        """Return the loss sum and metrics. sums: log-probabilities or scores of each side, shape (N,)."""
        sides, labels = range(len(sums)), np.array([group.desirable for group in groups])
        columns = [_token_counts(groups, side) for side in sides] + [_references(groups, side) for side in sides]
        on_device = copy_like([*columns, labels, *map(np.flatnonzero, (labels, ~labels))], sums[0])
        *copied, desirable, desirable_rows, other_rows = on_device
        counts, references = copied[: len(sums)], copied[len(sums) :]
        answers = [AnswerLogprobs(*side) for side in zip(sums, counts, references, strict=True)]
        result = self.objective.compute(PreferenceBatch(tuple(answers), desirable, statistic), self.options)
        rows = {"desirable": desirable_rows, "undesirable": other_rows}
        return result.losses.sum(), self._compute_metrics(answers, desirable, rows, result, statistic)

    def sums(self, step: Step, groups: Sequence[ExampleGroup]) -> list[Tensor]:
        """Return the log-probabilities, or the reward model's scores, of each side, shape (N,), fp64."""
        if not self.objective.scored:
            return answer_logprobs(step, groups)
        assert self.head is not None, "a reward model has a head"
        scores = compute_scores(step, self.head, [example for group in groups for example in group.examples])
        return list(scores.view(len(groups), -1).unbind(1))

    def _compute_metrics(
        self, answers: Sequence[AnswerLogprobs], desirable: Tensor, rows: Mapping[str, Tensor],
        result: PreferenceResult, divergence: float,
    ) -> Metrics:  # fmt: skip
        """rows: the indices of desirable and of undesirable answers."""
        with torch.no_grad():
            rewards = [reward.detach() for reward in result.rewards]
            mean_logprobs = [] if self.objective.scored else [answer.mean.detach() for answer in answers]
            changes = [answer.log_ratio_per_token.detach() for answer in answers] if self.objective.reference else []
            if len(answers) == 2:
                metrics: Metrics = {"accuracy": (rewards[0] > rewards[1]).double(), "margin": rewards[0] - rewards[1]}
                columns: dict[str, tuple[int, Any]] = {"chosen": (0, slice(None)), "rejected": (1, slice(None))}
            else:
                gains = (answers[0].log_ratio.detach() - divergence) * torch.where(desirable, 1.0, -1.0)
                metrics = {"accuracy": (gains > 0).double()}
                metrics["kl"] = torch.full_like(rewards[0], divergence)
                columns = {name: (0, indices) for name, indices in rows.items()}
            for name, (side, chosen) in columns.items():
                metrics[f"{name}_reward"] = rewards[side][chosen]
                if mean_logprobs:
                    metrics[f"{name}_nats"] = mean_logprobs[side][chosen]
                if changes:
                    metrics[f"{name}_change"] = changes[side][chosen]
        return metrics

    def evaluate(self, step: Step, items: Sequence[Item], split: Split) -> dict[str, Any]:
        """Return the loss and mean metrics with confidence intervals, or only a NaN loss if a value is not finite."""
        statistic = self.batch_statistic(step, items, split)

        def loss_and_metrics(rows: Sequence[int]) -> tuple[float, dict[str, list[float]]]:
            loss, metrics = self.loss(step, [items[row] for row in rows], statistic)
            return float(loss), {name: values.tolist() for name, values in metrics.items()}

        with torch.no_grad():
            parts = self._map(items, split, loss_and_metrics, EVALUATING)
        values = {name: [x for _, part in parts for x in part[name]] for name in parts[0][1]}
        total = 0.0
        for loss, _ in parts:
            total += loss
        if not all(math.isfinite(x) for x in (total, *(x for column in values.values() for x in column))):
            return {"loss": math.nan}
        result: dict[str, Any] = {"loss": total / len(items)}
        result |= {name: statistics.fmean(column) for name, column in values.items() if column}
        hits = values["accuracy"]
        result["accuracy_interval"] = list(wilson_interval(round(sum(hits)), len(hits)))
        if len(values.get("margin", ())) > 1:
            result["margin_interval"] = mean_interval(values["margin"])
        return result


@dataclass(frozen=True)
class ClassCriterion(Criterion):
    """Cross entropy of the classes of texts, divided by the total weight: see `class_losses`."""

    head: nn.Module
    weights: Sequence[float]  # of the classes
    several: bool  # whether a text may have several classes
    devices: Devices = SINGLE_PROCESS

    def divisor(self, items: Sequence[Item]) -> float:
        if self.several:
            return len(items) * sum(self.weights)
        return sum(self.weights[text.classes[0]] for text in _as_texts(items))

    def loss(self, step: Step, items: Sequence[Item], statistic: float) -> tuple[Tensor, Metrics]:
        scores = compute_scores(step, self.head, [text.examples[0] for text in _as_texts(items)])
        targets, weights = copy_like([self._targets(items), np.array(self.weights)], scores)
        losses, _ = class_losses(scores, targets, weights, self.several)
        return losses.sum(), {"accuracy": self._find_hits(scores.detach(), targets).double()}

    def _targets(self, items: Sequence[Item]) -> npt.NDArray[np.float64]:
        """Return 1 for the classes of each text, else 0, (N, classes)."""
        targets = np.zeros((len(items), len(self.weights)))
        for row, text in enumerate(_as_texts(items)):
            targets[row, list(text.classes)] = 1.0
        return targets

    def _find_hits(self, scores: Tensor, targets: Tensor) -> Tensor:
        return (
            ((scores > 0) == (targets > 0)).all(1)
            if self.several
            else targets.gather(1, scores.argmax(1, True))[:, 0] > 0
        )

    def evaluate(self, step: Step, items: Sequence[Item], split: Split) -> dict[str, Any]:
        """Return the loss without class weights, accuracy with its interval, and macro F1, or only a NaN loss."""
        batches = list(micro_batches_of(items, split))

        def score(rows: Sequence[int]) -> list[list[float]]:
            texts = _as_texts([items[row] for row in rows])
            values: list[list[float]] = compute_scores(step, self.head, [text.examples[0] for text in texts]).tolist()
            return values

        with torch.no_grad():
            parts = self.devices.map(batches, score, lambda rows: sum(len(items[row]) for row in rows), EVALUATING)
        scores = torch.tensor(in_row_order(batches, parts), dtype=torch.float64)
        if not scores.isfinite().all():
            return {"loss": math.nan}
        targets = self._targets(items)
        ones = torch.ones_like(scores[0])
        losses, weights = class_losses(scores, torch.from_numpy(targets), ones, self.several)
        probabilities = to_probabilities(scores, self.several).numpy()
        figures = score_classes(probabilities, targets > 0, self.several)
        interval = wilson_interval(round(figures[ACCURACY] * len(items)), len(items))
        return {
            "loss": float(losses.sum() / weights.sum()), ACCURACY: figures[ACCURACY],
            "accuracy_interval": list(interval), "macro_f1": figures["macro_f1"],
        }  # fmt: skip


def make_criterion(
    train: TrainSection, model: nn.Module | None = None, devices: Devices = SINGLE_PROCESS, texts: Any = None
) -> Criterion:
    """Return the criterion of an objective without rollouts.

    model: needed for a score head. texts: the training rows of a classifier (LabelledTexts).
    """
    objective = objective_of(train)
    if objective is None:
        return SupervisedCriterion(devices, train.keep_share > 0)
    head = find_score_head(model) if objective.scored and model is not None else None
    if isinstance(texts, LabelledTexts):
        assert head is not None
        return ClassCriterion(head, class_weights(train.class_weights, texts.counts), texts.classes.several, devices)
    assert isinstance(objective, PreferenceLoss), "policy objectives: see rollouts.PolicyCriterion"
    return PreferenceCriterion(objective, train, head, devices)


def is_scored(criterion: Criterion) -> bool:
    """Return whether the criterion trains a score head."""
    if isinstance(criterion, PreferenceCriterion):
        return criterion.objective.scored
    return isinstance(criterion, ClassCriterion)


def micro_batches_of(items: Sequence[Item], split: Split) -> Iterator[list[int]]:
    """Yield the rows of each micro-batch. They do not depend on the number of devices."""
    for begin in range(0, len(items), BLOCK):
        block = _as_groups(items[begin : begin + BLOCK])
        yield from ([begin + row for row in rows] for rows in split(block))


def answer_logprobs(step: Step, groups: Sequence[ExampleGroup]) -> list[Tensor]:
    """Return the differentiable log-probabilities of the answers of each side, shape (N,), fp64."""
    sums = step.log_probs([example for group in groups for example in group.examples])
    return list(sums.view(len(groups), -1).unbind(1))


def mismatched_logprobs(step: Step, groups: Sequence[ExampleGroup]) -> Tensor:
    """Return the log-probabilities of each group's answer to another prompt, shape (N,)."""
    return step.log_probs([example for group in groups for example in group.kl_examples])


def _token_counts(groups: Sequence[ExampleGroup], side: int) -> npt.NDArray[np.float64]:
    return np.array([float(group.examples[side].weights.sum()) for group in groups])


def _references(groups: Sequence[ExampleGroup], column: int) -> npt.NDArray[np.float64]:
    """Return the log-probabilities of the reference, or 0."""
    return np.array([group.reference_logprobs[column] if group.reference_logprobs else 0.0 for group in groups])


def kept_rows(items: Sequence[Item]) -> list[Example]:
    """Return the rows of train.keep."""
    return [item for item in items if isinstance(item, Example) and item.soft is not None]


def own_rows(items: Sequence[Item]) -> list[Item]:
    """Return the rows of the recipe."""
    return [item for item in items if not isinstance(item, Example) or item.soft is None]


def _as_examples(items: Sequence[Item]) -> Sequence[Example]:
    return cast("Sequence[Example]", items)


def _as_texts(items: Sequence[Item]) -> Sequence[LabelledText]:
    return cast("Sequence[LabelledText]", items)


def _as_groups(items: Sequence[Item]) -> list[ExampleGroup]:
    return list(cast("Sequence[ExampleGroup]", items))
