"""The interface of processes that train together, one per device, and their ranks as set by the launcher.

Collective operations exchange each rank's status first, so that no rank waits forever for one that failed. All ranks
then exit together, and one reports the error. This module does not import torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from strop.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")
LOG = logging.getLogger(__name__)

# names of the environment variables (rank, world size, local rank, local world size) of each launcher
_LAUNCHER_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, Ray Train, Kubeflow
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # srun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)
DEFAULT_PORT = "29500"  # torchrun's default
RESUME = "continue with `strop resume RUN`, or give the command again if no step was saved"  # after a rank has ended
AGENT_PREFIX = "strop-"  # run ids of torchrun agents that `--devices` starts


def log_progress(groups: Sequence[T], activity: str) -> Iterator[T]:
    """Yield the groups, and log before each how many of them are done. activity: "" logs nothing."""
    for number, group in enumerate(groups):
        if activity:
            LOG.info("%s: %d of %d batches", activity, number, len(groups))
        yield group


class Devices:
    """A single process, for which collective operations are trivial. The subclass is for several processes.

    rank, world_size, local_rank, local_world_size: as in torchrun.
    nodes: number of machines.
    communication_s, waiting_s: total seconds of sending, and of waiting for the slowest rank.
    base: the model's strop.distributed.sharded.ShardedBase, or None if every rank has a full copy.
    """

    rank, world_size, local_rank, local_world_size, nodes = 0, 1, 0, 1, 1
    communication_s = waiting_s = 0.0
    base: Any = None

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0

    def all_or_none(self) -> AbstractContextManager[None]:
        """Return a context manager whose block succeeds on all ranks or fails on all.

        If a rank runs out of memory in the block, all ranks raise an out-of-memory error (see strop.machine.memory). If
        a rank fails for another reason, it raises its error and the others raise PeerFailed.
        """
        return nullcontext()

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Return whether each flag is set on any rank."""
        return flags

    def run_on_main(self, compute: Callable[[], T]) -> T:
        """Call `compute` on rank 0 and return its result on all ranks."""
        return compute()

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order."""
        return [value]

    def map(
        self, groups: Sequence[T], compute: Callable[[T], R], cost: Callable[[T], float], activity: str = ""
    ) -> list[R]:
        """Call `compute` on each group, distributed over the ranks by cost.

        Returns all results on all ranks. They are sent pickled. activity: logged for the status line with the number of
        groups that this rank has computed.
        """
        return [compute(group) for group in log_progress(groups, activity)]

    def run_passes(self, share: Callable[[int], Sequence[T]], compute: Callable[[T], R], *, backward: bool) -> list[R]:
        """Call `compute`, which runs the model once, on each of this rank's items. Returns the results.

        With a sharded base, a rank with fewer items still sends its shards for the passes of the others.
        share: returns the items of a given rank. backward: whether `compute` also runs the backward pass.
        """
        return [compute(item) for item in share(self.rank)]

    def start_all_gather(self, out: Tensor, shard: Tensor) -> Callable[[], None]:
        """Start to gather the shards of all ranks into `out`. Returns a function that waits until they have arrived."""
        raise AssertionError("a single device has the whole base")

    def all_reduce(self, buffer: Tensor) -> None:
        """Replace a flat fp32 buffer with its sum over the ranks."""

    def broadcast(self, buffer: Tensor, source: int) -> None:
        """Copy the buffer of rank `source` to the other ranks."""

    def check_equal(self, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Raise RunError unless the tensors of all ranks are bitwise equal."""

    def set_timeout(self, seconds: float) -> None:
        """Set the timeout of collective operations, after which the run ends with an error."""

    def require_same(self, settings: Mapping[str, object]) -> None:
        """Raise InputError if the ranks were started with different settings."""
        first, *others = self.gather({name: str(value) for name, value in settings.items()})
        for rank, values in enumerate(others, start=1):
            for name in {**first, **values}:
                if values.get(name) != first.get(name):
                    what = f"{name} of rank {rank} is {values.get(name)}, of rank 0 {first.get(name)}"
                    raise InputError(what, fix="give all ranks the same")


SINGLE_PROCESS = Devices()


@dataclass(frozen=True)
class RankInfo:
    """The ranks of a process, named as in torchrun."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def find_ranks(env: Mapping[str, str] = os.environ) -> RankInfo | None:
    """Return this process's ranks, or None if it is the only process. Raises InputError for invalid variables."""
    for rank, world, local, local_world in _LAUNCHER_VARIABLES:
        if rank not in env or not env.get(world, "").isdecimal() or int(env[world]) < 2:
            continue
        if "MASTER_ADDR" not in env:
            what = f"{env[world]} processes were started ({rank} {env[rank]}), and MASTER_ADDR is not set"
            raise InputError(what, fix="export MASTER_ADDR=<host of rank 0> before the command that starts them")
        for name in (rank, local):
            if not env.get(name, "0").isdecimal():
                raise InputError(f"{name} {env[name]!r}: not a number", fix="give each process its own, from 0")
        if int(env[rank]) >= int(env[world]):
            what = f"{rank} {int(env[rank])} is not below {world} {int(env[world])}"
            raise InputError(what, fix="give each process its own rank, from 0")
        local_world_size = _parse_first_count(env.get(local_world, "1"))
        return RankInfo(int(env[rank]), int(env[world]), int(env.get(local, "0")), local_world_size)
    return None


def was_restarted(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun restarted this process after a failure."""
    return int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_restart(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun restarts processes that fail."""
    return int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def threads_requested(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether the user set OMP_NUM_THREADS, which torchrun sets to 1 if it is not set."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in env and not env["TORCHELASTIC_RUN_ID"].startswith(AGENT_PREFIX)
    return "OMP_NUM_THREADS" in env and not (by_torchrun and env["OMP_NUM_THREADS"] == "1")


def _parse_first_count(text: str) -> int:
    """Parse the first node's number of tasks from Slurm's list, such as 2(x3) for three nodes with 2 tasks, or 2,1."""
    digits = text.partition("(")[0].partition(",")[0]
    return int(digits) if digits.isdigit() else 1
