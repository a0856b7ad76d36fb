"""A Python file for Ray: Ray Train places the workers and starts them again; each runs strop as a process of its own.

Of its own, because Ray calls a worker's function in a thread, where Python takes no signals, and in a process that has
joined a process group of Ray's already.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from strop.interop.job import Job, Launched, write

MAX_FAILURES = 3


def launch(job: Job, file: Path | None, *, force: bool) -> Launched:
    """Raises RecipeError, FolderError."""
    file = file or Path(f"{job.name}.ray.py")
    return write(job, file, script(job), f"ray job submit -- python {_twice(file.absolute())}", force=force)


def _twice(path: Path) -> str:
    """A path as a word for two shells: the one that it is typed into, and that of the cluster, for which Ray puts a
    word with a blank between double quotes, and a backslash in front of a double quote."""
    odd = r"[$`\\]" if " " in str(path) else r'[^\w@%+=:,./"-]'
    return shlex.quote(re.sub(odd, r"\\\g<0>", str(path)))


def script(job: Job) -> str:
    """The text of the Python file."""
    resources = {"CPU": job.cores, **({"GPU": 1} if job.cards else {})}
    words = ",\n    ".join(repr(word) for word in job.words)
    return f'''\
"""strop on {job.size}, written by `strop launch ray`. It is yours to edit."""

import os
import shutil
import socket
import subprocess
import sys

import ray.train
import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

# This folder must be there on every node: recipe, data and run folder are found from it.
FOLDER = {str(job.folder)!r}
NODES, DEVICES, CORES = {job.nodes}, {job.devices}, {job.cores}  # devices of a node, cores of a device

# The command is the same at every start: a run that began is gone on with.
TRAIN = [
    {words},
]


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("", 0))
        return door.getsockname()[1]


def work() -> None:
    """One worker: strop as a process that joins the others, and ends with this one however it ends."""
    place = ray.train.get_context()
    port = [free_port() if place.get_world_rank() == 0 else 0]
    torch.distributed.broadcast_object_list(port)
    ranks = {{
        "RANK": place.get_world_rank(), "WORLD_SIZE": place.get_world_size(), "LOCAL_RANK": place.get_local_rank(),
        "LOCAL_WORLD_SIZE": place.get_local_world_size(), "MASTER_PORT": port[0], "OMP_NUM_THREADS": CORES,
    }}
    environment = {{**os.environ, **{{name: str(value) for name, value in ranks.items()}}}}
    command = [sys.executable, "-m", "strop.cli", *TRAIN]
    if shutil.which("setpriv"):  # Linux: a worker that Ray kills takes strop with it
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    done = subprocess.run(command, cwd=FOLDER, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"strop ended with {{done.returncode}} on rank {{place.get_world_rank()}}; see above")


if __name__ == "__main__":
    TorchTrainer(
        work,
        # MASTER_ADDR comes from Ray's own process group, which the workers use for the port alone.
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=NODES * DEVICES,
            use_gpu={job.cards},
            resources_per_worker={resources},
            placement_strategy={"STRICT_PACK" if job.nodes == 1 else "SPREAD"!r},
        ),
        # A worker or node that is lost: all start again, from the last checkpoint.
        run_config=RunConfig(
            storage_path=os.path.join(FOLDER, ".ray"),
            failure_config=FailureConfig(max_failures={MAX_FAILURES}),
        ),
    ).fit()
'''
