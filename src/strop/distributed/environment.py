"""Read rank and world size from the variables that launchers set. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from strop.errors import InputError
from strop.machine.probe import affinity

# (rank, world size, local rank, local world size), by launcher
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, Ray Train, Kubeflow
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # srun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)
DEFAULT_PORT = "29500"  # torchrun's default
AGENT_PREFIX = "strop-"  # run ids of torchrun agents that `--devices` starts


@dataclass(frozen=True)
class Place:
    """The place of a process among all, and among those on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def find_place(env: Mapping[str, str] = os.environ) -> Place | None:
    """Return this process's place, or None if it runs alone.

    Raises InputError if a launcher started several processes without MASTER_ADDR, or with invalid ranks.
    """
    for rank, world, local, local_world in _NAMES:
        if rank not in env or not env.get(world, "").isdecimal() or int(env[world]) < 2:
            continue
        if "MASTER_ADDR" not in env:
            what = f"{env[world]} processes were started ({rank} {env[rank]}), and MASTER_ADDR is not set"
            raise InputError(what, fix="export MASTER_ADDR=<host of rank 0> before the command that starts them")
        for name in (rank, local):
            if not env.get(name, "0").isdecimal():
                raise InputError(f"{name} {env[name]!r}: not a number", fix="give each process its own, from 0")
        place = Place(
            int(env[rank]), int(env[world]), int(env.get(local, "0")), _first_count(env.get(local_world, "1"))
        )
        if place.rank >= place.world_size:
            what = f"{rank} {place.rank} is not below {world} {place.world_size}"
            raise InputError(what, fix="give each process its own rank, from 0")
        return place
    return None


def was_restarted(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun restarted this process after a failure."""
    return int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_restart(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun restarts processes that fail."""
    return int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def threads_requested(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether the user set OMP_NUM_THREADS. torchrun sets it to 1 if it is not set."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in env and not env["TORCHELASTIC_RUN_ID"].startswith(AGENT_PREFIX)
    return "OMP_NUM_THREADS" in env and not (by_torchrun and env["OMP_NUM_THREADS"] == "1")


def default_threads(place: Place, env: Mapping[str, str] = os.environ) -> int | None:
    """Return this process's share of its node's cores; None if the user set OMP_NUM_THREADS."""
    if threads_requested(env):
        return None
    return max(1, affinity() // place.local_world_size)


def _first_count(text: str) -> int:
    """Parse Slurm's tasks per node: 2(x3) means three nodes of 2, and 2,1 one of 2 and one of 1."""
    digits = text.partition("(")[0].partition(",")[0]
    return int(digits) if digits.isdigit() else 1
