"""A job in an environment on the tiny model, whose turns are written by the test instead of sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from strop.data.rendering.render import Renderer
from strop.data.types import Example, Ids, Prompt
from strop.engine.decode.generate import SampledCompletion
from strop.evaluation.environments import load_environment
from strop.evaluation.traces import make_tracer
from strop.training.rollouts import PolicyCriterion
from strop.training.state import Job
from tests.support import groups
from tests.support.families import tokenizer

ENVIRONMENT = '''
class Desk:
    def reset(self, row, seed):
        self.calls, self.done, self.seed = [], False, seed

    def add(self, a: int, b: int) -> int:
        """Add.

        Args:
            a: first
            b: second
        """
        self.calls.append("add")
        return a + b

    def finish(self) -> str:
        """End the trace."""
        self.calls.append("finish")
        self.done = True
        return "bye"

    def fail(self) -> str:
        """Fail."""
        raise ValueError("no")

    def reward(self, completion, messages):
        return {"calls": len(self.calls), "length": len(completion) / 100}
'''
CALL = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'.format
Write = Callable[[str, int], str]  # text of the trace so far and the seed -> text of the next turn


def questions(number: int) -> list[Prompt]:
    """Return prompts whose ids are those without tools, as prepared data has them."""
    renderer, prompts = Renderer(tokenizer("chatml")), []
    for row in range(number):
        messages = ({"role": "user", "content": f"what is {row} and 1?"},)
        ids = renderer.tokenizer.encode(messages[0]["content"])
        example = Example(np.array(ids, np.int32), np.zeros(len(ids), np.float32), "rows.jsonl", row + 1)
        prompts.append(Prompt((example,), gold=str(row + 1), row=row, messages=messages))
    return prompts


STOP = int(tokenizer("chatml").convert_tokens_to_ids("<|im_end|>"))


def written_turns(write: Write, stop: int = STOP) -> Any:
    """Return a sampler whose completions are the texts of `write`; their log-probabilities are those of the model."""

    def sample(
        model: Any, prompts: Sequence[Ids], seeds: Sequence[Sequence[int]], stop_ids: Any, limit: int
    ) -> list[list[SampledCompletion]]:
        tokens, result = tokenizer("chatml"), []
        for prompt, group in zip(prompts, seeds, strict=True):
            completions = []
            for seed in group:
                text = write(tokens.decode(prompt), seed)
                ids = np.array([*tokens.encode(text, add_special_tokens=False), stop][:limit], np.int32)
                completions.append(SampledCompletion(ids, logprobs_of(model, prompt, ids), int(ids[-1]) == stop))
            result.append(completions)
        return result

    return sample


@torch.no_grad()
def logprobs_of(model: Any, prompt: Ids, ids: Ids) -> Any:
    """Return the log-probability of each of `ids` after `prompt`, by the model's own forward pass."""
    whole = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))[None]
    model.eval()
    logits = model(input_ids=whole).logits[0].double().log_softmax(-1)
    model.train()
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1)
    return logits[rows, whole[0, len(prompt) :]].numpy()


def make_desk_job(
    folder: Path, number: int = 2, write: Write | None = None, held_out: int = 0, **options: Any
) -> tuple[Job, PolicyCriterion]:
    """Return a job in the environment Desk. write: writes the turns; without it, strop's decoder samples them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "desk.py"
    file.write_text(ENVIRONMENT, encoding="utf-8")
    settings = {
        "train.environment": f"{file}:Desk", "train.rewards": None, "train.turns": 3, "train.answer_tokens": 80,
        "data.max_length": 900, "train.group": 2, "train.reward_timeout": 5.0, **options,
    }  # fmt: skip
    prompts = questions(number)
    job = groups.make_job(folder / "run", prompts, held_out=prompts[:held_out] or None, **settings)
    assert isinstance(job.criterion, PolicyCriterion)
    train = job.recipe.train
    environment = load_environment(str(train.environment), 5.0)
    tracer = make_tracer(train, job.recipe.data.max_length, Renderer(tokenizer("chatml")), {}, environment)
    sampler = None if write is None else written_turns(write)
    criterion = replace(job.criterion, rewards=[], tracer=tracer, sampler=sampler, stop_ids=(STOP,))
    return replace(job, criterion=criterion), criterion
