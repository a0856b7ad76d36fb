"""The matrix multiplications of LoRA adapters next to frozen linear layers, in plain PyTorch for any device and dtype.

This is the reference for the kernels in kernels/cpu and kernels/cuda. Notation: z (T, k) is the input of the layers, y
(T, n) their output, A_i (r_i, k) and B_i (n_i, r_i) the factors of adapter i, and za = scale z A^T (T, sum of r). With
`separate_inputs` each of the m adapters has its own input, and z (T, m k) holds them next to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from strop.engine.train.buffers import Allocate, heap_empty


@dataclass(frozen=True)
class Adapters:
    """Adapters that share their input.

    parts: A_1 (r_1, k), B_1 (n_1, r_1), A_2, ... columns: the first and one past the last output that each adapter adds
    to.
    """

    parts: Sequence[Tensor]
    columns: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    separate_inputs: bool = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Iterate over (A, B, scale) of each adapter."""
        return zip(self.parts[::2], self.parts[1::2], self.scales, strict=True)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(len(part) for part in self.parts[::2])

    @property
    def width(self) -> int:
        """The input features k of one adapter."""
        return self.parts[0].shape[1]

    @property
    def input_columns(self) -> int:
        """The number of columns of z."""
        return self.width * (len(self.scales) if self.separate_inputs else 1)


class Addend(Protocol):
    """The term that a frozen matmul adds: za B^T (T, n) in the forward, grad_za A (T, input_columns) in the backward.

    Call one of the two methods before the next layer requests its own addend. The za or grad_za returned with the
    addend is only valid after that call.
    """

    def into(self, y: Tensor) -> None:
        """Write the term to y."""

    def finish_projection(self) -> None:
        """Compute za or grad_za only, for a caller that does not need the term."""


class Precomputed:
    """Base of addends whose projection is already computed."""

    def finish_projection(self) -> None:
        pass


@dataclass(frozen=True)
class Product(Precomputed):
    """The addend thin w."""

    thin: Tensor
    w: Tensor

    def into(self, y: Tensor) -> None:
        torch.mm(self.thin, self.w, out=y)


@dataclass(frozen=True)
class ColumnBlocks(Precomputed):
    """The addend thin_i w_i for each adapter i, next to each other: thin split by columns, w by rows."""

    thin: Tensor
    w: Tensor
    ranks: tuple[int, ...]

    def into(self, y: Tensor) -> None:
        pairs = zip(torch.split(self.thin, [*self.ranks], 1), torch.split(self.w, [*self.ranks]), strict=True)
        torch.cat([thin @ w for thin, w in pairs], 1, out=y)


class InPlace(Precomputed):
    """The addend that y already contains."""

    def into(self, y: Tensor) -> None:
        pass


def frozen_matmul(
    x: Tensor, weight: Tensor, along: bool, y: Tensor, added: Addend | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute y (T, n) = x (T, k) W^T + added + bias + residual in place and return y.

    along: the weight is (n, k) and is transposed. Otherwise it is W^T (k, n).

    The frozen product is added to the adapters' product, and the sum is rounded once. In the other order small LoRA
    updates are lost early in training: what an adapter adds to a bf16 value is rounded away below half of its last bit.
    """
    w = weight.t() if along else weight
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
    z: Tensor, outputs: int, adapters: Adapters, new: Allocate = heap_empty
) -> tuple[Addend, tuple[Tensor, ...]]:
    """Return za_i B_i^T in columns_i of (T, outputs), and the tensors that the backward needs: za, and A and B as used.

    new: allocates the saved tensors in implementations that can write there (kernels/cpu/lora.py).

    All A form one matrix, and all B another with zeros around them: two narrow matmuls in total, not two an adapter.
    """
    # Scaled before rounding: scaling a bf16 result would round once more.
    a = torch.cat([(part * scale).to(z.dtype) for part, _, scale in adapters])
    b, at = z.new_zeros(outputs, len(a)), 0
    for part, (start, end) in zip(adapters.parts[1::2], adapters.columns, strict=True):
        b[start:end, at : at + part.shape[1]].copy_(part)
        at += part.shape[1]
    za = project_down(z, a, adapters)
    return Product(za, b.t()), (za, a, b)


def backward(grad: Tensor, saved: tuple[Tensor, ...], adapters: Adapters) -> tuple[Addend, Tensor]:
    """Return grad_za A (T, input_columns) and grad_za (T, sum of r), without the scale. grad: (T, n)."""
    _, a, b = saved
    grad_za = grad @ b
    addend = ColumnBlocks(grad_za, a, adapters.ranks) if adapters.separate_inputs else Product(grad_za, a)
    return addend, grad_za


def gradients(
    grad: Tensor, z: Tensor, grad_za: Tensor, saved: tuple[Tensor, ...], adapters: Adapters
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of A_1, B_1, A_2, ... Adapters are fp32; autograd casts a gradient to its input's dtype."""
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
    """Return z A^T (T, sum of r), or z_i A_i^T next to each other for adapters with separate inputs."""
    if not adapters.separate_inputs:
        return z @ a.t()
    pairs = zip(torch.split(z, adapters.width, 1), torch.split(a, list(adapters.ranks)), strict=True)
    return torch.cat([z_i @ part.t() for z_i, part in pairs], 1)
