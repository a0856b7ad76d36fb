"""Run strop commands in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from strop.cli import app

QUICK = ["--train.max_steps", "6", "--train.batch_size", "4", "--lora.r", "4", "--model.dtype", "fp32"]


def run(*words: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of a strop command: results are on stdout, with --json on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["strop", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            app.main()
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err
