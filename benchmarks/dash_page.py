"""Measure how fast the page of `strop dash` opens a long run and a long table, and the memory of tab and server.

    python benchmarks/dash_page.py --out benchmarks/results/dash_page.json

Needs Chromium and playwright (the `test` extra). The runs are generated files in the trainer's format.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measured import write
from tests.support.browser import at, open_browser
from tests.support.dash import Dash, lines, make_run, run_dash, session, step


def make_long_run(folder: Path, steps: int) -> None:
    """Create a run with a spike, some skipped steps, and an evaluation every 1,000 steps."""
    dice, events = random.Random(0), session(steps=steps)
    for number in range(1, steps + 1):
        loss = 3.0 * number**-0.2 + 0.05 * dice.random() + (9.0 if number == steps // 3 else 0.0)
        events.append(step(number, steps, loss=loss, grad_norm=dice.random()))
        if number % 1000 == 0:
            events.append({"event": "eval", "time": 1000.0 + number, "step": number, "loss": loss, "best": False})
        if number % 20_000 == 0:
            events.append({"event": "skip", "time": 1000.0 + number, "step": number, "why": "loss is not finite"})
    make_run(folder, "long", events)


def measure_opening(browser: Any, dash: Dash, address: str, whole: str) -> tuple[float, dict[str, float]]:
    """Return the seconds from navigation until the screen is complete in a new tab, and its memory in MB after a
    collection.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    started = time.perf_counter()
    page.goto(at(dash, address))
    page.wait_for_selector(whole)
    page.wait_for_selector(".screen:not([aria-busy])")
    seconds = time.perf_counter() - started
    session = context.new_cdp_session(page)
    session.send("Performance.enable")
    session.send("HeapProfiler.collectGarbage")
    metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    memory = {"heap_mb": metrics["JSHeapUsedSize"] / 1e6, "nodes": metrics["Nodes"]}
    context.close()
    return seconds, memory


def measure_idle(
    browser: Any, dash: Dash, address: str, whole: str, server: psutil.Process, seconds: float = 20.0
) -> float:
    """Return the share of one core that the server uses while a tab shows the screen and nothing happens."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(at(dash, address))
    page.wait_for_selector(whole)
    time.sleep(3)
    server.cpu_percent()
    time.sleep(seconds)
    share = server.cpu_percent() / 100
    context.close()
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as place, open_browser() as browser:
        one, many = Path(place) / "one", Path(place) / "many"
        make_long_run(one, args.steps)
        some = lines([*session(), *(step(number) for number in range(1, 101))])
        for number in range(args.runs):
            folder = make_run(many, f"run-{number:03}", [])
            (folder / "events.jsonl").write_text(some, encoding="utf-8")
        for name, folder, address, whole in (
            (f"a run of {args.steps:,} steps", one, "/run/long", ".plot canvas >> nth=3"),
            (f"a table of {args.runs} runs", many, "/runs", f"tbody tr >> nth={args.runs - 1}"),
        ):
            with run_dash(folder) as dash:
                server = psutil.Process(dash.process.pid)
                began = server.memory_info().rss / 1e6
                opens = [measure_opening(browser, dash, address, whole) for _ in range(1 + args.repeats)]
                memory = server.memory_info().rss / 1e6
                share = measure_idle(browser, dash, address, whole, server)
            warm = [seconds for seconds, _ in opens[1:]]
            results[name] = {
                "first_s": opens[0][0], "median_s": statistics.median(warm), "least_s": min(warm), "most_s": max(warm),
                **opens[-1][1], "server_mb_before": began, "server_mb": memory,
                "idle_core_share": share,
            }  # fmt: skip
            print(name, {key: round(value, 3) for key, value in results[name].items()})
    if args.out:
        write(args.out, results)


if __name__ == "__main__":
    main()
