"""Figures of the README are those of the files that the benchmarks keep."""

from __future__ import annotations

import json
import statistics
from typing import Any

from tests import ROOT
from tests.support.scripts import script

README, RESULTS = (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "benchmarks" / "results"
WORDS = " ".join(README.split())


def kept(name: str) -> Any:
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    assert found["commit"] and found["date"] and found["machine"]["cpu"] and found["versions"]["torch"]
    return found["results"]


def test_the_demo() -> None:
    found = kept("newcomer.json")
    low, high = found["intervals"]["tuned"]
    score = found["evaluation"]["tuned"]["exact_json"]
    assert f"**{found['evaluation']['base']['exact_json']:.0%} exact before, {score:.1%} after**" in WORDS.replace(
        " %", "%"
    )
    assert f"(95 % interval {100 * low:.1f} to {100 * high:.1f}; {found['training_s']:.0f} s of training" in WORDS
    assert f"{found['seconds'] / 60:.0f} minutes from the clone" in WORDS


def test_the_plan() -> None:
    errors = [
        abs(script(ROOT / "benchmarks" / "plan_memory.py").error_of(run))
        for run in kept("plan_memory.json")
        if not run["fitted"]
    ]
    said = (
        f"median error {100 * statistics.median(errors):.1f} %, worst {100 * max(errors):.1f} % of {len(errors)} runs"
    )
    assert said in WORDS
