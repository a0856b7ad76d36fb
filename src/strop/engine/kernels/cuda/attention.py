"""Attention over packed documents on a card: flash attention of documents of any lengths, where a card has it.

Flash attention (Dao, arXiv:2307.08691) keeps its output and a number a row and head; q and k are turned again in the
backward, and the gradients are written side by side once. Elsewhere (cards before Ampere, fp32) PyTorch's own attention
takes padded documents.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels import eager
from strop.engine.kernels.protocols import apply
from strop.engine.train.attention import Heads
from strop.engine.train.packing import Documents, Varlen

LARGEST, ALIGNED = 256, 8  # a head that flash attention takes: at most so many numbers, and a multiple of so many
FIRST_FLASH = (8, 0)  # compute capability (Ampere)


class Turns(Protocol):
    """The rotary embedding of q and k behind their norms, and its gradient; meanings in InPyTorch."""

    def turn(self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...
    def turn_backward(
        self, grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor
    ) -> Tensor: ...


class InPyTorch:
    """Turns in PyTorch's own operations."""

    def turn(self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q (T, query, size) and k (T, key_value, size), normed and turned. cos, sin (T, m): the first 2 m numbers of a
        head are turned."""
        q, k, _ = heads.normed(qkv)
        if heads.q_norm is None and heads.k_norm is None:  # they lie side by side: once for both
            both = qkv.view(len(qkv), -1, heads.size)[:, : heads.query + heads.key_value]
            q, k = torch.split(_turned(both, cos, sin), [heads.query, heads.key_value], 1)
            return q, k
        return _turned(q, cos, sin), _turned(k, cos, sin)

    def turn_backward(
        self, grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """The gradient of qkv (T, all) from those of q and k as `turn` gives them, and of v: (T, heads, size) each."""
        result = torch.empty_like(qkv)
        into = heads.views(result)
        for to, grad in zip(into, (_turned(grads[0], cos, -sin), _turned(grads[1], cos, -sin), grads[2]), strict=True):
            to.copy_(grad)
        heads.norms_backward_(into, qkv)
        return result


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return eager.rotate(wide, cos, sin).to(x.dtype)


IN_PYTORCH = InPyTorch()


def on_card(
    qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents, turns: Turns | None = None
) -> Tensor:
    """qkv (T, all) to the heads' output (T, query size). turns: in kernels of a card's own, where it has them."""
    turns = turns or IN_PYTORCH
    if has_flash(qkv, heads):
        return apply(FlashAttention, qkv, heads, cos, sin, documents.varlen, turns)
    return padded(qkv, heads, cos, sin, documents, turns)


def has_flash(like: Tensor, heads: Heads) -> bool:
    """Whether PyTorch's flash attention takes such heads, on this card and in this type."""
    return (
        like.device.type == "cuda"
        and torch.version.hip is None
        and like.dtype in (torch.bfloat16, torch.float16)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(like.device) >= FIRST_FLASH
        and heads.size <= LARGEST
        and heads.size % ALIGNED == 0
    )


class FlashAttention(Function):
    """Documents of any lengths; rotary embedding and norms included. Saves qkv, its output, and a number a row and
    head."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, cut: Varlen, turns: Turns) -> Tensor:
        out, *kept = flash(*_entering(qkv, heads, cos, sin, cut, turns), cut, heads)
        ctx.about = heads, cut, turns
        ctx.save_for_backward(qkv, cos, sin, out, *kept)
        return out.view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads, cut, turns = ctx.about
        qkv, cos, sin, out, *kept = ctx.saved_tensors
        q, k, v = _entering(qkv, heads, cos, sin, cut, turns)
        dq, dk, dv = flash_backward(grad.reshape(out.shape), (q, k, v), out, kept, cut, heads)
        if cut.keys is not None:
            dk, dv = (_summed(x, cut.keys, len(qkv)) for x in (dk, dv))
        return turns.turn_backward((dq, dk, dv), qkv, heads, cos, sin), None, None, None, None, None


def _entering(
    qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, cut: Varlen, turns: Turns
) -> tuple[Tensor, Tensor, Tensor]:
    """q of each packed row; k and v of each place: a shared prefix stands in front of each document's own."""
    q, k = turns.turn(qkv, heads, cos, sin)
    v = heads.views(qkv)[2]
    return (q, k, v) if cut.keys is None else (q, k[cut.keys], v[cut.keys])


def _summed(grad: Tensor, rows: Tensor, number: int) -> Tensor:
    """The gradient of each packed row: of a prefix's, the sum over the documents that see it, rounded once."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(number, *grad.shape[1:], dtype=wide)
    return total.index_add_(0, rows, grad.to(wide)).to(grad.dtype)


def _seen(heads: Heads) -> dict[str, int]:
    """The last query sees the last key; a window counts the keys on the left of the query's own."""
    return {"window_size_left": heads.window - 1 if heads.window else -1, "window_size_right": 0}


def flash(q: Tensor, k: Tensor, v: Tensor, cut: Varlen, heads: Heads) -> tuple[Tensor, ...]:
    """The output (T, query, size), and what flash_backward wants to know."""
    operation = torch.ops.aten._flash_attention_forward  # varlen_attn takes grouped heads from PyTorch 2.12 on
    return tuple(operation(
        q, k, v, cut.query_ends, cut.key_ends, cut.longest_query, cut.longest_key, 0.0, not heads.window, False,
        scale=heads.scale, **_seen(heads),
    )[:4])  # fmt: skip


def flash_backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, kept: Any, cut: Varlen, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    sums, *random = kept
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, *qkv, out, sums, cut.query_ends, cut.key_ends, cut.longest_query, cut.longest_key, 0.0,
        not heads.window, *random, scale=heads.scale, **_seen(heads),
    )  # fmt: skip
    return dq, dk, dv


class Turn(Function):
    """qkv to q, k and v (T, heads, size), q and k turned; saves qkv alone."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, turns: Turns) -> Any:
        ctx.about = heads, turns
        ctx.save_for_backward(qkv, cos, sin)
        return *turns.turn(qkv, heads, cos, sin), heads.views(qkv)[2].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        heads, turns = ctx.about
        qkv, cos, sin = ctx.saved_tensors
        return turns.turn_backward(grads, qkv, heads, cos, sin), None, None, None, None


def padded(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents, turns: Turns) -> Tensor:
    """The same through PyTorch's own attention and autograd.

    On a card grouped heads are laid out one by one: with a mask or in fp32 its kernels that keep no scores take no
    groups, and what takes them keeps memory with the length squared.
    """
    q, k, v = Turn.apply(qkv, heads, cos, sin, turns)  # type: ignore[no-untyped-call]
    one_by_one = heads.group > 1 and qkv.device.type == "cuda"
    out = qkv.new_zeros(len(qkv) + 1, heads.query, heads.size)  # the last row takes what padding gives (row -1)
    for part in documents.layout.buckets:
        length, keys = part.queries.shape[1], part.keys.shape[1]
        windowed = 0 < heads.window < keys
        mask = (
            ~eager.hidden(length, keys, keys - length, heads.window, qkv.device) if windowed or keys > length else None
        )
        places = ((q, part.queries), (k, part.keys), (v, part.keys))
        own_q, own_k, own_v = (x[rows.clamp(min=0)].transpose(1, 2) for x, rows in places)
        if one_by_one:
            own_k, own_v = (x.repeat_interleave(heads.group, 1) for x in (own_k, own_v))
        o = F.scaled_dot_product_attention(
            own_q, own_k, own_v, mask, is_causal=mask is None, scale=heads.scale,
            enable_gqa=heads.group > 1 and not one_by_one,
        )  # fmt: skip
        out = out.index_put((part.queries,), o.transpose(1, 2))
    return out[:-1].flatten(1)


# ---- from strop.engine.kernels.cuda.flash ----
"""Flash attention 3 (Shah et al., arXiv:2407.08608) on Hopper, where it is installed: newer PyTorch can put it in the
place of its own, and does so only when it is asked."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.attention
from torch import Tensor

from strop.engine.kernels.cuda.attention import flash, flash_backward
from strop.engine.train.attention import Heads
from strop.engine.train.packing import Varlen

LOG = logging.getLogger(__name__)

NAME, PACKAGE, HOPPER = "FA3", "flash_attn_interface", 9
NEAR = 2e-2  # of numbers around 1 in bf16, each rounded several times on its way


@cache
def why_not(device: torch.device) -> str | None:
    """Has this process compute attention by it from here on. None where that is so, else why not, in a line."""
    known: Any = torch.nn.attention
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return "it is for Hopper"
    if not hasattr(known, "activate_flash_attention_impl") or NAME not in known.list_flash_attention_impls():
        return "this PyTorch does not know of it"
    if find_spec(PACKAGE) is None:
        return "it is not installed"
    before = _trial(device)
    try:
        known.activate_flash_attention_impl(NAME)
        found = _trial(device)
        near = (((a.float() - b.float()).abs() <= NEAR).all() for a, b in zip(found, before, strict=True))
        why = None if all(map(bool, near)) else "its numbers are wrong here"
    except Exception as error:  # whatever ails it, PyTorch's own is there
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if why is not None:
        known.restore_flash_attention_impl()
        LOG.warning("flash attention 3 is installed and cannot be used: %s", why)
    return why


def _trial(device: torch.device) -> list[Tensor]:
    """Outputs and gradients of two documents of 40 and 24 tokens, with four heads of q on two, and with a window."""
    made = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(64, heads, 64, generator=made).to(device, torch.bfloat16) for heads in (4, 2, 2, 4)
    )  # fmt: skip
    ends, found = torch.tensor([0, 40, 64], dtype=torch.int32).to(device), []
    cut = Varlen(ends, ends, 40, 40, None)
    for window in (0, 16):
        heads = Heads(cast(Any, None), 4, 2, 64, 0.125, window, 0.0, None, None)
        out, *kept = flash(q, k, v, cut, heads)
        found += [out, *flash_backward(grad, (q, k, v), out, kept, cut, heads)]
    return found
