"""Check that the plan chooses the fastest way to train within a memory limit; predicted and measured times of each way.

    python benchmarks/plan_choice.py FOLDER [--only TEXT] [--missing] [--list] [--out FILE]

Random models (3 GB) are written to FOLDER. A setting is a model, a recipe and a memory limit. The ways are the plan's
choice, and by hand 2,048, 1,024, 512 and 256 tokens per micro-batch (at least one row) with as few checkpointed layers
as the limit allows, 2,048 with all layers checkpointed, and for quantized bases no layer or each layer dequantized
once. A way is measured by four steps on random rows in its own process on an idle machine; the fastest step after the
first counts. Only the plan uses the limit, not the runs.
`python -m tests.planning.test_memory` writes the table into docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from measured import child, write
from plan_memory import case, make_model, name_of, random_rows, report_settings

STEPS = 4
TOKENS = 4096  # tokens of a step, all rows at maximum length
SIZES = (2048, 1024, 512, 256)  # tokens per micro-batch
NF4 = {"model.quantization": "nf4"}

# Memory limits, from 0 (the minimum that can be planned) to 1 (no layer is checkpointed).
SETTINGS: list[tuple[dict[str, Any], float]] = [
    (case("demo", 256, 2048), 0.3),
    (case("demo", 256, 2048, **NF4), 0.7),
    (case("llama-49m", 256, 2048), 0.6),
    (case("llama-49m", 512, 2048), 0.15),
    (case("llama-49m", 1024, 2048), 0.3),
    (case("llama-49m", 512, 2048, **NF4), 0.5),
    (case("llama-17m", 512, 2048), 0.3),
    (case("gemma3-58m", 256, 2048), 0.4),
    (case("qwen3-42m", 512, 2048), 0.5),
    (case("qwen3-42m", 256, 2048, **NF4), 0.3),
]


def setting_name(number: int) -> str:
    chosen, share = SETTINGS[number]
    return f"{name_of(chosen)}, {share:.0%} of the way"


def batch_of(chosen: dict[str, Any]) -> dict[str, Any]:
    return {"train.batch_size": TOKENS // chosen["longest"]}


def recipe_of(chosen: dict[str, Any], options: dict[str, Any]) -> Any:
    from strop.config.load import resolve

    settings = {"model.name": "m", "data.train": "d", "data.max_length": chosen["longest"], "model.device": "cpu"}
    return resolve(None, {"model.dtype": "bf16", **batch_of(chosen), **settings, **chosen["options"], **options})


def planned_choice(number: int, limit: int, rate: Any) -> dict[str, Any]:
    """Return the plan's choice as options."""
    from strop.planning.fit import MemoryBudget, default_micro_batch, fit

    chosen = SETTINGS[number][0]
    shape, open_ = report_settings(chosen["model"]).shape, recipe_of(chosen, {})
    budget = MemoryBudget(shape, shape.parameters, limit, 1, lambda _: rate)
    recipe = fit(open_.decide(default_micro_batch(open_.recipe)), budget).recipe
    options = {
        "train.micro_batch_tokens": recipe.train.micro_batch_tokens,
        "train.gradient_checkpointing": recipe.train.gradient_checkpointing,
    }
    return options | ({} if "model.quantization" not in chosen["options"] else
                      {"model.resident_layers": recipe.model.resident_layers})  # fmt: skip


def predict_seconds(number: int, options: dict[str, Any], rate: Any) -> float:
    """Return the predicted seconds per token."""
    from strop.planning.microbatch import mean_micro_batch
    from strop.planning.time import tokens_per_s
    from strop.planning.workload import Workload

    chosen = SETTINGS[number][0]
    recipe = recipe_of(chosen, options).recipe
    workload = Workload.from_recipe(recipe, report_settings(chosen["model"]).shape)
    return 1 / tokens_per_s(workload, mean_micro_batch(recipe), rate)


def setting_at(number: int, rate: Any) -> dict[str, Any]:
    """Return a setting, its limit, and the ways that fit: the plan's choice first."""
    from strop.planning.fit import MemoryBudget
    from strop.planning.workload import Workload

    chosen, share = SETTINGS[number]
    shape, quantized = report_settings(chosen["model"]).shape, "model.quantization" in chosen["options"]

    def way(size: int, again: Any, resident: int | None) -> dict[str, Any]:
        options = {"train.micro_batch_tokens": size, "train.gradient_checkpointing": again}
        return options if resident is None else {**options, "model.resident_layers": resident}

    def need(options: dict[str, Any]) -> int:
        return MemoryBudget(shape, shape.parameters, 1 << 50).needed(recipe_of(chosen, options).recipe)

    most = need(way(SIZES[0], "off", shape.layers if quantized else None))
    least = need(way(max(SIZES[-1], chosen["longest"]), "on", 0 if quantized else None))
    limit = int(least + share * (most - least))
    budget, result = MemoryBudget(shape, shape.parameters, limit), [planned_choice(number, limit, rate)]
    for size in (size for size in SIZES if size >= chosen["longest"]):
        for resident in (0, shape.layers) if quantized else (None,):
            layers = budget.min_checkpointed(recipe_of(chosen, way(size, "off", resident)).recipe)
            most_again = {shape.layers} if size == SIZES[0] else set()
            for again in sorted({layers, *most_again} if layers is not None else ()):
                one = way(size, "off" if again == 0 else "on" if again == shape.layers else again, resident)
                if need(one) <= limit and one not in result:
                    result.append(one)
    compute = Workload.from_recipe(recipe_of(chosen, result[0]).recipe, shape).compute
    about = {"tiles": compute.attention_tiles, "own_products": compute.bf16_head_kernel}
    return {"name": setting_name(number), "limit_bytes": limit, "rate": asdict(rate), **about, "ways": result}


def run(folder: Path, number: int, options: dict[str, Any]) -> float:
    """Return the measured seconds per token."""
    import strop

    chosen = SETTINGS[number][0]
    model = "demo" if chosen["model"] == "demo" else str(make_model(folder, chosen["model"]))
    with tempfile.TemporaryDirectory() as temp:
        rows = Path(temp) / "rows.jsonl"
        settings = {"train.max_steps": STEPS, "model.device": "cpu", **random_rows(rows, chosen), **batch_of(chosen)}
        settings |= chosen["options"]
        strop.train(model=model, data=str(rows), out=f"{temp}/run", **{**settings, **options})
        events = [json.loads(line) for line in (Path(temp) / "run" / "events.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    return min(1 / step["tokens_per_s"] for step in steps[1:])


def compare_ways(one: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    """Return the current choice of the plan, the fastest way, and the error of each predicted time relative to the
    choice.

    Raises LookupError for a choice that was not measured.
    """
    from strop.planning.time import Rate

    number = next(n for n in range(len(SETTINGS)) if setting_name(n) == one["name"])
    rate = Rate(**one["rate"])
    own = one.get("own_products", False)  # missing in older files
    measured_on = SimpleNamespace(has_tiled_attention=lambda _: one["tiles"], has_bf16_matmul=lambda _: own)
    with patch("strop.planning.workload.this_cpu", lambda: measured_on):  # independent of this machine's CPU
        options = planned_choice(number, one["limit_bytes"], rate)
        first = next((way for way in one["ways"] if way["options"] == options), None)
        if first is None:
            raise LookupError(f"{one['name']}: the plan would choose {summarize(options)}, which was not measured")
        own = predict_seconds(number, options, rate) / first["s_a_token"]
        prices = [
            predict_seconds(number, way["options"], rate) / way["s_a_token"] / own - 1
            for way in one["ways"]
            if way is not first
        ]
    return first, min(one["ways"], key=lambda way: way["s_a_token"]), prices


def behind(first: dict[str, Any], best: dict[str, Any]) -> float:
    return float(first["s_a_token"] / best["s_a_token"] - 1)


def loss_of(one: dict[str, Any]) -> float:
    """Return how much longer the plan's choice takes than the fastest measured way."""
    return behind(*compare_ways(one)[:2])


def summarize(options: dict[str, Any]) -> str:
    again, size = options["train.gradient_checkpointing"], options["train.micro_batch_tokens"]
    words = [f"{size:,} tokens", {"on": "all layers again", "off": "none again"}.get(again, f"{again} layers again")]
    if "model.resident_layers" in options:
        words.append(f"{options['model.resident_layers']} dequantized once")
    return ", ".join(words)


def table(results: list[dict[str, Any]]) -> str:
    result = [compare_ways(one) for one in results]
    losses = [behind(first, best) for first, best, _ in result]
    errors = [abs(price) for _, _, prices in result for price in prices]
    lines = [
        f"| {one['name']} | {len(one['ways'])} | {summarize(first['options'])} | {summarize(best['options'])} "
        f"| {loss:+.1%} |"
        for one, (first, best, _), loss in zip(results, result, losses, strict=True)
    ]
    return "\n".join([
        f"{sum(loss <= 0.05 for loss in losses)} of {len(losses)} choices within 5 % of the fastest way that fits, the "
        f"worst {max(losses):.1%} behind it. The price of another way, as planned against measured: median error "
        f"{statistics.median(errors):.1%}, worst {max(errors):.1%}, of {len(errors)} ways.",
        "",
        "| setting | ways that fit | the plan's choice | the fastest | behind it |",
        "|---|---:|---|---|---:|",
        *lines,
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the random models")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--missing", action="store_true", help="only settings that are not in --out yet")
    parser.add_argument("--list", action="store_true", help="say the ways, and measure nothing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(run(args.folder, *args.case)))
        return
    from strop.machine.probe import probe
    from strop.machine.rates import load_rates
    from strop.planning.time import Rate

    rate = Rate.of_cpu(probe(), load_rates(probe(), "cpu"), "bf16")
    previous = json.loads(args.out.read_text("utf-8"))["results"] if args.out and args.out.is_file() else []
    result = {one["name"]: one for one in previous}
    for number in range(len(SETTINGS)):
        name = setting_name(number)
        if args.only not in name or (args.missing and name in result):
            continue
        one = setting_at(number, rate)
        if args.list:
            for options in one["ways"]:
                print(f"{name}: {summarize(options)}: {1e3 * predict_seconds(number, options, rate):.3f} ms a token")
            continue
        words = [sys.executable, __file__, *sys.argv[1:], "--case"]
        one["ways"] = [
            {"options": options, "s_a_token": child([*words, json.dumps([number, options])])} for options in one["ways"]
        ]
        result[name] = one
        print(f"{name}: {loss_of(one):+.1%} of {len(one['ways'])} ways", file=sys.stderr, flush=True)
        if args.out:
            write(args.out, list(result.values()))


if __name__ == "__main__":
    main()
