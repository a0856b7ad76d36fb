"""A base of which each rank holds a part of every layer, gathered when the layer is computed, and let go behind it.

All ranks pass through the layers together: a pass is the same row of gatherings on each of them, whatever it computes,
and one that has nothing to compute, or that has failed, takes part until the pass is over. While one layer computes,
the next one is on its way, so that two are there at a time.

torch's `fully_shard` is not used: it shards parameters, one by one and in their own type, by rows; 4-bit weights here
are bytes with constants beside them, and the fast step reads several weights as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from strop.distributed.devices import Devices
from strop.errors import RunError
from strop.models.sharding import EMBEDDING, ModelShards, ShardedUnit, Where


class Sharded:
    """The base of a model whose parts lie on `devices`. modules: by what is asked for (see `__call__`)."""

    def __init__(self, parts: ModelShards, devices: Devices) -> None:
        self.parts, self.modules, self._devices = parts, parts.modules, devices
        self._order: list[Where] = []
        self._at = 0  # of the order, what is there
        self._coming: Callable[[], None] | None = None  # waits for what comes after what is there
        own = [unit.own_digest() for unit in parts.distinct()]
        every = zip(*devices.gather(own), strict=True)
        sums = zip(parts.distinct(), every, strict=True)
        self.digests = {unit.name: _text(sum(one)) for unit, one in sums}
        self._unseen = set(self.digests)

    def begin(self, *, backward: bool) -> None:
        forward = self.parts.forward  # the embedding has no gradient
        back = [where for where in forward[-2::-1] if where != EMBEDDING] if backward else []
        self._order, self._at = forward + back, -1

    def end(self) -> None:
        while self._at < len(self._order) - 1:
            self._advance()
        for where in self._order[-1:]:
            self.parts.units[where].drop()
        self._order = []

    def __call__(self, where: Where) -> None:
        """This layer (embedding, head) is about to be computed, or its gradient: from here on its weights are there.

        Raises RunError where they are not what the ranks have read, or the model has another order.
        """
        if where not in self.parts.units:
            return
        if where not in self._order[max(0, self._at) :]:
            name = f"layer {where}" if isinstance(where, int) else f"the {where}"
            what = f"{name} of the base is computed out of turn: this model cannot be sharded"
            raise RunError(what, fix="give --model.placement replicated")
        while self._at < 0 or self._order[self._at] != where:
            self._advance()
        unit = self.parts.units[where]
        if unit.name in self._unseen:
            self._unseen.discard(unit.name)
            if _text(unit.digest()) != self.digests[unit.name]:
                what = f"{unit.name} of the base does not arrive as it was read from the disk"
                raise RunError(what, fix="start again; if it happens again, test the memory and the network")

    def in_turn(self) -> Iterator[nn.Module]:
        for where, module in self.modules.items():
            self(where)
            yield module

    def share(self) -> dict[str, int]:
        return {"whole_bytes": self.parts.whole_bytes, "held_bytes": self.parts.held_bytes}

    def _advance(self) -> None:
        """Goes on to the next of the order: waits for it, lets go of the one before, and has the one after it come."""
        before = self._unit(self._at)
        self._at += 1
        if self._coming is None:
            self._start(self._at)
        if self._coming is not None:
            self._coming()
            self._coming = None
        if before is not None and before is not self._unit(self._at) and before is not self._unit(self._at + 1):
            before.drop()
        self._start(self._at + 1)

    def _start(self, at: int) -> None:
        unit = self._unit(at)
        if unit is not None and not unit.there:
            self._coming = self._devices.begin_gather(unit.take(), unit.own)

    def _unit(self, at: int) -> ShardedUnit | None:
        return self.parts.units[self._order[at]] if 0 <= at < len(self._order) else None


def _text(digest: int) -> str:
    return f"{digest % (1 << 64):016x}"
