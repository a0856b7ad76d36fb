"""Optimizer state allocated before the first step equals the optimizer's, and is complete or absent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from strop.config.schema import TrainSection
from strop.training import optim
from strop.training.gradients import clip_gradients
from strop.training.optim import allocate_state, make_optimizer, set_rate

KINDS = ("adamw", "adamw_8bit", "adafactor", "lion", "sgd")


def built(kind: str) -> tuple[dict[str, nn.Parameter], Any]:
    random = torch.Generator().manual_seed(0)
    sizes = {"a.lora_A": (8, 600), "a.lora_B": (600, 8), "small.lora_A": (2, 3)}  # 8 bit from 4,096 elements on
    weights = {name: nn.Parameter(torch.randn(size, generator=random)) for name, size in sizes.items()}
    return weights, make_optimizer(weights, TrainSection(optimizer=kind, lora_plus_ratio=4.0))  # type: ignore[arg-type]


def steps(weights: dict[str, nn.Parameter], optimizer: Any, number: int) -> None:
    random = torch.Generator().manual_seed(1)
    for _ in range(number):
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=random)
        set_rate(optimizer, 1e-2)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_allocated_state_gives_the_same_bits(kind: str) -> None:
    (own, first), (ours, second) = built(kind), built(kind)
    allocate_state(second)
    steps(own, first, 3)
    allocate_state(second)  # existing state is kept
    steps(ours, second, 3)
    for name, weight in own.items():
        assert torch.equal(weight, ours[name]), name
        expected, result = first.state[weight], second.state[ours[name]]
        assert expected.keys() == result.keys()
        for part, value in expected.items():
            same = torch.equal(value, result[part]) if isinstance(value, torch.Tensor) else value == result[part]
            assert same, (name, part)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_out_of_memory_leaves_no_partial_state(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, optimizer = built(kind)
    own, calls = torch.zeros_like, []

    def zeros_like(*args: Any, **how: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:  # the second moment of the second weight
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(optim.torch, "zeros_like", zeros_like)
        with pytest.raises(torch.OutOfMemoryError):
            allocate_state(optimizer)
    assert len(calls) == 4 and len([state for state in optimizer.state.values() if state]) == 1
    allocate_state(optimizer)
    (expected, other), _ = built(kind), steps(weights, optimizer, 2)
    steps(expected, other, 2)
    assert all(torch.equal(weight, weights[name]) for name, weight in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_decay(kind: str) -> None:
    """As in the Trainer of transformers: a norm or a bias without a gradient keeps its value."""
    weights = {name: nn.Parameter(torch.ones(size)) for name, size in {"w": (4, 4), "norm.weight": (4,)}.items()}
    section = TrainSection(optimizer=kind, weight_decay=0.5)  # type: ignore[arg-type]
    optimizer = make_optimizer(weights, section)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    set_rate(optimizer, 0.1)
    optimizer.step()
    assert torch.equal(weights["norm.weight"], torch.ones(4)) and float(weights["w"].detach().max()) < 1


def test_norm_of_large_gradients_is_exact_and_clips_as_in_torch() -> None:
    torch.manual_seed(0)
    large, small, unused = (nn.Parameter(torch.zeros(shape)) for shape in ((4096, 4096), (8, 8), (3,)))
    large.grad, small.grad = torch.randn(4096, 4096), torch.randn(8, 8)
    before = [weight.grad.double() for weight in (large, small)]
    exact = float(torch.stack([gradient.norm() for gradient in before]).norm())
    assert float(clip_gradients([large, unused, small], 2.0)) == pytest.approx(exact, rel=1e-6)
    for weight, gradient in zip((large, small), before, strict=True):
        torch.testing.assert_close(weight.grad.double(), gradient * 2.0 / exact, rtol=1e-5, atol=0)
    assert float(clip_gradients([small], 1e9)) == pytest.approx(float(before[1].norm()) * 2.0 / exact, rel=1e-5)
