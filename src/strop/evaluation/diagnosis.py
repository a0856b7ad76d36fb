"""What the curves of a run say, in plain words: overfitting, not learning, and what was done about trouble."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from strop.errors import TROUBLESHOOTING_PAGE
from strop.runs.events import without_undone

Series = dict[int, float]  # step -> value
FLAT = f"see {TROUBLESHOOTING_PAGE}#flat"
ENOUGH_STEPS = 20  # below this a loss curve says nothing about learning
FELL = 0.1  # nats a token that chosen answers may lose
TROUBLE = ("rollback", "shrink", "override")
QUIET = 0.9  # share of groups with equal rewards beyond which little is learned
BARELY = 1e-4  # relative change of the weights that no output would show


def diagnose(events: Sequence[dict[str, Any]], weight_change: float | None) -> list[str]:
    """One sentence for each finding; none for a run that went well.

    weight_change: how far the adapters move their weights, relative to the weights (model.lora.weight_change).
    """
    events = without_undone(events)
    train, held_out = _series(events, "step"), _series(events, "eval")
    trouble = dict.fromkeys(_trouble(event) for event in events if event["event"] in TROUBLE)  # a resume repeats some
    if rewards := [e for e in events if e["event"] == "step" and "reward" in e]:
        return [*_rewarded(rewards), *trouble]
    return [
        *_overfitting(train, held_out),
        *_not_learning(train, weight_change),
        *_less_likely(events),
        *trouble,
    ]


def _overfitting(train: Series, held_out: Series) -> list[str]:
    """The evaluation loss has risen since its best by more than 2 %, while the training loss went on falling."""
    if len(held_out) < 2:
        return []
    best = min(held_out, key=lambda step: held_out[step])
    last = max(held_out)
    before = [loss for step, loss in train.items() if step <= best]
    after = [loss for step, loss in train.items() if step > best]
    tail = before[-len(after) :]
    if not after or not tail or held_out[last] < 1.02 * held_out[best]:
        return []
    rose = (
        f"the evaluation loss rose from {held_out[best]:.3f} (step {best}, kept) to {held_out[last]:.3f} (step {last})"
    )
    if statistics.mean(after) < statistics.mean(tail):
        return [f"overfitting: {rose} while the training loss fell: train for fewer epochs, or give more rows"]
    return [f"getting worse: {rose} and the training loss did not fall: lower the learning rate"]


def _not_learning(train: Series, weight_change: float | None) -> list[str]:
    losses = [loss for _, loss in sorted(train.items())]
    if len(losses) < ENOUGH_STEPS:
        return []
    part = max(5, len(losses) // 5)
    first, last = losses[:part], losses[-part:]
    fell = statistics.mean(first) - statistics.mean(last)
    noise = ((statistics.variance(first) + statistics.variance(last)) / part) ** 0.5
    if fell > 2 * noise and fell > 0.01 * abs(statistics.mean(first)):
        return []
    flat = f"not learning: the training loss went from {statistics.mean(first):.3f} to {statistics.mean(last):.3f}"
    if weight_change is not None and weight_change < BARELY:
        moved = f"the adapters changed their weights by {weight_change:.1e} of their size"
        return [f"{flat}, and {moved}: the learning rate is too small, try 10 times as much ({FLAT})"]
    return [f"{flat}: see with `strop check` what is trained on, or try another learning rate ({FLAT})"]


def _rewarded(steps: Sequence[dict[str, Any]]) -> list[str]:
    """Of a policy: the loss says nothing. Whether there was anything to learn from, and whether the reward rose."""
    equal, cut = (statistics.mean(e[name] for e in steps) for name in ("equal_groups", "stop_rate"))
    found = []
    if cut < 1 - QUIET:
        found.append(f"{1 - cut:.0%} of the drawn answers were cut off: raise train.answer_tokens")
    if equal > QUIET:
        found.append(
            f"{equal:.0%} of the groups had equal rewards, which teach nothing: take prompts that are sometimes "
            "answered well, or a reward with steps between 0 and 1"
        )
    if len(steps) < ENOUGH_STEPS or found:
        return found
    part = max(5, len(steps) // 5)
    first, last = ([e["reward"] for e in some] for some in (steps[:part], steps[-part:]))
    rose = statistics.mean(last) - statistics.mean(first)
    noise = ((statistics.variance(first) + statistics.variance(last)) / part) ** 0.5
    if rose > 2 * noise:
        return []
    return [
        f"the reward of drawn answers went from {statistics.mean(first):.3f} to {statistics.mean(last):.3f}, within "
        f"its noise: train longer, draw larger groups, or try another learning rate ({FLAT})"
    ]


def _less_likely(events: Sequence[dict[str, Any]]) -> list[str]:
    """Both the chosen and the rejected answers have become less likely: the margin grows by what is lost."""
    moved = [
        (e["chosen_change"], e["rejected_change"]) for e in events if e["event"] == "step" and "chosen_change" in e
    ]
    if len(moved) < ENOUGH_STEPS:
        return []
    chosen, rejected = (statistics.mean(side) for side in zip(*moved[-max(5, len(moved) // 5) :], strict=True))
    if chosen > -FELL:
        return []
    return [
        f"the chosen answers became less likely too, by {-chosen:.2f} nats a token (the rejected ones by "
        f"{-rejected:.2f}): the margin grew by what both lost; train.sft_weight 1 holds the chosen ones up"
    ]


def _trouble(event: dict[str, Any]) -> str:
    at = f"step {event['step']}"
    if event["event"] == "rollback":
        return (
            f"{at}: {event['why']}: went back to step {event['to']}, passed {len(event['passed'])} batches over and "
            f"went on with {event['rate_scale']:g} times the learning rate"
        )
    if event["event"] == "shrink":
        return f"{at}: out of memory: went on with {event['to']}; the effective batch stayed as it was"
    return f"{at}: resumed with {event['field']} = {event['now']}, which was {event['was']}"


def _series(events: Sequence[dict[str, Any]], kind: str) -> Series:
    """Losses by step. A step that was done again counts as it was done last."""
    return {e["step"]: e["loss"] for e in events if e["event"] == kind and e.get("loss") is not None}
