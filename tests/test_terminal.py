"""What a run prints where there is no terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from strop.terminal import PLAIN_SECONDS, watching


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
