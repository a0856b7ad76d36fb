"""Attention over packed documents against its definition, and its gradient against numerical differentiation."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from strop.engine.attention import Attention
from strop.engine.card.attention import IN_PYTORCH, padded
from tests.support.attention import check, documents_of, heads, rand, reference


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("rotated", [1, 2])
@pytest.mark.parametrize("softcap", [0.0, 0.8])
@pytest.mark.parametrize("settings", [(128, 512), (2, 512), (2, 0)])
def test_attention(
    kv_heads: int,
    norms: bool,
    window: int,
    rotated: int,
    softcap: float,
    settings: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows 0 to 1 are a prefix; documents of 3 and 2 rows behind it; a document of one row without it."""
    monkeypatch.setattr("strop.engine.attention.BLOCK", settings[0])
    monkeypatch.setattr("strop.engine.attention.KEEP_PAIRS", settings[1])
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
    for attend in (Attention.apply,) if softcap else (Attention.apply, partial(padded, turns=IN_PYTORCH)):
        out = attend(qkv, shape, cos, sin, layout)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, qkv, upstream)[0], expected_grad)


@pytest.mark.parametrize("softcap", [0.0, 0.8])
def test_attention_gradcheck(softcap: float) -> None:
    torch.manual_seed(0)
    layout = documents_of(3, (0, 3, 0))
    cos, sin = rand(3, 2).cos(), rand(3, 2).sin()
    check(lambda qkv: Attention.apply(qkv, heads(0, False, softcap=softcap), cos, sin, layout), rand(3, 16, grad=True))
