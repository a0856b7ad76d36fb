"""The tables of docs/results.md name the keys of real results, and the fields of all events in the code."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import strop
from strop import testing
from tests import ROOT

PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
ROWS = [{"prompt": f"what is {n}", "completion": str(n)} for n in range(4)]


def table(section: str) -> list[list[str]]:
    """Return the cells of the rows of a section's table."""
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:3] == "| `"]


def keys(section: str) -> set[str]:
    return {key for cells in table(section) for key in re.findall(r"`(\w+)`", cells[0])}


def fields() -> dict[str, set[str]]:
    """Return the fields of each kind of event."""
    return {cells[0].strip("`"): set(re.findall(r"`(\w+)`", cells[2])) for cells in table("Events")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> strop.Run:
    folder = tmp_path_factory.mktemp("results")
    return testing.tiny_run(folder, **{"data.eval": "25%", "train.eval_steps": 2, "train.samples": 1})


def test_report_and_evaluation_have_the_keys_of_the_page(run: strop.Run) -> None:
    report = keys("The report")
    unused = {"images", "model", "disk_wait_s", "copy_wait_s", "error"}
    of_evaluation = {"evaluation", "intervals", "samples", "general", "tasks", "regression"}
    assert set(run.report) == report - unused - of_evaluation
    result = strop.evaluate(run, ROWS, max_new_tokens=2, regression_data=ROWS, judge=lambda *texts: 0)
    assert set(result) == keys("Evaluation") - {"general", "tasks", "interrupted", "unfinished", "metric_errors"}
    assert set(run.report) == report - unused - {"general", "tasks"}
    cells = {cells[0]: cells[1] for cells in table("Evaluation")}
    assert all(f"`{key}`" in cells["`answers`"] for key in result["answers"])
    assert all(key == "exact" or f"`{key}`" in cells["`base`, `tuned`"] for key in result["tuned"])
    assert all(f"`{key}`" in cells["`samples`"] for key in result["samples"][0])
    leaders = strop.evaluate([run.folder, run.folder], ROWS, max_new_tokens=2)["leaderboard"]
    assert all(f"`{key}`" in PAGE.partition("`leaderboard`, best first")[2] for key in leaders[0])


def test_check_has_the_keys_of_the_page() -> None:
    report = strop.check(model="demo", data=ROWS)
    assert set(report) == keys("Check")
    named = "".join(cell for cells in table("Check") for cell in cells)
    parts = [report[name] for name in ("rows", "tokens", "stop_token", "duplicates", "padding")]
    assert all(f"`{key}`" in named for part in parts for key in part)


def test_events_have_the_fields_of_the_page(run: strop.Run) -> None:
    known = fields()
    kinds = set[str]()
    for event in run.events:
        kinds.add(event["event"])
        assert set(event) - {"event", "time"} <= known[event["event"]], event
    assert {"machine", "recipe", "data", "start", "rehearsal", "step", "eval", "samples", "save", "end"} <= kinds
    samples = next(event for event in run.events if event["event"] == "samples")["samples"]
    assert set(samples[0]) <= known["samples"]


def test_all_events_of_the_code_are_on_the_page() -> None:
    known, kinds = fields(), set[str]()
    for file in (ROOT / "src" / "strop" / "training").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "emit"):
                continue
            values = node.args[0]
            for kind in [values.value] if isinstance(values, ast.Constant) else ["skip", "doubt"]:
                named = {keyword.arg for keyword in node.keywords} - {None}
                assert named <= known[str(kind)], f"{file.name}:{node.lineno}"
                kinds.add(str(kind))
    assert kinds == set(known)


def test_events_of_a_resumed_run_leave_out_undone_steps(run: strop.Run, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = run.events
    file = Path(run.folder) / "events.jsonl"
    lines = file.read_text(encoding="utf-8")
    resume = {"event": "resume", "time": 0.0, "step": 2, "checkpoint": "step-000002"}
    file.write_text(lines + json.dumps(resume) + "\n", encoding="utf-8")
    try:
        kept = [event["step"] for event in run.events if event["event"] == "step"]
    finally:
        file.write_text(lines, encoding="utf-8")
    assert kept == [1, 2] and [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4]
