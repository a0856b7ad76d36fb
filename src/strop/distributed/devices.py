"""The interface to processes that train together, one per device. `ALONE` is the case of a single process.

To keep ranks from waiting forever for one that failed, every exchange begins with one small all-reduce of each rank's
status. A rank that fails takes part in the next one. All ranks then end together, and one of them reports the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, TypeVar

from strop.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
R = TypeVar("R")


class Base(Protocol):
    """A sharded base, whose layers are gathered when they are computed (strop.distributed.sharded).

    digests: by layer, of its bytes. modules: by layer number, "embedding" or "head".
    """

    digests: dict[str, str]
    modules: dict[int | str, nn.Module]

    def __call__(self, where: int | str) -> None:
        """Gather a module's weights; they stay until another module's are gathered."""

    def iter_modules(self) -> Iterable[nn.Module]:
        """Yield all sharded modules in order of computation, each gathered until the next is requested."""

    def sizes(self) -> dict[str, int]:
        """Return {whole_bytes, held_bytes}: of all weights, and of this rank's share."""

    def begin(self, *, backward: bool) -> None:
        """Begin a pass of all ranks through the model."""

    def end(self) -> None:
        """Take part in the rest of the pass."""


class Devices:
    """A single process: every collective operation is the identity. Subclassed for several processes.

    rank of world_size; local_rank of local_world_size on this node; nodes: number of nodes.
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
        """Return the values of all ranks, by rank."""
        return [value]

    def map(self, groups: Sequence[T], compute: Callable[[T], R], cost: Callable[[T], float]) -> list[R]:
        """Return `compute` of each group, distributed over the ranks by cost; results are sent as pickles."""
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
        """Replace the buffer on all ranks by that of rank `source`."""

    def check_equal(self, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Raise RunError if the ranks' tensors are not equal to the bit."""

    def set_timeout(self, seconds: float) -> None:
        """End the run from now on if a rank keeps the others waiting for longer."""

    def require_same(self, settings: Mapping[str, object]) -> None:
        """Raise InputError if the ranks were started with different settings."""
        first, *others = self.gather({name: str(value) for name, value in settings.items()})
        for rank, values in enumerate(others, start=1):
            for name in {**first, **values}:
                if values.get(name) != first.get(name):
                    what = f"{name} of rank {rank} is {values.get(name)}, of rank 0 {first.get(name)}"
                    raise InputError(what, fix="give all ranks the same")


ALONE = Devices()
