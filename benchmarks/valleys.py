"""What `learning_rates.py` found: the held-out loss over the learning rate, setting by setting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learners import ALL, SETS, SIZES, parameters

RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
KEYS = ("size", "set", "rank", "epochs", "batch", "method")  # of a setting, which has a curve
UNUSUAL = ("rank", "batch", "method")  # that change the rule's rate
REACHES = {"rslora": 128, "alpha 16": 16, "alpha 64": 64}  # of adapters of rank 16; of others twice the rank
USUAL: dict[str, Any] = {"rank": 16, "epochs": 1, "batch": 8, "method": "lora", "seed": 0}


def valleys(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each setting with its curve, {rate: loss}: the mean of the seeds, at rates that all of its seeds have. stopped:
    runs in which the guard did anything."""
    found: dict[tuple[Any, ...], dict[int, dict[float, dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in KEYS), {}).setdefault(row["seed"], {})[row["rate"]] = row
    made = []
    for setting, seeds in found.items():
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
        made.append({**dict(zip(KEYS, setting, strict=True)), **more})
    return made


def loss_at(curve: dict[float, float], rate: float) -> float:
    """Between two rates that were tried, on the line between their losses, by the rate's logarithm; beyond them NaN."""
    if not min(curve) <= rate <= max(curve):
        return math.nan
    below, above = max(r for r in curve if r <= rate), min(r for r in curve if r >= rate)
    share = 0.0 if below == above else math.log(rate / below) / math.log(above / below)
    return curve[below] if not share else (1 - share) * curve[below] + share * curve[above]


def judged(valley: dict[str, Any]) -> dict[str, Any]:
    """The best rate and its loss, the rates that were tried within 5 % of it; the rule's rate and what it costs, what
    the rule before it did (`objective_base_rate`), and what the usual adapter's and batch's rate would, as shares of
    the best loss.
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
    found = {"best": best, "loss": curve[best], "low": min(within), "high": max(within)}
    return {**found, "rule": rule, "cost": cost, "before": before, "cost_before": cost_before, "cost_usual": cost_usual}


def table(found: Sequence[dict[str, Any]], of: str = "") -> list[str]:
    """Rows of a Markdown table: without `of`, of the settings in which only size and rows differ from one another; with
    it, of the settings in which `of` (rank, epochs, batch, method) is not as usual."""
    lines = []
    for one in sorted(found, key=lambda one: (-SIZES[one["size"]], [*SETS, ALL].index(one["set"]))):
        if [name for name in ("rank", "epochs", "batch", "method") if one[name] != USUAL[name]] != [of] * bool(of):
            continue
        it, seeds = judged(one), "" if one["seeds"] == 1 else f" ({one['seeds']} seeds)"
        other = it["cost_usual" if of in UNUSUAL else "cost_before"]
        costs = ["not tried" if math.isnan(x) else f"{100 * x:.1f} %" for x in (it["cost"], other)]
        lines.append(
            f"| {one['size']} | {one['set']}{seeds} | {f'{one[of]} | ' if of else ''}{one['steps']} "
            f"| {it['best']:.2g} | {it['loss']:.3f} | {it['low']:.2g} to {it['high']:.2g} "
            f"| {it['rule']:.2g} | {costs[0]} | {costs[1]} |"
        )
    return lines


def plot(found: Sequence[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "strop", "font.size": 9, "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SETS), figsize=(8.4, 2.8), sharey=True, layout="constrained")
    for panel, name in zip(axes, SETS, strict=True):
        for one in (one for one in found if one["set"] == name and all(one[key] == USUAL[key] for key in KEYS[2:])):
            best, curve = judged(one), one["curve"]
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
