"""Write report.html: report.json and the events of a run as one page, without scripts or external resources.

All text is escaped, because samples may contain text from untrusted sources.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from strop.display.numbers import format_duration, format_figure, format_percent
from strop.display.plots import Interval, Point, Series, plot_frontier, plot_loss, plot_metric
from strop.display.tables import describe_memory_scope
from strop.evaluation import metrics
from strop.runs.events import STEP_TITLES, describe_turns, drop_undone_events, list_row_counts, split_prompt
from strop.runs.folder import read_json, write_atomic

MAX_CHARACTERS = 600  # longer texts of a sample are truncated
MAX_SAMPLES = 12
SHADE = 40  # percent of colour behind the number of all rows of a class, so that it stays readable
NORMAL_EVENTS = {
    "machine", "recipe", "data", "reference", "rehearsal", "start", "step", "eval", "samples", "save",
    "reference-check", "end", "note", "answers",
}  # fmt: skip
EVENT_NAMES = {
    "override": "changed option", "skip": "skipped step", "doubt": "suspect step", "shrink": "shortage of memory",
}  # fmt: skip


def write_report(folder: Path, report: dict[str, Any], events: Iterable[dict[str, Any]]) -> Path:
    """Write report.html from the content of report.json and the run's events, and return its path."""
    path = folder / "report.html"
    named = {**report, "run": str(folder)}  # the folder may have been renamed
    write_atomic(path, render(named, drop_undone_events(list(events)), read_json(folder / "notes.json")))
    return path


def render(
    report: Mapping[str, Any], events: Sequence[Mapping[str, Any]], notes: Mapping[str, Any] | None = None
) -> str:
    """Return the page. notes: the run's note and tags."""
    evaluation = report.get("evaluation") or {}
    samples = evaluation.get("samples") or report.get("samples") or []
    interval = max(1.0, len(samples) / MAX_SAMPLES)  # evenly spaced samples are representative
    intervals = evaluation.get("intervals") or report.get("intervals") or {}
    recipe, regression = report.get("recipe") or [], _describe_change(report.get("regression") or {})
    train, evaluated = _read_series(events, "step", "loss"), _read_series(events, "eval", "loss")
    event_counts = Counter(str(event.get("event")) for event in events)
    stopped = _describe_stop(report, events)
    if stopped and event_counts["stop"] == 1:  # the page already says so
        del event_counts["stop"]
    shown = [_format_sample(samples[int(i * interval)]) for i in range(min(len(samples), MAX_SAMPLES))]
    page = _template().render(
        title=Path(str(report.get("run") or "run")).name,
        dates=_describe_dates(events),
        stopped=stopped,
        tags=tags if isinstance(tags := (notes or {}).get("tags"), list) else [],
        note=(notes or {}).get("note") or "",
        verdict=_describe_change(evaluation) or _describe_baseline(evaluation),
        evaluation_notes=metrics.list_notes(evaluation),
        facts=list(_list_key_numbers(report)),
        scores=list(_format_scores(evaluation, intervals)),
        rows=evaluation.get("rows"),
        train_rows=evaluation.get("train_rows"),
        loss_plot=plot_loss(train, evaluated, 8.6, 2.6),
        narrow_loss_plot=plot_loss(train, evaluated, 4.0),  # for phones, where the text of the wide plot is too small
        plots=list(_plot_steps(events)),
        samples=shown,
        marks={mark for sample in shown for answer in sample["answers"] for _, mark in answer["parts"]},
        num_samples=evaluation.get("rows") or len(samples),
        completions=_find_completions(events),
        data=list(list_row_counts(_data_report(report))),
        data_warnings=(report.get("data_report") or {}).get("warnings") or [],
        memory=list(_list_memory_peaks(report.get("memory") or {})),
        chosen=[_format_choice(choice) for choice in recipe if choice.get("origin") != "default"],
        defaults=[_format_choice(choice) for choice in recipe if choice.get("origin") == "default"],
        provenance=[
            (title, [(key, text) for key, text in _flatten(report[name]) if text != "-"])
            for name, title in (("lock", "Hashes and versions"), ("machine", "Machine"))
            if report.get(name)
        ],
        recoveries=", ".join(
            _count_events(kind, n) for kind, n in event_counts.items() if n > 0 and kind not in NORMAL_EVENTS
        ),
        general=_format_general(report.get("general") or {}, evaluation, intervals),
        classes=list(_list_classes(evaluation)),
        confusion=_format_confusion(evaluation),
        tasks=list(metrics.format_task_scores(report.get("tasks") or {})),
        regression=f"{regression[1]} (rows that should not get worse)" if regression else "",
        trace=_find_trace(events),
        findings=[str(finding) for finding in report.get("diagnosis") or []],
    )
    # JSON may contain a lone surrogate, which UTF-8 cannot encode.
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files(__package__) / "report.html").read_text(encoding="utf-8"))


def _describe_change(evaluation: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return (CSS class, sentence) on the change from base to tuned, or None if one of them was not evaluated."""
    base, tuned, metric = evaluation.get("base"), evaluation.get("tuned"), evaluation.get("metric")
    if not base or not tuned or metric not in base or metric not in tuned:
        return None
    rows = f" on {metrics.describe_rows(evaluation)}" if evaluation.get("rows") else ""
    before, after = (metrics.format_score(str(metric), side[metric]) for side in (base, tuned))
    change = f"{metrics.score_name(str(metric), metric)} went from {before} to {after}{rows}"
    if not evaluation.get("difference"):
        return "plain", f"{change}."
    kind, text = metrics.describe_change(evaluation)
    return kind, f"{text[0].upper()}{text[1:]}: {change}."


def _count_events(kind: str, number: int) -> str:
    """Return a count of events in words, such as "2 resumes"."""
    name = EVENT_NAMES.get(kind, kind)
    return f"{number} {name}{'s' * (number != 1)}"


def _describe_stop(report: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> str:
    """Return where a run was stopped before its last step, or why its resume failed, or ""."""
    if error := report.get("error"):
        fix = f" Fix: {error['fix']}." if error.get("fix") else ""
        step = report.get("adapter_step")
        return f"The run was resumed and failed: {error.get('message')}.{fix} The adapter is that of step {step}."
    total = next((event["steps"] for event in reversed(events) if _is_number(event.get("steps"))), None)
    step = report.get("steps")
    if report.get("ended") != "stop" or not _is_number(step) or total is None or step >= total:
        return ""
    command = f"strop resume {shlex.quote(str(report.get('run') or 'RUN'))}"
    return f"Stopped after step {step:,} of {total:,}. Resume the run to finish it: {command}"


def _describe_dates(events: Sequence[Mapping[str, Any]]) -> str:
    """Return the local time of the first and the last event, or "" without events."""
    times = [event["time"] for event in events if _is_number(event.get("time"))]
    texts = [datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M") for at in (times[:1] + times[-1:])]
    return " to ".join(dict.fromkeys(texts))


def _list_key_numbers(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the numbers at the top of the page."""
    if _is_number(report.get("steps")):
        yield "steps", f"{report['steps']:,}"
    for field, name, format_value in (
        ("seconds", "training time", format_duration),
        ("predicted_seconds", "planned for these steps, on an idle machine", format_duration),
        ("eval_seconds", "evaluation and samples", format_duration),
        ("tokens", "tokens", "{:,}".format),
        ("supervised_tokens", "supervised tokens", "{:,}".format),
        ("tokens_per_s", "tokens/s", "{:,.0f}".format),
    ):
        if _is_number(report.get(field)) and (report[field] or field != "eval_seconds"):
            yield name, format_value(report[field])
    loss = report.get("loss") or {}
    if _is_number(loss.get("first")) and _is_number(loss.get("last")):
        yield "training loss", " → ".join(metrics.format_number("loss", loss[end]) for end in ("first", "last"))
    if _is_number(report.get("eval_loss")):
        yield "evaluation loss", metrics.format_number("loss", report["eval_loss"])
    ranking = (report.get("objective") or {}).get("held_out") or {}
    if _is_number(ranking.get("accuracy")):
        low, high = (format_percent(end) for end in ranking["accuracy_interval"])
        name = "accuracy, held out" if "macro_f1" in ranking else "ranked correctly, held out"
        yield name, f"{format_percent(ranking['accuracy'])} ({low} to {high})"
    for score in metrics.RETRIEVAL_SCORES:
        if _is_number(ranking.get(score)):
            text, interval = format_percent(ranking[score]), ranking.get(f"{score}_interval")
            text += " ({} to {})".format(*map(format_percent, interval)) if interval else ""
            yield f"{metrics.score_name(score, None)}, held out", text
    if _is_number(ranking.get("reward")):
        low, high = ranking.get("reward_interval") or (ranking["reward"],) * 2
        yield "reward, held out", f"{ranking['reward']:.3f} ({low:.3f} to {high:.3f})"
    judge = (report.get("evaluation") or {}).get("judge") or {}
    if _is_number(judge.get("win_rate")):
        low, high = (format_percent(end) for end in judge["interval"])
        yield (
            f"wins over its base, judged by {judge['name']}",
            f"{format_percent(judge['win_rate'])} ({low} to {high})",
        )
    memory = report.get("memory") or {}
    if _is_number(memory.get("measured_peak_bytes")):
        yield f"peak memory{describe_memory_scope(report)}", _format_bytes(memory["measured_peak_bytes"])


def _format_scores(evaluation: Mapping[str, Any], intervals: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield {name, sides: [{side, text, share, interval}]} for each score, starting with the evaluation's metric."""
    metric = evaluation.get("metric")
    sides = [side for side in ("base", "baseline", "tuned") if evaluation.get(side)]
    names = dict.fromkeys(name for side in sides for name in evaluation[side] if _is_number(evaluation[side][name]))
    names.pop("tokens_per_s", None)  # of the evaluation, which generates both answers at once
    for name in sorted(names, key=lambda name: name != metric):
        rates = (metric, *metrics.METRICS, "intent", "valid_json", "preference_sum", "macro_f1", "micro_f1")
        rates = (*rates, *metrics.RETRIEVAL_SCORES)
        is_rate = (name in rates or name.endswith("_rate")) and not metrics.is_number(name)
        cells = []
        for side in sides:
            value = evaluation[side].get(name)
            cell: dict[str, Any] = {"side": side, "text": "", "share": None, "interval": None}
            if _is_number(value):
                cell["text"] = format_percent(value) if is_rate else metrics.format_number(name, value)
                cell["share"] = 100 * value if is_rate else None
            interval = intervals.get(side) if name == metric else None
            interval = interval or ((evaluation.get("score_intervals") or {}).get(side) or {}).get(name)
            if interval:
                low, high = (100 * float(end) for end in interval)
                ends = (format_percent(end) if is_rate else metrics.format_number(name, end) for end in interval)
                text = " to ".join(ends)
                cell["interval"] = {"low": low, "high": high, "text": text}
            cells.append(cell)
        yield {"name": metrics.score_name(name, metric), "sides": cells}


def _describe_baseline(evaluation: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return (CSS class, sentence) on a model and its baseline, or None without one."""
    verdict = metrics.describe_baseline(evaluation)
    if verdict is None:
        return None
    metric = str(evaluation["metric"])
    tuned, baseline = (format_percent(evaluation[side][metric]) for side in ("tuned", "baseline"))
    kind, text = verdict
    rows = metrics.describe_rows(evaluation)
    name = metrics.score_name(metric, metric)
    return kind, f"{text[0].upper()}{text[1:]}: {name} {tuned}, of the baseline {baseline}, on {rows}."


def _list_classes(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield (label, rows, precision, recall, F1) of each class, with intervals."""
    for entry in evaluation.get("classes") or ():
        cells = [str(entry["label"]), f"{entry['rows']:,}"]
        for name in ("precision", "recall"):
            interval = entry[f"{name}_interval"]
            ends = () if interval is None else map(format_percent, interval)
            cells.append("" if interval is None else "{} ({} to {})".format(format_percent(entry[name]), *ends))
        yield (*cells, "" if entry["f1"] is None else format_percent(entry["f1"]))


def _format_confusion(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return {label, cells: [{count, shade, right}]} for each row of a confusion matrix. shade: percent of colour."""
    rows = []
    names = [str(entry["label"]) for entry in evaluation.get("classes") or ()]
    for i, (name, counts) in enumerate(zip(names, evaluation.get("confusion") or [], strict=False)):
        total = max(1, sum(counts))
        cells = [
            {"count": count, "shade": round(SHADE * count / total), "right": i == j} for j, count in enumerate(counts)
        ]
        rows.append({"label": name, "cells": cells})
    return rows


def _format_general(
    general: Mapping[str, Any], evaluation: Mapping[str, Any], intervals: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return {verdict, rows, plot} for the general set; a row is (kind, number of questions, base, tuned, change).

    The plot has the score of the evaluation over that of the general set, if both models have both.
    """
    if not general:
        return None
    rows = []
    for kind, values in [*general["kinds"].items(), ("all", general)]:
        rates = (format_percent(values["base"]), format_percent(values["tuned"]))
        rows.append((kind, str(values["rows"]), *rates, metrics.format_points(values["difference"])))
    text = metrics.describe_general(general)
    metric, general_intervals = evaluation.get("metric"), general.get("intervals") or {}
    points: list[Point] = [
        (side, _percents(general[side], general_intervals[side]), _percents(evaluation[side][metric], intervals[side]))
        for side in ("base", "tuned")
        if side in general_intervals and side in intervals and metric in evaluation.get(side, ())
    ]
    plot = plot_frontier(points, str(metric)) if len(points) == 2 and not metrics.is_number(str(metric)) else None
    return {"verdict": f"{text[0].upper()}{text[1:]}.", "rows": rows, "plot": plot}


def _percents(share: float, interval: Sequence[float]) -> Interval:
    low, high = interval
    return 100 * low, 100 * share, 100 * high


def _find_trace(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return {step, prompt, turns} of the last trace in an environment that the run has logged, or None."""
    logged = [event for event in events if event.get("event") == "answers" and event.get("messages")]
    if not logged:
        return None
    prompt, turns = split_prompt(logged[-1]["messages"])
    return {"step": logged[-1].get("step"), "prompt": _truncate(prompt), "turns": describe_turns(turns)}


def _find_completions(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return {step, samples} of the completions that were sampled at the last evaluation in training, or None."""
    logged = [event for event in events if event.get("event") == "samples" and event.get("samples")]
    if not logged:
        return None
    names = ("prompt", "reference", "completion")
    samples = [
        {name: _truncate(str(sample.get(name) or "")) for name in names} | {"cut": bool(sample.get("cut"))}
        for sample in logged[-1]["samples"][:MAX_SAMPLES]
    ]
    return {"step": logged[-1].get("step"), "samples": samples}


def _data_report(report: Mapping[str, Any]) -> dict[str, Any]:
    data = report.get("data") or {}
    held_out = (report.get("data_report") or {}).get("held_out")
    return {"rows": data, "by_reason": data.get("by_reason"), "held_out": held_out}


def _format_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return {prompt, gold, answers} of a sample. Each answer has {side, hit, parts, cut}; see `mark_differences`."""
    gold = None if sample.get("gold") is None else _truncate(str(sample["gold"]))
    answers = []
    for side in ("base", "tuned"):
        if sample.get(side) is not None:
            text = _truncate(str(sample[side]).strip())
            parts = (
                metrics.mark_differences(gold, text) if text and gold is not None else [(text or "(nothing)", "same")]
            )
            answers.append(
                {"side": side, "hit": sample.get(f"{side}_hit"), "parts": parts, "cut": sample.get(f"{side}_cut")}
            )
    return {"prompt": _truncate(str(sample.get("prompt", ""))), "gold": gold, "answers": answers}


def _truncate(text: str) -> str:
    excess = len(text) - MAX_CHARACTERS
    return text if excess <= 0 else f"{text[:MAX_CHARACTERS]} … ({excess:,} more characters)"


def _list_memory_peaks(memory: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field, name in (("predicted_peak_bytes", "predicted peak"), ("measured_peak_bytes", "measured peak")):
        if _is_number(memory.get(field)):
            yield name, _format_bytes(memory[field])


def _format_choice(choice: Mapping[str, Any]) -> dict[str, str]:
    value = choice.get("value")
    if isinstance(value, bool):
        text = str(value).lower()
    else:
        text = "-" if value in (None, [], {}) else format_figure(value) if isinstance(value, float) else str(value)
    return {name: str(choice.get(name) or "") for name in ("field", "origin", "why")} | {"value": text}


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested values as (dotted name, text)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        yield name, ", ".join(str(inner) for inner in value) or "-"
    elif name.endswith("_bytes") and _is_number(value):
        yield name.removesuffix("_bytes"), _format_bytes(value)
    else:
        yield name, "-" if value is None else str(value)


def _format_bytes(size: float) -> str:
    """Return a size in GiB, or in MiB below 1 GiB, as the page does (dash/static/format.js)."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.{1 if size < 10 * 2**20 else 0}f} MiB"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read_series(events: Sequence[Mapping[str, Any]], kind: str, field: str) -> Series:
    """Return a field's values by step. If a step was repeated after a resume or rollback, the last value counts."""
    values = {
        event["step"]: event[field]
        for event in events
        if event.get("event") == kind and _is_number(event.get("step")) and _is_number(event.get(field))
    }
    return dict(sorted(values.items()))


def _plot_steps(events: Sequence[Mapping[str, Any]]) -> Iterator[Markup]:
    parts = dict.fromkeys(name for event in events for name in event if name.startswith("reward/"))
    for field, title in {**STEP_TITLES, **{name: name for name in parts}}.items():
        series, unit = _read_series(events, "step", field), ""
        if field.endswith("_bytes"):
            series, unit = {step: size / 2**30 for step, size in series.items()}, ", GiB"
        if len(series) > 1:
            yield plot_metric(series, title + unit)
