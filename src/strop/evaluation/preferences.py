"""Compare base and tuned model on held-out pairs: which answer is more likely, or gets the higher score."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from strop.data.batching import pack
from strop.data.rendering.render import render_pairs
from strop.data.row_errors import RenderError
from strop.data.types import Conversation, Example
from strop.distributed.devices import ALONE, Devices
from strop.engine.decode.model import Model
from strop.engine.step import step_for
from strop.errors import DataError, Where
from strop.evaluation.compare import Advance
from strop.evaluation.metrics import Z_95, changed_rows, paired_difference, wilson
from strop.models.adapters import is_reward_adapter
from strop.models.lora import find_score_head

METRIC = "preference"
MICRO_BATCH_TOKENS = 2048
SAMPLE_CHARACTERS = 400  # of an answer

Pairs = Sequence[tuple[Example, Example]]
PairValues = list[tuple[float, float]]  # of the chosen and the rejected answer of each pair


def compare_preferences(
    model: Model, conversations: Sequence[Conversation], advance: Advance | None = None, devices: Devices = ALONE
) -> dict[str, Any]:
    """Measure how often the chosen answer has the higher log-probability per token, with 95 % intervals."""
    # `base` and `tuned`: {preference, preference_sum (by summed log-probabilities), loss (of the chosen answers)}.
    # `rewards`, with an adapter: {accuracy, accuracy_interval, margin, margin_interval} of log pi - log base, summed
    # over an answer, in nats. A reward model has no base: preference is by its scores, and `rewards` has their margin.
    pairs, bad = list[tuple[Example, Example]](), list[Where]()
    for conversation, rendered in render_pairs(model.renderer, conversations):
        if isinstance(rendered, RenderError):
            bad.append(Where(conversation.file, conversation.line, rendered.what))
        else:
            pairs.append((rendered[0], rendered[1]))
    if bad:
        raise DataError(f"{len(bad)} pairs cannot be compared", fix="fix or remove them", where=bad)
    if model.adapter is not None and is_reward_adapter(model.adapter):
        return _compare_scores(model, conversations, pairs, advance, devices)
    sides: dict[str, PairValues] = {}
    with model.base() if model.adapter else nullcontext():
        sides["base"] = _by_micro_batch(step_for(model.module).log_probs, pairs, "base", advance, devices)
    if model.adapter:
        sides["tuned"] = _by_micro_batch(step_for(model.module).log_probs, pairs, "tuned", advance, devices)
    counts = [(float(chosen.weights.sum()), float(rejected.weights.sum())) for chosen, rejected in pairs]
    result: dict[str, Any] = {"rows": len(pairs), "metric": METRIC}
    hits: dict[str, list[bool]] = {}
    for name, values in sides.items():
        hits[name] = [a / n > b / m for (a, b), (n, m) in zip(values, counts, strict=True)]
        result[name] = {
            METRIC: statistics.fmean(hits[name]),
            "preference_sum": statistics.fmean(a > b for a, b in values),
            "loss": -sum(a for a, _ in values) / sum(n for n, _ in counts),
        }
    result["intervals"] = {name: list(wilson(sum(hit), len(hit))) for name, hit in hits.items()}
    if model.adapter:
        moved = [(a - c, b - d) for (a, b), (c, d) in zip(sides["tuned"], sides["base"], strict=True)]
        places = [f"{conversation.file}:{conversation.line}" for conversation in conversations]
        result["difference"] = asdict(paired_difference(hits["base"], hits["tuned"]))
        result["changed"] = changed_rows(places, hits["base"], hits["tuned"])
        result["rewards"] = reward_figures(moved)
    result["samples"] = _samples(conversations, hits)
    return result


def reward_figures(rewards: PairValues) -> dict[str, Any]:
    """Return accuracy and mean margin of pairs of rewards, with Wilson's and the normal 95 % interval."""
    margins, hits = [a - b for a, b in rewards], [a > b for a, b in rewards]
    mean, n = statistics.fmean(margins), len(margins)
    reach = Z_95 * statistics.stdev(margins) / math.sqrt(n) if n > 1 else math.inf
    interval = [mean - reach, mean + reach] if n > 1 else None
    return {
        "accuracy": sum(hits) / n, "accuracy_interval": list(wilson(sum(hits), n)), "margin": mean,
        "margin_interval": interval,
    }  # fmt: skip


def _compare_scores(
    model: Model, conversations: Sequence[Conversation], pairs: Pairs, advance: Advance | None, devices: Devices
) -> dict[str, Any]:
    step, head = step_for(model.module), find_score_head(model.module)
    assert head is not None

    def scores(examples: Sequence[Example]) -> torch.Tensor:
        values: torch.Tensor = head(step.last_hidden(examples).float())
        return values.flatten()

    values = _by_micro_batch(scores, pairs, "tuned", advance, devices)
    hits, figures = {"tuned": [a > b for a, b in values]}, reward_figures(values)
    return {
        "rows": len(pairs), "metric": METRIC, "tuned": {METRIC: figures["accuracy"]},
        "intervals": {"tuned": figures["accuracy_interval"]}, "rewards": figures,
        "samples": _samples(conversations, hits),
    }  # fmt: skip


def _by_micro_batch(
    compute: Callable[[Sequence[Example]], torch.Tensor],
    pairs: Pairs,
    side: str,
    advance: Advance | None,
    devices: Devices,
) -> PairValues:
    """Compute a value of both answers of each pair. A pair is always in one micro-batch."""
    lengths = [len(chosen) + len(rejected) for chosen, rejected in pairs]
    done = 0

    def compute_group(group: list[int]) -> list[float]:
        nonlocal done
        done += len(group) * devices.world_size
        values: list[float] = compute([example for row in group for example in pairs[row]]).tolist()
        if advance is not None:
            advance(side, min(done, len(pairs)), len(pairs))
        return values

    groups = pack(lengths, max(MICRO_BATCH_TOKENS, *lengths))
    pair_values: PairValues = [(0.0, 0.0)] * len(pairs)
    with torch.no_grad():
        group_values = devices.map(groups, compute_group, lambda group: sum(lengths[row] for row in group))
    for group, values in zip(groups, group_values, strict=True):
        for place, row in enumerate(group):
            pair_values[row] = (values[2 * place], values[2 * place + 1])
    return pair_values


def _samples(conversations: Sequence[Conversation], hits: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """Return the answer that each side prefers, next to the chosen one."""
    samples = []
    for row, conversation in enumerate(conversations):
        chosen, rejected = (side.messages[-1].content[:SAMPLE_CHARACTERS] for side in conversation.sides)
        prompt = next((message.content for message in reversed(conversation.messages) if message.role == "user"), "")
        sample: dict[str, Any] = {"prompt": prompt, "gold": chosen}
        for name, hit in hits.items():
            sample |= {name: chosen if hit[row] else rejected, f"{name}_hit": hit[row]}
        samples.append(sample)
    return samples
