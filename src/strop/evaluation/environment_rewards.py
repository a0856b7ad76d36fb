"""Measure reward or answers of base and tuned model in an environment, on traces that are sampled greedily."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np

from strop.data.row_errors import RenderError
from strop.data.store import message_json
from strop.data.types import Conversation, Example, Ids, Prompt
from strop.engine.decode.generate import Respond, generation_stop_ids, sample_turns
from strop.engine.decode.model import Model
from strop.errors import DataError, Location
from strop.evaluation.compare import Progress, describe_failures
from strop.evaluation.metrics import (
    MEAN_REWARD,
    MIN_CLAIM_ROWS,
    Estimate,
    compare_hits,
    find_metric,
    mean_interval,
    paired_difference,
    score,
    wilson_interval,
)
from strop.evaluation.rewards import Reward, Rewarded
from strop.evaluation.traces import RESET, Trace, Tracer, check_prompts, mean_counts, rollout_seed
from strop.runs.events import describe_turns


def make_prompts(model: Model, conversations: Sequence[Conversation]) -> list[Prompt]:
    """Return the prompts of rows, with their right answers. Raises DataError for rows that cannot be rendered."""
    renderer, prompts, invalid = model.renderer, list[Prompt](), list[Location]()
    for row, conversation in enumerate(conversations):
        has_answer = conversation.answer is not None
        turns = conversation.messages[:-1] if has_answer else conversation.messages
        empty = Example(np.zeros(0, np.int32), np.zeros(0, np.float32), conversation.file, conversation.line)
        try:
            gold = renderer.reference_answer(conversation)
        except RenderError as error:
            invalid.append(Location(conversation.file, conversation.line, error.what))
            continue
        thinks = has_answer and renderer.shows_reasoning(conversation.messages[-1])
        ends = tuple(renderer.reasoning_ends) if thinks else ()
        messages = tuple(map(message_json, turns))
        prompts.append(Prompt((empty,), gold=gold, row=row, reasoning_ends=ends, messages=messages))
    if invalid:
        raise DataError(f"{len(invalid)} rows cannot be rendered", fix="correct or remove these rows", where=invalid)
    return prompts


def compare_traces(
    model: Model, rows: Sequence[Conversation], prompts: Sequence[Prompt], tracer: Tracer, rewards: Sequence[Reward],
    seed: int, advance: Progress | None = None, *, metric: str | None = None, with_base: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Return the mean reward of the base and the tuned model, with 95 % intervals and the paired difference.

    `base` and `tuned` of the result have `mean_reward`, its parts, `stop_rate`, and means per trace of `turns`,
    `tool_calls`, `tool_errors` and `truncated`.

    Args:
        rows: those of the prompts.
        seed: of the run, from which the seeds for `reset` are made.
        metric: scores the text of the last turn, and its score comes first. Each prompt then has a right answer.
    """
    check_prompts(tracer, prompts)
    sides: dict[str, tuple[list[Trace], list[Rewarded]]] = {}
    names = [
        name for name, present in (("base", with_base or not model.is_tuned), ("tuned", model.is_tuned)) if present
    ]
    for name in names:
        with model.base() if name == "base" and model.is_tuned else nullcontext():
            if advance is not None:
                advance(name, 0, len(prompts))
            traces = sample_greedily(model, prompts, tracer, seed)
        sides[name] = traces, tracer.reward(traces, rewards)
        tracer.release([traces])
        if advance is not None:
            advance(name, len(prompts), len(prompts))
    if metric is not None:
        return _compare_answers(rows, prompts, sides, metric)
    values = {name: [reward.total for reward in rewarded] for name, (_, rewarded) in sides.items()}
    are_hits = {value for column in values.values() for value in column} <= {0, 1}
    result: dict[str, Any] = {"rows": len(prompts), "metric": MEAN_REWARD}
    result |= {name: _summarize(*side) for name, side in sides.items()}
    result["intervals"] = {name: _interval(column, are_hits) for name, column in values.items()}
    if len(values) > 1:
        result["difference"] = asdict(difference_of(values["base"], values["tuned"]))
        changed = [(b, t, p) for b, t, p in zip(values["base"], values["tuned"], prompts, strict=True)]
        result["changed"] = {
            "gained": [f"{p.file}:{p.line}" for b, t, p in changed if t > b],
            "lost": [f"{p.file}:{p.line}" for b, t, p in changed if t < b],
        }
    hits = {name: [bool(value) for value in column] for name, column in values.items()} if are_hits else {}
    result["samples"] = [_make_sample(prompt, row, sides, hits) for row, prompt in enumerate(prompts)]
    return result


Sides = Mapping[str, tuple[list[Trace], list[Rewarded]]]  # base and tuned


def _compare_answers(
    rows: Sequence[Conversation], prompts: Sequence[Prompt], sides: Sides, metric: str
) -> dict[str, Any]:
    """Return the scores of the last turns against the right answers, as `compare` does."""
    golds = [str(prompt.gold) for prompt in prompts]
    scores = {name: score(metric, golds, [trace.answer for trace in traces]) for name, (traces, _) in sides.items()}
    hits = {name: list(found.hits) for name, found in scores.items()}
    return {
        "rows": len(prompts), "metric": find_metric(metric).name,
        **{name: {**scores[name].rates, **_summarize(*side)} for name, side in sides.items()},
        **describe_failures({name: found.failures for name, found in scores.items()}),
        **compare_hits(hits, rows),
        "samples": [_make_sample(prompt, row, sides, hits) for row, prompt in enumerate(prompts)],
    }  # fmt: skip


def sample_greedily(model: Model, prompts: Sequence[Prompt], tracer: Tracer, seed: int) -> list[Trace]:
    """Return a trace of each prompt."""
    stop_ids = (*model.renderer.end_ids, *generation_stop_ids(model.module.generation_config))

    def sample(ids: Sequence[Ids], seeds: Sequence[int], respond: Respond) -> None:
        sample_turns(
            model.module, ids, seeds, stop_ids, respond, turn_tokens=tracer.turn_tokens, max_length=tracer.max_length,
            greedy=True,
        )  # fmt: skip

    resets = [rollout_seed(seed, -1, prompt.row, RESET) for prompt in prompts]
    return [group[0] for group in tracer.sample(prompts, [[0]] * len(prompts), resets, sample)]


def difference_of(base: Sequence[float], tuned: Sequence[float]) -> Estimate:
    """Return the paired difference of rewards: of hits and misses as for other metrics, else Student's interval."""
    if {*base, *tuned} <= {0, 1}:
        return paired_difference(list(map(bool, base)), list(map(bool, tuned)))
    changes = [after - before for before, after in zip(base, tuned, strict=True)]
    mean = statistics.fmean(changes)
    low, high = mean_interval(changes) if len(changes) > 1 else (-abs(mean), abs(mean))
    if len(changes) < MIN_CLAIM_ROWS:
        low, high = min(low, 0.0), max(high, 0.0)
    return Estimate(mean, low, high)


def _interval(values: Sequence[float], are_hits: bool) -> list[float]:
    if are_hits:
        return list(wilson_interval(round(sum(values)), len(values)))
    return mean_interval(values) if len(values) > 1 else [values[0], values[0]]


def _summarize(traces: Sequence[Trace], rewarded: Sequence[Rewarded]) -> dict[str, float]:
    counts = mean_counts(traces)
    names = list(rewarded[0].parts) if len(rewarded[0].parts) > 1 else []
    return {
        MEAN_REWARD: statistics.fmean(reward.total for reward in rewarded),
        **{f"reward/{name}": statistics.fmean(reward.parts[name] for reward in rewarded) for name in names},
        "stop_rate": 1 - counts["truncated"], **counts,
    }  # fmt: skip


def _make_sample(prompt: Prompt, row: int, sides: Sides, hits: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    users = [str(message["content"]) for message in prompt.messages if message["role"] == "user"]
    sample: dict[str, Any] = {"place": f"{prompt.file}:{prompt.line}", "prompt": users[-1] if users else ""}
    sample |= {} if prompt.gold is None else {"gold": prompt.gold}
    for name, (traces, rewarded) in sides.items():
        sample |= {name: describe_trace(traces[row]), f"{name}_reward": rewarded[row].total}
        sample |= {f"{name}_hit": hits[name][row]} if hits else {}
    return sample


def describe_trace(trace: Trace) -> str:
    """Return the turns after the prompt as text: calls, results and answers, a line each."""
    start = next((i for i, message in enumerate(trace.messages) if message.role == "assistant"), len(trace.messages))
    return describe_turns(list(map(message_json, trace.messages[start:])))
