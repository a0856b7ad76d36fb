"""The learning rate that the plan chooses, and its reason."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from strop.config.load import resolve
from strop.models.families.shape import ModelShape
from strop.planning.choose import default_learning_rate, learning_rate, objective_base_rate, rule_evidence
from strop.planning.tables import KNOWN
from tests import ROOT
from tests.support.scripts import script

LLAMA_8B = ModelShape.from_config(KNOWN["Llama-3.1-8B"])


def chosen(shape: ModelShape = LLAMA_8B, **options: Any) -> tuple[float, str]:
    return default_learning_rate(resolve(None, {"model": "m", "data": "d", **options}).recipe, shape)


def test_rate_falls_with_model_size() -> None:
    sizes = [learning_rate(parameters) for parameters in (10**6, 10**7, 10**8, 10**9, 7 * 10**9, 10**11)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == sizes[-2] == 2e-4 and sizes[0] == sizes[1] == 4e-3
    assert learning_rate(134_515_008) == 2.8e-3


def test_rslora_and_lora_plus_lower_the_rate() -> None:
    assert chosen(**{"lora.use_rslora": True})[0] == 1e-4 and "rsLoRA" in chosen(**{"lora.use_rslora": True})[1]
    assert chosen(**{"train.lora_plus_ratio": 16})[0] == 5e-5 and chosen()[0] == 2e-4
    assert chosen(**{"train.lora_plus_ratio": 16, "lora.use_rslora": True})[0] == 2.5e-5


def test_rate_follows_alpha_and_batch_within_the_measured_range() -> None:
    """The rate follows the inverse root of alpha at any rank, and rises by a third with 4 times the rows."""
    assert chosen(**{"lora.r": 64}) == (
        1e-4,
        f"rule for 8,030M parameters, {rule_evidence(7 * 10**9)}; times 0.5 for alpha 128",
    )
    assert chosen(**{"lora.r": 64, "lora.alpha": 32}) == chosen(**{"lora.r": 4, "lora.alpha": 32}) == chosen()
    assert chosen(**{"lora.r": 4})[0] == chosen(**{"lora.r": 1})[0] == 4e-4
    assert chosen(**{"lora.r": 256})[0] == 5e-5  # the rate falls on beyond the range, as a small rate is safe
    assert chosen(**{"train.batch_size": 32})[0] == chosen(**{"train.batch_size": 512})[0] == 2.6e-4
    assert "batches of 32" in chosen(**{"train.batch_size": 32})[1] and "times" not in chosen()[1]
    assert chosen(**{"train.batch_size": 2})[0] == 1.5e-4
    dpo = {"train.objective": "dpo"}  # its rate is not scaled, as nothing was measured
    assert chosen(**dpo, **{"lora.r": 64})[0] == chosen(**dpo)[0]


def test_weights_trained_in_full_take_a_tenth_of_the_rate() -> None:
    assert chosen(**{"train.method": "full"}) == (2e-5, f"{chosen()[1]}; 0.1 of it for all weights")
    for vision in ("projector", "all"):
        assert chosen(**{"lora.vision": vision}) == (2e-5, f"{chosen()[1]}; 0.1 of it for a projector")
    assert chosen(**{"lora.vision": "none"}) == chosen()


def test_objectives_take_a_share_of_their_base_rate() -> None:
    smol = replace(LLAMA_8B, layers=30, hidden=576)
    assert objective_base_rate(134_515_008) == 1e-3 and objective_base_rate(8 * 10**9) == learning_rate(8 * 10**9)
    rate, why = chosen(smol, **{"train.objective": "dpo"})
    assert rate == float(f"{0.01 * objective_base_rate(smol.parameters):.2g}") < 0.01 * learning_rate(smol.parameters)
    assert "0.01 of it for dpo" in why


def test_reason_states_whether_the_rule_was_measured() -> None:
    assert [rule_evidence(parameters) for parameters in (70_793_280, 134_515_008)] == ["measured"] * 2
    assert (
        "published" in rule_evidence(8 * 10**9)
        and "smaller" in rule_evidence(10**6)
        and "not measured" in rule_evidence(10**9)
    )
    assert rule_evidence(LLAMA_8B.parameters) in chosen()[1]
    assert "published" in chosen(**{"train.optimizer": "lion"})[1]


def test_sweep_results_give_the_best_rate_and_the_cost_of_the_rule() -> None:
    """Losses of two seeds are averaged and interpolated; a stopped run is never the best."""
    rates = script(ROOT / "benchmarks" / "valleys.py")
    setting = {"size": "135M", "set": "demo", **rates.USUAL}
    rows = [
        {**setting, "seed": seed, "rate": rate, "loss": loss and loss + seed * 0.02, "steps": 40, "skipped": 0,
         "rollbacks": 0}
        for seed in (0, 1) for rate, loss in ((1e-3, 1.2), (2e-3, 1.0), (4e-3, 1.4), (8e-3, None))
    ]  # fmt: skip
    rows.append({**rows[0], "rate": 16e-3, "loss": 0.1})  # only one seed
    (valley,) = rates.valleys(rows)
    result = rates.judge_rates(valley)
    assert valley["stopped"] == [8e-3, 8e-3] and valley["seeds"] == 2
    assert result["best"] == 2e-3 and result["loss"] == pytest.approx(1.01)
    share = math.log2(result["rule"] / 2e-3)
    assert 0 < share < 1 and result["cost"] == pytest.approx(share * 0.4 / 1.01)
    assert result["before"] == 1e-3 and result["cost_before"] == pytest.approx(0.2 / 1.01)
    assert "2 seeds" in rates.table([valley])[0] and rates.table([valley], "rank") == []
