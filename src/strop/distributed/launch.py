"""Join the processes that a launcher started, or start one per device with torchrun's agent."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from strop.display.tables import STARTED_AS, STARTED_DEVICES, command_name
from strop.distributed.devices import AGENT_PREFIX, RESUME, SINGLE_PROCESS, Devices, find_ranks
from strop.errors import PeerFailed, RecipeError, RunError, Stopped
from strop.machine.probe import available_cores
from strop.runs.child_env import safe_path_env

SHUTDOWN_TIMEOUT_S = "3600"  # time for stopped ranks to finish their step and save (torch's default: 30)


@contextmanager
def join_devices() -> Iterator[Devices]:
    """Join the processes that a launcher started, and yield their Devices, or SINGLE_PROCESS without a launcher.

    If a rank fails, all ranks leave the block with an error, which one of them prints.
    """
    ranks = find_ranks()
    if ranks is None:
        yield SINGLE_PROCESS
        return
    from strop.distributed.process_group import ProcessGroupDevices

    devices = ProcessGroupDevices(ranks)
    try:
        yield devices
    except BaseException as error:
        if (replacement := devices.finish(error)) is not None:
            raise replacement from None
        raise
    if (failure := devices.finish(None)) is not None:
        raise failure


def count_processes(requested: str | None, device: str = "auto") -> int:
    """Return how many processes `--devices` starts, or 0 to run in this one. Raises RecipeError if it is invalid."""
    if requested is None:
        return 0
    if find_ranks() is not None:
        raise RecipeError("--devices: a launcher has started this process", fix="leave it out: the launcher decides")
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--devices {requested}: the device is {device}", fix="give cpu or cuda, or leave it at auto")
    if requested != "all" and (not requested.isdecimal() or int(requested) < 1):
        raise RecipeError(f"--devices {requested}: not a number of devices", fix="give a number, or all")
    import torch

    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    count = (gpus or available_cores()) if requested == "all" else int(requested)
    if gpus and count > gpus:
        raise RecipeError(f"--devices {requested}: this machine has {gpus} GPUs", fix="give at most as many, or all")
    return 0 if count == 1 else count


def launch_processes(count: int, arguments: Sequence[str]) -> None:
    """Run strop with these arguments (without --devices) in `count` processes under torchrun's agent, and wait.

    Raises PeerFailed if a process failed or was stopped by Ctrl-C or SIGTERM, which it has reported, and RunError if
    another signal ended a process, such as SIGHUP of a closed terminal.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_TIMEOUT_S)
    os.environ.update({**safe_path_env(), STARTED_AS: command_name(), STARTED_DEVICES: str(count)})
    if not os.environ.get("STROP_DEBUG"):  # the ranks report their errors themselves
        for module in ("multiprocessing.api", "agent.server.api"):
            logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
    if sys.platform == "linux":  # works even if this machine's host name cannot be resolved
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=f"{AGENT_PREFIX}{uuid.uuid4()}", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "strop.cli", *_without_devices(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            what = f"rank {rank} (process {failure.pid}) was ended by {signal.Signals(-failure.exitcode).name}"
            raise RunError(what, fix=_resume_fix(arguments)) from None
        raise PeerFailed(failure.exitcode) from None
    except SignalException as error:
        if error.sigval in (signal.SIGINT, signal.SIGTERM):
            raise PeerFailed(Stopped.exit_code) from None
        raise RunError(f"ended by {error.sigval.name}; nothing was saved", fix=_resume_fix(arguments)) from None


def _resume_fix(arguments: Sequence[str]) -> str:
    """Return RESUME with the run's folder, if the command's arguments name it."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--out=") else [word])]
    named = [after for word, after in pairwise(words) if word in ("resume", "--out") and not after.startswith("-")]
    return RESUME.replace("RUN", shlex.quote(named[0])) if named else RESUME


def _without_devices(arguments: Sequence[str]) -> list[str]:
    return [
        argument
        for previous, argument in pairwise(("", *arguments))
        if "--devices" not in (previous, argument) and not argument.startswith("--devices=")
    ]
