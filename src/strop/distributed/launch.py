"""Join the processes that a launcher started, or start one per device with torchrun's agent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from strop.distributed.devices import AGENT_PREFIX, ALONE, Devices, find_place
from strop.errors import PeerFailed, RecipeError, RunError, Stopped
from strop.machine.probe import available_cores
from strop.runs.child_env import safe_path_env

SHUTDOWN_TIMEOUT_S = "3600"  # for ranks that were asked to stop, to finish their step and save (torch's default: 30)


@contextmanager
def join_devices() -> Iterator[Devices]:
    """Join the processes that a launcher started, and yield the Devices; ALONE without a launcher.

    All ranks leave the block without an error, or all with one, which one of them prints.
    """
    place = find_place()
    if place is None:
        yield ALONE
        return
    from strop.distributed.process_group import Group

    group = Group(place)
    try:
        yield group
    except BaseException as error:
        if (replacement := group.finish(error)) is not None:
            raise replacement from None
        raise
    if (failure := group.finish(None)) is not None:
        raise failure


def count_processes(requested: str | None, device: str = "auto") -> int:
    """Return how many processes `--devices` needs; 0 if this one does the work. device: the recipe's.

    Raises RecipeError for an invalid number, more GPUs than there are, or a process that a launcher started.
    """
    if requested is None:
        return 0
    if find_place() is not None:
        raise RecipeError("--devices: a launcher has started this process", fix="leave it out: the launcher decides")
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--devices {requested}: the device is {device}", fix="give cpu or cuda, or leave it at auto")
    import torch

    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if requested != "all" and (not requested.isdecimal() or int(requested) < 1):
        raise RecipeError(f"--devices {requested}: not a number of devices", fix="give a number, or all")
    count = (gpus or available_cores()) if requested == "all" else int(requested)
    if gpus and count > gpus:
        raise RecipeError(f"--devices {requested}: this machine has {gpus} GPUs", fix="give at most as many, or all")
    return 0 if count == 1 else count


def launch_processes(count: int, arguments: Sequence[str]) -> None:
    """Run strop with these arguments (without --devices) in `count` processes under torchrun's agent, and wait.

    Raises PeerFailed with the exit code of a process that failed or was stopped by Ctrl-C or SIGTERM, and has reported
    it; RunError if another signal ended a process or all of them (a terminal that closes, for example).
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_TIMEOUT_S)
    os.environ.update(safe_path_env())
    if not os.environ.get("STROP_DEBUG"):  # the ranks report themselves how they ended
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    if sys.platform == "linux":  # all processes are on this machine, so its network name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=f"{AGENT_PREFIX}{uuid.uuid4()}", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", monitor_interval=0.1,
    )  # fmt: skip
    resume = "resume from the last checkpoint with `strop resume`"
    try:
        elastic_launch(config, sys.executable)("-m", "strop.cli", *_without_devices(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            what = f"rank {rank} (process {failure.pid}) was ended by {signal.Signals(-failure.exitcode).name}"
            raise RunError(what, fix=resume) from None
        raise PeerFailed(failure.exitcode) from None
    except SignalException as caught:
        if caught.sigval in (signal.SIGINT, signal.SIGTERM):
            raise PeerFailed(Stopped.exit_code) from None
        raise RunError(f"ended by {caught.sigval.name}; nothing was saved", fix=resume) from None


def _without_devices(arguments: Sequence[str]) -> list[str]:
    kept, is_value = [], False
    for argument in arguments:
        if not is_value and not argument.startswith("--devices="):
            is_value = argument == "--devices"
            kept += [] if is_value else [argument]
        else:
            is_value = False
    return kept
