"""Attention by its definition, test shapes, and random values in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from strop.engine.kernels import eager
from strop.engine.train.attention import Heads
from strop.engine.train.norms import Norm
from strop.engine.train.packing import Documents

OPS: Any = eager


def rand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def check(function: Any, *inputs: Any) -> None:
    # gradcheck uses unit vectors as upstream gradients, so each row is tested separately.
    assert torch.autograd.gradcheck(function, inputs)


def heads(window: int, norms: bool, num_kv_heads: int = 1, softcap: float = 0.0) -> Heads:
    q_norm, k_norm = (Norm(OPS, rand(4), 1e-5, 0.0) if norms else None for _ in range(2))
    counts = {"num_query_heads": 2, "num_kv_heads": num_kv_heads}
    shape = {**counts, "size": 4, "scale": 0.7, "window": window, "softcap": softcap}
    return Heads(OPS, **shape, q_norm=q_norm, k_norm=k_norm)  # type: ignore[arg-type]


def reference(qkv: Tensor, shape: Heads, cos: Tensor, sin: Tensor, sees: Tensor) -> Tensor:
    """Compute attention over all packed rows by its definition. sees: visible keys, shape (T, T), bool."""
    q, k, v = shape.views(qkv)
    if shape.q_norm and shape.k_norm:
        q, k = (F.rms_norm(x, (4,), norm.weight, norm.eps) for x, norm in ((q, shape.q_norm), (k, shape.k_norm)))
    q, k = eager.rotate(q, cos, sin), eager.rotate(k, cos, sin)
    k, v = (x.repeat_interleave(shape.group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * shape.scale
    if shape.softcap:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    probs = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probs, v).reshape(len(qkv), -1)


def documents_of(tokens: int, *spans: tuple[int, int, int]) -> Documents:
    return Documents(np.array(spans), tokens, torch.device("cpu"))
