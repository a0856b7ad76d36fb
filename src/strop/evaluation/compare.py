"""Compare base and tuned model on the same rows: loss over supervised tokens, and greedy answers."""

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
from torch import Tensor

from strop.data.batching import group_by_length
from strop.data.rendering.render import Renderer
from strop.data.types import Conversation, Example, Ids
from strop.distributed.assign import assign_balanced
from strop.distributed.devices import ALONE, Devices
from strop.engine.decode.generate import Completion
from strop.engine.decode.model import Model
from strop.engine.decode.sampling import ExpectedCompletion
from strop.engine.step import step_for
from strop.errors import Where
from strop.evaluation.metrics import changed_rows, options, paired_difference, score, wilson
from strop.evaluation.metrics import metric as metric_named

LOG = logging.getLogger(__name__)

LOSS_TOKENS = 2048  # per micro-batch
FIGURES = ("loss", "perplexity", "stop_rate", "tokens_per_answer", "tokens_per_s")  # scores besides the metric's
Advance = Callable[[str, int, int], None]  # progress callback (what, done, total)
# Examples of a micro-batch -> sum over supervised tokens of weight * cross entropy, fp32 scalar.
TokenLoss = Callable[[Sequence[Example]], Tensor]
Cut = Callable[[Sequence[Example]], list[list[int]]]  # examples -> micro-batches, as lists of indices


@dataclass(frozen=True)
class Question:
    """A conversation to answer."""

    prompt: str  # the last user text, for people
    gold: str  # the right answer
    conversation: Conversation  # the row, whose last turn is the right answer


def make_questions(conversations: Sequence[Conversation], renderer: Renderer | None = None) -> list[Question]:
    """Return a question for each conversation with a right answer. renderer: for right answers with tool calls."""
    questions = []
    for conversation in conversations:
        gold = conversation.answer if renderer is None else renderer.reference_answer(conversation)
        if gold is not None and conversation.messages[-1].weight:
            user_texts = [message.content for message in conversation.messages[:-1] if message.role == "user"]
            questions.append(Question(user_texts[-1] if user_texts else "", gold, conversation))
    return questions


def left_out(conversations: Sequence[Conversation]) -> list[Where]:
    """Return the rows without a right answer, and why. They count in neither score nor loss."""
    reasons = {True: "does not end with an answer", False: "its answer has weight 0"}
    rows = (row for row in conversations if row.answer is None or not row.messages[-1].weight)
    return [Where(row.file, row.line, reasons[row.answer is None]) for row in rows]


@dataclass(frozen=True)
class Side:
    """Results of the base or the tuned model: scores by name; hits and answers by row."""

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
    """Score base and tuned model in one batch, with 95 % intervals. Ctrl-C keeps the answered rows (`interrupted`)."""
    # base: earlier results of the same base on the same rows. Returns {rows, left_out, metric, base, tuned, intervals,
    # difference, changed, samples}; `base` and `tuned`: {the metric's scores, loss, perplexity, and for metrics other
    # than `choice` stop_rate, tokens_per_answer, tokens_per_s}. `left_out`: {file, line, what} of each row without a
    # right answer. `tuned`, `difference` and `changed` (rows that only one gets right) need an adapter.
    questions = make_questions(conversations, model.renderer)
    rows = len(questions)
    names = [name for name in ("base", "tuned") if (model.adapter or name == "base") and not (name == "base" and base)]
    generates = names and metric != "choice"
    generated = _generate_all(model, questions, names, max_new_tokens, advance, devices) if generates else {}
    if generated and len(generated[names[0]][0]) < rows:  # Ctrl-C: score the rows that are answered
        questions = questions[: len(generated[names[0]][0])]
        base = base and Side(base.scores, base.hits[: len(questions)], base.texts[: len(questions)])

    def score_side(side: str) -> Side:
        LOG.info("computing the loss of %s", side)
        loss = _loss(model, questions, generated[side][0] if generated else [], devices)
        if metric == "choice":
            texts, figures = _choose_all(model, questions, side, advance, devices), {}
        else:
            answers, rate = generated[side]
            texts, figures = [answer.text for answer in answers], {
                "stop_rate": sum(answer.stopped for answer in answers) / len(questions),
                "tokens_per_answer": sum(answer.tokens for answer in answers) / len(questions),
                "tokens_per_s": rate,
            }  # fmt: skip
        golds = [question.gold for question in questions]
        judged = score(metric, golds, judged_texts(model.renderer, questions, texts))
        losses = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        return Side({**judged.rates, **losses, **figures}, [*judged.hits], texts)

    sides = {}
    with model.base() if model.adapter else nullcontext():
        sides["base"] = base or score_side("base")
    if model.adapter:
        sides["tuned"] = score_side("tuned")
    places = [f"{question.conversation.file}:{question.conversation.line}" for question in questions]
    without_answer = [asdict(place) for place in left_out(conversations)]
    result: dict[str, Any] = {"rows": len(questions), "left_out": without_answer, "metric": metric_named(metric).name}
    if len(questions) < rows:
        result["interrupted"] = f"after {len(questions)} of {rows} rows"
    result |= {name: side.scores for name, side in sides.items()}
    result["intervals"] = {name: list(wilson(sum(side.hits), len(questions))) for name, side in sides.items()}
    if model.adapter:
        before, after = sides["base"].hits, sides["tuned"].hits
        result["difference"] = asdict(paired_difference(before, after))
        result["changed"] = changed_rows(places, before, after)
    result["samples"] = [
        {"place": places[row], "prompt": question.prompt, "gold": question.gold}
        | {name: side.texts[row] for name, side in sides.items()}
        | {f"{name}_hit": side.hits[row] for name, side in sides.items()}
        for row, question in enumerate(questions)
    ]
    return result


def judged_texts(renderer: Renderer, questions: Sequence[Question], texts: Sequence[str]) -> list[str]:
    """Return the part of each answer that is compared with the right one: without its reasoning."""
    rights = [question.conversation.messages[-1] for question in questions]
    return [renderer.without_reasoning(text, right) for right, text in zip(rights, texts, strict=True)]


def side_of(result: dict[str, Any], name: str) -> Side:
    """Return base or tuned from a result of `compare`."""
    samples = result["samples"]
    return Side(result[name], [row[f"{name}_hit"] for row in samples], [row[name] for row in samples])


def _loss(
    model: Model, questions: Sequence[Question], answers: Sequence[Completion], devices: Devices = ALONE
) -> float:
    """Return the mean loss of the right answers, by log-probabilities of the generation or the training step."""
    total = weight = 0.0
    remaining = []
    for question, answer in zip_longest(questions, answers):
        examples = model.renderer.render(question.conversation)
        if answer is None or (logprobs := answer.logprobs) is None:
            remaining += examples
            continue
        [example] = examples
        end = int(np.flatnonzero(example.weights)[-1]) + 1  # after the last supervised token
        weights = example.weights[end - len(logprobs) : end].astype(np.float64)
        total -= float(weights @ logprobs)
        weight += float(weights.sum())
    if remaining:
        token_loss = step_for(model.module).token_loss
        group = partial(group_by_length, tokens=LOSS_TOKENS)
        more = summed_loss(
            token_loss, remaining, lambda examples: group([len(example) for example in examples]), devices=devices
        )
        total, weight = total + more[0], weight + more[1]
    assert weight > 0
    return total / weight


def mean_loss(
    token_loss: TokenLoss, examples: Sequence[Example], cut: Cut, rows: int = 64, devices: Devices = ALONE
) -> float:
    total, weight = summed_loss(token_loss, examples, cut, rows, devices)
    assert weight > 0
    return total / weight


def summed_loss(
    token_loss: TokenLoss, examples: Sequence[Example], cut: Cut, rows: int = 64, devices: Devices = ALONE
) -> tuple[float, float]:
    """Return the sum of weight * cross entropy over supervised tokens, and of their weights; `rows` are cut at once."""
    groups: list[list[int]] = []
    total = weight = 0.0
    for start in range(0, len(examples), rows):
        block = [examples[row] for row in range(start, min(start + rows, len(examples)))]
        groups += [[start + row for row in group] for group in cut(block)]
        weight += sum(float(example.weights.sum()) for example in block)

    def loss(group: list[int]) -> float:
        return float(token_loss([examples[row] for row in group]))

    with torch.no_grad():
        for part in devices.map(groups, loss, lambda group: sum(len(examples[row]) for row in group)):
            total += part
    return total, weight


def generate_answers(
    model: Model,
    prompts: Sequence[Ids],
    devices: Devices,
    *,
    max_new_tokens: int,
    both: bool = False,
    expected: Sequence[ExpectedCompletion | None] = (),
    advance: Callable[[int], None] | None = None,
    partial: bool = False,
) -> list[Completion]:
    """Generate as `Model.answer` does, with the prompts shared by several devices. partial: on one device only."""
    if devices.world_size == 1:
        return model.answer(
            prompts, max_new_tokens=max_new_tokens, both=both, advance=advance, partial=partial, expected=expected
        )
    own = assign_balanced([float(len(prompt)) for prompt in prompts], devices.world_size)[devices.rank]
    answers: list[Completion] = []
    with devices.all_or_none():
        if own:
            answers = model.answer(
                [prompts[place] for place in own],
                max_new_tokens=max_new_tokens,
                both=both,
                advance=(lambda done: advance(done * devices.world_size)) if advance and devices.is_main else None,
                expected=[expected[place] for place in own] if expected else [],
            )
    by_place: dict[int, Completion] = {}
    for places, device_answers in devices.gather((own, answers)):
        for number, answer in enumerate(device_answers):
            side, place = divmod(number, len(places))
            by_place[side * len(prompts) + places[place]] = answer
    return [by_place[place] for place in sorted(by_place)]


def _generate_all(
    model: Model,
    questions: Sequence[Question],
    sides: Sequence[str],
    max_new_tokens: int,
    advance: Advance | None,
    devices: Devices,
) -> dict[str, tuple[list[Completion], float]]:
    """Return the answers of base, tuned or both, generated in one batch, and the batch's tokens/s."""
    prompts, started = [_prompt(model, question.conversation) for question in questions], time.perf_counter()
    rendered = (model.renderer.render(question.conversation) for question in questions)
    expected = list(map(_expected, prompts, rendered))
    with model.base() if sides == ["base"] and model.adapter else nullcontext():
        answers = generate_answers(
            model, prompts, devices, max_new_tokens=max_new_tokens, both=len(sides) > 1, partial=True,
            expected=expected,
            advance=advance and (lambda done: advance(" and ".join(sides), done, len(sides) * len(questions))),
        )  # fmt: skip
    rate = sum(answer.tokens for answer in answers) / (time.perf_counter() - started)
    rows = len(answers) // len(sides)
    if not rows:
        raise KeyboardInterrupt
    return {side: (answers[place * rows :][:rows], rate) for place, side in enumerate(sides)}


def _expected(prompt: Ids, examples: Sequence[Example]) -> ExpectedCompletion | None:
    """Return the supervised continuation of a prompt, if the row is one example that begins with the prompt."""
    n = len(prompt)
    if len(examples) != 1 or not examples[0].supervised:
        return None
    [example] = examples
    end = int(np.flatnonzero(example.weights)[-1]) + 1  # after the last supervised token
    if end <= n or not np.array_equal(example.ids[:n], prompt):
        return None
    return ExpectedCompletion(example.ids[n:end], min(example.prompt_length, n) - 1)


def _prompt(model: Model, conversation: Conversation) -> Ids:
    """Return the row up to its last turn, rendered with the template's options for a row with or without reasoning."""
    template_options = model.renderer.options_for(conversation.messages)
    return model.renderer.prompt(conversation.messages[:-1], conversation.tools, options=template_options)


def _choose_all(
    model: Model, questions: Sequence[Question], side: str, advance: Advance | None, devices: Devices
) -> list[str]:
    """Return for each question the right answer of any row with the lowest loss, the stop token included."""
    token_loss = step_for(model.module).token_loss
    candidates, done = options([question.gold for question in questions]), count(devices.world_size, devices.world_size)

    def choose(question: Question) -> str:
        *before, last = question.conversation.messages
        # Reasoning would reveal the gold.
        messages = [replace(last, content=text, reasoning=None) for text in candidates]
        conversations = [replace(question.conversation, messages=(*before, message)) for message in messages]
        with torch.no_grad():
            losses = [float(token_loss(model.renderer.render(conversation))) for conversation in conversations]
        if advance is not None:
            advance(side, min(next(done), len(questions)), len(questions))
        return candidates[losses.index(min(losses))]

    return devices.map(questions, choose, lambda question: 1.0)
