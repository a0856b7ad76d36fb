"""Show what a command is doing: a status line with the elapsed time, and progress bars of training and generation."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.status import Status
from rich.text import Text

from strop.display.numbers import format_duration
from strop.display.tables import abbreviate, messages
from strop.errors import in_python, in_terminal
from strop.runs.events import ON_REQUEST, Event, is_slower_than_planned, plan_of_steps

TICK_SECONDS = 0.5  # time between updates of the status line
# for output that is not a terminal
QUIET_INTERVALS = (10.0, 20.0, 60.0)  # seconds without output before each "still ..." line; the last one repeats
EARLY_INTERVAL, LATE_INTERVAL = 2.0, 30.0  # seconds between lines of training progress
EARLY_SECONDS = 300.0  # EARLY_INTERVAL is used for this long after the first step
GENERATION_INTERVALS = (5.0, 10.0, 30.0)  # seconds between lines of generation progress; the last one repeats
STILL_SECONDS = 3.0  # a "still ..." line waits until its activity has lasted this long
MIN_DONE = 3  # things of an activity that are finished before its time left is estimated: the first ones are slower
SPINNER_WIDTH = 2
LASTING = {"lasting": True}  # `extra` of a log message that is printed, not only shown while it is true
_COUNT = re.compile(r"(\d+) of (\d+)\b")


@contextmanager
def activity_messages(show: Callable[[str], None], announce: Callable[[str], object] | None = None) -> Iterator[None]:
    """Call `show` with each INFO message of the "strop" logger inside the block. Other handlers get what they got.

    announce: called instead with messages whose `extra` is LASTING, which the user should be able to read later.
    """
    logger = logging.getLogger("strop")
    level, effective_level, propagates = logger.level, logger.getEffectiveLevel(), logger.propagate

    def emit(record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            is_lasting = announce is not None and hasattr(record, "lasting")
            (announce if announce is not None and is_lasting else show)(record.getMessage())
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


class Pace:
    """Estimates the time left of an activity from how much of it is done."""

    def __init__(self) -> None:
        self._started = self._changed = time.monotonic()
        self._first = self._done = self._total = 0.0

    def update(self, done: float, total: float) -> None:
        if total != self._total or done < self._first:  # another activity
            self._started, self._first, self._done = time.monotonic(), done, done
        if done != self._done:
            self._changed = time.monotonic()
        self._done, self._total = done, total

    def seconds_left(self) -> float | None:
        """Return the estimate, or None before MIN_DONE things are finished."""
        finished = self._done - self._first
        if finished <= 0 or self._done < MIN_DONE or self._done >= self._total:
            return None
        seconds = (self._changed - self._started) * (self._total - self._done) / finished
        return max(0.0, seconds - (time.monotonic() - self._changed))


class StatusLine:
    """Show the current activity, its elapsed time and, if its text counts "3 of 10", the time left.

    quiet: seconds without output before each "still ..." line where the output is not a terminal. The last one repeats.
    """

    def __init__(self, out: Console, activity: str, quiet: Sequence[float] | None = None) -> None:
        self._out, self._activity, self._pace = out, activity, Pace()
        self._quiet = QUIET_INTERVALS if quiet is None else quiet
        self._since = self._last_output = time.monotonic()
        self._repeats = 0  # "still ..." lines of this activity
        self._status: Status | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def update(self, activity: str) -> None:
        """Show an activity. A new one restarts the timer, unless it differs only in its numbers, such as a row's."""
        if re.sub(r"\d+", "", activity) != re.sub(r"\d+", "", self._activity):
            self._since, self._repeats, self._pace = time.monotonic(), 0, Pace()
        if count := _COUNT.search(activity):
            self._pace.update(float(count[1]), float(count[2]))
        self._activity = activity
        self._draw()

    def restart_time(self) -> None:
        """Count the time from now on, also if the next activity differs only in its numbers."""
        self._since = time.monotonic()

    def print(self, activity: str) -> None:
        """Print the new activity as a permanent line, and show it in the status line."""
        self.print_line(activity)
        self.update(activity)

    def print_line(self, text: str) -> None:
        self._out.print(text if in_terminal.get() else in_python(text), markup=False)
        self.restart_quiet_time()

    def restart_quiet_time(self) -> None:
        """Record that something was printed, so that a "still ..." line is not due for a while."""
        self._last_output = time.monotonic()

    def start(self) -> None:
        if self._out.is_terminal:
            self._status = self._out.status(escape(self._activity))
            self._status.start()
        self._thread.start()

    def stop(self) -> None:
        """Remove the status line, which a progress bar needs before it starts."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()  # or it could print a line afterwards
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _refresh(self) -> None:
        while not self._stopped.wait(TICK_SECONDS):
            if self._out.is_terminal:
                self._draw()
            elif self._is_still_line_due():
                self.restart_quiet_time()
                self._repeats += 1
                self._out.print(f"still    {self.text()}", markup=False)

    def _is_still_line_due(self) -> bool:
        """Wait for STILL_SECONDS of an activity, but no longer, because another one may follow it soon each time."""
        now, interval = time.monotonic(), self._quiet[min(self._repeats, len(self._quiet) - 1)]
        late = now - self._last_output - interval
        return late > 0 and max(late, now - self._since) >= STILL_SECONDS

    def _draw(self) -> None:
        status = self._status  # `stop` may set it to None in another thread
        if status is not None:
            status.update(escape(self.text(self._out.width - SPINNER_WIDTH)))

    def text(self, width: int | None = None) -> str:
        """Return the activity and its times. width: the activity is cut, so that the times fit into it."""
        left = self._pace.seconds_left() if _COUNT.search(self._activity) else None
        times = f" ({time.monotonic() - self._since:.0f} s{'' if left is None else f', {format_duration(left)} left'})"
        activity = Text(self._activity)
        if width is not None:
            activity.truncate(max(1, width - len(times)), overflow="ellipsis")
        return activity.plain + times


@contextmanager
def status_line(activity: str, out: Console = messages) -> Iterator[StatusLine]:
    """Show a status line until the `with` block ends or `stop` is called."""
    status = StatusLine(out, activity)
    status.start()
    try:
        with activity_messages(status.update, status.print_line):
            yield status
    finally:
        status.stop()


class _TrainingBar(Progress):
    """The progress bar of the steps, and below it what the run is doing."""

    def __init__(self, status: StatusLine, out: Console) -> None:
        self._activity, self._shows_activity = status, True
        columns = (
            TextColumn("[bold]step[/]    "), TimeElapsedColumn(), MofNCompleteColumn(), BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[left]}"),
        )  # fmt: skip
        super().__init__(*columns, console=out)

    def stop(self) -> None:
        self._shows_activity = False  # the last frame stays in the terminal
        super().stop()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self._shows_activity and not self.finished:
            indent = " " * 9
            yield Text(indent + self._activity.text(self.console.width - len(indent)), style="dim")


class RunProgress:
    """Print the events of a run, and show its steps as a progress bar, or as lines without a terminal."""

    def __init__(self, out: Console, status: StatusLine) -> None:
        self._out, self._status = out, status
        self._named_samples = False  # whether the file with all samples was named
        self._next_activity = ""  # what follows an evaluation or a save
        self._first_step: float | None = None
        self._bar: Progress | None = None
        self._next_line = 0.0
        self._predicted_seconds: float | None = None  # of all steps
        self._reported_slow = False

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)
            self._status.restart_quiet_time()
        if event["event"] in ("eval", "samples", "save") and self._next_activity:
            self._status.update(self._next_activity)

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
        self._predicted_seconds = event.get("predicted_seconds")
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
        self._set_activity("computing the first step")
        if not self._out.is_terminal:
            return
        self._status.stop()
        self._bar = _TrainingBar(self._status, self._out)
        self._bar.add_task("", total=event["steps"], completed=event["step"], loss="-", speed="-", left="-")
        self._bar.start()

    def _set_activity(self, activity: str) -> None:
        self._next_activity = activity
        self._status.update(activity)

    def _on_step(self, event: Event) -> None:
        is_last = event["step"] == event.get("steps")
        self._status.restart_time()
        self._set_activity("saving" if is_last else f"computing step {event['step'] + 1}")
        metrics = f"{event['loss']:.4f}"
        if "accuracy" in event:
            metrics += f"  accuracy {event['accuracy']:.0%}"
        if "reward" in event:
            divergence = f", KL {event['kl']:.3f}" if "kl" in event else ""  # not measured without train.beta
            metrics += f"  reward {event['reward']:.2f}{divergence}"
        if "teacher_kl" in event:
            metrics += f"  KL to the teacher {event['teacher_kl']:.3f}"
        if "stop_rate" in event:
            metrics += f", {event['stop_rate']:.0%} stopped"
        if "turns" in event:
            metrics += (
                f", {event['turns']:.1f} turns, {event['tool_calls']:.1f} calls, {event['tool_errors']:.1f} failed"
            )
        speed = f"{event['tokens_per_s']:.0f}"
        time_left = "saving" if is_last else f"{format_duration(event['seconds_left'])} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=event["step"], loss=metrics, speed=speed, left=time_left)
        elif event["time"] >= self._next_line:
            self._first_step = self._first_step or event["time"]
            is_early = event["time"] - self._first_step < EARLY_SECONDS
            self._next_line = event["time"] + (EARLY_INTERVAL if is_early else LATE_INTERVAL)
            self._out.print(f"step     {event['step']}  loss {metrics}  {speed} tokens/s  {time_left}")
        planned = plan_of_steps(event["step"], event.get("steps"), self._predicted_seconds)
        if is_slower_than_planned(event.get("seconds", 0.0), planned) and not self._reported_slow:
            self._reported_slow = True
            times = [format_duration(seconds) for seconds in (event["seconds"], planned or 0.0)]
            self._out.print(
                f"[yellow]slow[/]     slower than planned: {times[0]} for {event['step']} steps instead of {times[1]} "
                "on an idle machine. Are other programs running?"
            )

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
        """Print the first sample: the end of its prompt, the completion, and the reference if it is different."""
        first, number = event["samples"][0], len(event["samples"])
        prompt, completion, reference = (" ".join(first[x].split()) for x in ("prompt", "completion", "reference"))
        label = Text.assemble(("sample", "bold"), f"   step {event['step']}: ")
        rest = f"1 of {number}, all are in events.jsonl" if number > 1 else ""
        if excess := max(0, len(prompt) - (self._out.width - label.cell_len)):
            prompt = f"…{prompt[excess + 1 :]}"
        lines = [Text.assemble(label, prompt), Text(f"{'->':>8} {completion}{' … (cut)' if first.get('cut') else ''}")]
        if completion == reference:
            lines[1].append(" (as expected)")
        elif reference:
            lines.append(Text(f"expected {reference}"))
        if rest and not self._named_samples:
            lines.append(Text(f"         {rest}", style="dim"))
            self._named_samples = True
        for line in lines:
            line.truncate(self._out.width, overflow="ellipsis")
        self._out.print(Text("\n").join(lines))

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
            f"[red]rollback[/] after step {event['step']}: {escape(event['why'])}: back to step {event['to']}, "
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
        if event["why"] in ON_REQUEST:  # the command line and the exception say it, with the command that resumes
            return
        self._out.print(f"[yellow]stopped[/]  after step {event['step']}: {escape(event['why'])}")


@contextmanager
def run_progress(out: Console = messages) -> Iterator[RunProgress]:
    """Yield a callback that shows the events of a run."""
    with status_line("loading the libraries", out) as status:
        progress = RunProgress(out, status)
        try:
            yield progress
        finally:
            progress.close()


class _TimeLeft(TextColumn):
    """The time left of a side, from its answers and the tokens of the unfinished ones."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Any) -> Text:
        left = task.fields["pace"].seconds_left()
        return Text("" if left is None else f"{format_duration(left)} left")


@contextmanager
def generation_progress(out: Console = messages) -> Iterator[Callable[[str, float, int], None]]:
    """Yield a callback for progress of generation. Its arguments: side ("base" or "tuned"), done, total.

    done: the finished rows, and fractions of the unfinished ones.
    """
    columns = (
        TextColumn("[bold]answers[/]  {task.description}"), MofNCompleteColumn(), TextColumn("rows"), BarColumn(),
        _TimeLeft(),
    )  # fmt: skip
    bar = Progress(*columns, console=out, transient=True)
    with status_line("loading the libraries", out) as status:
        tasks: dict[str, TaskID] = {}
        paces: dict[str, Pace] = {}
        last_line, lines = time.monotonic(), 0

        def advance(side: str, done: float, total: int) -> None:
            nonlocal last_line, lines
            status.update(f"generating answers: {side}")
            if not tasks and out.is_terminal:
                status.stop()
                bar.start()
            if side not in tasks:
                paces[side] = Pace()
                tasks[side] = bar.add_task(side, total=total, pace=paces[side])
            paces[side].update(done, total)
            bar.update(tasks[side], completed=done)
            interval = GENERATION_INTERVALS[min(lines, len(GENERATION_INTERVALS) - 1)]
            if not out.is_terminal and time.monotonic() - last_line > interval:
                last_line, lines, seconds_left = time.monotonic(), lines + 1, paces[side].seconds_left()
                time_left = "" if seconds_left is None else f", {format_duration(seconds_left)} left"
                out.print(f"answers  {side} {int(done)}/{total} rows{time_left}", markup=False)
                status.restart_quiet_time()

        try:
            yield advance
        finally:
            bar.stop()
