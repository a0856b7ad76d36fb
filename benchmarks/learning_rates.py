"""Which learning rate is best: by size of the model, rows, rank, epochs, batch and method; and what strop's rule costs.

    python benchmarks/learning_rates.py sweep FOLDER --out benchmarks/results/learning_rates.json [--minutes 60]
    python benchmarks/learning_rates.py table --out benchmarks/results/learning_rates.json [--plot docs/rates.svg]

sweep: runs what is not in the file yet, stage by stage, and renews the file after each run: stop it, and go on with the
same command. FOLDER: for the models and rows that it makes. table: what is in the file, read again, nothing run.

Sizes: SmolLM2-135M-Instruct (`demo`), and the same with 20 and with 12 of its 30 layers (99M and 71M parameters),
healed by a LoRA of rank 64 on the text of Python's own manual, merged (`learners.py`). Rows: SNIPS, the demo's, and
docstrings of the standard library (what does this function do?): 320 to train on, 100 held out.

Loss: cross entropy a supervised token of the held-out rows, as strop evaluates it: of the best checkpoint, which is
what a run hands over (one evaluation an epoch). At each setting the first rates are tried, then more, in factors of 2,
until the best has a worse one on either side. A run that the guard stopped has no loss; `skipped` and `rollbacks` count
what it did in the others.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from learners import SETS, SIZES, make_model, make_rows, parameters
from measured import commit, write

RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
LIMITS = 6e-5, 7e-2  # no rates beyond
USUAL: dict[str, Any] = {"rank": 16, "epochs": 1, "batch": 8, "method": "lora", "seed": 0}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"lora.use_rslora": True},
    "lora+": {"train.lora_plus_ratio": 16},
    "dora": {"lora.use_dora": True},
    "nf4": {"model.quantization": "nf4"},
    "loftq": {"model.quantization": "nf4", "lora.init": "loftq"},
}


class Sweep:
    """The file of results, and how a point that it lacks is run."""

    def __init__(self, folder: Path, out: Path, until: float) -> None:
        self.folder, self.out, self.until = folder, out, until
        self.rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["results"] if out.exists() else []

    def loss(self, setting: dict[str, Any], rate: float) -> float:
        """Infinity for a run that was stopped. Raises TimeoutError where it is not there and the time is up."""
        wanted = {**setting, "rate": rate}
        known = next((row for row in self.rows if wanted.items() <= row.items()), None)
        if known is None:
            if time.monotonic() > self.until:
                raise TimeoutError
            known = {**wanted, **self._run(wanted)}
            self.rows.append(known)
            write(self.out, self.rows)
            print(json.dumps(known), flush=True)
        return math.inf if known["loss"] is None else float(known["loss"])

    def _run(self, at: dict[str, Any]) -> dict[str, Any]:
        import strop
        from strop.runs.events import read_events

        run, started = self.folder / "run", time.perf_counter()
        shutil.rmtree(run, ignore_errors=True)
        options = {
            "data.eval": str(self.folder / f"{at['set']}_held.jsonl"),
            "lora.r": at["rank"], "train.epochs": at["epochs"],
            "train.batch_size": at["batch"], "train.learning_rate": at["rate"], "seed": at["seed"],
            "model.dtype": "bf16", **METHODS[at["method"]],
        }  # fmt: skip
        model = "demo" if at["size"] == "135M" else str(self.folder / at["size"])
        try:
            report = strop.train(
                model=model, data=str(self.folder / f"{at['set']}_train.jsonl"), out=str(run), **options
            ).report
        except strop.RunError as error:
            return {"loss": None, "error": str(error).splitlines()[0], "commit": commit()}
        evals = [event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == "eval"]
        return {
            "loss": report["eval_loss"], "last": evals[-1], "first_train_loss": report["loss"]["first"],
            "steps": report["steps"], "skipped": report["skipped_steps"], "rollbacks": report["rollbacks"],
            "training_s": round(report["seconds"], 1), "wall_s": round(time.perf_counter() - started, 1),
            "commit": commit(),
        }  # fmt: skip

    def search(self, setting: dict[str, Any], rates: Sequence[float]) -> float:
        """The best rate: has a worse one on either side."""
        losses = {rate: self.loss(setting, rate) for rate in sorted(rates)}
        while True:
            best = min(losses, key=lambda rate: losses[rate])
            beyond = [rate for rate in (best / 2, best * 2) if rate not in losses and LIMITS[0] < rate < LIMITS[1]]
            if not beyond:
                return best
            losses |= {rate: self.loss(setting, rate) for rate in beyond}


def around(rate: float, *steps: int) -> list[float]:
    return [rate * 2.0**step for step in steps]


def stages(sweep: Sweep) -> Iterator[str]:
    """Runs a stage between one name and the next; what tells most comes first."""
    best: dict[tuple[str, str], float] = {}
    for size in reversed(SIZES):
        yield f"rates, {size}"
        for name in SETS:
            first = RATES[1:] if size == "135M" else RATES  # the fifth comes last: it takes longest, and tells least
            best[size, name] = sweep.search({"size": size, "set": name, **USUAL}, first)
    changes: dict[str, list[dict[str, Any]]] = {
        "methods": [{"method": method} for method in list(METHODS)[1:]],
        "batches": [{"batch": 2}, {"batch": 32}],
        "ranks": [{"rank": 4}, {"rank": 64}, {"rank": 128}],
        "four epochs": [{"epochs": 4}],
        "two epochs": [{"epochs": 2}],
    }

    def changed(kind: str, size: str, *sets: str) -> None:
        for name, change in product(sets, changes[kind]):
            sweep.search({"size": size, "set": name, **USUAL, **change}, [best[size, name]])

    def three_epochs(*sets: str) -> None:  # strop's default
        for name in sets:
            sweep.search({"size": "135M", "set": name, **USUAL, "epochs": 3}, [best["135M", name] / 2])

    def seeded(size: str) -> None:
        for name, seed in product(SETS, (1, 2)):
            for rate in (best[size, name] / 2, best[size, name], best[size, name] * 2):
                sweep.loss({"size": size, "set": name, **USUAL, "seed": seed}, rate)

    yield "four epochs"
    changed("four epochs", "71M", *SETS)
    yield "three epochs"
    three_epochs("demo")
    for kind in ("methods", "ranks", "batches"):
        yield f"{kind}, first rows"
        changed(kind, "71M", SETS[0])
    yield "seeds, 71M"
    seeded("71M")
    yield "three epochs, other rows"
    three_epochs(*SETS)
    for size in ("135M", "99M"):
        yield f"seeds, {size}"
        seeded(size)
    yield "five rates"
    for name in SETS:
        sweep.search({"size": "135M", "set": name, **USUAL}, RATES)
    for size, kind in product(("71M", "99M"), changes):
        yield f"{kind}, {size}"
        changed(kind, size, *SETS)


def valleys(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each setting with its curve, {rate: loss}: the mean of the seeds, at rates that all of its seeds have. stopped:
    runs in which the guard did anything."""
    keys = ("size", "set", "rank", "epochs", "batch", "method")
    found: dict[tuple[Any, ...], dict[int, dict[float, dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {}).setdefault(row["seed"], {})[row["rate"]] = row
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
        made.append({**dict(zip(keys, setting, strict=True)), **more})
    return made


def loss_at(curve: dict[float, float], rate: float) -> float:
    """Between two rates that were tried, on the line between their losses, by the rate's logarithm."""
    below, above = max(r for r in curve if r <= rate), min(r for r in curve if r >= rate)
    share = 0.0 if below == above else math.log(rate / below) / math.log(above / below)
    return curve[below] if not share else (1 - share) * curve[below] + share * curve[above]


def judged(valley: dict[str, Any]) -> dict[str, Any]:
    """The best rate and its loss, the rates that were tried within 5 % of it, and the rule's rate and what it costs."""
    from strop.planning.rates import learning_rate

    curve = valley["curve"]
    best = min(curve, key=lambda rate: curve[rate])
    within = [rate for rate in curve if curve[rate] <= 1.05 * curve[best]]
    rule = learning_rate(parameters(valley["size"]))
    cost = loss_at(curve, rule) / curve[best] - 1 if min(curve) <= rule <= max(curve) else None
    return {"best": best, "loss": curve[best], "low": min(within), "high": max(within), "rule": rule, "cost": cost}


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = ["| size | rows | rank | epochs | rows a step | method | steps | seeds | best rate | its loss "
             "| within 5 % | the rule costs |", "|" + "---|" * 12]  # fmt: skip
    for one in sorted(
        found, key=lambda one: (one["method"], one["epochs"], one["rank"], one["batch"], -SIZES[one["size"]])
    ):
        it = judged(one)
        cost = "not tried" if it["cost"] is None else f"{100 * it['cost']:.1f} %"
        lines.append(
            f"| {one['size']} | {one['set']} | {one['rank']} | {one['epochs']} | {one['batch']} | {one['method']} "
            f"| {one['steps']} | {one['seeds']} | {it['best']:.2g} | {it['loss']:.3f} "
            f"| {it['low']:.2g} to {it['high']:.2g} | {cost} |"
        )
    return lines


def usual(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings in which nothing but size and rows differs."""
    kept = {name: value for name, value in USUAL.items() if name != "seed"}
    return [one for one in found if kept.items() <= one.items()]


def plot(found: Sequence[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "strop", "font.size": 9, "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SETS), figsize=(8.4, 2.8), sharey=True, layout="constrained")
    for panel, name in zip(axes, SETS, strict=True):
        for one in (one for one in usual(found) if one["set"] == name):
            best, curve = judged(one), one["curve"]
            line = panel.plot(
                list(curve), [loss / best["loss"] for loss in curve.values()], marker=".", label=one["size"]
            )
            if best["cost"] is not None:
                panel.plot([best["rule"]], [1 + best["cost"]], marker="D", color=line[0].get_color(), markersize=6)
        panel.axhline(1.05, color="#b8b8b8", linestyle="--", linewidth=1)
        panel.set(title=name, xlabel="learning rate", xscale="log", ylim=(0.98, 1.6))
    axes[0].set_ylabel("held-out loss, of the best")
    axes[0].legend(title="diamond: strop's rule", frameon=False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running, reading = commands.add_parser("sweep"), commands.add_parser("table")
    running.add_argument("folder", type=Path)
    running.add_argument("--snips", type=Path, default=Path("../shared/data/snips"))
    running.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    reading.add_argument("--plot", type=Path)
    for command in (running, reading):
        command.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "table":
        found = valleys(json.loads(given.out.read_text(encoding="utf-8"))["results"])
        print("\n".join(table(found)))
        if given.plot:
            plot(found, given.plot)
        return
    sweep = Sweep(given.folder, given.out, time.monotonic() + 60 * given.minutes)
    given.folder.mkdir(parents=True, exist_ok=True)
    make_rows(given.folder, given.snips)
    for size in list(SIZES)[1:]:
        if not (given.folder / size / "config.json").is_file():
            make_model(given.folder, size)
    try:
        for stage in stages(sweep):
            print(stage, flush=True)
    except TimeoutError:
        print("the time is up: the same command goes on", flush=True)


if __name__ == "__main__":
    main()
