"""Print results: tables, summaries, notes and JSON, on a console that shows control characters as codes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

from strop.errors import Location

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NOT_IN_PERCENT = ("loss", "perplexity", "tokens_per_answer", "tokens_per_s")


def escape_control(text: str) -> str:
    """Replace control characters with their hexadecimal codes, except line breaks and tabs."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class SafeConsole(Console):
    """A console for untrusted text (names, rows, templates): control characters are shown as codes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, emoji=False)  # "rows.jsonl:100:" is a file and a line, not an emoji code

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escape_control(segment.text))


console = SafeConsole(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: dict[str, Any], enabled: bool) -> None:
    """Print one JSON object on stdout if enabled (`--json`); characters that stdout cannot encode are escaped."""
    if enabled:
        text = json.dumps(value, ensure_ascii=False)
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(value)
        print(text)


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        console.print("note    ", note, markup=False, style="yellow")


def abbreviate(rows: Sequence[str]) -> str:
    """Join the first three row names with commas, followed by "..." if there are more."""
    return ", ".join([*rows[:3], *(["..."] if len(rows) > 3 else [])])


def command_name() -> str:
    """Return the command that runs strop: `strop` if it is on the PATH, otherwise a path or `python -m strop`."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"{Path(sys.executable).name} -m strop"
    on_path = shutil.which(program.name)
    if program.name != "strop" or (on_path is not None and Path(on_path).resolve() == program.resolve()):
        return "strop"
    try:
        return str(program.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(program)


def with_command_name(text: str) -> str:
    """Replace `strop` with `command_name()` in the commands that a message contains."""
    name = command_name()
    return text if name == "strop" else re.sub(r"(?<![\w/.-])strop (?=[a-z])", f"{name} ", text)


# --- runs and exports --------------------------------------------------------------------------------------------


def print_run_summary(report: dict[str, Any], as_json: bool) -> None:
    run = report["run"]
    console.print(
        f"[bold]done[/]     {report['steps']} steps, {report['tokens']:,} tokens in {report['seconds']:.0f} s "
        f"({report['tokens_per_s']:.0f} tokens/s, {report['supervised_tokens_per_s']:.0f} supervised)"
    )
    if memory := report.get("memory"):
        measured, predicted = memory["measured_peak_bytes"], memory["predicted_peak_bytes"]
        prediction = f", {predicted / 2**30:.2f} predicted ({measured / predicted - 1:+.0%})" if predicted else ""
        console.print(f"[bold]memory[/]   {measured / 2**30:.2f} GiB measured{prediction}")
    for finding in report.get("diagnosis", []):
        console.print(f"[yellow]finding[/]  {escape(finding)}")
    console.print(f"[bold]adapter[/]  {escape(str(report['adapter']))}\n[bold]report[/]   {escape(run)}/report.html")
    if report.get("objective", {}).get("name") != "reward":
        console.print(f"next     {command_name()} chat {shlex.quote(run)}", markup=False)
    hidden = ("recipe", "lock", "machine", "data_report")
    print_json({key: value for key, value in report.items() if key not in hidden}, as_json)


def print_adapters(adapters: Sequence[dict[str, Any]], out: Console = console) -> None:
    table = Table("adapter", "base", "rank", "modules", "size", "score")
    for adapter in adapters:
        size = f"{adapter['size_bytes'] / 1e6:.1f} MB"
        modules = ", ".join(adapter["target_modules"])
        cells = (adapter["folder"], adapter["base"], str(adapter["rank"]), modules, size, adapter["score"])
        table.add_row(*map(escape, cells))
    out.print(table if adapters else "no adapters found")


def print_fields(values: dict[str, Any]) -> None:
    for name, value in values.items():
        console.print(f"{name.removesuffix('_bytes'):14} {_format_value(name, value)}", markup=False)


def _format_value(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value / 1e6:.1f} MB" if name.endswith("_bytes") else f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)


# --- evaluations -------------------------------------------------------------------------------------------------


def print_evaluation(result: dict[str, Any], samples: int) -> None:
    """Print the scores of one model, and up to `samples` answers."""
    print_notes(result["notes"])
    print_scores(result)
    for part, print_part in (("rewards", _print_rewards), ("judge", _print_judge), ("general", _print_general)):
        if part in result:
            print_part(result[part])
    if "regression" in result:
        print_scores(result["regression"], rows_name="rows that should not get worse")
    _print_tasks(result.get("tasks", {}))
    print_samples(result["samples"][:samples])


def print_scores(result: dict[str, Any], rows_name: str | None = None) -> None:
    """Print the scores of base and tuned model in columns, with 95 % intervals."""
    from strop.evaluation.metrics import describe_difference, rows_label

    sides = [side for side in ("base", "tuned") if side in result]
    title = f"{result.get('run', '')}  {result['rows']} {rows_name or rows_label(result)}"
    table = Table(title=escape(title.strip()), title_justify="left")
    table.add_column("")
    for side in sides:
        table.add_column(side, justify="right")
    for name in result[sides[0]]:
        cells = []
        for side in sides:
            value = result[side][name]
            cell = f"{value:.3f}" if name in _NOT_IN_PERCENT else f"{value:.1%}"
            if name == result["metric"]:
                low, high = result["intervals"][side]
                cell += f"  ({low:.1%} to {high:.1%})"
            cells.append(cell)
        table.add_row(escape(name), *cells)
    console.print(table)
    if result.get("left_out"):
        rows = [str(Location(**location)) for location in result["left_out"]]
        console.print(f"left out: {len(rows)} rows: {abbreviate(rows)}", markup=False, style="yellow")
    if "difference" in result:
        changed = result.get("changed", {"gained": [], "lost": []})
        console.print(
            f"tuned minus base: {describe_difference(result['difference'])[1]} "
            f"({len(changed['gained'])} rows became correct, {len(changed['lost'])} became wrong)"
        )
        if changed["lost"]:
            console.print(f"became wrong: {abbreviate(changed['lost'])}", markup=False)


def _print_rewards(rewards: Mapping[str, Any]) -> None:
    low, high = rewards["accuracy_interval"]
    margin = f"margin {rewards['margin']:.3f}"
    if rewards["margin_interval"]:
        margin += " ({:.3f} to {:.3f})".format(*rewards["margin_interval"])
    console.print(f"rewards: {rewards['accuracy']:.1%} of pairs ranked correctly ({low:.1%} to {high:.1%}), {margin}")


def _print_judge(verdicts: Mapping[str, Any]) -> None:
    low, high = verdicts["interval"]
    console.print(
        f"judge {verdicts['name']}: tuned wins {verdicts['win_rate']:.1%} ({low:.1%} to {high:.1%}) of "
        f"{verdicts['rows']}: {verdicts['wins']} won, {verdicts['ties']} tied, {verdicts['losses']} lost",
        markup=False,
    )
    if verdicts["order_decided"]:
        console.print(f"{verdicts['order_decided']} of the ties: the verdict changed with the order of the answers")
    if verdicts["unsaid"]:
        console.print(f"{verdicts['unsaid']} replies of the judge had no verdict and count as ties", style="yellow")


def _print_general(result: dict[str, Any]) -> None:
    from strop.evaluation.metrics import describe_general, format_points

    table = Table("general set", "rows", "base", "tuned", "change in points")
    for category, scores in [*result["kinds"].items(), ("all", result)]:
        rates = (f"{scores['base']:.1%}", f"{scores['tuned']:.1%}")
        table.add_row(category, str(scores["rows"]), *rates, format_points(scores["difference"]))
    console.print(table)
    console.print(f"tuned minus base on the general set: {describe_general(result)}")


def _print_tasks(tasks: dict[str, Any]) -> None:
    from strop.evaluation.metrics import format_task_scores

    table = Table("task", "metric", "documents", "base", "tuned", "change")
    for row in format_task_scores(tasks):
        table.add_row(*map(escape, row))
    if tasks:
        console.print(table)


def print_leaderboard(leaderboard: Sequence[dict[str, Any]], metric: str) -> None:
    """Print models by score, best first, with the difference from the best on the same rows."""
    table = Table("", escape(metric), "95 % interval", "loss", "gap to the best")
    for entry in leaderboard:
        low, value, high = (100 * entry["behind"][name] for name in ("low", "value", "high"))
        unclear = ": no clear difference" if entry["verdict"] == "unclear" else ""
        table.add_row(
            escape(entry["run"]),
            f"{entry['score']:.1%}",
            f"{entry['low']:.1%} to {entry['high']:.1%}",
            "" if entry["loss"] is None else f"{entry['loss']:.3f}",
            "" if entry is leaderboard[0] else f"{value:+.1f} points ({low:+.1f} to {high:+.1f}){unclear}",
        )
    console.print(table)


def print_samples(samples: Sequence[dict[str, Any]]) -> None:
    for sample in samples:
        console.print()
        console.print("prompt ", sample["prompt"], markup=False)
        for side, style in (("base", "dim"), ("tuned", None)):
            if side in sample:
                console.print(f"{side:7}", sample[side].strip() or "(nothing)", markup=False, style=style)
