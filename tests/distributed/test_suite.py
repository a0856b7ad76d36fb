"""Several ranks on this machine: each case in a process of its own, because forks need a parent without threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.jobs import ASKED, WHY_NOT

CASES = [
    "same_numbers(lab, [3])", "odd_batches(lab)", "other_numbers(lab)", "objectives(lab)",
    "evaluation(lab, general=False)",
    "not_finite(lab)", "no_memory(lab)", "failures(lab)", "flipped_bit(lab)", "gone(lab)", "hang(lab)",
    "was_restarted(lab)", "one_nan(lab)", "judged_once(lab)", "idle_experts(lab)", "odd_models(lab)",
    "no_memory_elsewhere(lab)", "told_otherwise(lab)",
    "the_same_run(lab)", "families(lab)", "bytes_arrive(lab)", "hurt_between_layers(lab)", "goes_on(lab)",
    "kills(lab, 4, agent=4)",
]  # fmt: skip


IMPORTS = "from pathlib import Path; from tests.distributed.suite import *; from tests.distributed.sharing import *; "
IMPORTS += "from tests.distributed.kills import *"


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, tmp_path: Path) -> None:
    in_own_process(case, tmp_path)


@pytest.mark.skipif(not ASKED, reason=WHY_NOT)
@pytest.mark.parametrize("case", ["same_numbers(lab)", "evaluation(lab)", "kills(lab, 100)"])
def test_long_case(case: str, tmp_path: Path) -> None:
    in_own_process(case, tmp_path, seconds=5400)


def in_own_process(case: str, tmp_path: Path, seconds: float = 600) -> None:
    code = f"{IMPORTS}; lab = Lab(Path({str(tmp_path)!r})); {case}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=seconds, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
