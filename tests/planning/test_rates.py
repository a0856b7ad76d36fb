"""The learning rate that a recipe leaves open, and what the plan says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import strop
from strop.config.load import Choice, resolve
from strop.model.shape import ModelShape
from strop.planning.compare import KNOWN
from strop.planning.rates import LONG, for_rows, how_sure, learning_rate, open_rate
from strop.testing import tiny_run
from tests import ROOT
from tests.support.scripts import script

LLAMA_8B = ModelShape.of(KNOWN["Llama-3.1-8B"])


def chosen(rows: int | None = None, shape: ModelShape = LLAMA_8B, **options: Any) -> Choice:
    return open_rate(resolve(None, {"model": "m", "data": "d", **options}).recipe, shape, rows)


def test_a_larger_model_and_a_longer_run_take_a_smaller_rate() -> None:
    sizes = [learning_rate(parameters) for parameters in (10**7, 10**8, 10**9, 10**10, 10**11)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == sizes[-2] == 2e-4
    lengths = [learning_rate(10**9, steps) for steps in (1, 10, 40, 100, LONG, 10 * LONG)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == lengths[-2] == learning_rate(10**9) and lengths[0] == lengths[1] == pytest.approx(
        4 * lengths[-1], rel=0.03
    )


def test_steps_are_those_of_the_run() -> None:
    assert chosen(80).value == chosen(**{"train.max_steps": 30}).value == learning_rate(8 * 10**9, 30)
    assert chosen(80, **{"train.batch_size": 16}).value == learning_rate(8 * 10**9, 15)
    assert "and 30 steps" in chosen(80).why and "steps" not in chosen(10_000).why and "steps" not in chosen().why


def test_what_was_not_measured_takes_the_rate_of_long_runs() -> None:
    """Preferences and rewards: their shares are of that."""
    assert chosen(80, **{"train.objective": "dpo"}).value == chosen(**{"train.objective": "dpo"}).value


def test_a_rate_that_was_asked_for_stays() -> None:
    for options, expected in (({"train.learning_rate": 0.01}, 0.01), ({}, learning_rate(8 * 10**9, 30))):
        resolved = resolve(None, {"model": "m", "data": "d", **options})
        if not options:
            resolved = resolved.decide([open_rate(resolved.recipe, LLAMA_8B)])
        assert for_rows(resolved, LLAMA_8B, 80).recipe.train.learning_rate == expected
        assert for_rows(resolved, LLAMA_8B, 0) == resolved


def test_the_plan_says_how_sure_it_is() -> None:
    assert how_sure(134_515_008) == "measured at this size"
    assert "arXiv" in how_sure(8 * 10**9) and "smaller" in how_sure(10**6)
    assert "not measured" in how_sure(10**9) and how_sure(10**9) in chosen(shape=replace(LLAMA_8B, layers=3)).why


def test_plan_and_run_and_printed_recipe_agree(tmp_path: Path) -> None:
    from strop.training.setup import preview

    run = tiny_run(tmp_path, **{"train.max_steps": None, "train.epochs": 1})
    options = {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl"), "train.epochs": 1,
               "train.batch_size": 4, "model.dtype": "fp32", "model.device": "cpu"}  # fmt: skip
    of_run = {one["field"]: one for one in run.report["recipe"]}["train.learning_rate"]
    assert "6 steps" in of_run["why"]
    plan, printed = strop.plan(**options).resolved, preview(resolve(None, options))
    for found in (plan, printed):
        assert (found.recipe.train.learning_rate, found.choices["train.learning_rate"].why) == (
            of_run["value"], of_run["why"])  # fmt: skip


def test_a_valley_of_the_sweep_is_judged() -> None:
    """Two seeds; the loss between two rates lies on a line; a run that was stopped is no best one."""
    rates = script(ROOT / "benchmarks" / "valleys.py")
    setting = {"size": "135M", "set": "demo", **rates.USUAL}
    rows = [
        {**setting, "seed": seed, "rate": rate, "loss": loss and loss + seed * 0.02, "steps": 10_000, "skipped": 0,
         "rollbacks": 0}
        for seed in (0, 1) for rate, loss in ((5e-4, 1.2), (2e-3, 1.0), (4e-3, None))
    ]  # fmt: skip
    rows.append({**rows[0], "rate": 8e-3, "loss": 0.1})  # of one seed alone
    (valley,) = rates.valleys(rows)
    found = rates.judged(valley)
    assert valley["stopped"] == [4e-3, 4e-3] and valley["seeds"] == 2
    assert found["best"] == 2e-3 and found["loss"] == pytest.approx(1.01)
    assert found["rule"] == 1e-3 and found["cost"] == pytest.approx(0.1 / 1.01)
    assert "2 seeds" in rates.table([valley])[0] and rates.table([valley], "rank") == []
