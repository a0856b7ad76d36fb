"""A card that is not there, for each test in a process of its own."""

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
from tests.simulated_gpu.build import Missing, library

Play = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def card(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """card(*plays, capability=(9, 0)): what came of each, one after the other on one card; a play is
    {"play": its name in tests/simulated_gpu/simulate.py, ...its arguments}. Fails where one of them does."""
    try:
        made = library(request.config.cache.mkdir("card"))
    except Missing as why:
        pytest.skip(str(why))

    def play(*plays: dict[str, Any], capability: tuple[int, int] = (9, 0)) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "tests.simulated_gpu.simulate", str(made), str(tmp_path), json.dumps(plays)]
        # a card without numbers quantizes a base into nothing: its copies are for nobody else
        own = {"STROP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        env = {**os.environ, "STROP_CARD": json.dumps(capability), **own}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        failed = [f"{asked}\n{one['trace']}" for asked, one in zip(plays, found, strict=True) if "failed" in one]
        assert not failed, "\n\n".join(failed)
        return found

    return play
