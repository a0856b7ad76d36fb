"""Figures in the README and the pages equal those in the stored benchmark results.

SAID: texts of a page that are generated from a result file. Any other text that looks like a measurement must be in
NOT_MEASURED, with the reason. An outdated or unexplained figure fails the test.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from tests import ROOT
from tests.support.scripts import script

RESULTS = ROOT / "benchmarks" / "results"
GIB, MIB = 1 << 30, 1 << 20


def load_results(name: str) -> Any:
    """Return a stored benchmark result with machine, date, versions and commit."""
    result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    if name == "faults.json":  # a date and a machine for each kind of fault
        assert all(result[fault]["date"] and result[fault]["machine"] for fault in result if fault != "peer")
        return result
    assert result["commit"] and result["date"] and result["machine"]["cpu"] and result["versions"]["torch"], name
    return result["results"]


def words(page: str) -> str:
    """Return the text of a page without code blocks and bold type."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)
    lines = (line for line in text.splitlines() if not line.startswith("    "))
    return " ".join("\n".join(lines).replace("**", "").split())


def demo(results: Any) -> tuple[str, str]:
    """Return the score and its interval of a newcomer's run."""
    low, high = results["intervals"]["tuned"]
    return f"{100 * results['evaluation']['tuned']['exact_json']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}"


def memory(results: Any) -> tuple[str, str, int]:
    """Return the median error, the largest error and the number of runs on which nothing was fitted."""
    error_of = script(ROOT / "benchmarks" / "plan_memory.py").error_of
    errors = [100 * abs(error_of(run)) for run in results if not run["fitted"]]
    return f"{statistics.median(errors):.1f} %", f"{max(errors):.1f} %", len(errors)


def memory_without_amx(results: Any) -> list[str]:
    """Return the errors by the size of the model, and without AVX512."""
    benchmark = script(ROOT / "benchmarks" / "plan_memory.py")
    errors: dict[str, list[float]] = {"large": [], "small": [], "narrow": []}
    too_much = 0
    for run in results:
        model = run["name"].partition(",")[0]
        is_large = benchmark.report_settings(model).parameters > 100e6
        kind = "narrow" if run["narrow"] else "large" if is_large else "small"
        errors[kind].append(100 * abs(benchmark.error_of(run)))
        too_much = max(too_much, benchmark.predicted_bytes(run) - run["measured_bytes"])
    large, small, narrow = (
        f"median error {statistics.median(of):.1f} %, worst {max(of):.1f} %" for of in errors.values()
    )
    return [
        f"{len(errors['large'])} runs of models from 125 M parameters on: {large}",
        f"{len(errors['small'])} runs of smaller ones: {small}, as up to {too_much / MIB:.0f} MiB too much",
        f"{len(errors['narrow'])} runs as on a CPU without AVX512: {narrow}",
    ]


def family_row(name: str, results: Any) -> str:
    return f"| {name} | {results['fast']:.0f} | {results['plain']:.0f} | {results['times']:.1f} |"


def step_rows(results: Any) -> list[str]:
    """Return rows of tokens/s, share of the FLOP floor, peak memory and loss."""
    return [
        f"| {speed(results, name)} | {floor(results, name)} | {one['peak_rss_bytes'] / GIB:.1f} GiB "
        f"| {one['mean_loss']:.2f} |"
        for name, one in results.items()
    ]


def whole_commands(results: Any) -> str:
    tools = [name for name in results["rounds"][0] if name != "ratio"]
    rates = {name: sorted(one[name]["tokens_per_s"] for one in results["rounds"]) for name in tools}
    starts = [statistics.median(one[name]["start_s"] for one in results["rounds"]) for name in rates]
    (low, *_, high), (least, *_, most) = rates.values()
    begin, end = results["interval"]
    return (
        f"strop {low:.0f} to {high:,.0f} tokens/s, Unsloth {least:.0f} to {most:.0f}: {results['ratio']:.2f} times "
        f"(median of the rounds' ratios; 95 % interval {begin:.2f} to {end:.2f}). The commands with one step take "
        f"{starts[0]:.1f} and {starts[1]:.1f} s"
    )


def start_rows(results: Any) -> list[str]:
    """Return rows of the seconds of each part of a first and a later start."""
    first, later = results["first"], results["later"]
    return [
        f"| {output} | {first[name]:.1f} | {later[name]:.1f} |"
        for name, output in (("libraries", "libraries"), ("model and data", "model, data, kernels"),
                           ("begins", "the first step begins"), ("first step", "the first step"))
    ]  # fmt: skip


def scores(results: Any) -> list[str]:
    *_, bits, nf4, int8 = script(ROOT / "benchmarks" / "quantized_scores.py").table(results).splitlines()
    return [bits, nf4, int8]


def of_scheme(results: Any, scheme: str, name: str = "exact_json") -> float:
    return statistics.fmean(one["tuned"][name] for one in results if one["scheme"] == scheme)


def apart(results: Any, scheme: str, name: str = "exact_json") -> float:
    """Return the difference to 16 bit."""
    return of_scheme(results, scheme, name) - of_scheme(results, "none", name)


def quantized_apart(results: Any) -> list[str]:
    valid = [one["tuned"]["valid_json"] for one in results]
    return [
        f"nf4 is {-100 * apart(results, 'nf4'):.1f} points below 16 bit in the mean and int8 "
        f"{100 * apart(results, 'int8'):.1f} above it",
        f"In loss nf4 is {apart(results, 'nf4', 'loss'):.3f} above 16 bit",
        f"Valid JSON: {100 * min(valid):.1f} to {100 * max(valid):.0f} %",
    ]


def quantized_in_short(results: Any) -> list[str]:
    nf4, bits = (100 * of_scheme(results, scheme) for scheme in ("nf4", "none"))
    return [
        f"{nf4:.1f} % exact answers in the mean of three seeds, 16 bit {bits:.1f} %",
        f"differ by {apart(results, 'nf4', 'loss'):.3f} in loss on SNIPS and by {bits - nf4:.1f} points in exact "
        "answers",
    ]


def four_bit_rows(results: Any) -> list[str]:
    return [f"| {one['tokens_per_s']:,.0f} | {one['peak_rss_bytes'] / GIB:.1f} GiB |" for one in results.values()]


def times(results: Any, one: str, other: str, digits: int = 1) -> str:
    return f"{results[one]['tokens_per_s'] / results[other]['tokens_per_s']:.{digits}f} times"


def speed(results: Any, tool: str) -> str:
    return f"{results[tool]['tokens_per_s']:,.0f}"


def floor(results: Any, tool: str) -> str:
    return f"{100 * results[tool]['share_of_floor']:.0f} %"


def served_rows(results: Any) -> list[str]:
    rows: dict[int, list[str]] = {}
    for one in results:
        first = one["first_token_p50_s"]
        shown = f"{first:.1f}" if first > 0.8 else f"{first:.2f}"
        rows.setdefault(one["clients"], []).append(f"{one['tokens_per_s']:.0f} ({shown} s)")
    return [f"| {clients} | {' | '.join(cells)} |" for clients, cells in rows.items()]


def of_rounds(results: Any, server: str, clients: int, beside: str) -> float:
    """Return the median of the rounds' ratios."""
    first, other = (
        next(one["rounds_tokens_per_s"] for one in results if one["server"] == name and one["clients"] == clients)
        for name in (server, beside)
    )
    return statistics.median(a / b for a, b in zip(first, other, strict=True))


def served_in_8_bit(results: Any) -> str:
    speed = {(one["server"], one["clients"]): f"{one['tokens_per_s']:.0f}" for one in results}
    alone = of_rounds(results, "strop int8", 1, "strop bf16")
    together = of_rounds(results, "strop int8", 16, "llama.cpp q8_0")
    return (
        f"one client {speed['strop int8', 1]} tokens/s where bf16 has {speed['strop bf16', 1]} ({alone:.2f} times), "
        f"16 clients {speed['strop int8', 16]} where llama.cpp's q8_0 has {speed['llama.cpp q8_0', 16]} "
        f"({together:.2f} times)"
    )


def resident(results: Any, server: str) -> str:
    sizes = sorted({f"{one['resident_bytes'] / 1e9:.1f}" for one in results if one["server"] == server})
    return " to ".join([sizes[0], *sizes[1:][-1:]])


def stored_row(results: Any, method: str) -> str:
    one, whole = results[method], results["16 bit"]
    parts = (one[f"{name}_bytes"] / MIB for name in ("weights", "loading_peak", "training_peak"))
    cells = " | ".join(f"{part:,.0f} MiB" for part in parts)
    return f"| {cells} | {whole['training_peak_bytes'] / MIB:,.0f} MiB (weights {whole['weights_bytes'] / MIB:,.0f}) |"


def kept_share(results: Any) -> str:
    """Return the reduction of the training peak in nf4 in % of the reduction of the weights."""
    return f"{100 * results['nf4 streamed']['kept']:.0f}"


def sharded_rows(results: Any) -> list[str]:
    cases = [("bf16, replicated", ""), ("bf16, sharded", ""), ("nf4, replicated", ", nf4"), ("nf4, sharded", ", nf4")]
    rows = []
    for name, kind in cases:
        sharded, one = name.endswith("sharded"), results[f"2 processes, {name.partition(', ')[2]}{kind}"]
        bytes_ = results[f"2 processes, sharded{kind}"]["held_bytes" if sharded else "whole_bytes"]
        size_text = f"{bytes_ / 1e6:.4g} MB (1/2)" if sharded else f"{bytes_ / 1e6:.0f} MB"
        peaks = (f"{one[f'{peak}_peak_bytes'] / MIB:,.0f} MiB" for peak in ("predicted", "measured"))
        rows.append(f"| {name} | {size_text} | {' | '.join(peaks)} |")
    return rows


def started_rows(results: Any) -> list[str]:
    at, twice = results["at the rule's rate"], results["at twice it"]

    def row(way: str) -> str:
        more = f" {twice[way][0]['after']:.3f} |" if way in twice else " |"
        return f"| {at[way][0]['before']:.3f} | {at[way][0]['after']:.3f} |{more}"

    return [row(way) for way in at]


def learned(results: Any) -> str:
    """Return the score before and after learning from rewards, with the interval of the change in points."""
    (before, after), change = (f"{100 * one['exact_json']:.1f} %" for one in results), results[1]["change"]
    return f"{before}|{after}|{100 * change['low']:+.1f} to {100 * change['high']:+.1f} points"


def learned_by_rewards(results: Any) -> list[str]:
    """Return a row per seed: after fine-tuning, after GRPO, the change with its interval in points, and the rewards."""
    lines = []
    for before, after in zip(results[::2], results[1::2], strict=True):
        change = [100 * after["change"][name] for name in ("value", "low", "high")]
        rewards = [one["reward"] for one in after["told"]]
        means = [statistics.mean(some) for some in (rewards[:10], rewards[-10:])]
        share = [100 * one["exact_json"] for one in (before, after)]
        cells = "| {} | {:.1f} % | {:.1f} % | {:+.1f} ({:+.1f} to {:+.1f}) | {:.2f}, {:.2f} |"
        lines.append(cells.format(before["seed"], *share, *change, *means))
    return lines


def learned_pairs(results: Any) -> list[str]:
    """Return a row per seed: after fine-tuning, and after each objective with the interval of the change in points."""
    rows: dict[int, list[str]] = {}
    for one in results:
        cell = f"{100 * one['exact_json']['rate']:.1f} %"
        if "change" in one:
            low, high = (100 * one["change"]["exact_json"][end] for end in ("low", "high"))
            cell += f" ({low:+.1f} to {high:+.1f})"
        rows.setdefault(one["seed"], []).append(cell)
    return [f"| {seed} | {' | '.join(cells)} |" for seed, cells in rows.items()]


def rate_rows(results: Any) -> list[str]:
    """Return rows for settings that differ from the default in one property."""
    read = script(ROOT / "benchmarks" / "valleys.py")
    valleys = read.valleys(results)
    return [row for of in ("", *read.KEYS[2:]) for row in read.table(valleys, of)]


def rate_words(results: Any) -> list[str]:
    """Return the largest cost of half and twice the best rate, the number of settings in which the rules are within 5
    %, and the best method other than plain LoRA.
    """
    read = script(ROOT / "benchmarks" / "valleys.py")
    usual = [row for row in results if all(row[key] == read.USUAL[key] for key in read.USUAL)]
    curves: dict[tuple[str, str], dict[float, float]] = {}
    for row in usual:
        if row["rate"] in read.RATES:
            curves.setdefault((row["size"], row["set"]), {})[row["rate"]] = row["loss"]
    best = [(curve, min(curve, key=lambda rate, of=curve: of[rate])) for curve in curves.values()]
    half, twice = (max(curve[at * k] / curve[at] - 1 for curve, at in best) for k in (0.5, 2))
    valleys = read.valleys(results)
    judged = [read.judge_rates(one) for one in valleys if all(one[key] == read.USUAL[key] for key in read.KEYS[2:])]
    rule, before = (sum(one[name] <= 0.05 for one in judged) for name in ("cost", "cost_before"))
    tried = sum(not math.isnan(one["cost_before"]) for one in judged)
    ranks = [read.judge_rates(one) for one in valleys if one["rank"] != read.USUAL["rank"]]
    most, usual_most = (max(one[name] for one in ranks if not math.isnan(one[name])) for name in ("cost", "cost_usual"))
    of_one_seed = read.valleys([row for row in results if row["seed"] == 0])
    size = {"size": "71M", "set": "snips", "epochs": 1}
    rslora, lora = (
        next(read.judge_rates(one)["loss"] for one in of_one_seed if {**size, "method": method}.items() <= one.items())
        for method in ("rslora", "lora")
    )
    return [
        f"at half of the best rate the loss was up to {100 * half:.0f} % above the best, at twice it up to "
        f"{100 * twice:.0f} %",
        f"within 5 % of the best loss in {rule} of {len(judged)} settings; the rule before was in {before} of the "
        f"{tried} where all seeds tried its rate",
        f"The rule costs up to {100 * most:.0f} % of the best loss, the usual rate up to {100 * usual_most:.0f} %",
        f"the best (rsLoRA) is {100 * (1 - rslora / lora):.0f} % below plain LoRA",
        f"Plain LoRA has {lora:.3f} there",
    ]


def fault_rows(results: Any) -> list[str]:
    return [
        f"| {one['kl_mean']:.1e} | {one['clear_flips']} | {one['effect']['value']:.1%} | {one['loss_difference']:+.1e} "
        f"| {'yes' if one['passed'] else 'no'} |"
        for one in results.values()
    ]


def keep_rows(results: Any) -> list[str]:
    """Return the exact answers of each seed, and what training took from the general set."""
    lines = []
    for task, variant in dict.fromkeys((one["task"], one["variant"]) for one in results):
        runs = [one for one in results if (one["task"], one["variant"]) == (task, variant)]
        runs.sort(key=lambda one: one["seed"])
        exact = ", ".join(f"{100 * one['tuned']['exact_json']:.1f}" for one in runs)
        low, high = 100 * runs[0]["intervals"]["tuned"][0], 100 * runs[0]["intervals"]["tuned"][1]
        after = ", ".join(f"{100 * one['general']['tuned']:.1f}" for one in runs)
        fall = 100 * statistics.fmean(one["general"]["base"] - one["general"]["tuned"] for one in runs)
        tokens = round(statistics.fmean(one["tokens"] for one in runs))
        lines.append(f"| {task} | {variant} | {exact} ({low:.1f} to {high:.1f}) | {after} | {fall:.1f} | {tokens:,} |")
    return lines


def killed_runs(results: Any) -> str:
    kills = results["kills"]
    early = kills["figures"]["killed before the run had begun"]
    return f"killed {kills['tried']} times at random ({early} times before the first step)"


def kept_generals(results: Any) -> str:
    """Return the share of general questions of the demo that are right before training, after, and with train.keep."""
    runs = {
        name: [one for one in results if (one["task"], one["variant"]) == ("demo", name)] for name in ("none", "auto")
    }
    (base,) = {round(100 * one["general"]["base"]) for one in runs["none"]}
    ranges = [sorted(round(100 * one["general"]["tuned"]) for one in runs[name]) for name in ("none", "auto")]
    (low, *_, high), (least, *_, most) = ranges
    return (
        f"answered {base} % of general questions correctly before, {low} to {high} % after plain training, and "
        f"[{least} to {most} %](docs/keep.md) with `--train.keep 0.15`"
    )


def streamed_rows(results: Any) -> list[str]:
    """Return the medians of the runs of each shape, placement and quantization."""
    lines = []
    keys = ("shape", "quantization", "placement", "limit_gib")
    for key in dict.fromkeys(tuple(one[name] for name in keys) for one in results):
        runs = [one for one in results if tuple(one[name] for name in keys) == key]
        middle = {
            name: statistics.median(one[name] for one in runs) for name in runs[0] if name.endswith(("_s", "_bytes"))
        }
        shape, scheme, placement, limit = key
        base = f"{shape}, {'16 bit' if scheme == 'none' else scheme}"
        where = "in memory" if placement == "replicated" else placement
        limited = f"{limit:g} GiB" if limit else "none"
        measured, predicted = (middle[f"{name}_peak_bytes"] / 1e9 for name in ("measured", "predicted"))
        waited = f"{middle['waited_s']:.1f}" if placement == "streamed" else "-"
        cells = [base, where, limited, f"{middle['tokens_per_s']:.1f}", waited, f"{measured:.2f}", f"{predicted:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def streamed_ranges(results: Any) -> str:
    rates = {
        placement: [one["tokens_per_s"] for one in results if (one["shape"], one["placement"]) == ("1.7B", placement)]
        for placement in ("replicated", "streamed")
    }
    whole, streamed = (f"{min(values):.0f} to {max(values):.0f}" for values in rates.values())
    return f"in memory {whole} tokens/s, streamed {streamed}"


def full_rows(results: Any) -> list[str]:
    """Return exact answers and loss for each learning rate, and the loss for each rounding."""
    lines = []
    for one in results:
        if "tuned" not in one:
            lines.append(f"{one['loss']:.4f}")
            continue
        low, high = (100 * end for end in one["interval"])
        lines.append(
            f"{100 * one['tuned']['exact_json']:.1f} % ({low:.1f} to {high:.1f}) | {one['tuned']['loss']:.4f} |"
        )
    return lines


def picture_rows(results: Any) -> list[str]:
    """Return the exact answers of each run on pictures."""
    lines = []
    for one in results:
        low, high = (100 * end for end in one["tuned"]["interval"])
        share = f"{100 * one['tuned']['exact']:.1f} % ({low:.1f} to {high:.1f})"
        lines.append(f"{one['rows']:,} | {one['epochs']:g} | `{one['vision']}` | {share} |")
    return lines


def image_rows(results: Any) -> list[str]:
    """Return the exact answers of each run on pictures, and of the base."""
    lines = picture_rows(results)
    low, high = (100 * end for end in results[0]["base"]["interval"])
    assert all(one["base"] == results[0]["base"] for one in results)
    _, digits, charts = (one["seconds"] / 60 for one in results)
    lines.append(f"The first row took {digits:.0f} minutes and the charts {charts:.0f} on one core")
    return [*lines, f"The base has {100 * results[0]['base']['exact']:.1f} % ({low:.1f} to {high:.1f})"]


def full_memory(results: Any) -> str:
    """Return the measured memory of LoRA and of all weights, with the line break of the page."""
    lora, full = (one["memory"] / GIB for one in results)
    return f"{lora:.1f} GiB of memory instead of {full:.1f} GiB"


def full_speed(results: Any) -> str:
    """Return the median speeds of strop, TRL and LoRA, and the ratio of the first two."""
    ours, trl, lora = (statistics.median(results["rates"][tool]) for tool in ("strop", "trl", "lora"))
    return f"{ours:.0f} tokens/s, TRL {trl:.0f}, so {results['ratio']:.2f} times; LoRA in strop {lora:.0f}"


def class_rows(results: Any) -> list[str]:
    """Return the accuracy of each classifier beside its baseline, and the intents of the model that writes JSON."""
    lines = []
    for one in results:
        if one["task"] == "json":
            lines.append(
                f"has {100 * one['tuned']['intent']:.1f} % of the intents right, after {one['training_s']:.0f} s"
            )
            continue
        low, high = (100 * end for end in one["intervals"]["tuned"])
        points = "{:+.1f} ({:+.1f} to {:+.1f})".format(
            *(100 * one["baseline_difference"][name] for name in ("value", "low", "high"))
        )
        lines.append(
            f"{one['training_rows']} | {len(one['classes'])} | {100 * one['tuned']['accuracy']:.1f} % ({low:.1f} to "
            f"{high:.1f}) | {100 * one['baseline']['accuracy']:.1f} % | {points} | {one['training_s']:.0f} s |"
        )
    return lines


def retrieval_rows(results: Any) -> list[str]:
    """Return the scores of each model of embeddings beside its base and TF-IDF."""
    lines = []
    for one in results:
        tuned, (low, high) = one["tuned"], (100 * end for end in one["intervals"]["tuned"])
        points = "{:+.1f} ({:+.1f} to {:+.1f})".format(
            *(100 * one["baseline_difference"][name] for name in ("value", "low", "high"))
        )
        lines.append(
            f"| {one['rate']:g} | {100 * tuned['accuracy_at_1']:.1f} % ({low:.1f} to {high:.1f}) | "
            f"{100 * tuned['ndcg_at_10']:.1f} % | {100 * one['base']['accuracy_at_1']:.1f} % | "
            f"{100 * one['baseline']['accuracy_at_1']:.1f} % | {points} |"
        )
        lines.append(f"{one['training_rows']:,} training rows, {one['rows']} held-out functions")
    return lines


def image_speed(results: Any) -> list[str]:
    """Return the ends of a row of the table of `benchmarks/images.py speed`: rates, times of epochs, and the ratio."""
    cells, epoch = [], results["rows"] // 4
    medians = {
        tool: [statistics.median(times) for times in zip(*runs, strict=True)]
        for tool, runs in results["seconds"].items()
    }
    for tool in ("strop", "trl"):
        tokens = sum(results["runs"][tool][0]["tokens"][epoch:])
        cells.append(f"{statistics.median(tokens / sum(run[1:]) for run in results['seconds'][tool]):,.0f}")
    for tool in ("strop", "trl"):
        cells.append(f"{medians[tool][0]:.1f}, then {statistics.median(medians[tool][1:]):.1f}")
    return [f"| {' | '.join(cells)} | {statistics.median(results['ratios']):.1f} |"]


def taught(results: Any) -> list[str]:
    """Return the ends of the rows of the table of benchmarks/teacher.py, without the teacher's own."""
    cells = []
    for one in results:
        low, high = one["interval"]
        exact = f"{100 * one['exact_json']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        cells.append(f"| {one['steps']} | {exact} |")
    return cells


def learned_tools(results: Any) -> list[str]:
    """Return the mean reward before and after GRPO in the environment of benchmarks/environment.py."""
    lines = []
    for one in results:
        cells = []
        for side in ("base", "tuned"):
            low, high = one[side]["interval"]
            cells.append(f"{one[side]['mean_reward']:.3f} ({low:.3f} to {high:.3f})")
        difference = "{:+.3f} ({:+.3f} to {:+.3f})".format(
            *(one["difference"][name] for name in ("value", "low", "high"))
        )
        errors = " | ".join(f"{one[side]['tool_errors']:.2f}" for side in ("base", "tuned"))
        lines += [
            f"| {one['seed']} | {' | '.join(cells)} | {difference} | {errors} |",
            f"{one['rows']} other questions",
        ]
        lines.append(f"{100 * one['base']['truncated']:.0f} % of the traces were cut at a limit")
        first, last = (one["of_ten_steps"][part]["reward"] for part in ("first", "last"))
        lines.append(f"ten steps rose from {first:.2f} to {last:.2f}")
    return lines


def sweep_verdict(results: Any) -> list[str]:
    sweep, seeds = results["whole"], results["seeds"]
    setting, difference = sweep["selection"]["setting"], sweep["result"]["difference"]
    ranking = sweep["selection"]["ranking"]
    equal = [entry for entry in ranking if entry["standing"] != "worse"]
    assert sweep["result"]["verdict"] == "unclear" and sweep["result"]["recommended"] == "chosen"
    assert results["kills"]["same_result"] and seeds["verdict"] == "default" and "better" not in seeds["simulated"]
    value, low, high = (100 * difference[end] for end in ("value", "low", "high"))
    selection, rows = seeds["scores"]["selection"], sweep["rows"]["selection"]
    rank, rate = setting["lora.r"], setting["train.learning_rate"]
    return [
        f"{len(equal)} of {len(ranking)} settings are equal on {rows} selection rows. The cheapest of them, rank "
        f"{rank} with a rate of {rate:g}, has no clear difference from the default on {difference['rows']} test rows: "
        f"{value:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, with {difference['seeds']} seeds.",
        f"killed {results['kills']['kills']} times at random",
        f"have between {100 * min(selection):.1f} % and {100 * max(selection):.1f} % on the selection rows. In "
        f"{seeds['draws']:,} simulated sweeps",
    ]


def swept_rates(model: str) -> Callable[[Any], list[str]]:
    """Return a function that returns the rows of a table of rates."""

    def rows(results: Any) -> list[str]:
        sweep = results["whole"]
        best = min(sweep["trials"], key=lambda trial: trial["loss"])
        assert best["number"] == 0 and all(entry["standing"] != "worse" for entry in sweep["selection"]["ranking"])
        table = []
        for trial in sweep["trials"]:
            score, low, high = (100 * trial[name] for name in ("score", "low", "high"))
            rate = f"{trial['setting']['train.learning_rate']:g}{' (rule)' * (trial is best)}"
            cells = f"{rate} | {trial['loss']:.3f} | {score:.1f} % ({low:.1f} to {high:.1f})"
            table.append(f"| {model} | {sweep['steps']} | {cells} |")
        return table

    return rows


def rounding_rows(results: Any) -> list[str]:
    """Return the loss of each way to merge a run, and of a run of few steps at a low rate."""

    def apart(kind: str) -> tuple[float, float, float]:
        nearest, random = (results["young"][f"{kind}, {way}"]["kl_mean"] for way in ("nearest", "random"))
        return nearest / random, nearest, random

    return [
        f"on {results['snips']['fp32']['positions']:,} positions",
        *(f"| {one['kl_mean']:.1e} | {one['kl_max']:.1e} | {one['top1_agreement']:.1%} "
          f"| {one['loss_difference']:+.1e} |"
          for one in results["snips"].values()),
        "bf16 loses {:.0f} times as much as stochastic rounding (mean KL {:.1e} and {:.1e})".format(*apart("bf16")),
        "fp16 {:.0f} times as much ({:.1e} and {:.1e})".format(*apart("fp16")),
    ]  # fmt: skip


def merge_measured(one: Any) -> str:
    return f"mean KL {one['parity']['kl_mean']:.1e}, top-1 {100 * one['parity']['top1_agreement']:.2f} %"


def merged_answers(results: Any) -> list[str]:
    whole, narrow = (next(one for one in results if one["dtype"] == dtype) for dtype in ("fp32", "bf16"))
    return [
        f"{narrow['parity']['positions']:,} positions): trained on 16-bit weights (4 epochs), {merge_measured(narrow)}",
        f"{whole['same']['fp32']} of {whole['rows']} greedy answers are the adapter's (fp32 weights and compute; "
        f"bf16 weights and compute {narrow['same']['bf16']})",
    ]


def llamacpp_rows(results: Any) -> list[str]:
    names = {"lora": "LoRA file on the demo's GGUF (Q4_1)"}
    rows = [f"| strop, fp32 | | | | | {100 * results[0]['exact_json']:.1f} % | |"]
    for one in results[1:]:
        apart = one["parity"]
        rows.append(
            f"| {names.get(one['type'], one['type'])} | {one['size_bytes'] / 1e6:.0f} MB | {apart['kl_mean']:.1e} "
            f"| {apart['kl_max']:.2g} | {100 * apart['top1_agreement']:.2f} % | {100 * one['exact_json']:.1f} % "
            f"| {100 * one['answers_equal']:.1f} % |"
        )
    return [
        *rows,
        f"{results[1]['parity']['positions']:,} positions, and greedy answers to {results[0]['rows']} test rows",
    ]


def merged_apart(results: Any) -> str:
    ways = results["snips"]
    return f"mean KL {ways['bf16, random']['kl_mean']:.1e}"


def four_bit(results: Any) -> str:
    return f"{results['snips']['4 bit']['kl_mean']:.1f}"


def young_rows(results: Any) -> list[str]:
    def row(rates: Any) -> str:
        return " | ".join(f"{one['mean_loss']:.3f} ({one['sixth_loss']:.2f})" for one in rates.values())

    return [f"| {row(rates)} |" for rates in results.values()]


def young(results: Any, say: str) -> str:
    ways = "peft, bf16", "strop, fp32", "strop, bf16"
    return say.format(*(f"{results[way]['2e-4']['mean_loss']:.3f}" for way in ways))


def near_floor(results: Any) -> str:
    """Return the share of the time per token that reading the weights takes."""
    floors = json.loads((RESULTS / "serve_2026-11-28.json").read_text(encoding="utf-8"))["floor"]
    shares = [f"{100 * floors[f'strop {kind}']['share']:.0f} % ({kind})" for kind in ("fp32", "bf16", "int8", "nf4")]
    return f"strop takes {', '.join(shares[:3])} and {shares[3]} of its time"


def big_model(results: Any) -> list[str]:
    first, again = results["first run"], results["from the cache"]
    took = [run[step]["seconds"] for run in (first, again) for step in ("step 1", "step 2")]
    weights_text, load, peak = (f"{size / GIB:.1f} GiB" for size in (first["held_bytes"], first["load"]["peak_bytes"],
                                                            first["peak_bytes"]))  # fmt: skip
    return [
        f"| {weights_text} | {load} | {peak} |",
        f"takes {first['load']['seconds']:.0f} s to quantize (two threads, on a machine with other work), "
        f"{again['load']['seconds']:.0f} s to load again, and {min(took):.0f} to {max(took):.0f} s for a step",
    ]


PERFORMANCE, QUANTIZATION, MEASURED = "docs/performance.md", "docs/quantization.md", "docs/measured.md"
SAID: list[tuple[str, str, Callable[[Any], str | list[str]]]] = [
    ("README.md", "newcomer.json", lambda it: f"0 % exact before, {demo(it)[0]} after (95 % interval {demo(it)[1]}; "
     f"{it['training_s']:.0f} s of training on two cores of a Xeon, {it['seconds'] / 60:.0f} minutes from the clone"),
    ("README.md", "plan_memory.json", lambda it: "median error {}, worst {} of {} runs".format(*memory(it))),
    ("docs/plan.md", "plan_memory_zen4.json", memory_without_amx),
    ("README.md", "merge_rounding.json", merged_apart),
    ("README.md", "train_step_amx_2026-11-25.json",
     lambda it: f"{times(it, 'fast', 'unsloth, grouped')} Unsloth's CPU mode on two machines"),
    ("README.md", "whole_commands_fp32.json", lambda it: f"{it['ratio']:.2f} times on one without"),
    ("docs/lesson.md", "young_adapters.json",
     lambda it: young(it, "peft's loss is {}, in fp32 {}, in strop's bf16 {}")),
    (PERFORMANCE, "young_adapters.json", young_rows),
    ("docs/lesson.md", "merge_rounding.json",
     lambda it: [f"mean KL {four_bit(it)}, and the next word agrees in "
                 f"{100 * it['snips']['4 bit']['top1_agreement']:.1f} % of the",
                 f"strop's merge into bf16: {merged_apart(it)}"]),
    (MEASURED, "merge_rounding.json", rounding_rows),
    ("docs/keep.md", "keep_2026-11-30.json", keep_rows),
    ("docs/streaming.md", "streamed_2026-12-01.json", streamed_rows),
    ("docs/streaming.md", "streamed_2026-12-01.json", streamed_ranges),
    ("docs/streaming.md", "streamed_2026-11-30.json", streamed_rows),  # nf4
    ("docs/classify.md", "classify_2026-11-29.json", class_rows),
    ("docs/full.md", "full_2026-11-30.json", full_rows),
    ("docs/full.md", "full_speed_2026-11-30.json", full_speed),
    ("docs/images.md", "images_2026-11-30.json", image_rows),
    ("docs/images.md", "images_receipts_2026-11-30.json", picture_rows),
    ("docs/images.md", "images_receipts_2026-11-30.json",
     lambda it: f"the receipts {it[0]['seconds'] / 60:.0f} minutes on two"),
    ("docs/images.md", "image_speed_siglip_2026-11-30.json", image_speed),
    ("docs/images.md", "image_speed_small_2026-11-30.json", image_speed),
    ("docs/full.md", "full_700_2026-11-30.json", full_rows),
    ("docs/full.md", "full_700_2026-11-30.json", full_memory),
    ("docs/embed.md", "embed_2026-11-30.json", retrieval_rows),
    ("docs/environments.md", "environment_2026-11-30.json", learned_tools),
    ("docs/teacher.md", "teacher_2026-11-30.json", taught),
    ("docs/sweep.md", "sweep_2026-11-30.json", sweep_verdict),
    ("docs/learning_rate.md", "sweep_rates_smollm2_2026-11-30.json", swept_rates("SmolLM2-135M")),
    ("docs/learning_rate.md", "sweep_rates_gemma_2026-11-30.json", swept_rates("Gemma 3 270M")),
    ("README.md", "faults.json", killed_runs),
    ("README.md", "keep_2026-11-30.json", kept_generals),
    ("docs/lesson.md", "newcomer.json", lambda it: f"{demo(it)[0]} of 176 held-out rows exactly ({demo(it)[1]})"),
    ("docs/lesson.md", "plan_memory.json",
     lambda it: "off by {0} in the median of {2} runs, {1} at worst".format(*memory(it))),
    ("docs/howto.md", "newcomer.json", lambda it: f"took {it['training_s']:.0f} s on two cores"),
    (PERFORMANCE, "train_step_2026-11-25.json", step_rows),
    (PERFORMANCE, "train_step_amx_2026-11-25.json", step_rows),
    (PERFORMANCE, "train_step_torchtune_2026-11-25.json",
     lambda it: [f"strop in the same test {speed(it, 'fast')}", step_rows(it)[1]]),
    (PERFORMANCE, "train_step_amx_2026-11-25.json",
     lambda it: f"{times(it, 'fast', 'unsloth, grouped')} Unsloth on both"),
    (PERFORMANCE, "train_step_amx_2026-11-25.json",
     lambda it: f"and {times(it, 'fast', 'trl, tuned').split()[0]} and 5.0 times tuned TRL"),
    (PERFORMANCE, "train_step_2026-11-25.json", lambda it: f"and {times(it, 'fast', 'trl, tuned')} tuned TRL"),
    (PERFORMANCE, "whole_commands_zen5.json", whole_commands),
    (PERFORMANCE, "whole_commands_fp32.json", whole_commands),
    (PERFORMANCE, "whole_commands_int8_matmul.json", whole_commands),
    (PERFORMANCE, "whole_commands_int8_base.json", whole_commands),
    (PERFORMANCE, "start.json", start_rows),
    (PERFORMANCE, "train_step_prefix_2026-11-25.json",
     lambda it: f"{speed(it, 'fast')}, without sharing {speed(it, 'unshared')} ({floor(it, 'unshared')} of the floor), "
     f"Unsloth {speed(it, 'unsloth, rows')}: {times(it, 'fast', 'unsloth, rows')}"),
    (PERFORMANCE, "train_step_600m_2026-11-25.json",
     lambda it: f"{speed(it, 'fast')} ({floor(it, 'fast')} of the floor), Unsloth {speed(it, 'unsloth, rows')}: "
     f"{times(it, 'fast', 'unsloth, rows')}"),
    (PERFORMANCE, "train_step_dropout_2026-11-25.json",
     lambda it: [f"| all linear layers | {speed(it, 'fast')} |",
                 f"| with dropout 0.05 | {speed(it, 'dropped')} | {times(it, 'dropped', 'fast', 2).split()[0]} |",
                 f"| with DoRA | {speed(it, 'dora')} | {times(it, 'dora', 'fast', 2).split()[0]} |"]),
    (PERFORMANCE, "families_2026-11-27.json", lambda it: [family_row(name, x) for name, x in it.items()]),
    (PERFORMANCE, "train_step_4bit_2026-11-25.json", four_bit_rows),
    (PERFORMANCE, "train_step_4bit_2026-11-25.json",
     lambda it: f"{times(it, 'nf4 resident', 'fast', 2)} 16 bit and "
     f"{times(it, 'nf4 resident', 'unsloth, 4 bit')} Unsloth"),
    (PERFORMANCE, "train_step_4bit_2048_2026-11-25.json", four_bit_rows),
    (PERFORMANCE, "train_step_4bit_2048_2026-11-25.json",
     lambda it: f"for each matmul {times(it, 'nf4 streamed', 'fast', 2)} 16 bit"),
    (PERFORMANCE, "growth_2026-11-25.json",
     lambda it: "{needed_bytes:.0f} KB a token of what is needed, where the formula for saved activations says "
     "{formula_bytes:.0f}".format(**{name: size / 1e3 for name, size in it["per_token"].items()})),
    (PERFORMANCE, "growth_2026-11-25.json", lambda it: f"it was {it['per_token']['peak_bytes'] / 1e3:.0f} (+19 %)"),
    (PERFORMANCE, "prepare_data_2026-11-24.json",
     lambda it: "strop {:,.0f} rows/s and {:.0f} MiB beyond the tokenizer, TRL 1.16 with packing {:,.0f} rows/s and "
     "{:.0f} MiB".format(*(statistics.median(run[key] for run in it[tool]) / unit
                           for tool in ("strop", "trl") for key, unit in (("rows_per_s", 1), ("peak_bytes", MIB))))),
    (QUANTIZATION, "quantized_scores.json", scores),
    (QUANTIZATION, "quantized_scores.json", quantized_apart),
    ("docs/lesson.md", "quantized_scores.json", quantized_in_short),
    (QUANTIZATION, "quantized_memory_1b_2026-11-25.json", lambda it: stored_row(it, "nf4 streamed")),
    (QUANTIZATION, "quantized_memory.json",
     lambda it: [f"| SmolLM2-135M, nf4 packed {stored_row(it, 'nf4 streamed')}", f"({kept_share(it)} and"]),
    (QUANTIZATION, "quantized_memory_1b_2026-11-25.json", lambda it: f"{kept_share(it)} % of that)"),
    (QUANTIZATION, "big_model_2026-11-25.json", big_model),
    (MEASURED, "scale_memory.json", sharded_rows),
    ("docs/export.md", "llamacpp.json", llamacpp_rows),
    (MEASURED, "merged_answers.json", merged_answers),
    (MEASURED, "merges_quantized.json",
     lambda it: [f"on nf4 {merge_measured(it[0])}", f"on int8 {merge_measured(it[1])}"]),
    (MEASURED, "merge_memory.json",
     lambda it: f"A merge of Llama-3.2-1B's shape took {it['peak_bytes'] / GIB:.1f} GiB"),
    (QUANTIZATION, "init_quantized_2026-11-25.json", started_rows),
    ("docs/learning_rate.md", "learning_rates.json", rate_rows),
    ("docs/learning_rate.md", "learning_rates.json", rate_words),
    (MEASURED, "preferences_learn_2026-11-26.json", learned_pairs),
    (MEASURED, "grpo_learn_1e-4_2026-11-26.json",
     lambda it: "{} before, {} after ({})".format(*learned(it).split("|"))),
    (MEASURED, "grpo_learn_80_steps_2026-11-26.json", learned_by_rewards),
    (MEASURED, "grpo_learn_80_steps_2026-11-26.json",
     lambda it: "{:.0f} to {:.0f} minutes a run".format(*(
         end(one["seconds"] / 60 for one in it[1::2]) for end in (min, max)))),
    (MEASURED, "grpo_learn_2026-11-26.json", lambda it: learned(it).split("|")),
    (MEASURED, "grpo_learn_slots_2026-11-26.json", lambda it: learned(it).split("|")),
    (MEASURED, "grpo_learn_1e-4_2026-11-26.json",
     lambda it: "mean reward from {:.2f} to {:.2f}".format(*(
         statistics.mean(one["reward"] for one in it[1]["told"][part]) for part in (slice(10), slice(-10, None))))),
    (MEASURED, "preferences_learn_2026-11-26.json",
     lambda it: f"right answer in {100 * it[0]['preference']['rate']:.1f} % of the held-out pairs"),
    (MEASURED, "preferences_rates_2026-11-26.json",
     lambda it: "at 3e-5 {:.1f} %, {:.1f} % exact, from {:.1f} %".format(
         *(100 * one["exact_json"]["rate"] for one in [*(run for run in it if run.get("rate") == 3e-5), it[0]]))),
    (MEASURED, "preferences_2026-11-26.json",
     lambda it: f"{it['strop']['pairs_per_s'] / it['trl']['pairs_per_s']:.1f} times TRL's"),
    (MEASURED, "grpo_speed_2026-11-26.json",
     lambda it: f"{it['strop']['prompts_per_s'] / it['trl']['prompts_per_s']:.1f} times TRL's"),
    (MEASURED, "grpo_learn_2026-11-26.json",
     lambda it: f"in bf16 is off by about {statistics.mean(one['off'] for one in it[1]['told']):.2f}"),
    (PERFORMANCE, "serve_2026-11-28.json", served_rows),
    (PERFORMANCE, "serve_2026-11-28.json",
     lambda it: f"{resident(it, 'strop bf16')} GB in bf16, where llama.cpp takes {resident(it, 'llama.cpp f16')}"),
    (PERFORMANCE, "serve_behind_2026-11-27.json",
     lambda it: "first token after {first_token_behind_s:.2f} s, {first_token_alone_s:.2f} s if it is alone; the "
     "others waited at most {longest_gap_behind_s:.2f} s for a token, usually {usual_gap_p50_s:.2f} s. "
     "llama.cpp f16: {0:.1f} s either way, and {1:.1f} s".format(
         it[1]["first_token_alone_s"], it[1]["longest_gap_behind_s"], **it[0])),
    (PERFORMANCE, "serve_2026-11-28.json", near_floor),
    (PERFORMANCE, "serve_int8_2026-11-28.json", served_in_8_bit),
    (MEASURED, "merge_faults_2026-11-25.json", fault_rows),
    ("docs/dash.md", "dash_page_2026-11-26.json",
     lambda it: "about {server_mb_before:.0f} MB, and {server_mb:.0f} MB with a run of 200,000 steps open".format(
         **it["a run of 200,000 steps"])),
    (MEASURED, "scale_pair_2026-11-26.json",
     lambda it: f"at {it['ratio']:.2f} of the tokens/s of one process of two threads ({it['ratios'][0]:.2f} and "
     f"{it['ratios'][1]:.2f}, two rounds), and a step sends for {1e3 * statistics.mean(it['communication_s']):.0f} ms, "
     f"where the plan says {1e3 * it['planned_communication_s']:.0f}"),
]  # fmt: skip


# Pages whose figures other tests generate or compare with their source.
ELSEWHERE = {
    "docs/plan.md": "tests/planning/test_memory.py", "docs/cards.md": "tests/simulated_gpu/test_traffic.py",
    "docs/reliability.md": "tests/faults", "docs/models.md": "tests/models/walk.py", "docs/recipe.md": "its schema",
    "docs/templates.md": "tests/data", "docs/comparison.md": "tools/comparison.py",
}  # fmt: skip
# Text on other pages that looks like a measurement but is not one.
NOT_MEASURED: dict[str, list[str]] = {
    "README.md": ["3 GB of disk"],  # PyTorch and the other packages, as on docs/install.md
    "docs/after.md": [
        "95 % intervals", "2 to 8 % of comparisons",  # tests/evaluation/test_metrics.py
        "At least 99.5 %", "It must be 100 %, give or take 2 %",  # limits of exporting.parity
    ],
    "docs/classify.md": ["above 50 %", "with 80 % probability 80 %", "takes a second", "95 % interval"],
    "docs/embed.md": ["95 % intervals", "--eval 20%", r"\(95 % interval\)"],
    "docs/formats.md": ["over 50 million pixels or 50 MiB"],  # data.images
    "docs/images.md": [
        r"\(95 % interval\)", "50 million pixels, 50 MiB", "at most 20 GiB", "at most 4 MiB",
        r"digits had 71.3 % after an epoch",  # in the log
    ],
    "docs/environments.md": ["95 % intervals", "95 % interval", "15 minutes of one core"],  # CPU time, in the log
    "docs/teacher.md": ["with 95 % intervals", r"71.9 % \(65.5 to 77.5\)", "hold 30 % on rows"],  # in the log
    "docs/full.md": ["95 % interval", "less than 1 %"],
    "docs/streaming.md": [
        r"<!-- fits -->[\s\S]*?<!-- end -->", r"\(500 MB/s\)",  # benchmarks/what_fits.py, planning.fit
        "about 1.7 GB/s",  # of the disk, measured beside it
        r"<!-- gpus -->[\s\S]*?<!-- end -->", "at 20 GB/s",  # tests/training/test_streaming.py, planning.time
    ],
    "docs/keep.md": [
        "95 % interval of the first", "54 % of the general", "23 % are right", r"\(95 % interval\)",
        r"1.23 times on the\s+demo, 1.24 times with",  # in the log
    ],
    "docs/sweep.md": ["15 % of the rows", "if the 95 % interval", "at most 2 points behind"],  # sweeping.split, select
    "docs/concepts.md": ["It must be 100 %, give or take 2 %"],
    "docs/api.md": ["a line every 30 s"],  # display.progress.LOG_SECONDS
    "docs/dash.md": [  # settings of dash.state
        "at most 1 GiB", r"a share of the rows \(`20%`", "2 minutes, or 20 times", "30 minutes while it loads",
    ],
    "docs/export.md": [r"f32 1e-4, 99.5 %; .* q4_k_m 0.4, 75 %"],  # limits of exporting.llama_cpp
    "docs/howto.md": [  # tests/planning/test_howto.py
        "GPU with 8 GB", "--memory 7GB", "19 GiB for this model", "would need 63 MiB",
    ],
    "docs/import.md": ["data.eval: 10%", "batch 4 times"],  # a default of Unsloth
    "docs/install.md": ["about 3 GB of disk space"],
    "docs/learning_rate.md": [
        r"exact JSON \(95 % interval\)", r"\| within 5 % \|", r"\*Within 5 %\*", "at most 5 % above",
        "8\\)\\^0.2: 1.3 times",
    ],
    # a plan, which tests/test_lesson.py runs
    "docs/lesson.md": ["in 8 GB", "Llama-3.1-8B: 6.9 GiB, which is 7.4 GB", "the base 0 %"],
    "docs/performance.md": [
        "shared, 24 GiB", r"\(\+3 %",
        "939 GFLOP/s", "1,719 GFLOP/s", "405 GFLOP/s",  # gemm_flops of the files of the tables
        "more than 1e-3 and 2 %",  # limits of training.integers
        "at the 48 GB/s that were measured", "a sum over 256 MiB was read at 87",
    ],
    "docs/measured.md": [
        r"alpha 1?[03] % too (large|small)", "1 % noise",  # injected faults
        "95 % interval", "k3 times the ratio",
        "random instant, 100 times", "train.timeout: 20s", "0.5 GB/s and 0.12 ms",  # settings
        r"Simulated: .* More than 5 % of the computing: flags from 64",  # python benchmarks/scale.py simulate
    ],
    "docs/preferences.md": ["95 % interval"],
    "docs/push.md": ["95 % interval"],
    "docs/python.md": [r"memory=\"8GB\""],
    "docs/results.md": ["95 % interval of the metric"],
    "docs/quantization.md": ["95 % intervals"],
    "docs/scale.md": [
        "168 MB for an 8B", "16 bit is 30 GB", "in nf4 9 GB",  # bytes of its weights
        "default 30 minutes",
    ],
    "docs/serve.md": [
        "within 15 seconds", "0.001 nats a token",
    ],
    "docs/hunting.md": ["45 minutes"],
    "docs/tutorial.md": [
        r"\(\d minutes\)", "100 % means that the test is easy", "Four of six \\(66.7 %; .* 30 to 90 %",
    ],
}  # fmt: skip
A_MEASUREMENT = re.compile(
    r"\d[\d,.]* ?(?:tokens/s|rows/s|[GT]FLOP/s|[KMG]i?B(?:/s)?|m?s|seconds|minutes|hours|times|%|points|nats)(?![\w/])"
    r"|KL (?:of )?\d"
)
PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("place", range(len(SAID)), ids=[f"{page}-{file}" for page, file, _ in SAID])
def test_figures_on_pages_equal_the_results(place: int) -> None:
    page, file, say = SAID[place]
    texts = say(load_results(file))
    for text in [texts] if isinstance(texts, str) else texts:
        assert text in words(page)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_every_figure_of_a_page_is_accounted_for(page: str) -> None:
    left = words(page)
    for _, file, say in (one for one in SAID if one[0] == page):
        texts = say(load_results(file))
        for text in [texts] if isinstance(texts, str) else texts:
            left = left.replace(text, "")
    for pattern in NOT_MEASURED.get(page, []):
        left, result = re.subn(pattern, "", left)
        assert result, f"{page} no longer says {pattern!r}"
    assert [left[max(0, one.start() - 60) : one.end()] for one in A_MEASUREMENT.finditer(left)] == []
