"""What a person sees: choices, data accounting, a live bar while training, scores side by side."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table

from strop.cli.invocation import as_typed
from strop.cli.progress import Alive, alive
from strop.runs.events import Event

if TYPE_CHECKING:
    from strop.export.parity import Parity

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """A text with the characters that a terminal would obey as their codes; new lines and tabs stay."""
    return _OBEYED.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class Screen(Console):
    """A console for texts that others wrote, names, rows, templates: they are shown, and nothing in them is obeyed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, emoji=False)  # rows.jsonl:100: is a place, no picture

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


console = Screen(stderr=True, highlight=False, soft_wrap=True)
PLAIN_SECONDS = (2.0, 30.0)  # between two lines of progress where there is no terminal to draw a bar on: of a run
OFTEN_SECONDS = 300.0  # that is younger than this, and later


class Watch:
    """Listener that prints a run as it goes: machine, choices, data, then one bar with loss, tokens/s and time left.

    Into a file or a pipe the bar is a line now and then.
    """

    def __init__(self, out: Console = console, sign: Alive | None = None) -> None:
        self._out, self._sign = out, sign
        self._began: float | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._next_line = 0.0

    def __call__(self, event: Event) -> None:
        show = getattr(self, f"_on_{event['event']}", None)
        if show is not None:
            show(event)
            if self._sign is not None:
                self._sign.touch()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _on_machine(self, event: Event) -> None:
        for line in event["lines"]:
            self._out.print(f"[bold]machine[/]  {escape(line)}")

    def _on_recipe(self, event: Event) -> None:
        quiet = ("default", "recipe") if event["resuming"] else ("default",)  # recipe.yaml has them all
        if event["resuming"]:
            self._out.print("[bold]chosen[/]   as recipe.yaml of the run has it")
        for choice in event["choices"]:
            if choice["origin"] not in quiet:
                value, why = escape(str(choice["value"])), escape(f": {choice['why']}" if choice["why"] else "")
                self._out.print(f"[bold]chosen[/]   {choice['field']} = {value}  [dim]{choice['origin']}{why}[/]")

    def _on_data(self, event: Event) -> None:
        from strop.data.check import print_report  # numpy and the readers: not for `strop --help`

        print_report(event["report"], self._out)

    def _on_note(self, event: Event) -> None:
        self._out.print(f"[yellow]note[/]     {escape(event['text'])}")

    def _on_resume(self, event: Event) -> None:
        moved = f", on {event['devices']} devices, {event['devices_before']} before" if "devices" in event else ""
        self._out.print(f"[bold]resume[/]   from {event['checkpoint']}{moved}")

    def _on_rehearsal(self, event: Event) -> None:
        need, usable = event["predicted_bytes"] / 2**30, event["usable_bytes"] / 2**30
        tried = f"{event['tokens']:,} tokens tried" if event["done"] else "far below what there is, nothing to try"
        mapped = event.get("mapped_bytes", 0) / 2**30
        pages = f" ({mapped:.2f} of it read from files, given back where memory is short)" if mapped > 0.005 else ""
        self._out.print(f"[bold]memory[/]   {need:.2f} GiB predicted{pages}, {usable:.1f} usable: {tried}")

    def _on_start(self, event: Event) -> None:
        numbers = event["parameters"]
        share = numbers["trainable"] / numbers["all"]
        self._out.print(
            f"[bold]train[/]    {event['steps']} steps, {numbers['trainable']:,} trainable parameters ({share:.2%}"
            f"{_in_experts(numbers)}), {event['engine']} step{': ' + escape(event['why']) if event['why'] else ''}"
        )
        if (found := event.get("devices")) is not None:
            exact = ", exact sums" if found["exact"] else ""
            self._out.print(
                f"[bold]devices[/]  {found['count']} on {found['nodes']} node{'s' * (found['nodes'] != 1)}, "
                f"{found['mode']} base, {found['threads']} thread{'s' * (found['threads'] != 1)} each{exact}"
            )
        if self._sign is not None:
            self._sign.now("computing the first step")
        if not self._out.is_terminal:
            return
        if self._sign is not None:
            self._sign.stop()
        columns = (
            TextColumn("[bold]step[/]    "), TimeElapsedColumn(), MofNCompleteColumn(), BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[left]} left"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=self._out)
        self._task = self._bar.add_task(
            "", total=event["steps"], completed=event["step"], loss="-", speed="-", left="-"
        )
        self._bar.start()

    def _on_step(self, event: Event) -> None:
        if self._sign is not None:
            last = event["step"] == event.get("steps")
            self._sign.now("saving" if last else f"computing step {event['step'] + 1}")
        left = int(event["seconds_left"])
        loss = f"{event['loss']:.4f}"
        if "accuracy" in event:
            loss += f"  {event['accuracy']:.0%} right"
        if "reward" in event:
            loss += f"  reward {event['reward']:.2f}, KL {event.get('kl', 0):.3f}, {event['stop_rate']:.0%} stopped"
        speed, time_left = f"{event['tokens_per_s']:.0f}", f"{left // 60}:{left % 60:02d}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=event["step"], loss=loss, speed=speed, left=time_left)
        elif event["time"] >= self._next_line:
            self._began = self._began or event["time"]
            young = event["time"] - self._began < OFTEN_SECONDS
            self._next_line = event["time"] + PLAIN_SECONDS[0 if young else 1]
            self._out.print(f"step     {event['step']}  loss {loss}  {speed} tokens/s  {time_left} left")

    def _on_end(self, event: Event) -> None:
        self.close()
        if self._sign is not None:
            self._sign.now("writing the report")

    def _on_eval(self, event: Event) -> None:
        loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
        right = ""
        if "accuracy" in event:
            low, high = event["accuracy_interval"]
            right = f", {event['accuracy']:.1%} ranked right ({low:.1%} to {high:.1%})"
        if "reward" in event:
            right = f", reward {event['reward']:.3f}"
            if "reward_interval" in event:
                right += " ({:.3f} to {:.3f})".format(*event["reward_interval"])
        best = " (best so far)" if event["best"] else ""
        self._out.print(f"[bold]eval[/]     step {event['step']}: loss {loss}{right}{best}")

    def _on_skip(self, event: Event) -> None:
        where = f"rank {', '.join(map(str, event['ranks']))}, " if "ranks" in event else ""
        said = escape(f"{event['why']} ({where}rows {some_of(event['rows'])})")
        self._out.print(f"[red]skipped[/]  step {event['step']}: {said}")

    def _on_doubt(self, event: Event) -> None:
        said = escape(f"{event['why']} (rows {some_of(event['rows'])})")
        self._out.print(f"[yellow]doubtful[/] step {event['step']}: {said}")

    def _on_rollback(self, event: Event) -> None:
        self._out.print(
            f"[red]rollback[/] step {event['step']}: {escape(event['why'])}: back to step {event['to']}, "
            f"{len(event['passed'])} batches passed over, learning rate times {event['rate_scale']:g}"
        )

    def _on_shrink(self, event: Event) -> None:
        self._out.print(
            f"[yellow]memory[/]   step {event['step']}: not enough for it: going on with {event['to']}; "
            "the effective batch stays as it is"
        )

    def _on_override(self, event: Event) -> None:
        said = escape(f"{event['field']} = {event['now']}, was {event['was']}")
        self._out.print(f"[yellow]override[/] {said}")

    def _on_stop(self, event: Event) -> None:
        self._out.print(f"[yellow]stopped[/]  after step {event['step']}: {escape(event['why'])}")


def some_of(rows: Sequence[str]) -> str:
    return ", ".join([*rows[:3], *(["..."] if len(rows) > 3 else [])])


def speaker(main: bool) -> Console:
    """Where a process of several tells what it does: the first one, to the terminal; the others keep silent."""
    return console if main else Console(quiet=True)


@contextmanager
def watching(out: Console = console) -> Iterator[Watch]:
    with alive(out, "loading the libraries") as sign:
        watch = Watch(out, sign)
        try:
            yield watch
        finally:
            watch.close()


LOG_SECONDS = 4  # between two lines of a log that tell how far answers are


@contextmanager
def answering(out: Console = console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for the answers that base and tuned have given, with the time left; in a log, a line now and then. Before
    the first answer, what is being done."""
    columns = (
        TextColumn("[bold]answers[/]  {task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=out, transient=True)
    with alive(out, "loading the libraries") as sign:
        tasks: dict[str, TaskID] = {}
        told = time.monotonic()

        def advance(what: str, done: int, total: int) -> None:
            nonlocal told
            if not tasks:
                sign.now("answering")
            if not tasks and out.is_terminal:  # until now the line was the sign of life's
                sign.stop()
                bar.start()
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)
            if not out.is_terminal and time.monotonic() - told > LOG_SECONDS:
                told, left = time.monotonic(), bar.tasks[tasks[what]].time_remaining
                out.print(f"answers  {what} {done}/{total}" + (f", {left:.0f} s left" if left else ""), markup=False)
                sign.touch()

        try:
            yield advance
        finally:
            bar.stop()


def print_adapters(found: Sequence[dict[str, Any]], out: Console = console) -> None:
    table = Table("adapter", "base", "rank", "on", "size", "score")
    for one in found:
        size = f"{one['size_bytes'] / 1e6:.1f} MB"
        cells = (one["folder"], one["base"], str(one["rank"]), ", ".join(one["target_modules"]), size, one["score"])
        table.add_row(*map(escape, cells))
    out.print(table if found else "no adapters here")


def print_pairs(values: dict[str, Any], out: Console = console) -> None:
    for name, value in values.items():
        out.print(f"{name.removesuffix('_bytes'):14} {_shown(name, value)}", markup=False)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value / 1e6:.1f} MB" if name.endswith("_bytes") else f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)


def print_notes(notes: Sequence[str], out: Console = console) -> None:
    for note in notes:
        out.print("note    ", note, markup=False, style="yellow")


def print_json(value: dict[str, Any], asked: bool) -> None:
    """One object on stdout, where --json asked for it; what stdout cannot write is escaped."""
    if asked:
        text = json.dumps(value, ensure_ascii=False)
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(value)
        print(text)


def print_end(report: dict[str, Any], as_json: bool) -> None:
    """How a run ended, and where its adapter and report are."""
    out = report["run"]
    console.print(
        f"[bold]done[/]     {report['steps']} steps, {report['tokens']:,} tokens in {report['seconds']:.0f} s "
        f"({report['tokens_per_s']:.0f} tokens/s, {report['supervised_tokens_per_s']:.0f} supervised)"
    )
    if memory := report.get("memory"):
        took, said = memory["measured_peak_bytes"], memory["predicted_peak_bytes"]
        difference = f", {said / 2**30:.2f} predicted ({took / said - 1:+.0%})" if said else ""
        console.print(f"[bold]memory[/]   {took / 2**30:.2f} GiB measured{difference}")
    for finding in report.get("diagnosis", []):
        console.print(f"[yellow]finding[/]  {escape(finding)}")
    console.print(f"[bold]adapter[/]  {escape(str(report['adapter']))}\n[bold]report[/]   {escape(out)}/report.html")
    if report.get("objective", {}).get("name") != "reward":
        console.print(f"next     {as_typed()} chat {shlex.quote(out)}", markup=False)
    print_json(
        {key: value for key, value in report.items() if key not in ("recipe", "lock", "machine", "data_report")},
        as_json,
    )


def print_base(base: str, losses: dict[str, float]) -> None:
    """The bases that were tried for an adapter, and which one it was trained on."""
    for tried, loss in losses.items():
        console.print(f"[bold]base[/]     {tried}: loss {loss:.4f}{' (taken)' if base == tried else ''}")


def print_parity(parity: Parity | None) -> None:
    """What was measured of a merged or exported model against its adapter."""
    if parity is None:
        console.print("[bold]parity[/]   not measured")
        return
    flips = f"{parity.clear_flips} clear flip{'s' * (parity.clear_flips != 1)} in {parity.positions:,} positions"
    effect = "" if parity.effect is None else f"; {parity.effect.value:.1%} of the adapter's effect"
    console.print(
        f"[bold]parity[/]   mean KL {parity.kl_mean:.2g}, at most {parity.kl_max:.2g}; {flips} (top-1 agreement "
        f"{parity.top1_agreement:.2%}){effect}; loss {parity.loss_difference:+.1e}"
    )


def _in_experts(numbers: Mapping[str, int]) -> str:
    held = numbers.get("experts", 0)
    return f"; {held / numbers['trainable']:.0%} of them on experts" if held else ""
