"""What a run is doing: by the process that holds its folder, by the age of its last event, and by how it ended.

Nothing here is remembered from an earlier look but how much of a core a process has used since.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import psutil

State = Literal["running", "stalled", "stopped", "crashed", "finished"]
LEAST_STALLED_S = 120.0  # no event for so long, and for GAPS times the usual while, is a run that does not go on
LOADING_STALLED_S = 1800.0  # before the first step: a model may have to be downloaded
BUSY_STALLED_S = 1800.0  # while the process computes: an evaluation is one event
GAPS, LONGEST_GAPS = 20, 5
BUSY = 0.2  # of a core


@dataclass(frozen=True)
class Standing:
    state: State
    why: str
    phase: str | None


class Watch:
    """How busy processes are, from one look to the next."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float, float | None]] = {}

    def share(self, pid: int) -> float | None:
        """Cores in use since the look before, at least a second ago; None at the first."""
        try:
            used = psutil.Process(pid).cpu_times()
        except psutil.Error:
            self._seen.pop(pid, None)
            return None
        now, spent = time.monotonic(), used.user + used.system
        before = self._seen.get(pid)
        if before is not None and now - before[0] < 1:
            return before[2]
        share = None if before is None else (spent - before[1]) / (now - before[0])
        self._seen[pid] = (now, spent, share)
        return share


def standing(
    events: list[dict[str, Any]], report: dict[str, Any], holder: int | None, heartbeat: float, watch: Watch
) -> Standing:
    """events: the last ones. holder: the live process that holds the folder. heartbeat: seconds since 1970."""
    kinds = [str(event.get("event")) for event in events]
    if holder is not None:
        return _live(events, kinds, holder, heartbeat, watch)
    if report.get("exit") == 0 and report.get("ended") != "time":
        ended = {"patience": "no better evaluation loss any more"}.get(str(report.get("ended")), "")
        return Standing("finished", ended, None)
    last = events[-1] if events else {}
    if report.get("exit") == 0:
        return Standing("stopped", "the time budget is spent", None)
    if last.get("event") == "stop":
        why = str(last.get("why") or "")
        return Standing("stopped", "by a signal, after saving" if why == "signal" else why, None)
    return Standing("crashed", "the process has ended and says nothing of why", None)


def _live(events: list[dict[str, Any]], kinds: list[str], holder: int, heartbeat: float, watch: Watch) -> Standing:
    began = max((place for place, kind in enumerate(kinds) if kind == "machine"), default=-1)
    here = kinds[began + 1 :]
    phase = "training" if "step" in here or "start" in here else "loading" if kinds else "preparing"
    age, share = time.time() - heartbeat, watch.share(holder)
    try:
        if psutil.Process(holder).status() == psutil.STATUS_STOPPED:
            return Standing("stalled", "the process is suspended", phase)
    except psutil.Error:
        pass
    limit = LOADING_STALLED_S
    if phase == "training":
        times = [event["time"] for event in events[began + 1 :] if isinstance(event.get("time"), (int, float))]
        gaps = [later - earlier for earlier, later in pairwise(times) if later >= earlier]
        limit = max(LEAST_STALLED_S, GAPS * statistics.median(gaps), LONGEST_GAPS * max(gaps)) if gaps else limit
        if share is not None and share > BUSY:
            limit = max(limit, BUSY_STALLED_S)
    if age <= limit:
        return Standing("running", "", phase)
    busy = "" if share is None else f"; the process uses {share:.0%} of a core"
    return Standing("stalled", f"no event for {_length(age)}{busy}", phase)


def _length(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
