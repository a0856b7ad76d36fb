"""The compiled element-wise kernels equal PyTorch's operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from strop.engine.kernels import eager
from strop.engine.kernels.cpu import compiled, elementwise
from strop.engine.kernels.protocols import apply
from strop.engine.layers import activation_parameters
from strop.engine.train.attention import ApplyRope, Heads
from strop.engine.train.packing import build_layout
from strop.models.families.layers import ACTIVATIONS
from tests import ROOT

DTYPES = [torch.float32, torch.bfloat16]


def assert_same(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype
    # bf16: the same fp32 value rounded once; where the two differ in their last fp32 bit, a neighbouring bf16.
    relative = 1e-2 if result.dtype == torch.bfloat16 else 3e-5
    torch.testing.assert_close(result, expected, rtol=relative, atol=max(1e-6, relative * 1e-3))


def rand(dtype: torch.dtype, *shape: int, spread: float = 2.0) -> Tensor:
    return (torch.randn(*shape) * spread).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_matches_eager(dtype: torch.dtype, offset: float) -> None:
    torch.manual_seed(0)
    for x in (rand(dtype, 5, 37), rand(dtype, 1, 3), rand(dtype, 4, 6, 8)[:, 1:3]):
        weight, grad = rand(dtype, x.shape[-1]), rand(dtype, *x.shape)
        assert_same(elementwise.rms_norm(x, weight, 1e-5, offset), eager.rms_norm(x, weight, 1e-5, offset))
        arguments = (grad, x, weight, 1e-5, offset)
        assert_same(elementwise.rms_norm_backward(*arguments), eager.rms_norm_backward(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_glu_matches_eager(dtype: torch.dtype, activation: str) -> None:
    torch.manual_seed(0)
    gate_up, grad = rand(dtype, 3, 2 * 37, spread=6), rand(dtype, 3, 37)
    gate_up[0, :2] = torch.tensor([120.0, -120.0])
    assert_same(elementwise.glu(gate_up, activation), eager.glu(gate_up, activation))
    for result, expected in zip(
        elementwise.glu_backward(grad, gate_up, activation), eager.glu_backward(grad, gate_up, activation), strict=True
    ):
        assert_same(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centre", [0.0, 3.0])
def test_layer_norm_matches_fp64(dtype: torch.dtype, centre: float) -> None:
    """PyTorch's LayerNorm in fp64, of the rounded inputs."""
    torch.manual_seed(0)
    for x in (rand(dtype, 5, 37) + centre, rand(dtype, 1, 3), rand(dtype, 4, 6, 8)[:, 1:3]):
        weight, grad = rand(dtype, x.shape[-1]), rand(dtype, *x.shape)
        for bias in (None, rand(dtype, x.shape[-1])):
            exact = x.double().requires_grad_()
            of = weight.double(), None if bias is None else bias.double()
            expected = F.layer_norm(exact, x.shape[-1:], *of, 1e-5)
            expected.backward(grad.double())
            result = elementwise.layer_norm(x, weight, bias, 1e-5)
            assert_same(result, expected.detach().to(dtype))
            buffer = torch.empty_like(result)
            assert torch.equal(elementwise.layer_norm(x, weight, bias, 1e-5, buffer), result)
            assert torch.equal(buffer, result)
            assert exact.grad is not None
            assert_same(elementwise.layer_norm_backward(grad, x, weight, 1e-5), exact.grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_matches_fp64(dtype: torch.dtype, name: str) -> None:
    """The activation of transformers in fp64, of the rounded inputs."""
    torch.manual_seed(0)
    act = ACT2FN[name].double() if name == "xielu" else ACT2FN[name]
    for x in (rand(dtype, 3, 37, spread=3), rand(dtype, 1, 1), rand(dtype, 4, 34)[:, 1::3]):
        x[0, :3] = torch.tensor([60.0, -60.0, 0.0])[: x.shape[1]]
        grad, exact = rand(dtype, *x.shape), x.double().requires_grad_()
        expected = act(exact)
        expected.backward(grad.double())
        of = ACTIVATIONS[name], activation_parameters(act)
        result, buffer = elementwise.activate(x, *of), torch.empty(x.shape, dtype=dtype)
        assert_same(result, expected.detach().to(dtype))
        assert torch.equal(elementwise.activate(x, *of, buffer), result) and torch.equal(buffer, result)
        grad_in, again = elementwise.activate_backward(grad, x, *of)
        assert exact.grad is not None
        assert_same(again, result)
        assert_same(grad_in, exact.grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("m", [0, 3, 4])
def test_separate_rope_matches_pytorch(dtype: torch.dtype, interleaved: bool, m: int, scaled: bool) -> None:
    torch.manual_seed(0)
    for tokens in (1, 7):
        shape = Heads(cast(Any, elementwise), 3, 1, 8, 1.0, 0, 0.0, None, None)
        angles, factor = torch.rand(tokens, m) * 6, torch.rand(tokens) + 0.5 if scaled else None
        inputs, upstream = rand(dtype, tokens, 40), rand(dtype, tokens, 40)
        result = []
        for way in (ApplyRope, elementwise.ApplyRope):
            qkv = inputs.clone().requires_grad_()
            out = apply(way, qkv, shape, angles.cos(), angles.sin(), interleaved, factor)
            out.backward(upstream)
            assert qkv.grad is not None
            result.append((out.detach(), qkv.grad))
        for actual, expected in zip(result[1], result[0], strict=True):
            assert_same(actual, expected)
        assert torch.equal(result[1][0][:, 32:], inputs[:, 32:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(("group", "first"), [(1, 0), (3, 5)])
def test_softmax_matches_eager(dtype: torch.dtype, window: int, group: int, first: int) -> None:
    torch.manual_seed(0)
    scores = rand(dtype, 2, 4 * group, 4 + first, spread=10)
    probs = eager.softmax_(scores.clone(), group, first, window)
    assert_same(elementwise.softmax_(scores.clone(), group, first, window), probs)
    grad = rand(dtype, *scores.shape)
    result = elementwise.softmax_backward_(grad.clone(), probs, group, first, window)
    assert_same(result, eager.softmax_backward_(grad.clone(), probs, group, first, window))


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_small_probabilities_of_a_large_vocabulary_are_not_lost(softcap: float) -> None:
    logits = 3 * torch.randn(4, 262_144, generator=torch.Generator().manual_seed(0))
    logits[:, 5] += 12  # beside it, a sum in fp32 loses the others
    values = softcap * torch.tanh(logits.double() / softcap) if softcap else logits.double()
    expected = torch.logsumexp(values, 1) - values[:, 7]
    losses = elementwise.cross_entropy_(logits, torch.full((4,), 7), torch.ones(4), softcap, False)
    assert float((losses - expected).abs().max()) < 3e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_cross_entropy_matches_eager(dtype: torch.dtype, softcap: float) -> None:
    torch.manual_seed(0)
    logits, labels, weights = rand(dtype, 5, 41, spread=8), torch.tensor([0, 40, 3, 3, 7]), torch.rand(5)
    result, expected = logits.clone(), logits.clone()
    loss = elementwise.cross_entropy_(result, labels, weights, softcap, True)
    torch.testing.assert_close(loss, eager.cross_entropy_(expected, labels, weights, softcap, True))
    assert_same(result, expected)
    left = logits.clone()
    torch.testing.assert_close(elementwise.cross_entropy_(left, labels, weights, softcap, False), loss)
    assert torch.equal(left, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [0, 3, 4])
@pytest.mark.parametrize("group", [1, 2])
def test_to_heads_and_from_heads_match_eager(dtype: torch.dtype, rotated: int, group: int) -> None:
    torch.manual_seed(0)
    tokens, heads, d = 7, 4, 8
    x = rand(dtype, tokens, heads + 3, d)[:, 1 : 1 + heads]
    cos, sin = (rand(torch.float32, tokens, rotated) if rotated else None for _ in range(2))
    rope: Any = (cos, sin, 0.7 if rotated else 1.0)
    slots = [np.array([[0, 1, 3], [0, 1, -1]]), np.array([[0, 5, 4, 2]])]  # row 0 in two places, row 6 in none
    places = build_layout([(rows, rows) for rows in slots], tokens, torch.device("cpu")).queries
    spread = eager.to_heads(x, *rope, places, group)
    assert_same(elementwise.to_heads(x, *rope, places, group), spread)
    whole = spread[: 2 * heads * 3].view(2, heads // group, 3, group, d)  # the first bucket, as attention reads it
    torch.testing.assert_close(whole[1, :, 2], torch.zeros_like(whole[1, :, 2]))
    if not rotated:
        assert torch.equal(whole[0, :, 1], x[1].view(heads // group, group, d))
    result, expected = (torch.ones(tokens, heads + 1, d, dtype=dtype) for _ in range(2))
    for ops, out in ((elementwise, result), (eager, expected)):
        ops.from_heads(spread, *rope, places, group, out[:, 1:])
    assert_same(result, expected)


def test_kernels_keep_pytorchs_thread_settings() -> None:
    """numba's OpenMP layer allows nested parallel regions, with which PyTorch's attention takes 40 times as long."""
    script = """
import ctypes, torch
torch.set_num_threads(1)
openmp = ctypes.CDLL(torch._C.__file__)
before = openmp.omp_get_max_active_levels(), torch.get_num_threads()
from strop.engine.kernels.cpu import elementwise
x = torch.ones(64, 64)
elementwise.rms_norm(x, x[0], 1e-5, 0.0)
assert (openmp.omp_get_max_active_levels(), torch.get_num_threads()) == before, before
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_stay_nonfinite(dtype: torch.dtype, bad: float) -> None:
    """The kernels are compiled as if all values were finite, but the check before the optimizer must see others."""
    torch.manual_seed(0)
    logits, x, scores = rand(dtype, 2, 300), rand(dtype, 2, 64), rand(dtype, 1, 6, 6)
    logits[1, 37] = x[1, 3] = scores[0, 3, 1] = bad
    for softcap in (0.0, 5.0) if np.isnan(bad) else (0.0,):  # a soft cap makes infinity finite
        inputs = logits.clone()
        result = elementwise.cross_entropy_(inputs, torch.tensor([1, 2]), torch.ones(2), softcap, True)
        assert not result.sum().isfinite() and inputs[0].isfinite().all() and not inputs[1].isfinite().all()
    weight = torch.ones(64, dtype=dtype)
    for out in (
        elementwise.rms_norm(x, weight, 1e-5, 0.0),
        elementwise.glu(x, "silu"),
        elementwise.softmax_(scores, 1, 0, 0)[0, 2:],
        elementwise.layer_norm(x, weight, None, 1e-5),
        *(
            elementwise.activate(x, kind, activation_parameters(None))
            for kind in ("GELU", "GELU_TANH", "RELU", "RELU2", "SILU", "XIELU")
        ),
    ):
        assert out[0].isfinite().all() and not out[1].isfinite().all()
    assert not elementwise.rms_norm_backward(x, rand(dtype, 2, 64), weight, 1e-5, 0.0)[1].isfinite().any()
    assert not elementwise.layer_norm_backward(x, rand(dtype, 2, 64), weight, 1e-5)[1].isfinite().any()


@pytest.mark.slow
def test_compiling_and_cached_processes_have_the_same_bits(tmp_path: Path) -> None:
    """Neither the process nor the order in which functions are compiled changes results."""
    script = """
import hashlib, torch
torch.set_num_threads(1)
from strop.engine.train.fast import FastLoss
from strop.config.schema import LoraSection
from strop.models.lora import add_lora, trainable_parameters
from tests.support import tiny
torch.manual_seed(0)
model = add_lora(tiny.model(), LoraSection(r=2, alpha=4), None)
FastLoss(model, warm=False).token_loss(tiny.examples(6)).backward()
grads = b"".join(weight.grad.numpy().tobytes() for weight in trainable_parameters(model).values())
print(hashlib.sha256(grads).hexdigest())
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert result[0] == result[1] and len(result[0]) == 65


def test_sums_do_not_depend_on_memory_addresses() -> None:
    """The sum is the same for any distance between the row and a buffer with the kernels' gap."""
    import numba

    loop: Any = numba.njit(fastmath=True, error_model="numpy")(
        lambda row, top, buffer: elementwise.exp_row(row, top, buffer[compiled.GAP :])
    )
    memory = np.zeros(2048, dtype=np.float32)
    memory[:40] = np.random.default_rng(0).standard_normal(40)
    sums = {loop(memory[:40], np.float32(3.0), memory[at : at + compiled.GAP + 40]) for at in range(40, 400)}
    assert len(sums) == 1
