"""Runs, adapters and caches written by strop 0.1 (commit 078e0e2) load, resume and merge with the current code.

tests/fixtures/v0.1 has a tiny base, an nf4 run of 8 steps with only the checkpoint of step 4, a finished DPO run with a
new token, and their cache (tokenized rows, quantized weights).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import strop
from tests import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "v0.1"
ALLOWED = ["versions"]  # a resume refuses other major versions of its libraries unless they are allowed


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the fixtures as the current folder, with absolute paths in its files that point to the copy."""
    folder = tmp_path / "v0.1"
    shutil.copytree(FIXTURES, folder)
    for file in [*folder.glob("runs/*/lock.json"), *folder.glob("runs/*/adapter/*.json")]:
        file.write_text(file.read_text(encoding="utf-8").replace("@FOLDER@", str(folder)), encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("STROP_CACHE", str(folder / "cache"))
    return folder


def step_losses(run: Path) -> dict[int, float]:
    """Return the loss of each step, the last one for a repeated step."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def cached_files(folder: Path) -> dict[str, bytes]:
    files = [file for file in (folder / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if "precision" not in file.parts}


def test_interrupted_run_resumes_from_its_checkpoint_with_equal_losses(workspace: Path) -> None:
    run = workspace / "runs" / "nf4"
    expected = step_losses(run)
    events_before = (run / "events.jsonl").read_text(encoding="utf-8")

    report = strop.resume(run, allow_changed=ALLOWED).report

    assert report["steps"] == 8
    resumed = (run / "events.jsonl").read_text(encoding="utf-8").removeprefix(events_before)
    repeated = [json.loads(line)["step"] for line in resumed.splitlines() if '"event": "step"' in line]
    assert repeated == [5, 6, 7, 8]
    assert step_losses(run) == pytest.approx(expected, rel=1e-4)


def test_cached_rows_and_quantized_weights_are_used_again(workspace: Path) -> None:
    before = cached_files(workspace)
    strop.resume("runs/nf4", allow_changed=ALLOWED)
    assert cached_files(workspace) == before


def test_finished_run_is_left_unchanged_by_resume(workspace: Path) -> None:
    adapter = (workspace / "runs" / "dpo" / "adapter" / "adapter_model.safetensors").read_bytes()
    strop.resume("runs/dpo", allow_changed=ALLOWED)
    assert (workspace / "runs" / "dpo" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize(("name", "tokens"), [("nf4", " sun sun sun sun"), ("dpo", "zzzz")])
def test_adapter_generates_what_it_did(workspace: Path, name: str, tokens: str) -> None:
    assert strop.load(f"runs/{name}").generate("what is 1", max_new_tokens=4) == [tokens]


@pytest.mark.parametrize("name", ["nf4", "dpo"])
def test_adapter_merges_within_the_parity_limit(workspace: Path, name: str) -> None:
    merged = strop.merge(f"runs/{name}", workspace / "merged")
    assert merged.parity is not None
    assert merged.parity.passed
    assert (workspace / "merged" / "model.safetensors.index.json").is_file()
