"""Frozen bf16 matmuls with adapters, bias and residual: as close to fp64 as PyTorch's matmuls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from strop.engine.train import lora
from strop.engine.train.head import OutputHead, SupervisedLoss
from strop.engine.train.lora import Adapters, InPlace
from strop.machine.probe import probe
from tests.support.attention import OPS

pytestmark = pytest.mark.skipif(not probe().has_avx512_bf16, reason="this CPU has no AVX512-BF16")
ADAPTED = {
    "none": ((), ()),
    "q, k and v": (((0, 64), (64, 128), (128, 160)), (16, 5, 32)),
    "not all outputs": (((32, 128),), (3,)),
    "two on the same outputs": (((0, 160), (0, 160)), (16, 16)),
}


@pytest.fixture
def frozen() -> Any:
    from strop.engine.kernels.cpu import bf16_matmul as frozen

    return frozen


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def make_case(tokens: int, k: int, adapted: str) -> tuple[Tensor, Tensor, Adapters]:
    """Return x (T, k), a weight (160, k) and adapters on it."""
    torch.manual_seed(0)
    columns, ranks = ADAPTED[adapted]
    parts = [
        part
        for rank, (start, end) in zip(ranks, columns, strict=True)
        for part in (torch.randn(rank, k) / k**0.5, torch.randn(end - start, rank))
    ]
    return random(tokens, k), random(160, k) / k**0.5, Adapters(parts, columns, (0.5, 2.0, 3.0)[: len(ranks)])


def error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("more", ["", "bias", "residual", "bias and residual"])
@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 9, 16, 133])
def test_results_are_as_close_to_fp64_as_pytorch(frozen: Any, tokens: int, adapted: str, more: str) -> None:
    from strop.engine.kernels.cpu import lora as lora_tiles

    x, weight, adapters = make_case(tokens, 96, adapted)
    bias = random(160) if "bias" in more else None
    residual = random(tokens, 160) if "residual" in more else None

    def run(matmul: Any, ops: Any, wide: bool) -> Tensor:
        z, w, b, r = (a.double() if wide and a is not None else a for a in (x, weight, bias, residual))
        assert z is not None
        parts = [part.double() if wide else part for part in adapters.parts]
        double = Adapters(parts, adapters.columns, adapters.scales)
        added = ops.forward(z, 160, double)[0] if parts else None
        y: Tensor = matmul(z, w, True, z.new_empty(tokens, 160), added, b, r)
        return y

    truth = run(lora.frozen_matmul, lora, True)
    mine, reference = run(frozen.matmul, lora_tiles, False), run(lora.frozen_matmul, lora, False)
    assert error(mine, truth) <= 1.1 * error(reference, truth)


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("tokens", [1, 8, 133])
def test_backward_is_close_to_fp64(frozen: Any, tokens: int, adapted: str) -> None:
    from strop.engine.kernels.cpu import lora as lora_tiles

    x, weight, adapters = make_case(tokens, 96, adapted)
    grad = random(tokens, 160)
    parts = [part.double() for part in adapters.parts]
    truth = grad.double() @ weight.double()
    for a, b, (start, end), scale in zip(parts[::2], parts[1::2], adapters.columns, adapters.scales, strict=True):
        truth += scale * grad[:, start:end].double() @ b @ a
    added = None
    if parts:
        _, saved = lora_tiles.forward(x, 160, adapters)
        added, _ = lora_tiles.backward(grad, saved, adapters)
    assert error(frozen.matmul(grad, weight, False, torch.empty_like(x), added), truth) < 4e-3


def test_adapters_with_separate_inputs(frozen: Any) -> None:
    """Dropout gives each adapter its own input, next to that of the frozen weight."""
    from strop.engine.kernels.cpu import lora as lora_tiles

    x, weight, adapters = make_case(50, 96, "q, k and v")
    adapters = replace(adapters, separate_inputs=True)
    inputs = random(50, 3 * 96)
    added, saved = lora_tiles.forward(inputs, 160, adapters)
    result = frozen.matmul(x, weight, True, x.new_empty(50, 160), added)
    truth = x.double() @ weight.double().t()
    for i, ((a, b, scale), (start, end)) in enumerate(zip(adapters, adapters.columns, strict=True)):
        truth[:, start:end] += scale * inputs[:, 96 * i : 96 * (i + 1)].double() @ a.double().t() @ b.double().t()
    assert error(result, truth) < 5e-3
    added, grad_za = lora_tiles.backward(result, saved, adapters)
    added.finish_projection()
    assert error(grad_za[:, :16], result[:, :64].double() @ adapters.parts[1].double()) < 5e-3


def test_head_loss_and_gradient(frozen: Any) -> None:
    """Loss and gradient of hidden states are as close to fp64 as with PyTorch's matmuls."""
    x, weight, labels = random(70, 64), random(96, 64), torch.arange(70)

    def run(matmul: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z = x.to(dtype).requires_grad_()
        output = OutputHead(weight.to(dtype), 0.0, OPS, matmul=matmul)
        loss = SupervisedLoss.apply(z, labels, torch.ones(70, dtype=dtype), output)
        loss.backward()
        assert z.grad is not None
        return loss.detach(), z.grad

    truth = run(lora.frozen_matmul, torch.float64)
    for mine, reference, exact in zip(
        run(frozen.matmul, torch.bfloat16), run(lora.frozen_matmul, torch.bfloat16), truth, strict=True
    ):
        assert error(mine, exact) <= 1.1 * error(reference, exact) + 1e-4


@pytest.mark.parametrize("transposed", [True, False])
def test_existing_values_are_added_once(frozen: Any, transposed: bool) -> None:
    """The number of rows in the last tile does not matter."""
    for tokens in range(1, 15):
        x, weight, existing = random(tokens, 64), random(*((96, 64) if transposed else (64, 96))), random(tokens, 96)
        truth = x.double() @ (weight.t() if transposed else weight).double() + existing
        assert error(frozen.matmul(x, weight, transposed, existing.clone(), InPlace()), truth) < 4e-3


@pytest.mark.parametrize("transposed", [True, False])
def test_sums_longer_than_one_block_match_fp64(frozen: Any, transposed: bool) -> None:
    k = 2 * frozen.DEEP + 64
    x, weight = random(7, k), random(*((96, k) if transposed else (k, 96)))
    wide = weight.t() if transposed else weight
    residual = 100 * random(7, 96)
    result = frozen.matmul(x, weight, transposed, x.new_empty(7, 96), None, None, residual)
    assert error(result, x.double() @ wide.double() + residual) < 3e-3


@pytest.mark.parametrize("transposed", [True, False])
def test_a_row_has_the_same_bits_in_any_batch_with_any_threads(
    frozen: Any, monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    x, weight = random(50, 96), random(*((160, 96) if transposed else (96, 160)))
    result = []
    for threads in (1, 2, 3, 4, 12):
        monkeypatch.setattr(frozen, "get_num_threads", lambda threads=threads: threads)
        for rows in (50, 20, 1):
            result.append(frozen.matmul(x[:rows], weight, transposed, x.new_empty(rows, 160))[0])
    assert all(torch.equal(result[0], row) for row in result)


def test_nothing_is_written_after_the_last_row(frozen: Any) -> None:
    x, weight, y = random(7, 64), random(96, 64), torch.zeros(12, 96, dtype=torch.bfloat16)
    frozen.matmul(x, weight, True, y[:7])
    assert y[:7].all() and not y[7:].any()


@pytest.mark.parametrize(
    ("rows", "num_units", "lanes", "expected"), [(400, 18, 2, 2), (4000, 2, 4, 2), (1000, 5, 4, 1)]
)
def test_work_is_split_among_threads(frozen: Any, rows: int, num_units: int, lanes: int, expected: int) -> None:
    assert frozen.choose_column_parts(rows, num_units, lanes) == expected
