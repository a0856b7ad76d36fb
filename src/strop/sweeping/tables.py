"""Describe and print sweeps: the plan, each trial, the comparison of the settings, and the verdict."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from strop.display.numbers import format_duration
from strop.display.tables import console
from strop.sweeping.space import format_setting

if TYPE_CHECKING:
    from strop.sweeping.plan import SweepPlan
    from strop.sweeping.request import Request
    from strop.sweeping.split import Split


def describe_plan(request: Request, split: Split, plan: SweepPlan) -> list[str]:
    """Return lines on the settings, the rows, memory and time of a sweep."""
    lines = [f"over     {dimension.field}: {dimension.describe()}" for dimension in request.space]
    lines.append(f"trials   {plan.trials} ({request.sampler}); the first one is the default")
    lines.append("rows     " + ", ".join(f"{split.rows[name]:,} {name}" for name in ("train", "selection", "test")))
    lines += [f"note     {note}" for note in split.notes]
    memory = f"{plan.peak_bytes / 2**30:.2f} GiB at most ({format_setting(plan.largest)})"
    lines.append(f"memory   {memory}, {plan.usable_bytes / 2**30:.1f} GiB usable")
    seeds = plan.final_runs // 2
    final = (
        f"{plan.trials} trials, and up to {plan.final_runs} runs of the final check ({seeds} seed{'s' * (seeds > 1)})"
    )
    time = "unknown time" if plan.seconds is None else f"about {format_duration(plan.seconds)} of training"
    lines.append(f"time     {time}: {final}; scoring is not included")
    return lines


def describe_trial(state: Mapping[str, Any], number: int) -> str:
    """Return a line on a trial that has ended."""
    rows = state["trials"]
    done = sum(row["state"] not in ("waiting", "running") for row in rows)
    row = rows[number]
    parts = [
        f"trial    {number:03d} ({done} of {len(rows)})",
        "the default" if number == 0 else format_setting(row["setting"]),
    ]
    if row["state"] == "failed":
        return "  ".join([*parts, f"failed: {row['error']['message']}"])
    if row["state"] == "pruned":
        parts.append("pruned")
    else:
        parts.append(f"{metric_name(state)} {row['score']:.1%}")
    if row["loss"] is not None:
        parts.append(f"loss {row['loss']:.3f}")
    if row["same_as"] is not None:
        parts.append(f"the same setting as {row['same_as']:03d}")
    elif row["seconds"] is not None:
        parts.append(format_duration(row["seconds"]) + _time_left(state))
    return "  ".join(parts)


def _time_left(state: Mapping[str, Any]) -> str:
    times = [row["seconds"] for row in state["trials"] if row["seconds"] and row["same_as"] is None]
    times = times[1:] or times  # the first trial may have compiled kernels
    remaining = sum(row["state"] in ("waiting", "running") for row in state["trials"])
    remaining += state["plan"]["final_runs"]
    return f", at most {format_duration(remaining * sum(times) / len(times))} left" if times else ""


def describe_final(state: Mapping[str, Any], name: str) -> str:
    """Return a line on a run of the final check."""
    run = next(run for run in state["final"] if run["name"] == name)
    setting = "the default" if name.startswith("default") else format_setting(run["setting"])
    seed = "" if run["seed"] is None else f", seed {run['seed']}"
    if run["state"] == "failed":
        return f"check    {setting}{seed}  failed: {run['error']['message']}"
    return f"check    {setting}{seed}  {metric_name(state)} {run['score']:.1%} on {run['rows']:,} test rows"


def describe_result(state: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return the verdict in one sentence."""
    chosen, test = format_setting(state["selection"]["setting"]), result["test"]
    if result["verdict"] == "default":
        equal = sum(entry["standing"] != "worse" for entry in state["selection"]["ranking"]) - 1
        score = f"{test['default']['value']:.1%} on the test rows"
        if _only_seeds(state):
            return f"keep the default ({score}): the trials differ only by their seed, so their differences are noise"
        others = (
            "is the best setting"
            if not equal
            else f"is as good as the best of {equal + 1} equal settings, at no higher cost"
        )
        return f"keep the default: it {others} ({score})"
    if result["verdict"] == "failed":
        kept = "the default" if result["recommended"] == "default" else chosen
        return f"use {kept}; there is no comparison, because runs failed: {', '.join(result['failed'])}"
    if result["verdict"] == "no default":
        return f"use {chosen} ({test['chosen']['value']:.1%} on the test rows): the default failed"
    difference = result["difference"]
    value, low, high = (100 * difference[end] for end in ("value", "low", "high"))
    seeds = f"{difference['seeds']} seed{'s' * (difference['seeds'] > 1)}"
    points = (
        f"{value:+.1f} points on {difference['rows']:,} test rows, {seeds}, 95 % interval {low:+.1f} to {high:+.1f}"
    )
    keep = "keep the default" if result["recommended"] == "default" else f"use {chosen}, which costs less"
    if result["verdict"] == "no hits":
        why = "no setting gets a test row right, so nothing is compared"
        return f"keep the default: {why}; train longer, or use another --metric"
    if result["verdict"] == "better":
        return f"use {chosen}: it is better than the default ({points})"
    if result["verdict"] == "worse":
        return f"keep the default: {chosen} is worse ({points})"
    if result["verdict"] == "one seed":
        return f"no verdict: one seed cannot tell a setting from luck ({points}); {keep}, or give --seeds 3"
    return f"{keep}: no clear difference between {chosen} and the default ({points})"


def _only_seeds(state: Mapping[str, Any]) -> bool:
    return list(state["request"]["over"]) == ["seed"]


def print_sweep(state: Mapping[str, Any], out: Console = console) -> None:
    """Print the trials, how their settings compare, and the verdict."""
    name = metric_name(state)
    table = Table(title=f"{state['split']['selection']['rows']:,} selection rows", title_justify="left")
    for column in ("trial", "setting", name, "loss", "parameters", ""):
        table.add_column(escape(column), justify="left" if column in ("trial", "setting", "") else "right")
    standings = _standings(state)
    finished = [row for row in state["trials"] if row["state"] == "finished"]
    others = [row for row in state["trials"] if row["state"] != "finished"]
    for row in [*sorted(finished, key=lambda x: (-x["score"], x["number"])), *others]:
        entry = standings.get(row["number"])
        score = ""
        if row["state"] == "finished":
            score = f"{row['score']:.1%} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        table.add_row(
            f"{row['number']:03d}",
            escape(("default: " if row["number"] == 0 else "") + format_setting(row["setting"] or {})),
            score,
            "" if row["loss"] is None else f"{row['loss']:.3f}",
            f"{entry['parameters']:,}" if entry else "",
            entry["standing"] if entry else f"as {row['same_as']:03d}" if row["same_as"] is not None else row["state"],
        )
    out.print(table)
    for row in state["trials"]:
        if row["error"]:
            out.print(f"failed   {row['number']:03d}: {row['error']['message']}", markup=False, style="red")
    if state["result"] is not None:
        for side, value in state["result"]["test"].items():
            text = "default" if side == "default" else format_setting(state["selection"]["setting"])
            interval = f"{100 * value['low']:.1f} to {100 * value['high']:.1f}"
            out.print(f"test     {text}: {name} {value['value']:.1%} ({interval})", markup=False)
        out.print(f"verdict  {state['result']['sentence']}", markup=False, style="bold")


def _standings(state: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    ranking = (state["selection"] or {"ranking": []})["ranking"]
    return {number: entry for entry in ranking for number in entry["trials"]}


def metric_name(state: Mapping[str, Any]) -> str:
    name: str = state["metric"]
    return name


def next_command(folder: str) -> str:
    return f"strop train {shlex.quote(f'{folder}/winner.yaml')} --out runs/mine"
