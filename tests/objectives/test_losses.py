"""The losses themselves: values worked out by hand, gradients by finite differences, and the ends of their range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from strop.config.schema import TrainSection
from strop.errors import RecipeError
from strop.objectives.base_loss import Answers, Judged
from strop.objectives.table import OBJECTIVES, open_options

COMPARED = [name for name, one in OBJECTIVES.items() if one.data_kind != "prompts"]  # the others: test_grpo.py


def judged(sums: torch.Tensor, reference: torch.Tensor | None = None, level: float = 0.0) -> Judged:
    """sums (N, K); the answers have 4 and 8 tokens."""
    reference = torch.zeros_like(sums) if reference is None else reference
    answers = tuple(
        Answers(sums[:, k], torch.full_like(sums[:, k], 4.0 * (k + 1)), reference[:, k]) for k in range(sums.shape[1])
    )
    return Judged(answers, torch.arange(len(sums)) % 2 == 0, level)


def losses(name: str, sums: Any, reference: Any = None, level: float = 0.0, **options: Any) -> torch.Tensor:
    known = OBJECTIVES[name]
    train = TrainSection(objective=name, **{**known.options, **options})
    sums = torch.as_tensor(sums, dtype=torch.float64)
    reference = None if reference is None else torch.as_tensor(reference, dtype=torch.float64)
    return known.loss(judged(sums, reference, level), train).losses


def test_values_worked_out_by_hand() -> None:
    sums, reference = [[-2.0, -4.0]], [[-3.0, -3.5]]
    margin = 0.1 * ((-2 + 3) - (-4 + 3.5))
    sigmoid = 1 / (1 + math.exp(-margin))
    assert float(losses("dpo", sums, reference)) == pytest.approx(-math.log(sigmoid))
    smoothed = -0.8 * math.log(sigmoid) - 0.2 * math.log(1 - sigmoid)
    assert float(losses("dpo", sums, reference, label_smoothing=0.2)) == pytest.approx(smoothed)
    assert float(losses("dpo", sums, reference, sft_weight=2.0)) == pytest.approx(-math.log(sigmoid) + 2 * 2 / 4)
    by_token = 0.1 * ((-2 + 3) / 4 - (-4 + 3.5) / 8)
    normalized = float(losses("dpo", sums, reference, length_normalized=True))
    assert normalized == pytest.approx(math.log1p(math.exp(-by_token)))
    assert float(losses("ipo", sums, reference)) == pytest.approx((by_token / 0.1 - 5) ** 2)
    assert float(losses("ipo", sums, reference, length_normalized=False)) == pytest.approx((1.5 - 5) ** 2)
    a, b = -2 / 4, -4 / 8
    assert float(losses("simpo", sums)) == pytest.approx(math.log1p(math.exp(-(2 * (a - b) - 1))))
    sums, odds = [[-2.0, -6.0]], lambda x: math.log(math.exp(x) / (1 - math.exp(x)))
    ratio = odds(-2 / 4) - odds(-6 / 8)
    assert float(losses("orpo", sums)) == pytest.approx(2 / 4 + 0.1 * math.log1p(math.exp(-ratio)))
    good, bad = losses("kto", [[-2.0], [-2.0]], [[-3.0], [-3.0]], level=0.5, desirable_weight=2.0).tolist()
    assert good == pytest.approx(2 * (1 - 1 / (1 + math.exp(-0.1 * 0.5))))
    assert bad == pytest.approx(1 - 1 / (1 + math.exp(0.1 * 0.5)))


@pytest.mark.parametrize("name", COMPARED)
def test_gradients_are_those_of_the_values_and_not_zero(name: str) -> None:
    """on record, 9: a gradient that is zero while the figures move."""
    sides = 1 if name == "kto" else 2
    torch.manual_seed(0)
    sums = (-6 * torch.rand(5, sides, dtype=torch.float64) - 0.1).requires_grad_()
    options = {"sft_weight": 0.3} if "sft_weight" in OBJECTIVES[name].options else {}
    assert torch.autograd.gradcheck(lambda x: losses(name, x, -torch.ones(5, sides), 0.2, **options), (sums,))
    losses(name, sums).sum().backward()
    assert sums.grad is not None and (sums.grad.abs().sum(1) > 0).all()
    assert (sums.grad[:, 0][::2] < 0).all()  # the likelier a good answer, the smaller the loss


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_at_the_start_the_gradient_is_the_one_of_the_formula(name: str) -> None:
    """Where policy and reference are equal: a form with |x| or max(0, x) has another slope just there."""
    sides = 1 if name == "kto" else 2
    sums = torch.full((2, sides), -3.0, dtype=torch.float64, requires_grad=True)
    losses(name, sums, torch.full((2, sides), -3.0)).sum().backward()
    expected = {"dpo": [[-0.05, 0.05]] * 2, "ipo": [[-2.5, 1.25]] * 2, "kto": [[-0.025], [0.025]]}[name]
    assert sums.grad is not None
    torch.testing.assert_close(sums.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("sums", [(-1e-13, -3.0), (0.0, -0.1), (-1e4, -2e4), (-2000.0, -1e-9), (-0.5, -0.5)])
def test_orpo_stays_finite_at_the_ends(sums: tuple[float, float]) -> None:
    """on record, 12: log(1 - p) cancels for answers that are nearly certain (trl#3237, #4763)."""
    value = torch.tensor([sums], dtype=torch.float64, requires_grad=True)
    losses("orpo", value).sum().backward()
    assert value.grad is not None and value.grad.isfinite().all()
    assert losses("orpo", value).isfinite().all()


@pytest.mark.parametrize("name", ["ipo", "simpo", "orpo"])
def test_twice_as_long_is_not_twice_as_good(name: str) -> None:
    """on record, 13: sums of log-probabilities grow with length; IPO, SimPO and ORPO compare means."""
    sums = torch.tensor([[-2.0, -8.0], [-4.0, -4.0]], dtype=torch.float64)
    rewards = OBJECTIVES[name].loss(judged(sums), TrainSection(objective=name, **OBJECTIVES[name].options)).rewards
    per_token = [r / OBJECTIVES[name].options["beta"] for r in rewards]
    assert per_token[0].tolist() == [-0.5, -1.0] and per_token[1].tolist() == [-1.0, -0.5]


def test_every_option_is_read_or_refused() -> None:
    for name, known in OBJECTIVES.items():
        given = {"rewards": "exact"} if "rewards" in known.options else {}
        opened = open_options(TrainSection(objective=name, **given))
        found = {field.removeprefix("train."): value for field, value, _ in opened}
        assert found == {option: value for option, value in known.options.items() if option != "rewards"}
    with pytest.raises(RecipeError, match="gamma: objective dpo"):
        list(open_options(TrainSection(objective="dpo", gamma=1.0)))
    with pytest.raises(RecipeError, match="needs something to reward"):
        list(open_options(TrainSection(objective="grpo")))
    with pytest.raises(RecipeError, match="beta: objective sft"):
        list(open_options(TrainSection(beta=0.1)))
