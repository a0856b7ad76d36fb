"""numba's loops equal PyTorch's operations."""

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
from strop.engine.kernels.cpu import elementwise as loss
from strop.engine.kernels.cpu import elementwise as rope
from strop.engine.kernels.cpu import elementwise as row_loops
from strop.engine.kernels.protocols import apply
from strop.engine.layers import about
from strop.engine.train.attention import Heads, Turned
from strop.engine.train.packing import lay_out
from strop.models.families.layers import ACTIVATIONS
from tests import ROOT

DTYPES = [torch.float32, torch.bfloat16]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    # bf16: the same fp32 value rounded once; where the two differ in their last fp32 bit, a neighbouring bf16.
    relative = 1e-2 if found.dtype == torch.bfloat16 else 3e-5
    torch.testing.assert_close(found, expected, rtol=relative, atol=max(1e-6, relative * 1e-3))


def rand(dtype: torch.dtype, *shape: int, spread: float = 2.0) -> Tensor:
    return (torch.randn(*shape) * spread).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype: torch.dtype, offset: float) -> None:
    torch.manual_seed(0)
    for x in (rand(dtype, 5, 37), rand(dtype, 1, 3), rand(dtype, 4, 6, 8)[:, 1:3]):
        weight, grad = rand(dtype, x.shape[-1]), rand(dtype, *x.shape)
        assert_same(elementwise.rms_norm(x, weight, 1e-5, offset), eager.rms_norm(x, weight, 1e-5, offset))
        arguments = (grad, x, weight, 1e-5, offset)
        assert_same(elementwise.rms_norm_backward(*arguments), eager.rms_norm_backward(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_glu(dtype: torch.dtype, activation: str) -> None:
    torch.manual_seed(0)
    gate_up, grad = rand(dtype, 3, 2 * 37, spread=6), rand(dtype, 3, 37)
    gate_up[0, :2] = torch.tensor([120.0, -120.0])
    assert_same(elementwise.glu(gate_up, activation), eager.glu(gate_up, activation))
    for found, expected in zip(
        elementwise.glu_backward(grad, gate_up, activation), eager.glu_backward(grad, gate_up, activation), strict=True
    ):
        assert_same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centre", [0.0, 3.0])
def test_layer_norm(dtype: torch.dtype, centre: float) -> None:
    """As PyTorch's in fp64, of the numbers as they are rounded."""
    torch.manual_seed(0)
    for x in (rand(dtype, 5, 37) + centre, rand(dtype, 1, 3), rand(dtype, 4, 6, 8)[:, 1:3]):
        weight, grad = rand(dtype, x.shape[-1]), rand(dtype, *x.shape)
        for bias in (None, rand(dtype, x.shape[-1])):
            exact = x.double().requires_grad_()
            of = weight.double(), None if bias is None else bias.double()
            expected = F.layer_norm(exact, x.shape[-1:], *of, 1e-5)
            expected.backward(grad.double())
            found = row_loops.layer_norm(x, weight, bias, 1e-5)
            assert_same(found, expected.detach().to(dtype))
            room = torch.empty_like(found)
            assert torch.equal(row_loops.layer_norm(x, weight, bias, 1e-5, room), found) and torch.equal(room, found)
            assert exact.grad is not None
            assert_same(row_loops.layer_norm_backward(grad, x, weight, 1e-5), exact.grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(dtype: torch.dtype, name: str) -> None:
    """As transformers' own in fp64, of the numbers as they are rounded."""
    torch.manual_seed(0)
    act = ACT2FN[name].double() if name == "xielu" else ACT2FN[name]
    for x in (rand(dtype, 3, 37, spread=3), rand(dtype, 1, 1), rand(dtype, 4, 34)[:, 1::3]):
        x[0, :3] = torch.tensor([60.0, -60.0, 0.0])[: x.shape[1]]
        grad, exact = rand(dtype, *x.shape), x.double().requires_grad_()
        expected = act(exact)
        expected.backward(grad.double())
        of = ACTIVATIONS[name], about(act)
        found, room = row_loops.activated(x, *of), torch.empty(x.shape, dtype=dtype)
        assert_same(found, expected.detach().to(dtype))
        assert torch.equal(row_loops.activated(x, *of, room), found) and torch.equal(room, found)
        grad_in, again = row_loops.activated_backward(grad, x, *of)
        assert exact.grad is not None
        assert_same(again, found)
        assert_same(grad_in, exact.grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("m", [0, 3, 4])
def test_turned_aside(dtype: torch.dtype, neighbours: bool, m: int, scaled: bool) -> None:
    torch.manual_seed(0)
    for tokens in (1, 7):
        shape = Heads(cast(Any, elementwise), 3, 1, 8, 1.0, 0, 0.0, None, None)
        angles, factor = torch.rand(tokens, m) * 6, torch.rand(tokens) + 0.5 if scaled else None
        given, upstream = rand(dtype, tokens, 40), rand(dtype, tokens, 40)
        found = []
        for way in (Turned, rope.Turned):
            qkv = given.clone().requires_grad_()
            out = apply(way, qkv, shape, angles.cos(), angles.sin(), neighbours, factor)
            out.backward(upstream)
            assert qkv.grad is not None
            found.append((out.detach(), qkv.grad))
        for one, other in zip(found[1], found[0], strict=True):
            assert_same(one, other)
        assert torch.equal(found[1][0][:, 32:], given[:, 32:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(("group", "first"), [(1, 0), (3, 5)])
def test_softmax(dtype: torch.dtype, window: int, group: int, first: int) -> None:
    torch.manual_seed(0)
    scores = rand(dtype, 2, 4 * group, 4 + first, spread=10)
    probs = eager.softmax_(scores.clone(), group, first, window)
    assert_same(elementwise.softmax_(scores.clone(), group, first, window), probs)
    grad = rand(dtype, *scores.shape)
    found = elementwise.softmax_backward_(grad.clone(), probs, group, first, window)
    assert_same(found, eager.softmax_backward_(grad.clone(), probs, group, first, window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_cross_entropy(dtype: torch.dtype, softcap: float) -> None:
    torch.manual_seed(0)
    logits, labels, weights = rand(dtype, 5, 41, spread=8), torch.tensor([0, 40, 3, 3, 7]), torch.rand(5)
    found, expected = logits.clone(), logits.clone()
    loss = elementwise.cross_entropy_(found, labels, weights, softcap, True)
    torch.testing.assert_close(loss, eager.cross_entropy_(expected, labels, weights, softcap, True))
    assert_same(found, expected)
    left = logits.clone()
    torch.testing.assert_close(elementwise.cross_entropy_(left, labels, weights, softcap, False), loss)
    assert torch.equal(left, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [0, 3, 4])
@pytest.mark.parametrize("group", [1, 2])
def test_heads(dtype: torch.dtype, turned: int, group: int) -> None:
    torch.manual_seed(0)
    tokens, heads, d = 7, 4, 8
    x = rand(dtype, tokens, heads + 3, d)[:, 1 : 1 + heads]
    cos, sin = (rand(torch.float32, tokens, turned) if turned else None for _ in range(2))
    turn: Any = (cos, sin, 0.7 if turned else 1.0)
    slots = [np.array([[0, 1, 3], [0, 1, -1]]), np.array([[0, 5, 4, 2]])]  # rows in several places, row 6 in none
    places = lay_out([(rows, rows) for rows in slots], tokens, torch.device("cpu")).queries
    spread = eager.to_heads(x, *turn, places, group)
    assert_same(elementwise.to_heads(x, *turn, places, group), spread)
    whole = spread[: 2 * heads * 3].view(2, heads // group, 3, group, d)  # the first bucket, as attention reads it
    torch.testing.assert_close(whole[1, :, 2], torch.zeros_like(whole[1, :, 2]))
    if not turned:
        assert torch.equal(whole[0, :, 1], x[1].view(heads // group, group, d))
    found, expected = (torch.ones(tokens, heads + 1, d, dtype=dtype) for _ in range(2))
    for ops, out in ((elementwise, found), (eager, expected)):
        ops.from_heads(spread, *turn, places, group, out[:, 1:])
    assert_same(found, expected)


def test_the_loops_leave_pytorchs_threads_as_they_were() -> None:
    """numba's OpenMP layer allows nested parallel regions: PyTorch's attention then takes 40 times as long."""
    script = """
import ctypes, torch
torch.set_num_threads(1)
openmp = ctypes.CDLL(torch._C.__file__)
before = openmp.omp_get_max_active_levels(), torch.get_num_threads()
from strop.engine.kernels.cpu import aside, compiled, kernels, loss
from strop.engine.kernels.cpu import rows as row_loops
x = torch.ones(64, 64)
kernels.rms_norm(x, x[0], 1e-5, 0.0)
assert (openmp.omp_get_max_active_levels(), torch.get_num_threads()) == before, before
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(dtype: torch.dtype, bad: float) -> None:
    """The loops are compiled as if all numbers were finite; the guard in front of the optimizer needs to see it."""
    torch.manual_seed(0)
    logits, x, scores = rand(dtype, 2, 300), rand(dtype, 2, 64), rand(dtype, 1, 6, 6)
    logits[1, 37] = x[1, 3] = scores[0, 3, 1] = bad
    for softcap in (0.0, 5.0) if np.isnan(bad) else (0.0,):  # a soft cap bends what is infinite
        given = logits.clone()
        found = elementwise.cross_entropy_(given, torch.tensor([1, 2]), torch.ones(2), softcap, True)
        assert not found.sum().isfinite() and given[0].isfinite().all() and not given[1].isfinite().all()
    weight = torch.ones(64, dtype=dtype)
    for out in (
        elementwise.rms_norm(x, weight, 1e-5, 0.0),
        elementwise.glu(x, "silu"),
        elementwise.softmax_(scores, 1, 0, 0)[0, 2:],
        row_loops.layer_norm(x, weight, None, 1e-5),
        *(
            row_loops.activated(x, kind, about(None))
            for kind in ("GELU", "GELU_TANH", "RELU", "RELU2", "SILU", "XIELU")
        ),
    ):
        assert out[0].isfinite().all() and not out[1].isfinite().all()
    assert not elementwise.rms_norm_backward(x, rand(dtype, 2, 64), weight, 1e-5, 0.0)[1].isfinite().any()
    assert not row_loops.layer_norm_backward(x, rand(dtype, 2, 64), weight, 1e-5)[1].isfinite().any()


def test_the_process_that_compiles_has_the_same_last_bits(tmp_path: Path) -> None:
    """A parallel loop that was just compiled runs other machine code than one read from numba's cache."""
    script = """
import hashlib, torch
torch.set_num_threads(1)
from strop.engine.train.fast import FastLoss
from strop.config.schema import LoraSection
from strop.models.lora import add_lora, trainable
from tests.support import tiny
torch.manual_seed(0)
model = add_lora(tiny.model(), LoraSection(r=2, alpha=4), None)
FastLoss(model)(tiny.examples(6)).backward()
grads = b"".join(weight.grad.numpy().tobytes() for weight in trainable(model).values())
print(hashlib.sha256(grads).hexdigest())
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert found[0] == found[1] and len(found[0]) == 65


def test_sums_do_not_depend_on_where_memory_lies() -> None:
    """A row, and right behind it a buffer with the gap that the loops give it: the same sum as far from it."""
    import numba

    loop: Any = numba.njit(fastmath=True, error_model="numpy")(
        lambda row, top, buffer: loss.exps(row, top, buffer[compiled.GAP :])
    )
    memory = np.zeros(2048, dtype=np.float32)
    memory[:40] = np.random.default_rng(0).standard_normal(40)
    sums = {loop(memory[:40], np.float32(3.0), memory[at : at + compiled.GAP + 40]) for at in range(40, 400)}
    assert len(sums) == 1
