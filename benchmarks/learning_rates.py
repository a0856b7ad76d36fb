"""Find the best learning rate by model size, rows, rank, epochs, batch size and method, and the cost of strop's rule.

    python benchmarks/learning_rates.py sweep FOLDER --out benchmarks/results/learning_rates.json [--minutes 60]
    python benchmarks/learning_rates.py table --out benchmarks/results/learning_rates.json [--plot docs/rates.svg]

sweep: runs all points that are missing in the file, stage by stage, and updates the file after each run, so that the
same command resumes it. FOLDER: for the generated models and rows. table: prints the results without running anything.

Sizes: SmolLM2-135M-Instruct (`demo`), and the same with 20 and with 12 of its 30 layers (99M and 71M parameters),
trained further with a LoRA of rank 64 on the Python manual and merged (`learners.py`). Rows: SNIPS, the demo's, and
docstrings of the standard library: 320 for training, 100 held out.

Loss: cross entropy per supervised token of the held-out rows at the best checkpoint, with one evaluation per epoch.
Each setting starts with a few rates and adds more, in factors of 2, until the best has a worse one on either side. A
run that the guard stopped has no loss; `skipped` and `rollbacks` count the guard's actions in the others.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from learners import ALL, SETS, SIZES, make_model, make_rows, parameters
from measured import commit, machine, write
from valleys import KEYS, RATES, UNUSUAL, USUAL, plot, table, valleys

LIMITS = 6e-5, 7e-2  # limits of the rates
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"lora.use_rslora": True},
    "lora+": {"train.lora_plus_ratio": 16},
    "dora": {"lora.use_dora": True},
    "nf4": {"model.quantization": "nf4"},
    "loftq": {"model.quantization": "nf4", "lora.init": "loftq"},
    "alpha 16": {"lora.alpha": 16},
    "alpha 64": {"lora.alpha": 64},
}


class Sweep:
    """The file of results, and a function that runs a missing point."""

    def __init__(self, folder: Path, out: Path, until: float) -> None:
        self.folder, self.out, self.until = folder, out, until
        self.rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["results"] if out.exists() else []

    def loss(self, setting: dict[str, Any], rate: float) -> float:
        """Return the loss, infinity for a stopped run. Raises TimeoutError if it is missing and the time is up."""
        point = {**setting, "rate": rate}
        known = next((row for row in self.rows if point.items() <= row.items()), None)
        if known is None:
            if time.monotonic() > self.until:
                raise TimeoutError
            known = {**point, **self._run(point)}
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
            return {"loss": None, "error": str(error).splitlines()[0], "commit": commit(), "cpu": machine()["cpu"]}
        evals = [event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == "eval"]
        return {
            "loss": report["eval_loss"], "last": evals[-1], "first_train_loss": report["loss"]["first"],
            "steps": report["steps"], "skipped": report["skipped_steps"], "rollbacks": report["rollbacks"],
            "training_s": round(report["seconds"], 1), "wall_s": round(time.perf_counter() - started, 1),
            "commit": commit(), "cpu": machine()["cpu"],
        }  # fmt: skip

    def search(self, setting: dict[str, Any], rates: Sequence[float]) -> float:
        """Return the best rate, which has a worse one on either side."""
        losses = {rate: self.loss(setting, rate) for rate in sorted(rates)}
        while True:
            best = min(losses, key=lambda rate: losses[rate])
            beyond = [rate for rate in (best / 2, best * 2) if rate not in losses and LIMITS[0] < rate < LIMITS[1]]
            if not beyond:
                return best
            losses |= {rate: self.loss(setting, rate) for rate in beyond}


def neighbouring_rates(rate: float, *steps: int) -> list[float]:
    return [rate * 2.0**step for step in steps]


def run_stages(sweep: Sweep) -> Iterator[str]:
    """Run the settings stage by stage, most informative first."""
    from strop.planning.choose import learning_rate

    best: dict[tuple[str, str], float] = {}
    for size in reversed(SIZES):
        yield f"rates, {size}"
        for name in SETS:
            first = RATES[1:] if size == "135M" else RATES  # a fifth rate for 135M takes longest and shows least
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
            likely = 2.0 ** round(0.75 * math.log2(USUAL["rank"] / change.get("rank", USUAL["rank"])))
            sweep.search({"size": size, "set": name, **USUAL, **change}, [best[size, name] * likely])

    def three_epochs(*sets: str) -> None:  # strop's default
        for name in sets:
            sweep.search({"size": "135M", "set": name, **USUAL, "epochs": 3}, [1e-3, 2e-3])

    def seeded(size: str) -> None:
        for name, seed in product(SETS, (1, 2)):
            for rate in (best[size, name] / 2, best[size, name], best[size, name] * 2):
                sweep.loss({"size": size, "set": name, **USUAL, "seed": seed}, rate)

    yield "several epochs, first rows"
    changed("four epochs", "71M", SETS[0])
    three_epochs(SETS[0])
    yield "the demo's own run"
    sweep.search({"size": "135M", "set": ALL, **USUAL, "epochs": 3}, [1e-3, 2e-3])
    yield "seeds, where rates differ least"
    for seed, rate in product((1, 2), (1e-3, 2e-3, 4e-3)):
        sweep.loss({"size": "135M", "set": "docstrings", **USUAL, "seed": seed}, rate)
    yield "the rule's own rates"
    for size, name in best:
        sweep.loss({"size": size, "set": name, **USUAL}, learning_rate(parameters(size)))
    for kind, size in (("methods", "71M"), ("ranks", "135M"), ("batches", "135M")):
        yield f"{kind}, first rows"
        changed(kind, size, SETS[0])
    for kind in ("ranks", "batches"):
        yield f"{kind}, 71M"
        changed(kind, "71M", *SETS)
    yield "ranks, 99M"  # not used to fit the rules
    changed("ranks", "99M", *SETS[:2])
    yield "seeds, 71M"
    seeded("71M")
    yield "three epochs, other rows"
    three_epochs(*SETS[1:])
    for size in ("135M", "99M"):
        yield f"seeds, {size}"
        seeded(size)
    yield "five rates"
    for name in SETS:
        sweep.search({"size": "135M", "set": name, **USUAL}, RATES)
    for size, kind in product(SIZES, changes):
        yield f"{kind}, {size}"
        changed(kind, size, *SETS)


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
    args = parser.parse_args()
    if args.command == "table":
        result = valleys(json.loads(args.out.read_text(encoding="utf-8"))["results"])
        for of in ("", *KEYS[2:]):
            columns = ["size", "rows", *filter(None, [of]), "steps", "best rate", "loss", "within 5 %", "rule", "costs"]
            print(f"| {' | '.join([*columns, 'the usual rate' if of in UNUSUAL else 'the rule before'])} |")
            print("\n".join(["|" + "---|" * (len(columns) + 1), *table(result, of)]), end="\n\n")
        if args.plot:
            plot(result, args.plot)
        return
    sweep = Sweep(args.folder, args.out, time.monotonic() + 60 * args.minutes)
    args.folder.mkdir(parents=True, exist_ok=True)
    make_rows(args.folder, args.snips)
    for size in list(SIZES)[1:]:
        if not (args.folder / size / "config.json").is_file():
            make_model(args.folder, size)
    try:
        for stage in run_stages(sweep):
            print(stage, flush=True)
    except TimeoutError:
        print("the time is up: the same command goes on", flush=True)


if __name__ == "__main__":
    main()
