"""What an answer is worth to a policy: metrics of `strop eval`, or a function of one's own, each with a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from strop.errors import DataError, RecipeError, RunError, Where
from strop.evaluation.metrics import Metric, check_golds, metric
from strop.runs.lock import sha256_file, sha256_text

FAULTS = (Exception,)  # of a function that is the user's: whatever it raises is told, with the row


@dataclass(frozen=True)
class Reward:
    """One metric or function. A metric gives 1 for a hit and 0 for a miss, a function what it returns."""

    given: str  # as the recipe names it
    weight: float
    metric: Metric

    @property
    def name(self) -> str:
        return self.metric.name

    def __call__(self, gold: str | None, answer: str, place: tuple[str, int]) -> float:
        """Raises RunError, with the row, where a function of the user's fails or gives no number."""
        if self.metric.own is None:
            return float(self.metric.judge(gold or "", answer)[self.name])
        said = f"reward {self.given}: row {place[0]}:{place[1]}"
        try:
            found = float(self.metric.own(gold or "", answer))
        except FAULTS as fault:
            what = f"{said}: {type(fault).__name__}: {fault} (for the answer {answer[:80]!r})"
            raise RunError(what, fix="a reward function must give a number for any answer") from None
        if not math.isfinite(found):
            raise RunError(f"{said}: gives {found}", fix="give a finite number for any answer")
        return found


def rewards_of(given: str | Sequence[str] | None) -> list[Reward]:
    """The rewards that a recipe names: NAME or NAME=WEIGHT each, in a list or behind commas. Raises RecipeError."""
    found = []
    for text in given.split(",") if isinstance(given, str) else given or []:
        name, _, weight = text.strip().partition("=")
        try:
            number = float(weight or 1)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise RecipeError(f"--train.rewards {text}: no number behind =", fix="write it as exact_json=1")
        if name == "choice":
            raise RecipeError("--train.rewards choice: judges no answer that is written", fix="use exact")
        found.append(Reward(name, number, metric(name)))
    if len({reward.name for reward in found}) < len(found):
        raise RecipeError("--train.rewards: the same name twice", fix="give each once")
    return found


def files_hash(rewards: Sequence[Reward]) -> str | None:
    """SHA-256 of the files of one's own functions, which decide what is learned; None where there are none."""
    files = [reward.given.rsplit(":", 1)[0] for reward in rewards if reward.metric.own is not None]
    return sha256_text("".join(sha256_file(Path(file)) for file in files)) if files else None


def check_rewards(rewards: Sequence[Reward], golds: Sequence[str | None], places: Sequence[tuple[str, int]]) -> None:
    """Raises DataError with file:line of rows without the right answer that a metric needs, or with one that it cannot
    use; needs no model."""
    answered = [(gold, place) for gold, place in zip(golds, places, strict=True) if gold is not None]
    missing = [Where(*place, "no right answer") for gold, place in zip(golds, places, strict=True) if gold is None]
    for reward in rewards:
        if reward.metric.own is None and missing:
            fix = "give rows with right answers, or reward with a function of your own: file.py:function"
            raise DataError(f"{len(missing)} rows have no answer for reward {reward.name}", fix=fix, where=missing)
        check_golds(reward.given, [gold for gold, _ in answered], [place for _, place in answered], any_number=True)
