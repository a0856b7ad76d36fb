"""Dropout before the adapters, with masks from a counter-based generator.

Whether an element is dropped is a function of (seed, step, text of the row up to the token, adapter, feature). The
generator is Philox-4x32-7 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with key (seed,
step) and counter (feature / 8, adapter, key of the token). The masks are therefore the same however a batch is split
into micro-batches, packed or padded, recomputed in a backward, distributed over devices or resumed.

The key of a token is a hash of the row's tokens up to it. Rows with a common prefix get the same masks up to where they
differ, so a shared prefix can be computed once. Masks change with each step.
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

from strop.engine.train.buffers import copy_to_device

LEVELS = 1 << 16  # random values have 16 bits, so the dropout rate is rounded to a multiple of 1 / LEVELS
ROUNDS = 7  # the fewest with which Philox-4x32 passes BigCrush (Salmon et al., table 2)
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF
BLOCK_VALUES = 1 << 22  # maximum number of random values generated at once


class DropoutOps(Protocol):
    """Functions that generate masks and apply them; `apply_masks` and `apply_masks_backward` below define them."""

    def apply_masks(self, z: Tensor, dropped: DropoutSpec, out: Tensor | None = None) -> Tensor: ...
    def apply_masks_backward(self, grad: Tensor, dropped: DropoutSpec) -> Tensor: ...


@dataclass(frozen=True)
class DropoutSpec:
    """The masks of m adapters that share their input z (T, k).

    tokens: the key of each row of z, shape (T,), int64. numbers: the adapters' ids. levels: for each adapter,
    elements whose random value is below the level are dropped; 0 drops none.
    """

    seed: int
    step: int
    tokens: Tensor
    numbers: tuple[int, ...]
    levels: tuple[int, ...]


class Masks:
    """The state of a model's dropout.

    tokens: the token keys (B, S) of the input that the model's own forward is computing. dropout_ops_for: returns the
    DropoutOps for a tensor.
    """

    def __init__(self, dropout_ops_for: Callable[[Tensor], DropoutOps]) -> None:
        self.dropout_ops_for = dropout_ops_for
        self.seed, self.step = 0, 0
        self.tokens: Tensor | None = None

    def begin(self, seed: int, step: int) -> None:
        """Use the masks of this training step from now on."""
        self.seed, self.step = seed & LOW, step & LOW


class CounterDropout(nn.Dropout):
    """Replaces PEFT's dropout before an adapter. number: the adapter's id in the random counter.

    PyTorch's dropout is used for inputs whose rows are not the micro-batch's tokens, such as patches of bytes, or the
    tokens routed to one expert.
    """

    def __init__(self, p: float, number: int, masks: Masks) -> None:
        super().__init__(p)
        self.number, self.masks = number, masks

    @property
    def level(self) -> int:
        """Random values below this are dropped; 0 when dropout is off."""
        return max(1, min(LEVELS - 1, round(self.p * LEVELS))) if self.training and self.p else 0

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.masks.tokens
        if not self.level:
            return x
        if tokens is None or not _are_token_rows(x.shape[:-1], tokens):
            return super().forward(x)
        dropped = DropoutSpec(self.masks.seed, self.masks.step, tokens.reshape(-1), (self.number,), (self.level,))
        ops = self.masks.dropout_ops_for(x)
        kept: Tensor = _MaskFunction.apply(x.reshape(-1, x.shape[-1]), dropped, ops)  # type: ignore[no-untyped-call]
        return kept.view(x.shape) * keep_scale(self.level)


def _are_token_rows(leading: torch.Size, tokens: Tensor) -> bool:
    """Return whether a tensor with these leading dimensions has one row per token of `tokens` (B, S), in order.

    The dimensions may be (B, S), (B, 1, S) (DeepSeek's kv_b_proj) or (B S,) (OPT).
    """
    return leading == (tokens.numel(),) or _without_ones(leading) == _without_ones(tokens.shape)


def _without_ones(sizes: torch.Size) -> list[int]:
    return [size for size in sizes if size != 1]


def keep_scale(level: int) -> float:
    """Return the factor for kept elements that preserves their mean."""
    return LEVELS / (LEVELS - level)


def install_dropout(model: nn.Module, dropout_ops_for: Callable[[Tensor], DropoutOps]) -> Masks:
    """Replace the dropout of all adapters with CounterDropout, unless already replaced; return their shared masks."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    entries = [(layer.lora_dropout, name, module) for layer in layers for name, module in layer.lora_dropout.items()]
    installed = [module.masks for _, _, module in entries if isinstance(module, CounterDropout)]
    masks = installed[0] if installed else Masks(dropout_ops_for)
    for number, (container, name, module) in enumerate(entries):
        if type(module) is nn.Dropout:
            container[name] = CounterDropout(module.p, number, masks).train(module.training)
    return masks


def token_keys(ids: Any) -> Any:
    """Return a hash of the row's tokens up to each token. ids: (n,), any integer dtype. Returns (n,), int64.

    The key is the running sum of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of each position and token.
    """
    at = (np.arange(1, len(ids) + 1, dtype=np.uint64) << np.uint64(32)) + np.asarray(ids).astype(np.uint64)
    x = at * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.cumsum(x ^ (x >> np.uint64(31)), dtype=np.uint64).view(np.int64)


def apply_masks(z: Tensor, dropped: DropoutSpec, out: Tensor | None = None) -> Tensor:
    """Return a copy of z (T, k) for each adapter, with dropped elements set to 0: (T, m k). `out` is ignored."""
    blocks = [(z[rows, None] * kept).flatten(1) for rows, kept in _keep_masks(dropped, z.shape[1])]
    return torch.cat(blocks)


def apply_masks_backward(grad: Tensor, dropped: DropoutSpec) -> Tensor:
    """Return the gradient of z (T, k) from that of apply_masks (T, m k): the sum over the adapters of kept elements."""
    by_adapter = grad.view(len(grad), len(dropped.numbers), -1)
    wide = torch.promote_types(grad.dtype, torch.float32)
    blocks = [
        (by_adapter[rows].to(wide) * kept).sum(1).to(grad.dtype)
        for rows, kept in _keep_masks(dropped, by_adapter.shape[2])
    ]
    return torch.cat(blocks)


def _keep_masks(dropped: DropoutSpec, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows with their masks (rows, m, width), bool. Blocks bound the memory for random values."""
    device, count = dropped.tokens.device, len(dropped.numbers)
    parts = dropped.numbers, dropped.levels, (dropped.seed, dropped.step)
    numbers, levels, key = copy_to_device([np.array(part, dtype=np.int64) for part in parts], device)
    block = max(1, BLOCK_VALUES // (count * width))
    for begin in range(0, len(dropped.tokens), block):
        rows = slice(begin, begin + block)
        yield rows, random_bits(dropped.tokens[rows], numbers, key, width) >= levels[:, None]


def random_bits(tokens: Tensor, numbers: Tensor, key: Tensor, width: int) -> Tensor:
    """Return random values (T, m, width), int64, from 0 to LEVELS - 1. tokens (T,), numbers (m,), key (2,): int64.

    Each counter i of c = ceil(width / 8) gives four words of 32 bits. Word w of counter i is at w c + i, and each word
    gives two features, the low 16 bits first.
    """
    count = -(-width // 8)
    a = torch.arange(count, device=tokens.device)[None, None]
    b, c, d = numbers[None, :, None], (tokens & LOW)[:, None, None], ((tokens >> 32) & LOW)[:, None, None]
    shape = (len(tokens), len(numbers), count)
    words = torch.cat([word.expand(shape) for word in philox((a, b, c, d), key)], -1)
    return torch.stack([words & (LEVELS - 1), words >> 16], -1).flatten(-2)[..., :width]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox-4x32 of the counter and key after ROUNDS rounds. Words are 32 bits in int64."""
    a, b, c, d = counter
    for step in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # 64 bits, including the sign bit
        keys = [(key[i] + step * WEYL[i]) & LOW for i in (0, 1)]
        a, c = ((second >> 32) & LOW) ^ b ^ keys[0], ((first >> 32) & LOW) ^ d ^ keys[1]
        b, d = second & LOW, first & LOW
    return a, b, c, d


class _MaskFunction(Function):
    """apply_masks of one adapter with its gradient. Saves no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: DropoutSpec, ops: DropoutOps) -> Tensor:
        ctx.dropped, ctx.ops = dropped, ops
        return ops.apply_masks(x, dropped)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.ops.apply_masks_backward(grad.contiguous(), ctx.dropped), None, None
