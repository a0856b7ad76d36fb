"""Compare the settings of a sweep without mistaking luck for an effect.

Trials are compared on selection rows, paired by row. The best of many trials is partly lucky, so its score there is
biased. Whether a setting is better than the default is therefore decided on test rows, which are scored once, with new
runs of both settings from new seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from strop.evaluation.metrics import Estimate, t_quantile, wilson_interval
from strop.sweeping.space import Setting

ERROR_RATE = 0.05  # of all comparisons of a sweep together
MAX_LOSS = 0.02  # score that a cheaper setting may lose on the test rows, without a clear difference
MIN_SAVING = 1.25  # ratio of costs from which a setting is cheaper
Hits = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Candidate:
    """The finished trials of one setting.

    hits: score of each selection row, (N,), the mean over the setting's trials, which differ by their seed. cost:
    trainable parameters, predicted seconds and predicted peak bytes of a run.
    """

    setting: Setting
    numbers: tuple[int, ...]  # of its trials
    hits: Hits
    loss: float
    cost: tuple[float, ...]

    @property
    def score(self) -> float:
        return float(self.hits.mean())


@dataclass(frozen=True)
class Standing:
    """How a setting compares with the best: `best`, `equal` or `worse`, and the difference by row."""

    candidate: Candidate
    standing: str
    difference: Estimate | None  # from the best; None for the best


def rank(candidates: Sequence[Candidate]) -> list[Standing]:
    """Return the settings, best first, and which of them are as good as the best.

    A setting is worse if its difference from the best is significant after Bonferroni's correction for the number of
    pairs of settings: which one is the best is chosen by the same rows. All others are equal.
    """
    best, *others = sorted(candidates, key=lambda x: (-x.score, x.loss, x.cost, x.numbers))
    moments = [_row_moments(other.hits - best.hits) for other in others]
    num_pairs = len(candidates) * (len(candidates) - 1) // 2
    limit = t_quantile(len(best.hits) - 1, NormalDist().inv_cdf(1 - ERROR_RATE / (2 * max(1, num_pairs))))
    worse = {index for index, (mean, error) in enumerate(moments) if abs(mean) / error > limit}
    ranking = [Standing(best, "best", None)]
    for index, (other, (mean, error)) in enumerate(zip(others, moments, strict=True)):
        half_width = t_quantile(len(best.hits) - 1) * error
        estimate = Estimate(other.score - best.score, max(mean - half_width, -1.0), min(mean + half_width, 1.0))
        ranking.append(Standing(other, "worse" if index in worse else "equal", estimate))
    return ranking


def recommend(ranking: Sequence[Standing], default: Candidate | None) -> Candidate:
    """Return the best of the cheapest settings that are as good as the best; the default if it is one of them."""
    cheapest = find_cheapest([entry.candidate for entry in ranking if entry.standing != "worse"])
    if default is not None and default in cheapest:
        return default
    return min(cheapest, key=lambda x: (-x.score, x.loss, x.cost, x.numbers))


def find_cheapest(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the settings that have the fewest parameters, of these the shortest, and of these the smallest in memory.

    Costs within a factor of MIN_SAVING count as the same: otherwise almost no two settings would cost the same.
    """
    for part in range(len(candidates[0].cost)):
        limit = MIN_SAVING * min(x.cost[part] for x in candidates)
        candidates = [x for x in candidates if x.cost[part] <= limit]
    return list(candidates)


def compare_on_test(default: Sequence[Sequence[bool]], chosen: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Return the score of the chosen setting minus that of the default on test rows, with a verdict.

    The difference varies with the rows and with the seeds. With d_i the mean difference of row i over K seeds, and D_k
    that of seed k over n rows, the margins are t(n - 1) s(d) / sqrt(n) and t(K - 1) s(D) / sqrt(K). The margin of the
    interval is the root of the sum of their squares (G. Y. Zou and A. Donner, Statistics in Medicine 27 (2008),
    1693-1702). In simulations (tests/sweeping/test_select.py) it covers at least 95 %. One variance with
    Satterthwaite's degrees of freedom covers only 88 to 94 % if there are two or three seeds with large effects.

    Args:
        default: hits of the default, (K, n), one line a seed.
        chosen: hits of the chosen setting on the same rows.

    Returns:
        `value`, `low` and `high`, and `verdict`: "better", "worse" or "unclear"; "one seed" if K is 1.
    """
    differences = np.asarray(chosen, np.float64) - np.asarray(default, np.float64)
    seeds, rows = differences.shape
    mean, error = _row_moments(differences.mean(0))
    margins = [t_quantile(rows - 1) * error]
    if seeds > 1:
        margins.append(t_quantile(seeds - 1) * float(differences.mean(1).std(ddof=1)) / math.sqrt(seeds))
    half_width = math.hypot(*margins)
    low, high = max(mean - half_width, -1.0), min(mean + half_width, 1.0)
    verdict = "one seed" if seeds == 1 else "better" if low > 0 else "worse" if high < 0 else "unclear"
    return {**asdict(Estimate(float(differences.mean()), low, high)), "verdict": verdict, "seeds": seeds, "rows": rows}


def score_interval(hits: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Return the mean score over seeds and rows, (K, n), with an interval for rows and seeds as in `compare_on_test`.

    That for the rows is Wilson's, of the mean over the seeds.
    """
    values = np.asarray(hits, np.float64)
    (seeds, rows), mean = values.shape, float(values.mean())
    low, high = wilson_interval(mean * rows, rows)
    spread = t_quantile(seeds - 1) * float(values.mean(1).std(ddof=1)) / math.sqrt(seeds) if seeds > 1 else 0.0
    below, above = math.hypot(mean - low, spread), math.hypot(high - mean, spread)
    return {"value": mean, "low": max(0.0, mean - below), "high": min(1.0, mean + above)}


def _row_moments(differences: Hits) -> tuple[float, float]:
    """Return the mean of paired differences and its standard error.

    Half a row is added for each outcome of a pair of rows, two rows in total: otherwise, few rows that differ would
    give too narrow intervals (A. Agresti and Y. Min, Statistics in Medicine 24 (2005), 729-740).
    """
    n = len(differences) + 2
    mean = float(differences.sum()) / n
    variance = (float((differences**2).sum()) + 1) / n - mean**2
    return mean, math.sqrt(variance / n)


def as_marks(hits: Sequence[bool]) -> str:
    """Return hits as text: "1" for each hit and "0" for each miss."""
    return "".join(str(int(hit)) for hit in hits)


def read_marks(marks: str) -> list[bool]:
    return [mark == "1" for mark in marks]


def conclude(selection: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the verdict of the final check and the recommended setting, "default" or "chosen"."""
    by_seed: dict[str, dict[str, list[bool]]] = {"default": {}, "chosen": {}}
    for run in runs:
        if run["state"] == "finished":
            side, _, number = run["name"].partition("-")
            by_seed[side][number] = read_marks(run["hits"])
    failed = [run["name"] for run in runs if run["state"] != "finished"]
    common = [number for number in by_seed["default"] if number in by_seed["chosen"]]
    result: dict[str, Any] = {"difference": None, "failed": failed}
    if selection["is_default"]:
        result |= {"verdict": "failed" if failed else "default", "recommended": "default"}
    elif not common:
        is_default = bool(by_seed["default"]) or not by_seed["chosen"]
        result |= {
            "verdict": "failed" if failed else "no default",
            "recommended": "default" if is_default else "chosen",
        }
    else:
        default, chosen = ([by_seed[side][number] for number in common] for side in ("default", "chosen"))
        difference = compare_on_test(default, chosen)
        verdict = difference.pop("verdict")
        is_as_good = verdict in ("unclear", "one seed") and difference["value"] >= -MAX_LOSS
        if not np.any(default) and not np.any(chosen):  # the cheapest of settings that learned nothing
            verdict, is_as_good = "no hits", False
        is_chosen = verdict == "better" or (is_as_good and selection["cheaper"])
        result |= {"verdict": verdict, "difference": difference, "recommended": "chosen" if is_chosen else "default"}
    hits = {side: list(seeds.values()) for side, seeds in by_seed.items()}
    result["test"] = {name: score_interval(values) for name, values in hits.items() if values}
    return result
