"""GRPO's loss: values worked out by hand, its bounds, gradients by finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from strop.config.schema import TrainSection
from strop.objectives.policy import GRPO, Tokens, advantages, divisor, loss, token_weight


def options(**given: Any) -> TrainSection:
    return TrainSection(objective="grpo", **{**GRPO.options, "beta": 0.0, **given})


def tokens(now: Any, drawn: Any, advantage: Any, reference: Any = None) -> Tokens:
    made = [torch.as_tensor(x, dtype=torch.float64) for x in (now, drawn, drawn if reference is None else reference)]
    return Tokens(made[0], made[1], made[2], torch.as_tensor(advantage, dtype=torch.float64))


def test_values_worked_out_by_hand() -> None:
    up, down = math.log(1.1), math.log(0.9)
    found = loss(tokens([up, down], [0.0, 0.0], [2.0, -1.0]), options())
    assert found.losses.tolist() == pytest.approx([-2.2, 0.9]) and not found.clipped.any()
    with_kl = loss(tokens([up], [0.0], [2.0], [0.0]), options(beta=0.5))
    assert float(with_kl.losses) == pytest.approx(-2.2 + 0.5 * 1.1 * (1 / 1.1 + up - 1))
    assert float(with_kl.kl) == pytest.approx(1 / 1.1 + up - 1)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "clipped"),
    [(1.5, 1.0, -1.28, True), (1.5, -1.0, 1.5, False), (0.5, 1.0, -0.5, False), (0.5, -1.0, 0.8, True)],
)
def test_a_token_that_has_gone_far_enough_is_left_alone(
    ratio: float, advantage: float, value: float, clipped: bool
) -> None:
    """But one that has gone the wrong way is still brought back."""
    now = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    found = loss(tokens(now, [0.0], [advantage]), options())
    found.losses.sum().backward()
    assert float(found.losses.detach()) == pytest.approx(value) and bool(found.clipped) is clipped
    assert now.grad is not None and (float(now.grad) == 0) is clipped


def test_gradients_are_those_of_the_values() -> None:
    torch.manual_seed(0)
    now = (0.1 * torch.randn(6, dtype=torch.float64) - 2).requires_grad_()
    rest = [torch.randn(6, dtype=torch.float64) * 0.05 - 2 for _ in range(2)]
    advantage = torch.randn(6, dtype=torch.float64)
    given = options(beta=0.3)
    assert torch.autograd.gradcheck(lambda x: loss(Tokens(x, *rest, advantage), given).losses, (now,))


def test_the_divergence_pulls_back_with_the_gradient_of_the_divergence() -> None:
    """Over all tokens of a distribution, weighted by it: the gradient of KL(pi | ref), which k3 alone does not have."""
    scores = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    now = scores.log_softmax(0)
    exact = torch.autograd.grad((now.exp() * (now - reference)).sum(), scores, retain_graph=True)[0]
    drawn = now.detach()
    found = loss(Tokens(now, drawn, reference, torch.zeros(3, dtype=torch.float64)), options(beta=1.0))
    torch.testing.assert_close(torch.autograd.grad((drawn.exp() * found.losses).sum(), scores)[0], exact)


def test_advantages_of_a_group() -> None:
    found = advantages([1.0, 0.0, 0.0, 1.0], options())
    assert found == pytest.approx([0.5 / (math.sqrt(1 / 3) + 1e-4) * sign for sign in (1, -1, -1, 1)])
    assert advantages([1.0, 0.0], options(group_loss="dr_grpo")) == [0.5, -0.5]
    assert advantages([0.1 + 0.2, 0.3], options()) == [0.0, 0.0]  # equal but for rounding


def test_what_weighs_the_same() -> None:
    lengths = [2, 6]
    weights = {
        kind: [
            token_weight(n, options(group_loss=kind)) * n / divisor(lengths, options(group_loss=kind)) for n in lengths
        ]
        for kind in ("dapo", "grpo", "dr_grpo")
    }
    assert weights["dapo"] == [0.25, 0.75] and weights["grpo"] == [0.5, 0.5]
    assert weights["dr_grpo"] == [2 / (2 * 256), 6 / (2 * 256)]
