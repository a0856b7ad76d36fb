"""Compare the base and the tuned model on the same rows, by the loss of the right answers and by greedy answers."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
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
from strop.distributed.devices import SINGLE_PROCESS, Devices
from strop.engine.decode.cache import answer_limit
from strop.engine.decode.generate import Completion
from strop.engine.decode.model import Model
from strop.engine.decode.sampling import ExpectedCompletion
from strop.engine.step import step_for
from strop.errors import DataError, Location
from strop.evaluation.metrics import choice_options, compare_hits, find_metric, score
from strop.models.introspect import learned_positions

LOG = logging.getLogger(__name__)

LOSS_BATCH_TOKENS = 2048  # maximum number of tokens in a micro-batch that computes the loss
LOSS_BLOCK_ROWS = 64  # rows that are split into micro-batches together
EXTRA_SCORES = ("loss", "perplexity", "stop_rate", "tokens_per_answer", "tokens_per_s")  # independent of the metric
Progress = Callable[[str, float, int], None]  # (label, finished rows, with fractions of unfinished ones, all rows)
# Examples of a micro-batch -> sum over supervised tokens of weight * cross entropy, fp32 scalar.
TokenLoss = Callable[[Sequence[Example]], Tensor]
MakeBatches = Callable[[Sequence[Example]], list[list[int]]]  # examples -> micro-batches, as lists of indices


@dataclass(frozen=True)
class Question:
    """A conversation to answer."""

    prompt: str  # the last user message, to show to the user
    gold: str  # the right answer
    conversation: Conversation  # the row, whose last turn is the right answer


def make_questions(conversations: Sequence[Conversation], renderer: Renderer | None = None) -> list[Question]:
    """Return a question for each conversation with a right answer. The renderer converts tool calls to text."""
    questions = []
    for conversation in conversations:
        gold = conversation.answer if renderer is None else renderer.reference_answer(conversation)
        if gold is not None and conversation.messages[-1].weight:
            user_texts = [message.text for message in conversation.messages[:-1] if message.role == "user"]
            questions.append(Question(user_texts[-1] if user_texts else "", gold, conversation))
    return questions


def find_rows_without_answer(conversations: Sequence[Conversation]) -> list[Location]:
    """Return the rows without a right answer, with the reason. They are excluded from scores and loss."""
    return [
        Location(row.file, row.line, "does not end with an answer" if row.answer is None else "its answer has weight 0")
        for row in conversations
        if row.answer is None or not row.messages[-1].weight
    ]


@dataclass(frozen=True)
class Side:
    """Results of the base or the tuned model: scores by name, and the hits and answers in row order."""

    scores: dict[str, float]
    hits: list[bool]
    texts: list[str]
    failures: Mapping[str, Any] = field(default_factory=dict)  # of the user's metric, see `Scores`


def compare(
    model: Model,
    conversations: Sequence[Conversation],
    *,
    metric: str = "exact",
    max_new_tokens: int | None = None,
    advance: Progress | None = None,
    base: Side | None = None,
    with_base: bool = True,
    all_rows: Sequence[Conversation] = (),
    devices: Devices = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Score the base and the tuned model, with 95 % intervals. After Ctrl-C, only the answered rows are scored.

    max_new_tokens: by default `answer_limit` of the longest reference answer.
    base: earlier results of the same base on the same rows. all_rows: whose right answers are the choices of the metric
    `choice`; by default `conversations`. with_base: False scores a tuned model alone. `base` and
    `tuned` of the result have the metric's scores and EXTRA_SCORES (for `choice`, only loss and perplexity). `left_out`
    lists the rows without a right answer. Without an adapter, there is no `tuned`, `difference` or `changed` (the rows
    that only one model answers right). `answers`
    has the limit of their length, and what it cuts (not for `choice`).
    """
    questions = make_questions(conversations, model.renderer)
    rows = len(questions)
    all_questions = make_questions(all_rows, model.renderer) if all_rows else questions
    choices = choice_options([question.gold for question in all_questions])
    with_base = model.has_base and (with_base or not model.is_tuned)
    names = (["base"] if with_base and not base else []) + (["tuned"] if model.is_tuned else [])  # to generate answers
    generates = names and metric != "choice"
    prompts = [render_prompt(model.renderer, question.conversation) for question in questions]
    rendered = [model.renderer.render(question.conversation) for question in questions]
    check_positions(model, (example for examples in rendered for example in examples))
    expected = list(map(_expected_completion, prompts, rendered))
    lengths = list(map(partial(_count_reference_tokens, model), questions, expected))
    limit = max_new_tokens or answer_limit(max(lengths))
    limits = [min(limit, model.max_length - len(prompt)) for prompt in prompts]
    has_references = metric not in ("choice", "regex")  # a pattern is no answer
    is_cut = [has_references and length > limit for length, limit in zip(lengths, limits, strict=True)]
    if generates and any(is_cut):  # said before the answers, which may take an hour
        LOG.warning("%d of %d reference answers are longer than an answer may be (%d tokens)", sum(is_cut), rows, limit)
    generated: dict[str, tuple[list[Completion], float]] = {}
    base_texts: list[str] | None = None
    if generates:
        # An adapter shares a batch with its base.
        for together in [names] if model.adapter else [[name] for name in names]:
            asked = min([rows, *(len(answers) for answers, _ in generated.values())])
            generated |= _generate_all(model, prompts[:asked], expected[:asked], together, limit, advance, devices)
    if generated and (answered_rows := len(generated[names[-1]][0])) < rows:  # after Ctrl-C
        generated = {name: (answers[:answered_rows], rate) for name, (answers, rate) in generated.items()}
        questions = questions[:answered_rows]
        base_texts = None if base is None else base.texts[: len(questions)]
        base = None  # its scores are those of all rows

    def score_side(side: str) -> Side:
        LOG.info("computing the loss of %s", side)
        answers, tokens_per_s = generated.get(side, ([], 0.0))
        loss = _compute_loss(model, questions, answers, devices, f"computing the loss of {side}")
        extra_scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if metric == "choice":
            texts = _choose_all(model, questions, choices, side, advance, devices)
        elif side == "base" and base_texts is not None:
            texts = base_texts
        else:
            texts = [answer.text for answer in answers]
            extra_scores |= {
                "stop_rate": sum(answer.stopped for answer in answers) / len(questions),
                "tokens_per_answer": sum(answer.tokens for answer in answers) / len(questions),
                "tokens_per_s": tokens_per_s,
            }
        golds = [question.gold for question in questions]
        scores = score(metric, golds, remove_reasoning(model.renderer, questions, texts))
        return Side({**scores.rates, **extra_scores}, [*scores.hits], texts, scores.failures)

    sides = {}
    if with_base:
        with model.base() if model.is_tuned else nullcontext():
            sides["base"] = base or score_side("base")
    if model.is_tuned:
        sides["tuned"] = score_side("tuned")
    left_out = [asdict(location) for location in find_rows_without_answer(conversations)]
    result: dict[str, Any] = {"rows": len(questions), "left_out": left_out, "metric": find_metric(metric).name}
    result |= {"metric_spec": str(metric)} if ".py:" in str(metric) else {}  # to evaluate other runs in the same way
    if metric != "choice":
        result["answers"] = {
            "max_tokens": limit, "references_cut": sum(is_cut[: len(questions)]),
            **{
                f"{name}_cut": round((1 - side.scores["stop_rate"]) * len(questions))
                for name, side in sides.items()
                if "stop_rate" in side.scores
            },
        }  # fmt: skip
    result |= describe_failures({name: side.failures for name, side in sides.items()})
    if len(questions) < rows:
        result["interrupted"] = f"after {len(questions)} of {rows} rows"
    result["supervised_tokens"] = int(sum((x.weights > 0).sum() for each in rendered[: len(questions)] for x in each))
    result |= {name: side.scores for name, side in sides.items()}
    answered = [question.conversation for question in questions]
    result |= compare_hits({name: side.hits for name, side in sides.items()}, answered)
    result["samples"] = [
        {"place": answered[row].place, "prompt": question.prompt, "gold": question.gold}
        | {name: side.texts[row] for name, side in sides.items()}
        | {f"{name}_hit": side.hits[row] for name, side in sides.items()}
        | {f"{name}_cut": not answers[row].stopped for name, (answers, _) in generated.items()}
        for row, question in enumerate(questions)
    ]
    return result


def check_positions(model: Model, examples: Iterable[Example]) -> None:
    """Raise DataError for rows with more tokens than the model has learned positions."""
    positions = learned_positions(model.module) or sys.maxsize
    where = [
        Location(example.file, example.line, f"{len(example)} tokens")
        for example in examples
        if len(example) > positions
    ]
    if where:
        what = f"{len(where)} rows have more tokens than the {positions} positions that the model has learned"
        raise DataError(what, fix="shorten or remove them", where=where)


def remove_reasoning(renderer: Renderer, questions: Sequence[Question], texts: Sequence[str]) -> list[str]:
    """Return the answers without their reasoning, as a metric or a judge gets them."""
    golds = [question.conversation.messages[-1] for question in questions]
    return [renderer.without_reasoning(text, gold) for gold, text in zip(golds, texts, strict=True)]


def read_side(result: dict[str, Any], name: str) -> Side:
    """Return the results of "base" or "tuned" from a result of `compare`."""
    samples, failures = result["samples"], result.get("metric_errors", {}).get(name, {})
    return Side(result[name], [row[f"{name}_hit"] for row in samples], [row[name] for row in samples], failures)


def describe_failures(failures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entry `metric_errors` of a result, if the user's metric failed on answers. failures: by side."""
    found = {name: dict(failed) for name, failed in failures.items() if failed}
    return {"metric_errors": found} if found else {}


def _compute_loss(
    model: Model, questions: Sequence[Question], answers: Sequence[Completion], devices: Devices = SINGLE_PROCESS,
    activity: str = "",
) -> float:  # fmt: skip
    """Return the mean loss of the right answers. Log-probabilities computed during generation are reused."""
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
        remaining_total, remaining_weight = summed_loss(
            step_for(model.module).token_loss,
            remaining,
            lambda examples: group_by_length([len(example) for example in examples], tokens=LOSS_BATCH_TOKENS),
            devices,
            activity,
        )
        total, weight = total + remaining_total, weight + remaining_weight
    assert weight > 0
    return total / weight


def mean_loss(
    token_loss: TokenLoss, examples: Sequence[Example], make_batches: MakeBatches, devices: Devices = SINGLE_PROCESS,
    activity: str = "",
) -> float:  # fmt: skip
    """Return the mean cross entropy of the supervised tokens. activity: logged with the number of computed batches."""
    total, weight = summed_loss(token_loss, examples, make_batches, devices, activity)
    assert weight > 0
    return total / weight


def summed_loss(
    token_loss: TokenLoss, examples: Sequence[Example], make_batches: MakeBatches, devices: Devices = SINGLE_PROCESS,
    activity: str = "",
) -> tuple[float, float]:  # fmt: skip
    """Return the sum of weight * cross entropy over the supervised tokens, and the sum of the weights."""
    batches: list[list[int]] = []
    total = weight = 0.0
    for start in range(0, len(examples), LOSS_BLOCK_ROWS):
        block = [examples[row] for row in range(start, min(start + LOSS_BLOCK_ROWS, len(examples)))]
        batches += [[start + row for row in batch] for batch in make_batches(block)]
        weight += sum(float(example.weights.sum()) for example in block)

    def batch_loss(batch: list[int]) -> float:
        return float(token_loss([examples[row] for row in batch]))

    with torch.no_grad():
        for loss in devices.map(batches, batch_loss, lambda batch: sum(len(examples[row]) for row in batch), activity):
            total += loss
    return total, weight


def generate_answers(
    model: Model,
    prompts: Sequence[Ids],
    devices: Devices,
    *,
    max_new_tokens: int,
    both: bool = False,
    expected: Sequence[ExpectedCompletion | None] = (),
    advance: Callable[[float], None] | None = None,
    partial: bool = False,
) -> list[Completion]:
    """Generate answers on all devices. partial: after Ctrl-C, return the finished answers (single device only)."""
    if devices.world_size == 1:
        return model.answer(
            prompts, max_new_tokens=max_new_tokens, both=both, advance=advance, partial=partial, expected=expected
        )
    assigned = assign_balanced([float(len(prompt)) for prompt in prompts], devices.world_size)[devices.rank]
    answers: list[Completion] = []
    with devices.all_or_none():
        if assigned:
            answers = model.answer(
                [prompts[i] for i in assigned],
                max_new_tokens=max_new_tokens,
                both=both,
                advance=(lambda done: advance(done * devices.world_size)) if advance and devices.is_main else None,
                expected=[expected[i] for i in assigned] if expected else [],
            )
    by_index: dict[int, Completion] = {}
    for indices, device_answers in devices.gather((assigned, answers)):
        for i, answer in enumerate(device_answers):
            side, row = divmod(i, len(indices))
            by_index[side * len(prompts) + indices[row]] = answer
    return [by_index[i] for i in sorted(by_index)]


def _generate_all(
    model: Model,
    prompts: Sequence[Ids],
    expected: Sequence[ExpectedCompletion | None],
    sides: Sequence[str],
    max_new_tokens: int,
    advance: Progress | None,
    devices: Devices,
) -> dict[str, tuple[list[Completion], float]]:
    """Generate the answers of base, tuned or both in one batch. Returns (answers, tokens/s of the batch) by side."""
    started = time.perf_counter()
    with model.base() if sides == ["base"] and model.is_tuned else nullcontext():
        answers = generate_answers(
            model, prompts, devices, max_new_tokens=max_new_tokens, both=len(sides) > 1, partial=True,
            expected=expected,
            advance=advance and (lambda done: advance(" and ".join(sides), done / len(sides), len(prompts))),
        )  # fmt: skip
    rate = sum(answer.tokens for answer in answers) / (time.perf_counter() - started)
    rows = len(answers) // len(sides)
    if not rows:
        raise KeyboardInterrupt
    return {side: (answers[i * rows :][:rows], rate) for i, side in enumerate(sides)}


def _count_reference_tokens(model: Model, question: Question, expected: ExpectedCompletion | None) -> int:
    """Return the number of tokens that an answer equal to the reference has, with its stop token."""
    if expected is not None:
        return len(expected.ids)
    return len(model.tokenizer.encode(question.gold, add_special_tokens=False)) + 1


def _expected_completion(prompt: Ids, examples: Sequence[Example]) -> ExpectedCompletion | None:
    """Return the supervised tokens after the prompt. Returns None if the row is not one example with this prompt."""
    n = len(prompt)
    if len(examples) != 1 or not examples[0].supervised:
        return None
    [example] = examples
    end = int(np.flatnonzero(example.weights)[-1]) + 1  # after the last supervised token
    if end <= n or not np.array_equal(example.ids[:n], prompt):
        return None
    return ExpectedCompletion(example.ids[n:end], min(example.prompt_length, n) - 1)


def render_prompt(renderer: Renderer, conversation: Conversation) -> Ids:
    """Render the messages before a row's answer, with the template options (such as reasoning) of the whole row."""
    template_options = renderer.options_for(conversation.messages)
    return renderer.prompt(conversation.messages[:-1], conversation.tools, options=template_options)


def _choose_all(
    model: Model, questions: Sequence[Question], choices: Sequence[str], side: str, advance: Progress | None,
    devices: Devices,
) -> list[str]:  # fmt: skip
    """For each question, choose the answer with the lowest loss (including its stop token)."""
    token_loss = step_for(model.module).token_loss
    done = count(devices.world_size, devices.world_size)

    def choose(question: Question) -> str:
        *context, last = question.conversation.messages
        losses = []
        for text in choices:
            answer = replace(last, content=text, reasoning=None)  # the row's reasoning would reveal the gold
            conversation = replace(question.conversation, messages=(*context, answer))
            with torch.no_grad():
                losses.append(float(token_loss(model.renderer.render(conversation))))
        if advance is not None:
            advance(side, min(next(done), len(questions)), len(questions))
        return choices[losses.index(min(losses))]

    return devices.map(questions, choose, lambda question: 1.0)
