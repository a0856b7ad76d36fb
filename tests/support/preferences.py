"""Jobs that learn from comparisons, on the tiny model: random pairs and judged answers, and files of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from strop.config.load import Choice, Resolved
from strop.data.types import Example, ExampleGroup
from strop.engine.step import step_for
from strop.objectives.table import default_options
from strop.training.criteria import criterion_for
from strop.training.reference import with_reference
from strop.training.state import Job
from tests.support import tiny
from tests.support.families import tokenizer

KEY = {"base": "tiny"}


def answer(ids: Any, prompt: int, line: int = 1) -> Example:
    return Example(np.asarray(ids, np.int32), (np.arange(len(ids)) >= prompt).astype(np.float32), "random", line)


def pairs(number: int, seed: int = 0, prompt: int = 10, alike: bool = False) -> list[ExampleGroup]:
    """Two answers of ragged lengths to each of some random prompts; alike: two units a prompt."""
    random, most = np.random.default_rng(seed), len(tokenizer("chatml"))
    found: list[ExampleGroup] = []
    asked = random.integers(5, most, prompt)
    for line in range(1, number + 1):
        if not alike or line % 2:
            asked = random.integers(5, most, int(random.integers(prompt, prompt + 6)))
        sides = [np.r_[asked, random.integers(5, most, int(random.integers(2, 9)))] for _ in range(2)]
        found.append(ExampleGroup((answer(sides[0], len(asked), line), answer(sides[1], len(asked), line))))
    return found


def judged(number: int, seed: int = 0) -> list[ExampleGroup]:
    """One answer to each of some prompts, two of three good, and the next one's answer beside it."""
    made = [unit.examples[0] for unit in pairs(number, seed)]
    found = []
    for n, own in enumerate(made):
        other = made[(n + 1) % number]
        kl_examples = answer(
            np.r_[own.ids[: own.prompt_length], other.ids[other.prompt_length :]], own.prompt_length, n + 1
        )
        found.append(ExampleGroup((own,), (kl_examples,), n % 3 != 0))
    return found


def units_for(objective: str, number: int, seed: int = 0) -> list[ExampleGroup]:
    return judged(number, seed) if objective == "kto" else pairs(number, seed)


def filled(resolved: Resolved) -> Resolved:
    """With the objective's own options, as the plan fills them in."""
    return resolved.decide(
        Choice(field, value, "plan", why) for field, value, why in default_options(resolved.recipe.train)
    )


def job(
    folder: Path,
    train: Sequence[ExampleGroup],
    held_out: Sequence[ExampleGroup] | None = None,
    *,
    plain: bool = False,
    **options: Any,
) -> Job:
    """A job as `tiny.job` makes it, through the step that its model gets; with its reference."""
    made = tiny.job(folder, [], None, **options)  # of a reward model with its head
    recipe = filled(tiny.recipe(**options)).recipe
    step = made.step if plain else step_for(made.model)
    held = list(held_out) if held_out is not None else None
    return replace(
        made, recipe=recipe, step=step, train=list(train), eval=held, criterion=criterion_for(recipe.train, made.model)
    )


def started(made: Job) -> Job:
    return with_reference(made, KEY)


def write_pairs(path: Path, number: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for n in range(number):
            row = {
                "prompt": f"what is {n} times {n}",
                "chosen": f"it is {n * n}" + "!" * (n % 5),
                "rejected": f"no {n}",
            }
            file.write(json.dumps(row) + "\n")
    return path


def write_judged(path: Path, number: int) -> Path:
    """Good answers first, then bad ones: as many files are sorted."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(number):
            good = n < number // 2
            said = f"it is {n * n}" if good else f"no {n}"
            file.write(json.dumps({"prompt": f"what is {n} times {n}", "completion": said, "label": good}) + "\n")
    return path
