"""Every hand-derived gradient against numerical differentiation in fp64."""

from __future__ import annotations

import importlib
import shutil
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from strop.engine import eager, lora
from strop.engine.attention import Attention, Heads, on_card, sdpa
from strop.engine.functions import Frozen, Glu, LoraLinear, Norm, RmsNorm
from strop.engine.head import SupervisedLoss
from strop.engine.packed import Documents, Varlen
from strop.machine.probe import probe

OPS: Any = eager
LORA: Any = lora


def rand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def check(function: Any, *inputs: Any) -> None:
    # gradcheck's own upstream gradients are unit vectors, so no two rows are treated alike.
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (2, 3, 4)])
def test_rms_norm(shape: tuple[int, ...], offset: float) -> None:
    torch.manual_seed(0)
    norm = Norm(OPS, rand(shape[-1]), 1e-5, offset)
    check(lambda x: RmsNorm.apply(x, norm), rand(*shape, grad=True))
    wide = rand(*shape[:-1], 2 * shape[-1], grad=True)
    check(lambda x: RmsNorm.apply(x[..., ::2], norm), wide)  # not contiguous
    expected = F.rms_norm(wide[..., ::2], (shape[-1],), norm.weight + offset, 1e-5)
    torch.testing.assert_close(RmsNorm.apply(wide[..., ::2], norm), expected)


@pytest.mark.parametrize("enter", ["none", "norm", "silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(
    ("tokens", "ranks", "bias"), [(1, (1,), False), (3, (2, 3), True), (2, (), True), (5, (1, 2, 3), False)]
)
def test_lora_linear(enter: str, tokens: int, ranks: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    k, n = 5, 4
    entry = None if enter == "none" else Norm(OPS, rand(k), 1e-5, 0.0) if enter == "norm" else Glu(OPS, enter)
    outputs = n * max(len(ranks), 1)
    columns = tuple((i * n, (i + 1) * n) for i in range(len(ranks)))
    weight = rand(outputs, k)
    frozen = Frozen(lambda: weight, rand(outputs) if bias else None, LORA, columns, (0.5, 2.0, 3.0)[: len(ranks)])
    adapters = [t for r in ranks for t in (rand(r, k, grad=True), rand(n, r, grad=True))]
    x = rand(tokens, k if enter in ("none", "norm") else 2 * k, grad=True)
    check(lambda x, *ab: LoraLinear.apply(x, frozen, entry, None, *ab), x, *adapters)
    check(lambda x, *ab: LoraLinear.apply(x.t().contiguous().t(), frozen, entry, None, *ab), x, *adapters)
    residual = rand(tokens, outputs, grad=True)
    check(lambda x, residual, *ab: LoraLinear.apply(x, frozen, entry, residual, *ab), x, residual, *adapters)
    added = LoraLinear.apply(x, frozen, entry, residual, *adapters)
    torch.testing.assert_close(added, residual + LoraLinear.apply(x, frozen, entry, None, *adapters))
    if ranks:  # the first layer's input needs no gradient
        check(lambda *ab: LoraLinear.apply(x.detach(), frozen, entry, None, *ab), *adapters)


def test_lora_linear_is_the_sum_of_its_parts() -> None:
    x, w, a, b = rand(3, 5), rand(8, 5), rand(2, 5), rand(4, 2)
    y = LoraLinear.apply(x, Frozen(lambda: w, None, LORA, ((4, 8),), (0.5,)), None, None, a, b)
    torch.testing.assert_close(y, torch.cat([x @ w[:4].t(), x @ w[4:].t() + 0.5 * (x @ a.t() @ b.t())], dim=1))


@pytest.mark.parametrize("way", ["lora", "lora_tiles"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_young_adapter_is_not_rounded_away(way: str, residual: bool) -> None:
    """In bf16, what it adds (0.1 % here) is below half of the last bit of what it is added to."""
    if way == "lora_tiles" and not probe().tiles:
        pytest.skip("this CPU has no AVX512-BF16")
    torch.manual_seed(0)
    products = importlib.import_module(f"strop.engine.{way}")
    x, w, a = torch.randn(64, 256), torch.randn(128, 256) / 16, torch.randn(16, 256) / 16
    b, onto = 2.5e-4 * torch.randn(128, 16), torch.randn(64, 128).bfloat16()
    frozen = Frozen(lambda: w.bfloat16(), None, products, ((0, 128),), (1.0,))
    with torch.no_grad():
        added = x.bfloat16().float() @ a.t() @ b.t()
        given = x.bfloat16(), frozen, None, onto if residual else None
        change = LoraLinear.apply(*given, a, b).float() - LoraLinear.apply(*given, a, 0 * b).float()
    share = float((change * added).sum() / (added * added).sum())
    assert share == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_supervised_loss(softcap: float) -> None:
    torch.manual_seed(0)
    x, head = rand(5, 3, grad=True), rand(7, 3)
    labels, weights = torch.tensor([1, 0, 6, 1, 2]), torch.tensor([1.0, 0.5, 2.0, 0.1, 3.0], dtype=torch.float64)
    check(lambda x: SupervisedLoss.apply(x, labels, weights, head, softcap, OPS) * 0.3, x)
    logits = x @ head.t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
    torch.testing.assert_close(SupervisedLoss.apply(x, labels, weights, head, softcap, OPS), expected)


def heads(window: int, norms: bool, key_value: int = 1, softcap: float = 0.0) -> Heads:
    q_norm, k_norm = (Norm(OPS, rand(4), 1e-5, 0.0) if norms else None for _ in range(2))
    shape = {"query": 2, "key_value": key_value, "size": 4, "scale": 0.7, "window": window, "softcap": softcap}
    return Heads(OPS, **shape, q_norm=q_norm, k_norm=k_norm)  # type: ignore[arg-type]


def reference(qkv: Tensor, shape: Heads, cos: Tensor, sin: Tensor, sees: Tensor) -> Tensor:
    """Attention by definition, over all packed rows at once. sees (T, T) bool."""
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
    for attend in (Attention.apply,) if softcap else (Attention.apply, sdpa):
        out = attend(qkv, shape, cos, sin, layout)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, qkv, upstream)[0], expected_grad)


@pytest.mark.parametrize("softcap", [0.0, 0.8])
def test_attention_gradcheck(softcap: float) -> None:
    torch.manual_seed(0)
    layout = documents_of(3, (0, 3, 0))
    cos, sin = rand(3, 2).cos(), rand(3, 2).sin()
    check(lambda qkv: Attention.apply(qkv, heads(0, False, softcap=softcap), cos, sin, layout), rand(3, 16, grad=True))


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

    monkeypatch.setattr("strop.engine.attention.varlen_kernel", lambda like: varlen)
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler about its own parts
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles with g++ on a CPU")
def test_compiled_operations_equal_plain_ones() -> None:
    """As cards have them, compiled for the CPU here; other lengths are not compiled anew."""
    from strop.engine.card import fused

    for tokens in (5, 9):
        x, weight, grad = torch.randn(tokens, 16), torch.randn(16), torch.randn(tokens, 16)
        arguments = (grad, x, weight, 1e-5, 1.0)
        torch.testing.assert_close(fused.rms_norm_backward(*arguments), eager.rms_norm_backward(*arguments))
        labels, weights, made = torch.arange(tokens), torch.rand(tokens), torch.randn(tokens, 40)
        expected = made.clone()
        loss = fused.cross_entropy_(made, labels, weights, 0.0, True)
        torch.testing.assert_close(loss, eager.cross_entropy_(expected, labels, weights, 0.0, True))
        torch.testing.assert_close(made, expected)
