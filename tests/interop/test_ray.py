"""The Python file in a real Ray cluster of two nodes on this machine, with a worker that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.support.jobs import ASKED, FIRST, WHY_NOT, adapter, events, strop, until, write_recipe

NO_RAY = "" if find_spec("ray") else "ray is not installed (pip install 'ray[train]')"
pytestmark = pytest.mark.skipif(not ASKED or bool(NO_RAY), reason=NO_RAY if ASKED else WHY_NOT)
# Ray's test cluster: nodes are processes with one core each; the job finds the cluster by its address.
CLUSTER = """
import os, runpy, sys
import ray
from ray.cluster_utils import Cluster
cluster = Cluster()
for _ in range(2):
    cluster.add_node(num_cpus=2)
os.environ["RAY_ADDRESS"] = cluster.address
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def started(folder: Path) -> subprocess.Popen[bytes]:
    """Start the generated file on a new cluster."""
    output = strop("launch", "ray", FIRST, "--nodes", "2", "--cores", "1", "--out", "runs/x y", cwd=folder)
    env = {**os.environ, "RAY_TRAIN_V2_ENABLED": "1", "RAY_DEDUP_LOGS": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    with (folder / "log").open("wb") as log:
        words = [sys.executable, "-c", CLUSTER, str(folder / output["file"])]
        return subprocess.Popen(words, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=env)


def ranks(job: subprocess.Popen[bytes], folder: Path) -> dict[int, psutil.Process]:
    """Return strop's processes of this run by rank."""
    results = {}
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = process.info["cmdline"] or []
        if "strop.cli" in words and process.info["cwd"] == str(folder) and words[0] == sys.executable:
            results[int(process.environ()["RANK"])] = process
    return results


def test_killed_ray_worker_restarts(tmp_path: Path, tiny_folder: Path) -> None:
    """The run resumes from its last checkpoint and ends with the same adapter as one undisturbed process."""
    write_recipe(tmp_path, tiny_folder, steps=150)
    run = tmp_path / "runs" / "x y"
    with started(tmp_path) as job:
        try:
            until(run, 6)
            before = ranks(job, tmp_path)
            assert set(before) == {0, 1}
            worker = before[1].parent()
            assert worker is not None
            worker.kill()  # Ray's process: its strop child must end too
            code = job.wait(900)
        finally:
            job.kill()
    assert code == 0, (tmp_path / "log").read_text(encoding="utf-8")[-3000:]
    assert not any(process.is_running() for process in before.values())
    (again,) = events(run, "resume")
    assert 5 <= again["step"] < 150
    assert events(run, "start")[0]["devices"]["count"] == 2
    strop("train", FIRST, "--out", "alone", cwd=tmp_path)
    assert adapter(run) == adapter(tmp_path / "alone")
