"""Every hand-derived gradient compared with finite differences in fp64."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from strop.engine.train import dropout as drops
from strop.engine.train import lora
from strop.engine.train.dropout import DropoutSpec, keep_scale
from strop.engine.train.head import LabelLogProbs, OutputHead, SupervisedLoss, _add_matmul
from strop.engine.train.linear import Activation, Dora, FrozenLinear, Glu, LoraLinear
from strop.engine.train.norms import LayerNorm, Norm, NormFunction, normalize
from strop.machine.probe import probe
from tests.support.attention import OPS, check, rand

LORA: Any = lora


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (2, 3, 4)])
def test_rms_norm(shape: tuple[int, ...], offset: float) -> None:
    torch.manual_seed(0)
    norm = Norm(OPS, rand(shape[-1]), 1e-5, offset)
    check(lambda x: NormFunction.apply(x, norm), rand(*shape, grad=True))
    wide = rand(*shape[:-1], 2 * shape[-1], grad=True)
    check(lambda x: NormFunction.apply(x[..., ::2], norm), wide)  # not contiguous
    expected = F.rms_norm(wide[..., ::2], (shape[-1],), norm.weight + offset, 1e-5)
    torch.testing.assert_close(NormFunction.apply(wide[..., ::2], norm), expected)


@pytest.mark.parametrize("way", ["rms", "offset", "layer norm", "layer norm without a bias"])
def test_trained_norm_equals_autograd(way: str) -> None:
    """Alone, and before a linear layer whose input needs no gradient. With training disabled, the result differs."""
    torch.manual_seed(0)
    weight, other = rand(5, grad=True), rand(5)
    bias = rand(5, grad=True) if way == "layer norm" else None
    parameters = [(weight, bias)]
    about: Any = (OPS, other, 1e-5, 1.0 if way == "offset" else 0.0, None, lambda: parameters[-1])
    norm = LayerNorm(*about) if "layer" in way else Norm(*about)
    trained = [weight, *([] if bias is None else [bias])]

    def expected(x: torch.Tensor) -> torch.Tensor:
        if "layer" in way:
            return F.layer_norm(x, (5,), weight, bias, 1e-5)
        return F.rms_norm(x, (5,), weight + norm.offset, 1e-5)

    x, upstream = rand(3, 5, grad=True), rand(3, 5)
    torch.testing.assert_close(normalize(x, norm), expected(x))
    for mine, theirs in zip(
        torch.autograd.grad(normalize(x, norm), [x, *trained], upstream),
        torch.autograd.grad(expected(x), [x, *trained], upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    matrix, a, b = rand(4, 5), rand(2, 5, grad=True), rand(4, 2, grad=True)
    for columns, parts in ((((0, 4),), [a, b]), ((), [])):
        frozen = FrozenLinear(lambda: matrix, None, LORA, columns, (0.5,) * len(columns))
        current = norm.with_current_weights()
        y = LoraLinear.apply(x.detach(), frozen, current, None, *parts, *current.trained)
        z = expected(x.detach())
        whole = z @ (matrix + (0.5 * b @ a if columns else 0)).t()
        torch.testing.assert_close(y, whole)
        up, inputs = rand(3, 4), [*parts, *trained]
        for mine, theirs in zip(
            torch.autograd.grad(y, inputs, up), torch.autograd.grad(whole, inputs, up), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
    parameters.append((other, None))
    assert not norm.with_current_weights().trained and torch.equal(norm.with_current_weights().weight, other)


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
    frozen = FrozenLinear(lambda: weight, rand(outputs) if bias else None, LORA, columns, (0.5, 2.0, 3.0)[: len(ranks)])
    if dropout:
        keys, levels = torch.arange(tokens), (30000, 0, 50000)[: len(ranks)]
        dropped = DropoutSpec(1, 2, keys, tuple(range(len(ranks))), levels)
        frozen = dataclasses.replace(frozen, dropped=dropped, dropout_ops=cast(Any, drops))
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
def test_prologues_and_dora_equal_their_definition(enter: str, dora: bool, dropout: bool) -> None:
    """DoRA's norms are constants in the gradient, so only x and the magnitudes are compared with finite differences,
    and A and B with autograd of the definition. As in peft, dropout does not affect the output of the frozen layer.
    """
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
    frozen = FrozenLinear(
        lambda: weight, bias, LORA, columns, scales, dora=Dora(OPS, weight.square().sum(1)) if dora else None
    )
    levels = (30000, 50000) if dropout else (0, 0)
    dropped = DropoutSpec(1, 2, torch.arange(3), (4, 5), levels)
    if dropout:
        frozen = dataclasses.replace(frozen, dropped=dropped, dropout_ops=cast(Any, drops))
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
    masks = drops.apply_masks(torch.ones(3, k).double(), dropped).split(k, 1)
    for i, ((start, end), a, b) in enumerate(zip(columns, parts[::2], parts[1::2], strict=True)):
        up = keep_scale(levels[i])
        own, w = scales[i] / up * b @ a, weight[start:end]
        gains = magnitudes[i].detach() / (w + own).norm(dim=1).detach()
        masked = z * masks[i] * up
        change = (gains - 1) * F.linear(masked, w) + gains * F.linear(masked, own)
        expected = expected + F.pad(change, (start, 3 * n - end))
    result = computed(x, residual, *parts, *magnitudes)
    torch.testing.assert_close(result, expected)
    upstream = rand(3, 3 * n)
    for mine, theirs in zip(
        torch.autograd.grad(result, parts, upstream), torch.autograd.grad(expected, parts, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_lora_linear_equals_frozen_plus_adapter() -> None:
    x, w, a, b = rand(3, 5), rand(8, 5), rand(2, 5), rand(4, 2)
    y = LoraLinear.apply(x, FrozenLinear(lambda: w, None, LORA, ((4, 8),), (0.5,)), None, None, a, b)
    torch.testing.assert_close(y, torch.cat([x @ w[:4].t(), x @ w[4:].t() + 0.5 * (x @ a.t() @ b.t())], dim=1))


@pytest.mark.parametrize("way", ["train.lora", "kernels.cpu.lora"])
@pytest.mark.parametrize("residual", [False, True])
def test_small_lora_updates_survive_bf16_rounding(way: str, residual: bool) -> None:
    """The update (0.1 % here) is below half of the last bit of the value that it is added to in bf16."""
    if way == "kernels.cpu.lora" and not probe().has_avx512_bf16:
        pytest.skip("this CPU has no AVX512-BF16")
    torch.manual_seed(0)
    products = importlib.import_module(f"strop.engine.{way}")
    x, w, a = torch.randn(64, 256), torch.randn(128, 256) / 16, torch.randn(16, 256) / 16
    b, onto = 2.5e-4 * torch.randn(128, 16), torch.randn(64, 128).bfloat16()
    product = LORA.frozen_matmul
    if way == "kernels.cpu.lora":
        product = importlib.import_module("strop.engine.kernels.cpu.bf16_matmul").matmul
    frozen = FrozenLinear(lambda: w.bfloat16(), None, products, ((0, 128),), (1.0,), matmul=product)
    with torch.no_grad():
        added = x.bfloat16().float() @ a.t() @ b.t()
        arguments = x.bfloat16(), frozen, None, onto if residual else None
        change = LoraLinear.apply(*arguments, a, b).float() - LoraLinear.apply(*arguments, a, 0 * b).float()
    share = float((change * added).sum() / (added * added).sum())
    assert share == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_trained_rows_of_the_head_equal_autograd(softcap: float) -> None:
    torch.manual_seed(0)
    x, head, own, at = rand(5, 3, grad=True), rand(7, 3), rand(2, 3, grad=True), torch.tensor([6, 2])
    labels, weights = torch.tensor([1, 0, 6, 1, 2]), torch.tensor([1.0, 0.5, 2.0, 0.1, 3.0], dtype=torch.float64)

    def loss(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return (
            SupervisedLoss.apply(x, labels, weights, OutputHead(head, softcap, OPS, new_rows=own, new_ids=at), own)
            * 0.3
        )

    def log_probs(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return LabelLogProbs.apply(x, labels, OutputHead(head, softcap, OPS, new_rows=own, new_ids=at), own)

    check(loss, x, own)
    check(log_probs, x, own)
    logits = x @ head.index_copy(0, at, own).t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss(x, own), 0.3 * (expected * weights).sum())
    torch.testing.assert_close(log_probs(x, own), -expected)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_trained_head_equals_autograd(softcap: float, dropout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters, the weight and a bias, with several chunks of rows: compared with autograd, and with finite
    differences where the backward recomputes the logits.
    """
    monkeypatch.setattr("strop.engine.train.head.CHUNK_BYTES", 1)  # 16 rows
    torch.manual_seed(0)
    rows, h, v = 40, 3, 7
    dropped = DropoutSpec(1, 2, torch.arange(rows), (4, 5), (30000, 20000)) if dropout else None
    adapters = tuple(t for r in (2, 1) for t in (rand(r, h, grad=True), rand(v, r, grad=True)))
    x, weight, bias, scales = rand(rows, h, grad=True), rand(v, h, grad=True), rand(v, grad=True), (0.5, 2.0)
    output = OutputHead(
        weight, softcap, OPS, bias, adapters=adapters, scales=scales, dropped=dropped, dropout_ops=cast(Any, drops),
        weight_trained=True, bias_trained=True,
    )  # fmt: skip
    labels, weights = torch.randint(0, v, (rows,)), torch.rand(rows, dtype=torch.float64)
    inputs = [x, *adapters, weight, bias]
    logits = F.linear(x, weight, bias)
    masks = [torch.ones(rows, h).double()] * 2 if dropped is None else drops.apply_masks(x * 0 + 1, dropped).split(h, 1)
    for a, b, scale, mask in zip(adapters[::2], adapters[1::2], scales, masks, strict=True):
        logits = logits + scale * (x * mask.detach()) @ a.t() @ b.t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    losses = F.cross_entropy(logits, labels, reduction="none")
    upstream = rand(rows)
    for result, expected in (
        (SupervisedLoss.apply(x, labels, weights, output, *output.trained) * 0.3, 0.3 * (losses * weights).sum()),
        ((LabelLogProbs.apply(x, labels, output, *output.trained) * upstream).sum(), (-losses * upstream).sum()),
    ):
        torch.testing.assert_close(result, expected)
        mine, theirs = torch.autograd.grad(result, inputs), torch.autograd.grad(expected, inputs, retain_graph=True)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other)
    few = dataclasses.replace(output, dropped=None)
    check(
        lambda x, *trained: LabelLogProbs.apply(x, labels[:3], few, *trained),
        x.detach()[:3].requires_grad_(),
        *inputs[1:],
    )


def test_head_gradient_in_bf16_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is computed by parts of the vocabulary; the sum of 400 chunks of a row must not be rounded away."""
    monkeypatch.setattr("strop.engine.train.head.PIECE_BYTES", 64)
    torch.manual_seed(0)
    total, slopes, x = torch.zeros(37, 8), torch.rand(400, 37).bfloat16(), torch.rand(400, 8).bfloat16()
    for slope, row in zip(slopes, x, strict=True):
        _add_matmul(total, slope[None], row[None])
    torch.testing.assert_close(total, slopes.float().t() @ x.float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_supervised_loss(softcap: float) -> None:
    torch.manual_seed(0)
    x, head = rand(5, 3, grad=True), rand(7, 3)
    labels, weights = torch.tensor([1, 0, 6, 1, 2]), torch.tensor([1.0, 0.5, 2.0, 0.1, 3.0], dtype=torch.float64)
    check(lambda x: SupervisedLoss.apply(x, labels, weights, OutputHead(head, softcap, OPS)) * 0.3, x)
    logits = x @ head.t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
    torch.testing.assert_close(SupervisedLoss.apply(x, labels, weights, OutputHead(head, softcap, OPS)), expected)
