"""Training losses: cross entropy of supervised tokens, and preference objectives (policy objectives: rollouts.py).

The loop uses a Criterion only, and does not branch on the objective.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from strop.config.schema import TrainSection
from strop.data.types import Example, ExampleGroup, Item
from strop.distributed.devices import ALONE, Devices
from strop.engine.step import Step
from strop.evaluation.compare import mean_loss
from strop.evaluation.metrics import Z_95, wilson
from strop.models.lora import find_score_head
from strop.objectives.preferences import AnswerLogprobs, PreferenceBatch, PreferenceLoss, PreferenceResult
from strop.objectives.table import objective_of

R = TypeVar("R")
Figures = dict[str, Tensor]  # by name: one value per row that has it
Split = Callable[[Sequence[Item]], list[list[int]]]  # rows to micro-batches, as indices
BLOCK = 64  # rows that are split into micro-batches together outside of training steps


class Criterion(ABC):
    """The objective that the loop minimizes. By default it trains on the rows as they were read.

    has_figures: whether `loss` returns figures besides the loss.
    """

    has_figures: ClassVar[bool] = True

    @property
    def updates(self) -> int:
        """Optimizer steps on one effective batch."""
        return 1

    def prepare(self, step: Step, items: Sequence[Item], index: int, split: Split) -> list[Item]:
        """Return what step `index` (from 0) trains on, from the rows of its effective batch."""
        return list(items)

    def longest(self, item: Item) -> Item:
        """Return the longest that `prepare` can make of a row."""
        return item

    def statistic(self, step: Step, items: Sequence[Item], split: Split) -> float:
        """Return a value of the whole effective batch that the loss of each micro-batch needs."""
        return 0.0

    @abstractmethod
    def divisor(self, items: Sequence[Item]) -> float:
        """Return what the loss sum of an effective batch is divided by."""

    @abstractmethod
    def loss(self, step: Step, items: Sequence[Item], statistic: float) -> tuple[Tensor, Figures]:
        """Return the loss sum of a micro-batch, differentiable, and figures for the log."""

    @abstractmethod
    def evaluate(self, step: Step, items: Sequence[Item], split: Split) -> dict[str, Any]:
        """Return {loss, ...} of held-out rows."""


@dataclass(frozen=True)
class SupervisedCriterion(Criterion):
    """Supervised fine-tuning: cross entropy, divided by the total weight of the supervised tokens."""

    devices: Devices = ALONE
    has_figures: ClassVar[bool] = False

    def divisor(self, items: Sequence[Item]) -> float:
        return sum(float(example.weights.sum()) for example in _as_examples(items))

    def loss(self, step: Step, items: Sequence[Item], statistic: float) -> tuple[Tensor, Figures]:
        return step.token_loss(_as_examples(items)), {}

    def evaluate(self, step: Step, items: Sequence[Item], split: Split) -> dict[str, Any]:
        return {"loss": mean_loss(step.token_loss, _as_examples(items), split, devices=self.devices)}


@dataclass(frozen=True)
class PreferenceCriterion(Criterion):
    """A preference objective, divided by the number of rows, whatever their length.

    head: of a reward model.
    """

    objective: PreferenceLoss
    options: TrainSection
    head: nn.Module | None = None
    devices: Devices = ALONE

    def divisor(self, items: Sequence[Item]) -> float:
        return float(len(items))

    def statistic(self, step: Step, items: Sequence[Item], split: Split) -> float:
        """Return KTO's divergence: the mean log-ratio of answers to other prompts, at least 0; else 0."""
        if not self.objective.needs_divergence:
            return 0.0

        def log_ratios(rows: Sequence[int]) -> list[float]:
            units = [unit for unit in _as_units([items[row] for row in rows]) if unit.kl_examples]
            if not units:
                return []
            sums = mismatched_logprobs(step, units)
            ratios: list[float] = (sums - _reference(units, 1, sums)).tolist()
            return ratios

        with torch.no_grad():
            changes = [change for group in self._map(items, split, log_ratios) for change in group]
        return max(0.0, float(torch.tensor(changes, dtype=torch.float64).mean())) if changes else 0.0

    def _map(self, items: Sequence[Item], split: Split, compute: Callable[[Sequence[int]], R]) -> list[R]:
        """Return `compute` of the rows of each micro-batch, distributed over the devices."""
        groups = list(micro_batches_of(items, split))
        return self.devices.map(groups, compute, lambda rows: sum(len(items[row]) for row in rows))

    def loss(self, step: Step, items: Sequence[Item], statistic: float) -> tuple[Tensor, Figures]:
        units = _as_units(items)
        return self.loss_of_sums(self.sums(step, units), units, statistic)

    def loss_of_sums(
        self, sums: Sequence[Tensor], units: Sequence[ExampleGroup], statistic: float
    ) -> tuple[Tensor, Figures]:
        """Compute the loss from sums of log-probabilities (or scores): (N,) for each side."""
        answers = [
            AnswerLogprobs(values, _token_counts(units, side, values), _reference(units, side, values))
            for side, values in enumerate(sums)
        ]
        desirable = torch.tensor([unit.desirable for unit in units], device=answers[0].sums.device)
        result = self.objective.compute(PreferenceBatch(tuple(answers), desirable, statistic), self.options)
        return result.losses.sum(), self._figures(answers, desirable, result, statistic)

    def sums(self, step: Step, units: Sequence[ExampleGroup]) -> list[Tensor]:
        """Return the log-probability, or the reward model's score, of each answer: (N,) fp64 for each side."""
        if not self.objective.scored:
            return answer_logprobs(step, units)
        assert self.head is not None, "a reward model has a head"
        hidden = step.last_hidden([example for unit in units for example in unit.examples])
        scores: Tensor = self.head(hidden.float())
        return list(scores.double().view(len(units), -1).unbind(1))

    def _figures(
        self, answers: Sequence[AnswerLogprobs], desirable: Tensor, result: PreferenceResult, divergence: float
    ) -> Figures:
        with torch.no_grad():
            rewards = [reward.detach() for reward in result.rewards]
            nats = [] if self.objective.scored else [answer.mean.detach() for answer in answers]
            changes = [answer.log_ratio_per_token.detach() for answer in answers] if self.objective.reference else []
            if len(answers) == 2:
                figures: Figures = {"accuracy": (rewards[0] > rewards[1]).double(), "margin": rewards[0] - rewards[1]}
                sides = {"chosen": 0, "rejected": 1}
                masks = {name: torch.ones_like(desirable) for name in sides}
            else:
                figures = {"accuracy": ((answers[0].log_ratio.detach() > divergence) == desirable).double()}
                figures["kl"] = torch.full_like(rewards[0], divergence)
                sides = {"desirable": 0, "undesirable": 0}
                masks = {"desirable": desirable, "undesirable": ~desirable}
            for name, side in sides.items():
                figures[f"{name}_reward"] = rewards[side][masks[name]]
                if nats:
                    figures[f"{name}_nats"] = nats[side][masks[name]]
                if changes:
                    figures[f"{name}_change"] = changes[side][masks[name]]
        return figures

    def evaluate(self, step: Step, items: Sequence[Item], split: Split) -> dict[str, Any]:
        """Return {loss, accuracy, accuracy_interval, (pairs:) margin, margin_interval, means of the other figures}.

        If a value is not finite, the result is {loss: NaN}.
        """
        statistic = self.statistic(step, items, split)

        def loss_and_figures(rows: Sequence[int]) -> tuple[float, dict[str, list[float]]]:
            loss, figures = self.loss(step, [items[row] for row in rows], statistic)
            return float(loss), {name: values.tolist() for name, values in figures.items()}

        with torch.no_grad():
            parts = self._map(items, split, loss_and_figures)
        values = {name: [x for _, part in parts for x in part[name]] for name in parts[0][1]}
        total = 0.0
        for loss, _ in parts:
            total += loss
        if not all(math.isfinite(x) for x in (total, *(x for column in values.values() for x in column))):
            return {"loss": math.nan}
        result: dict[str, Any] = {"loss": total / len(items)}
        result |= {name: statistics.fmean(column) for name, column in values.items() if column}
        hits = values["accuracy"]
        result["accuracy_interval"] = list(wilson(round(sum(hits)), len(hits)))
        if len(values.get("margin", ())) > 1:
            result["margin_interval"] = mean_interval(values["margin"])
        return result


def criterion_for(train: TrainSection, model: nn.Module | None = None, devices: Devices = ALONE) -> Criterion:
    """Return the Criterion of supervised fine-tuning or a preference objective.

    model: with adapters and, for a reward model, its head.
    """
    objective = objective_of(train)
    if objective is None:
        return SupervisedCriterion(devices)
    assert isinstance(objective, PreferenceLoss), "policy objectives: see rollouts.PolicyCriterion"
    head = find_score_head(model) if objective.scored and model is not None else None
    return PreferenceCriterion(objective, train, head, devices)


def is_scored(criterion: Criterion) -> bool:
    """Return whether the criterion trains the score of a reward model."""
    return isinstance(criterion, PreferenceCriterion) and criterion.objective.scored


def mean_interval(values: Sequence[float]) -> list[float]:
    """Return the 95 % confidence interval of the mean of two or more values."""
    mean, half_width = statistics.fmean(values), Z_95 * statistics.stdev(values) / math.sqrt(len(values))
    return [mean - half_width, mean + half_width]


def micro_batches_of(items: Sequence[Item], split: Split) -> Iterator[list[int]]:
    """Yield the rows of each micro-batch. Blocks of fixed size give the same micro-batches on any number of devices."""
    for begin in range(0, len(items), BLOCK):
        block = _as_units(items[begin : begin + BLOCK])
        yield from ([begin + row for row in group] for group in split(block))


def answer_logprobs(step: Step, units: Sequence[ExampleGroup]) -> list[Tensor]:
    """Return the log-probabilities of the trained answers: (N,) fp64 for each side, differentiable."""
    sums = step.log_probs([example for unit in units for example in unit.examples])
    return list(sums.view(len(units), -1).unbind(1))


def mismatched_logprobs(step: Step, units: Sequence[ExampleGroup]) -> Tensor:
    """Return the log-probabilities of each unit's answer to another prompt, (N,); each unit has one."""
    return step.log_probs([example for unit in units for example in unit.kl_examples])


def _token_counts(units: Sequence[ExampleGroup], side: int, like: Tensor) -> Tensor:
    return like.new_tensor([float(unit.examples[side].weights.sum()) for unit in units])


def _reference(units: Sequence[ExampleGroup], column: int, like: Tensor) -> Tensor:
    return like.new_tensor([unit.reference_logprobs[column] if unit.reference_logprobs else 0.0 for unit in units])


def _as_examples(items: Sequence[Item]) -> Sequence[Example]:
    return cast("Sequence[Example]", items)


def _as_units(items: Sequence[Item]) -> list[ExampleGroup]:
    return list(cast("Sequence[ExampleGroup]", items))
