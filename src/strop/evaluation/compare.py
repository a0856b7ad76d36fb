"""Base and tuned on the same rows: loss over supervised tokens and greedy answers, from one loaded model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from strop.adapters import Model
from strop.data.conversation import Conversation
from strop.data.pack import group_by_length
from strop.engine.choose import step_for
from strop.evaluation.loss import mean_loss
from strop.evaluation.metrics import paired_difference, score, wilson
from strop.model.generate import Answer

Advance = Callable[[str, int, int], None]
"""Called as (what, done, total) while rows are answered."""


@dataclass(frozen=True)
class Question:
    """A conversation up to its last assistant turn, and that turn."""

    prompt: str  # the last user text, for people
    gold: str
    conversation: Conversation


def questions(conversations: Sequence[Conversation]) -> list[Question]:
    """One question a conversation that ends with an assistant turn; others have no answer to compare with."""
    found = []
    for conversation in conversations:
        if conversation.messages and conversation.messages[-1].role == "assistant":
            asked = [message.content for message in conversation.messages[:-1] if message.role == "user"]
            found.append(Question(asked[-1] if asked else "", conversation.messages[-1].content, conversation))
    return found


def compare(
    model: Model,
    conversations: Sequence[Conversation],
    *,
    metric: str = "exact",
    max_new_tokens: int = 80,
    batch_size: int = 32,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Scores of base and tuned with 95 % intervals, and each row's answers.

    Returns {rows, metric, base, tuned, intervals, difference, changed, samples}; `tuned`, `difference` and `changed`
    (the rows that only one of them gets right) are absent where the model has no adapter. Each of base and tuned:
    {<metric's scores>, loss, perplexity, stop_rate, tokens_per_answer, tokens_per_s}.
    """
    asked = questions(conversations)
    golds = [question.gold for question in asked]
    sides: dict[str, AbstractContextManager[None]] = {"base": model.base() if model.adapter else nullcontext()}
    if model.adapter:
        sides["tuned"] = nullcontext()
    result: dict[str, Any] = {"rows": len(asked), "metric": metric, "intervals": {}}
    hits: dict[str, list[bool]] = {}
    answers: dict[str, list[Answer]] = {}
    for side, switched in sides.items():
        with switched:
            loss = _loss(model, conversations)
            started = time.perf_counter()
            answers[side] = _answer_all(model, asked, side, max_new_tokens, batch_size, advance)
            took = time.perf_counter() - started
        tokens = sum(answer.tokens for answer in answers[side])
        scores = score(metric, golds, [answer.text for answer in answers[side]])
        hits[side], result["metric"] = list(scores.hits), scores.metric
        result[side] = {
            **scores.rates,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "stop_rate": sum(answer.stopped for answer in answers[side]) / len(asked),
            "tokens_per_answer": tokens / len(asked),
            "tokens_per_s": tokens / took,
        }
        result["intervals"][side] = list(wilson(sum(hits[side]), len(asked)))
    if model.adapter:

        def pair(row: int) -> tuple[bool, bool]:
            return hits["base"][row], hits["tuned"][row]

        result["difference"] = asdict(paired_difference(hits["base"], hits["tuned"]))
        result["changed"] = {
            name: [f"{q.conversation.file}:{q.conversation.line}" for row, q in enumerate(asked) if pair(row) == wanted]
            for name, wanted in (("gained", (False, True)), ("lost", (True, False)))
        }
    result["samples"] = [
        {"prompt": question.prompt, "gold": question.gold}
        | {side: answers[side][row].text for side in sides}
        | {f"{side}_hit": hits[side][row] for side in sides}
        for row, question in enumerate(asked)
    ]
    return result


def _loss(model: Model, conversations: Sequence[Conversation]) -> float:
    examples = [example for conversation in conversations for example in model.renderer.render(conversation)]
    token_loss = step_for(model.module).token_loss
    return mean_loss(token_loss, examples, lambda some: group_by_length([len(e) for e in some], tokens=2048))


def _answer_all(
    model: Model, asked: Sequence[Question], side: str, max_new_tokens: int, batch_size: int, advance: Advance | None
) -> list[Answer]:
    order = sorted(range(len(asked)), key=lambda row: len(asked[row].gold))  # answers of like length end together
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        prompts = [
            model.renderer.prompt(asked[row].conversation.messages[:-1], asked[row].conversation.tools) for row in rows
        ]
        answers.update(zip(rows, model.answer(prompts, max_new_tokens=max_new_tokens), strict=True))
        if advance is not None:
            advance(side, len(answers), len(asked))
    return [answers[row] for row in range(len(asked))]
