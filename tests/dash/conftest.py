"""Run folders for the page: a tiny run with an evaluation, a copy with hostile text, and a broken run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import open_browser
from tests.support.dash import Dash, run_dash

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>\u202e\" onclick=alert(1) '</script>${1}"
HOSTILE_NAME = '<img src=x onerror=document.title=1> & "quotes" \'n %2f #x?y'


@pytest.fixture(scope="session")
def dashboard(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Return a working folder with a model, rows, held-out rows, and three runs in runs/."""
    from strop import train
    from strop.engine.decode.model import load
    from strop.evaluation.compare import compare
    from strop.evaluation.run import add_to_report, read_conversations
    from strop.runs.folder import RunFolder
    from tests.support.tiny import write_rows

    folder = tmp_path_factory.mktemp("dashboard")
    shutil.copytree(tiny_folder, folder / "tiny-model")
    rows, held_out = write_rows(folder / "rows.jsonl", 24), write_rows(folder / "held-out.jsonl", 10)
    with rows.open("a", encoding="utf-8") as file:  # an invalid row, and one with markup
        file.write('{"messages": []}\n')
        hostile = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
        file.write(json.dumps({"messages": hostile}) + "\n")
    one = folder / "runs" / "one"
    options = {"train.epochs": 4, "train.batch_size": 4, "lora.r": 4, "model.dtype": "fp32", "data.bad_rows": "drop"}
    train(model=str(folder / "tiny-model"), data=str(rows), out=str(one), **options, **{"data.eval": str(held_out)})
    result = compare(load(one), read_conversations(str(held_out)), metric="exact", max_new_tokens=8)
    add_to_report(RunFolder(one), {"run": str(one), **result})
    _hostile(one, folder / "runs" / HOSTILE_NAME)
    _broken(one, folder / "runs" / "broken")
    return folder


def _hostile(one: Path, folder: Path) -> None:
    """Copy a run and replace all text in its files by hostile text, except names of fields and kinds of events."""
    shutil.copytree(one, folder)
    lock = json.loads((folder / "lock.json").read_text(encoding="utf-8"))
    for name in ("model.name", "data.train", "train.objective", "preset", "model.quantization"):
        lock["values"][name] = HOSTILE
    lock["base"]["name"] = HOSTILE
    lock["versions"]["strop"] = HOSTILE
    (folder / "lock.json").write_text(json.dumps(lock), encoding="utf-8")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    for event in events:
        if event["event"] == "machine":
            event["lines"] = [HOSTILE]
        if event["event"] == "recipe":
            for choice in event["choices"]:
                choice |= {"value": HOSTILE, "why": HOSTILE, "origin": HOSTILE}
    at = {"time": events[-1]["time"], "step": 3}
    events += [{"event": "note", **at, "text": HOSTILE}, {"event": "skip", **at, "why": HOSTILE, "rows": [HOSTILE]}]
    events += [
        {"event": "stop", **at, "why": HOSTILE},
        {"event": "override", **at, "field": HOSTILE, "was": HOSTILE, "now": 1},
        {"event": "samples", **at, "samples": [{"prompt": HOSTILE, "reference": HOSTILE, "completion": HOSTILE}]},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report |= {"diagnosis": [HOSTILE], "adapter": HOSTILE}
    for sample in report["samples"]:
        sample |= {"prompt": HOSTILE, "gold": HOSTILE, "base": HOSTILE + "x", "tuned": "y" + HOSTILE}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _broken(one: Path, folder: Path) -> None:
    """Create a run whose process has ended without a final event or a report, after a step skipped for NaN."""
    shutil.copytree(one, folder)
    (folder / "report.json").unlink()
    shutil.rmtree(folder / "adapter")
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    steps = [place for place, line in enumerate(lines) if '"event": "step"' in line]
    skip: dict[str, Any] = {"event": "skip", "time": time.time(), "step": 6, "why": "loss is not finite", "rows": []}
    text = "".join([*lines[: steps[5]], json.dumps(skip) + "\n", *lines[steps[5] : steps[7]]])
    (folder / "events.jsonl").write_text(text, encoding="utf-8")
    (folder / "claim.json").write_text(json.dumps({"pid": 2**22 - 3, "started": 1.0}), encoding="utf-8")


@pytest.fixture(scope="session")
def dash(dashboard: Path) -> Iterator[Dash]:
    with run_dash(Path("runs"), dashboard) as started:
        yield started


@pytest.fixture(scope="module")  # playwright's event loop runs in this thread, so no other test could start one
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened
