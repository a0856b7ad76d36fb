"""Tiled attention on CPUs with AVX512-BF16: no further from fp64 than attention with bf16 matmuls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from strop.engine.kernels import eager
from strop.engine.kernels.cpu import elementwise
from strop.engine.kernels.cpu.attention import TiledAttention
from strop.engine.train.attention import Attention, Heads
from strop.engine.train.norms import Norm
from strop.engine.train.packing import Documents
from strop.machine.probe import probe

pytestmark = pytest.mark.skipif("avx512_bf16" not in probe().vector, reason="this CPU has no AVX512-BF16")

SPANS = {
    "one token": [(0, 1, 0)],
    "short and long": [(0, 5, 0), (5, 70, 0), (75, 33, 0)],
    "a prefix": [(13, 40, 13), (53, 1, 13), (54, 66, 13), (0, 13, 0)],
    "a long prefix": [(90, 3, 90), (93, 20, 90), (0, 90, 0)],
}
SHAPES = {  # heads, key-value heads, size, elements that the rotary embedding rotates
    "grouped": (6, 2, 64, 64),
    "one each, partly rotated": (2, 2, 32, 16),
    "one for all": (3, 1, 96, 96),
}


def error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("norms", "softcap", "sinks"), [(False, 0.0, 0.0), (True, 0.0, 0.0), (False, 1.5, 0.0), (False, 0.0, 1.0)]
)
@pytest.mark.parametrize("window", [0, 7, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spans", SPANS)
def test_tiles_are_as_close_to_fp64_as_matmuls(
    spans: str, shape: str, window: int, norms: bool, softcap: float, sinks: float
) -> None:  # fmt: skip
    torch.manual_seed(0)
    heads, num_kv_heads, size, rotated = SHAPES[shape]
    tokens = max(start + length for start, length, _ in SPANS[spans])
    documents = Documents(np.array(SPANS[spans]), tokens, torch.device("cpu"))
    weight = torch.rand(size) + 0.5
    angles = torch.rand(tokens, rotated // 2) * 6
    qkv, upstream = torch.randn(tokens, (heads + 2 * num_kv_heads) * size), torch.randn(tokens, heads * size)

    def run(attention: type[torch.autograd.Function], ops: object, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        norm = Norm(ops, weight.to(dtype), 1e-6, 0.0) if norms else None  # type: ignore[arg-type]
        extra = torch.linspace(-2, 3, heads) if sinks else None
        options = heads, num_kv_heads, size, size**-0.5, window, softcap
        shape = Heads(ops, *options, norm, norm, sinks=extra)  # type: ignore[arg-type]
        x = qkv.bfloat16().to(dtype).requires_grad_()
        out = attention.apply(x, shape, angles.cos(), angles.sin(), documents)
        out.backward(upstream.bfloat16().to(dtype))
        assert x.grad is not None
        return out.detach(), x.grad

    truth = run(Attention, eager, torch.float64)
    tiles, matmuls = run(TiledAttention, elementwise, torch.bfloat16), run(Attention, elementwise, torch.bfloat16)
    for result, reference, exact in zip(tiles, matmuls, truth, strict=True):
        assert error(result, exact) <= error(reference, exact) + 1e-3
    again = run(TiledAttention, elementwise, torch.bfloat16)
    assert all(torch.equal(one, two) for one, two in zip(tiles, again, strict=True))


def test_documents_do_not_affect_each_other() -> None:
    """Values of another document change no bit, and NaN stays within its document."""
    torch.manual_seed(0)
    shape = Heads(elementwise, 2, 1, 32, 0.2, 0, 0.0, None, None)  # type: ignore[arg-type]
    documents = Documents(np.array([(0, 40, 0), (40, 25, 0)]), 65, torch.device("cpu"))
    angles = torch.zeros(65, 16)
    qkv, upstream = torch.randn(65, 128).bfloat16(), torch.randn(65, 64).bfloat16()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = TiledAttention.apply(x, shape, angles.cos(), angles.sin(), documents)
        out.backward(upstream)
        assert x.grad is not None
        return out.detach(), x.grad

    edited, broken = qkv.clone(), qkv.clone()
    edited[:40] = torch.randn(40, 128).bfloat16()
    broken[3, 5] = float("nan")
    for result, changed, with_nan in zip(run(qkv), run(edited), run(broken), strict=True):
        assert torch.equal(result[40:], changed[40:]) and torch.equal(result[40:], with_nan[40:])
        assert not torch.equal(result[:40], changed[:40])
        assert not with_nan[3:40].isfinite().all() and with_nan[40:].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_task_is_assigned_to_one_thread(threads: int) -> None:
    documents = Documents(np.array([(0, 300, 0), (300, 20, 0), (320, 21, 0)]), 341, torch.device("cpu"))
    tasks, lanes = documents.thread_tasks(3, threads)
    assert sorted(tasks.tolist()) == list(range(9)) and lanes[0] == 0 and lanes[-1] == 9 and len(lanes) == threads + 1
