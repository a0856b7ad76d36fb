"""Check `strop sweep` on a real model: kills, and sweeps over settings that do not differ.

    python benchmarks/sweep.py --snips FOLDER --work FOLDER --out FILE [--parts whole kills seeds] [--trials 12]
    python benchmarks/sweep.py --out FILE --plot docs/pictures/sweep.svg

Parts: `whole` is a sweep of ranks and learning rates on SNIPS. `kills` is the same sweep, killed --kills times at
random instants with SIGKILL and resumed; its trials, scores and verdict must equal those of `whole`. `seeds` trains one
setting with as many seeds as trials, and scores each model on the selection and the test rows. It then takes random
seeds as settings, and others as seeds of the final check, in 2,000 sweeps: how many find a winner, though there is
none?

The sweeps are in --work, so that a benchmark that was stopped goes on where it was. --task classes trains classifiers
of the intents, which takes a third of the time. --ranks "" compares learning rates alone. The file is updated after
each part.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measured import write
from tests.sweeping.support import progress, without_times

DRAWS = 2000
SETTINGS, SEEDS = 4, 3  # of a simulated sweep


def write_rows(args: argparse.Namespace) -> Path:
    """Return a file with the rows of the task: those of SNIPS, or their texts with their intents."""
    source: Path = args.snips / f"train_{args.rows}.jsonl"
    if args.task == "json":
        return source
    rows = [json.loads(line)["messages"][-2:] for line in source.read_text(encoding="utf-8").splitlines()]
    pairs = [{"text": ask["content"], "label": json.loads(reply["content"])["intent"]} for ask, reply in rows]
    file: Path = args.work / "classes.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return file


def command(args: argparse.Namespace, data: Path, out: Path, over: list[str]) -> list[str]:
    words = [sys.executable, "-m", "strop", "sweep", "--model", args.model, "--data", str(data), "--out", str(out)]
    words += ["--train.objective", "classify"] if args.task == "classes" else ["--metric", "exact_json"]
    words += ["--train.max_steps", str(args.steps)] if args.steps else []
    words += ["--data.template", args.template] if args.template else []
    words += ["--seeds", str(args.seeds), "--resume", *(word for text in over for word in ("--over", text))]
    return words


def run(words: list[str]) -> None:
    subprocess.run(words, check=True)


def state_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "sweep.json").read_text(encoding="utf-8")))


def settings(args: argparse.Namespace) -> list[str]:
    return [f"lora.r={args.ranks}"] * bool(args.ranks) + [f"train.learning_rate={args.rates}"]


def whole(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    folder = args.work / "whole"
    run([*command(args, data, folder, settings(args)), "--trials", str(args.trials)])
    state = state_of(folder)
    rows = {part: state["split"][part]["rows"] for part in ("train", "selection", "test")}
    kept = {name: state[name] for name in ("metric", "trials", "selection", "final", "result")}
    return {"lines": progress(folder), "task": args.task, "steps": args.steps, "rows": rows, **kept}


def kills(args: argparse.Namespace, data: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Kill the sweep --kills times, after random shares of its work, and compare its result with that without kills."""
    folder, chosen = args.work / "killed", random.Random(0)
    words = [*command(args, data, folder, settings(args)), "--trials", str(args.trials)]
    mean = before["lines"] // (args.kills + 1)
    killed = 0
    while killed < args.kills:
        process = subprocess.Popen(words)
        limit = progress(folder) + chosen.randint(1, 2 * mean)
        while process.poll() is None and progress(folder) < limit:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    run(words)
    compared = ("trials", "selection", "final", "result")  # the split names files in the folder
    states = [without_times(state_of(args.work / name)) for name in ("whole", "killed")]
    same = all(states[0][name] == states[1][name] for name in compared)
    return {"kills": killed, "same_result": same}


def seeds(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Return how often sweeps of settings that differ only by their seeds find a winner."""
    import numpy as np

    import strop
    from strop.sweeping.select import Candidate, conclude, rank, recommend

    folder = args.work / "seeds"
    number = max(args.trials, SETTINGS + 2 * SEEDS)
    run(command(args, data, folder, [f"seed={','.join(map(str, range(number)))}"]))
    state = state_of(folder)
    metric = "accuracy" if args.task == "classes" else "exact_json"
    files = [folder / "data" / name for name in state["split"]["test"]["files"]]
    selection, test = [], []
    for trial in state["trials"]:
        answers = json.loads((folder / trial["run"] / "answers.json").read_text(encoding="utf-8"))
        selection.append([row["tuned_hit"] for row in answers["samples"]])
        result = strop.evaluate(folder / trial["run"] / "adapter", files, metric=metric)
        test.append([row["tuned_hit"] for row in result["samples"]])
    chosen, verdicts = random.Random(0), dict[str, int]()
    for _ in range(DRAWS):
        order = chosen.sample(range(number), SETTINGS + 2 * SEEDS)
        candidates = [
            Candidate({"x": i}, (i,), np.array(selection[seed], np.float64), 1.0, (1.0, 1.0, 1.0))
            for i, seed in enumerate(order[:SETTINGS])
        ]
        winner = recommend(rank(candidates), candidates[0])
        runs = [
            {"name": f"{side}-{i // 2}", "state": "finished", "hits": "".join(str(int(hit)) for hit in test[seed])}
            for i, seed in enumerate(order[SETTINGS:])
            for side in (("default", "chosen")[i % 2],)
        ]
        kept = winner is candidates[0]
        about = {"is_default": kept, "has_default": True, "cheaper": False}
        verdict = conclude(about, [run for run in runs if not kept or run["name"].startswith("default")])["verdict"]
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
    scores = {"selection": np.mean(selection, 1).tolist(), "test": np.mean(test, 1).tolist()}
    return {"verdict": state["result"]["verdict"], "scores": scores, "draws": DRAWS, "simulated": verdicts}


def plot(state: dict[str, Any], out: Path) -> None:
    """Draw the score of each trial with its interval, over the learning rate, and both test scores."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "strop", "font.size": 9, "svg.fonttype": "none"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.1), sharey=True, width_ratios=(3, 1))
    trials = [trial for trial in state["trials"] if trial["state"] == "finished" and trial["same_as"] is None]
    standing = {number: entry["standing"] for entry in state["selection"]["ranking"] for number in entry["trials"]}
    ranks = sorted({trial["setting"]["lora.r"] for trial in trials})
    for trial in trials:
        x, score = trial["setting"]["train.learning_rate"], trial["score"]
        color = "#b4560f" if trial["number"] == 0 else "#7a8499" if standing[trial["number"]] == "worse" else "#0b7a66"
        left.plot([x, x], [100 * trial["low"], 100 * trial["high"]], color=color, linewidth=1)
        marker = "osD^v"[ranks.index(trial["setting"]["lora.r"]) % 5]
        left.plot([x], [100 * score], marker, color=color, markersize=6)
    for rank in ranks:
        left.plot([], [], "osD^v"[ranks.index(rank) % 5], color="#5f6470", label=f"r {rank}")
    for color, text in (("#b4560f", "default"), ("#0b7a66", "equal to the best"), ("#7a8499", "worse")):
        left.plot([], [], color=color, label=text)
    left.set(xscale="log", xlabel="learning rate", ylabel=f"{state['metric']}, %", title="trials, on selection rows")
    left.legend(frameon=False, fontsize=8, loc="upper left")
    for x, (side, score) in enumerate(state["result"]["test"].items()):
        color = "#b4560f" if side == "default" else "#0b7a66"
        right.plot([x, x], [100 * score["low"], 100 * score["high"]], color=color, linewidth=1)
        right.plot([x], [100 * score["value"]], "o", color=color, markersize=6)
    names = list(state["result"]["test"])
    right.set(xlim=(-0.6, len(names) - 0.4), title="new seeds, on test rows")
    right.set_xticks(range(len(names)), names)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snips", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--parts", nargs="+", choices=("whole", "kills", "seeds"), default=["whole", "kills", "seeds"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--template", help="data.template, for a base model without one")
    parser.add_argument("--task", choices=("json", "classes"), default="json")
    parser.add_argument("--rows", choices=("350", "700"), default="700")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--ranks", default="8,16,32")
    parser.add_argument("--rates", default="1e-4..1e-3")
    args = parser.parse_args()
    results = json.loads(args.out.read_text(encoding="utf-8"))["results"] if args.out.is_file() else {}
    if args.plot:
        plot(results["whole"], args.plot)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    data = write_rows(args)
    for part in args.parts:
        if part not in results:
            done = {"whole": whole, "seeds": seeds}[part](args, data) if part != "kills" else None
            results[part] = done or kills(args, data, results["whole"])
            write(args.out, results, optuna=version("optuna"))
    for part, result in results.items():
        shown = {"verdict": result["result"]["sentence"]} if part == "whole" else result
        print(part, json.dumps({key: value for key, value in shown.items() if key != "scores"}))


if __name__ == "__main__":
    main()
