"""Matmuls of frozen weights in 8-bit integers, and whole steps with them: close to fp64 and to fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig

from strop.engine.train.fast import FastLoss
from strop.engine.train.lora import Product
from strop.engine.train.peft_modules import base_module
from strop.machine.probe import probe
from strop.models.quantize import QuantizedLinear, quantize_weight
from tests.engine.train.test_fast import NEW_TOKENS, answers, some, step, with_new_tokens
from tests.support.random_models import FAMILY_CONFIGS, adapted

pytestmark = pytest.mark.skipif(not probe().has_int8_dot, reason="this CPU has no VNNI")
NEAR = 2e-4  # relative to the norm: rows with similar values have a step of 1 / 16,256 of the largest
LOSS, GRADIENT = 1e-5, 3e-3  # relative; the gradient of each weight by its norm


@pytest.fixture
def int8_matmul() -> Any:
    from strop.engine.kernels.cpu import int8_matmul

    return int8_matmul


def truth(weight: Any) -> Tensor:
    """Return the weight that the parts represent, in fp64."""
    low = 0 if weight.low is None else weight.low.double()
    return weight.scale.double()[:, None] * (weight.high.double() * (1 if weight.low is None else 128) + low)


def weights(int8_matmul: Any, n: int, k: int) -> dict[str, Any]:
    torch.manual_seed(0)
    eight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return {
        "two parts": int8_matmul.Int8Weight.quantize(torch.randn(n, k)),
        "8 bit": int8_matmul.Int8Weight(eight, None, torch.rand(n)),
    }


def test_quantized_weight_is_within_half_a_step(int8_matmul: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 33)
    weight[3], weight[4, 5] = 0, 50
    off = (truth(int8_matmul.Int8Weight.quantize(weight)) - weight.double()).abs()
    step = weight.double().abs().amax(1, keepdim=True) / 16256
    assert (off <= step * (0.5 + 16256 * 2**-22)).all()  # half a step, and the rounding of fp32


@pytest.mark.parametrize("storage", ["two parts", "8 bit"])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 5, 3), (7, 64, 33), (33, 160, 96), (300, 48, 576)])
def test_results_are_close_to_fp64(int8_matmul: Any, storage: str, transposed: bool, rows: int, n: int, k: int) -> None:
    weight = weights(int8_matmul, n, k)[storage]
    x, width = torch.randn(rows, k if transposed else n), n if transposed else k
    y, bias, residual = torch.empty(rows, width), torch.randn(width), torch.randn(rows, width)
    thin, w = torch.randn(rows, 4), torch.randn(4, width)
    product = x.double() @ (truth(weight).t() if transposed else truth(weight))
    result = int8_matmul.Int8Matmul().layer(x, weight, transposed, y)
    assert result is y and (y - product).norm() <= NEAR * product.norm()
    int8_matmul.Int8Matmul().layer(x, weight, transposed, y, Product(thin, w), bias, residual)
    expected = product + thin.double() @ w.double() + bias + residual
    assert (y - expected).norm() <= NEAR * product.norm() + 1e-6 * expected.norm()


@pytest.mark.parametrize("transposed", [True, False])
def test_a_row_has_the_same_bits_in_any_batch(int8_matmul: Any, transposed: bool, monkeypatch: Any) -> None:
    weight, x = weights(int8_matmul, 96, 96)["two parts"], torch.randn(50, 96)
    together = int8_matmul.Int8Matmul().layer(x, weight, transposed, torch.empty(50, 96))
    alone = torch.cat([int8_matmul.Int8Matmul().layer(row[None], weight, transposed, torch.empty(1, 96)) for row in x])
    assert torch.equal(together, alone)
    monkeypatch.setattr(int8_matmul, "SUMS_BYTES", 0)  # the fewest rows at once
    assert torch.equal(together, int8_matmul.Int8Matmul().layer(x, weight, transposed, torch.empty(50, 96)))


def test_rows_of_very_different_sizes_and_zeros(int8_matmul: Any) -> None:
    weight, x = weights(int8_matmul, 64, 64)["two parts"], torch.randn(4, 64)
    x[0], x[1], x[2], x[3] = 0, x[1] * 1e20, x[2] * 1e-20, x[3] * 1e-39
    y = int8_matmul.Int8Matmul().layer(x, weight, True, torch.empty(4, 64)).double()
    right = x.double() @ truth(weight).t()
    assert (y[[0, 3]] == 0).all() and ((y - right).norm(dim=1)[:3] <= NEAR * right.norm(dim=1)[:3]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_rows_stay_nonfinite(int8_matmul: Any, bad: float) -> None:
    weight, x = weights(int8_matmul, 64, 64)["two parts"], torch.randn(3, 64)
    x[1, 7] = bad
    for transposed in (True, False):
        y = int8_matmul.Int8Matmul().layer(x, weight, transposed, torch.empty(3, 64))
        assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("flat", [True, False])
def test_head_gradient_keeps_small_values_next_to_the_label(int8_matmul: Any, flat: bool) -> None:
    """One token is near -1 and tens of thousands share the 1; all rows of the head have a common component."""
    torch.manual_seed(0)
    head, logits = torch.randn(20_000, 16) / 10 + 1, torch.randn(6, 20_000) * (0.1 if flat else 6)
    product, grad = int8_matmul.Int8Matmul().head(head), torch.softmax(logits, 1)
    grad[torch.arange(6), torch.arange(6) * 7] -= 1
    result = product(grad, head, False, torch.empty(6, 16)).double()
    right = grad.double() @ head.double()
    terms = (grad.double().abs() @ head.double().abs()).norm(dim=1)  # their sums cancel partly
    assert ((result - right).norm(dim=1) <= NEAR / 10 * terms).all()
    rough = (
        int8_matmul.Int8Matmul().layer(grad, int8_matmul.Int8Weight.quantize(head), False, torch.empty(6, 16)).double()
    )
    assert not flat or (rough - right).norm() > 20 * (result - right).norm()
    assert not torch.equal(result.float(), grad @ head)


def test_trained_head_is_multiplied_in_fp32(int8_matmul: Any) -> None:
    head, x = torch.randn(50, 16), torch.randn(6, 16)
    product = int8_matmul.Int8Matmul().head(head)
    logits = product(x, head, True, torch.empty(6, 50))
    expected = int8_matmul.Int8Matmul().layer(x, int8_matmul.Int8Weight.quantize(head), True, torch.empty(6, 50))
    assert torch.equal(logits, expected)
    copy = head * 2  # peft's copy
    assert torch.equal(product(x, copy, True, torch.empty(6, 50)), x @ copy.t())
    assert torch.equal(product(logits, copy, False, torch.empty(6, 16)), logits @ copy)


def test_integer_matmuls_of_this_cpu_are_exact() -> None:
    """Some CPUs without VNNI saturate the sum of two int8 products at 16 bits."""
    x = torch.full((8, 64), -128, dtype=torch.int8)
    x[::2] = 127
    assert torch.equal(torch._int_mm(x, x.t()).long(), x.long() @ x.long().t())
    assert (
        replace(probe(), vector=("avx2", "avx_vnni")).has_int8_dot
        and not replace(probe(), vector=("avx2",)).has_int8_dot
    )


def assert_near(model: PeftModel, **how: Any) -> None:
    expected, result = (step(model, FastLoss(model, int8_matmul=on, **how), some()) for on in (False, True))
    torch.testing.assert_close(result[0], expected[0], rtol=LOSS, atol=0)
    same = [torch.equal(result[1][name], grad) for name, grad in expected[1].items()]
    assert not all(same), "these matmuls ran in fp32"
    total = torch.cat([grad.flatten() for grad in expected[1].values()]).norm()
    for name, grad in expected[1].items():
        assert (result[1][name] - grad).norm() <= GRADIENT * grad.norm() + 1e-5 * total, name


def quantized(model: PeftModel) -> PeftModel:
    """Quantize all adapted layers to 8 bits."""
    for module in [*model.modules()]:
        base = base_module(module)
        if hasattr(module, "lora_A") and type(base) is nn.Linear:
            layer = QuantizedLinear(base, "int8", torch.float32)
            layer.load_packed(quantize_weight(base.weight.data, "int8"))
            module.base_layer = layer
    return model


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_step_of_each_family_is_close_to_fp32(family: str) -> None:
    model = adapted(family)
    assert_near(model)


@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.2}, {"bias": "all"}, {"target_modules": ["v_proj", "o_proj"]}])
def test_base_in_8_bits_is_multiplied_without_dequantization(lora: dict[str, Any]) -> None:
    model = quantized(adapted(LlamaConfig, lora, attention_bias=True))
    storage = [base_module(module).weight for module in model.modules() if hasattr(module, "lora_A")]
    values = [weight.clone() for weight in storage]
    assert_near(model)
    assert_near(model, checkpoint_layers=1)
    now = [base_module(module).weight for module in model.modules() if hasattr(module, "lora_A")]
    assert all(torch.equal(a, b) for a, b in zip(now, values, strict=True))


@pytest.mark.parametrize("case", NEW_TOKENS)
def test_step_with_new_tokens_is_close_to_fp32(case: str) -> None:
    assert_near(with_new_tokens(case))


def test_log_probs_are_close_to_fp32() -> None:
    model = adapted(LlamaConfig, {})
    rows = answers((5, 2), (7, 3), alike=2)
    result, expected = (FastLoss(model, int8_matmul=yes).log_probs(rows) for yes in (True, False))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
