"""LoRA's matrix multiplications on a GPU, with fewer kernel launches than those of train/lora.py.

A and B of all layers are cast to the compute dtype together, before each micro-batch. Casts in each layer were a fifth
of a step's kernel launches. Gradients are computed in fp32, the dtype of the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strop.engine.kernels.cuda import selftest
from strop.engine.kernels.operations import FP32_SUMS
from strop.engine.train import lora
from strop.engine.train.buffers import Allocate, allocate_from_heap
from strop.engine.train.linear import FusedLinear
from strop.engine.train.lora import Adapters, Addend, Product


@dataclass(frozen=True)
class Operands:
    """LoraOps with the fused factors of adapters that share their input.

    a: the scaled A of all adapters, concatenated, (sum of ranks, k). b: all B as a block-diagonal matrix, (n, sum of
    ranks).
    """

    a: Tensor
    b: Tensor

    def forward(
        self, z: Tensor, outputs: int, adapters: Adapters, new: Allocate = allocate_from_heap
    ) -> tuple[Addend, tuple[Tensor, ...]]:
        za = lora.project_down(z, self.a, adapters)
        return Product(za, self.b.t()), (za, self.a, self.b)

    def backward(self, grad: Tensor, saved: tuple[Tensor, ...], adapters: Adapters) -> tuple[Addend, Tensor]:
        return lora.backward(grad, saved, adapters)

    def gradients(
        self, grad: Tensor, z: Tensor, grad_za: Tensor, saved: tuple[Tensor, ...], adapters: Adapters
    ) -> list[Tensor]:
        ranks, same_scale = list(adapters.ranks), len(set(adapters.scales)) == 1
        if adapters.separate_inputs:
            pairs = zip(torch.split(grad_za, ranks, 1), torch.split(z, adapters.width, 1), strict=True)
            grads_a = [_matmul_fp32(part.t(), z_i) for part, z_i in pairs]
            grads_a = [part.mul_(scale) for part, scale in zip(grads_a, adapters.scales, strict=True)]
        elif same_scale:
            grads_a = list(torch.split(_matmul_fp32(grad_za.t(), z).mul_(adapters.scales[0]), ranks))
        else:
            unscaled = torch.split(_matmul_fp32(grad_za.t(), z), ranks)
            grads_a = [part * scale for part, scale in zip(unscaled, adapters.scales, strict=True)]
        parts = zip(grads_a, torch.split(saved[0], ranks, 1), adapters.columns, strict=True)
        return [x for grad_a, za, (start, end) in parts for x in (grad_a, _matmul_fp32(grad[:, start:end].t(), za))]


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in fp32, without rounding to the dtype of a and b (needs PyTorch 2.8 or newer)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if FP32_SUMS in selftest.find_failures(a.device):
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def prepare_adapters(linears: Sequence[FusedLinear], dtype: torch.dtype) -> None:
    """Set `prepared_lora_ops` of linear layers on a GPU from their active adapters."""
    if not linears or linears[0].bases[0].weight.device.type != "cuda":
        return
    active = [(linear, linear.active_adapters()) for linear in linears]
    adapted = [(linear, Adapters(x.parts, x.columns, x.scales)) for linear, x in active if x.parts]
    for linear in linears:
        linear.prepared_lora_ops = None
    operands = make_operands([(adapters, linear.out_features) for linear, adapters in adapted], dtype)
    for (linear, _), linear_operands in zip(adapted, operands, strict=True):
        linear.prepared_lora_ops = linear_operands


def make_operands(layers: Sequence[tuple[Adapters, int]], dtype: torch.dtype) -> list[Operands]:
    """Return the operands of each layer, given as (adapters, number of output features).

    They are always in new memory: the backward of an earlier micro-batch may still need its operands.
    """
    groups: dict[Any, list[int]] = {}
    for i, (adapters, outputs) in enumerate(layers):
        groups.setdefault((adapters.columns, adapters.ranks, adapters.width, outputs), []).append(i)
    operands: dict[int, Operands] = {}
    with torch.no_grad():
        for (columns, ranks, width, outputs), indices in groups.items():
            group = [layers[i][0] for i in indices]
            a, b = _cast_group(group, columns, ranks, (len(group), sum(ranks), width), outputs, dtype)
            operands.update((i, Operands(*pair)) for i, *pair in zip(indices, a, b, strict=True))
    return [operands[i] for i in range(len(layers))]


def _cast_group(
    group: Sequence[Adapters], columns: Any, ranks: Any, shape: tuple[int, int, int], outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a (N, sum of ranks, k) and b (N, n, sum of ranks) of N layers of the same shape.

    One kernel casts the matrices of all layers, which must be contiguous. B is then copied into its blocks of b.
    """
    number, rank, _ = shape
    device, first = group[0].parts[0].device, 0
    a = torch.empty(shape, dtype=dtype, device=device)
    is_single_block = len(ranks) == 1 and columns == ((0, outputs),)
    allocate = torch.empty if is_single_block else torch.zeros
    b = allocate(number, outputs, rank, dtype=dtype, device=device)
    for i, (r, (start, end)) in enumerate(zip(ranks, columns, strict=True)):
        scaled = torch._foreach_mul([adapters.parts[2 * i] for adapters in group], [x.scales[i] for x in group])
        torch._foreach_copy_(list(a[:, first : first + r].unbind()), scaled)  # rounded once
        block = b if is_single_block else torch.empty(number, end - start, r, dtype=dtype, device=device)
        torch._foreach_copy_(list(block.unbind()), [adapters.parts[2 * i + 1] for adapters in group])
        if not is_single_block:
            b[:, start:end, first : first + r] = block
        first += r
    return a, b
