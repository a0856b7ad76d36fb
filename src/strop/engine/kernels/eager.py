"""Reference implementation in PyTorch of the element-wise operations that have kernels in cpu/ and cuda/.

All operations compute in fp32 (in fp64 for fp64 inputs) and return the dtype of their input, rounded once. T is the
number of packed rows. Functions whose name ends with an underscore overwrite an argument with the result. Kernels may
write the result to `out`; here, only from_heads does. `*_backward` functions take the gradient of the output and the
arguments of the forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.engine.train.packing import Slots


def _wide(x: Tensor) -> Tensor:
    """Return x in fp32, or in fp64 if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None) -> Tensor:
    """Return the RMS norm of x (..., n), x / sqrt(mean(x^2) + eps) * (offset + weight) (arXiv:1910.07467).

    weight: (n,). offset: 1 in Gemma models, else 0.
    """
    wide = _wide(x)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * (_wide(weight) + offset)).to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Return the gradient of rms_norm with respect to x.

    It is r (g - y mean(g y)) with r = 1 / sqrt(mean(x^2) + eps), y = r x and g = grad * (offset + weight).
    """
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    weighted = _wide(grad) * (_wide(weight) + offset)
    return (rstd * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))).to(x.dtype)


def _activate(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the activation of x and its derivative.

    silu is x sigmoid(x). gelu_pytorch_tanh is x (1 + tanh(u)) / 2 = x sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715
    x^3) (arXiv:1606.08415).
    """
    z, dz = x, torch.ones_like(x)
    if activation == "gelu_pytorch_tanh":
        scale, cubic = 2 * 0.7978845608028654, 0.044715  # 2 sqrt(2 / pi)
        z, dz = scale * (x + cubic * x**3), scale * (1 + 3 * cubic * x.square())
    else:
        assert activation == "silu", activation
    sigmoid = torch.sigmoid(z)
    value = x * sigmoid
    return value, sigmoid + value * (1 - sigmoid) * dz


def glu(gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """Return the gated linear unit activation(gate) * up, (T, n) (arXiv:2002.05202).

    gate_up: (T, 2 n), with the gate in the first n columns. activation: "silu" or "gelu_pytorch_tanh".
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return (_activate(_wide(gate), activation)[0] * _wide(up)).to(gate_up.dtype)


def glu_backward(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of glu with respect to gate_up, (T, 2 n), and the output of glu, (T, n)."""
    gate, up = (_wide(half) for half in gate_up.chunk(2, dim=-1))
    value, slope = _activate(gate, activation)
    wide = _wide(grad)
    return torch.cat([wide * up * slope, wide * value], dim=-1).to(gate_up.dtype), (value * up).to(gate_up.dtype)


def scale_columns_(x: Tensor, gains: Tensor) -> Tensor:
    """Multiply the columns of x (T, n) by gains (n,), fp32 or fp64, in place (DoRA, arXiv:2402.09353)."""
    return x.copy_(_wide(x) * gains)


def scale_columns_backward(grad: Tensor, y: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Return grad * gains, (T, n), and the sum of grad * y over rows, (n,), fp32 or fp64.

    If y (T, n) is the input of scale_columns_, the sum is the gradient of the gains.
    """
    wide = _wide(grad)
    return (wide * gains).to(grad.dtype), (wide * _wide(y)).sum(0)


def causal_mask(queries: int, keys: int, first: int, window: int, device: torch.device) -> Tensor:
    """Return a bool mask (queries, keys) that is True where a query must not attend to a key.

    Query i has position first + i and attends to keys j <= first + i, or to the last `window` of them if window > 0.
    """
    i = first + torch.arange(queries, device=device)[:, None]
    j = torch.arange(keys, device=device)[None]
    return (j > i) | (j <= i - window) if window else j > i


def softmax_(scores: Tensor, group: int, first: int, window: int, sinks: Tensor | None = None) -> Tensor:
    """Replace attention scores by their causal softmax, in place.

    scores: (B, Q * group, K), where B are the key-value heads of one document after another. Row q * group + g belongs
    to the query at position first + q and head g of the group. group: query heads per key-value head. first, window: as
    in causal_mask. sinks: (heads,), an extra score per head, part of the softmax but not of its output (gpt-oss).
    """
    queries, keys = scores.shape[1] // group, scores.shape[2]
    mask = causal_mask(queries, keys, first, window, scores.device).repeat_interleave(group, dim=0)
    scores.masked_fill_(mask, float("-inf"))
    if sinks is not None:
        rows = sinks.view(-1, 1, group).to(scores.dtype).repeat(len(scores) * group // len(sinks), queries, 1)
        with_sink = torch.cat([scores, rows.view(len(scores), -1, 1)], -1)
        return scores.copy_(torch.softmax(with_sink, dim=-1)[..., :-1])
    # bf16 softmax accumulates in fp32 on every device; an explicit fp32 copy is several times as slow on a CPU.
    return scores.copy_(torch.softmax(scores, dim=-1))


def softmax_backward_(grad: Tensor, probs: Tensor, group: int, first: int, window: int) -> Tensor:
    """Replace the gradient of the probabilities by the gradient of the scores: probs * (grad - sum(grad * probs)).

    probs: result of softmax_. group, first, window: let kernels skip masked keys.
    """
    return grad.copy_(torch.ops.aten._softmax_backward_data(grad, probs, -1, grad.dtype))  # sums in fp32


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, softcap: float, gradient: bool) -> Tensor:
    """Return the losses weights * (logsumexp(logits) - logits[label]), (N,), fp32 or fp64.

    logits: (N, V), overwritten with the gradient of the sum of the losses if `gradient`. labels: (N,), int64. weights:
    (N,), fp32. softcap: if not 0, logits are first replaced by softcap * tanh(logits / softcap).
    """
    wide = _wide(logits)
    capped = softcap * torch.tanh(wide / softcap) if softcap else wide
    log_probs = F.log_softmax(capped, dim=-1)
    index = labels[:, None]
    weight = weights[:, None].to(wide.dtype)
    losses = -(log_probs.gather(1, index) * weight).squeeze(1)
    if gradient:
        slope = log_probs.exp_().scatter_add_(1, index, torch.full_like(weight, -1.0)).mul_(weight)
        logits.copy_(slope * (1 - (capped / softcap).square()) if softcap else slope)
    return losses


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary position embedding (arXiv:2104.09864), with the pairs of a head stored as two halves.

    The pair (a, b) = (x[i], x[m + i]) becomes (a cos - b sin, b cos + a sin). Elements from 2 m on are unchanged.
    x: (T, heads, d), fp32 or fp64. cos, sin: (T, m), with 2 m <= d.
    """
    m = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x[..., :m], x[..., m : 2 * m], x[..., 2 * m :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _output_rows(slots: Slots, num_kv_heads: int, group: int) -> Tensor:
    """Return the row of each slot and head in the result of to_heads, shape (P, heads), int64."""
    device = slots.positions.device
    head, slot = torch.arange(num_kv_heads * group, device=device), torch.arange(len(slots.positions), device=device)
    first, position, length = (x[:, None] for x in (slot - slots.positions, slots.positions, slots.lengths))
    return (first * num_kv_heads + head // group * length + position) * group + head % group


def to_heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, slots: Slots, group: int) -> Tensor:
    """Rearrange packed rows to one padded matrix for each document and key-value head.

    x: (T, heads, d). cos, sin: tables of the rotary embedding, (T, m); if None, x is neither rotated nor scaled. slots:
    the P padded positions. A packed row of a shared prefix goes to several of them, one for each document that uses the
    prefix. group: query heads per key-value head; 1 for keys and values. Returns (P * heads, d), sorted by document,
    key-value head, position and head of the group, with zeros as padding.
    """
    wide = _wide(x)
    if cos is not None and sin is not None:
        wide = rotate(wide, cos, sin) * scale
    heads, d = x.shape[1:]
    rows, used = slots.rows.clamp(min=0), (slots.rows >= 0)[:, None, None]  # masks would make the host wait for a GPU
    out = x.new_empty(len(rows) * heads, d)
    out[_output_rows(slots, heads // group, group)] = torch.where(used, wide[rows], 0.0).to(x.dtype)
    return out


def from_heads(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, slots: Slots, group: int, out: Tensor
) -> None:
    """Apply the transpose of to_heads to x (P * heads, d), and write the result to `out` (T, heads, d)."""
    heads = out.shape[1]
    rows, used = slots.rows.clamp(min=0), (slots.rows >= 0)[:, None, None]
    values = torch.where(used, _wide(x)[_output_rows(slots, heads // group, group)], 0.0)
    total = values.new_zeros(out.shape).index_add_(0, rows, values)
    if cos is not None and sin is not None:
        total = rotate(total, cos, -sin) * scale  # the gradient of a rotation is the inverse rotation
    out.copy_(total)
