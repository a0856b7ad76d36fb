"""Measure the time of runs next to the predictions of `strop plan` and of the run itself after 20 steps.

    python benchmarks/plan_time.py FOLDER [--snips train.jsonl] [--only TEXT] [--narrow] [--missing] [--out FILE]

Random models (3 GB) are written to FOLDER. The machine is measured first, as `strop doctor` does. No case is used in
that, so predictions are not fitted on a case unless it is marked so. Each case runs in its own process on rows of
different lengths, on an idle machine. The median of eight small steps is measured before and after measuring the
machine, and before and after each case (`pace`); predictions are scaled by it, because the speed of a virtual machine
drifts by a fifth within minutes. For the same reason the machine is measured three times, and the median is used.
--narrow: as on a CPU without AVX512, whose instructions are hidden, in fp32. Results are stored in --out; `python -m
tests.planning.test_memory` writes them into docs/plan.md.
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
RATES, PACES = -1, -2  # instead of the number of a case
PACED, TRIES = 8, 3  # repetitions, of which the median is used
STEPS, FEW = 6, 20  # steps on random rows, and steps before the run's forecast is read

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
NARROW_CASES = [0, 7, 8, 15, 16, 17, 18, 22, 24]  # indices of CASES


def run(folder: Path, case: dict[str, Any], snips: Path | None) -> dict[str, Any]:
    import strop
    from strop.config.load import resolve
    from strop.demo import data_files
    from strop.planning.microbatch import measure_rows

    model = case["model"] if case["model"] == "demo" else str(make_model(folder, case["model"]))
    with tempfile.TemporaryDirectory() as temp:
        rows = Path(temp) / "rows.jsonl"
        options: dict[str, Any] = {"train.max_steps": case.get("steps", STEPS), "model.device": "cpu"}
        if "data" in case:
            rows = data_files()[0] if case["data"] == "demo" else snips or rows
        else:
            options |= random_rows(rows, case)
        settings = {**options, **case["options"]}
        before = measure_pace(case)
        report = strop.train(model=model, data=str(rows), out=f"{temp}/run", **settings).report
        events = [json.loads(line) for line in (Path(temp) / "run" / "events.jsonl").read_text("utf-8").splitlines()]
        prefixes = ("model.", "lora.", "train.", "data.")
        recipe = {one["field"]: one["value"] for one in report["recipe"] if one["field"].startswith(prefixes)}
        sizes = measure_rows(resolve(None, recipe).recipe)
    steps = [event for event in events if event["event"] == "step"]
    took = [(new["tokens"] - old["tokens"]) / new["tokens_per_s"] for old, new in pairwise(steps)]
    result: dict[str, Any] = {
        "name": name_of(case),
        "recipe": {name: recipe[name] for name in recipe if name.startswith(("model.", "lora.", "train."))},
        "rows": list(sizes),
        "prefix": min((length for _, length in sizes.prefixes), default=0),  # that all rows share
        "tiles": setting_of(case["model"], recipe).compute.attention_tiles,
        "own_products": setting_of(case["model"], recipe).compute.bf16_head_kernel,
        "step": setting_of(case["model"], recipe).compute.step,
        "seconds_a_step": statistics.fmean(took),
        "pace": (before + measure_pace(case)) / 2,
    }
    if len(steps) > 2 * FEW:
        after = steps[FEW - 1]
        whole = steps[-1]["time"] - steps[0]["time"]
        result["forecast_of_rest"] = after["seconds_left"]
        result["rest"], result["whole"] = steps[-1]["time"] - after["time"], whole
    return result


def measure_pace(case: dict[str, Any]) -> float:
    """Return the seconds of a small step now. Other guests of the host change the machine's speed within minutes."""
    import torch

    from strop.planning.calibrate import measure_step

    dtype = torch.float32 if "model.dtype" in case["options"] else torch.bfloat16
    return statistics.median(measure_step(dtype) for _ in range(PACED))


def predict_seconds(result: dict[str, Any]) -> float:
    """Return the currently predicted seconds per step."""
    from strop.config.load import resolve
    from strop.planning.microbatch import Rows, first_steps
    from strop.planning.time import Rate, steps_seconds

    setting = setting_of(result["name"].partition(",")[0], result["recipe"])
    own = result.get("own_products", False)  # missing in older files
    step = result.get("step", setting.compute.step)
    setting = setting.replace(attention_tiles=result["tiles"], step=step, bf16_head_kernel=own)
    rows = Rows(map(tuple, result["rows"]))
    rows.prefixes = [(0, result["prefix"])] * len(rows)
    recipe = resolve(None, {**result["recipe"], "model.name": "m", "data.train": "d"}).recipe
    steps = first_steps(recipe, rows, step == "fast")
    return result["pace"] / result["pace_then"] * steps_seconds(setting, steps, Rate(**result["rate"])) / len(steps)


def error_of(result: dict[str, Any]) -> float:
    return predict_seconds(result) / result["seconds_a_step"] - 1


def unscaled_error(result: dict[str, Any]) -> float:
    """Return the error of `strop plan`, which does not know later changes of the machine's speed."""
    return (1 + error_of(result)) * result["pace_then"] / result["pace"] - 1


def forecast_error(result: dict[str, Any]) -> float:
    """Return the error of the run's prediction after FEW steps, relative to the whole run."""
    return (result["forecast_of_rest"] - result["rest"]) / result["whole"]


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of measured and currently predicted times."""
    lines = [
        f"| {one['name']}{', plain step' if one.get('step') == 'plain' else ''}"
        f"{', without AVX512' if one['narrow'] else ''} | {'fitted' if one['fitted'] else ''} "
        f"| {predict_seconds(one):.2f} "
        f"| {one['seconds_a_step']:.2f} | {error_of(one):+.1%} |"
        for one in results
    ]
    sizes = [abs(error_of(one)) for one in results if not one["fitted"]]
    plain = [abs(unscaled_error(one)) for one in results if not one["fitted"]]
    forecasts = f"median error {statistics.median(sizes):.1%}, worst {max(sizes):.1%}"
    forecasts += f"; not scaled {statistics.median(plain):.1%} and {max(plain):.1%}"
    summary = f"{len(sizes)} runs that nothing was fitted on: {forecasts}."
    later = [f"{one['name']} {forecast_error(one):+.1%}" for one in results if "rest" in one]
    forecasts = f"Forecasts of runs after {FEW} steps, compared with their whole time: {'; '.join(later)}."
    head = ["| run | | predicted, s a step | measured | error |", "|---|---|---:|---:|---:|"]
    return "\n".join([summary, "", forecasts, "", *head, *lines, ""])


def machine(measured: Callable[[int], Any]) -> tuple[Rates, dict[str, float]]:
    """Return the result of `strop doctor` and the time of a small step around it by dtype: the median of three
    measurements.

    The median is by the matmul rate at equal step times. The step runs in separate processes, because it is faster
    after a measurement than in the process of a run.
    """
    from strop.machine.rates import Rates

    tries = []
    for _ in range(TRIES):
        before, result, after = measured(PACES), measured(RATES), measured(PACES)
        tries.append((result, {name: (before[name] + after[name]) / 2 for name in before}))
    tries.sort(key=lambda one: one[0]["bf16_flops"] * one[1]["bf16"])
    result, paces = tries[TRIES // 2]
    return Rates(**result), paces


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
    args = parser.parse_args()
    if args.case is not None:
        if args.narrow:
            hide_instructions()
        if args.case < 0:
            from strop.machine.probe import probe
            from strop.planning.calibrate import measure_rates, save_rates

            if args.case == PACES:
                result = {name: measure_pace({"options": options}) for name, options in (("bf16", {}), ("fp32", FP32))}
            else:
                rates = measure_rates()
                save_rates(probe(), "cpu", rates)  # runs use them for their choices
                result = asdict(rates)
            print(json.dumps(result))
            return
        if args.narrow:
            CASES[args.case]["options"] = {**FP32, **CASES[args.case]["options"]}
        print(json.dumps(run(args.folder, CASES[args.case], args.snips)))
        return
    previous: list[dict[str, Any]] = (
        json.loads(args.out.read_text("utf-8"))["results"] if args.out and args.out.is_file() else []
    )
    result = {(one["name"], one["narrow"]): one for one in previous}

    def measured(number: int) -> dict[str, Any]:
        hidden = {**NARROW, "STROP_CACHE": str(args.folder / "narrow-cache")} if args.narrow else {}
        return child([sys.executable, __file__, *sys.argv[1:], "--case", str(number)], hidden)

    rates, paces = machine(measured)
    if args.machine:
        write(args.out, [{**one, **of_machine(one, rates, paces)} for one in previous])
        return
    for number in NARROW_CASES if args.narrow else range(len(CASES)):
        name = name_of(CASES[number])
        if args.missing and (name, args.narrow) in result:
            continue
        if args.only not in name or (CASES[number].get("data") == "snips" and args.snips is None):
            continue
        try:
            one = measured(number)
        except RuntimeError as error:
            print(f"{name}: {str(error)[-600:]}", file=sys.stderr)
            continue
        one = result[name, args.narrow] = {**one, "name": name, "narrow": args.narrow, **of_machine(one, rates, paces)}
        one["fitted"] = bool(CASES[number].get("fitted"))
        print(f"{name}: {error_of(one):+.1%} of {one['seconds_a_step']:.2f} s", file=sys.stderr)
        if args.out:
            write(args.out, list(result.values()))


if __name__ == "__main__":
    main()
