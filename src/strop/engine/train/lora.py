"""The adapters beside frozen linear layers, and their products in plain PyTorch: any device, any type of float.

What cpu/lora_tiles.py and cpu/frozen.py must equal. z (T, k) is the layers' input and y (T, n) their output; za
(T, sum of r) is scale z A^T. Where `apart`, each adapter has an input of its own: z (T, m k) holds them side by side.
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
    """Adapters that share their input. parts: A_1 (r_1, k), B_1 (n_1, r_1), A_2, ...; columns: for each, the first of
    the outputs it adds to and one behind the last."""

    parts: Sequence[Tensor]
    columns: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    apart: bool = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """A, B and scale of each."""
        return zip(self.parts[::2], self.parts[1::2], self.scales, strict=True)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(len(part) for part in self.parts[::2])

    @property
    def width(self) -> int:
        """k."""
        return self.parts[0].shape[1]

    @property
    def entered(self) -> int:
        """Columns of z."""
        return self.width * (len(self.scales) if self.apart else 1)


class Addend(Protocol):
    """What is added to a frozen product: in the forward (T, n) za B^T, in the backward (T, entered) grad_za A.

    It, and the za or grad_za that came with it, hold numbers once one of these two was called, which must be before the
    next layer asks for its own."""

    def into(self, y: Tensor) -> None:
        """y becomes what is added."""

    def alone(self) -> None:
        """Computes za or grad_za, where the product is not wanted."""


class Known:
    """What is computed already."""

    def alone(self) -> None:
        pass


@dataclass(frozen=True)
class Product(Known):
    """thin w."""

    thin: Tensor
    w: Tensor

    def into(self, y: Tensor) -> None:
        torch.mm(self.thin, self.w, out=y)


@dataclass(frozen=True)
class Parts(Known):
    """thin_i w_i side by side, of parts of thin's columns and of w's rows."""

    thin: Tensor
    w: Tensor
    ranks: tuple[int, ...]

    def into(self, y: Tensor) -> None:
        own = zip(torch.split(self.thin, [*self.ranks], 1), torch.split(self.w, [*self.ranks]), strict=True)
        torch.cat([part @ of for part, of in own], 1, out=y)


class InPlace(Known):
    """What y holds already."""

    def into(self, y: Tensor) -> None:
        pass


def product(
    x: Tensor, weight: Tensor, along: bool, y: Tensor, added: Addend | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y (T, n) = x (T, k) W^T + added + bias + residual; weight (n, k) with `along`, else W^T (k, n). Gives y.

    The frozen product is added to the adapters', and the sum is rounded once. The other way round, what an adapter adds
    to a number that is in bf16 already rounds away below half of its last bit, and a young adapter adds no more.
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
    """za_i B_i^T in columns_i of (T, outputs), and what the other two need: za, and A and B as they were used. new:
    gives the memory of what is kept, where the products can write there (lora_tiles).

    The A stand in one matrix and the B in another, zeros around them: two narrow products, not two an adapter.
    """
    # Scaled before they are rounded: what is computed in bf16 would be rounded once more.
    a = torch.cat([(part * scale).to(z.dtype) for part, _, scale in adapters])
    b, at = z.new_zeros(outputs, len(a)), 0
    for part, (start, end) in zip(adapters.parts[1::2], adapters.columns, strict=True):
        b[start:end, at : at + part.shape[1]].copy_(part)
        at += part.shape[1]
    za = project_down(z, a, adapters)
    return Product(za, b.t()), (za, a, b)


def backward(grad: Tensor, kept: tuple[Tensor, ...], adapters: Adapters) -> tuple[Addend, Tensor]:
    """grad_za A, as wide as z, and grad_za, scale not in it. grad (T, n)."""
    _, a, b = kept
    grad_za = grad @ b
    return (Parts(grad_za, a, adapters.ranks) if adapters.apart else Product(grad_za, a)), grad_za


def gradients(
    grad: Tensor, z: Tensor, grad_za: Tensor, kept: tuple[Tensor, ...], adapters: Adapters
) -> list[Tensor]:  # fmt: skip
    """Of A_1, B_1, A_2, ... The adapters are fp32, and autograd casts a gradient to the type of its input."""
    za, ranks = kept[0], list(adapters.ranks)
    if adapters.apart:
        own = zip(torch.split(grad_za, ranks, 1), torch.split(z, adapters.width, 1), strict=True)
        of_a: Sequence[Tensor] = [part.t() @ input for part, input in own]
    else:
        of_a = torch.split(grad_za.t() @ z, ranks)
    found: list[Tensor] = []
    for (start, end), scale, part, grad_a in zip(
        adapters.columns, adapters.scales, torch.split(za, ranks, 1), of_a, strict=True
    ):
        found += [grad_a * scale, (part.t() @ grad[:, start:end]).t()]
    return found


def project_down(z: Tensor, a: Tensor, adapters: Adapters) -> Tensor:
    """z A^T; where `apart`, z_i A_i^T side by side."""
    if not adapters.apart:
        return z @ a.t()
    own = zip(torch.split(z, adapters.width, 1), torch.split(a, list(adapters.ranks)), strict=True)
    return torch.cat([input @ part.t() for input, part in own], 1)
