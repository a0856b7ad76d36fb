"""Which of how many processes this one is, by the variables that launchers set. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from strop.errors import InputError
from strop.machine.probe import affinity

# (rank, number of processes, rank on its node, processes on its node), by launcher
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, Ray Train, Kubeflow
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # srun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)
PORT = "29500"  # torchrun's own
OWN_AGENT = "strop-"  # what the run id of an agent begins with that `--devices` has started


@dataclass(frozen=True)
class Place:
    """rank of world processes; local of local_world on this node."""

    rank: int
    world: int
    local: int
    local_world: int


def place_of(env: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place, or None where it is alone.

    Raises InputError where a launcher has started several and nothing says where they meet.
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
        place = Place(int(env[rank]), int(env[world]), int(env.get(local, "0")), _first(env.get(local_world, "1")))
        if place.rank >= place.world:
            raise InputError(f"{rank} {place.rank} of {world} {place.world}", fix="ranks go from 0 to one less")
        return place
    return None


def restarted(env: Mapping[str, str] = os.environ) -> bool:
    """torchrun has started this process again, after one that failed."""
    return int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_restart(env: Mapping[str, str] = os.environ) -> bool:
    return int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def threads_asked(env: Mapping[str, str] = os.environ) -> bool:
    """Somebody wishes for so many threads as OMP_NUM_THREADS says. torchrun sets it to 1 where nobody has set it."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in env and not env["TORCHELASTIC_RUN_ID"].startswith(OWN_AGENT)
    return "OMP_NUM_THREADS" in env and not (by_torchrun and env["OMP_NUM_THREADS"] == "1")


def threads_of(place: Place, env: Mapping[str, str] = os.environ) -> int | None:
    """This process's share of its node's cores; None where OMP_NUM_THREADS says how many threads it is to have."""
    if threads_asked(env):
        return None
    return max(1, affinity() // place.local_world)


def _first(text: str) -> int:
    """Slurm writes 2(x3) for three nodes of 2, and 2,1 for one of 2 and one of 1."""
    digits = text.partition("(")[0].partition(",")[0]
    return int(digits) if digits.isdigit() else 1
