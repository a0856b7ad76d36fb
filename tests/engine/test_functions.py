"""Every hand-derived gradient against numerical differentiation in fp64."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from strop.engine import dropout as drops
from strop.engine import lora
from strop.engine.dora import Dora
from strop.engine.dropout import Dropped, grown
from strop.engine.functions import Activation, Frozen, Glu, LoraLinear
from strop.engine.head import LabelLogProbs, Output, SupervisedLoss
from strop.engine.norms import LayerNorm, Norm, RmsNorm
from strop.machine.probe import probe
from tests.support.attention import OPS, check, rand

LORA: Any = lora


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


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("enter", ["none", "norm", "silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(
    ("tokens", "ranks", "bias"), [(1, (1,), False), (3, (2, 3), True), (2, (), True), (5, (1, 2, 3), False)]
)
def test_lora_linear(enter: str, tokens: int, ranks: tuple[int, ...], bias: bool, dropout: bool) -> None:
    torch.manual_seed(0)
    k, n = 5, 4
    entry = None if enter == "none" else Norm(OPS, rand(k), 1e-5, 0.0) if enter == "norm" else Glu(OPS, enter)
    outputs = n * max(len(ranks), 1)
    columns = tuple((i * n, (i + 1) * n) for i in range(len(ranks)))
    weight = rand(outputs, k)
    frozen = Frozen(lambda: weight, rand(outputs) if bias else None, LORA, columns, (0.5, 2.0, 3.0)[: len(ranks)])
    if dropout:
        keys, levels = torch.arange(tokens), (30000, 0, 50000)[: len(ranks)]
        dropped = Dropped(1, 2, keys, tuple(range(len(ranks))), levels)
        frozen = dataclasses.replace(frozen, dropped=dropped, drops=cast(Any, drops))
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


@pytest.mark.parametrize("enter", ["none", "gelu", "gated gelu", "layer norm"])
@pytest.mark.parametrize(("dora", "dropout"), [(False, False), (True, False), (True, True)])
def test_what_stands_in_front_and_dora(enter: str, dora: bool, dropout: bool) -> None:
    """DoRA's norms are constants in the gradient: x and the magnitudes alone are differentiated numerically, A and B
    against autograd of the definition. With dropout that is peft's: the frozen layer's own output is not dropped."""
    torch.manual_seed(0)
    k, n = 5, 4
    ways = {
        "none": None,
        "gelu": Activation(F.gelu, gated=False),
        "gated gelu": Activation(F.gelu, gated=True),
        "layer norm": LayerNorm(OPS, rand(k), 1e-5, 0.0, rand(k)),
    }
    weight, bias = rand(3 * n, k), rand(3 * n)
    columns, scales = ((0, n), (2 * n, 3 * n)), (0.5, 2.0)
    frozen = Frozen(
        lambda: weight, bias, LORA, columns, scales, dora=Dora(OPS, weight.square().sum(1)) if dora else None
    )
    levels = (30000, 50000) if dropout else (0, 0)
    dropped = Dropped(1, 2, torch.arange(3), (4, 5), levels)
    if dropout:
        frozen = dataclasses.replace(frozen, dropped=dropped, drops=cast(Any, drops))
    parts = [t for r in (2, 3) for t in (rand(r, k, grad=True), rand(n, r, grad=True))]
    magnitudes = [rand(n, grad=True) for _ in columns] if dora else []
    x, residual = rand(3, 2 * k if enter == "gated gelu" else k, grad=True), rand(3, 3 * n, grad=True)

    def computed(x: torch.Tensor, residual: torch.Tensor | None, *of: torch.Tensor) -> torch.Tensor:
        return LoraLinear.apply(x, frozen, ways[enter], residual, *of)

    if not dora:
        check(computed, x, residual, *parts)
        return
    fixed = [part.detach() for part in parts]
    check(lambda x, residual, *m: computed(x, residual, *fixed, *m), x, residual, *magnitudes)
    check(lambda x, *m: computed(x, None, *fixed, *m), x, *magnitudes)
    z = x if ways[enter] is None else ways[enter].forward(x)
    expected = F.linear(z, weight, bias) + residual
    masks = drops.spread(torch.ones(3, k).double(), dropped).split(k, 1)
    for i, ((start, end), a, b) in enumerate(zip(columns, parts[::2], parts[1::2], strict=True)):
        up = grown(levels[i])
        own, w = scales[i] / up * b @ a, weight[start:end]
        gains = magnitudes[i].detach() / (w + own).norm(dim=1).detach()
        kept = z * masks[i] * up
        change = (gains - 1) * F.linear(kept, w) + gains * F.linear(kept, own)
        expected = expected + F.pad(change, (start, 3 * n - end))
    found = computed(x, residual, *parts, *magnitudes)
    torch.testing.assert_close(found, expected)
    upstream = rand(3, 3 * n)
    for mine, theirs in zip(
        torch.autograd.grad(found, parts, upstream), torch.autograd.grad(expected, parts, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_lora_linear_is_the_sum_of_its_parts() -> None:
    x, w, a, b = rand(3, 5), rand(8, 5), rand(2, 5), rand(4, 2)
    y = LoraLinear.apply(x, Frozen(lambda: w, None, LORA, ((4, 8),), (0.5,)), None, None, a, b)
    torch.testing.assert_close(y, torch.cat([x @ w[:4].t(), x @ w[4:].t() + 0.5 * (x @ a.t() @ b.t())], dim=1))


@pytest.mark.parametrize("way", ["lora", "cpu.lora_tiles"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_young_adapter_is_not_rounded_away(way: str, residual: bool) -> None:
    """In bf16, what it adds (0.1 % here) is below half of the last bit of what it is added to."""
    if way == "cpu.lora_tiles" and not probe().tiles:
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
def test_rows_of_the_head_that_are_trained(softcap: float) -> None:
    torch.manual_seed(0)
    x, head, own, at = rand(5, 3, grad=True), rand(7, 3), rand(2, 3, grad=True), torch.tensor([6, 2])
    labels, weights = torch.tensor([1, 0, 6, 1, 2]), torch.tensor([1.0, 0.5, 2.0, 0.1, 3.0], dtype=torch.float64)

    def loss(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return SupervisedLoss.apply(x, labels, weights, Output(head, softcap, OPS, own=own, at=at), own) * 0.3

    def log_probs(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return LabelLogProbs.apply(x, labels, Output(head, softcap, OPS, own=own, at=at), own)

    check(loss, x, own)
    check(log_probs, x, own)
    logits = x @ head.index_copy(0, at, own).t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss(x, own), 0.3 * (expected * weights).sum())
    torch.testing.assert_close(log_probs(x, own), -expected)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_supervised_loss(softcap: float) -> None:
    torch.manual_seed(0)
    x, head = rand(5, 3, grad=True), rand(7, 3)
    labels, weights = torch.tensor([1, 0, 6, 1, 2]), torch.tensor([1.0, 0.5, 2.0, 0.1, 3.0], dtype=torch.float64)
    check(lambda x: SupervisedLoss.apply(x, labels, weights, Output(head, softcap, OPS)) * 0.3, x)
    logits = x @ head.t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
    torch.testing.assert_close(SupervisedLoss.apply(x, labels, weights, Output(head, softcap, OPS)), expected)
