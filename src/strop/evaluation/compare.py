"""Base and tuned on the same rows: loss over supervised tokens and greedy answers, from one loaded model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, zip_longest
from typing import Any

import numpy as np
import torch

from strop.data.batching import group_by_length
from strop.data.rendering.render import Renderer
from strop.data.types import Conversation, Example, Ids
from strop.distributed.devices import ALONE, Devices
from strop.engine.decode.generate import Completion
from strop.engine.decode.model import Model
from strop.engine.decode.sampling import ExpectedCompletion
from strop.engine.step import step_for
from strop.errors import Where
from strop.evaluation.assign import answers as sequences_per_row
from strop.evaluation.loss import summed_loss
from strop.evaluation.metrics import metric as metric_named
from strop.evaluation.metrics import options, paired_difference, score, wilson

LOG = logging.getLogger(__name__)

FIGURES = ("loss", "perplexity", "stop_rate", "tokens_per_answer", "tokens_per_s")  # besides a metric's own
Advance = Callable[[str, int, int], None]
"""Called as (what, done, total) while rows are answered."""


@dataclass(frozen=True)
class Question:
    """A conversation up to its last assistant turn, and that turn."""

    prompt: str  # the last user text, for people
    gold: str
    conversation: Conversation


def questions(conversations: Sequence[Conversation], renderer: Renderer | None = None) -> list[Question]:
    """One question a conversation, but for those that left_out names: they have no answer to compare with.

    renderer: of the model that is asked; only where no right answer has calls it may be left out (see calling).
    """
    found = []
    for conversation in conversations:
        gold = conversation.answer if renderer is None else renderer.reference_answer(conversation)
        if gold is not None and conversation.messages[-1].weight:
            asked = [message.content for message in conversation.messages[:-1] if message.role == "user"]
            found.append(Question(asked[-1] if asked else "", gold, conversation))
    return found


def left_out(conversations: Sequence[Conversation]) -> list[Where]:
    """The rows that nothing is asked of, and why: neither score nor loss counts them."""
    found = []
    for row in conversations:
        if row.answer is None:
            found.append(Where(row.file, row.line, "does not end with an answer"))
        elif not row.messages[-1].weight:
            found.append(Where(row.file, row.line, "its answer has weight 0"))
    return found


def calling(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Those whose right answers have calls, which each chat template writes in its own way."""
    return [found for found in conversations if found.answer is not None and found.messages[-1].tool_calls]


@dataclass(frozen=True)
class Side:
    """What a model made of the rows, with its adapter or without: scores by name; hits and answers by row."""

    scores: dict[str, float]
    hits: list[bool]
    texts: list[str]


def compare(
    model: Model,
    conversations: Sequence[Conversation],
    *,
    metric: str = "exact",
    max_new_tokens: int = 80,
    advance: Advance | None = None,
    base: Side | None = None,
    devices: Devices = ALONE,
) -> dict[str, Any]:
    """Scores of base and tuned with 95 % intervals, and each row's answers.

    base: what the same base said to the same rows before, so that it need not be asked again.
    Returns {rows, left_out, metric, base, tuned, intervals, difference, changed, samples}; `tuned`, `difference` and
    `changed` (the rows that only one of them gets right) are absent where the model has no adapter. left_out: {file,
    line, what} of each row that has no answer to compare with. Each of base and tuned:
    {<metric's scores>, loss, perplexity, stop_rate, tokens_per_answer, tokens_per_s}; nothing is written where the
    metric is `choice`, and so the last three are absent then. Ctrl-C leaves the rows that are answered, and
    `interrupted` says so. Both are asked in one batch: its
    tokens_per_s.
    """
    asked = questions(conversations, model.renderer)
    rows = len(asked)
    names = [name for name in ("base", "tuned") if (model.adapter or name == "base") and not (name == "base" and base)]
    writes = names and metric != "choice"
    written = _write_all(model, asked, names, max_new_tokens, advance, devices) if writes else {}
    if written and len(written[names[0]][0]) < rows:  # Ctrl-C: what is there is told
        asked = asked[: len(written[names[0]][0])]
        base = base and Side(base.scores, base.hits[: len(asked)], base.texts[: len(asked)])

    def ask(side: str) -> Side:
        LOG.info("computing the loss of %s", side)
        loss = _loss(model, asked, written[side][0] if written else [], devices)
        if metric == "choice":
            texts, more = _choose_all(model, asked, side, advance, devices), {}
        else:
            answers, rate = written[side]
            texts, more = [answer.text for answer in answers], {
                "stop_rate": sum(answer.stopped for answer in answers) / len(asked),
                "tokens_per_answer": sum(answer.tokens for answer in answers) / len(asked),
                "tokens_per_s": rate,
            }  # fmt: skip
        found = score(metric, [question.gold for question in asked], as_judged(model.renderer, asked, texts))
        return Side(
            {**found.rates, "loss": loss, "perplexity": math.exp(min(loss, 700.0)), **more}, [*found.hits], texts
        )

    sides = {}
    with model.base() if model.adapter else nullcontext():
        sides["base"] = base or ask("base")
    if model.adapter:
        sides["tuned"] = ask("tuned")
    without = [asdict(place) for place in left_out(conversations)]
    result: dict[str, Any] = {"rows": len(asked), "left_out": without, "metric": metric_named(metric).name}
    if len(asked) < rows:
        result["interrupted"] = f"after {len(asked)} of {rows} rows"
    result |= {name: side.scores for name, side in sides.items()}
    result["intervals"] = {name: list(wilson(sum(side.hits), len(asked))) for name, side in sides.items()}
    if model.adapter:
        before, after = sides["base"].hits, sides["tuned"].hits
        places = [f"{question.conversation.file}:{question.conversation.line}" for question in asked]
        result["difference"] = asdict(paired_difference(before, after))
        result["changed"] = {
            "gained": [place for place, was, now in zip(places, before, after, strict=True) if now and not was],
            "lost": [place for place, was, now in zip(places, before, after, strict=True) if was and not now],
        }
    result["samples"] = [
        {
            "place": f"{question.conversation.file}:{question.conversation.line}",
            "prompt": question.prompt,
            "gold": question.gold,
        }
        | {name: side.texts[row] for name, side in sides.items()}
        | {f"{name}_hit": side.hits[row] for name, side in sides.items()}
        for row, question in enumerate(asked)
    ]
    return result


def as_judged(renderer: Renderer, asked: Sequence[Question], texts: Sequence[str]) -> list[str]:
    """What of each answer is compared with the right one: it begins behind its reasoning where that has some."""
    rights = [question.conversation.messages[-1] for question in asked]
    return [renderer.without_reasoning(text, right) for right, text in zip(rights, texts, strict=True)]


def side_of(result: dict[str, Any], name: str) -> Side:
    """base or tuned out of what `compare` returned."""
    samples = result["samples"]
    return Side(result[name], [row[f"{name}_hit"] for row in samples], [row[name] for row in samples])


def _loss(model: Model, asked: Sequence[Question], answers: Sequence[Completion], devices: Devices = ALONE) -> float:
    """The mean loss of what is asked. Where an answer came with the right one's log-probabilities, these are taken;
    the others go through the training step. answers: one to each question, or none."""
    total = weight = 0.0
    others = []
    for question, answer in zip_longest(asked, answers):
        examples = model.renderer.render(question.conversation)
        logprobs = None if answer is None else answer.logprobs
        if logprobs is None:
            others += examples
            continue
        [example] = examples
        end = _last(example) + 1
        weights = example.weights[end - len(logprobs) : end].astype(np.float64)
        total -= float(weights @ logprobs)
        weight += float(weights.sum())
    if others:
        token_loss = step_for(model.module).token_loss
        cut = partial(group_by_length, tokens=2048)
        more = summed_loss(token_loss, others, lambda some: cut([len(example) for example in some]), devices=devices)
        total, weight = total + more[0], weight + more[1]
    assert weight > 0
    return total / weight


def _last(example: Example) -> int:
    """The place of the last supervised token."""
    return int(np.flatnonzero(example.weights)[-1])


def _expected(prompt: Ids, examples: Sequence[Example]) -> ExpectedCompletion | None:
    """What is supervised behind a prompt, and in it, where the row is one example that begins with the prompt."""
    n = len(prompt)
    if len(examples) != 1 or not examples[0].supervised:
        return None
    [example] = examples
    end = _last(example) + 1
    if end <= n or not np.array_equal(example.ids[:n], prompt):
        return None
    return ExpectedCompletion(example.ids[n:end], min(example.prompt_length, n) - 1)


def _write_all(
    model: Model,
    asked: Sequence[Question],
    sides: Sequence[str],
    max_new_tokens: int,
    advance: Advance | None,
    devices: Devices,
) -> dict[str, tuple[list[Completion], float]]:
    """The answers of base, tuned or both, in one batch, and its tokens/s."""
    prompts, started = [_prompt(model, question.conversation) for question in asked], time.perf_counter()
    right = [
        _expected(prompt, model.renderer.render(question.conversation))
        for prompt, question in zip(prompts, asked, strict=True)
    ]
    with model.base() if sides == ["base"] and model.adapter else nullcontext():
        answers = sequences_per_row(
            model, prompts, devices, max_new_tokens=max_new_tokens, both=len(sides) > 1, partial=True, expected=right,
            advance=advance and (lambda done: advance(" and ".join(sides), done, len(sides) * len(asked))),
        )  # fmt: skip
    rate = sum(answer.tokens for answer in answers) / (time.perf_counter() - started)
    each = len(answers) // len(sides)
    if not each:
        raise KeyboardInterrupt
    return {side: (answers[place * each :][:each], rate) for place, side in enumerate(sides)}


def _prompt(model: Model, conversation: Conversation) -> Ids:
    """The row up to its last turn, with the template's options for a row that thinks, or for one that does not."""
    options = model.renderer.options_for(conversation.messages)
    return model.renderer.prompt(conversation.messages[:-1], conversation.tools, options=options)


def _choose_all(
    model: Model, asked: Sequence[Question], side: str, advance: Advance | None, devices: Devices
) -> list[str]:
    """The likeliest answer to each question among the right answers to all of them, the stop token included."""
    token_loss = step_for(model.module).token_loss
    among, done = options([question.gold for question in asked]), count(devices.world_size, devices.world_size)

    def choose(question: Question) -> str:
        *before, last = question.conversation.messages
        turns = [replace(last, content=one, reasoning=None) for one in among]  # reasoning would give it away
        said = [replace(question.conversation, messages=(*before, turn)) for turn in turns]
        with torch.no_grad():
            losses = [float(token_loss(model.renderer.render(conversation))) for conversation in said]
        if advance is not None:
            advance(side, min(next(done), len(asked)), len(asked))
        return among[losses.index(min(losses))]

    return devices.map(asked, choose, lambda question: 1.0)
