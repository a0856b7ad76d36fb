"""Job files on real cluster systems: a tiny recipe, the run they must equal, and what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny import write_rows

ASKED = bool(os.environ.get("STROP_SCALE"))
WHY_NOT = "a long test: `make scale` runs it"
FIRST = "a b/recipe's.yaml"  # found only if quoted correctly


def write_recipe(folder: Path, model: Path, *, steps: int) -> Path:
    """Write a recipe for CPU processes, bit-identical on any number of them, with its rows next to it."""
    file = folder / FIRST
    file.parent.mkdir(parents=True)
    write_rows(folder / "rows.jsonl", 24)
    recipe = {
        "model": {"name": str(model), "dtype": "fp32", "device": "cpu"},
        "data": {"train": "rows.jsonl"},
        "lora": {"r": 4, "dropout": 0.1},
        "train": {
            "max_steps": steps, "batch_size": 4, "micro_batch": 1, "exact": True, "save_steps": 5, "timeout": "60s",
            "gradient_checkpointing": "off",
        },
    }  # fmt: skip
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def strop(*words: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the JSON output of a command, which must exit with 0."""
    command = [sys.executable, "-m", "strop.cli", *map(str, words), "--json"]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the complete events of this kind."""
    file = run / "events.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    every = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in every if event["event"] == kind]


def until(run: Path, step: int, seconds: float = 600) -> None:
    """Wait for a step of a run."""
    end = time.monotonic() + seconds
    while not any(event["step"] >= step for event in events(run, "step")):
        assert time.monotonic() < end, "the run does not begin"
        time.sleep(0.05)
