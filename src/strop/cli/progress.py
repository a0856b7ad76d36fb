"""Show what a command is doing: a status line with the elapsed time, and progress bars of training and generation."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
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
from rich.status import Status

from strop.cli.tables import abbreviate, console
from strop.runs.events import Event

QUIET_SECONDS = 3.0  # without a terminal: longest time without output
TICK_SECONDS = 0.5
EARLY_INTERVAL, LATE_INTERVAL = 2.0, 30.0  # without a terminal: seconds between lines of training progress
EARLY_SECONDS = 300.0  # a run shows lines at the early interval for this long
GENERATION_INTERVAL = 4.0  # without a terminal: seconds between lines of generation progress


class StatusLine(logging.Handler):
    """Show an activity (from `update` or strop's log at level INFO) and its seconds until something is printed."""

    def __init__(self, out: Console, activity: str) -> None:
        super().__init__(logging.INFO)
        self._out, self._activity = out, activity
        self._since = self._last_output = time.monotonic()
        self._status: Status | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            self.update(record.getMessage())

    def update(self, activity: str) -> None:
        """Change the activity, and restart its clock."""
        self._activity, self._since = activity, time.monotonic()
        self._draw()

    def print(self, activity: str) -> None:
        """Print the new activity as a line that stays, and show it."""
        self._out.print(activity, markup=False)
        self.touch()
        self.update(activity)

    def touch(self) -> None:
        """Note that something was printed, so that no line is due for a while."""
        self._last_output = time.monotonic()

    def start(self) -> None:
        if self._out.is_terminal:
            self._status = self._out.status(escape(self._activity))
            self._status.start()
        self._thread.start()

    def stop(self) -> None:
        """Remove the line, so that something else can draw on the terminal."""
        self._stopped.set()
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _refresh(self) -> None:
        while not self._stopped.wait(TICK_SECONDS):
            if self._out.is_terminal:
                self._draw()
            elif time.monotonic() - self._last_output > QUIET_SECONDS:
                self.touch()
                self._out.print(f"still    {self._text()}", markup=False)

    def _draw(self) -> None:
        status = self._status
        if status is not None:
            status.update(escape(self._text()))

    def _text(self) -> str:
        return f"{self._activity} ({time.monotonic() - self._since:.0f} s)"


@contextmanager
def status_line(activity: str, out: Console = console) -> Iterator[StatusLine]:
    """Show a status line in a `with` block, or until `stop`."""
    line, log = StatusLine(out, activity), logging.getLogger("strop")
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(line)
    line.start()
    try:
        yield line
    finally:
        line.stop()
        log.removeHandler(line)
        log.setLevel(level)


class RunProgress:
    """Print the events of a run, and its steps as a bar; without a terminal, as lines at intervals."""

    def __init__(self, out: Console, status: StatusLine) -> None:
        self._out, self._status = out, status
        self._first_step: float | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._next_line = 0.0

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        show = getattr(self, "_on_dry_run" if kind == "rehearsal" else f"_on_{kind}", None)
        if show is not None:
            show(event)
            self._status.touch()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _on_machine(self, event: Event) -> None:
        for line in event["lines"]:
            self._out.print(f"[bold]machine[/]  {escape(line)}")

    def _on_recipe(self, event: Event) -> None:
        hidden = ("default", "recipe") if event["resuming"] else ("default",)
        if event["resuming"]:
            self._out.print("[bold]chosen[/]   as in recipe.yaml of the run")
        for choice in event["choices"]:
            if choice["origin"] not in hidden:
                value, why = escape(str(choice["value"])), escape(f": {choice['why']}" if choice["why"] else "")
                self._out.print(f"[bold]chosen[/]   {choice['field']} = {value}  [dim]{choice['origin']}{why}[/]")

    def _on_data(self, event: Event) -> None:
        from strop.data.check import print_report  # imports numpy and the readers, which `strop --help` does not need

        print_report(event["report"], self._out)

    def _on_note(self, event: Event) -> None:
        self._out.print(f"[yellow]note[/]     {escape(event['text'])}")

    def _on_resume(self, event: Event) -> None:
        moved = f", on {event['devices']} devices, {event['devices_before']} before" if "devices" in event else ""
        self._out.print(f"[bold]resume[/]   from {event['checkpoint']}{moved}")

    def _on_dry_run(self, event: Event) -> None:
        predicted, usable = event["predicted_bytes"] / 2**30, event["usable_bytes"] / 2**30
        outcome = f"dry run of {event['tokens']:,} tokens" if event["done"] else "fits easily, skipping the dry run"
        mapped = event.get("mapped_bytes", 0) / 2**30
        files = f" ({mapped:.2f} of it memory-mapped files, released if memory is short)" if mapped > 0.005 else ""
        self._out.print(f"[bold]memory[/]   {predicted:.2f} GiB predicted{files}, {usable:.1f} usable: {outcome}")

    def _on_start(self, event: Event) -> None:
        parameters = event["parameters"]
        share = f"{parameters['trainable'] / parameters['all']:.2%}"
        if experts := parameters.get("experts"):
            share += f"; {experts / parameters['trainable']:.0%} of them on experts"
        why = f": {escape(event['why'])}" if event["why"] else ""
        self._out.print(
            f"[bold]train[/]    {event['steps']} steps, {parameters['trainable']:,} trainable parameters ({share}), "
            f"{event['engine']} step{why}"
        )
        if (devices := event.get("devices")) is not None:
            exact = ", exact sums" if devices["exact"] else ""
            self._out.print(
                f"[bold]devices[/]  {devices['count']} on {devices['nodes']} node{'s' * (devices['nodes'] != 1)}, "
                f"{devices['mode']} base, {devices['threads']} thread{'s' * (devices['threads'] != 1)} each{exact}"
            )
        self._status.update("computing the first step")
        if not self._out.is_terminal:
            return
        self._status.stop()
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
        last = event["step"] == event.get("steps")
        self._status.update("saving" if last else f"computing step {event['step'] + 1}")
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
            self._first_step = self._first_step or event["time"]
            early = event["time"] - self._first_step < EARLY_SECONDS
            self._next_line = event["time"] + (EARLY_INTERVAL if early else LATE_INTERVAL)
            self._out.print(f"step     {event['step']}  loss {loss}  {speed} tokens/s  {time_left} left")

    def _on_end(self, event: Event) -> None:
        self.close()
        self._status.update("writing the report")

    def _on_eval(self, event: Event) -> None:
        loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
        figures = ""
        if "accuracy" in event:
            low, high = event["accuracy_interval"]
            figures = f", {event['accuracy']:.1%} ranked right ({low:.1%} to {high:.1%})"
        if "reward" in event:
            figures = f", reward {event['reward']:.3f}"
            if "reward_interval" in event:
                figures += " ({:.3f} to {:.3f})".format(*event["reward_interval"])
        best = " (best so far)" if event["best"] else ""
        self._out.print(f"[bold]eval[/]     step {event['step']}: loss {loss}{figures}{best}")

    def _on_skip(self, event: Event) -> None:
        ranks = f"rank {', '.join(map(str, event['ranks']))}, " if "ranks" in event else ""
        reason = escape(f"{event['why']} ({ranks}rows {abbreviate(event['rows'])})")
        self._out.print(f"[red]skipped[/]  step {event['step']}: {reason}")

    def _on_doubt(self, event: Event) -> None:
        reason = escape(f"{event['why']} (rows {abbreviate(event['rows'])})")
        self._out.print(f"[yellow]doubtful[/] step {event['step']}: {reason}")

    def _on_rollback(self, event: Event) -> None:
        self._out.print(
            f"[red]rollback[/] step {event['step']}: {escape(event['why'])}: back to step {event['to']}, "
            f"{len(event['passed'])} batches skipped, learning rate times {event['rate_scale']:g}"
        )

    def _on_shrink(self, event: Event) -> None:
        self._out.print(
            f"[yellow]memory[/]   step {event['step']}: out of memory, continuing with {event['to']}; "
            "the effective batch is unchanged"
        )

    def _on_override(self, event: Event) -> None:
        change = escape(f"{event['field']} = {event['now']}, was {event['was']}")
        self._out.print(f"[yellow]override[/] {change}")

    def _on_stop(self, event: Event) -> None:
        self._out.print(f"[yellow]stopped[/]  after step {event['step']}: {escape(event['why'])}")


@contextmanager
def run_progress(out: Console = console) -> Iterator[RunProgress]:
    """Yield a callback that shows the events of a run."""
    with status_line("loading the libraries", out) as status:
        progress = RunProgress(out, status)
        try:
            yield progress
        finally:
            progress.close()


@contextmanager
def generation_progress(out: Console = console) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (side, done, total) that shows how many answers are generated, as a bar or as lines."""
    columns = (
        TextColumn("[bold]answers[/]  {task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=out, transient=True)
    with status_line("loading the libraries", out) as status:
        tasks: dict[str, TaskID] = {}
        last_line = time.monotonic()

        def advance(side: str, done: int, total: int) -> None:
            nonlocal last_line
            if not tasks:
                status.update("generating answers")
            if not tasks and out.is_terminal:
                status.stop()
                bar.start()
            if side not in tasks:
                tasks[side] = bar.add_task(side, total=total)
            bar.update(tasks[side], completed=done)
            if not out.is_terminal and time.monotonic() - last_line > GENERATION_INTERVAL:
                last_line, left = time.monotonic(), bar.tasks[tasks[side]].time_remaining
                out.print(f"answers  {side} {done}/{total}" + (f", {left:.0f} s left" if left else ""), markup=False)
                status.touch()

        try:
            yield advance
        finally:
            bar.stop()


def is_main_process() -> bool:
    """Return whether this process prints: it runs alone, or is rank 0 of those that a launcher started."""
    from strop.distributed.devices import find_place

    place = find_place()
    return place is None or place.rank == 0


def console_for(main: bool) -> Console:
    """Return the console of a process: only the main one prints."""
    return console if main else Console(quiet=True)
