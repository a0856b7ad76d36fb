"""What a card's attention is given: kernels of its own cannot run here."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from strop.engine import eager
from strop.engine.attention import Attention, Heads
from strop.engine.card.attention import on_card
from strop.engine.packed import Varlen
from tests.support.attention import documents_of, heads, rand


@pytest.mark.parametrize("window", [0, 2])
def test_documents_of_any_lengths_as_a_card_takes_them(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to flash attention, whose part is played by its definition: the last query sees the last key."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, cut: Varlen, heads: Heads) -> Tensor:
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

    monkeypatch.setattr("strop.engine.card.attention.varlen_kernel", lambda like: varlen)
    torch.manual_seed(0)
    shape, cos, sin = heads(window, True, 1), rand(8, 2).cos(), rand(8, 2).sin()
    qkv = rand(8, 16, grad=True)
    for spans in ([(2, 3, 2), (5, 2, 2), (7, 1, 2), (0, 2, 0)], [(0, 5, 0), (5, 3, 0)]):
        documents = documents_of(8, *spans)
        found, expected = (way(qkv, shape, cos, sin, documents) for way in (on_card, Attention.apply))
        torch.testing.assert_close(found, expected)
        upstream = rand(*expected.shape)
        one, other = (torch.autograd.grad(out, qkv, upstream)[0] for out in (found, expected))
        torch.testing.assert_close(one, other)
