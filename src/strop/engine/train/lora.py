"""The matrix multiplications of LoRA adapters on frozen linear layers, in plain PyTorch for any device and dtype.

They are the reference for kernels/cpu/lora.py and kernels/cuda/lora.py. Notation: z (T, k) is the input of the layers,
y (T, n) the output, A_i (r_i, k) and B_i (n_i, r_i) are the factors of adapter i, and za = scale z A^T (T, sum of r).
With `separate_inputs`, each of the m adapters has its own input, and z (T, m k) is the concatenation of these inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from strop.engine.train.buffers import Allocate, allocate_from_heap


@dataclass(frozen=True)
class Adapters:
    """Adapters with the same input.

    parts: A_1 (r_1, k), B_1 (n_1, r_1), A_2, ... columns: the range (start, end) of output features of each adapter.
    """

    parts: Sequence[Tensor]
    columns: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    separate_inputs: bool = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield (A, B, scale) of each adapter."""
        return zip(self.parts[::2], self.parts[1::2], self.scales, strict=True)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(len(part) for part in self.parts[::2])

    @property
    def width(self) -> int:
        """The number of input features k of one adapter."""
        return self.parts[0].shape[1]

    @property
    def input_columns(self) -> int:
        """The number of columns of z."""
        return self.width * (len(self.scales) if self.separate_inputs else 1)


class Addend(Protocol):
    """The adapters' term: za B^T (T, n) in the forward, grad_za A (T, input_columns) in the backward.

    It may be computed lazily, together with za or grad_za, so call one of the two methods before you use za or grad_za
    and before another layer requests its addend.
    """

    def into(self, y: Tensor) -> None:
        """Write the term to y."""

    def finish_projection(self) -> None:
        """Compute only za or grad_za."""


class Precomputed:
    """Base class of addends whose za or grad_za is already computed."""

    def finish_projection(self) -> None:
        pass


@dataclass(frozen=True)
class Product(Precomputed):
    """The addend projection @ w."""

    projection: Tensor
    w: Tensor

    def into(self, y: Tensor) -> None:
        torch.mm(self.projection, self.w, out=y)


@dataclass(frozen=True)
class ColumnBlocks(Precomputed):
    """The concatenation of projection_i @ w_i for each adapter i. The i are columns of projection and rows of w."""

    projection: Tensor
    w: Tensor
    ranks: tuple[int, ...]

    def into(self, y: Tensor) -> None:
        pairs = zip(torch.split(self.projection, [*self.ranks], 1), torch.split(self.w, [*self.ranks]), strict=True)
        torch.cat([projection @ w for projection, w in pairs], 1, out=y)


class InPlace(Precomputed):
    """An addend that y already contains."""

    def into(self, y: Tensor) -> None:
        pass


def frozen_matmul(
    x: Tensor, weight: Tensor, transposed: bool, y: Tensor, added: Addend | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Write x (T, k) W^T + added + bias + residual to y (T, n), and return y.

    transposed: the weight is W (n, k). Otherwise it is W^T (k, n).

    x W^T is accumulated onto the adapters' term and rounded once. In the other order, small LoRA updates would be lost
    early in training, because they are smaller than the rounding error of x W^T in bf16.
    """
    w = weight.t() if transposed else weight
    if added is not None:
        added.into(y)
        y.addmm_(x, w)
        if bias is not None:
            y += bias
    elif bias is not None:
        torch.addmm(bias, x, w, out=y)
    else:
        torch.mm(x, w, out=y)
    if residual is not None:
        y += residual
    return y


def forward(
    z: Tensor, outputs: int, adapters: Adapters, new: Allocate = allocate_from_heap
) -> tuple[Addend, tuple[Tensor, ...]]:
    """Return the addend with za_i B_i^T in the columns of adapter i, and the saved tensors: za, the fused A, and B.

    The fused A is the concatenation of all A_i, and the fused B is block-diagonal. This takes two matmuls in total
    instead of two per adapter. new: allocates the saved tensors, if the implementation supports it.
    """
    a = torch.cat([(part * scale).to(z.dtype) for part, _, scale in adapters])  # scaled first: rounded only once
    b, first = z.new_zeros(outputs, len(a)), 0
    for part, (start, end) in zip(adapters.parts[1::2], adapters.columns, strict=True):
        b[start:end, first : first + part.shape[1]].copy_(part)
        first += part.shape[1]
    za = project_down(z, a, adapters)
    return Product(za, b.t()), (za, a, b)


def backward(grad: Tensor, saved: tuple[Tensor, ...], adapters: Adapters) -> tuple[Addend, Tensor]:
    """Return the addend grad_za A (T, input_columns), and grad_za = grad B (T, sum of r). grad: (T, n)."""
    _, a, b = saved
    grad_za = grad @ b
    addend = ColumnBlocks(grad_za, a, adapters.ranks) if adapters.separate_inputs else Product(grad_za, a)
    return addend, grad_za


def gradients(
    grad: Tensor, z: Tensor, grad_za: Tensor, saved: tuple[Tensor, ...], adapters: Adapters
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of A_1, B_1, A_2, ... Autograd casts them to the adapters' dtype, fp32."""
    za, ranks = saved[0], list(adapters.ranks)
    if adapters.separate_inputs:
        pairs = zip(torch.split(grad_za, ranks, 1), torch.split(z, adapters.width, 1), strict=True)
        grads_a: Sequence[Tensor] = [part.t() @ z_i for part, z_i in pairs]
    else:
        grads_a = torch.split(grad_za.t() @ z, ranks)
    grads: list[Tensor] = []
    for (start, end), scale, part, grad_a in zip(
        adapters.columns, adapters.scales, torch.split(za, ranks, 1), grads_a, strict=True
    ):
        grads += [grad_a * scale, (part.t() @ grad[:, start:end]).t()]
    return grads


def project_down(z: Tensor, a: Tensor, adapters: Adapters) -> Tensor:
    """Return z A^T (T, sum of r). For adapters with separate inputs, return the concatenation of z_i A_i^T."""
    if not adapters.separate_inputs:
        return z @ a.t()
    pairs = zip(torch.split(z, adapters.width, 1), torch.split(a, list(adapters.ranks)), strict=True)
    return torch.cat([z_i @ part.t() for z_i, part in pairs], 1)
