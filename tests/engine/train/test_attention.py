"""Attention over packed documents, compared with its definition; gradients compared with finite differences."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch

from strop.engine.kernels import eager
from strop.engine.kernels.cpu import elementwise
from strop.engine.kernels.cuda.attention import EAGER_ROPE, padded_attention
from strop.engine.kernels.eager import rotate
from strop.engine.train.attention import Attention
from tests.support.attention import check, documents_of, heads, rand, reference


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("rotated", [1, 2])
@pytest.mark.parametrize("softcap", [0.0, 0.8])
@pytest.mark.parametrize("settings", [(128, 512), (2, 512), (2, 0)])
def test_attention_equals_its_definition(
    kv_heads: int,
    norms: bool,
    window: int,
    rotated: int,
    softcap: float,
    settings: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows 0 to 1 are a prefix, followed by documents of 3 and 2 rows that use it, and a document of one row without
    it.
    """
    monkeypatch.setattr("strop.engine.train.attention.BLOCK", settings[0])
    monkeypatch.setattr("strop.engine.train.attention.MAX_SAVED_KEYS", settings[1])
    torch.manual_seed(0)
    shape = heads(window, norms, kv_heads, softcap)
    tokens = 8
    cos, sin = rand(tokens, rotated).cos(), rand(tokens, rotated).sin()
    layout = documents_of(tokens, (2, 3, 2), (5, 2, 2), (0, 2, 0), (7, 1, 0))
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    for document in ([0, 1, 2, 3, 4], [0, 1, 5, 6], [7]):
        for i, query in enumerate(document):
            sees[query, document[max(0, i + 1 - window) if window else 0 : i + 1]] = True
    qkv = rand(tokens, (2 + 2 * kv_heads) * 4, grad=True)
    expected = reference(qkv, shape, cos, sin, sees)
    upstream = rand(*expected.shape)
    (expected_grad,) = torch.autograd.grad(expected, qkv, upstream)
    for attend in (Attention.apply,) if softcap else (Attention.apply, partial(padded_attention, rope=EAGER_ROPE)):
        out = attend(qkv, shape, cos, sin, layout)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, qkv, upstream)[0], expected_grad)


@pytest.mark.parametrize(("ops", "tolerance"), [(eager, 1e-6), (elementwise, 1e-5)])
@pytest.mark.parametrize("window", [0, 2])
def test_attention_sinks_equal_an_extra_key_with_zero_value(ops: Any, tolerance: float, window: int) -> None:
    """A sink acts like one more key per head that all queries see, with the sink as its score and a zero value."""
    torch.manual_seed(0)
    sinks, tokens = torch.tensor([-1.0, 0.5, 2.0, 40.0]), 6
    shape = dataclasses.replace(heads(window, False, 2), ops=ops, num_query_heads=4, sinks=sinks)
    cos, sin, qkv = rand(tokens, 2).cos().float(), rand(tokens, 2).sin().float(), rand(tokens, 32).float()
    qkv.requires_grad_()
    result = Attention.apply(qkv, shape, cos, sin, documents_of(tokens, (0, 4, 0), (4, 2, 0)))
    q, k, v = (x.transpose(0, 1) for x in shape.views(qkv))
    q, k = (rotate(x.transpose(0, 1), cos, sin).transpose(0, 1) for x in (q, k))
    scores = (q * shape.scale) @ k.repeat_interleave(2, 0).transpose(1, 2)
    of = torch.tensor([0, 0, 0, 0, 1, 1])
    place = torch.arange(tokens)
    seen = (of[:, None] == of) & (place <= place[:, None]) & ((place[:, None] - place < window) | (window == 0))
    scores = torch.cat([scores.masked_fill(~seen, -torch.inf), sinks.view(4, 1, 1).expand(4, tokens, 1)], -1)
    expected = (scores.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 0)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    upstream = rand(*expected.shape).float()
    gradients = [torch.autograd.grad(one, qkv, upstream)[0] for one in (result, expected)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("softcap", [0.0, 0.8])
def test_attention_gradcheck(softcap: float) -> None:
    torch.manual_seed(0)
    layout = documents_of(3, (0, 3, 0))
    cos, sin = rand(3, 2).cos(), rand(3, 2).sin()
    check(lambda qkv: Attention.apply(qkv, heads(0, False, softcap=softcap), cos, sin, layout), rand(3, 16, grad=True))
