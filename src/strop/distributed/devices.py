"""Processes that train together, one a device. `ALONE` is the only one there is: it sends nothing and imports nothing.

The rule that keeps ranks from waiting for one that never comes: whatever is sent begins with one tiny reduction, in
which each rank says whether all is well with it. A rank that fails anywhere takes part in the next one, and so all of
them end together, one of them with the reason.
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
    """A base whose layers are gathered (strop.distributed.sharded). digests: by layer, of its bytes."""

    digests: dict[str, str]
    modules: dict[int | str, nn.Module]

    def __call__(self, where: int | str) -> None:
        """Has the weights of one of the modules there, until others are asked for."""

    def in_turn(self) -> Iterable[nn.Module]:
        """The modules whose weights are gathered, in a pass, each there until the next is asked for."""

    def share(self) -> dict[str, int]:
        """{whole_bytes, held_bytes}: of the weights, and of what this rank holds between steps."""

    def begin(self, *, backward: bool) -> None:
        """A pass of all ranks through the model begins."""

    def end(self) -> None:
        """Takes part in what is left of the pass."""


class Devices:
    """One process alone, which is also what several do with what they are told. rank of world; local of local_world on
    this node, of which there are `nodes`."""

    rank, world, local, local_world, nodes = 0, 1, 0, 1, 1
    communication_s = waiting_s = 0.0  # so far: sending, and waiting for the slowest
    base: Base | None = None  # where each rank holds a part of it

    @property
    def main(self) -> bool:
        """This is the rank that writes and prints."""
        return self.rank == 0

    def together(self) -> AbstractContextManager[None]:
        """A block that ends well on all ranks or on none.

        Where one finds no memory in it, all raise an error of memory (strop.machine.memory). Where one fails, it
        raises its own error and the others Elsewhere.
        """
        return nullcontext()

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """Of each wish, whether any rank has it."""
        return wishes

    def once(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, for all."""
        return make()

    def gather(self, value: T) -> list[T]:
        """What each rank has, by rank."""
        return [value]

    def each(self, groups: Sequence[T], compute: Callable[[T], R], cost: Callable[[T], float]) -> list[R]:
        """`compute` of each group, dealt out to the ranks; results travel as pickles."""
        return [compute(group) for group in groups]

    def turns(self, share: Callable[[int], Sequence[T]], compute: Callable[[T], R], *, backward: bool) -> list[R]:
        """`compute`, which passes through the model once, of what this rank has; share: what each rank has.

        Where the base is sharded, a rank that has less goes on giving its part of each layer to the others.
        backward: it passes back as well.
        """
        return [compute(one) for one in share(self.rank)]

    def begin_gather(self, whole: Tensor, own: Tensor) -> Callable[[], None]:
        """Begins to put the bytes of all ranks, one behind the other, into `whole`; what it gives waits for them."""
        raise AssertionError("one device holds all of the base")

    def add_up(self, buffer: Tensor) -> None:
        """Puts the sum over the ranks in the place of a flat fp32 buffer."""

    def send(self, buffer: Tensor, source: int) -> None:
        """Puts the buffer of rank `source` in the place of everybody's."""

    def compare(self, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Raises RunError where the tensors of the ranks are not the same to the bit."""

    def limit(self, seconds: float) -> None:
        """From now on a rank that keeps the others waiting for longer ends the run."""

    def refuse_unlike(self, given: Mapping[str, object]) -> None:
        """Raises InputError where the ranks were not given the same."""
        first, *others = self.gather({name: str(value) for name, value in given.items()})
        for rank, other in enumerate(others, start=1):
            for name in {**first, **other}:
                if other.get(name) != first.get(name):
                    what = f"{name} of rank {rank} is {other.get(name)}, of rank 0 {first.get(name)}"
                    raise InputError(what, fix="give all ranks the same")


ALONE = Devices()
