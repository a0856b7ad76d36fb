"""The element-wise operations of the step in plain PyTorch: any device, any float type; what cpu/kernels.py must equal.

All of them compute in fp32 (fp64 for fp64 input) and round once at the end. `out` is room for the result, left unused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.engine.train.packing import Places


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension; weight of shape (x.shape[-1],)."""
    wide = _wide(x)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * (_wide(weight) + offset)).to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Gradient of rms_norm with respect to x."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    weighted = _wide(grad) * (_wide(weight) + offset)
    return (rstd * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))).to(x.dtype)


def _activate(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Value and slope of silu, or of gelu by tanh: x sigmoid(z), as (1 + tanh(u)) / 2 = sigmoid(2 u)."""
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
    """activation(gate) * up, for gate_up (T, 2 I) with the gate in the first half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (_activate(_wide(gate), activation)[0] * _wide(up)).to(gate_up.dtype)


def glu_backward(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(gradient with respect to gate_up, the forward's output again)."""
    gate, up = (_wide(half) for half in gate_up.chunk(2, dim=-1))
    value, slope = _activate(gate, activation)
    wide = _wide(grad)
    return torch.cat([wide * up * slope, wide * value], dim=-1).to(gate_up.dtype), (value * up).to(gate_up.dtype)


def scale_columns_(x: Tensor, gains: Tensor) -> Tensor:
    """x (T, n) times gains (n,), in place; gains are wide."""
    return x.copy_(_wide(x) * gains)


def scale_columns_backward(grad: Tensor, y: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """(grad times gains, the sum over rows of grad times y: (n,) wide)."""
    wide = _wide(grad)
    return (wide * gains).to(grad.dtype), (wide * _wide(y)).sum(0)


def hidden(queries: int, keys: int, first: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: True where query `first + i` must not see key j (causal, and window if it is not 0)."""
    i = first + torch.arange(queries, device=device)[:, None]
    j = torch.arange(keys, device=device)[None]
    return (j > i) | (j <= i - window) if window else j > i


def softmax_(scores: Tensor, group: int, first: int, window: int, sinks: Tensor | None = None) -> Tensor:
    """Causal softmax in place. scores (B, Q * group, K): row q * group + g is query `first + q` of head g.

    sinks (heads,): a score that each head has beside those of the keys, whose share goes to none; B counts the
    key-value heads of one document after the other.
    """
    queries, keys = scores.shape[1] // group, scores.shape[2]
    mask = hidden(queries, keys, first, window, scores.device).repeat_interleave(group, dim=0)
    scores.masked_fill_(mask, float("-inf"))
    if sinks is not None:
        rows = sinks.view(-1, 1, group).to(scores.dtype).repeat(len(scores) * group // len(sinks), queries, 1)
        with_sink = torch.cat([scores, rows.view(len(scores), -1, 1)], -1)
        return scores.copy_(torch.softmax(with_sink, dim=-1)[..., :-1])
    # bf16 softmax accumulates in fp32 on every device; an explicit fp32 copy is several times as slow on a CPU.
    return scores.copy_(torch.softmax(scores, dim=-1))


def softmax_backward_(grad: Tensor, probs: Tensor, group: int, first: int, window: int) -> Tensor:
    """Gradient with respect to the scores, written over `grad` (the gradient with respect to `probs`)."""
    wide, probs = _wide(grad), _wide(probs)
    return grad.copy_(probs * (wide - (wide * probs).sum(-1, keepdim=True)))


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, softcap: float, gradient: bool) -> Tensor:
    """weights * cross entropy of each row, wide, (N,); with `gradient`, logits (N, V) become the gradient of its sum.

    softcap (0: none): the logits are first bent to softcap * tanh(logits / softcap).
    """
    wide = _wide(logits)
    bent = softcap * torch.tanh(wide / softcap) if softcap else wide
    log_probs = F.log_softmax(bent, dim=-1)
    index = labels[:, None]
    weight = weights[:, None].to(wide.dtype)
    losses = -(log_probs.gather(1, index) * weight).squeeze(1)
    if gradient:
        slope = log_probs.exp_().scatter_add_(1, index, torch.full_like(weight, -1.0)).mul_(weight)
        logits.copy_(slope * (1 - (bent / softcap).square()) if softcap else slope)
    return losses


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (halves convention). x (T, heads, d) fp32; cos, sin (T, m): the first 2 m of d are turned."""
    m = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x[..., :m], x[..., m : 2 * m], x[..., 2 * m :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _rows(places: Places, key_value: int, group: int) -> Tensor:
    """(P, heads): the row of each place and head in what to_heads returns."""
    device = places.at.device
    head, place = torch.arange(key_value * group, device=device), torch.arange(len(places.at), device=device)
    before, at, length = (x[:, None] for x in (place - places.at, places.at, places.length))
    return (before * key_value + head // group * length + at) * group + head % group


def to_heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, places: Places, group: int) -> Tensor:
    """Packed rows to one matrix a document and key-value head, turned by the rotary embedding and scaled.

    x (T, heads, d) to (P * heads, d): document after document, in it key-value head after head, in it place after
    place, in it the `group` heads. Padding gets zeros; without cos and sin nothing is turned or scaled.
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
    """The transpose of to_heads: writes the sum over a packed row's places, turned back and scaled, to `out`."""
    heads = out.shape[1]
    used = places.token >= 0
    picked = _wide(x)[_rows(places, heads // group, group)[used]]
    total = picked.new_zeros(out.shape).index_add_(0, places.token[used], picked)
    if cos is not None and sin is not None:
        total = rotate(total, cos, -sin) * scale  # a rotation: its gradient turns back
    out.copy_(total)
