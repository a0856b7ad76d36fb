"""What a step makes smaller: the cross entropy of supervised tokens, or an objective of answers.

The loop asks for a divisor, a loss sum and figures, and branches on none of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from strop.config.schema import TrainSection
from strop.data.types import Example, Item, Unit
from strop.distributed.devices import ALONE, Devices
from strop.engine.step import Step
from strop.evaluation.loss import mean_loss
from strop.evaluation.metrics import Z_95, wilson
from strop.models.lora import find_score_head
from strop.objectives.base_loss import Answers, Judged, Objective, Outcome
from strop.objectives.table import objective_of

R = TypeVar("R")
Figures = dict[str, Tensor]  # by name: a value of each unit that has one
Cut = Callable[[Sequence[Item]], list[list[int]]]  # micro-batches out of items, as indices
BLOCK = 64  # units that are cut into micro-batches together where nothing is trained


class Criterion(Protocol):
    tells: ClassVar[bool]  # figures besides the loss

    @property
    def updates(self) -> int:
        """Optimizer steps on one effective batch."""

    def begin(self, step: Step, items: Sequence[Item], index: int, cut: Cut) -> list[Item]:
        """What the step `index` (from 0) trains on, of the rows of its effective batch."""

    def longest(self, item: Item) -> Item:
        """What a row becomes there, at its longest."""

    def divisor(self, items: Sequence[Item]) -> float:
        """What the loss sum of these rows of an effective batch is divided by."""

    def level(self, step: Step, items: Sequence[Item], cut: Cut) -> float:
        """What the loss of each micro-batch needs to know of all of them."""

    def loss(self, step: Step, items: Sequence[Item], level: float) -> tuple[Tensor, Figures]:
        """The loss sum of a micro-batch, differentiable, and figures for people."""

    def evaluate(self, step: Step, items: Sequence[Item], cut: Cut) -> dict[str, Any]:
        """Of rows that are held out: {loss, ...}."""


class AsTheyAre:
    """Rows are trained on as they are."""

    @property
    def updates(self) -> int:
        return 1

    def begin(self, step: Step, items: Sequence[Item], index: int, cut: Cut) -> list[Item]:
        return list(items)

    def longest(self, item: Item) -> Item:
        return item


@dataclass(frozen=True)
class SupervisedTokens(AsTheyAre):
    """Supervised fine-tuning: cross entropy, divided by the weight of the supervised tokens."""

    devices: Devices = ALONE
    tells: ClassVar[bool] = False

    def divisor(self, items: Sequence[Item]) -> float:
        return sum(float(example.weights.sum()) for example in _examples(items))

    def level(self, step: Step, items: Sequence[Item], cut: Cut) -> float:
        return 0.0

    def loss(self, step: Step, items: Sequence[Item], level: float) -> tuple[Tensor, Figures]:
        return step.token_loss(_examples(items)), {}

    def evaluate(self, step: Step, items: Sequence[Item], cut: Cut) -> dict[str, Any]:
        return {"loss": mean_loss(step.token_loss, _examples(items), cut, devices=self.devices)}


@dataclass(frozen=True)
class OfAnswers(AsTheyAre):
    """An objective of answers, divided by the number of units: a pair counts as one, however long it is."""

    objective: Objective
    options: TrainSection
    head: nn.Module | None = None  # of a reward model
    devices: Devices = ALONE
    tells: ClassVar[bool] = True

    def divisor(self, items: Sequence[Item]) -> float:
        return float(len(items))

    def level(self, step: Step, items: Sequence[Item], cut: Cut) -> float:
        """The mean change of answers to other prompts, never below 0 (KTO); 0 where the objective has no use for it."""
        if not self.objective.level:
            return 0.0

        def change(rows: Sequence[int]) -> list[float]:
            chosen = [unit for unit in _units([items[row] for row in rows]) if unit.beside]
            if not chosen:
                return []
            sums = beside(step, chosen)
            found: list[float] = (sums - _reference(chosen, 1, sums)).tolist()
            return found

        with torch.no_grad():
            changes = [one for many in self._each(items, cut, change) for one in many]
        return max(0.0, float(torch.tensor(changes, dtype=torch.float64).mean())) if changes else 0.0

    def _each(self, items: Sequence[Item], cut: Cut, compute: Callable[[Sequence[int]], R]) -> list[R]:
        """`compute` of the rows of each micro-batch, dealt out to the devices."""
        return self.devices.each(list(blocks(items, cut)), compute, lambda rows: sum(len(items[row]) for row in rows))

    def loss(self, step: Step, items: Sequence[Item], level: float) -> tuple[Tensor, Figures]:
        units = _units(items)
        answers = [
            Answers(sums, _counts(units, side, sums), _reference(units, side, sums))
            for side, sums in enumerate(self.sums(step, units))
        ]
        desirable = torch.tensor([unit.desirable for unit in units], device=answers[0].sums.device)
        outcome = self.objective.loss(Judged(tuple(answers), desirable, level), self.options)
        return outcome.losses.sum(), self._figures(answers, desirable, outcome, level)

    def sums(self, step: Step, units: Sequence[Unit]) -> list[Tensor]:
        """What the objective learns of each answer: its log-probability, or its score; (N,) for each side."""
        if not self.objective.scored:
            return log_probs(step, units)
        assert self.head is not None, "a reward model has a head"
        hidden = step.last_hidden([example for unit in units for example in unit.examples])
        scores: Tensor = self.head(hidden.float())
        return list(scores.double().view(len(units), -1).unbind(1))

    def _figures(self, answers: Sequence[Answers], desirable: Tensor, outcome: Outcome, level: float) -> Figures:
        with torch.no_grad():
            rewards = [reward.detach() for reward in outcome.rewards]
            nats = [] if self.objective.scored else [answer.mean.detach() for answer in answers]
            moved = [(answer.change / answer.counts).detach() for answer in answers] if self.objective.reference else []
            if len(answers) == 2:
                found: Figures = {"accuracy": (rewards[0] > rewards[1]).double(), "margin": rewards[0] - rewards[1]}
                sides = {"chosen": 0, "rejected": 1}
                picked = {name: torch.ones_like(desirable) for name in sides}
            else:
                found = {"accuracy": ((answers[0].change.detach() > level) == desirable).double()}
                found["kl"] = torch.full_like(rewards[0], level)
                sides = {"desirable": 0, "undesirable": 0}
                picked = {"desirable": desirable, "undesirable": ~desirable}
            for name, side in sides.items():
                found[f"{name}_reward"] = rewards[side][picked[name]]
                if nats:
                    found[f"{name}_nats"] = nats[side][picked[name]]
                if moved:
                    found[f"{name}_change"] = moved[side][picked[name]]
        return found

    def evaluate(self, step: Step, items: Sequence[Item], cut: Cut) -> dict[str, Any]:
        """{loss, accuracy, accuracy_interval, margin and margin_interval (of pairs), the other figures' means};
        a loss that is NaN, alone, where something is not finite."""
        level = self.level(step, items, cut)

        def look(rows: Sequence[int]) -> tuple[float, dict[str, list[float]]]:
            loss, figures = self.loss(step, [items[row] for row in rows], level)
            return float(loss), {name: values.tolist() for name, values in figures.items()}

        with torch.no_grad():
            parts = self._each(items, cut, look)
        values = {name: [x for _, part in parts for x in part[name]] for name in parts[0][1]}
        total = 0.0
        for loss, _ in parts:
            total += loss
        if not all(math.isfinite(x) for x in (total, *(x for many in values.values() for x in many))):
            return {"loss": math.nan}  # no mean and no interval of it says anything
        found: dict[str, Any] = {"loss": total / len(items)}
        found |= {name: statistics.fmean(many) for name, many in values.items() if many}
        hits = values["accuracy"]
        found["accuracy_interval"] = list(wilson(round(sum(hits)), len(hits)))
        if len(values.get("margin", ())) > 1:
            reach = Z_95 * statistics.stdev(values["margin"]) / math.sqrt(len(hits))
            found["margin_interval"] = [found["margin"] - reach, found["margin"] + reach]
        return found


def criterion_for(train: TrainSection, model: nn.Module | None = None, devices: Devices = ALONE) -> Criterion:
    """What a recipe's objective has made smaller. model: with adapters, and the head of a reward model."""
    objective = objective_of(train)
    assert objective is None or objective.learning != "prompts", "see groups.OfGroups"
    if objective is None:
        return SupervisedTokens(devices)
    head = find_score_head(model) if objective.scored and model is not None else None
    return OfAnswers(objective, train, head, devices)


def blocks(items: Sequence[Item], cut: Cut) -> Iterator[list[int]]:
    """The rows by micro-batch, so many cut together that any number has the same cuts."""
    for begin in range(0, len(items), BLOCK):
        block = _units(items[begin : begin + BLOCK])
        yield from ([begin + row for row in group] for group in cut(block))


def log_probs(step: Step, units: Sequence[Unit]) -> list[Tensor]:
    """Of the answers that are trained on, side by side: (N,) for each, fp64, differentiable."""
    found = step.log_probs([example for unit in units for example in unit.examples])
    return list(found.view(len(units), -1).unbind(1))


def beside(step: Step, units: Sequence[Unit]) -> Tensor:
    """Of the answers to other prompts, (N,); each unit has one."""
    return step.log_probs([example for unit in units for example in unit.beside])


def _counts(units: Sequence[Unit], side: int, like: Tensor) -> Tensor:
    return like.new_tensor([float(unit.examples[side].weights.sum()) for unit in units])


def _reference(units: Sequence[Unit], place: int, like: Tensor) -> Tensor:
    return like.new_tensor([unit.reference[place] if unit.reference else 0.0 for unit in units])


def _examples(items: Sequence[Item]) -> Sequence[Example]:
    return cast("Sequence[Example]", items)


def _units(items: Sequence[Item]) -> list[Unit]:
    return list(cast("Sequence[Unit]", items))
