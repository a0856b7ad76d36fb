"""Diagnose a run from its curves: overfitting, a flat loss, and what was done about errors, in plain sentences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from strop.errors import TROUBLESHOOTING_PAGE
from strop.runs.events import drop_undone_events

Series = dict[int, float]  # step -> value
FLAT = f"see {TROUBLESHOOTING_PAGE}#flat"
MIN_STEPS = 20  # for a statement about learning
MAX_CHOSEN_LOSS = 0.1  # nats per token that chosen answers may become less likely
RECOVERIES = ("rollback", "shrink", "override")  # events that are reported
MOSTLY = 0.9  # share of groups with equal rewards beyond which little is learned
MIN_CHANGE = 1e-4  # relative change of the weights below which no output changes


def diagnose(events: Sequence[dict[str, Any]], weight_change: float | None) -> list[str]:
    """Return one sentence per finding; none for a run without problems."""
    events = drop_undone_events(events)
    train, evaluated = _series(events, "step"), _series(events, "eval")
    # A resumed run repeats some events.
    recoveries = dict.fromkeys(_describe(event) for event in events if event["event"] in RECOVERIES)
    if reward_steps := [event for event in events if event["event"] == "step" and "reward" in event]:
        return [*_check_rewards(reward_steps), *recoveries]
    findings = _check_overfitting(train, evaluated) + _check_learning(train, weight_change) + _check_chosen(events)
    return [*findings, *recoveries]


def _check_overfitting(train: Series, evaluated: Series) -> list[str]:
    """Report an evaluation loss that is more than 2 % above its best while the training loss kept falling."""
    if len(evaluated) < 2:
        return []
    best = min(evaluated, key=lambda step: evaluated[step])
    last = max(evaluated)
    before = [loss for step, loss in train.items() if step <= best]
    after = [loss for step, loss in train.items() if step > best]
    tail = before[-len(after) :]
    if not after or not tail or evaluated[last] < 1.02 * evaluated[best]:
        return []
    from_best = f"from {evaluated[best]:.3f} (step {best}, kept)"
    rose = f"the evaluation loss rose {from_best} to {evaluated[last]:.3f} (step {last})"
    if statistics.mean(after) < statistics.mean(tail):
        return [f"overfitting: {rose} while the training loss fell: train for fewer epochs, or give more rows"]
    return [f"getting worse: {rose} and the training loss did not fall: lower the learning rate"]


def _check_learning(train: Series, weight_change: float | None) -> list[str]:
    losses = [loss for _, loss in sorted(train.items())]
    if len(losses) < MIN_STEPS:
        return []
    first, last, noise = _trend(losses)
    if first - last > 2 * noise and first - last > 0.01 * abs(first):
        return []
    flat = f"not learning: the training loss went from {first:.3f} to {last:.3f}"
    if weight_change is not None and weight_change < MIN_CHANGE:
        moved = f"the adapters changed their weights by {weight_change:.1e} of their size"
        return [f"{flat}, and {moved}: the learning rate is too small, try 10 times as much ({FLAT})"]
    return [f"{flat}: see with `strop check` what is trained on, or try another learning rate ({FLAT})"]


def _check_rewards(steps: Sequence[dict[str, Any]]) -> list[str]:
    """Report a policy that has nothing to learn from, or whose reward does not rise. Its loss says nothing."""
    equal, stopped = (statistics.mean(event[name] for event in steps) for name in ("equal_groups", "stop_rate"))
    findings = []
    if stopped < 1 - MOSTLY:
        findings.append(f"{1 - stopped:.0%} of the completions were cut off: raise train.answer_tokens")
    if equal > MOSTLY:
        findings.append(
            f"{equal:.0%} of the groups had equal rewards, from which nothing is learned: use prompts that are "
            "sometimes answered well, or a reward with steps between 0 and 1"
        )
    if len(steps) < MIN_STEPS or findings:
        return findings
    first, last, noise = _trend([event["reward"] for event in steps])
    if last - first > 2 * noise:
        return []
    return [
        f"the reward of completions went from {first:.3f} to {last:.3f}, within its noise: train longer, sample larger "
        f"groups, or try another learning rate ({FLAT})"
    ]


def _trend(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the means of the first and the last fifth, and the standard error of their difference."""
    part = max(5, len(values) // 5)
    first, last = values[:part], values[-part:]
    noise = ((statistics.variance(first) + statistics.variance(last)) / part) ** 0.5
    return statistics.mean(first), statistics.mean(last), noise


def _check_chosen(events: Sequence[dict[str, Any]]) -> list[str]:
    """Report chosen answers that became less likely: the margin then grows at their cost."""
    steps = [event for event in events if event["event"] == "step" and "chosen_change" in event]
    if len(steps) < MIN_STEPS:
        return []
    last = steps[-max(5, len(steps) // 5) :]
    chosen, rejected = (statistics.mean(event[f"{side}_change"] for event in last) for side in ("chosen", "rejected"))
    if chosen > -MAX_CHOSEN_LOSS:
        return []
    return [
        f"the chosen answers became less likely too, by {-chosen:.2f} nats per token (the rejected ones by "
        f"{-rejected:.2f}), so the margin grew because both fell; train.sft_weight 1 keeps the chosen ones likely"
    ]


def _describe(event: dict[str, Any]) -> str:
    at = f"step {event['step']}"
    if event["event"] == "rollback":
        return (
            f"{at}: {event['why']}: went back to step {event['to']}, skipped {len(event['passed'])} batches, and "
            f"continued with {event['rate_scale']:g} times the learning rate"
        )
    if event["event"] == "shrink":
        return f"{at}: out of memory: continued with {event['to']}; the effective batch did not change"
    return f"{at}: resumed with {event['field']} = {event['now']}, which was {event['was']}"


def _series(events: Sequence[dict[str, Any]], kind: str) -> Series:
    """Return losses by step. A repeated step counts as computed last."""
    with_loss = (event for event in events if event["event"] == kind and event.get("loss") is not None)
    return {event["step"]: event["loss"] for event in with_loss}
