"""The interface of processes that train together, one per device, and their ranks as set by the launcher.

Every collective operation begins with a small all-reduce of each rank's status, so that no rank waits forever for one
that failed. A failed rank takes part in the next all-reduce. All ranks then exit together, and one reports the reason.
This module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from strop.errors import InputError
from strop.machine.probe import available_cores

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
R = TypeVar("R")

# (rank, world size, local rank, local world size), by launcher
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, Ray Train, Kubeflow
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # srun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)
DEFAULT_PORT = "29500"  # torchrun's default
AGENT_PREFIX = "strop-"  # run ids of torchrun agents that `--devices` starts


class Base(Protocol):
    """A sharded base model, whose layers are gathered when they are computed (strop.distributed.sharded).

    digests: hash of each layer's weights. modules: by layer number, "embedding" or "head".
    """

    digests: dict[str, str]
    modules: dict[int | str, nn.Module]

    def __call__(self, key: int | str) -> None:
        """Gather a module's weights; they stay until another module's are gathered."""

    def iter_modules(self) -> Iterable[nn.Module]:
        """Yield all sharded modules in order of computation, each gathered until the next is requested."""

    def sizes(self) -> dict[str, int]:
        """Return {whole_bytes, held_bytes}: the bytes of all weights, and of this rank's shard."""

    def begin(self, *, backward: bool) -> None:
        """Begin a forward pass on all ranks. backward: a backward pass follows."""

    def end(self) -> None:
        """Gather the remaining modules of the pass, so that ranks with more work can finish it."""


class Devices:
    """A single process: every collective operation is the identity. Subclassed for several processes.

    rank, world_size, local_rank, local_world_size: as in torchrun. nodes: number of nodes.
    communication_s, waiting_s: seconds spent so far on sending, and on waiting for the slowest rank.
    base: the sharded base, or None if every rank has a full copy.
    """

    rank, world_size, local_rank, local_world_size, nodes = 0, 1, 0, 1, 1
    communication_s = waiting_s = 0.0
    base: Base | None = None

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    def all_or_none(self) -> AbstractContextManager[None]:
        """Return a context manager for a block that succeeds on all ranks or fails on all.

        If a rank runs out of memory in it, all ranks raise an out-of-memory error (see strop.machine.memory). If a rank
        fails otherwise, it raises its error and the others PeerFailed.
        """
        return nullcontext()

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set on any rank."""
        return flags

    def run_on_main(self, compute: Callable[[], T]) -> T:
        """Call `compute` on rank 0 and return its result on all ranks."""
        return compute()

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order."""
        return [value]

    def map(self, groups: Sequence[T], compute: Callable[[T], R], cost: Callable[[T], float]) -> list[R]:
        """Return `compute` of each group, distributed over the ranks by cost. Results are pickled."""
        return [compute(group) for group in groups]

    def run_passes(self, share: Callable[[int], Sequence[T]], compute: Callable[[T], R], *, backward: bool) -> list[R]:
        """Return `compute` of each item in this rank's share. Each call runs the model once.

        With a sharded base, a rank with fewer items still contributes its shards to the passes of the others.
        share: returns the items of any rank. backward: whether `compute` also runs the backward pass.
        """
        return [compute(item) for item in share(self.rank)]

    def start_all_gather(self, out: Tensor, shard: Tensor) -> Callable[[], None]:
        """Start to gather the bytes of all ranks into `out`, and return a function that waits for them."""
        raise AssertionError("a single device has the whole base")

    def all_reduce(self, buffer: Tensor) -> None:
        """Replace a flat fp32 buffer by its sum over the ranks."""

    def broadcast(self, buffer: Tensor, source: int) -> None:
        """Copy the buffer of rank `source` to all ranks."""

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


ALONE = Devices()


@dataclass(frozen=True)
class Place:
    """The ranks of a process: among all processes, and among those on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def find_place(env: Mapping[str, str] = os.environ) -> Place | None:
    """Return this process's ranks, or None if it runs alone.

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
    return max(1, available_cores() // place.local_world_size)


def _first_count(text: str) -> int:
    """Parse Slurm's tasks per node: 2(x3) means three nodes of 2, and 2,1 one of 2 and one of 1."""
    digits = text.partition("(")[0].partition(",")[0]
    return int(digits) if digits.isdigit() else 1
