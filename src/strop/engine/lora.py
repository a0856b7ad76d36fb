"""The adapters beside frozen linear layers, and their products in plain PyTorch: any device, any type of float.

What lora_tiles.py must equal. z (T, k) is the layers' input and y (T, n) their output; za (T, sum of r) is scale z A^T.
Where `apart`, each adapter has an input of its own, and z (T, m k) holds them side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.engine.arena import New, in_heap


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


def forward(
    z: Tensor, outputs: int, adapters: Adapters, new: New = in_heap
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """y (T, outputs) with y[:, columns_i] = za_i B_i^T, and what the other two need: za, and A and B as they were used.
    new: gives the memory that y lies in.

    The A stand in one matrix and the B in another, zeros around them: two narrow products, not two an adapter.
    """
    # Scaled before they are rounded: what is computed in bf16 would be rounded once more.
    a = torch.cat([(part * scale).to(z.dtype) for part, _, scale in adapters])
    b, at = z.new_zeros(outputs, len(a)), 0
    for part, (start, end) in zip(adapters.parts[1::2], adapters.columns, strict=True):
        b[start:end, at : at + part.shape[1]].copy_(part)
        at += part.shape[1]
    za = entering(z, a, adapters)
    return torch.mm(za, b.t(), out=new(len(z), outputs, z)), (za, a, b)


def backward(grad: Tensor, further: bool, kept: tuple[Tensor, ...], adapters: Adapters) -> tuple[Tensor, Tensor | None]:
    """grad_za, scale not in it, and where it goes further grad_za A, as wide as z. grad (T, n)."""
    _, a, b = kept
    grad_za = grad @ b
    if not further:
        return grad_za, None
    if not adapters.apart:
        return grad_za, grad_za @ a
    own = zip(torch.split(grad_za, list(adapters.ranks), 1), torch.split(a, list(adapters.ranks)), strict=True)
    return grad_za, torch.cat([part @ of for part, of in own], 1)


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


def entering(z: Tensor, a: Tensor, adapters: Adapters) -> Tensor:
    """z A^T; where `apart`, z_i A_i^T side by side."""
    if not adapters.apart:
        return z @ a.t()
    own = zip(torch.split(z, adapters.width, 1), torch.split(a, list(adapters.ranks)), strict=True)
    return torch.cat([input @ part.t() for input, part in own], 1)
