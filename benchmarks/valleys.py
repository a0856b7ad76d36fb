"""Analyse the results of `learning_rates.py`: held-out loss over the learning rate for each setting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learners import ALL, SETS, SIZES, parameters

RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
KEYS = ("size", "set", "rank", "epochs", "batch", "method")  # the fields that identify a setting
UNUSUAL = ("rank", "batch", "method")  # the fields that the rule depends on
REACHES = {"rslora": 128, "alpha 16": 16, "alpha 64": 64}  # alpha for rank 16; otherwise twice the rank
USUAL: dict[str, Any] = {"rank": 16, "epochs": 1, "batch": 8, "method": "lora", "seed": 0}


def valleys(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each setting with its curve {rate: loss}: means over seeds, at rates that all of its seeds have.

    Field `stopped`: the rates of runs in which the guard acted.
    """
    results: dict[tuple[Any, ...], dict[int, dict[float, dict[str, Any]]]] = {}
    for row in rows:
        results.setdefault(tuple(row[key] for key in KEYS), {}).setdefault(row["seed"], {})[row["rate"]] = row
    created = []
    for setting, seeds in results.items():
        common = sorted(set.intersection(*(set(runs) for runs in seeds.values())))
        curve = {
            rate: statistics.fmean(
                math.inf if runs[rate]["loss"] is None else runs[rate]["loss"] for runs in seeds.values()
            )
            for rate in common
        }
        every = [row for runs in seeds.values() for row in runs.values()]
        guarded = [row for row in every if row["loss"] is None or row["skipped"] or row["rollbacks"]]
        steps = next(row["steps"] for row in every if row["loss"] is not None)
        more = {"steps": steps, "seeds": len(seeds), "curve": curve, "stopped": sorted(row["rate"] for row in guarded)}
        created.append({**dict(zip(KEYS, setting, strict=True)), **more})
    return created


def loss_at(curve: dict[float, float], rate: float) -> float:
    """Interpolate the loss linearly over the logarithm of the rate; NaN outside of the measured rates."""
    if not min(curve) <= rate <= max(curve):
        return math.nan
    below, above = max(r for r in curve if r <= rate), min(r for r in curve if r >= rate)
    share = 0.0 if below == above else math.log(rate / below) / math.log(above / below)
    return curve[below] if not share else (1 - share) * curve[below] + share * curve[above]


def judge_rates(valley: dict[str, Any]) -> dict[str, Any]:
    """Return the best rate with its loss, the rates within 5 % of it, and the rate and cost of each rule.

    Costs are shares of the best loss: of the current rule, of its predecessor (`objective_base_rate`), and of the rate
    for the default adapter and batch size.
    """
    from strop.planning.choose import learning_rate, objective_base_rate, rate_factor

    curve, size = valley["curve"], parameters(valley["size"])
    best = min(curve, key=lambda rate: curve[rate])
    within = [rate for rate in curve if curve[rate] <= 1.05 * curve[best]]
    method = valley["method"]
    reach = REACHES.get(method, 2 * valley["rank"])
    rule = learning_rate(size) * rate_factor(reach, valley["batch"], 16 if method == "lora+" else 1)
    before = objective_base_rate(size)
    cost, cost_before, cost_usual = (
        loss_at(curve, rate) / curve[best] - 1 for rate in (rule, before, learning_rate(size))
    )
    result = {"best": best, "loss": curve[best], "low": min(within), "high": max(within)}
    return {
        **result,
        "rule": rule,
        "cost": cost,
        "before": before,
        "cost_before": cost_before,
        "cost_usual": cost_usual,
    }


def table(settings: Sequence[dict[str, Any]], of: str = "") -> list[str]:
    """Return rows of a Markdown table: of settings that differ only in size and rows, or with `of` (rank, epochs,
    batch, method) of settings with a non-default value of it.
    """
    lines = []
    for one in sorted(settings, key=lambda one: (-SIZES[one["size"]], [*SETS, ALL].index(one["set"]))):
        if [name for name in ("rank", "epochs", "batch", "method") if one[name] != USUAL[name]] != [of] * bool(of):
            continue
        it, seeds = judge_rates(one), "" if one["seeds"] == 1 else f" ({one['seeds']} seeds)"
        other = it["cost_usual" if of in UNUSUAL else "cost_before"]
        costs = ["not tried" if math.isnan(x) else f"{100 * x:.1f} %" for x in (it["cost"], other)]
        lines.append(
            f"| {one['size']} | {one['set']}{seeds} | {f'{one[of]} | ' if of else ''}{one['steps']} "
            f"| {it['best']:.2g} | {it['loss']:.3f} | {it['low']:.2g} to {it['high']:.2g} "
            f"| {it['rule']:.2g} | {costs[0]} | {costs[1]} |"
        )
    return lines


def plot(settings: Sequence[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "strop", "font.size": 9, "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SETS), figsize=(8.4, 2.8), sharey=True, layout="constrained")
    for panel, name in zip(axes, SETS, strict=True):
        for one in (one for one in settings if one["set"] == name and all(one[key] == USUAL[key] for key in KEYS[2:])):
            best, curve = judge_rates(one), one["curve"]
            line = panel.plot(
                list(curve), [loss / best["loss"] for loss in curve.values()], marker=".", label=one["size"]
            )
            panel.plot([best["rule"]], [1 + best["cost"]], marker="D", color=line[0].get_color(), markersize=6)
        panel.axhline(1.05, color="#b8b8b8", linestyle="--", linewidth=1)
        panel.set(title=name, xlabel="learning rate", xscale="log", ylim=(0.98, 1.6))
        panel.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        panel.minorticks_off()
    axes[0].set_ylabel("held-out loss, of the best")
    axes[-1].legend(title="diamond: strop's rule", frameon=False)
    figure.savefig(file, metadata={"Date": None})
