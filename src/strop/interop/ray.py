"""Python files for Ray Train. Each worker runs strop as a child process: Ray's threads receive no signals."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from strop.interop.job import Job, Launched, write

MAX_FAILURES = 3


def launch(job: Job, file: Path | None, *, force: bool) -> Launched:
    """Write a Python file for Ray. Raises RecipeError, FolderError."""
    file = file or Path(f"{job.name}.ray.py")
    return write(
        job, file, script(job), f"ray job submit -- python {_quote_for_two_shells(file.absolute())}", force=force
    )


def _quote_for_two_shells(path: Path) -> str:
    """Quote a path for the user's shell, and for the cluster's, where Ray adds double quotes if there are spaces."""
    odd = r"[$`\\]" if " " in str(path) else r'[^\w@%+=:,./"-]'
    return shlex.quote(re.sub(odd, r"\\\g<0>", str(path)))


def script(job: Job) -> str:
    """Return the text of the Python file."""
    resources = {"CPU": job.cores, **({"GPU": 1} if job.gpus else {})}
    words = ",\n    ".join(repr(word) for word in job.words)
    return f'''\
"""strop on {job.size}, written by `strop launch ray`. Edit as needed."""

import os
import shutil
import socket
import subprocess
import sys

import ray.train
import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

# This folder must exist on every node: recipe, data and run folder are relative to it.
FOLDER = {str(job.folder)!r}
NODES, DEVICES, CORES = {job.nodes}, {job.devices}, {job.cores}  # devices per node, cores per device

# The command is the same at every restart: an existing run is resumed.
TRAIN = [
    {words},
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def work() -> None:
    """Run strop on one worker, as a child process that joins the other ranks and ends with this worker."""
    context = ray.train.get_context()
    port = [free_port() if context.get_world_rank() == 0 else 0]
    torch.distributed.broadcast_object_list(port)
    ranks = {{
        "RANK": context.get_world_rank(), "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(), "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "MASTER_PORT": port[0], "OMP_NUM_THREADS": CORES,
    }}
    environment = {{**os.environ, **{{name: str(value) for name, value in ranks.items()}}}}
    command = [sys.executable, "-m", "strop.cli", *TRAIN]
    if shutil.which("setpriv"):  # Linux: strop is killed with its worker
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    done = subprocess.run(command, cwd=FOLDER, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"strop ended with {{done.returncode}} on rank {{context.get_world_rank()}}; see above")


if __name__ == "__main__":
    TorchTrainer(
        work,
        # Ray's process group provides MASTER_ADDR; the workers use it only to agree on a port.
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=NODES * DEVICES,
            use_gpu={job.gpus},
            resources_per_worker={resources},
            placement_strategy={"STRICT_PACK" if job.nodes == 1 else "SPREAD"!r},
        ),
        # If a worker or node is lost, all restart from the last checkpoint.
        run_config=RunConfig(
            storage_path=os.path.join(FOLDER, ".ray"),
            failure_config=FailureConfig(max_failures={MAX_FAILURES}),
        ),
    ).fit()
'''
