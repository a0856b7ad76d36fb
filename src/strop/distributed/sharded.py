"""A base model sharded over the ranks: each layer is gathered when it is computed, and freed after.

All ranks gather the same layers in the same order in every pass, including a rank that has nothing to compute or has
failed. The next layer is gathered while one is computed, so at most two are in memory.

torch's `fully_shard` is not used: it shards each parameter by rows. Here 4-bit weights are bytes with separate
quantization constants, and the fast step (strop.engine.train.fast) fuses several weights into one.
"""

from __future__ import annotations

from collections.abc import Callable

from strop.distributed.devices import Devices
from strop.errors import RunError
from strop.models.sharding import EMBEDDING, ModelShards, ModuleKey, ShardedLayer


class ShardedBase:
    """A sharded base model.

    modules: by layer number, "embedding" or "head". digests: a hash of each layer's weights, by the layer's name.
    """

    def __init__(self, shards: ModelShards, devices: Devices) -> None:
        self.shards, self.modules, self._devices = shards, shards.modules, devices
        self._order: list[ModuleKey] = []  # of the current pass
        self._current = 0  # index in `_order` of the module whose weights are gathered
        self._wait_for_next: Callable[[], None] | None = None
        layers = shards.distinct()
        digests_by_rank = devices.gather([layer.shard_digest() for layer in layers])
        self.digests = {
            layer.name: _format_digest(sum(digests))
            for layer, digests in zip(layers, zip(*digests_by_rank, strict=True), strict=True)
        }
        self._unverified = set(self.digests)

    def begin(self, *, backward: bool) -> None:
        """Begin a forward pass on all ranks. backward: a backward pass follows."""
        forward = self.shards.forward_order
        # the embedding has no gradient
        in_backward = [key for key in forward[-2::-1] if key != EMBEDDING] if backward else []
        self._order, self._current = forward + in_backward, -1

    def end(self) -> None:
        """Gather the remaining layers of the pass, so that ranks with more work can finish it."""
        while self._current < len(self._order) - 1:
            self._advance()
        for key in self._order[-1:]:
            self.shards.layers[key].free()
        self._order = []

    def __call__(self, key: ModuleKey) -> None:
        """Gather the weights of a layer, which stay until the next layer is gathered.

        Raises RunError if they differ from those that were read from disk, or if the order of layers is unexpected.
        """
        if key not in self.shards.layers:
            return
        layer = self.shards.layers[key]
        if key not in self._order[max(0, self._current) :]:
            what = f"{layer.name} of the base is computed in an unexpected order: this model cannot be sharded"
            raise RunError(what, fix="give --model.placement replicated")
        while self._current < 0 or self._order[self._current] != key:
            self._advance()
        if layer.name in self._unverified:
            self._unverified.discard(layer.name)
            if _format_digest(layer.digest()) != self.digests[layer.name]:
                what = f"{layer.name} of the base was corrupted between disk and memory"
                raise RunError(what, fix="start again; if it happens again, test the memory and the network")

    def sizes(self) -> dict[str, int]:
        return {"whole_bytes": self.shards.whole_bytes, "held_bytes": self.shards.held_bytes}

    def _advance(self) -> None:
        """Wait for the next layer of the order, free the previous one, and start to gather the one after."""
        previous = self._layer(self._current)
        self._current += 1
        if self._wait_for_next is None:
            self._start(self._current)
        if self._wait_for_next is not None:
            self._wait_for_next()
            self._wait_for_next = None
        if previous is not None and previous not in (self._layer(self._current), self._layer(self._current + 1)):
            previous.free()
        self._start(self._current + 1)

    def _start(self, index: int) -> None:
        layer = self._layer(index)
        if layer is not None and not layer.is_gathered:
            self._wait_for_next = self._devices.start_all_gather(layer.allocate(), layer.shard)

    def _layer(self, index: int) -> ShardedLayer | None:
        return self.shards.layers[self._order[index]] if 0 <= index < len(self._order) else None


def _format_digest(digest: int) -> str:
    return f"{digest % (1 << 64):016x}"
