"""Measure on preference pairs how often a model prefers the chosen answer, by log-probability or reward score."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from strop.data.batching import in_row_order, pack
from strop.data.rendering.render import render_pairs
from strop.data.row_errors import RenderError
from strop.data.types import Conversation, Example
from strop.distributed.devices import SINGLE_PROCESS, Devices
from strop.engine.decode.model import Model
from strop.engine.step import compute_scores, step_for
from strop.errors import DataError, Location
from strop.evaluation.compare import Progress, check_positions
from strop.evaluation.metrics import PREFERENCE, compare_hits, mean_interval, wilson_interval
from strop.models.adapter_config import adapter_kind
from strop.models.lora import find_score_head

MICRO_BATCH_TOKENS = 2048
SAMPLE_CHARACTERS = 400  # longer answers are truncated in samples

Pairs = Sequence[tuple[Example, Example]]
PairValues = list[tuple[float, float]]  # one value for the chosen and one for the rejected answer of each pair


def compare_preferences(
    model: Model,
    conversations: Sequence[Conversation],
    advance: Progress | None = None,
    devices: Devices = SINGLE_PROCESS,
    *,
    with_base: bool = True,
) -> dict[str, Any]:
    """Measure how often the chosen answer has the higher log-probability per token, with 95 % intervals.

    `base` and `tuned` of the result have `preference`, `preference_sum` (by log-probabilities of whole answers) and
    `loss` (of the chosen answers). `rewards`, with an adapter, compares log-ratios of tuned to base, in nats. A reward
    model has no base: its preference and rewards are computed from its scores.
    """
    pairs, invalid = list[tuple[Example, Example]](), list[Location]()
    for conversation, rendered in render_pairs(model.renderer, conversations):
        if isinstance(rendered, RenderError):
            invalid.append(Location(conversation.file, conversation.line, rendered.what))
        else:
            pairs.append((rendered[0], rendered[1]))
    if invalid:
        raise DataError(f"{len(invalid)} pairs cannot be compared", fix="correct or remove these rows", where=invalid)
    check_positions(model, (example for pair in pairs for example in pair))
    if model.adapter is not None and adapter_kind(model.adapter) == "reward":
        return _compare_scores(model, conversations, pairs, advance, devices)
    logprobs: dict[str, PairValues] = {}
    if model.has_base and (with_base or not model.is_tuned):
        with model.base() if model.is_tuned else nullcontext():
            logprobs["base"] = _compute_pairs(step_for(model.module).log_probs, pairs, "base", advance, devices)
    if model.is_tuned:
        logprobs["tuned"] = _compute_pairs(step_for(model.module).log_probs, pairs, "tuned", advance, devices)
    lengths = [(float(chosen.weights.sum()), float(rejected.weights.sum())) for chosen, rejected in pairs]
    result: dict[str, Any] = {"rows": len(pairs), "metric": PREFERENCE}
    hits: dict[str, list[bool]] = {}
    for name, values in logprobs.items():
        hits[name] = [a / n > b / m for (a, b), (n, m) in zip(values, lengths, strict=True)]
        result[name] = {
            PREFERENCE: statistics.fmean(hits[name]),
            "preference_sum": statistics.fmean(a > b for a, b in values),
            "loss": -sum(a for a, _ in values) / sum(n for n, _ in lengths),
        }
    result |= compare_hits(hits, conversations)
    if len(logprobs) > 1:
        log_ratios = [(a - c, b - d) for (a, b), (c, d) in zip(logprobs["tuned"], logprobs["base"], strict=True)]
        result["rewards"] = summarize_rewards(log_ratios)
    result["samples"] = _make_samples(conversations, hits)
    return result


def summarize_rewards(rewards: PairValues) -> dict[str, Any]:
    """Return the accuracy with its Wilson interval, and the mean margin with Student's interval (95 % each)."""
    margins, hits = [a - b for a, b in rewards], [a > b for a, b in rewards]
    n = len(margins)
    return {
        "accuracy": sum(hits) / n,
        "accuracy_interval": list(wilson_interval(sum(hits), n)),
        "margin": statistics.fmean(margins),
        "margin_interval": mean_interval(margins) if n > 1 else None,
    }


def _compare_scores(
    model: Model, conversations: Sequence[Conversation], pairs: Pairs, advance: Progress | None, devices: Devices
) -> dict[str, Any]:
    step, head = step_for(model.module), find_score_head(model.module)
    assert head is not None

    def compute(examples: Sequence[Example]) -> torch.Tensor:
        return compute_scores(step, head, examples).flatten()

    scores = _compute_pairs(compute, pairs, "tuned", advance, devices)
    rewards = summarize_rewards(scores)
    return {
        "rows": len(pairs), "metric": PREFERENCE, "tuned": {PREFERENCE: rewards["accuracy"]},
        "intervals": {"tuned": rewards["accuracy_interval"]}, "rewards": rewards,
        "samples": _make_samples(conversations, {"tuned": [a > b for a, b in scores]}),
    }  # fmt: skip


def _compute_pairs(
    compute: Callable[[Sequence[Example]], torch.Tensor],
    pairs: Pairs,
    side: str,
    advance: Progress | None,
    devices: Devices,
) -> PairValues:
    """Compute a value for both answers of each pair, which are in the same micro-batch."""
    lengths = [len(chosen) + len(rejected) for chosen, rejected in pairs]
    done = 0

    def compute_batch(batch: list[int]) -> list[float]:
        nonlocal done
        done += len(batch) * devices.world_size
        values: list[float] = compute([example for row in batch for example in pairs[row]]).tolist()
        if advance is not None:
            advance(side, min(done, len(pairs)), len(pairs))
        return values

    batches = pack(lengths, max(MICRO_BATCH_TOKENS, *lengths))
    with torch.no_grad():
        batch_values = devices.map(batches, compute_batch, lambda batch: sum(lengths[row] for row in batch))
    return in_row_order(batches, [list(zip(values[::2], values[1::2], strict=True)) for values in batch_values])


def _make_samples(conversations: Sequence[Conversation], hits: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """Return samples for the report: the prompt, the chosen answer, and the answer that each model prefers."""
    samples = []
    for row, conversation in enumerate(conversations):
        chosen, rejected = (side.messages[-1].content[:SAMPLE_CHARACTERS] for side in conversation.sides)
        prompt = next((message.text for message in reversed(conversation.messages) if message.role == "user"), "")
        sample: dict[str, Any] = {"place": conversation.place, "prompt": prompt, "gold": chosen}
        for name, hit in hits.items():
            sample |= {name: chosen if hit[row] else rejected, f"{name}_hit": hit[row]}
        samples.append(sample)
    return samples
