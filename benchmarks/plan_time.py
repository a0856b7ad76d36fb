"""How long runs take, against what `strop plan` says before them and what the run itself says after 20 steps.

    python benchmarks/plan_time.py FOLDER [--snips train.jsonl] [--only TEXT] [--narrow] [--missing] [--out FILE]

FOLDER gets the random models (3 GB). The machine is measured first, as `strop doctor` does; no case is used in that, so
that none of them was fitted but where it says so. Each case is a process of its own, on rows of different lengths, on a
quiet machine. A small step is timed before and after the machine is measured, and before and after each case (the
median of eight): predictions are scaled by it (`pace`), because a virtual machine's speed drifts by a fifth within
minutes. For the same reason the machine is measured three times, and the middle one counts.
--narrow: as on a CPU without AVX512, whose instructions are hidden, in fp32. The results are kept in --out; `python -m
tests.planning.test_memory` puts them into docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measured import child, write
from plan_memory import (
    AGAIN,
    ATTENTION,
    FP32,
    NARROW,
    PLAIN,
    RESIDENT,
    STREAMED,
    case,
    hide_instructions,
    make_model,
    name_of,
    random_rows,
    setting_of,
)

if TYPE_CHECKING:
    from strop.machine.rates import Rates

DORA_DROPPED = {"lora.use_dora": True, "lora.dropout": 0.05}
RATES, PACES = -1, -2  # in place of a case's number
PACED, TRIES = 8, 3  # times: the median counts
STEPS, FEW = 6, 20  # of random rows; after how many a run's own forecast is looked at

CASES: list[dict[str, Any]] = [
    {"model": "demo", "data": "demo", "options": {}, "steps": 60},
    {"model": "demo", "data": "snips", "options": {}, "steps": 60},
    {"model": "demo", "data": "demo", "options": RESIDENT, "steps": 20},
    {"model": "demo", "data": "snips", "options": {"lora.dropout": 0.05}, "steps": 20},
    {"model": "demo", "data": "demo", "options": {**FP32}, "steps": 10},
    {"model": "demo", "data": "demo", "options": {**DORA_DROPPED}, "steps": 10, "fitted": True},
    {"model": "demo", "data": "demo", "options": {**PLAIN}, "steps": 10},
    case("demo", 256, 512),
    case("demo", 512, 1024),
    case("demo", 1024, 2048, **AGAIN),
    case("demo", 512, 512, **STREAMED),
    case("demo", 512, 1024, fitted=True, **{"lora.r": 128}),
    case("demo", 512, 512, **ATTENTION, **{"lora.r": 8}),
    case("demo", 256, 512, **{"lora.use_dora": True}),
    case("llama-17m", 512, 2048),
    case("llama-49m", 512, 2048),
    case("llama-49m", 128, 512),
    case("llama-49m", 512, 2048, **AGAIN),
    case("llama-49m", 512, 1024, **FP32),
    case("llama-49m", 512, 1024, **PLAIN),
    case("llama-49m", 512, 1024, **{"lora.r": 64}),
    case("qwen3-42m", 512, 2048),
    case("qwen3-125m", 512, 1024),
    case("qwen3-596m", 256, 512),
    case("gemma3-58m", 512, 1024),
]
NARROW_CASES = [0, 7, 8, 15, 16, 17, 18, 22, 24]  # of CASES


def run(folder: Path, case: dict[str, Any], snips: Path | None) -> dict[str, Any]:
    import strop
    from strop.config.load import resolve
    from strop.demo import data_files
    from strop.planning.microbatch import row_sizes

    model = case["model"] if case["model"] == "demo" else str(make_model(folder, case["model"]))
    with tempfile.TemporaryDirectory() as temp:
        rows = Path(temp) / "rows.jsonl"
        options: dict[str, Any] = {"train.max_steps": case.get("steps", STEPS), "model.device": "cpu"}
        if "data" in case:
            rows = data_files()[0] if case["data"] == "demo" else snips or rows
        else:
            options |= random_rows(rows, case)
        given = {**options, **case["options"]}
        before = pace(case)
        report = strop.train(model=model, data=str(rows), out=f"{temp}/run", **given).report
        events = [json.loads(line) for line in (Path(temp) / "run" / "events.jsonl").read_text("utf-8").splitlines()]
        kept = ("model.", "lora.", "train.", "data.")
        recipe = {one["field"]: one["value"] for one in report["recipe"] if one["field"].startswith(kept)}
        sizes = row_sizes(resolve(None, recipe).recipe)
    steps = [event for event in events if event["event"] == "step"]
    took = [(new["tokens"] - old["tokens"]) / new["tokens_per_s"] for old, new in pairwise(steps)]
    found: dict[str, Any] = {
        "name": name_of(case),
        "recipe": {name: recipe[name] for name in recipe if name.startswith(("model.", "lora.", "train."))},
        "rows": list(sizes),
        "prefix": sizes.prefix,
        "tiles": setting_of(case["model"], recipe).compute.attention_tiles,
        "own_products": setting_of(case["model"], recipe).compute.own_head_matmul,
        "step": setting_of(case["model"], recipe).compute.step,
        "seconds_a_step": statistics.fmean(took),
        "pace": (before + pace(case)) / 2,
    }
    if len(steps) > 2 * FEW:
        after = steps[FEW - 1]
        whole = steps[-1]["time"] - steps[0]["time"]
        found["forecast_of_rest"] = after["seconds_left"]
        found["rest"], found["whole"] = steps[-1]["time"] - after["time"], whole
    return found


def pace(case: dict[str, Any]) -> float:
    """Of a small step, now: other guests of the host make a machine slower and faster from one minute to the next."""
    import torch

    from strop.planning.calibrate import pace

    dtype = torch.float32 if "model.dtype" in case["options"] else torch.bfloat16
    return statistics.median(pace(dtype) for _ in range(PACED))


def predicted(found: dict[str, Any]) -> float:
    """Seconds a step, as the formulas say now."""
    from strop.config.load import resolve
    from strop.planning.microbatch import Rows, first_steps
    from strop.planning.time import Rate, steps_seconds

    setting = setting_of(found["name"].partition(",")[0], found["recipe"])
    own = found.get("own_products", False)  # files of before have none
    step = found.get("step", setting.compute.step)
    setting = setting.replace(attention_tiles=found["tiles"], step=step, own_head_matmul=own)
    rows = Rows(map(tuple, found["rows"]))
    rows.prefix = found["prefix"]
    recipe = resolve(None, {**found["recipe"], "model.name": "m", "data.train": "d"}).recipe
    steps = first_steps(recipe, rows, step == "fast")
    return found["pace"] / found["pace_then"] * steps_seconds(setting, steps, Rate(**found["rate"])) / len(steps)


def error_of(found: dict[str, Any]) -> float:
    return predicted(found) / found["seconds_a_step"] - 1


def unscaled(found: dict[str, Any]) -> float:
    """The error of what `strop plan` itself says, which knows nothing of what the machine does later."""
    return (1 + error_of(found)) * found["pace_then"] / found["pace"] - 1


def later_error(found: dict[str, Any]) -> float:
    """Of what the run says after FEW steps, of the whole."""
    return (found["forecast_of_rest"] - found["rest"]) / found["whole"]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: measured figures beside what the formulas say now."""
    lines = [
        f"| {one['name']}{', plain step' if one.get('step') == 'plain' else ''}"
        f"{', without AVX512' if one['narrow'] else ''} | {'fitted' if one['fitted'] else ''} "
        f"| {predicted(one):.2f} "
        f"| {one['seconds_a_step']:.2f} | {error_of(one):+.1%} |"
        for one in results
    ]
    sizes = [abs(error_of(one)) for one in results if not one["fitted"]]
    plain = [abs(unscaled(one)) for one in results if not one["fitted"]]
    told = f"median error {statistics.median(sizes):.1%}, worst {max(sizes):.1%}"
    told += f"; not scaled {statistics.median(plain):.1%} and {max(plain):.1%}"
    said = f"{len(sizes)} runs that nothing was fitted on: {told}."
    later = [f"{one['name']} {later_error(one):+.1%}" for one in results if "rest" in one]
    told = f"Forecasts of runs after {FEW} steps, compared with their whole time: {'; '.join(later)}."
    head = ["| run | | predicted, s a step | measured | error |", "|---|---|---:|---:|---:|"]
    return "\n".join([said, "", told, "", *head, *lines, ""])


def machine(measured: Callable[[int], Any]) -> tuple[Rates, dict[str, float]]:
    """What `strop doctor` finds, and a small step's time around it, by type: of three tries the middle one, by its
    products as if a step took the same time in each. The step is timed in processes of its own: behind a measuring it
    is faster than in a run's process."""
    from strop.machine.rates import Rates

    tries = []
    for _ in range(TRIES):
        before, found, after = measured(PACES), measured(RATES), measured(PACES)
        tries.append((found, {name: (before[name] + after[name]) / 2 for name in before}))
    tries.sort(key=lambda one: one[0]["bf16_flops"] * one[1]["bf16"])
    found, paces = tries[TRIES // 2]
    return Rates(**found), paces


def of_machine(one: dict[str, Any], rates: Rates, paces: dict[str, float]) -> dict[str, Any]:
    from strop.planning.time import Rate

    dtype = one["recipe"]["model.dtype"]
    return {"rate": asdict(Rate.measured(rates, dtype)), "pace_then": paces[dtype]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the random models")
    parser.add_argument("--snips", type=Path, help="rows of messages, as long as SNIPS'")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--machine", action="store_true", help="measure the machine again, for the runs in --out")
    parser.add_argument("--missing", action="store_true", help="only cases that are not in --out yet")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        if given.narrow:
            hide_instructions()
        if given.case < 0:
            from strop.machine.probe import probe
            from strop.planning.calibrate import measure_rates, save_rates

            if given.case == PACES:
                found = {name: pace({"options": options}) for name, options in (("bf16", {}), ("fp32", FP32))}
            else:
                rates = measure_rates()
                save_rates(probe(), "cpu", rates)  # runs choose by them
                found = asdict(rates)
            print(json.dumps(found))
            return
        if given.narrow:
            CASES[given.case]["options"] = {**FP32, **CASES[given.case]["options"]}
        print(json.dumps(run(given.folder, CASES[given.case], given.snips)))
        return
    kept: list[dict[str, Any]] = (
        json.loads(given.out.read_text("utf-8"))["results"] if given.out and given.out.is_file() else []
    )
    found = {(one["name"], one["narrow"]): one for one in kept}

    def measured(number: int) -> dict[str, Any]:
        hidden = {**NARROW, "STROP_CACHE": str(given.folder / "narrow-cache")} if given.narrow else {}
        return child([sys.executable, __file__, *sys.argv[1:], "--case", str(number)], hidden)

    rates, paces = machine(measured)
    if given.machine:
        write(given.out, [{**one, **of_machine(one, rates, paces)} for one in kept])
        return
    for number in NARROW_CASES if given.narrow else range(len(CASES)):
        name = name_of(CASES[number])
        if given.missing and (name, given.narrow) in found:
            continue
        if given.only not in name or (CASES[number].get("data") == "snips" and given.snips is None):
            continue
        try:
            one = measured(number)
        except RuntimeError as error:
            print(f"{name}: {str(error)[-600:]}", file=sys.stderr)
            continue
        one = found[name, given.narrow] = {**one, "name": name, "narrow": given.narrow, **of_machine(one, rates, paces)}
        one["fitted"] = bool(CASES[number].get("fitted"))
        print(f"{name}: {error_of(one):+.1%} of {one['seconds_a_step']:.2f} s", file=sys.stderr)
        if given.out:
            write(given.out, list(found.values()))


if __name__ == "__main__":
    main()
