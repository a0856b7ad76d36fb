"""GRPO's loss: values computed by hand, clipping, and gradients by finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from strop.config.schema import TrainSection
from strop.objectives.policy import GRPO, SampledTokens


def make_options(**values: Any) -> TrainSection:
    return TrainSection(objective="grpo", **{**GRPO.options, "beta": 0.0, **values})


def make_tokens(logprobs: Any, old_logprobs: Any, advantages: Any, ref_logprobs: Any = None) -> SampledTokens:
    columns = (logprobs, old_logprobs, old_logprobs if ref_logprobs is None else ref_logprobs, advantages)
    return SampledTokens(*(torch.as_tensor(column, dtype=torch.float64) for column in columns))


def test_loss_equals_values_computed_by_hand() -> None:
    up, down = math.log(1.1), math.log(0.9)
    result = GRPO.compute(make_tokens([up, down], [0.0, 0.0], [2.0, -1.0]), make_options())
    assert result.losses.tolist() == pytest.approx([-2.2, 0.9]) and not result.clipped.any()
    with_kl = GRPO.compute(make_tokens([up], [0.0], [2.0], [0.0]), make_options(beta=0.5))
    assert float(with_kl.losses) == pytest.approx(-2.2 + 0.5 * 1.1 * (1 / 1.1 + up - 1))
    assert float(with_kl.kl) == pytest.approx(1 / 1.1 + up - 1)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "clipped"),
    [(1.5, 1.0, -1.28, True), (1.5, -1.0, 1.5, False), (0.5, 1.0, -0.5, False), (0.5, -1.0, 0.8, True)],
)
def test_clipping_removes_the_gradient_only_in_the_rewarded_direction(
    ratio: float, advantage: float, value: float, clipped: bool
) -> None:
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    result = GRPO.compute(make_tokens(logprobs, [0.0], [advantage]), make_options())
    result.losses.sum().backward()
    assert float(result.losses.detach()) == pytest.approx(value) and bool(result.clipped) is clipped
    assert logprobs.grad is not None and (float(logprobs.grad) == 0) is clipped


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    logprobs = (0.1 * torch.randn(6, dtype=torch.float64) - 2).requires_grad_()
    constants = [torch.randn(6, dtype=torch.float64) * 0.05 - 2 for _ in range(2)]
    advantages = torch.randn(6, dtype=torch.float64)
    options = make_options(beta=0.3)
    assert torch.autograd.gradcheck(
        lambda x: GRPO.compute(SampledTokens(x, *constants, advantages), options).losses, (logprobs,)
    )


def test_kl_term_has_the_gradient_of_the_kl_divergence() -> None:
    """Averaged over a distribution, the gradient is that of KL(pi | ref), which k3 alone does not have."""
    scores = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    logprobs = scores.log_softmax(0)
    exact = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), scores, retain_graph=True)[0]
    old = logprobs.detach()
    tokens = SampledTokens(logprobs, old, reference, torch.zeros(3, dtype=torch.float64))
    result = GRPO.compute(tokens, make_options(beta=1.0))
    torch.testing.assert_close(torch.autograd.grad((old.exp() * result.losses).sum(), scores)[0], exact)


def test_advantages_are_centred_and_scaled_per_group() -> None:
    advantages = GRPO.advantages([1.0, 0.0, 0.0, 1.0], make_options())
    assert advantages == pytest.approx([0.5 / (math.sqrt(1 / 3) + 1e-4) * sign for sign in (1, -1, -1, 1)])
    assert GRPO.advantages([1.0, 0.0], make_options(group_loss="dr_grpo")) == [0.5, -0.5]
    assert GRPO.advantages([0.1 + 0.2, 0.3], make_options()) == [0.0, 0.0]  # equal except for rounding


def test_group_loss_decides_the_share_of_each_completion() -> None:
    lengths, shares = [2, 6], {}
    for kind in ("dapo", "grpo", "dr_grpo"):
        options = make_options(group_loss=kind)
        shares[kind] = [GRPO.token_weight(n, options) * n / GRPO.divisor(lengths, options) for n in lengths]
    assert shares["dapo"] == [0.25, 0.75] and shares["grpo"] == [0.5, 0.5]
    assert shares["dr_grpo"] == [2 / (2 * 256), 6 / (2 * 256)]
