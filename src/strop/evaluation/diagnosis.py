"""Diagnose a run from its events: a rising loss, overfitting, no learning, and recoveries from errors."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from strop.config.schema import OBJECTIVE_OPTIONS
from strop.errors import TROUBLESHOOTING_PAGE
from strop.runs.events import drop_undone_events

Losses = dict[int, float]  # by step
FLAT_HINT, RISING_HINT = (f"see {TROUBLESHOOTING_PAGE}#{anchor}" for anchor in ("flat", "rising"))
MIN_STEPS = 20  # shorter runs are not diagnosed as not learning
# The training loss is reported as rising above these bounds. Those of short runs are higher, because a few losses of
# batches with one row may rise by chance.
RISE_SIGMAS, MIN_RISE_SHARE, MIN_RISE_NATS = 6.0, 0.2, 0.1  # standard errors, share of the loss, nats
SHORT_STEPS, SHORT_RISE_NATS = 8, 10.0  # in runs of fewer steps
MEDIUM_RISE_NATS = 4.0  # in runs of fewer than MIN_STEPS steps
MAX_CHOSEN_DROP = 0.1  # nats per token by which the chosen answers may become less likely
RECOVERIES = ("rollback", "shrink", "override")  # events that are reported
MAX_EQUAL_GROUPS = 0.9  # maximum share of groups with equal rewards, from which nothing is learned
MAX_CUT_OFF = 0.9  # maximum share of completions that reach the length limit
MIN_CUT_OFF = 0.01  # smallest share that is reported
MIN_WEIGHT_CHANGE = 1e-4  # smallest relative change of the weights that affects outputs
# inputs with which the loss is measured; new tokens change the labels
_MEASURED_PARTS = ("data", "teacher", "template", "rewards", "environment", "lora.new_tokens")
_SCALES = ("lora.alpha", "lora.alpha_pattern", "lora.use_rslora")
# options of objectives that change what a model learns or how it answers, but not how it is measured
_UNMEASURED = (
    "turns", "reward_timeout", "group", "answer_tokens", "group_loss", "clip_low", "clip_high", "updates", "pooling",
)  # fmt: skip


def diagnose(events: Sequence[dict[str, Any]], weight_change: float | None) -> list[str]:
    """Return one sentence per finding. weight_change: size of the adapter's change relative to the base weights."""
    events = drop_undone_events(events)
    starts = [i for i, event in enumerate(events) if event["event"] == "override" and changes_loss(event["field"])]
    comparable = events[starts[-1] :] if starts else events
    train, evaluated = _read_losses(comparable, "step"), _read_losses(comparable, "eval")
    # Without duplicates, because a resumed run repeats some events.
    recoveries = dict.fromkeys(_describe_recovery(event) for event in events if event["event"] in RECOVERIES)
    if reward_steps := [event for event in events if event["event"] == "step" and "reward" in event]:
        return [*_check_rewards(reward_steps), *recoveries]
    rates = [event["learning_rate"] for event in comparable if event["event"] == "step" and "learning_rate" in event]
    skipped = sum(event["event"] == "skip" for event in events)
    if skipped and not any(event["event"] == "step" for event in events):
        text = f"nothing was trained: all {skipped} updates were skipped, because the loss or a gradient was not finite"
        return [text, *recoveries]
    findings = _check_rise(train, max(rates, default=None)) or _check_learning(train, weight_change)
    return [*findings, *_check_overfitting(train, evaluated), *_check_chosen(events), *recoveries]


def _check_overfitting(train: Losses, evaluated: Losses) -> list[str]:
    """Report a final evaluation loss that is at least 2 % above the best one."""
    if len(evaluated) < 2:
        return []
    best = min(evaluated, key=lambda step: evaluated[step])
    last = max(evaluated)
    before = [loss for step, loss in train.items() if step <= best]
    after = [loss for step, loss in train.items() if step > best]
    before = before[-len(after) :]  # as many steps as after
    if not after or not before or evaluated[last] < 1.02 * evaluated[best]:
        return []
    low, high = f"{evaluated[best]:.3f} (step {best}, kept)", f"{evaluated[last]:.3f} (step {last})"
    rise = f"the evaluation loss rose from {low} to {high}"
    if statistics.mean(after) < statistics.mean(before):
        return [f"overfitting: {rise} while the training loss fell: train for fewer epochs, or give more rows"]
    return [f"getting worse: {rise} and the training loss did not fall: lower the learning rate"]


def _check_rise(train: Losses, rate: float | None) -> list[str]:
    """Report a training loss that is far higher at the end. rate: the highest learning rate, or None if unknown."""
    rise = _find_rise([loss for _, loss in sorted(train.items())])
    if rise is None:
        return []
    lower = "lower train.learning_rate" + (f", for example to {rate / 10:.2g}" if rate else "")
    return [f"diverging: the training loss rose from {rise[0]:.3f} to {rise[1]:.3f}: {lower} ({RISING_HINT})"]


def _find_rise(losses: Sequence[float]) -> tuple[float, float] | None:
    """Return the loss before and after a rise, or None if there is none.

    In a long run, the last fifth is compared with the lowest fifth before it. In a short run, all losses of the second
    half must be above those of the start.
    """
    if len(losses) < 2:
        return None
    if len(losses) < MIN_STEPS:
        is_short = len(losses) < SHORT_STEPS
        first, last = max(losses[: 1 if is_short else 2]), min(losses[-(len(losses) // 2) :])
        needed = max(abs(first), SHORT_RISE_NATS if is_short else MEDIUM_RISE_NATS)
        return (losses[0], losses[-1]) if last - first > needed else None
    n = max(5, len(losses) // 5)
    parts = [losses[start : start + n] for start in range(0, len(losses) - 2 * n + 1, n)]
    first, last, noise = _compute_trend([*min(parts, key=statistics.mean), *losses[-n:]], n)
    needed = max(RISE_SIGMAS * noise, MIN_RISE_SHARE * abs(first), MIN_RISE_NATS)
    return (first, last) if last - first > needed else None


def _check_learning(train: Losses, weight_change: float | None) -> list[str]:
    losses = [loss for _, loss in sorted(train.items())]
    if len(losses) < MIN_STEPS:
        return []
    first, last, noise = _compute_trend(losses)
    n = max(5, len(losses) // 5)
    if max(losses[-n:]) < min(losses[:n]):  # a fall within the first steps is no noise
        return []
    if first - last > 2 * noise and first - last > 0.01 * abs(first):
        return []
    lowest = min(statistics.mean(losses[start : start + n]) for start in range(len(losses) - n + 1))
    if lowest < first / 2:  # it fell far, and rose again
        what = f"unstable: the training loss fell from {first:.3f} to {lowest:.3f}, and was {last:.3f} at the end"
        return [f"{what}: lower train.learning_rate ({RISING_HINT})"]
    flat = f"not learning: the training loss went from {first:.3f} to {last:.3f}"
    if weight_change is not None and weight_change < MIN_WEIGHT_CHANGE:
        change = f"the adapters changed their weights by {weight_change:.1e} of their size"
        return [f"{flat}, and {change}: the learning rate is too small, try 10 times as much ({FLAT_HINT})"]
    return [f"{flat}: see with `strop check` what is trained on, or try another learning rate ({FLAT_HINT})"]


def _check_rewards(steps: Sequence[dict[str, Any]]) -> list[str]:
    """Report groups with equal rewards, truncated completions, or else a reward that does not rise."""
    equal, stopped = (statistics.mean(event[name] for event in steps) for name in ("equal_groups", "stop_rate"))
    findings = []
    if stopped < 1 - MAX_CUT_OFF:
        findings.append(f"{1 - stopped:.0%} of the completions were cut off: raise train.answer_tokens")
    if equal > MAX_EQUAL_GROUPS:
        findings.append(
            f"{equal:.0%} of the groups had equal rewards, from which nothing is learned: use prompts that are "
            "sometimes answered well, or a reward with steps between 0 and 1"
        )
    if findings:
        return findings
    if stopped < 1 - MIN_CUT_OFF:
        findings = [f"{1 - stopped:.1%} of the completions were cut off; train.answer_tokens sets the limit"]
    return findings + _check_reward_trend(steps)


def _check_reward_trend(steps: Sequence[dict[str, Any]]) -> list[str]:
    if len(steps) < MIN_STEPS:
        return []
    first, last, noise = _compute_trend([event["reward"] for event in steps])
    if last - first > 2 * noise:
        return []
    return [
        f"the reward of completions went from {first:.3f} to {last:.3f}, within its noise: train longer, sample larger "
        f"groups, or try another learning rate ({FLAT_HINT})"
    ]


def _compute_trend(values: Sequence[float], n: int | None = None) -> tuple[float, float, float]:
    """Return the means of the first and the last n values (a fifth), and the standard error of their difference."""
    n = n or max(5, len(values) // 5)
    first, last = values[:n], values[-n:]
    noise = ((statistics.variance(first) + statistics.variance(last)) / n) ** 0.5
    return statistics.mean(first), statistics.mean(last), noise


def _check_chosen(events: Sequence[dict[str, Any]]) -> list[str]:
    """Report preference training that made the chosen answers less likely."""
    steps = [event for event in events if event["event"] == "step" and "chosen_change" in event]
    if len(steps) < MIN_STEPS:
        return []
    last = steps[-max(5, len(steps) // 5) :]
    chosen, rejected = (statistics.mean(event[f"{side}_change"] for event in last) for side in ("chosen", "rejected"))
    if chosen > -MAX_CHOSEN_DROP:
        return []
    return [
        f"the chosen answers became less likely too, by {-chosen:.2f} nats per token (the rejected ones by "
        f"{-rejected:.2f}), so the margin grew because both fell; train.sft_weight 1 keeps the chosen ones likely"
    ]


def _describe_recovery(event: dict[str, Any]) -> str:
    step = f"step {event['step']}"
    if event["event"] == "rollback":
        return (
            f"after {step}: {event['why']}: went back to step {event['to']}, skipped {len(event['passed'])} batches, "
            f"and continued with {event['rate_scale']:g} times the learning rate"
        )
    if event["event"] == "shrink":
        return f"{step}: out of memory: continued with {event['to']}; the effective batch did not change"
    return f"{step}: resumed with {event['field']} = {event['now']}, which was {event['was']}"


def _read_losses(events: Sequence[dict[str, Any]], kind: str) -> Losses:
    """Return the losses of "step" or "eval" events, without steps that have only rows of train.keep.

    If a step was repeated, the last loss counts.
    """
    with_loss = (event for event in events if event["event"] == kind and event.get("loss") is not None)
    return {event["step"]: event["loss"] for event in with_loss if event.get("kept") != event["loss"]}


def changes_loss(name: str) -> bool:
    """Return whether losses before and after a change cannot be compared: another measure, or another model.

    name: a field or input that changed.
    """
    of_model = name in ("base", *_SCALES) or name.startswith("model.")
    return changes_measure(name) or of_model or name.removeprefix("train.") in _UNMEASURED


def changes_measure(name: str) -> bool:
    """Return whether the loss of the same model is another one after a change of the field or input `name`."""
    section, _, field = name.partition(".")
    is_measured = field == "objective" or field.startswith("teacher") or field in {*OBJECTIVE_OPTIONS} - {*_UNMEASURED}
    return name in _MEASURED_PARTS or section == "data" or (section == "train" and is_measured)
