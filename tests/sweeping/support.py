"""Commands, rows and results of sweeps of a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

COLOURS = ("red", "green", "blue")
TIMES = {"seconds", "train_s", "peak_bytes", "predicted_s", "predicted_peak_bytes", "plan"}


def write_rows(path: Path, number: int = 150) -> Path:
    """Write texts to classify by their first word."""
    chosen = random.Random(0)
    lines = []
    for i in range(number):
        colour = chosen.choice(COLOURS)
        lines.append(json.dumps({"text": f"{colour} {i}", "label": colour}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def words(model: Path, *more: str, data: str = "rows.jsonl") -> list[str]:
    return [
        "sweep", "--model", str(model), "--data", data, "--train.objective", "classify", "--epochs", "2",
        "--model.dtype", "fp32", *more,
    ]  # fmt: skip


def progress(folder: Path) -> int:
    """Return the number of lines that a sweep has written."""
    files = [folder / "journal.log", *folder.glob("*/*/events.jsonl")]
    return sum(file.read_bytes().count(b"\n") for file in files if file.is_file())


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value
