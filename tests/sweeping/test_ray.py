"""A sweep by Ray Tune on a real Ray cluster of two nodes on this machine, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from strop.runs.folder import read_json
from tests.support.jobs import ASKED, WHY_NOT
from tests.sweeping.support import without_times, words, write_rows

NO_RAY = "" if find_spec("ray") else "ray is not installed (pip install 'ray[tune]')"
pytestmark = pytest.mark.skipif(not ASKED or bool(NO_RAY), reason=NO_RAY if ASKED else WHY_NOT)
CLUSTER = """
import os, subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster()
for _ in range(2):
    cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def start(arguments: list[str], folder: Path, variables: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "strop", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(variables or {})
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, env=environment)


def test_a_sweep_by_ray_tune_survives_a_kill(tiny_folder: Path, tmp_path: Path) -> None:
    """The driver is killed and started again; the result equals that of a sweep without Ray."""
    arguments = words(tiny_folder, "--over", "lora.r=2,4,8,16", "--seeds", "2", "--out", "s", "--json", "--resume")
    for name in ("plain", "ray"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl")
    plain = start(arguments, tmp_path / "plain")
    expected, err = plain.communicate()
    assert plain.returncode == 0, err
    folder = tmp_path / "ray"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=pipe, stdout=pipe, text=True) as cluster:
        assert cluster.stdout is not None and cluster.stdin is not None
        environment = {"RAY_ADDRESS": cluster.stdout.readline().strip()}
        try:
            killed = start([*arguments, "--ray"], folder, environment)
            end = time.monotonic() + 300
            while killed.poll() is None and time.monotonic() < end:
                trials = read_json(folder / "s" / "sweep.json").get("trials", [])
                if any(trial["state"] == "finished" for trial in trials):
                    break
                time.sleep(0.05)
            os.kill(killed.pid, signal.SIGKILL)
            killed.communicate()
            again = start([*arguments, "--ray"], folder, environment)
            out, err = again.communicate(timeout=500)
            assert again.returncode == 0, err
        finally:
            cluster.stdin.close()
    assert without_times(json.loads(out)) == without_times(json.loads(expected))
    results = list((folder / "s" / "ray").glob("*/*/result.json"))
    pids = {json.loads(line)["pid"] for file in results for line in file.read_text().splitlines()}
    assert len(pids) > 1  # Tune ran the trials in its own processes
