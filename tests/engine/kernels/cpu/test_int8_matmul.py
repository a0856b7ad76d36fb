from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from strop.engine.train.lora import Product
from strop.machine.probe import probe

pytestmark = pytest.mark.skipif(not probe().has_int8_dot, reason="this CPU has no VNNI")
NEAR = 2e-4  # of the norm: a row's largest number over 16,256, of rows whose numbers are alike


@pytest.fixture
def integers() -> Any:
    from strop.engine.kernels.cpu import int8_matmul as integers

    return integers


def truth(whole: Any) -> Tensor:
    """The weight that the parts stand for, in fp64."""
    low = 0 if whole.low is None else whole.low.double()
    return whole.scale.double()[:, None] * (whole.high.double() * (1 if whole.low is None else 128) + low)


def weights(integers: Any, n: int, k: int) -> dict[str, Any]:
    torch.manual_seed(0)
    eight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return {
        "two parts": integers.Integers.of(torch.randn(n, k)),
        "8 bit": integers.Integers(eight, None, torch.rand(n)),
    }


def test_a_weight_in_two_parts_is_near_to_itself(integers: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 33)
    weight[3], weight[4, 5] = 0, 50
    off = (truth(integers.Integers.of(weight)) - weight.double()).abs()
    step = weight.double().abs().amax(1, keepdim=True) / 16256
    assert (off <= step * (0.5 + 16256 * 2**-22)).all()  # half a step, and what fp32 itself rounds


@pytest.mark.parametrize("held", ["two parts", "8 bit"])
@pytest.mark.parametrize("along", [True, False])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 5, 3), (7, 64, 33), (33, 160, 96), (300, 48, 576)])
def test_as_near_to_fp64_as_its_parts_are(integers: Any, held: str, along: bool, rows: int, n: int, k: int) -> None:
    weight = weights(integers, n, k)[held]
    x, width = torch.randn(rows, k if along else n), n if along else k
    y, bias, residual = torch.empty(rows, width), torch.randn(width), torch.randn(rows, width)
    thin, w = torch.randn(rows, 4), torch.randn(4, width)
    product = x.double() @ (truth(weight).t() if along else truth(weight))
    found = integers.Products().layer(x, weight, along, y)
    assert found is y and (y - product).norm() <= NEAR * product.norm()
    integers.Products().layer(x, weight, along, y, Product(thin, w), bias, residual)
    whole = product + thin.double() @ w.double() + bias + residual
    assert (y - whole).norm() <= NEAR * product.norm() + 1e-6 * whole.norm()


@pytest.mark.parametrize("along", [True, False])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(integers: Any, along: bool, monkeypatch: Any) -> None:
    weight, x = weights(integers, 96, 96)["two parts"], torch.randn(50, 96)
    together = integers.Products().layer(x, weight, along, torch.empty(50, 96))
    alone = torch.cat([integers.Products().layer(row[None], weight, along, torch.empty(1, 96)) for row in x])
    assert torch.equal(together, alone)
    monkeypatch.setattr(integers, "SUMS_BYTES", 0)  # so few rows at once
    assert torch.equal(together, integers.Products().layer(x, weight, along, torch.empty(50, 96)))


def test_rows_far_larger_than_others_and_rows_of_nothing(integers: Any) -> None:
    weight, x = weights(integers, 64, 64)["two parts"], torch.randn(4, 64)
    x[0], x[1], x[2], x[3] = 0, x[1] * 1e20, x[2] * 1e-20, x[3] * 1e-39
    y = integers.Products().layer(x, weight, True, torch.empty(4, 64)).double()
    right = x.double() @ truth(weight).t()
    assert (y[[0, 3]] == 0).all() and ((y - right).norm(dim=1)[:3] <= NEAR * right.norm(dim=1)[:3]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_none_afterwards(integers: Any, bad: float) -> None:
    weight, x = weights(integers, 64, 64)["two parts"], torch.randn(3, 64)
    x[1, 7] = bad
    for along in (True, False):
        y = integers.Products().layer(x, weight, along, torch.empty(3, 64))
        assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("flat", [True, False])
def test_the_head_s_gradient_keeps_what_is_small_beside_the_label(integers: Any, flat: bool) -> None:
    """One token is near -1 and tens of thousands share the 1; all rows of the head have something in common."""
    torch.manual_seed(0)
    head, logits = torch.randn(20_000, 16) / 10 + 1, torch.randn(6, 20_000) * (0.1 if flat else 6)
    product, grad = integers.Products().head(head), torch.softmax(logits, 1)
    grad[torch.arange(6), torch.arange(6) * 7] -= 1
    found = product(grad, head, False, torch.empty(6, 16)).double()
    right = grad.double() @ head.double()
    terms = (grad.double().abs() @ head.double().abs()).norm(dim=1)  # they cancel: what they sum to is smaller
    assert ((found - right).norm(dim=1) <= NEAR / 10 * terms).all()
    rough = integers.Products().layer(grad, integers.Integers.of(head), False, torch.empty(6, 16)).double()
    assert not flat or (rough - right).norm() > 20 * (found - right).norm()
    assert not torch.equal(found.float(), grad @ head)


def test_a_head_that_is_trained_is_multiplied_in_fp32(integers: Any) -> None:
    head, x = torch.randn(50, 16), torch.randn(6, 16)
    product = integers.Products().head(head)
    logits = product(x, head, True, torch.empty(6, 50))
    assert torch.equal(logits, integers.Products().layer(x, integers.Integers.of(head), True, torch.empty(6, 50)))
    other = head * 2  # peft's copy
    assert torch.equal(product(x, other, True, torch.empty(6, 50)), x @ other.t())
    assert torch.equal(product(logits, other, False, torch.empty(6, 16)), logits @ other)


def test_products_of_this_cpu_are_exact() -> None:
    """Without VNNI some saturate at 16 bit where two products meet."""
    x = torch.full((8, 64), -128, dtype=torch.int8)
    x[::2] = 127
    assert torch.equal(torch._int_mm(x, x.t()).long(), x.long() @ x.long().t())
    assert (
        replace(probe(), vector=("avx2", "avx_vnni")).has_int8_dot
        and not replace(probe(), vector=("avx2",)).has_int8_dot
    )
