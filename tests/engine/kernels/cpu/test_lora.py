"""LoRA in tiles, on CPUs with AVX512-BF16: no further from fp64 than train/lora.py in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from strop.engine.train import lora
from strop.engine.train.lora import Adapters
from strop.machine.probe import probe

pytestmark = pytest.mark.skipif(not probe().has_avx512_bf16, reason="this CPU has no AVX512-BF16")

APART = "separate inputs"
SHAPES: dict[str, tuple[int, tuple[tuple[int, int], ...], tuple[int, ...]]] = {  # width, columns, ranks
    "rank 1": (32, ((0, 32),), (1,)),
    "q, k and v": (96, ((0, 96), (96, 128), (128, 160)), (16, 16, 16)),
    "odd ranks, outputs without an adapter": (64, ((32, 96), (128, 160)), (3, 21)),
    "two adapters on the same outputs": (64, ((0, 64), (0, 64)), (8, 32)),
    "more columns than are computed together": (1024, ((0, 704),), (16,)),
    APART: (96, ((0, 96), (128, 160), (128, 160)), (16, 21, 3)),
}


@pytest.fixture
def tiles() -> Iterator[Any]:
    from strop.engine.kernels.cpu import lora as lora_tiles

    threads = torch.get_num_threads()
    yield lora_tiles
    torch.set_num_threads(threads)


def case(shape: str, tokens: int) -> tuple[Tensor, Tensor, Adapters]:
    """Return z and grad in bf16, and adapters in fp32."""
    torch.manual_seed(0)
    width, columns, ranks = SHAPES[shape]
    outputs = columns[-1][1]
    parts = [
        part
        for rank, (start, end) in zip(ranks, columns, strict=True)
        for part in (torch.randn(rank, width) / width**0.5, torch.randn(end - start, rank))
    ]
    adapters = Adapters(parts, columns, (0.5, 2.0, 3.0)[: len(ranks)], separate_inputs=shape == APART)
    z, grad = torch.randn(tokens, adapters.input_columns).bfloat16(), torch.randn(tokens, outputs).bfloat16()
    return z, grad, adapters


def run(module: Any, z: Tensor, grad: Tensor, adapters: Adapters, with_grad_z: bool = True) -> list[Tensor]:
    """Return y, grad_z if `with_grad_z`, and the adapters' gradients."""
    added, saved = module.forward(z, grad.shape[1], adapters)
    added.into(y := torch.empty_like(grad))
    added, grad_za = module.backward(grad, saved, adapters)
    grad_z = torch.empty_like(z)
    if with_grad_z:
        added.into(grad_z)
    else:
        added.finish_projection()
    return [y, *([grad_z] if with_grad_z else []), *module.gradients(grad, z, grad_za, saved, adapters)]


def error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("with_grad_z", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 32, 133])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_as_close_to_fp64_as_pytorch(tiles: Any, shape: str, tokens: int, with_grad_z: bool) -> None:
    z, grad, adapters = case(shape, tokens)
    wide = replace(adapters, parts=[part.double() for part in adapters.parts])
    truth = run(lora, z.double(), grad.double(), wide, with_grad_z)
    reference, result = (run(module, z, grad, adapters, with_grad_z) for module in (lora, tiles))
    assert [x.shape for x in result] == [x.shape for x in truth]
    for mine, reference_value, exact in zip(result, reference, truth, strict=True):
        assert error(mine, exact) <= 1.1 * error(reference_value, exact) + 1e-3


def test_gradients_are_summed_in_fp32(tiles: Any) -> None:
    z, grad, adapters = case("q, k and v", 300)
    added, saved = tiles.forward(z, grad.shape[1], adapters)
    added.finish_projection()
    added, grad_za = tiles.backward(grad, saved, adapters)
    added.finish_projection()
    result = tiles.gradients(grad, z, grad_za, saved, adapters)
    for i, ((start, end), scale) in enumerate(zip(adapters.columns, adapters.scales, strict=True)):
        slot = slice(16 * i, 16 * (i + 1))
        grad_a = scale * grad_za[:, slot].double().t() @ z.double()
        grad_b = grad[:, start:end].double().t() @ saved[0][:, slot].double()
        assert error(result[2 * i], grad_a) < 1e-6 and error(result[2 * i + 1], grad_b) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_do_not_change_the_bits(tiles: Any, monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    arguments = case(shape, 133)
    results = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(tiles, "get_num_threads", lambda threads=threads: threads)
        results.append(run(tiles, *arguments))
    for repeated in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], repeated, strict=True))


def test_memory_after_the_last_row_is_ignored(tiles: Any) -> None:
    z, grad, adapters = case("q, k and v", 5)
    longer = [torch.cat([x, torch.full((8, x.shape[1]), float("nan"), dtype=x.dtype)])[:5] for x in (z, grad)]
    pairs = zip(run(tiles, z, grad, adapters), run(tiles, *longer, adapters), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_reused_buffers_leave_no_traces(tiles: Any) -> None:
    """The next layer with the same shape uses the same buffers."""
    z, grad, adapters = case("odd ranks, outputs without an adapter", 9)
    before = run(tiles, z, grad, adapters)
    run(tiles, z, grad, Adapters([100 * x for x in adapters.parts], adapters.columns, adapters.scales))
    assert all(torch.equal(a, b) for a, b in zip(before, run(tiles, z, grad, adapters), strict=True))
