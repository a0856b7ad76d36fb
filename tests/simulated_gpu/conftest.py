"""A simulated GPU, for each test in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.simulated_gpu.build import Unavailable, library

Simulate = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def simulate(request: pytest.FixtureRequest, tmp_path: Path) -> Simulate:
    """Return a function that runs scenarios, one after another on one GPU, and returns the outcome of each.

    A scenario is {"scenario": its name in tests/simulated_gpu/simulate.py, ...its arguments}. The test fails if one of
    them fails.
    """
    try:
        path = library(request.config.cache.mkdir("simulated_gpu"))
    except Unavailable as error:
        pytest.skip(str(error))

    def run(*scenarios: dict[str, Any]) -> list[dict[str, Any]]:
        module = "tests.simulated_gpu.simulate"
        command = [sys.executable, "-m", module, str(path), str(tmp_path), json.dumps(scenarios)]
        # Its quantized copies of a base have no values, so no other test may use them.
        env = {**os.environ, "STROP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
        outcomes: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        pairs = zip(scenarios, outcomes, strict=True)
        failed = [f"{scenario}\n{outcome['trace']}" for scenario, outcome in pairs if "failed" in outcome]
        assert not failed, "\n\n".join(failed)
        return outcomes

    return run
