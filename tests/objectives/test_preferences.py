"""Preference losses: values computed by hand, gradients by finite differences, and the limits of their range.

"On record, N" refers to the list of other trainers' silent errors in docs/measured.md.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from strop.config.schema import TrainSection
from strop.errors import RecipeError
from strop.objectives.preferences import AnswerLogprobs, PreferenceBatch, PreferenceLoss, PreferenceResult
from strop.objectives.table import OBJECTIVES, default_options

LOSSES = [name for name, objective in OBJECTIVES.items() if isinstance(objective, PreferenceLoss)]


def compute(name: str, sums: Any, reference: Any = None, divergence: float = 0.0, **options: Any) -> PreferenceResult:
    """Compute a loss for sums (N, K); the first answer of each row has 4 tokens, the second 8."""
    objective = OBJECTIVES[name]
    assert isinstance(objective, PreferenceLoss)
    train = TrainSection(objective=name, **{**objective.options, **options})  # type: ignore[arg-type]
    sums = torch.as_tensor(sums, dtype=torch.float64)
    reference = torch.zeros_like(sums) if reference is None else torch.as_tensor(reference, dtype=torch.float64)
    answers = tuple(
        AnswerLogprobs(sums[:, k], torch.full_like(sums[:, k], 4.0 * (k + 1)), reference[:, k])
        for k in range(sums.shape[1])
    )
    desirable = torch.arange(len(sums)) % 2 == 0
    return objective.compute(PreferenceBatch(answers, desirable, divergence), train)


def losses(name: str, sums: Any, reference: Any = None, divergence: float = 0.0, **options: Any) -> torch.Tensor:
    return compute(name, sums, reference, divergence, **options).losses


def test_losses_equal_values_computed_by_hand() -> None:
    sums, reference = [[-2.0, -4.0]], [[-3.0, -3.5]]
    margin = 0.1 * ((-2 + 3) - (-4 + 3.5))
    sigmoid = 1 / (1 + math.exp(-margin))
    assert float(losses("dpo", sums, reference)) == pytest.approx(-math.log(sigmoid))
    smoothed = -0.8 * math.log(sigmoid) - 0.2 * math.log(1 - sigmoid)
    assert float(losses("dpo", sums, reference, label_smoothing=0.2)) == pytest.approx(smoothed)
    assert float(losses("dpo", sums, reference, sft_weight=2.0)) == pytest.approx(-math.log(sigmoid) + 2 * 2 / 4)
    per_token = 0.1 * ((-2 + 3) / 4 - (-4 + 3.5) / 8)
    normalized = float(losses("dpo", sums, reference, length_normalized=True))
    assert normalized == pytest.approx(math.log1p(math.exp(-per_token)))
    assert float(losses("ipo", sums, reference)) == pytest.approx((per_token / 0.1 - 5) ** 2)
    assert float(losses("ipo", sums, reference, length_normalized=False)) == pytest.approx((1.5 - 5) ** 2)
    chosen, rejected = -2 / 4, -4 / 8
    assert float(losses("simpo", sums)) == pytest.approx(math.log1p(math.exp(-(2 * (chosen - rejected) - 1))))
    sums, log_odds = [[-2.0, -6.0]], lambda x: math.log(math.exp(x) / (1 - math.exp(x)))
    ratio = log_odds(-2 / 4) - log_odds(-6 / 8)
    assert float(losses("orpo", sums)) == pytest.approx(2 / 4 + 0.1 * math.log1p(math.exp(-ratio)))
    good, bad = losses("kto", [[-2.0], [-2.0]], [[-3.0], [-3.0]], 0.5, desirable_weight=2.0).tolist()
    assert good == pytest.approx(2 * (1 - 1 / (1 + math.exp(-0.1 * 0.5))))
    assert bad == pytest.approx(1 - 1 / (1 + math.exp(0.1 * 0.5)))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences_and_are_not_zero(name: str) -> None:
    """On record, 9: a gradient that is zero while the figures change."""
    sides = 1 if name == "kto" else 2
    torch.manual_seed(0)
    sums = (-6 * torch.rand(5, sides, dtype=torch.float64) - 0.1).requires_grad_()
    options = {"sft_weight": 0.3} if "sft_weight" in OBJECTIVES[name].options else {}
    assert torch.autograd.gradcheck(lambda x: losses(name, x, -torch.ones(5, sides), 0.2, **options), (sums,))
    losses(name, sums).sum().backward()
    assert sums.grad is not None and (sums.grad.abs().sum(1) > 0).all()
    assert (sums.grad[:, 0][::2] < 0).all()  # a more likely good answer has a smaller loss


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_gradient_at_the_reference_is_that_of_the_formula(name: str) -> None:
    """Forms with |x| or max(0, x) have another slope where policy and reference are equal."""
    sides = 1 if name == "kto" else 2
    sums = torch.full((2, sides), -3.0, dtype=torch.float64, requires_grad=True)
    losses(name, sums, torch.full((2, sides), -3.0)).sum().backward()
    expected = {"dpo": [[-0.05, 0.05]] * 2, "ipo": [[-2.5, 1.25]] * 2, "kto": [[-0.025], [0.025]]}[name]
    assert sums.grad is not None
    torch.testing.assert_close(sums.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("sums", [(-1e-13, -3.0), (0.0, -0.1), (-1e4, -2e4), (-2000.0, -1e-9), (-0.5, -0.5)])
def test_orpo_is_finite_at_the_limits(sums: tuple[float, float]) -> None:
    """On record, 12: log(1 - p) cancels for answers that are nearly certain (trl#3237, #4763)."""
    value = torch.tensor([sums], dtype=torch.float64, requires_grad=True)
    losses("orpo", value).sum().backward()
    assert value.grad is not None and value.grad.isfinite().all()
    assert losses("orpo", value).isfinite().all()


@pytest.mark.parametrize("name", ["ipo", "simpo", "orpo"])
def test_rewards_are_means_per_token(name: str) -> None:
    """On record, 13: sums of log-probabilities grow with length; IPO, SimPO and ORPO compare means."""
    rewards = compute(name, [[-2.0, -8.0], [-4.0, -4.0]]).rewards
    per_token = [reward / OBJECTIVES[name].options["beta"] for reward in rewards]
    assert per_token[0].tolist() == [-0.5, -1.0] and per_token[1].tolist() == [-1.0, -0.5]


def test_reasons_of_defaults_name_the_paper_that_has_them() -> None:
    whys = {field: why for field, _, why in default_options(TrainSection(objective="grpo", rewards="exact"))}
    assert whys["train.beta"] == "usual for grpo (arXiv:2402.03300, section 4.2)"
    assert "arXiv:2503.14476" in whys["train.clip_high"] and whys["train.reward_timeout"] == "usual for grpo"


def test_every_option_has_a_default_or_is_refused() -> None:
    for name, objective in OBJECTIVES.items():
        required = {"rewards": "exact"} if "rewards" in objective.options else {}
        defaults = default_options(TrainSection(objective=name, **required))  # type: ignore[arg-type]
        values = {field.removeprefix("train."): value for field, value, _ in defaults}
        others = ("rewards", "labels", "environment", "turns")  # turns: with an environment
        assert values == {option: value for option, value in objective.options.items() if option not in others}
    with pytest.raises(RecipeError, match="gamma: objective dpo"):
        list(default_options(TrainSection(objective="dpo", gamma=1.0)))
    unread = TrainSection(objective="kto", label_smoothing=0.1, length_normalized=False)
    with pytest.raises(RecipeError, match=r"label_smoothing, train\.length_normalized: objective kto") as caught:
        list(default_options(unread))
    fix = "leave them out, or set them to none if a recipe has them, or choose --train.objective dpo"
    assert caught.value.fix == fix
    with pytest.raises(RecipeError, match=r"train\.rewards"):
        list(default_options(TrainSection(objective="grpo")))
    with pytest.raises(RecipeError, match="beta: objective sft"):
        list(default_options(TrainSection(beta=0.1)))
