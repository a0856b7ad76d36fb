"""Dropout before the adapters, with masks from a counter-based random number generator.

The generator is Philox-4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), with key (seed,
step) and counter (feature / 8, adapter, key of the token). The masks do not depend on how a batch is split into
micro-batches, packed, padded, recomputed or distributed over devices.

The key of a token is a hash of all tokens of its sequence up to this one. Sequences with a common prefix therefore have
the same masks for the prefix, which can be computed once.
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
ROUNDS = 7  # the minimum for Philox-4x32 to pass the BigCrush tests (Salmon et al., table 2)
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF
BLOCK_VALUES = 1 << 22  # maximum number of random values generated at once


class DropoutOps(Protocol):
    """Functions that generate and apply masks. The functions of this module are the specification."""

    def apply_masks(self, z: Tensor, dropped: DropoutSpec) -> Tensor: ...
    def apply_masks_backward(self, grad: Tensor, dropped: DropoutSpec) -> Tensor: ...


@dataclass(frozen=True)
class DropoutSpec:
    """The masks of m adapters with the same input z (T, k).

    token_keys: the key of each row of z (see the function), (T,), int64. adapter_numbers: identify the adapters in the
    counter. thresholds: elements whose random value (16 bits) is below the adapter's threshold are dropped; 0: none.
    """

    seed: int
    step: int
    token_keys: Tensor
    adapter_numbers: tuple[int, ...]
    thresholds: tuple[int, ...]


class Masks:
    """The state of a model's dropout.

    token_keys: the keys (B, S) of the tokens that the model is processing. dropout_ops_for: returns DropoutOps for a
    tensor.
    """

    def __init__(self, dropout_ops_for: Callable[[Tensor], DropoutOps]) -> None:
        self.dropout_ops_for = dropout_ops_for
        self.seed, self.step = 0, 0
        self.token_keys: Tensor | None = None

    def begin(self, seed: int, step: int) -> None:
        """Use the masks of this training step from now on."""
        self.seed, self.step = seed & LOW, step & LOW


class CounterDropout(nn.Dropout):
    """Replacement for PEFT's dropout before an adapter. number: identifies the adapter in the counter.

    PyTorch's dropout is used for inputs whose rows are not the tokens of the micro-batch, for example the tokens that
    are routed to one expert.
    """

    def __init__(self, p: float, number: int, masks: Masks) -> None:
        super().__init__(p)
        self.number, self.masks = number, masks

    @property
    def threshold(self) -> int:
        """The threshold as in DropoutSpec; 0 if dropout is disabled."""
        return max(1, min(LEVELS - 1, round(self.p * LEVELS))) if self.training and self.p else 0

    def forward(self, x: Tensor) -> Tensor:
        keys = self.masks.token_keys
        if not self.threshold:
            return x
        if keys is None or not _are_token_rows(x.shape[:-1], keys.shape):
            return super().forward(x)
        dropped = DropoutSpec(self.masks.seed, self.masks.step, keys.reshape(-1), (self.number,), (self.threshold,))
        ops = self.masks.dropout_ops_for(x)
        masked: Tensor = _MaskFunction.apply(x.reshape(-1, x.shape[-1]), dropped, ops)  # type: ignore[no-untyped-call]
        return masked.view(x.shape) * keep_scale(self.threshold)


def _are_token_rows(leading: torch.Size, shape: torch.Size) -> bool:
    """Return whether a tensor with these leading dimensions has one row per token of an input of shape (B, S).

    The dimensions may be (B, S), (B, 1, S) (DeepSeek's kv_b_proj) or (B * S,) (OPT).
    """
    return leading == (shape.numel(),) or [n for n in leading if n != 1] == [n for n in shape if n != 1]


def keep_scale(threshold: int) -> float:
    """Return the factor of the elements that are not dropped, which preserves the mean."""
    return LEVELS / (LEVELS - threshold)


def install_dropout(model: nn.Module, dropout_ops_for: Callable[[Tensor], DropoutOps]) -> Masks:
    """Replace the dropout of all adapters with CounterDropout, unless already replaced. Return the shared Masks."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    entries = [(layer.lora_dropout, name, module) for layer in layers for name, module in layer.lora_dropout.items()]
    installed = [module.masks for _, _, module in entries if isinstance(module, CounterDropout)]
    masks = installed[0] if installed else Masks(dropout_ops_for)
    for number, (container, name, module) in enumerate(entries):
        if type(module) is nn.Dropout:
            container[name] = CounterDropout(module.p, number, masks).train(module.training)
    return masks


def token_keys(ids: Any) -> Any:
    """Return for each token a hash of all tokens up to it, (n,), int64. ids: (n,), any integer dtype.

    The hash is the cumulative sum of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of the positions and tokens.
    """
    inputs = (np.arange(1, len(ids) + 1, dtype=np.uint64) << np.uint64(32)) + np.asarray(ids).astype(np.uint64)
    x = inputs * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.cumsum(x ^ (x >> np.uint64(31)), dtype=np.uint64).view(np.int64)


def apply_masks(z: Tensor, dropped: DropoutSpec) -> Tensor:
    """Return the concatenation of a masked copy of z (T, k) for each adapter, (T, m k)."""
    return torch.cat([(z[rows, None] * mask).flatten(1) for rows, mask in _keep_masks(dropped, z.shape[1])])


def apply_masks_backward(grad: Tensor, dropped: DropoutSpec) -> Tensor:
    """Return the gradient of z (T, k), given the gradient of the result of apply_masks (T, m k)."""
    grads = grad.view(len(grad), len(dropped.adapter_numbers), -1)
    wide = torch.promote_types(grad.dtype, torch.float32)
    masks = _keep_masks(dropped, grads.shape[2])
    return torch.cat([(grads[rows].to(wide) * mask).sum(1).to(grad.dtype) for rows, mask in masks])


def _keep_masks(dropped: DropoutSpec, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows with their masks (rows, m, width), bool: True for elements that are not dropped."""
    device, count = dropped.token_keys.device, len(dropped.adapter_numbers)
    parts = dropped.adapter_numbers, dropped.thresholds, (dropped.seed, dropped.step)
    numbers, thresholds, key = copy_to_device([np.array(part, dtype=np.int64) for part in parts], device)
    block = max(1, BLOCK_VALUES // (count * width))
    for begin in range(0, len(dropped.token_keys), block):
        rows = slice(begin, begin + block)
        yield rows, random_bits(dropped.token_keys[rows], numbers, key, width) >= thresholds[:, None]


def random_bits(tokens: Tensor, numbers: Tensor, key: Tensor, width: int) -> Tensor:
    """Return random values (T, m, width), int64, from 0 to LEVELS - 1. tokens (T,), numbers (m,), key (2,): int64.

    Each of the c = ceil(width / 8) counters gives four 32-bit words. Word w of counter i has index w c + i. Each word
    gives the values of two features, the low 16 bits first.
    """
    count = -(-width // 8)
    a = torch.arange(count, device=tokens.device)[None, None]
    b, c, d = numbers[None, :, None], (tokens & LOW)[:, None, None], ((tokens >> 32) & LOW)[:, None, None]
    shape = (len(tokens), len(numbers), count)
    words = torch.cat([word.expand(shape) for word in philox((a, b, c, d), key)], -1)
    return torch.stack([words & (LEVELS - 1), words >> 16], -1).flatten(-2)[..., :width]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox-4x32 of the counter and key after ROUNDS rounds. All words have 32 bits and are stored in int64."""
    a, b, c, d = counter
    for step in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # 64 bits, including the sign bit
        keys = [(key[i] + step * WEYL[i]) & LOW for i in (0, 1)]
        a, c = ((second >> 32) & LOW) ^ b ^ keys[0], ((first >> 32) & LOW) ^ d ^ keys[1]
        b, d = second & LOW, first & LOW
    return a, b, c, d


class _MaskFunction(Function):
    """Compute apply_masks for one adapter. Saves no tensors: the backward generates the masks again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: DropoutSpec, ops: DropoutOps) -> Tensor:
        ctx.dropped, ctx.ops = dropped, ops
        return ops.apply_masks(x, dropped)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.ops.apply_masks_backward(grad.contiguous(), ctx.dropped), None, None
