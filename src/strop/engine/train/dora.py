"""DoRA (Liu et al., arXiv:2402.09353) on frozen linear layers with one adapter each.

y = g (z W^T + s z A^T B^T) + bias, with g = m / |W + s B A|, row by row, and the norm a constant in the gradient
(section 4.3). Dropout leaves z' of z for an adapter. Then peft and the authors' own code drop of what DoRA changes, and
not of the frozen layer: y = z W^T + (g - 1) z' W^T + g s z' A^T B^T + bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.engine.kernels.protocols import Ops
from strop.engine.train import lora
from strop.engine.train.dropout import Dropped, grown
from strop.engine.train.lora import Adapters


@dataclass(frozen=True)
class Dora:
    """squares (n,): |W|^2 of each row, fp32."""

    ops: Ops
    squares: Tensor

    def gains(self, weight: Tensor, adapters: Adapters, magnitudes: Sequence[Tensor]) -> Tensor:
        """g (n,), in the type of `squares`; 1 where no adapter is. |W + s B A|^2 without W + s B A: (n, k) is large.
        s is without what makes up for dropout (`undropped`)."""
        wide = self.squares.dtype
        gains = torch.ones_like(self.squares)
        for (a, b, scale), (start, end), m in zip(adapters, adapters.columns, magnitudes, strict=True):
            a, b = a.to(wide), b.to(wide)
            across = (weight[start:end] @ a.t().to(weight.dtype)).to(wide)
            change = 2 * scale * (across * b).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
            gains[start:end] = m.to(wide) / (self.squares[start:end] + change).clamp_(min=0).sqrt_()
        return gains

    def changed_(self, y: Tensor, z: Tensor, weight: Tensor, gains: Tensor, parts: Dropping) -> None:
        """y (T, n), which is s z' A^T B^T, becomes (g - 1) z' W^T + g s z' A^T B^T: each term as small as the change,
        which is rounded once more with the frozen product. z (T, m k): z' of each adapter."""
        self.ops.scale_columns_(y, gains)
        for (start, end), own, up, _ in parts.each(z):
            product = own @ weight[start:end].t()
            y[:, start:end] += self.ops.scale_columns_(product, (gains[start:end] - 1) * up)

    def along(self, grad: Tensor, gains: Tensor, z: Tensor, weight: Tensor, parts: Dropping) -> Tensor:
        """The gradients of g, times g (n,). What g multiplies, z' W^T + s z' A^T B^T, is computed again."""
        along = torch.zeros_like(gains)
        for (start, end), own, up, adapter in parts.each(z):
            product = own.new_empty(len(own), end - start)
            lora.forward(own, end - start, adapter)[0].into(product)
            product.addmm_(own, weight[start:end].t(), alpha=up)
            upstream = grad[:, start:end].contiguous()
            along[start:end] = self.ops.scale_columns_backward(upstream, product, gains[start:end])[1]
        return along.mul_(gains)

    def back_(self, grad_z: Tensor, grad: Tensor, weight: Tensor, gains: Tensor, parts: Dropping) -> None:
        """Adds to the gradients of the z' (T, m k) what comes through (g - 1) z' W^T."""
        for (start, end), own, up, _ in parts.each(grad_z):
            through = grad[:, start:end].clone(memory_format=torch.contiguous_format)
            own.addmm_(self.ops.scale_columns_(through, (gains[start:end] - 1) * up), weight[start:end])


@dataclass(frozen=True)
class Dropping:
    """The adapters with what their dropout does; scales of the adapters: with what makes up for it."""

    adapters: Adapters
    dropped: Dropped

    @property
    def undropped(self) -> Adapters:
        """With the scales of the adapters themselves."""
        now = self.adapters
        scales = tuple(s / grown(level) for s, level in zip(now.scales, self.dropped.levels, strict=True))
        return Adapters(now.parts, now.columns, scales, now.apart)

    def each(self, z: Tensor) -> Iterator[tuple[tuple[int, int], Tensor, float, Adapters]]:
        """Of each adapter: its outputs, from and to; its z' (a view, not scaled up); by what z' is to be scaled up; and
        the adapter alone."""
        now = self.adapters
        for i, (span, own) in enumerate(zip(now.columns, torch.split(z, now.width, 1), strict=True)):
            alone = Adapters(now.parts[2 * i : 2 * i + 2], ((0, span[1] - span[0]),), now.scales[i : i + 1])
            yield span, own, grown(self.dropped.levels[i]), alone
