"""Processes that train together, one a device. `ALONE` is the only one there is: it sends nothing and imports nothing.

The rule that keeps ranks from waiting for one that never comes: whatever is sent begins with one tiny reduction, in
which each rank says whether all is well with it. A rank that fails anywhere takes part in the next one, and so all of
them end together, one of them with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


class Devices:
    """One process alone, which is also what several do with what they are told. rank of world; local of local_world on
    this node, of which there are `nodes`."""

    rank, world, local, local_world, nodes = 0, 1, 0, 1, 1
    communication_s = waiting_s = 0.0  # so far: sending, and waiting for the slowest

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

    def add_up(self, buffer: Tensor) -> None:
        """Puts the sum over the ranks in the place of a flat fp32 buffer."""

    def send(self, buffer: Tensor, source: int) -> None:
        """Puts the buffer of rank `source` in the place of everybody's."""

    def compare(self, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Raises RunError where the tensors of the ranks are not the same to the bit."""

    def limit(self, seconds: float) -> None:
        """From now on a rank that keeps the others waiting for longer ends the run."""


ALONE = Devices()
