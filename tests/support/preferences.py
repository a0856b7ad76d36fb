"""Jobs with a preference objective on the tiny model; random pairs and labelled answers, and files of them."""

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
from strop.training.criteria import make_criterion
from strop.training.reference import with_reference
from strop.training.state import Job
from tests.support import tiny
from tests.support.families import tokenizer

KEY = {"base": "tiny"}


def answer(ids: Any, prompt: int, line: int = 1) -> Example:
    return Example(np.asarray(ids, np.int32), (np.arange(len(ids)) >= prompt).astype(np.float32), "random", line)


def pairs(number: int, seed: int = 0, prompt: int = 10, alike: bool = False) -> list[ExampleGroup]:
    """Return pairs of answers of various lengths to random prompts. alike: two pairs for each prompt."""
    random, most = np.random.default_rng(seed), len(tokenizer("chatml"))
    result: list[ExampleGroup] = []
    prompt_ids = random.integers(5, most, prompt)
    for line in range(1, number + 1):
        if not alike or line % 2:
            prompt_ids = random.integers(5, most, int(random.integers(prompt, prompt + 6)))
        sides = [np.r_[prompt_ids, random.integers(5, most, int(random.integers(2, 9)))] for _ in range(2)]
        result.append(ExampleGroup((answer(sides[0], len(prompt_ids), line), answer(sides[1], len(prompt_ids), line))))
    return result


def labelled(number: int, seed: int = 0) -> list[ExampleGroup]:
    """Return labelled answers, two of three good, each with the next row's answer to its prompt."""
    built = [unit.examples[0] for unit in pairs(number, seed)]
    result = []
    for n, own in enumerate(built):
        other = built[(n + 1) % number]
        kl_examples = answer(
            np.r_[own.ids[: own.prompt_length], other.ids[other.prompt_length :]], own.prompt_length, n + 1
        )
        result.append(ExampleGroup((own,), (kl_examples,), n % 3 != 0))
    return result


def units_for(objective: str, number: int, seed: int = 0) -> list[ExampleGroup]:
    return labelled(number, seed) if objective == "kto" else pairs(number, seed)


def with_default_options(resolved: Resolved) -> Resolved:
    """Set the objective's default options, as planning does."""
    return resolved.decide(
        Choice(field, value, "plan", why) for field, value, why in default_options(resolved.recipe.train)
    )


def make_job(
    folder: Path,
    train: Sequence[ExampleGroup],
    held_out: Sequence[ExampleGroup] | None = None,
    *,
    plain: bool = False,
    **options: Any,
) -> Job:
    """Make a job like `tiny.job`, with the fast step unless `plain`."""
    job = tiny.job(folder, [], None, **options)  # of a reward model with its head
    recipe = with_default_options(tiny.recipe(**options)).recipe
    step = job.step if plain else step_for(job.model)
    eval_rows = list(held_out) if held_out is not None else None
    return replace(
        job,
        recipe=recipe,
        step=step,
        train=list(train),
        eval=eval_rows,
        criterion=make_criterion(recipe.train, job.model),
    )


def add_reference(job: Job) -> Job:
    return with_reference(job, KEY)


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


def write_labelled(path: Path, number: int) -> Path:
    """Write good answers first, then bad ones, as many files are sorted."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(number):
            good = n < number // 2
            text = f"it is {n * n}" if good else f"no {n}"
            file.write(json.dumps({"prompt": f"what is {n} times {n}", "completion": text, "label": good}) + "\n")
    return path
