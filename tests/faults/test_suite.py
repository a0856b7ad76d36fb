"""The fault suite, shortened: the same cases with fewer trials (`make faults` runs them all)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

# Forks need a parent without threads, so each case runs in its own process.
CASES = {
    "kills": "suite.kills(lab, 6)",
    "crash points": "suite.crash_points(lab, 60)",
    "damage": "suite.damage(lab, 4)",
    "full disk": "suite.full_disk(lab, 6)",
    "not finite": "suite.not_finite(lab)",
    "out of memory": "suite.out_of_memory(suite.Lab(lab.folder / 'eval', eval_share=True), 3)",
    "interrupts": "suite.interrupts(lab, 4)",
    "two at once": "suite.two_at_once(lab, 2)",
}


@pytest.mark.parametrize("case", CASES)
def test_fault(case: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.faults import suite\n"
        f"with suite.one_thread():\n    lab = suite.Lab(Path({str(tmp_path)!r}))\n    tally = {CASES[case]}\n"
        "print(tally.tried, tally.wrong[:3]); sys.exit(1 if tally.wrong or not tally.tried else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
