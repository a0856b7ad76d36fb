"""Show what a command is doing: a status line with the elapsed time, and progress bars of training and generation."""

from __future__ import annotations

import logging
import re
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
from rich.text import Text

from strop.display.tables import abbreviate, console
from strop.errors import in_python, in_terminal
from strop.runs.events import Event

TICK_SECONDS = 0.5  # time between updates of the status line
# for output that is not a terminal
QUIET_SECONDS = 3.0  # maximum time without output
EARLY_INTERVAL, LATE_INTERVAL = 2.0, 30.0  # seconds between lines of training progress
EARLY_SECONDS = 300.0  # EARLY_INTERVAL is used for this long after the first step
GENERATION_INTERVAL = 4.0  # seconds between lines of generation progress


@contextmanager
def activity_messages(show: Callable[[str], None]) -> Iterator[None]:
    """Call `show` with each INFO message of the "strop" logger inside the block. Other handlers get what they got."""
    logger = logging.getLogger("strop")
    level, effective_level, propagates = logger.level, logger.getEffectiveLevel(), logger.propagate

    def emit(record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            show(record.getMessage())
        if propagates and record.levelno >= effective_level:
            logging.getLogger().handle(record)

    handler = logging.Handler()
    handler.emit = emit  # type: ignore[method-assign]
    logger.setLevel(min(effective_level, logging.INFO))
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
        logger.setLevel(level)


class StatusLine:
    """Show the current activity and its elapsed time."""

    def __init__(self, out: Console, activity: str, quiet_seconds: float | None = None) -> None:
        self._out, self._activity = out, activity
        self._quiet_seconds = QUIET_SECONDS if quiet_seconds is None else quiet_seconds
        self._since = self._last_output = time.monotonic()
        self._status: Status | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def update(self, activity: str) -> None:
        """Show an activity. A new one restarts the timer, unless it differs only in its numbers, such as a row's."""
        if re.sub(r"\d+", "", activity) != re.sub(r"\d+", "", self._activity):
            self._since = time.monotonic()
        self._activity = activity
        self._draw()

    def restart_time(self) -> None:
        """Count the time from now on, also if the next activity differs only in its numbers."""
        self._since = time.monotonic()

    def print(self, activity: str) -> None:
        """Print the new activity as a permanent line, and show it in the status line."""
        self._out.print(activity, markup=False)
        self.restart_quiet_time()
        self.update(activity)

    def restart_quiet_time(self) -> None:
        """Record that something was printed: a "still ..." line follows after QUIET_SECONDS without output."""
        self._last_output = time.monotonic()

    def start(self) -> None:
        if self._out.is_terminal:
            self._status = self._out.status(escape(self._activity))
            self._status.start()
        self._thread.start()

    def stop(self) -> None:
        """Remove the status line, which a progress bar needs before it starts."""
        self._stopped.set()
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _refresh(self) -> None:
        while not self._stopped.wait(TICK_SECONDS):
            if self._out.is_terminal:
                self._draw()
            elif time.monotonic() - self._last_output > self._quiet_seconds:
                self.restart_quiet_time()
                self._out.print(f"still    {self._text()}", markup=False)

    def _draw(self) -> None:
        status = self._status  # `stop` may set it to None in another thread
        if status is not None:
            status.update(escape(self._text()))

    def _text(self) -> str:
        return f"{self._activity} ({time.monotonic() - self._since:.0f} s)"


@contextmanager
def status_line(activity: str, out: Console = console) -> Iterator[StatusLine]:
    """Show a status line until the `with` block ends or `stop` is called."""
    status = StatusLine(out, activity)
    status.start()
    try:
        with activity_messages(status.update):
            yield status
    finally:
        status.stop()


class RunProgress:
    """Print the events of a run, and show its steps as a progress bar, or as lines without a terminal."""

    def __init__(self, out: Console, status: StatusLine) -> None:
        self._out, self._status = out, status
        self._first_step: float | None = None
        self._bar: Progress | None = None
        self._next_line = 0.0

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)
            self._status.restart_quiet_time()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _on_machine(self, event: Event) -> None:
        for line in event["lines"]:
            self._out.print(f"[bold]machine[/]  {escape(line)}")

    def _on_recipe(self, event: Event) -> None:
        changed = event["changed"]  # None for a new run
        if changed is not None:
            self._out.print("[bold]chosen[/]   options from the run's recipe.yaml")
        for choice in event["choices"]:
            if choice["origin"] != "default" if changed is None else choice["field"] in changed:
                value, why = escape(str(choice["value"])), escape(f": {choice['why']}" if choice["why"] else "")
                self._out.print(f"[bold]chosen[/]   {choice['field']} = {value}  [dim]{choice['origin']}{why}[/]")

    def _on_data(self, event: Event) -> None:
        from strop.data.check import print_report  # imports numpy and the readers, which `strop --help` does not need

        print_report(event["report"], self._out)

    def _on_note(self, event: Event) -> None:
        text = event["text"] if in_terminal.get() else in_python(event["text"])
        self._out.print(f"[yellow]note[/]     {escape(text)}")

    def _on_resume(self, event: Event) -> None:
        devices = f", on {event['devices']} devices, {event['devices_before']} before" if "devices" in event else ""
        self._out.print(f"[bold]resume[/]   from {event['checkpoint']}{devices}")

    def _on_rehearsal(self, event: Event) -> None:
        """Show the predicted memory, and whether a dry run checks it."""
        predicted, usable = event["predicted_bytes"] / 2**30, event["usable_bytes"] / 2**30
        dry_run = f"dry run of {event['tokens']:,} tokens" if event["done"] else "fits easily, skipping the dry run"
        mapped = event.get("mapped_bytes", 0) / 2**30
        files = f" ({mapped:.2f} of it memory-mapped files, released if memory is short)" if mapped > 0.005 else ""
        self._out.print(f"[bold]memory[/]   {predicted:.2f} GiB predicted{files}, {usable:.1f} usable: {dry_run}")

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
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[left]}"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=self._out)
        self._bar.add_task("", total=event["steps"], completed=event["step"], loss="-", speed="-", left="-")
        self._bar.start()

    def _on_step(self, event: Event) -> None:
        is_last = event["step"] == event.get("steps")
        self._status.restart_time()
        self._status.update("saving" if is_last else f"computing step {event['step'] + 1}")
        minutes, seconds = divmod(int(event["seconds_left"]), 60)
        metrics = f"{event['loss']:.4f}"
        if "accuracy" in event:
            metrics += f"  accuracy {event['accuracy']:.0%}"
        if "reward" in event:
            metrics += f"  reward {event['reward']:.2f}, KL {event.get('kl', 0):.3f}, {event['stop_rate']:.0%} stopped"
        if "turns" in event:
            metrics += (
                f", {event['turns']:.1f} turns, {event['tool_calls']:.1f} calls, {event['tool_errors']:.1f} failed"
            )
        if "teacher_kl" in event:
            metrics += f"  KL to the teacher {event['teacher_kl']:.3f}, {event['stop_rate']:.0%} stopped"
        speed = f"{event['tokens_per_s']:.0f}"
        time_left = "saving" if is_last else f"{minutes}:{seconds:02d} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=event["step"], loss=metrics, speed=speed, left=time_left)
        elif event["time"] >= self._next_line:
            self._first_step = self._first_step or event["time"]
            is_early = event["time"] - self._first_step < EARLY_SECONDS
            self._next_line = event["time"] + (EARLY_INTERVAL if is_early else LATE_INTERVAL)
            self._out.print(f"step     {event['step']}  loss {metrics}  {speed} tokens/s  {time_left}")

    def _on_end(self, event: Event) -> None:
        self.close()
        self._status.update("writing the report")

    def _on_eval(self, event: Event) -> None:
        metrics = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
        if "reward" in event:
            metrics += f", reward {event['reward']:.3f}"
            if "reward_interval" in event:
                metrics += " ({:.3f} to {:.3f})".format(*event["reward_interval"])
        elif "accuracy" in event:
            low, high = event["accuracy_interval"]
            what = "accuracy" if "macro_f1" in event else "ranked correctly"
            metrics += f", {event['accuracy']:.1%} {what} ({low:.1%} to {high:.1%})"
        if "accuracy_at_1" in event:
            low, high = event["accuracy_at_1_interval"]
            metrics += f", accuracy@1 {event['accuracy_at_1']:.1%} ({low:.1%} to {high:.1%})"
            metrics += f", nDCG@10 {event['ndcg_at_10']:.1%}"
        best = " (best so far)" if event["best"] else ""
        self._out.print(f"[bold]eval[/]     step {event['step']}: loss {metrics}{best}")

    def _on_samples(self, event: Event) -> None:
        """Print the first sample on one line, with at most half of the line for the prompt."""
        prompt, completion = (Text(" ".join(event["samples"][0][name].split())) for name in ("prompt", "completion"))
        label = Text.assemble(("sample", "bold"), f"   step {event['step']}: ")
        prompt.truncate((self._out.width - label.cell_len) // 2, overflow="ellipsis")
        cut = " … (cut)" if event["samples"][0].get("cut") else ""
        line = Text.assemble(label, prompt, " -> ", completion, cut)
        line.truncate(self._out.width, overflow="ellipsis")
        self._out.print(line)

    def _on_skip(self, event: Event) -> None:
        self._print_warning("[red]skipped[/] ", event)

    def _on_doubt(self, event: Event) -> None:
        self._print_warning("[yellow]suspect[/] ", event)

    def _print_warning(self, label: str, event: Event) -> None:
        ranks = f"rank {', '.join(map(str, event['ranks']))}, " if "ranks" in event else ""
        reason = escape(f"{event['why']} ({ranks}rows {abbreviate(event['rows'])})")
        self._out.print(f"{label} step {event['step']}: {reason}")

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
    """Yield a callback for progress of generation. Its arguments: side ("base" or "tuned"), done, total."""
    columns = (
        TextColumn("[bold]answers[/]  {task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=out, transient=True)
    with status_line("loading the libraries", out) as status:
        tasks: dict[str, TaskID] = {}
        last_line = time.monotonic()

        def advance(side: str, done: int, total: int) -> None:
            nonlocal last_line
            status.update(f"generating answers: {side}")
            if not tasks and out.is_terminal:
                status.stop()
                bar.start()
            if side not in tasks:
                tasks[side] = bar.add_task(side, total=total)
            bar.update(tasks[side], completed=done)
            if not out.is_terminal and time.monotonic() - last_line > GENERATION_INTERVAL:
                last_line, seconds_left = time.monotonic(), bar.tasks[tasks[side]].time_remaining
                time_left = f", {seconds_left:.0f} s left" if seconds_left else ""
                out.print(f"answers  {side} {done}/{total}{time_left}", markup=False)
                status.restart_quiet_time()

        try:
            yield advance
        finally:
            bar.stop()
