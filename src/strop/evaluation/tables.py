"""Print the results of evaluations: scores with intervals, changed rows, the leaderboard, and answers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from strop.config.load import read_resolved
from strop.config.schema import KEEP_SHARE, NOT_KEEPING
from strop.display.tables import Printed, abbreviate, command_name, console, print_notes
from strop.errors import Location
from strop.evaluation.metrics import (
    describe_baseline,
    describe_change,
    describe_difference,
    describe_general,
    format_points,
    format_score,
    format_task_scores,
    rows_label,
    score_name,
)

MAX_MATRIX = 15  # classes of a confusion matrix in a terminal


class Evaluation(Printed, dict[str, Any]):
    """The fields of `strop eval --json`. `print` and a notebook show them as the tables of the command line."""

    def _print(self, out: Console) -> None:
        for evaluation in self.get("runs", [self]):
            print_evaluation(evaluation, 3, out)
        if "leaderboard" in self:
            print_leaderboard(self["leaderboard"], self["runs"][0]["metric"], out)


def print_evaluation(result: Mapping[str, Any], samples: int, out: Console = console) -> None:
    """Print up to `samples` answers of one model, the wrong ones first, and its scores, with the verdict at the end."""
    ordered = sorted(result["samples"], key=lambda sample: bool(sample.get("tuned_hit", sample.get("base_hit", True))))
    print_samples(ordered[:samples], out)
    print_notes(result["notes"], out)
    for part, print_part in (("rewards", _print_rewards), ("judge", _print_judge), ("general", _print_general)):
        if part in result:
            print_part(result[part], out)
    if "general" in result and describe_difference(result["general"]["difference"])[0] == "worse":
        _print_remedies(str(result.get("run", "")), out)
    if "regression" in result:
        print_scores(result["regression"], rows_name="rows that should not get worse", out=out)
    _print_tasks(result.get("tasks", {}), out)
    _print_classes(result, out)
    print_scores(result, out=out)


def print_scores(result: Mapping[str, Any], rows_name: str | None = None, out: Console = console) -> None:
    """Print the scores of base and tuned model in columns, with 95 % intervals."""
    sides = [side for side in ("base", "baseline", "tuned") if side in result]
    title = f"{result.get('run', '')}  {result['rows']} {rows_name or rows_label(result)}"
    table = Table(title=escape(title.strip()), title_justify="left")
    table.add_column("")
    for side in sides:
        table.add_column("model" if sides == ["base"] else side, justify="right")  # merged models are no bases
    for name in result[sides[0]]:
        if name == "tokens_per_s":  # of base and tuned together
            continue
        cells = []
        for side in sides:
            value = result[side][name]
            cell = format_score(name, value)
            interval = result["intervals"][side] if name == result["metric"] else _find_interval(result, side, name)
            if interval:
                low, high = interval
                cell += f"  ({format_score(name, low)} to {format_score(name, high)})"
            cells.append(cell)
        table.add_row(escape(score_name(name, result["metric"])), *cells)
    out.print(table)
    if speed := result[sides[-1]].get("tokens_per_s"):
        answered = [side for side in sides if result[side].get("tokens_per_s") == speed]  # others: in an earlier run
        of_which = "" if sides == ["base"] else f" of {' and '.join(answered)}"
        out.print(f"answers{of_which} generated at {speed:,.0f} tokens/s")
    if result.get("left_out"):
        rows = [str(Location(**location)) for location in result["left_out"]]
        out.print(f"left out: {len(rows)} rows: {abbreviate(rows)}", markup=False, style="yellow")
    if baseline := describe_baseline(result):
        out.print(baseline[1], markup=False)
    if "difference" in result:
        changed = result.get("changed", {"gained": [], "lost": []})
        if changed["lost"]:
            out.print(f"became wrong: {abbreviate(changed['lost'])}", markup=False)
        verdict = describe_change(result)[1]
        out.print(
            f"{'' if verdict.startswith('not a fair test') else 'tuned minus base: '}{verdict} "
            f"({len(changed['gained'])} rows became correct, {len(changed['lost'])} became wrong)"
        )


def _find_interval(result: Mapping[str, Any], side: str, name: str) -> Sequence[float] | None:
    """Return the interval of a score other than the metric, if the evaluation has one."""
    interval: Sequence[float] | None = result.get("score_intervals", {}).get(side, {}).get(name)
    return interval


def _print_classes(result: Mapping[str, Any], out: Console) -> None:
    """Print precision and recall of each class with intervals, and the confusion matrix of a few classes."""
    if "classes" not in result:
        return
    table = Table("class", *(Column(name, justify="right") for name in ("rows", "precision", "recall", "F1")))
    for entry in result["classes"]:
        cells = []
        for name in ("precision", "recall"):
            interval = entry[f"{name}_interval"]
            ends = [f"{100 * end:.0f}" for end in interval or ()]
            cells.append(f"{entry[name]:.1%}  ({' to '.join(ends)})" if ends else "")
        f1 = "" if entry["f1"] is None else f"{entry['f1']:.1%}"
        table.add_row(escape(entry["label"]), f"{entry['rows']:,}", *cells, f1)
    out.print(table)
    confusion, names = result.get("confusion"), [entry["label"] for entry in result["classes"]]
    if confusion is None or len(names) > MAX_MATRIX:
        return
    numbers = [str(number) for number in range(1, len(names) + 1)]
    matrix = Table("label, and predicted as", *(Column(number, justify="right") for number in numbers))
    for i, (name, counts) in enumerate(zip(names, confusion, strict=True)):
        cells = [
            "" if not count else f"[bold]{count}[/]" if i == j else f"[red]{count}[/]" for j, count in enumerate(counts)
        ]
        matrix.add_row(f"{i + 1} {escape(name)}", *cells)
    out.print(matrix)


def _print_rewards(rewards: Mapping[str, Any], out: Console) -> None:
    low, high = rewards["accuracy_interval"]
    margin = f"margin {rewards['margin']:.3f}"
    if rewards["margin_interval"]:
        margin += " ({:.3f} to {:.3f})".format(*rewards["margin_interval"])
    out.print(f"rewards: {rewards['accuracy']:.1%} of pairs ranked correctly ({low:.1%} to {high:.1%}), {margin}")


def _print_judge(verdicts: Mapping[str, Any], out: Console) -> None:
    low, high = verdicts["interval"]
    out.print(
        f"judge {verdicts['name']}: tuned wins {verdicts['win_rate']:.1%} ({low:.1%} to {high:.1%}) of "
        f"{verdicts['rows']}: {verdicts['wins']} won, {verdicts['ties']} tied, {verdicts['losses']} lost",
        markup=False,
    )
    if verdicts["order_decided"]:
        out.print(f"{verdicts['order_decided']} of the ties: the verdict changed with the order of the answers")
    if verdicts.get("unjudged"):
        rows = f"{verdicts['unjudged']} of {verdicts['unjudged'] + verdicts['rows']} rows"
        out.print(f"{rows} are left out: {verdicts['unjudged_why']}", style="yellow", markup=False)


def _print_general(result: Mapping[str, Any], out: Console) -> None:
    table = Table("general set", "rows", "base", "tuned", "change in points")
    for category, scores in [*result["kinds"].items(), ("all", result)]:
        rates = (f"{scores['base']:.1%}", f"{scores['tuned']:.1%}")
        table.add_row(category, str(scores["rows"]), *rates, format_points(scores["difference"]))
    out.print(table)
    out.print(f"tuned minus base on the general set: {describe_general(result)}")


def _print_remedies(run: str, out: Console) -> None:
    """Print commands that train again in a way that preserves more of the base's abilities."""
    recipe_file = Path(run) / "recipe.yaml"
    if not run or not recipe_file.is_file():
        return
    recipe = read_resolved(recipe_file).recipe
    out.print("the tuned model lost general abilities: train again in one of these ways, and compare", style="yellow")
    start = f"{command_name()} train {shlex.quote(str(recipe_file))} --out {shlex.quote(f'{run}-2')}"
    can_keep = recipe.train.objective not in NOT_KEEPING and recipe.train.keep == "off"
    remedies = {
        "with the base's answers to general prompts": f"--train.keep {KEEP_SHARE}" if can_keep else "",
        "fewer epochs": f"--epochs {max(1, recipe.train.epochs / 3):g}" if recipe.train.epochs > 1 else "",
        "a lower rate": f"--lr {recipe.train.learning_rate / 3:.2g}" if recipe.train.learning_rate else "",
        "a lower rank": f"--rank {recipe.lora.r // 2} --alpha none"
        if recipe.lora.r > 1 and recipe.train.method == "lora"
        else "",
    }
    for what, options in remedies.items():
        if options:
            out.print(f"  {what}: {start} {options}", markup=False)


def _print_tasks(tasks: Mapping[str, Any], out: Console) -> None:
    table = Table("task", "metric", "documents", "base", "tuned", "change")
    for row in format_task_scores(tasks):
        table.add_row(*map(escape, row))
    if tasks:
        out.print(table)


def print_leaderboard(leaderboard: Sequence[Mapping[str, Any]], metric: str, out: Console = console) -> None:
    """Print models by score, best first, with the difference from the best on the same rows."""
    table = Table(Column(overflow="fold"), escape(metric), "95 % interval", "loss", "gap to the best")
    for entry in leaderboard:
        behind = entry["behind"]
        change = describe_difference(behind, metric)[1].partition(": ")[2].replace(", 95 % interval ", " (") + ")"
        is_clear = behind["low"] > 0 or behind["high"] < 0  # without a verdict, the rows are no fair test
        unclear = (
            f": {'not a fair test' if is_clear else 'no clear difference'}" if entry["verdict"] == "unclear" else ""
        )
        table.add_row(
            escape(entry["run"]),
            format_score(metric, entry["score"]),
            f"{format_score(metric, entry['low'])} to {format_score(metric, entry['high'])}",
            "" if entry["loss"] is None else format_score("loss", entry["loss"]),
            "" if entry is leaderboard[0] else f"{change}{unclear}",
        )
    out.print(table)


def print_samples(samples: Sequence[Mapping[str, Any]], out: Console = console) -> None:
    for sample in samples:
        out.print("prompt ", sample["prompt"], markup=False)
        if "gold" in sample:
            out.print("right  ", sample["gold"], markup=False, style="green")
        for side, style in (("base", "dim"), ("tuned", None)):
            if side in sample:
                out.print(f"{side:7}", sample[side].strip() or "(nothing)", markup=False, style=style)
        out.print()
