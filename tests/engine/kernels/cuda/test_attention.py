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
        mask = ~eager.causal_mask(n, m, m - n, heads.window, q.device)
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


# ---- from tests.engine.kernels.cuda.test_flash ----
"""Flash attention 3: taken where it is there and right, and left where it is not."""

from __future__ import annotations

import pytest

from strop.engine.kernels.cuda import attention as flash

CARD = torch.device("cuda", 0)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hopper card, and a flash attention 3 that is `off` by this much, or raises it."""
    state: dict[str, Any] = {"now": None, "off": 0.0, "told": []}

    def activate(name: str) -> None:
        state["now"] = name
        if isinstance(state["off"], Exception):
            raise state["off"]

    def trial(device: torch.device) -> list[torch.Tensor]:
        return [torch.zeros(2), torch.ones(3) + (state["off"] if state["now"] else 0.0)]

    known: Any = torch.nn.attention
    monkeypatch.setattr(known, "activate_flash_attention_impl", activate, raising=False)
    monkeypatch.setattr(known, "restore_flash_attention_impl", lambda: state.update(now=None), raising=False)
    monkeypatch.setattr(known, "list_flash_attention_impls", lambda: ["FA3"], raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "find_spec", lambda name: object())
    monkeypatch.setattr(flash, "_trial", trial)
    flash.why_not.cache_clear()
    return state


def test_it_is_taken_where_its_numbers_are_right(attention: dict[str, Any]) -> None:
    attention["off"] = 0.01
    assert flash.why_not(CARD) is None and attention["now"] == "FA3"


@pytest.mark.parametrize(
    ("off", "why"),
    [
        (0.5, "its numbers are wrong here"),
        (float("nan"), "its numbers are wrong here"),
        (OSError("no symbol"), "no symbol"),
    ],
)
def test_it_is_left_where_it_does_not_work(
    attention: dict[str, Any], off: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    attention["off"] = off
    assert flash.why_not(CARD) == why and attention["now"] is None
    assert why in caplog.text


def test_it_is_not_looked_for_where_it_cannot_be(attention: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    assert flash.why_not(CARD) == "it is not installed"
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", list, raising=False)
    flash.why_not.cache_clear()
    assert flash.why_not(CARD) == "this PyTorch does not know of it"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    flash.why_not.cache_clear()
    assert flash.why_not(CARD) == "it is for Hopper" and attention["now"] is None


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    yield
    flash.why_not.cache_clear()
