"""SkyPilot's parser, which is installed in a separate environment, accepts the task."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from strop.interop.job import skypilot_task
from tests.interop.test_launch import job

PYTHON = os.environ.get("STROP_SKYPILOT_PYTHON")
PARSED = """
import json, sys
import sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(json.dumps({
    "name": task.name, "nodes": task.num_nodes, "run": task.run, "accelerators": resources.accelerators,
    "cpus": resources.cpus, "spot": resources.use_spot, "recovery": resources.job_recovery, "volumes": task.volumes,
    "mounts": {where: [store.name, store.mode.value] for where, store in task.storage_mounts.items()},
}))
"""

pytestmark = pytest.mark.skipif(not PYTHON, reason="no Python with skypilot: `make scale` makes one")


def parsed(text: str, folder: Path) -> Any:
    assert PYTHON is not None
    (folder / "task.yaml").write_text(text, encoding="utf-8")
    env = {**os.environ, "HOME": str(folder), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    words = [PYTHON, "-c", PARSED, "task.yaml"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_gpu_task_parses(tmp_path: Path) -> None:
    result = replace(job("it's $(x)"), gpus=True, folder=tmp_path)
    text = skypilot_task(result, gpus="H100", volume="disk", spot=True)
    actual = parsed(text, tmp_path)
    assert actual["accelerators"] == {"H100": 3} and actual["nodes"] == 2 and actual["spot"] is True
    assert actual["recovery"]["max_restarts_on_errors"] == 3
    assert actual["volumes"] == {"/strop": "disk"} and "--out=/strop/runs/it" in actual["run"]


def test_cpu_task_parses(tmp_path: Path) -> None:
    result = replace(job(), nodes=1, folder=tmp_path)
    actual = parsed(skypilot_task(result, gpus=None, bucket="strop-runs-of-mine", spot=False), tmp_path)
    assert actual["cpus"] == "12+" and actual["accelerators"] is None and actual["spot"] is False
    assert actual["mounts"] == {"/strop": ["strop-runs-of-mine", "MOUNT_CACHED"]}


def test_invalid_task_is_rejected_by_the_parser(tmp_path: Path) -> None:
    text = skypilot_task(job(), gpus=None, volume="disk", spot=False)
    with pytest.raises(AssertionError, match="num_nodes"):
        parsed(text.replace("num_nodes: 2", "num_nodes: two"), tmp_path)
