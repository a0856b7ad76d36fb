"""What happened in a run, one JSON object a line. The same objects go to callbacks, the progress bar and trackers.

Every event has `event` (its kind) and `time` (seconds since 1970). Kinds: machine, recipe, data, start, resume,
override, rehearsal, reference, reference-check, step, eval, save, skip, doubt, rollback, shrink, note, stop, end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Listener = Callable[[Event], None]


class EventLog:
    """Appends events to a file and passes each to the listeners."""

    def __init__(self, path: Path | None, listeners: Sequence[Listener] = ()) -> None:
        """path: None for a process that keeps silent, since another one tells."""
        self._path = path
        self._listeners = tuple(listeners)
        if path is None:
            return
        whole = path.read_bytes() if path.is_file() else b""
        if whole and not whole.endswith(b"\n"):  # a crash cut the last line short; the next must not grow on it
            os.truncate(path, whole.rfind(b"\n") + 1)  # never written anew: a full disk would take all that was there

    def emit(self, kind: str, **fields: Any) -> None:
        if self._path is None:
            return
        event: Event = {"event": kind, "time": round(time.time(), 3), **fields}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
        for listener in self._listeners:
            listener(event)


def read_events(path: Path) -> list[Event]:
    """The events of a run. Lines that a crash or a bad disk has damaged are left out."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    read = (parse_event(line) for line in lines[:-1])  # what follows the last newline was cut short
    return [event for event in read if event is not None]


def without_undone(events: Sequence[Event]) -> list[Event]:
    """Without the steps and evaluations that were undone: those after the step that a resume or a roll-back went back
    to."""
    found: list[Event] = []
    for event in events:
        if (back := rewound_to(event)) is not None:
            found = [e for e in found if e["event"] not in ("step", "eval") or e["step"] <= back]
        found.append(event)
    return found


def rewound_to(event: Event) -> int | None:
    """The step that a resume or a roll-back went back to: what stands behind it was undone. None for other events."""
    named = {"resume": "step", "rollback": "to"}.get(event["event"])
    return None if named is None else int(event[named])


def parse_event(line: str | bytes) -> Event | None:
    """The event of a line; None where it is damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "event" in found else None
