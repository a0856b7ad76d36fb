"""The element-wise operations of the fast step in plain PyTorch: the specification of all kernels.

The kernels in cpu/ and cuda/ must compute what these functions compute, on any device and for any float dtype. All
operations compute in fp32 (in fp64 for fp64 inputs), round once at the end, and return the dtype of their input. T is
the number of packed rows. Functions whose name ends with an underscore write their result over an argument. `out` is
memory of the result's shape that a kernel may use for it; the functions here ignore it. `*_backward` functions take the
gradient of the output and the arguments of the forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.engine.train.packing import Places


def _wide(x: Tensor) -> Tensor:
    """Return x in fp32, or in fp64 if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None) -> Tensor:
    """Return the RMS norm (arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * (offset + weight).

    x: (..., n), the mean is over the last dimension. weight: (n,); Gemma's have offset 1.
    """
    wide = _wide(x)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * (_wide(weight) + offset)).to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Return the gradient of rms_norm with respect to x.

    With r = 1 / sqrt(mean(x^2) + eps), y = r x and g = grad * (offset + weight): r (g - y mean(g y)).
    """
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    weighted = _wide(grad) * (_wide(weight) + offset)
    return (rstd * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))).to(x.dtype)


def _activate(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the activation of x and its derivative, both of x's shape.

    silu is x sigmoid(x). gelu_pytorch_tanh is x (1 + tanh(u)) / 2 = x sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715
    x^3) (arXiv:1606.08415).
    """
    z, dz = x, torch.ones_like(x)
    if activation == "gelu_pytorch_tanh":
        two_root, cubic = 2 * 0.7978845608028654, 0.044715  # 2 sqrt(2 / pi)
        z, dz = two_root * (x + cubic * x**3), two_root * (1 + 3 * cubic * x.square())
    else:
        assert activation == "silu", activation
    sigmoid = torch.sigmoid(z)
    value = x * sigmoid
    return value, sigmoid + value * (1 - sigmoid) * dz


def glu(gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """Return activation(gate) * up, a gated linear unit (arXiv:2002.05202), shape (T, n).

    gate_up: (T, 2 n), with the gate in the first n columns. activation: "silu" or "gelu_pytorch_tanh".
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return (_activate(_wide(gate), activation)[0] * _wide(up)).to(gate_up.dtype)


def glu_backward(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of glu with respect to gate_up, (T, 2 n), and its output again, (T, n)."""
    gate, up = (_wide(half) for half in gate_up.chunk(2, dim=-1))
    value, slope = _activate(gate, activation)
    wide = _wide(grad)
    return torch.cat([wide * up * slope, wide * value], dim=-1).to(gate_up.dtype), (value * up).to(gate_up.dtype)


def scale_columns_(x: Tensor, gains: Tensor) -> Tensor:
    """Multiply each column of x (T, n) by its gain (n,), in place; gains: fp32 or fp64 (DoRA, arXiv:2402.09353)."""
    return x.copy_(_wide(x) * gains)


def scale_columns_backward(grad: Tensor, y: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Return grad * gains (T, n) and the sum over rows of grad * y (n,), fp32 or fp64.

    y: (T, n); with the unscaled input, the sums are the gradient of the gains.
    """
    wide = _wide(grad)
    return (wide * gains).to(grad.dtype), (wide * _wide(y)).sum(0)


def causal_mask(queries: int, keys: int, first: int, window: int, device: torch.device) -> Tensor:
    """Return the mask of what queries must not see, bool, shape (queries, keys).

    Query i has position first + i and sees the keys j <= first + i; with a window (not 0), the last `window` of them.
    """
    i = first + torch.arange(queries, device=device)[:, None]
    j = torch.arange(keys, device=device)[None]
    return (j > i) | (j <= i - window) if window else j > i


def softmax_(scores: Tensor, group: int, first: int, window: int, sinks: Tensor | None = None) -> Tensor:
    """Replace attention scores by their causal softmax, in place.

    scores: (B, Q * group, K); row q * group + g holds query `first + q` of head g of a group. B counts the key-value
    heads of one document after another. group: query heads of a key-value head. first, window: as in causal_mask.
    sinks: (heads,), an extra score of each head that takes part in the softmax and whose share is dropped (gpt-oss).
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
    """Replace the gradient of the probabilities by that of the scores, in place: probs * (grad - sum(grad * probs)).

    probs: result of softmax_. group, first, window: kernels use them to skip masked keys.
    """
    wide, probs = _wide(grad), _wide(probs)
    return grad.copy_(probs * (wide - (wide * probs).sum(-1, keepdim=True)))


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, softcap: float, gradient: bool) -> Tensor:
    """Return the weighted cross entropy of each row, (N,), fp32 or fp64: weights * (logsumexp(logits) - logits[label]).

    logits: (N, V); with `gradient` they are replaced by the gradient of the sum of the losses. labels: (N,), int64.
    weights: (N,), fp32. softcap: if not 0, the logits are first replaced by softcap * tanh(logits / softcap).
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

    The pair (a, b) = (x[i], x[m + i]) becomes (a cos - b sin, b cos + a sin); elements from 2 m on are unchanged.
    x: (T, heads, d), fp32 or fp64. cos, sin: of each row's angles, (T, m), with 2 m <= d.
    """
    m = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x[..., :m], x[..., m : 2 * m], x[..., 2 * m :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _rows(places: Places, key_value: int, group: int) -> Tensor:
    """Return the row of each place and head in the result of to_heads, shape (P, heads), int64."""
    device = places.at.device
    head, place = torch.arange(key_value * group, device=device), torch.arange(len(places.at), device=device)
    before, at, length = (x[:, None] for x in (place - places.at, places.at, places.length))
    return (before * key_value + head // group * length + at) * group + head % group


def to_heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, places: Places, group: int) -> Tensor:
    """Rearrange packed rows to one matrix for each document and key-value head, rotated and scaled.

    x: (T, heads, d). cos, sin: of the rotary embedding, (T, m), or None: then x is neither rotated nor scaled. places:
    where packed rows go, each to one or several of P places. group: query heads of a key-value head; 1 for keys and
    values. Returns (P * heads, d): document after document, in it key-value head after head, in it place after place,
    in it the `group` heads. Padding places get zeros.
    """
    wide = _wide(x)
    if cos is not None and sin is not None:
        wide = rotate(wide, cos, sin) * scale
    heads, d = x.shape[1:]
    used = places.token >= 0
    out = x.new_zeros(len(used) * heads, d)
    out[_rows(places, heads // group, group)[used]] = wide[places.token[used]].to(x.dtype)
    return out


def from_heads(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, places: Places, group: int, out: Tensor
) -> None:
    """Apply the transpose of to_heads: sum a packed row's places, rotate back and scale.

    x: (P * heads, d). out: the result, (T, heads, d); overwritten.
    """
    heads = out.shape[1]
    used = places.token >= 0
    picked = _wide(x)[_rows(places, heads // group, group)[used]]
    total = picked.new_zeros(out.shape).index_add_(0, places.token[used], picked)
    if cos is not None and sin is not None:
        total = rotate(total, cos, -sin) * scale  # the gradient of a rotation is the inverse rotation
    out.copy_(total)
