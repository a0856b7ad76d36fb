"""A frozen base of which this process holds one share in so many.

The weights of a decoder layer, and of the embeddings, lie one behind the other as bytes, cut into equal shares. Bytes
are what is kept, sent and compared: 4-bit weights are never seen as floats on their way. The modules' weights are views
of a memory that is empty until all shares are put there, and is emptied again afterwards: the views stay what they are,
so that what autograd has saved of them is right again when the bytes are back.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strop.errors import ModelError
from strop.models.families.layers import text_of
from strop.models.tensor_files import is_finite

EMBEDDING, HEAD = "embedding", "head"
Where = int | str  # the number of a decoder layer, or one of these two
GRAIN = 64  # bytes: a share is a multiple of it, so that no number is cut
CHECKED = 1 << 20  # words that are looked at together
WORD = torch.int32


@dataclass(frozen=True)
class Slot:
    """One tensor of a unit. put: gives the module the tensor; read: its bytes from `low` to `high`, (n,) uint8."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype
    put: Callable[[Tensor], None]
    read: Callable[[int, int], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class Unit:
    """What is gathered together: tensors of one module. own: this process's share, (n,) uint8; whole: (world n,) uint8,
    whose memory is there between `take` and `drop`."""

    def __init__(self, name: str, slots: Sequence[Slot], rank: int, world: int, device: str) -> None:
        """Reads this process's share. Raises ModelError where a weight in it is not finite."""
        self.name = name
        slots = sorted(slots, key=lambda slot: -slot.dtype.itemsize)  # each begins at a multiple of its own numbers
        self.size = sum(slot.size for slot in slots)
        share = -(-self.size // (GRAIN * world)) * GRAIN
        self.begin = rank * share
        self._pages: mmap.mmap | None = None
        if device == "cpu" and sys.platform == "linux":
            # Not from the heap: what comes and goes there leaves holes between the activations that stay.
            self._pages = mmap.mmap(-1, world * share, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.whole = torch.frombuffer(self._pages, dtype=torch.uint8)
        else:
            self.whole = torch.empty(world * share, dtype=torch.uint8, device=device)
        self.own = torch.zeros(share, dtype=torch.uint8, device=device)
        at = 0
        for slot in slots:
            low, high = max(at, self.begin), min(at + slot.size, self.begin + share)
            if low < high:
                part = self.own[low - self.begin : high - self.begin]
                part.copy_(slot.read(low - at, high - at))
                if slot.dtype.is_floating_point and not is_finite(part.view(slot.dtype)):
                    raise ModelError(f"weight {slot.name} holds NaN or infinity", fix="fetch the model again")
            # .data: a tensor of its own for autograd, which would take gathering for a change of the weights
            slot.put(self.whole[at : at + slot.size].data.view(slot.dtype).view(*slot.shape))
            at += slot.size
        self.drop()

    def take(self) -> Tensor:
        """Room for all shares."""
        self.there = True
        if self._pages is None:
            self.whole.untyped_storage().resize_(self.whole.numel())
        return self.whole

    def drop(self) -> None:
        """Gives the memory back; the addresses stay taken."""
        self.there = False
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)
        else:
            self.whole.untyped_storage().resize_(0)

    def own_digest(self) -> int:
        """This share's part of the digest of the whole: those of all shares add up to it, modulo 2^64."""
        return digest(self.own, self.begin)

    def digest(self) -> int:
        return digest(self.whole, 0)


def digest(data: Tensor, begin: int) -> int:
    """The sum of the words of bytes that stand from `begin` on in a longer row, each times an odd number of its place,
    modulo 2^64: any change of one word changes it."""
    words, first, total = data.view(WORD), begin // WORD.itemsize, 0
    for at in range(0, len(words), CHECKED):
        some = words[at : at + CHECKED].long()
        places = torch.arange(first + at, first + at + len(some), device=data.device)
        total += int((some * (2 * places + 1)).sum())
    return total % (1 << 64)


@dataclass(frozen=True)
class Parts:
    """units by what they belong to, in the order in which a forward needs them; modules likewise. whole_bytes: of all
    weights; held_bytes: what of it this process holds between two steps."""

    units: dict[Where, Unit]
    modules: dict[Where, nn.Module]
    whole_bytes: int
    held_bytes: int

    @property
    def forward(self) -> list[Where]:
        """The order; where input and output share their weights, they are one unit and stand here twice."""
        layers = [where for where in self.units if isinstance(where, int)]
        return [where for where in (EMBEDDING, *layers, HEAD) if where in self.units]

    def distinct(self) -> list[Unit]:
        return list({id(unit): unit for unit in self.units.values()}.values())


def cut(
    model: Any, slots_of: Callable[[str, nn.Parameter], list[Slot] | None], rank: int, world: int, device: str
) -> Parts:
    """Cuts a model without weights (meta tensors). slots_of: of a parameter, by its name, how its tensors are read;
    None for one that is loaded whole."""
    modules, paths = _modules(model), {id(module): path for path, module in model.named_modules()}
    units: dict[Where, Unit] = {}
    made: dict[int, tuple[Unit, nn.Parameter]] = {}  # with the weight itself, so that no other gets its id
    whole = held = 0
    for where, module in modules.items():
        found: list[Slot] = []
        mine = [(name, weight) for name, weight in module.named_parameters() if id(weight) not in made]
        shared = [made[id(weight)][0] for _, weight in module.named_parameters() if id(weight) in made]
        taken: list[nn.Parameter] = []
        for name, weight in mine:
            slots = slots_of(f"{paths[id(module)]}.{name}", weight)
            found += slots or []
            taken += [weight] if slots else []
        if found:
            name = f"layer {where}" if isinstance(where, int) else f"the {where}"
            units[where] = Unit(name, found, rank, world, device)
            made |= {id(weight): (units[where], weight) for weight in taken}
            whole, held = whole + units[where].size, held + units[where].own.numel()
        elif shared:
            units[where] = shared[0]
    return Parts(units, {where: modules[where] for where in units}, whole, held)


def _modules(model: Any) -> dict[Where, nn.Module]:
    """What is gathered one after the other: the embedding, each decoder layer, the output head."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    return {EMBEDDING: inputs, **dict(enumerate(_layers(model))), HEAD: head}


def _layers(model: Any) -> nn.ModuleList:
    decoder = text_of(model)[0]
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        return layers
    return max((module for module in decoder.modules() if isinstance(module, nn.ModuleList)), key=len)


def dense(name: str, owner: nn.Module, leaf: str, dtype: torch.dtype, shape: Sequence[int], read: Any) -> Slot:
    """A parameter in the type that it is computed in."""
    return Slot(name, shape, dtype, partial(_hold, owner, leaf), read)


def _hold(owner: nn.Module, leaf: str, view: Tensor) -> None:
    setattr(owner, leaf, nn.Parameter(view, requires_grad=False))


def of_whole(make: Callable[[], Tensor]) -> Callable[[int, int], Tensor]:
    """Reads bytes out of a tensor that can only be made whole."""
    return lambda low, high: make().contiguous().flatten().view(torch.uint8)[low:high]
