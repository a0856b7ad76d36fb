"""Jobs that learn from rewards for what a tiny model answers itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from strop.data.types import Example, Prompt
from strop.evaluation.metrics import Metric, Reward
from strop.objectives.policy import GRPO
from strop.training.reference import with_reference
from strop.training.rollouts import PolicyCriterion
from strop.training.state import Job
from tests.support import preferences, tiny
from tests.support.families import tokenizer

OPTIONS = {
    "train.objective": "grpo", "train.rewards": "given by the test", "train.group": 4, "train.answer_tokens": 6,
    "train.batch_size": 4, "train.micro_batch": 4, "train.learning_rate": 1e-2,
}  # fmt: skip


def even(gold: str, answer: str) -> float:
    """Something that a random model's answers differ in."""
    return sum(ord(sign) % 2 == 0 for sign in answer) / max(1, len(answer))


def prompts(number: int, seed: int = 0) -> list[Prompt]:
    random, found = np.random.default_rng(seed), []
    for row in range(number):
        ids = random.integers(5, 300, int(random.integers(30, 40))).astype(np.int32)
        found.append(Prompt((Example(ids, np.zeros(len(ids), np.float32), "random", row + 1),), gold="yo", row=row))
    return found


def rewarding(function: Callable[[str, str], Any], weight: float = 1.0) -> Reward:
    return Reward("own.py:own", weight, Metric("own", lambda gold, answer: {}, function))


def job(
    folder: Path,
    train: Sequence[Prompt],
    function: Callable[[str, str], Any] = even,
    held_out: Sequence[Prompt] | None = None,
    *,
    plain: bool = False,
    **options: Any,
) -> Job:
    """As `preferences.job`; with the weights that it starts from."""
    given = {**OPTIONS, **options}
    made = preferences.job(
        folder, [], **{**given, "train.objective": "sft", "train.rewards": None} | _NONE, plain=plain
    )
    recipe = preferences.filled(tiny.recipe(**given)).recipe
    of = (recipe.train, recipe.seed, made.model, tokenizer("chatml"), (2, 3), [rewarding(function)])
    criterion = PolicyCriterion(GRPO, *of, made.state.weights, made.log)
    held = list(held_out) if held_out is not None else None
    made = replace(made, recipe=recipe, train=list(train), eval=held, criterion=criterion)
    return with_reference(made, preferences.KEY)


_NONE = {
    f"train.{name}": None
    for name in ("group", "answer_tokens", "group_loss", "clip_low", "clip_high", "updates", "beta")
}


def write_prompts(path: Path, number: int, answered: bool = True) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for n in range(number):
            row = {"prompt": f"what is {n} times {n}"} | ({"completion": f"it is {n * n}"} if answered else {})
            file.write(json.dumps(row) + "\n")
    return path


def write_reward(path: Path, body: str = "return len(set(answer)) / max(1, len(answer))") -> str:
    path.write_text(f"def own(gold, answer):\n    {body}\n", encoding="utf-8")
    return f"{path}:own"
