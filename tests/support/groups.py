"""Jobs with a policy objective on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from strop.data.types import Example, Prompt
from strop.evaluation.rewards import Form, Reward
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


def even_share(gold: str, answer: str) -> float:
    """Return a reward in which completions of a random model differ."""
    return sum(ord(sign) % 2 == 0 for sign in answer) / max(1, len(answer))


def prompts(number: int, seed: int = 0) -> list[Prompt]:
    random, result = np.random.default_rng(seed), []
    for row in range(number):
        ids = random.integers(5, 300, int(random.integers(30, 40))).astype(np.int32)
        result.append(Prompt((Example(ids, np.zeros(len(ids), np.float32), "random", row + 1),), gold="yo", row=row))
    return result


def make_reward(function: Callable[[Any, Any], Any], weight: float = 1.0, form: Form = "golds") -> Reward:
    return Reward("own.py:own", weight, "own", form, function=function)


def make_job(
    folder: Path,
    train: Sequence[Prompt],
    function: Callable[[str, str], Any] = even_share,
    held_out: Sequence[Prompt] | None = None,
    *,
    plain: bool = False,
    **options: Any,
) -> Job:
    """Make a job like `preferences.make_job`, with start weights."""
    settings = {**OPTIONS, **options}
    job = preferences.make_job(
        folder, [], **{**settings, "train.objective": "sft", "train.rewards": None} | _NONE, plain=plain
    )
    recipe = preferences.with_default_options(tiny.recipe(**settings)).recipe
    of = (recipe.train, recipe.seed, job.model, tokenizer("chatml"), (2, 3), [make_reward(function)])
    criterion = PolicyCriterion(GRPO, *of, job.state.weights, job.log)
    eval_rows = list(held_out) if held_out is not None else None
    job = replace(job, recipe=recipe, train=list(train), eval=eval_rows, criterion=criterion)
    return with_reference(job, preferences.KEY)


_NONE = {f"train.{name}": None for name in GRPO.options}


def write_prompts(path: Path, number: int, answered: bool = True) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for n in range(number):
            row = {"prompt": f"what is {n} times {n}"} | ({"completion": f"it is {n * n}"} if answered else {})
            file.write(json.dumps(row) + "\n")
    return path


def write_reward(path: Path, body: str = "return len(set(answer)) / max(1, len(answer))") -> str:
    path.write_text(f"def own(gold, answer):\n    {body}\n", encoding="utf-8")
    return f"{path}:own"
