"""A base model sharded over the ranks: each layer is gathered when it is computed, and freed after.

All ranks run the same gathers in the same order in every pass. A rank that has nothing to compute, or has failed, takes
part until the pass is over. The next layer is gathered while one computes, so at most two are in memory.

torch's `fully_shard` does not fit: it shards parameters one by one, in their own dtype, by rows. Here 4-bit weights are
bytes with separate quantization constants, and the fast step fuses several weights into one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from strop.distributed.devices import Devices
from strop.errors import RunError
from strop.models.sharding import EMBEDDING, ModelShards, ModuleKey, ShardedUnit


class Sharded:
    """The base of a model whose parts are on `devices`; see strop.distributed.devices.Base."""

    def __init__(self, parts: ModelShards, devices: Devices) -> None:
        self.parts, self.modules, self._devices = parts, parts.modules, devices
        self._order: list[ModuleKey] = []  # of the current pass
        self._current = 0  # index into the order of the module whose weights are gathered
        self._wait_for_next: Callable[[], None] | None = None
        shard_digests = [unit.shard_digest() for unit in parts.distinct()]
        digests_by_unit = zip(*devices.gather(shard_digests), strict=True)
        sums = zip(parts.distinct(), digests_by_unit, strict=True)
        self.digests = {unit.name: _hex(sum(digests)) for unit, digests in sums}
        self._unverified = set(self.digests)

    def begin(self, *, backward: bool) -> None:
        forward = self.parts.forward
        # the embedding has no gradient
        in_backward = [key for key in forward[-2::-1] if key != EMBEDDING] if backward else []
        self._order, self._current = forward + in_backward, -1

    def end(self) -> None:
        while self._current < len(self._order) - 1:
            self._advance()
        for key in self._order[-1:]:
            self.parts.units[key].free()
        self._order = []

    def __call__(self, key: ModuleKey) -> None:
        """Gather the weights of a layer, the embedding or the head, for its forward or backward computation.

        Raises RunError if they are not what the ranks read from disk, or if the model uses another order.
        """
        if key not in self.parts.units:
            return
        if key not in self._order[max(0, self._current) :]:
            name = f"layer {key}" if isinstance(key, int) else f"the {key}"
            what = f"{name} of the base is computed in an unexpected order: this model cannot be sharded"
            raise RunError(what, fix="give --model.placement replicated")
        while self._current < 0 or self._order[self._current] != key:
            self._advance()
        unit = self.parts.units[key]
        if unit.name in self._unverified:
            self._unverified.discard(unit.name)
            if _hex(unit.digest()) != self.digests[unit.name]:
                what = f"{unit.name} of the base was corrupted between disk and memory"
                raise RunError(what, fix="start again; if it happens again, test the memory and the network")

    def iter_modules(self) -> Iterator[nn.Module]:
        for key, module in self.modules.items():
            self(key)
            yield module

    def sizes(self) -> dict[str, int]:
        return {"whole_bytes": self.parts.whole_bytes, "held_bytes": self.parts.held_bytes}

    def _advance(self) -> None:
        """Wait for the next module of the order, free the previous one, and start to gather the one after."""
        previous = self._unit(self._current)
        self._current += 1
        if self._wait_for_next is None:
            self._start(self._current)
        if self._wait_for_next is not None:
            self._wait_for_next()
            self._wait_for_next = None
        if previous is not None and previous not in (self._unit(self._current), self._unit(self._current + 1)):
            previous.free()
        self._start(self._current + 1)

    def _start(self, index: int) -> None:
        unit = self._unit(index)
        if unit is not None and not unit.is_gathered:
            self._wait_for_next = self._devices.start_all_gather(unit.allocate(), unit.shard)

    def _unit(self, index: int) -> ShardedUnit | None:
        return self.parts.units[self._order[index]] if 0 <= index < len(self._order) else None


def _hex(digest: int) -> str:
    return f"{digest % (1 << 64):016x}"
