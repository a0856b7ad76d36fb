"""The comparison of settings: false wins on identical settings, real effects, corrections, and intervals."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from strop.evaluation.metrics import t_quantile, wilson_interval
from strop.sweeping.select import Candidate, compare_on_test, conclude, find_cheapest, rank, recommend, score_interval

SEEDS_SD = 0.5  # standard deviation of a seed's effect, in logits: about 8 points at 70 %
COST = (1000.0, 10.0, 1e9)


class World:
    """Simulated scores: rows differ in difficulty, runs by an effect of their seed, and settings by their effect."""

    def __init__(self, seed: int, rows: int = 105, seeds_sd: float = SEEDS_SD) -> None:
        self._random = np.random.default_rng(seed)
        self._seeds_sd = seeds_sd
        self.selection = self._random.normal(0.8, 1.5, rows)
        self.test = self._random.normal(0.8, 1.5, rows)

    def runs(self, rows: npt.NDArray[np.float64], number: int, effect: float = 0.0) -> npt.NDArray[np.bool_]:
        """Return the hits of new runs of a setting, (number, N)."""
        logits = rows + effect + self._random.normal(0, self._seeds_sd, (number, 1))
        return self._random.random(logits.shape) < 1 / (1 + np.exp(-logits))


def sweep(world: World, effects: list[float], costs: list[float] | None = None, seeds: int = 3) -> tuple[str, int]:
    """Simulate a sweep whose first setting is the default; return the verdict and the recommended setting."""
    candidates = []
    for number, effect in enumerate(effects):
        hits = world.runs(world.selection, 1, effect)[0].astype(np.float64)
        cost = (costs or [1.0] * len(effects))[number]
        candidates.append(Candidate({"x": number}, (number,), hits, -float(hits.mean()), (cost, 1.0, 1.0)))
    chosen = recommend(rank(candidates), candidates[0])
    selection = {
        "is_default": chosen is candidates[0], "has_default": True,
        "cheaper": candidates[0] not in find_cheapest([chosen, candidates[0]]),
    }  # fmt: skip
    names = {"default": effects[0], "chosen": effects[chosen.numbers[0]]}
    runs = [
        {"name": f"{name}-{k}", "state": "finished", "hits": "".join(str(int(hit)) for hit in hits)}
        for name, effect in names.items()
        for k, hits in enumerate(world.runs(world.test, seeds, effect))
        if name == "default" or not selection["is_default"]
    ]
    result = conclude(selection, runs)
    return result["verdict"], 0 if result["recommended"] == "default" else chosen.numbers[0]


@pytest.mark.parametrize("seeds_sd", [0.0, SEEDS_SD])
def test_identical_settings_rarely_have_a_winner(seeds_sd: float) -> None:
    verdicts = [sweep(World(seed, seeds_sd=seeds_sd), [0.0] * 12)[0] for seed in range(2000)]
    assert verdicts.count("better") <= 0.05 * len(verdicts)
    assert verdicts.count("default") < len(verdicts)  # the final check decides some of them


def test_a_large_effect_is_found() -> None:
    effects = [0.0] * 11 + [2.0]  # about 25 points
    results = [sweep(World(seed, rows=200, seeds_sd=0.2), effects) for seed in range(300)]
    assert sum(result == ("better", 11) for result in results) > 0.9 * len(results)


def test_a_worse_choice_is_rejected() -> None:
    """A cheap setting that is equal on few selection rows, and worse on test rows, is not recommended."""
    hits = [[True] * 90 + [False] * 10] * 3, [[True] * 60 + [False] * 40] * 3
    difference = compare_on_test(*hits)
    assert difference["verdict"] == "worse" and difference["high"] < 0 < difference["rows"]


@pytest.mark.parametrize("seeds_sd", [0.0, SEEDS_SD, 1.0])
@pytest.mark.parametrize("seeds", [2, 3])
def test_interval_of_the_final_check_covers_the_difference(seeds: int, seeds_sd: float) -> None:
    """The interval contains the difference of two settings, which is 0 in half of the worlds, at least as promised."""
    covered = []
    for seed in range(1000):
        world = World(seed, rows=105, seeds_sd=seeds_sd)
        wanted = seed % 2 * 0.7
        both = [world.runs(world.test, seeds, effect) for effect in (0.0, wanted)]
        many = [world.runs(world.test, 400, effect).mean() for effect in (0.0, wanted)]
        result = compare_on_test(both[0].tolist(), both[1].tolist())
        covered.append(result["low"] <= many[1] - many[0] <= result["high"])
    assert np.mean(covered) > 0.945


def test_interval_of_the_final_check_is_that_of_its_formula() -> None:
    """Compare with a computation by loops and scipy's quantiles."""
    random = np.random.default_rng(1)
    default, chosen = (random.random((3, 60)) < rate for rate in (0.6, 0.7))
    result = compare_on_test(default.tolist(), chosen.tolist())
    by_row = [sum(float(c[i]) - float(d[i]) for c, d in zip(chosen, default, strict=True)) / 3 for i in range(60)]
    by_seed = [
        sum(float(c) - float(d) for c, d in zip(*pair, strict=True)) / 60 for pair in zip(chosen, default, strict=True)
    ]
    with_pseudo = [*by_row, math.sqrt(0.5), -math.sqrt(0.5)]  # two rows whose squares add up to one
    rows_error = math.sqrt((np.mean(np.square(with_pseudo)) - np.mean(with_pseudo) ** 2) / 62)
    seeds_error = math.sqrt(stats.tvar(by_seed) / 3)
    margins = stats.t.ppf(0.975, 59) * rows_error, stats.t.ppf(0.975, 2) * seeds_error
    half_width = math.sqrt(margins[0] ** 2 + margins[1] ** 2)
    assert result["value"] == pytest.approx(np.mean(by_row))
    assert result["low"] == pytest.approx(sum(by_row) / 62 - half_width, rel=5e-3)
    assert result["high"] == pytest.approx(sum(by_row) / 62 + half_width, rel=5e-3)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 29, 104])
@pytest.mark.parametrize("level", [0.975, 0.99, 0.998])
def test_quantiles_of_t(degrees: int, level: float) -> None:
    z = NormalDist().inv_cdf(level)
    if level == 0.975:
        assert t_quantile(degrees) == pytest.approx(stats.t.ppf(level, degrees), rel=2e-3)
    elif degrees > 8:
        assert t_quantile(degrees, z) == pytest.approx(stats.t.ppf(level, degrees), rel=2e-3)


def candidate(number: int, hits: list[int], *, cost: float = 1.0, loss: float = 1.0) -> Candidate:
    return Candidate({"x": number}, (number,), np.array(hits, np.float64), loss, (cost, 1.0, 1.0))


def test_settings_far_behind_the_best_are_worse_and_others_are_equal() -> None:
    best, near, far = candidate(0, [1] * 80 + [0] * 20), candidate(1, [1] * 78 + [0] * 22), candidate(2, [0] * 100)
    ranking = rank([far, near, best])
    assert [(entry.candidate.numbers[0], entry.standing) for entry in ranking] == [
        (0, "best"),
        (1, "equal"),
        (2, "worse"),
    ]
    assert ranking[0].difference is None and ranking[2].difference is not None
    assert ranking[2].difference.high < 0 and ranking[1].difference.low < 0 < ranking[1].difference.high


def test_holm_needs_more_for_many_settings() -> None:
    """A difference that is significant alone is not if it is the largest of many."""
    best, behind = candidate(0, [1] * 100), candidate(1, [1] * 94 + [0] * 6)
    same = [candidate(number, [1] * 100, loss=2.0) for number in range(2, 30)]
    assert rank([best, behind])[1].standing == "worse"
    assert {entry.standing for entry in rank([best, behind, *same])} == {"best", "equal"}


def test_ties_are_broken_by_loss() -> None:
    ranking = rank([candidate(0, [1, 0] * 20, loss=2.0), candidate(1, [0, 1] * 20, loss=1.0)])
    assert ranking[0].candidate.numbers == (1,)


def test_the_cheapest_of_equal_settings_is_recommended_and_the_default_among_equals() -> None:
    hits = [1] * 40
    default, cheap, dear = candidate(0, hits, cost=2), candidate(1, hits, cost=1), candidate(2, hits, cost=3)
    assert recommend(rank([default, cheap, dear]), default) is cheap
    assert recommend(rank([default, dear]), default) is default
    same_cost = candidate(3, hits, cost=2, loss=0.5)
    assert recommend(rank([default, same_cost]), default) is default
    slightly_cheaper = candidate(4, [1] * 30 + [0] * 10, cost=1.9)
    assert recommend(rank([default, slightly_cheaper]), default) is default
    half = candidate(5, [0, *[1] * 39], cost=1.1)
    assert recommend(rank([default, half, cheap, slightly_cheaper]), default) is cheap  # it has a higher score
    assert recommend(rank([default, half, candidate(6, [0, 0, *[1] * 38], cost=1)]), default) is half
    better = candidate(4, [1] * 40, cost=5)
    poor = candidate(0, [0] * 40, cost=1)
    assert recommend(rank([poor, better]), poor) is better


def test_one_seed_gives_no_verdict() -> None:
    difference = compare_on_test([[False] * 50], [[True] * 50])
    assert difference["verdict"] == "one seed" and difference["low"] > 0


@pytest.mark.parametrize(
    ("hits", "cheaper", "recommended"),
    [(70, True, "chosen"), (69, True, "chosen"), (60, True, "default"), (70, False, "default")],
)
def test_without_a_clear_difference_a_cheaper_setting_is_used_if_it_loses_little(
    hits: int, cheaper: bool, recommended: str
) -> None:
    selection = {"is_default": False, "has_default": True, "cheaper": cheaper}
    marks = {"default": "1" * 70 + "0" * 30, "chosen": "0" * (100 - hits) + "1" * hits}
    runs = [{"name": f"{name}-{k}", "state": "finished", "hits": marks[name]} for name in marks for k in range(2)]
    result = conclude(selection, runs)
    assert (result["verdict"], result["recommended"]) == ("unclear", recommended)


def test_settings_that_get_nothing_right_are_not_compared() -> None:
    """Otherwise the cheapest of settings that learned nothing would be recommended."""
    selection = {"is_default": False, "has_default": True, "cheaper": True}
    runs = [{"name": f"{name}-1", "state": "finished", "hits": "0" * 40} for name in ("default", "chosen")]
    result = conclude(selection, runs)
    assert (result["verdict"], result["recommended"]) == ("no hits", "default")


def test_seeds_that_both_settings_have_are_compared_if_another_failed() -> None:
    selection = {"is_default": False, "has_default": True, "cheaper": True}
    marks = {"default": "1" * 64 + "0" * 36, "chosen": "1" * 30 + "0" * 70}
    runs: list[dict[str, Any]] = [
        {"name": f"{name}-{k}", "state": "finished", "hits": marks[name]} for name in marks for k in range(3)
    ]
    runs[1] = {"name": "default-1", "state": "failed"}
    result = conclude(selection, runs)
    assert result["recommended"] == "default" and result["verdict"] == "worse" and result["failed"] == ["default-1"]
    assert result["difference"]["seeds"] == 2


def test_failed_scoring_of_the_default_keeps_it() -> None:
    selection = {"is_default": True, "has_default": True, "cheaper": False}
    result = conclude(selection, [{"name": "default-0", "state": "failed"}])
    assert (result["verdict"], result["recommended"], result["test"]) == ("failed", "default", {})


def test_interval_of_a_score_is_wilsons_for_one_seed() -> None:
    for hits in ([True] * 3 + [False] * 47, [False] * 50, [True] * 50):
        result = score_interval([hits])
        assert (result["low"], result["high"]) == pytest.approx(wilson_interval(sum(hits), 50))


def test_failed_runs_give_no_verdict() -> None:
    selection = {"is_default": False, "has_default": True, "cheaper": True}
    runs = [{"name": "default-1", "state": "finished", "hits": "1010"}, {"name": "chosen-1", "state": "failed"}]
    result = conclude(selection, runs)
    assert (result["verdict"], result["recommended"], result["failed"]) == ("failed", "default", ["chosen-1"])


def test_score_of_all_right_rows_has_an_interval() -> None:
    interval = score_interval([[True] * 30] * 3)
    assert interval["value"] == 1.0 and 0.8 < interval["low"] < 1.0 == interval["high"]
