"""Sample completions: greedy completions of a few evaluation prompts, which are logged at each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import nn

from strop.config.schema import SAMPLE_TOKENS, Recipe
from strop.data.prepare import Prepared
from strop.data.row_errors import RenderError
from strop.data.types import Ids
from strop.engine.decode.batch import drop_decoder
from strop.engine.decode.generate import generate
from strop.evaluation.compare import Question, make_questions, render_prompt


@dataclass(frozen=True)
class SamplePrompts:
    """The prompts, at least one, and their reference answers."""

    questions: Sequence[Question]
    ids: Sequence[Ids]
    tokenizer: Any
    stop_ids: Sequence[int]

    def complete(self, model: nn.Module, advance: Callable[[float], None] | None = None) -> list[dict[str, Any]]:
        """Return prompt, reference, completion and `cut` of each prompt. The decoder is freed afterwards."""
        try:
            completions = generate(
                model, self.tokenizer, self.ids, stop_ids=self.stop_ids, max_new_tokens=SAMPLE_TOKENS, advance=advance
            )
        finally:
            drop_decoder(model)
        return [
            {
                "prompt": question.prompt,
                "reference": question.gold,
                "completion": completion.text,
                "cut": not completion.stopped,
            }
            for question, completion in zip(self.questions, completions, strict=True)
        ]


def select_samples(recipe: Recipe, data: Prepared, tokenizer: Any) -> SamplePrompts | None:
    """Return the first `train.samples` evaluation rows that end with an answer, or None if there are none.

    Rows whose prompt is longer than data.max_length are left out.
    """
    if recipe.train.objective != "sft" or not recipe.train.samples:
        return None
    selected = list(islice(_iter_questions(data, recipe.data.max_length), recipe.train.samples))
    if not selected:
        return None
    questions, ids = zip(*selected, strict=True)
    return SamplePrompts(questions, ids, tokenizer, data.renderer.end_ids)


def _iter_questions(data: Prepared, max_length: int) -> Iterator[tuple[Question, Ids]]:
    conversations, renderer = data.eval_conversations, data.renderer
    if conversations is None:
        return
    for row in np.flatnonzero(conversations.has_answer).tolist():
        try:
            for question in make_questions([conversations[row]], renderer):
                ids = render_prompt(renderer, question.conversation)
                if len(ids) <= max_length:
                    yield question, ids
        except RenderError:  # the data report has it
            continue
