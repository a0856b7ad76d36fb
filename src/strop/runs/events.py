"""The events of a run, one JSON object per line. Callbacks, the progress bar and trackers get the same objects.

Every event has `event` (its kind) and `time` (seconds since 1970). The kinds are:

- machine, recipe, data, reference, rehearsal (the dry run): before the first step
- start, resume, override (a changed setting), stop, end: of the run
- step, eval, save, reference-check, note
- skip (a rejected update), doubt (an applied update with an unusual loss), rollback
- shrink: a setting that was changed after running out of memory
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# `event` (kind), `time` (seconds since 1970), and fields by kind: machine, recipe, data, start, resume, override,
# rehearsal, reference, reference-check, step, eval, save, skip, doubt, rollback, shrink, note, stop, end
Event = dict[str, Any]
Listener = Callable[[Event], None]


class EventLog:
    """Append events to a file and pass each to the listeners. path: None for processes that emit nothing."""

    def __init__(self, path: Path | None, listeners: Sequence[Listener] = ()) -> None:
        self._path = path
        self._listeners = tuple(listeners)
        if path is None:
            return
        content = path.read_bytes() if path.is_file() else b""
        if content and not content.endswith(b"\n"):  # a crash cut the last line short: remove it
            os.truncate(path, content.rfind(b"\n") + 1)  # in place: rewriting could lose all events on a full disk

    def emit(self, kind: str, **fields: Any) -> None:
        if self._path is None:
            return
        event: Event = {"event": kind, "time": round(time.time(), 3), **fields}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
        for listener in self._listeners:
            listener(event)


def read_events(path: Path) -> list[Event]:
    """Return the events of a run, without damaged lines."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    events = map(parse_event, lines[:-1])  # text after the last newline is incomplete
    return [event for event in events if event is not None]


def drop_undone_events(events: Sequence[Event]) -> list[Event]:
    """Return the events without the steps and evaluations undone by a resume or rollback."""
    remaining: list[Event] = []
    for event in events:
        if (step := find_rewind_step(event)) is not None:
            remaining = [e for e in remaining if e["event"] not in ("step", "eval") or e["step"] <= step]
        remaining.append(event)
    return remaining


def find_rewind_step(event: Event) -> int | None:
    """Return the step that a resume or rollback restarted from; None for other events."""
    field = {"resume": "step", "rollback": "to"}.get(event["event"])
    return None if field is None else int(event[field])


def parse_event(line: str | bytes) -> Event | None:
    """Return the event of a line, or None if the line is damaged."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and "event" in event else None
