"""Damaged run folders: the table has a row for them, and requests give an error about damaged files."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

from strop.dash.dashboard import Dashboard
from strop.errors import StropError
from tests.support.dash import evaluated, lines, make_run, sample, session, step

JUNK = [None, True, -1, 1e308, 10**400, "x", "\ud800<b>", [], [[]], {}, {"a": []}, [1, "2"], float("inf"), 2**63]
FULL = {
    "exit": 0, "ended": "steps", "steps": 30, "memory": {"predicted": {"train": {}}}, "recipe": [{"field": "seed"}],
    "intervals": {"base": [0.1, 0.2], "tuned": [0.3, 0.4]},
    "data_report": {"dropped": [{"file": "f"}], "rows": {"used": 3}},
}  # fmt: skip


def spoil(value: Any, random_: random.Random, share: float) -> Any:
    """Return the value with random parts replaced by junk."""
    if random_.random() < share:
        return random_.choice(JUNK)
    if isinstance(value, dict):
        return {key: spoil(inner, random_, share) for key, inner in value.items() if random_.random() > share / 2}
    if isinstance(value, list):
        return [spoil(inner, random_, share) for inner in value]
    return value


def test_damaged_files_raise_run_errors_only(tmp_path: Path) -> None:
    rows = [sample(number, number % 2 == 0, number % 3 == 0) for number in range(6)]
    data = {"event": "data", "time": 1, "report": {"rows": {"used": 20}, "dropped": [{"file": "f", "line": 1}]}}
    others = [
        data, {"event": "rollback", "time": 1, "step": 9, "to": 4, "why": "w", "rate_scale": 0.5},
        {"event": "skip", "step": 3}, {"event": "eval", "time": 1, "step": 9, "loss": 2.0},
        {"event": "stop", "time": 1, "step": 9, "why": "w", "advice": ["a"]},
    ]  # fmt: skip
    steps = [step(number) for number in range(1, 20)]
    events = [*session(), *steps[:9], *others, *steps[4:]]
    good = make_run(tmp_path / "runs", "good", events, FULL)
    evaluated(good, rows)
    for seed in range(120):
        chance = random.Random(seed)
        folder = make_run(tmp_path / "runs", f"run-{seed}", [])
        for name in ("lock.json", "report.json", "answers.json"):
            value = spoil(json.loads((good / name).read_text()), chance, 0.06)
            (folder / name).write_text(json.dumps(value), encoding="utf-8")
        (folder / "events.jsonl").write_text(lines([spoil(event, chance, 0.04) for event in events]), encoding="utf-8")
        (folder / "claim.json").write_text(json.dumps(spoil({"pid": 1, "started": 2.0}, chance, 0.5)))
    dashboard = Dashboard(tmp_path / "runs")
    assert len(dashboard.runs()) == 121
    errors = 0
    for seed in range(120):
        name = f"run-{seed}"
        asks = [
            partial(dashboard.detail, name), partial(dashboard.curves, name, "epoch", 50, None, None, ""),
            partial(dashboard.duplicate, name), partial(dashboard.answers, name, "all", "worst", "x", 0, 9),
            partial(dashboard.ballot, name), partial(dashboard.log, name), partial(dashboard.compare, [name, "good"]),
            partial(dashboard.updates, name, "time", 50, None),
        ]  # fmt: skip
        for ask in asks:
            try:
                ask()
            except StropError as error:
                assert "damaged" in error.what
                errors += 1
    assert errors < 400  # most requests succeed
    assert dashboard.row("good")["why"] == "" and dashboard.answers("good", "all", "row", "", 0, 9)["total"] == 6
