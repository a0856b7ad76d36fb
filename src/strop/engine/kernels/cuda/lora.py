"""LoRA's matrix multiplications on a GPU: the functions of train/lora.py with fewer kernel launches.

A and B are cast to the compute dtype for all layers at once, before each micro-batch: layer by layer, the casts were a
fifth of a step's kernel launches. Gradients are computed in fp32, the dtype of the adapters.
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
    """The concatenated adapters of one input: scaled a (sum of ranks, k), and block-diagonal b (n, sum of ranks)."""

    a: Tensor
    b: Tensor

    def forward(
        self, z: Tensor, outputs: int, adapters: Adapters, new: Allocate = heap_empty
    ) -> tuple[Addend, tuple[Tensor, ...]]:
        za = lora.project_down(z, self.a, adapters)
        return Product(za, self.b.t()), (za, self.a, self.b)

    def backward(self, grad: Tensor, saved: tuple[Tensor, ...], adapters: Adapters) -> tuple[Addend, Tensor]:
        return lora.backward(grad, saved, adapters)

    def gradients(
        self, grad: Tensor, z: Tensor, grad_za: Tensor, saved: tuple[Tensor, ...], adapters: Adapters
    ) -> list[Tensor]:
        ranks, same_scale = list(adapters.ranks), len(set(adapters.scales)) == 1
        columns = torch.split(grad_za, ranks, 1)
        if adapters.separate_inputs:
            inputs = torch.split(z, adapters.width, 1)
            grads_a = [_matmul_fp32(part.t(), input) for part, input in zip(columns, inputs, strict=True)]
            grads_a = [part.mul_(scale) for part, scale in zip(grads_a, adapters.scales, strict=True)]
        elif same_scale:
            grads_a = list(torch.split(_matmul_fp32(grad_za.t(), z).mul_(adapters.scales[0]), ranks))
        else:
            unscaled = torch.split(_matmul_fp32(grad_za.t(), z), ranks)
            grads_a = [part * scale for part, scale in zip(unscaled, adapters.scales, strict=True)]
        parts = zip(grads_a, torch.split(saved[0], ranks, 1), adapters.columns, strict=True)
        return [x for a, za, (start, end) in parts for x in (a, _matmul_fp32(grad[:, start:end].t(), za))]


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in fp32, without rounding to the dtype of a and b (from PyTorch 2.8 on)."""
    return torch.mm(a, b) if a.dtype in (torch.float32, torch.float64) else torch.mm(a, b, out_dtype=torch.float32)


def prepare_adapters(linears: Sequence[FusedLinear], dtype: torch.dtype) -> None:
    """Set `operands` of all linear layers from their active adapters."""
    if not linears or linears[0].bases[0].weight.device.type != "cuda":
        return
    active = [(linear, linear.active_adapters()) for linear in linears]
    adapted = [(linear, Adapters(x.parts, x.columns, x.scales)) for linear, x in active if x.parts]
    for linear in linears:
        linear.operands = None
    operands = make_operands([(adapters, linear.outputs) for linear, adapters in adapted], dtype)
    for (linear, _), linear_operands in zip(adapted, operands, strict=True):
        linear.operands = linear_operands


def make_operands(layers: Sequence[tuple[Adapters, int]], dtype: torch.dtype) -> list[Operands]:
    """Return the operands for each (adapters, number of outputs).

    They are always in new memory: the backward of an earlier micro-batch may still need its operands.
    """
    groups: dict[Any, list[int]] = {}
    for place, (adapters, outputs) in enumerate(layers):
        groups.setdefault((adapters.columns, adapters.ranks, adapters.width, outputs), []).append(place)
    operands: dict[int, Operands] = {}
    with torch.no_grad():
        for (columns, ranks, width, outputs), places in groups.items():
            group = [layers[place][0] for place in places]
            a, b = _cast_group(group, columns, ranks, (len(places), sum(ranks), width), outputs, dtype)
            operands.update((place, Operands(*pair)) for place, *pair in zip(places, a, b, strict=True))
    return [operands[place] for place in range(len(layers))]


def _cast_group(
    group: Sequence[Adapters], columns: Any, ranks: Any, shape: tuple[int, int, int], outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a (N, sum of ranks, k) and b (N, n, sum of ranks) of N layers of the same shape.

    One kernel casts many contiguous tensors; the blocks of B are then copied to their places for all layers at once.
    """
    number, rank, _ = shape
    like = group[0].parts[0]
    a, first = torch.empty(shape, dtype=dtype, device=like.device), 0
    whole = len(ranks) == 1 and columns == ((0, outputs),)
    allocate = torch.empty if whole else torch.zeros
    b = allocate(number, outputs, rank, dtype=dtype, device=like.device)
    for i, (r, (start, end)) in enumerate(zip(ranks, columns, strict=True)):
        scaled = torch._foreach_mul([adapters.parts[2 * i] for adapters in group], [x.scales[i] for x in group])
        torch._foreach_copy_(list(a[:, first : first + r].unbind()), scaled)  # rounded once
        block = b if whole else torch.empty(number, end - start, r, dtype=dtype, device=like.device)
        torch._foreach_copy_(list(block.unbind()), [adapters.parts[2 * i + 1] for adapters in group])
        if not whole:
            b[:, start:end, first : first + r] = block
        first += r
    return a, b
