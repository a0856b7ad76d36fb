"""Several ranks on this machine. Each case runs in a fork of a process without threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.forks import Forks
from tests.support.jobs import ASKED, WHY_NOT
from tests.support.slow import slow_except

CASES = [
    "equals_one_device(lab, [3])", "samples(lab)", "unusual_batches(lab)", "resume_on_other_counts(lab)",
    "preference_objectives(lab)", "classification(lab)", "embedding(lab)", "images(lab)",
    "evaluation(lab, general=False)", "nan_on_one_rank(lab)", "out_of_memory_on_one_rank(lab)", "failing_ranks(lab)",
    "flipped_bit(lab)", "killed_rank(lab)", "hanging_rank(lab)", "restarted_by_torchrun(lab)",
    "nan_weight_at_save(lab)", "judge_runs_on_one_rank(lab)", "idle_experts(lab)", "unusual_models(lab)",
    "out_of_memory_inside_nested_blocks(lab)", "different_settings(lab)", "sharded_equals_replicated(lab)",
    "sharded_families(lab)", "gathered_bytes_are_exact(lab)", "faults_between_layers(lab)", "sharded_resume(lab)",
    "kills(lab, 4, agent=4)",
]  # fmt: skip


IMPORTS = "from pathlib import Path; from tests.distributed.suite import *; from tests.distributed.sharing import *; "
IMPORTS += "from tests.distributed.kills import *"


CORE = CASES[0], "nan_on_one_rank(lab)", "resume_on_other_counts(lab)"


@pytest.mark.parametrize("case", slow_except(CASES, CORE))
def test_case(case: str, tmp_path: Path, forks: Forks) -> None:
    run_case(forks, case, tmp_path)


@pytest.mark.skipif(not ASKED, reason=WHY_NOT)
@pytest.mark.parametrize("case", ["equals_one_device(lab)", "evaluation(lab)", "kills(lab, 100)"])
def test_long_case(case: str, tmp_path: Path, forks: Forks) -> None:
    run_case(forks, case, tmp_path, seconds=5400)


def run_case(forks: Forks, case: str, tmp_path: Path, seconds: float = 600) -> None:
    forks.run(f"{IMPORTS}; lab = Lab(Path({str(tmp_path)!r})); {case}", tmp_path, seconds)
