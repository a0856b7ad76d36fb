"""The adapters' products on a card: what lora.py computes, in as few kernels as a card needs.

A and B are laid out in the type that is computed in for all layers at once, in front of each micro-batch: layer by
layer that was a fifth of a step's kernels. The gradients come out of their products in fp32, as the adapters are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strop.engine.train import lora
from strop.engine.train.buffers import Allocate, heap_empty
from strop.engine.train.linear import FusedLinear
from strop.engine.train.lora import Adapters, Addend, Product


@dataclass(frozen=True)
class Operands:
    """a (sum of r, k), scaled, and b (n, sum of r), zeros around its parts, of the adapters on one input."""

    a: Tensor
    b: Tensor

    def forward(
        self, z: Tensor, outputs: int, adapters: Adapters, new: Allocate = heap_empty
    ) -> tuple[Addend, tuple[Tensor, ...]]:
        za = lora.project_down(z, self.a, adapters)
        return Product(za, self.b.t()), (za, self.a, self.b)

    def backward(self, grad: Tensor, kept: tuple[Tensor, ...], adapters: Adapters) -> tuple[Addend, Tensor]:
        return lora.backward(grad, kept, adapters)

    def gradients(
        self, grad: Tensor, z: Tensor, grad_za: Tensor, kept: tuple[Tensor, ...], adapters: Adapters
    ) -> list[Tensor]:
        ranks, same = list(adapters.ranks), len(set(adapters.scales)) == 1
        columns = torch.split(grad_za, ranks, 1)
        if adapters.separate_inputs:
            inputs = torch.split(z, adapters.width, 1)
            of_a = [_wide(part.t(), input) for part, input in zip(columns, inputs, strict=True)]
            of_a = [part.mul_(scale) for part, scale in zip(of_a, adapters.scales, strict=True)]
        elif same:
            of_a = list(torch.split(_wide(grad_za.t(), z).mul_(adapters.scales[0]), ranks))
        else:
            whole = torch.split(_wide(grad_za.t(), z), ranks)
            of_a = [part * scale for part, scale in zip(whole, adapters.scales, strict=True)]
        parts = zip(of_a, torch.split(kept[0], ranks, 1), adapters.columns, strict=True)
        return [one for a, za, (start, end) in parts for one in (a, _wide(grad[:, start:end].t(), za))]


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, not rounded to the type of a and b (from PyTorch 2.8 on)."""
    return torch.mm(a, b) if a.dtype in (torch.float32, torch.float64) else torch.mm(a, b, out_dtype=torch.float32)


def lay_out(linears: Sequence[FusedLinear], dtype: torch.dtype) -> None:
    """Gives all linear layers the operands of the adapters that are active on them now."""
    if not linears or linears[0].bases[0].weight.device.type != "cuda":
        return
    found = [(one, one.active_adapters()) for one in linears]
    used = [(one, Adapters(now.parts, now.columns, now.scales)) for one, now in found if now.parts]
    for one in linears:
        one.operands = None
    for (one, _), made in zip(used, laid_out([(of, one.outputs) for one, of in used], dtype), strict=True):
        one.operands = made


def laid_out(wanted: Sequence[tuple[Adapters, int]], dtype: torch.dtype) -> list[Operands]:
    """The operands of each (adapters, number of outputs). In memory of their own: what an earlier micro-batch computed
    with may still wait for its backward."""
    alike: dict[Any, list[int]] = {}
    for place, (adapters, outputs) in enumerate(wanted):
        alike.setdefault((adapters.columns, adapters.ranks, adapters.width, outputs), []).append(place)
    made: dict[int, Operands] = {}
    with torch.no_grad():
        for (columns, ranks, width, outputs), places in alike.items():
            found = [wanted[place][0] for place in places]
            a, b = _group(found, columns, ranks, (len(places), sum(ranks), width), outputs, dtype)
            made.update((place, Operands(*both)) for place, *both in zip(places, a, b, strict=True))
    return [made[place] for place in range(len(wanted))]


def _group(
    found: Sequence[Adapters], columns: Any, ranks: Any, shape: tuple[int, int, int], outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """a (N, sum of r, k) and b (N, n, sum of r) of N layers that are alike. Many tensors are cast by one kernel where
    they lie without gaps; B's parts then go to their places in b, for all layers at once."""
    number, rank, _ = shape
    like = found[0].parts[0]
    a, first = torch.empty(shape, dtype=dtype, device=like.device), 0
    whole = len(ranks) == 1 and columns == ((0, outputs),)
    make = torch.empty if whole else torch.zeros
    b = make(number, outputs, rank, dtype=dtype, device=like.device)
    for i, (r, (start, end)) in enumerate(zip(ranks, columns, strict=True)):
        scaled = torch._foreach_mul([of.parts[2 * i] for of in found], [of.scales[i] for of in found])
        torch._foreach_copy_(list(a[:, first : first + r].unbind()), scaled)  # rounded once
        part = b if whole else torch.empty(number, end - start, r, dtype=dtype, device=like.device)
        torch._foreach_copy_(list(part.unbind()), [of.parts[2 * i + 1] for of in found])
        if not whole:
            b[:, start:end, first : first + r] = part
        first += r
    return a, b
