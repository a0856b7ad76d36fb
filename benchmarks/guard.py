"""Measure the cost of the guard, the memory watch and a checkpoint relative to a training step on this machine.

    python benchmarks/guard.py RUN

RUN: a finished run, whose events have the times of steps and saves; the rest is measured here.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from strop.machine.memory import MemoryWatch
from strop.runs.events import read_events
from strop.training.guard import MAX_RECENT, judge_step
from strop.training.state import Progress


def measure_seconds(function: Callable[[], object], times: int = 2000) -> float:
    started = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - started) / times


def main() -> None:
    folder = Path(sys.argv[1])
    events = read_events(folder / "events.jsonl")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    step = report["seconds"] / report["steps"]
    progress = Progress(recent=[1.0 + 0.01 * n for n in range(MAX_RECENT)])
    guard, watch = (
        measure_seconds(lambda: judge_step(progress, 1.3, 0.5)),
        measure_seconds(MemoryWatch(1 << 50, 1 << 50)),
    )
    layers = 2 * 30  # forward, and the backward of recomputed layers
    saves = [event["seconds"] for event in events if event["event"] == "save"]
    print(
        json.dumps(
            {
                "step_s": step,
                "guard_share": guard / step,
                "watch_share_at_60_looks": layers * watch / step,
                "save_s_median": statistics.median(saves),
                "saves": len(saves),
                "save_share": report["save_seconds"] / report["seconds"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
