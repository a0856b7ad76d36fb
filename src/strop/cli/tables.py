"""What an evaluation found, as people read it: scores side by side, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from strop.cli.terminal import console, some_of
from strop.errors import Where

_NOT_SHARES = ("loss", "perplexity", "tokens_per_answer", "tokens_per_s")


def print_scores(result: dict[str, Any], out: Console = console, title: str | None = None) -> None:
    """Base and tuned side by side with 95 % intervals. title: what the rows are."""
    from strop.evaluation.metrics import Difference, rows_label, verdict

    title = title or rows_label(result)
    sides = [side for side in ("base", "tuned") if side in result]
    named = escape(f"{result.get('run', '')}  {result['rows']} {title}".strip())
    table = Table(title=named, title_justify="left")
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
        out.print(f"left out: {len(places)} rows: {some_of(places)}", markup=False, style="yellow")
    if "difference" in result:
        changed = result.get("changed", {"gained": [], "lost": []})
        out.print(
            f"tuned minus base: {verdict(Difference(**result['difference']))[1]} "
            f"({len(changed['gained'])} rows gained, {len(changed['lost'])} lost)"
        )
        if changed["lost"]:
            out.print(f"lost: {some_of(changed['lost'])}", markup=False)


def print_rewards(found: Mapping[str, Any], out: Console = console) -> None:
    """Of pairs: how often the chosen answer gets the higher reward, and by how much."""
    low, high = found["accuracy_interval"]
    margin = f"margin {found['margin']:.3f}"
    if found["margin_interval"]:
        margin += " ({:.3f} to {:.3f})".format(*found["margin_interval"])
    out.print(f"rewards: {found['accuracy']:.1%} of the pairs ranked right ({low:.1%} to {high:.1%}), {margin}")


def print_judged(found: Mapping[str, Any], out: Console = console) -> None:
    """How often a judge finds the tuned answer better than the base's."""
    low, high = found["interval"]
    out.print(
        f"judge {found['name']}: tuned wins {found['win_rate']:.1%} ({low:.1%} to {high:.1%}) of {found['rows']}: "
        f"{found['wins']} won, {found['ties']} even, {found['losses']} lost",
        markup=False,
    )
    if found["order_decided"]:
        out.print(f"of the even ones, {found['order_decided']} went to whichever answer stood first or second")
    if found["unsaid"]:
        out.print(f"{found['unsaid']} of the judge's answers named no winner: even", style="yellow")


def print_general(result: dict[str, Any], out: Console = console) -> None:
    """The general set by kind, and whether training broke anything."""
    from strop.evaluation.metrics import general_verdict, in_points

    table = Table("general set", "rows", "base", "tuned", "change in points")
    for kind, found in [*result["kinds"].items(), ("all", result)]:
        rates = (f"{found['base']:.1%}", f"{found['tuned']:.1%}")
        table.add_row(kind, str(found["rows"]), *rates, in_points(found["difference"]))
    out.print(table)
    out.print(f"tuned minus base on the general set: {general_verdict(result)}")


def print_tasks(tasks: dict[str, Any], out: Console = console) -> None:
    """Tasks of the harness: each metric of base and tuned, with the change."""
    from strop.evaluation.metrics import task_rows

    table = Table("task", "metric", "documents", "base", "tuned", "change")
    for row in task_rows(tasks):
        table.add_row(*map(escape, row))
    if tasks:
        out.print(table)


def print_leaderboard(board: Sequence[dict[str, Any]], metric: str, out: Console = console) -> None:
    """Models by their score, best first, with what each is behind the best on the same rows."""
    table = Table("", escape(metric), "95 % interval", "loss", "behind the best")
    for line in board:
        behind, clear = line["behind"], line["verdict"] != "unclear"
        said = f"{100 * behind['value']:+.1f} points ({100 * behind['low']:+.1f} to {100 * behind['high']:+.1f})"
        table.add_row(
            escape(line["run"]),
            f"{line['score']:.1%}",
            f"{line['low']:.1%} to {line['high']:.1%}",
            "" if line["loss"] is None else f"{line['loss']:.3f}",
            "" if line is board[0] else said if clear else f"{said}: no clear difference",
        )
    out.print(table)


def print_samples(samples: Sequence[dict[str, Any]], out: Console = console) -> None:
    for sample in samples:
        out.print()
        out.print("asked  ", sample["prompt"], markup=False)
        if "base" in sample:
            out.print("base   ", sample["base"].strip() or "(nothing)", markup=False, style="dim")
        if "tuned" in sample:
            out.print("tuned  ", sample["tuned"].strip() or "(nothing)", markup=False)
