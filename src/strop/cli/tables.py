"""Print results: tables, summaries, notes and JSON, on a console that shows control characters as codes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

from strop.errors import Where

if TYPE_CHECKING:
    from strop.exporting.parity import Parity

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NOT_SHARES = ("loss", "perplexity", "tokens_per_answer", "tokens_per_s")  # scores that are not shown in percent


def escape_control(text: str) -> str:
    """Replace control characters by their hexadecimal codes; line breaks and tabs stay."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class SafeConsole(Console):
    """A console for untrusted text (names, rows, templates): control characters are shown as codes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, emoji=False)  # "rows.jsonl:100:" is a place, not an emoji code

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escape_control(segment.text))


console = SafeConsole(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: dict[str, Any], enabled: bool) -> None:
    """Print one JSON object on stdout if `--json` is given; characters that stdout cannot encode are escaped."""
    if enabled:
        text = json.dumps(value, ensure_ascii=False)
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(value)
        print(text)


def print_notes(notes: Sequence[str], out: Console = console) -> None:
    for note in notes:
        out.print("note    ", note, markup=False, style="yellow")


def abbreviate(rows: Sequence[str]) -> str:
    """Join the first three names, and "..." for the rest."""
    return ", ".join([*rows[:3], *(["..."] if len(rows) > 3 else [])])


def command_name() -> str:
    """Return how strop was called: `strop` if it is on the PATH, otherwise a path or `python -m strop`."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{Path(sys.executable).name} -m strop"
    on_path = shutil.which(called.name)
    if called.name != "strop" or (on_path is not None and Path(on_path).resolve() == called.resolve()):
        return "strop"
    try:
        return str(called.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(called)


def with_command_name(text: str) -> str:
    """Replace `strop COMMAND` in a message by a command that works in this environment."""
    name = command_name()
    return text if name == "strop" else re.sub(r"(?<![\w/.-])strop (?=[a-z])", f"{name} ", text)


# --- runs and artifacts ------------------------------------------------------------------------------------------


def print_run_summary(report: dict[str, Any], as_json: bool) -> None:
    """Print how a run ended, its memory, and the paths of its adapter and report."""
    run = report["run"]
    console.print(
        f"[bold]done[/]     {report['steps']} steps, {report['tokens']:,} tokens in {report['seconds']:.0f} s "
        f"({report['tokens_per_s']:.0f} tokens/s, {report['supervised_tokens_per_s']:.0f} supervised)"
    )
    if memory := report.get("memory"):
        measured, predicted = memory["measured_peak_bytes"], memory["predicted_peak_bytes"]
        versus = f", {predicted / 2**30:.2f} predicted ({measured / predicted - 1:+.0%})" if predicted else ""
        console.print(f"[bold]memory[/]   {measured / 2**30:.2f} GiB measured{versus}")
    for finding in report.get("diagnosis", []):
        console.print(f"[yellow]finding[/]  {escape(finding)}")
    console.print(f"[bold]adapter[/]  {escape(str(report['adapter']))}\n[bold]report[/]   {escape(run)}/report.html")
    if report.get("objective", {}).get("name") != "reward":
        console.print(f"next     {command_name()} chat {shlex.quote(run)}", markup=False)
    hidden = ("recipe", "lock", "machine", "data_report")
    print_json({key: value for key, value in report.items() if key not in hidden}, as_json)


def print_adapters(adapters: Sequence[dict[str, Any]], out: Console = console) -> None:
    table = Table("adapter", "base", "rank", "on", "size", "score")
    for adapter in adapters:
        size = f"{adapter['size_bytes'] / 1e6:.1f} MB"
        modules = ", ".join(adapter["target_modules"])
        cells = (adapter["folder"], adapter["base"], str(adapter["rank"]), modules, size, adapter["score"])
        table.add_row(*map(escape, cells))
    out.print(table if adapters else "no adapters here")


def print_fields(values: dict[str, Any], out: Console = console) -> None:
    for name, value in values.items():
        out.print(f"{name.removesuffix('_bytes'):14} {_format_value(name, value)}", markup=False)


def _format_value(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value / 1e6:.1f} MB" if name.endswith("_bytes") else f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)


def print_base(base: str, losses: dict[str, float]) -> None:
    for candidate, loss in losses.items():
        console.print(f"[bold]base[/]     {candidate}: loss {loss:.4f}{' (used)' if base == candidate else ''}")


def print_parity(parity: Parity | None) -> None:
    """Print how a merged or exported model differs from its adapter on the base."""
    if parity is None:
        console.print("[bold]parity[/]   not measured")
        return
    flips = f"{parity.clear_flips} clear flip{'s' * (parity.clear_flips != 1)} in {parity.positions:,} positions"
    effect = "" if parity.effect is None else f"; {parity.effect.value:.1%} of the adapter's effect"
    console.print(
        f"[bold]parity[/]   mean KL {parity.kl_mean:.2g}, at most {parity.kl_max:.2g}; {flips} (top-1 agreement "
        f"{parity.top1_agreement:.2%}){effect}; loss {parity.loss_difference:+.1e}"
    )


# --- evaluations -------------------------------------------------------------------------------------------------


def print_evaluation(result: dict[str, Any], samples: int) -> None:
    """Print all parts of one model's evaluation, with up to `samples` answers."""
    print_notes(result["notes"])
    print_scores(result)
    for part, show in (("rewards", print_rewards), ("judge", print_judge), ("general", print_general)):
        if part in result:
            show(result[part])
    if "regression" in result:
        print_scores(result["regression"], title="rows that should not get worse")
    print_tasks(result.get("tasks", {}))
    print_samples(result["samples"][:samples])


def print_scores(result: dict[str, Any], out: Console = console, title: str | None = None) -> None:
    """Print the scores of base and tuned model side by side, with 95 % intervals. title: describes the rows."""
    from strop.evaluation.metrics import Difference, rows_label, verdict

    title = title or rows_label(result)
    sides = [side for side in ("base", "tuned") if side in result]
    heading = escape(f"{result.get('run', '')}  {result['rows']} {title}".strip())
    table = Table(title=heading, title_justify="left")
    table.add_column("")
    for side in sides:
        table.add_column(side, justify="right")
    for name in result[sides[0]]:
        cells = []
        for side in sides:
            value = result[side][name]
            cell = f"{value:.3f}" if name in _NOT_SHARES else f"{value:.1%}"
            if name == result["metric"]:
                low, high = result["intervals"][side]
                cell += f"  ({low:.1%} to {high:.1%})"
            cells.append(cell)
        table.add_row(escape(name), *cells)
    out.print(table)
    if result.get("left_out"):
        places = [str(Where(**place)) for place in result["left_out"]]
        out.print(f"left out: {len(places)} rows: {abbreviate(places)}", markup=False, style="yellow")
    if "difference" in result:
        changed = result.get("changed", {"gained": [], "lost": []})
        out.print(
            f"tuned minus base: {verdict(Difference(**result['difference']))[1]} "
            f"({len(changed['gained'])} rows gained, {len(changed['lost'])} lost)"
        )
        if changed["lost"]:
            out.print(f"lost: {abbreviate(changed['lost'])}", markup=False)


def print_rewards(rewards: Mapping[str, Any], out: Console = console) -> None:
    """Print the share of pairs in which the chosen answer has the higher reward, and the reward margin."""
    low, high = rewards["accuracy_interval"]
    margin = f"margin {rewards['margin']:.3f}"
    if rewards["margin_interval"]:
        margin += " ({:.3f} to {:.3f})".format(*rewards["margin_interval"])
    out.print(f"rewards: {rewards['accuracy']:.1%} of the pairs ranked right ({low:.1%} to {high:.1%}), {margin}")


def print_judge(verdicts: Mapping[str, Any], out: Console = console) -> None:
    low, high = verdicts["interval"]
    out.print(
        f"judge {verdicts['name']}: tuned wins {verdicts['win_rate']:.1%} ({low:.1%} to {high:.1%}) of "
        f"{verdicts['rows']}: {verdicts['wins']} won, {verdicts['ties']} tied, {verdicts['losses']} lost",
        markup=False,
    )
    if verdicts["order_decided"]:
        out.print(f"{verdicts['order_decided']} of the ties: the verdict changed with the order of the answers")
    if verdicts["unsaid"]:
        out.print(f"{verdicts['unsaid']} replies of the judge had no verdict and count as ties", style="yellow")


def print_general(result: dict[str, Any], out: Console = console) -> None:
    """Print the scores on the general set by kind, and whether training made them worse."""
    from strop.evaluation.metrics import general_verdict, in_points

    table = Table("general set", "rows", "base", "tuned", "change in points")
    for kind, scores in [*result["kinds"].items(), ("all", result)]:
        rates = (f"{scores['base']:.1%}", f"{scores['tuned']:.1%}")
        table.add_row(kind, str(scores["rows"]), *rates, in_points(scores["difference"]))
    out.print(table)
    out.print(f"tuned minus base on the general set: {general_verdict(result)}")


def print_tasks(tasks: dict[str, Any], out: Console = console) -> None:
    from strop.evaluation.metrics import task_rows

    table = Table("task", "metric", "documents", "base", "tuned", "change")
    for row in task_rows(tasks):
        table.add_row(*map(escape, row))
    if tasks:
        out.print(table)


def print_leaderboard(board: Sequence[dict[str, Any]], metric: str, out: Console = console) -> None:
    """Print models by score, best first, with the difference from the best on the same rows."""
    table = Table("", escape(metric), "95 % interval", "loss", "behind the best")
    for line in board:
        behind, clear = line["behind"], line["verdict"] != "unclear"
        points = f"{100 * behind['value']:+.1f} points ({100 * behind['low']:+.1f} to {100 * behind['high']:+.1f})"
        table.add_row(
            escape(line["run"]),
            f"{line['score']:.1%}",
            f"{line['low']:.1%} to {line['high']:.1%}",
            "" if line["loss"] is None else f"{line['loss']:.3f}",
            "" if line is board[0] else points if clear else f"{points}: no clear difference",
        )
    out.print(table)


def print_samples(samples: Sequence[dict[str, Any]], out: Console = console) -> None:
    for sample in samples:
        out.print()
        out.print("prompt ", sample["prompt"], markup=False)
        if "base" in sample:
            out.print("base   ", sample["base"].strip() or "(nothing)", markup=False, style="dim")
        if "tuned" in sample:
            out.print("tuned  ", sample["tuned"].strip() or "(nothing)", markup=False)
