"""The events of a run, one JSON object per line, which callbacks, the progress bar and trackers also receive.

Every event has `event` (its kind), `time` (seconds since 1970), and fields that depend on the kind:

- before the first step: machine, recipe (`changed`: fields with other values than before a resume, None for a new
  run), data, reference, rehearsal (the dry run)
- start, resume, override (a changed setting), stop, end
- step, eval, samples (completions of evaluation prompts), save, reference-check, note. A step of grpo has train.updates
  optimizer steps: its loss, kl, clip_share and grad_norm are those of the last one, its tokens those of all
- answers: a sampled completion of a step and its reward; in an environment all `messages` of its trace. The step
  event then has the means of turns, tool_calls, tool_errors and truncated over its traces
- skip (a rejected update), doubt (an applied update with an unusual loss), rollback
- shrink (a setting that was changed after running out of memory)
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)
TURN_CHARACTERS = 400  # longer messages are cut where a trace is shown

SIGNAL, INTERRUPTED = "signal", "interrupted; checkpoints that were saved before are intact"
ON_REQUEST = (SIGNAL, INTERRUPTED)  # reasons of a stop that the user asked for

Event = dict[str, Any]
Listener = Callable[[Event], None]


REPEATED = ("step", "eval", "samples", "answers")  # kinds of events that are repeated with their step
RECOVERIES = ("skip", "doubt", "rollback")
_SIDES = {"chosen": "Chosen", "rejected": "Rejected", "desirable": "Desirable", "undesirable": "Undesirable"}
STEP_TITLES = {  # field of a "step" event -> title of its curve
    "learning_rate": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_s": "Tokens/s",
    "kept": "General prompts, divergence from the base", "accuracy": "Accuracy", "margin": "Reward margin",
    "reward": "Reward of completions", "reward_spread": "Reward, standard deviation in a group",
    "kl": "KL divergence from the reference", "teacher_kl": "KL divergence from the teacher",
    "answer_length": "Tokens per completion", "stop_rate": "Completions that end with a stop token",
    "clip_share": "Tokens clipped", "off": "Log-probability, sampling against training",
    "turns": "Turns per trace", "tool_calls": "Tool calls per trace", "tool_errors": "Tool errors per trace",
    "truncated": "Traces cut at a limit", "equal_groups": "Groups with equal rewards",
    **{f"{side}_reward": f"{name}, reward" for side, name in _SIDES.items()},
    **{f"{side}_nats": f"{name}, log-probability per token" for side, name in _SIDES.items()},
    **{f"{side}_change": f"{name}, log-probability change per token" for side, name in _SIDES.items()},
    "resident_bytes": "Process memory after each step", "allocated_bytes": "GPU memory, allocated after each step",
}  # fmt: skip


SLOW_FACTOR, SLOW_SECONDS = 1.5, 10.0  # a run is slower than planned above this multiple of the plan and this excess
SLOW_STEPS = 3  # first step that is compared with the plan


class EndTraining(Exception):
    """Raised by a listener to end training after an evaluation or a resume, as if the recipe ended there.

    reason: why training ended, in one word, for report.json.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class EventLog:
    """Append events to a file and pass each to the listeners. path: None to ignore all events.

    `end_reason` is the reason of a listener that raised EndTraining, or "".
    """

    def __init__(self, path: Path | None, listeners: Sequence[Listener] = ()) -> None:
        self._path, self._listeners, self.end_reason = path, tuple(listeners), ""
        if path is None:
            return
        content = path.read_bytes() if path.is_file() else b""
        if content and not content.endswith(b"\n"):  # remove a last line that a crash cut short
            os.truncate(path, content.rfind(b"\n") + 1)  # not rewritten, which on a full disk could lose all events

    def emit(self, kind: str, **fields: Any) -> None:
        if self._path is None:
            return
        event: Event = {"event": kind, "time": round(time.time(), 3), **fields}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
        for listener in self._listeners:
            try:
                listener(event)
            except EndTraining as request:
                self.end_reason = request.reason
            except Exception as error:
                run, name = self._path.parent, type(error).__name__
                if steps := [int(path.name[5:]) for path in run.glob("checkpoints/step-*") if path.name[5:].isdigit()]:
                    text = "the callback raised %s; strop.resume(%r) continues the run after step %d"
                    LOG.warning(text, name, str(run), max(steps))
                raise


def plan_of_steps(step: Any, steps: Any, predicted_seconds: Any) -> float | None:
    """Return the planned seconds of the steps so far; None if there is no plan or it is too early to compare with it.

    predicted_seconds: of all steps, as in a "rehearsal" event.
    """
    if not all(isinstance(value, int | float) for value in (step, steps, predicted_seconds)) or step < SLOW_STEPS:
        return None
    return float(predicted_seconds * step / max(1, steps))


def is_slower_than_planned(seconds: float, planned: float | None) -> bool:
    """Return whether training took clearly longer than the plan. Both are in seconds, of the same steps."""
    return planned is not None and seconds > max(SLOW_FACTOR * planned, planned + SLOW_SECONDS)


def read_events(path: Path) -> list[Event]:
    """Return the events of a run, without damaged lines."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    events = map(parse_event, lines[:-1])  # text after the last newline is incomplete
    return [event for event in events if event is not None]


def drop_undone_events(events: Sequence[Event]) -> list[Event]:
    """Return the events without the steps and evaluations undone by a resume or rollback.

    A resume also undoes the skips and rollbacks after the save from which it continues.
    """
    remaining: list[Event] = []
    for event in events:
        if (step := find_rewind_step(event)) is not None:
            undone = find_undone_recoveries(remaining, step) if event["event"] == "resume" else set[int]()
            remaining = [
                earlier
                for index, earlier in enumerate(remaining)
                if index not in undone and (earlier["event"] not in REPEATED or earlier["step"] <= step)
            ]
        remaining.append(event)
    return remaining


def find_undone_recoveries(events: Sequence[Mapping[str, Any]], step: int) -> set[int]:
    """Return the indices of the skips, doubts and rollbacks that a resume from the checkpoint of `step` undoes."""
    # not by their steps: a step that a rollback undid may be before or after the one that was saved
    saves = [index for index, event in enumerate(events) if event["event"] == "save" and event.get("step") == step]
    return {
        index
        for index, event in enumerate(events)
        if event["event"] in RECOVERIES and (index > saves[-1] if saves else event["step"] > step)
    }


def find_rewind_step(event: Event) -> int | None:
    """Return the step from which a resume or rollback continues, or None for other events."""
    field = {"resume": "step", "rollback": "to"}.get(event["event"])
    return None if field is None else int(event[field])


def count_used(rows: Mapping[str, int]) -> int:
    """Return the number of rows that are used, whole or shortened. rows: `rows` of a report."""
    return sum(rows.get(name, 0) for name in ("used", "truncated", "split"))


def list_row_counts(report: Mapping[str, Any]) -> Iterator[tuple[str, int, bool]]:
    """Yield (name, number of rows, is_part) of a data report: first the totals, then the reasons for dropped rows."""
    rows = report.get("rows") or {}
    held_out = report.get("held_out") or 0
    for name in ("read", "used", "truncated", "split", "dropped"):
        if not isinstance(rows.get(name), int):
            continue
        yield name, count_used(rows) if name == "used" else rows[name], name in ("truncated", "split")
        if name == "used" and held_out:
            yield "trained on", count_used(rows) - held_out, True
            yield "held out for evaluation", held_out, True
    for reason, number in (report.get("by_reason") or {}).items():
        yield str(reason), number, True


def describe_turns(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return messages as lines: `tool(argument=value)` for a call, `-> text` for its result, `(text)` for reasoning."""
    lines = []
    for message in messages:
        reasoning = str(message.get("reasoning_content") or "").strip()[:TURN_CHARACTERS]
        lines += [f"({reasoning})"] if reasoning else []
        content = str(message.get("content") or "").strip()[:TURN_CHARACTERS]
        lines += [f"-> {content}"] if message.get("role") == "tool" else [content] if content else []
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            arguments = function.get("arguments") or {}
            values = arguments.items() if isinstance(arguments, Mapping) else ()
            lines.append(f"{function.get('name')}({', '.join(f'{name}={value!r}' for name, value in values)})")
    return "\n".join(lines)


def split_prompt(messages: Sequence[Mapping[str, Any]]) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """Return the text of the last user message before the first turn of the model, and the messages from that turn."""
    roles = [message.get("role") for message in messages]
    start = roles.index("assistant") if "assistant" in roles else len(messages)
    users = [str(message.get("content") or "") for message in messages[:start] if message.get("role") == "user"]
    return users[-1] if users else "", messages[start:]


def parse_event(line: str | bytes) -> Event | None:
    """Return the event of a line, or None if the line is damaged."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and "event" in event else None
