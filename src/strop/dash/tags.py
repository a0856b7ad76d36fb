"""What happened in a run, in words, for the marks on its curves."""

from __future__ import annotations

import math
from typing import Any

LEVELS = {
    "skip": "warning", "doubt": "warning", "rollback": "bad", "shrink": "warning", "stop": "warning", "note": "warning",
    "end": "good",
}  # fmt: skip
_SILENT = ("machine", "recipe", "data", "step", "eval")


def mark_of(event: dict[str, Any]) -> dict[str, Any] | None:
    """kind, step, time, text, level and the event itself; None for events that are no marks."""
    kind = str(event.get("event"))
    if kind in _SILENT:
        return None
    level = LEVELS.get(kind, "info")
    if kind == "stop" and event.get("advice") is not None:
        level = "bad"
    step = event.get("step")
    whole = isinstance(step, int) and not isinstance(step, bool)
    return {
        "kind": kind, "step": step if whole else None, "time": event.get("time"), "text": _words(kind, event),
        "level": level, "event": event,
    }  # fmt: skip


def _words(kind: str, event: dict[str, Any]) -> str:
    step, why = event.get("step"), str(event.get("why") or "")
    if kind == "start":
        parameters = event.get("parameters") or {}
        trained = f", {parameters['trainable']:,} weights trained" if _whole(parameters.get("trainable")) else ""
        return f"starts at step {step} of {event.get('steps')} with the {event.get('engine')} step{trained}"
    if kind == "resume":
        return f"goes on from step {step} ({event.get('checkpoint')})"
    if kind == "save":
        return f"saved {event.get('checkpoint')}"
    if kind == "skip":
        return f"step {step} was not taken: {why}{_rows(event)}"
    if kind == "doubt":
        return f"step {step} was taken and is watched: {why}{_rows(event)}"
    if kind == "rollback":
        scale = event.get("rate_scale")
        slower = f"; learning rate times {scale:g}" if isinstance(scale, (int, float)) else ""
        return f"went back from step {step} to {event.get('to')}: {why}{slower}"
    if kind == "override":
        return f"{event.get('field')} changed from {event.get('was')} to {event.get('now')}"
    if kind == "stop":
        advice = [str(one) for one in event.get("advice") or []]
        said = "stopped by a signal, after saving" if why == "signal" else f"stopped: {why}"
        return "; ".join([said, *advice])
    if kind == "rehearsal" and _whole(event.get("predicted_bytes")) and _whole(event.get("usable_bytes")):
        need, usable = event["predicted_bytes"] / 2**30, event["usable_bytes"] / 2**30
        tried = "its largest micro-batch was tried" if event.get("done") else "far below what there is: nothing to try"
        return f"{need:.2f} GiB predicted, {usable:.1f} usable: {tried}"
    if kind == "shrink":
        return f"out of memory at step {step}; now {event.get('to')}: {why}"
    if kind == "end":
        return f"finished at step {step}"
    if kind == "note":
        return str(event.get("text", ""))
    rest = {key: value for key, value in event.items() if key not in ("event", "time", "step", "rows")}
    said = ", ".join(f"{key} {_plain(value)}" for key, value in rest.items() if value is not None)
    return f"{kind}: {said}" if said else kind


def _rows(event: dict[str, Any]) -> str:
    rows = [str(row) for row in event.get("rows") or []]
    return f" (rows {', '.join(rows[:4])}{', ...' if len(rows) > 4 else ''})" if rows else ""


def _plain(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return f"{value:,}" if _whole(value) else str(value)[:200]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
