"""What a card's attention is given: kernels of its own cannot run here."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from strop.engine.kernels import eager
from strop.engine.kernels.cuda.attention import flash, flash_backward, on_card
from strop.engine.train.attention import Attention, Heads
from strop.engine.train.packing import Varlen
from tests.support.attention import documents_of, heads, rand


def definition(q: Tensor, k: Tensor, v: Tensor, cut: Varlen, heads: Heads) -> Tensor:
    """What flash attention is of packed documents: the last query sees the last key."""
    out = []
    query_ends, key_ends = cut.query_ends.tolist(), cut.key_ends.tolist()
    for (begin, end), (first, last) in zip(pairwise(query_ends), pairwise(key_ends), strict=True):
        n, m = end - begin, last - first
        assert n <= cut.longest_query and m <= cut.longest_key
        mask = ~eager.hidden(n, m, m - n, heads.window, q.device)
        keys, values = (x[first:last].repeat_interleave(heads.group, 1).transpose(0, 1) for x in (k, v))
        own = q[begin:end].transpose(0, 1)
        out.append(F.scaled_dot_product_attention(own, keys, values, mask, scale=heads.scale).transpose(0, 1))
    return torch.cat(out)


def definition_backward(
    grad: Tensor, qkv: tuple[Tensor, ...], out: Tensor, kept: Any, cut: Varlen, heads: Heads
) -> Any:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in qkv]
        again = definition(*inputs, cut, heads)
    torch.testing.assert_close(again, out)
    return torch.autograd.grad(again, inputs, grad)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("window", [0, 2])
def test_documents_of_any_lengths_as_a_card_takes_them(
    window: int, norms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is handed to flash attention, whose part is played by its definition, and what becomes of its gradients."""
    module = "strop.engine.kernels.cuda.attention"
    monkeypatch.setattr(f"{module}.has_flash", lambda like, heads: True)
    monkeypatch.setattr(f"{module}.flash", lambda *given: (definition(*given),))
    monkeypatch.setattr(f"{module}.flash_backward", definition_backward)
    torch.manual_seed(0)
    shape, cos, sin = heads(window, norms, 1), rand(8, 2).cos(), rand(8, 2).sin()
    qkv = rand(8, 16, grad=True)
    for spans in ([(2, 3, 2), (5, 2, 2), (7, 1, 2), (0, 2, 0)], [(0, 5, 0), (5, 3, 0)]):
        documents = documents_of(8, *spans)
        found, expected = (way(qkv, shape, cos, sin, documents) for way in (on_card, Attention.apply))
        torch.testing.assert_close(found, expected)
        upstream = rand(*expected.shape)
        one, other = (torch.autograd.grad(out, qkv, upstream)[0] for out in (found, expected))
        torch.testing.assert_close(one, other)


def test_the_operations_of_flash_attention_take_what_they_are_given() -> None:
    """By the schema of the PyTorch that is here: from 2.8 on the first ten arguments and the windows are the same."""
    cut = Varlen(torch.tensor([0, 8], dtype=torch.int32), torch.tensor([0, 8], dtype=torch.int32), 8, 8, None)
    q, k = (torch.empty(8, n, 8, dtype=torch.bfloat16, device="meta") for n in (4, 2))
    for window in (0, 3):
        shape = replace(heads(window, False), query=4, key_value=2, size=8)
        out, *kept = flash(q, k, k, cut, shape)
        assert out.shape == q.shape
        dq, dk, dv = flash_backward(out, (q, k, k), out, kept, cut, shape)
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)
