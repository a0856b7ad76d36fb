"""The fault suite, shortened: the same cases with fewer trials (`make faults` runs them all)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.forks import Forks
from tests.support.slow import slow_except

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


@pytest.mark.parametrize("case", slow_except(CASES, ("kills", "not finite")))
def test_fault(case: str, tmp_path: Path, forks: Forks) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.faults import suite\n"
        f"with suite.one_thread():\n    lab = suite.Lab(Path({str(tmp_path)!r}))\n    tally = {CASES[case]}\n"
        "print(tally.tried, tally.wrong[:3]); sys.exit(1 if tally.wrong or not tally.tried else 0)"
    )
    forks.run(code, tmp_path, seconds=300)
