"""Dropout in front of the adapters, with masks that are drawn by counting and not in turn.

Whether a number is dropped is a function of (seed, step, text of the row up to the token, adapter, feature): the
generator Philox-4x32-7 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), key (seed, step),
counter (feature / 8, adapter, key of the token). So masks are the same however a batch is cut into micro-batches,
packed or padded, computed again in a backward, dealt out to devices or resumed. The key of a token is a hash of the
row's tokens up to it: rows that begin alike are dropped alike until they part, which is why a shared prefix may be
computed once. Each row alone has the masks of any dropout; in another step they are others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function

from strop.engine.train.transfer import sent

LEVELS = 1 << 16  # a draw is a number of 16 bits: a share is rounded to this many levels
ROUNDS = 7  # the fewest with which Philox-4x32 passes BigCrush (Salmon et al., table 2)
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF
DRAWN = 1 << 22  # draws at once, in plain PyTorch


class Drops(Protocol):
    """What draws the masks and puts them to use; meanings below."""

    def spread(self, z: Tensor, dropped: Dropped, out: Tensor | None = None) -> Tensor: ...
    def fold(self, grad: Tensor, dropped: Dropped) -> Tensor: ...


@dataclass(frozen=True)
class Dropped:
    """What adapters that share their input z (T, k) have dropped of it.

    tokens (T,): the key of each row of z, int64. numbers: of each adapter. levels: for each adapter, the draws below
    this one are dropped; 0: none.
    """

    seed: int
    step: int
    tokens: Tensor
    numbers: tuple[int, ...]
    levels: tuple[int, ...]


class Masks:
    """Which masks a model's dropout draws now, and by what it draws them for a tensor (`spread` and `fold` below).

    tokens: the keys of what the model's own forward computes, (B, S).
    """

    def __init__(self, dropout_ops_for: Callable[[Tensor], Drops]) -> None:
        self.dropout_ops_for = dropout_ops_for
        self.seed, self.step = 0, 0
        self.tokens: Tensor | None = None

    def begin(self, seed: int, step: int) -> None:
        """The masks of another step."""
        self.seed, self.step = seed & LOW, step & LOW


class CountedDropout(nn.Dropout):
    """In the place of peft's dropout in front of an adapter: the masks of this module, which `masks` numbers.

    Rows that are not those of the micro-batch (bytes that are joined to patches, experts that see a part of them) are
    dropped as PyTorch would.
    """

    def __init__(self, p: float, number: int, masks: Masks) -> None:
        super().__init__(p)
        self.number, self.masks = number, masks

    @property
    def level(self) -> int:
        return max(1, min(LEVELS - 1, round(self.p * LEVELS))) if self.training and self.p else 0

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.masks.tokens
        if not self.level:
            return x
        if tokens is None or not _are_rows(x.shape[:-1], tokens):
            return super().forward(x)
        dropped = Dropped(self.masks.seed, self.masks.step, tokens.reshape(-1), (self.number,), (self.level,))
        drops = self.masks.dropout_ops_for(x)
        kept: Tensor = _Kept.apply(x.reshape(-1, x.shape[-1]), dropped, drops)  # type: ignore[no-untyped-call]
        return kept.view(x.shape) * grown(self.level)


def _are_rows(leading: torch.Size, tokens: Tensor) -> bool:
    """Whether a tensor with these sizes in front of its features has a row for each of tokens (B, S), in their order:
    as (B, S), (B, 1, S) (DeepSeek's kv_b_proj) or (B S,) (OPT)."""
    return leading == (tokens.numel(),) or _without_ones(leading) == _without_ones(tokens.shape)


def _without_ones(sizes: torch.Size) -> list[int]:
    return [size for size in sizes if size != 1]


def grown(level: int) -> float:
    """What is kept is multiplied by this, so that its mean stays what it was."""
    return LEVELS / (LEVELS - level)


def masks_of(model: nn.Module, dropout_ops_for: Callable[[Tensor], Drops]) -> Masks:
    """The masks of all of a model's adapters, whose dropout is replaced by CountedDropout where it is not yet."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    found = [(layer.lora_dropout, name, one) for layer in layers for name, one in layer.lora_dropout.items()]
    known = [one.masks for _, _, one in found if isinstance(one, CountedDropout)]
    masks = known[0] if known else Masks(dropout_ops_for)
    for number, (where, name, one) in enumerate(found):
        if type(one) is nn.Dropout:
            where[name] = CountedDropout(one.p, number, masks).train(one.training)
    return masks


def token_keys(ids: Any) -> Any:
    """A hash of a row's tokens up to each one. ids (n,) of any type of integer; gives int64 (n,).

    The sum of what SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) makes of each place and token.
    """
    at = (np.arange(1, len(ids) + 1, dtype=np.uint64) << np.uint64(32)) + np.asarray(ids).astype(np.uint64)
    x = at * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.cumsum(x ^ (x >> np.uint64(31)), dtype=np.uint64).view(np.int64)


def spread(z: Tensor, dropped: Dropped, out: Tensor | None = None) -> Tensor:
    """z (T, k) once for each adapter, side by side (T, m k), with zeros where it is dropped. `out` is left unused."""
    parts = [(z[rows, None] * kept).flatten(1) for rows, kept in _keep(dropped, z.shape[1])]
    return torch.cat(parts)


def fold(grad: Tensor, dropped: Dropped) -> Tensor:
    """The gradient of z (T, k) from that of spread's (T, m k): the sum over the adapters of what is not dropped."""
    apart = grad.view(len(grad), len(dropped.numbers), -1)
    wide = torch.promote_types(grad.dtype, torch.float32)
    parts = [(apart[rows].to(wide) * kept).sum(1).to(grad.dtype) for rows, kept in _keep(dropped, apart.shape[2])]
    return torch.cat(parts)


def _keep(dropped: Dropped, width: int) -> Iterator[tuple[slice, Tensor]]:
    """What is kept, (rows, m, width) bool, some rows after the other: a draw takes 8 bytes and more."""
    device, many = dropped.tokens.device, len(dropped.numbers)
    asked = dropped.numbers, dropped.levels, (dropped.seed, dropped.step)
    numbers, levels, key = sent([np.array(one, dtype=np.int64) for one in asked], device)
    block = max(1, DRAWN // (many * width))
    for begin in range(0, len(dropped.tokens), block):
        rows = slice(begin, begin + block)
        yield rows, draws(dropped.tokens[rows], numbers, key, width) >= levels[:, None]


def draws(tokens: Tensor, numbers: Tensor, key: Tensor, width: int) -> Tensor:
    """(T, m, width) int64, from 0 to LEVELS - 1. tokens (T,), numbers (m,), key (2,), all int64.

    Feature j of a row takes 16 bits of one of the four words of counter i of c = ceil(width / 8): the words are laid
    side by side, word w of counter i at w c + i, and of each word the low half stands first.
    """
    count = -(-width // 8)
    a = torch.arange(count, device=tokens.device)[None, None]
    b, c, d = numbers[None, :, None], (tokens & LOW)[:, None, None], ((tokens >> 32) & LOW)[:, None, None]
    shape = (len(tokens), len(numbers), count)
    words = torch.cat([word.expand(shape) for word in philox((a, b, c, d), key)], -1)
    return torch.stack([words & (LEVELS - 1), words >> 16], -1).flatten(-2)[..., :width]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32 with ROUNDS rounds; all words are 32 bits in int64."""
    a, b, c, d = counter
    for step in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # 64 bits, the sign bit one of them
        keys = [(key[i] + step * WEYL[i]) & LOW for i in (0, 1)]
        a, c = ((second >> 32) & LOW) ^ b ^ keys[0], ((first >> 32) & LOW) ^ d ^ keys[1]
        b, d = second & LOW, first & LOW
    return a, b, c, d


class _Kept(Function):
    """`spread` of one adapter with its gradient; saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Dropped, drops: Drops) -> Tensor:
        ctx.dropped, ctx.drops = dropped, drops
        return drops.spread(x, dropped)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.drops.fold(grad.contiguous(), ctx.dropped), None, None
