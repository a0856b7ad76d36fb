"""What a run prints where there is no terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from strop.terminal import PLAIN_SECONDS, print_end, watching


def test_into_a_file_progress_is_a_line_now_and_then() -> None:
    out = io.StringIO()
    step: dict[str, Any] = {"event": "step", "loss": 1.5, "tokens_per_s": 400.0, "seconds_left": 62.0}
    parameters = {"trainable": 1, "all": 10}
    with watching(Console(file=out, soft_wrap=True)) as watch:
        watch(
            {
                "event": "start",
                "time": 0.0,
                "step": 0,
                "steps": 3,
                "engine": "fast",
                "why": "",
                "parameters": parameters,
            }
        )
        for i, seconds in enumerate((1.0, 2.0, 2.0 + PLAIN_SECONDS), start=1):
            watch({**step, "time": seconds, "step": i})
        watch({"event": "end", "time": 99.0, "step": 3})
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert lines == [f"step     {i}  loss 1.5000  400 tokens/s  1:02 left" for i in (1, 3)]


def test_memory_is_told_as_predicted_and_as_measured(capsys: pytest.CaptureFixture[str]) -> None:
    memory = {"predicted_peak_bytes": 2**30, "measured_peak_bytes": 5 * 2**28}
    figures = {"steps": 3, "tokens": 9, "seconds": 1.0, "tokens_per_s": 9.0, "supervised_tokens_per_s": 4.0}
    print_end({"run": "r", "adapter": "a", "memory": memory, **figures}, False)
    assert "memory   1.25 GiB measured, 1.00 predicted (+25%)" in capsys.readouterr().err
