"""Pairs that were held out: which answer a model finds likelier, or scores higher, base and tuned side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from strop.data.batching import pack
from strop.data.rendering.render import render_pairs
from strop.data.row_errors import RenderError
from strop.data.types import Conversation, Example
from strop.distributed.devices import ALONE, Devices
from strop.engine.step import step_for
from strop.errors import DataError, Where
from strop.evaluation.compare import Advance
from strop.evaluation.metrics import Z_95, paired_difference, wilson
from strop.models.adapters import Model, is_reward
from strop.models.reward_head import head_of

METRIC = "preference"
TOKENS = 2048  # of a micro-batch
SHOWN = 400  # characters of an answer in a sample

Pairs = Sequence[tuple[Example, Example]]
Found = list[tuple[float, float]]  # of the chosen and the rejected answer


def compare_preferences(
    model: Model, conversations: Sequence[Conversation], advance: Advance | None = None, devices: Devices = ALONE
) -> dict[str, Any]:
    """How often the chosen answer is the likelier one a token, without the adapter and with it, with 95 % intervals.

    Returns {rows, metric, base, tuned, intervals, difference, changed, samples} as compare.compare does; each of base
    and tuned: {preference, preference_sum (by summed log-probabilities), loss (of the chosen answers)}. rewards, where
    there is an adapter: {accuracy, accuracy_interval, margin, margin_interval}, of log pi - log base summed over an
    answer, in nats. Of a reward model there is no base, preference is by its scores, and rewards holds their margin.
    Raises DataError naming every pair that cannot be compared.
    """
    pairs = _rendered(model, conversations)
    if model.adapter is not None and is_reward(model.adapter):
        return _scored(model, conversations, pairs, advance, devices)
    sides: dict[str, Found] = {}
    with model.base() if model.adapter else nullcontext():
        sides["base"] = _log_probs(model, pairs, "base", advance, devices)
    if model.adapter:
        sides["tuned"] = _log_probs(model, pairs, "tuned", advance, devices)
    counts = [(float(better.weights.sum()), float(worse.weights.sum())) for better, worse in pairs]
    result: dict[str, Any] = {"rows": len(pairs), "metric": METRIC}
    hits: dict[str, list[bool]] = {}
    for name, found in sides.items():
        hits[name] = [a / n > b / m for (a, b), (n, m) in zip(found, counts, strict=True)]
        result[name] = {
            METRIC: statistics.fmean(hits[name]),
            "preference_sum": statistics.fmean(a > b for a, b in found),
            "loss": -sum(a for a, _ in found) / sum(n for n, _ in counts),
        }
    result["intervals"] = {name: list(wilson(sum(hit), len(hit))) for name, hit in hits.items()}
    if model.adapter:
        moved = [(a - c, b - d) for (a, b), (c, d) in zip(sides["tuned"], sides["base"], strict=True)]
        result["difference"] = asdict(paired_difference(hits["base"], hits["tuned"]))
        result["changed"] = _changed(conversations, hits["base"], hits["tuned"])
        result["rewards"] = rewards(moved)
    result["samples"] = _samples(conversations, hits)
    return result


def rewards(found: Found) -> dict[str, Any]:
    """Accuracy and mean margin of what the chosen and the rejected answer of each pair are given, with 95 % intervals
    (of a proportion by Wilson's, of a mean by the normal distribution)."""
    margins, hits = [a - b for a, b in found], [a > b for a, b in found]
    mean, n = statistics.fmean(margins), len(margins)
    reach = Z_95 * statistics.stdev(margins) / math.sqrt(n) if n > 1 else math.inf
    interval = [mean - reach, mean + reach] if n > 1 else None
    return {
        "accuracy": sum(hits) / n, "accuracy_interval": list(wilson(sum(hits), n)), "margin": mean,
        "margin_interval": interval,
    }  # fmt: skip


def _scored(
    model: Model, conversations: Sequence[Conversation], pairs: Pairs, advance: Advance | None, devices: Devices
) -> dict[str, Any]:
    step, head = step_for(model.module), head_of(model.module)
    assert head is not None

    def scores(examples: Sequence[Example]) -> torch.Tensor:
        found: torch.Tensor = head(step.last_hidden(examples).float())
        return found.flatten()

    found = _by_micro_batch(scores, pairs, "tuned", advance, devices)
    hits = {"tuned": [a > b for a, b in found]}
    told = rewards(found)
    return {
        "rows": len(pairs),
        "metric": METRIC,
        "tuned": {METRIC: told["accuracy"]},
        "intervals": {"tuned": told["accuracy_interval"]},
        "rewards": told,
        "samples": _samples(conversations, hits),
    }


def _rendered(model: Model, conversations: Sequence[Conversation]) -> Pairs:
    found, bad = [], []
    for conversation, rendered in render_pairs(model.renderer, conversations):
        if isinstance(rendered, RenderError):
            bad.append(Where(conversation.file, conversation.line, rendered.what))
        else:
            found.append((rendered[0], rendered[1]))
    if bad:
        raise DataError(f"{len(bad)} pairs cannot be compared", fix="mend or remove them", where=bad)
    return found


def _log_probs(model: Model, pairs: Pairs, side: str, advance: Advance | None, devices: Devices) -> Found:
    return _by_micro_batch(step_for(model.module).log_probs, pairs, side, advance, devices)


def _by_micro_batch(compute: Any, pairs: Pairs, side: str, advance: Advance | None, devices: Devices) -> Found:
    """What `compute` gives for both answers of each pair; a pair is never parted."""
    lengths = [len(better) + len(worse) for better, worse in pairs]
    done = 0

    def look(group: list[int]) -> list[float]:
        nonlocal done
        done += len(group) * devices.world_size
        values: list[float] = compute([example for row in group for example in pairs[row]]).tolist()
        if advance is not None:
            advance(side, min(done, len(pairs)), len(pairs))
        return values

    groups = pack(lengths, max(TOKENS, *lengths))
    found: Found = [(0.0, 0.0)] * len(pairs)
    with torch.no_grad():
        looked = devices.map(groups, look, lambda group: sum(lengths[row] for row in group))
    for group, values in zip(groups, looked, strict=True):
        for place, row in enumerate(group):
            found[row] = (values[2 * place], values[2 * place + 1])
    return found


def _changed(conversations: Sequence[Conversation], before: list[bool], after: list[bool]) -> dict[str, list[str]]:
    places = [f"{conversation.file}:{conversation.line}" for conversation in conversations]
    return {
        "gained": [place for place, was, now in zip(places, before, after, strict=True) if now and not was],
        "lost": [place for place, was, now in zip(places, before, after, strict=True) if was and not now],
    }


def _samples(conversations: Sequence[Conversation], hits: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """The answer that each side prefers, beside the chosen one."""
    found = []
    for row, conversation in enumerate(conversations):
        better, worse = (side.messages[-1].content[:SHOWN] for side in conversation.sides)
        asked = next((turn.content for turn in reversed(conversation.messages) if turn.role == "user"), "")
        sample: dict[str, Any] = {"prompt": asked, "gold": better}
        for name, hit in hits.items():
            sample |= {name: better if hit[row] else worse, f"{name}_hit": hit[row]}
        found.append(sample)
    return found
