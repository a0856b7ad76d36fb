"""Progress of runs and generation, on a terminal and in a file."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import time
from typing import Any

import pytest
from rich.console import Console

from strop.display import terminal as progress
from strop.display.terminal import (
    EARLY_INTERVAL,
    EARLY_SECONDS,
    LATE_INTERVAL,
    StatusLine,
    generation_progress,
    run_progress,
    status_line,
)

STEP: dict[str, Any] = {"event": "step", "loss": 1.5, "tokens_per_s": 400.0, "seconds_left": 62.0}
SAMPLE = {"prompt": "what is 2?", "reference": "4", "completion": "4"}
MARKUP = "[INST] x [/INST] [red]y[/]"  # text that Rich could read as markup


def test_progress_in_a_file_is_a_line_per_interval() -> None:
    out = io.StringIO()
    start = {"event": "start", "time": 0.0, "step": 0, "steps": 3, "engine": "fast", "why": ""}
    with run_progress(Console(file=out, soft_wrap=True)) as show:
        show({**start, "parameters": {"trainable": 1, "all": 10}})
        for number, seconds in enumerate((1.0, 1.5, 1.0 + EARLY_INTERVAL), start=1):
            show({**STEP, "time": seconds, "step": number})
        show({"event": "end", "time": 99.0, "step": 3})
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert lines == [f"step     {number}  loss 1.5000  400 tokens/s  1 min 2 s left" for number in (1, 3)]


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ({"reward": 0.38, "kl": 0.5}, "loss 1.5000  reward 0.38, KL 0.500, 25% stopped  400 tokens/s"),
        ({"reward": 0.38}, "loss 1.5000  reward 0.38, 25% stopped  400 tokens/s"),  # train.beta 0
        ({"teacher_kl": 2.88}, "loss 1.5000  KL to the teacher 2.880, 25% stopped  400 tokens/s"),
        (
            {"reward": 0.38, "teacher_kl": 2.88, "turns": 2, "tool_calls": 1.5, "tool_errors": 0.5},
            "reward 0.38  KL to the teacher 2.880, 25% stopped, 2.0 turns, 1.5 calls, 0.5 failed  400 tokens/s",
        ),
    ],
)
def test_step_of_a_policy_shows_what_was_measured(figures: dict[str, float], shown: str) -> None:
    out = io.StringIO()
    with run_progress(Console(file=out, soft_wrap=True)) as show:
        show({**STEP, **figures, "stop_rate": 0.25, "time": 1.0, "step": 1, "steps": 9})
    assert shown in out.getvalue()


def test_long_run_prints_fewer_lines() -> None:
    out = io.StringIO()
    late = EARLY_SECONDS + 2
    with run_progress(Console(file=out)) as show:
        for number, seconds in enumerate((1.0, late, late + EARLY_INTERVAL, late + LATE_INTERVAL), start=1):
            show({**STEP, "steps": 9, "time": seconds, "step": number})
    steps = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert steps == ["1", "2", "4"]


def test_run_that_is_slower_than_planned_says_so_once() -> None:
    def lines(seconds_per_step: float) -> list[str]:
        out = io.StringIO()
        with run_progress(Console(file=out, soft_wrap=True)) as show:
            dry_run = {"event": "rehearsal", "done": False, "predicted_bytes": 1, "usable_bytes": 9, "tokens": 1}
            show({**dry_run, "predicted_seconds": 60.0})
            for number in range(1, 7):
                at = number * seconds_per_step
                show({**STEP, "steps": 60, "step": number, "time": at, "seconds": at})
        return [line for line in out.getvalue().splitlines() if "slower" in line]

    (line,) = lines(28.0)
    assert line == (
        "slow     slower than planned: 1 min 24 s for 3 steps instead of 3.0 s on an idle machine. "
        "Are other programs running?"
    )
    assert lines(1.4) == [] and lines(2.0) == []  # the second one lost 6 s only


def wait_for_lines(out: io.StringIO, number: int) -> list[str]:
    """Wait until `number` lines are printed, and return them."""
    deadline = time.monotonic() + 60
    while len(out.getvalue().splitlines()) < number and time.monotonic() < deadline:
        time.sleep(0.005)
    return out.getvalue().splitlines()[:number]


def test_status_line_shows_log_messages_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_INTERVALS", (0.0,))
    monkeypatch.setattr(progress, "STILL_SECONDS", 0.0)
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.001)
    out = io.StringIO()
    with status_line("loading the libraries", Console(file=out)):
        assert wait_for_lines(out, 1) == ["still    loading the libraries (0 s)"]
        logging.getLogger("strop.engine.kernels.warmup").info("compiling %s", "kernels")
        before = len(out.getvalue().splitlines())
        assert "still    compiling kernels (0 s)" in wait_for_lines(out, before + 3)
    text = out.getvalue()
    logging.getLogger("strop").info("no longer")
    assert not logging.getLogger("strop").handlers and out.getvalue() == text


def test_lasting_message_is_printed_once() -> None:
    out = io.StringIO()
    with status_line("loading", Console(file=out)) as status:
        logging.getLogger("strop.training.keep").info("answering %d prompts first", 9, extra=progress.LASTING)
        assert status.text().startswith("loading ")
    assert out.getvalue() == "answering 9 prompts first\n"


def test_counter_in_a_status_line_does_not_restart_its_time() -> None:
    out = io.StringIO()
    with status_line("loading", Console(file=out)) as status:
        status.update("measuring the result: row 1 of 30")
        status._since -= 60
        status.update("measuring the result: row 2 of 30")
        assert status.text().startswith("measuring the result: row 2 of 30 (60 s")
        status.update("writing")
        assert status.text() == "writing (0 s)"


def test_each_step_has_its_own_time() -> None:
    with run_progress(Console(file=io.StringIO())) as show:
        for number in (1, 2):
            show({**STEP, "time": 1.0, "step": number, "steps": 3})
            assert show._status.text() == f"computing step {number + 1} (0 s)"
            show._status._since -= 60


def test_status_after_the_last_step_is_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    activities: list[str] = []
    monkeypatch.setattr(StatusLine, "update", lambda _, activity: activities.append(activity))
    with run_progress(Console(file=io.StringIO())) as show:
        for number in (1, 2):
            show({**STEP, "time": 1.0, "step": number, "steps": 2})
    assert activities == ["computing step 2", "saving"]


def test_still_lines_become_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(progress, "QUIET_INTERVALS", (0.0, 3600.0))
    monkeypatch.setattr(progress, "STILL_SECONDS", 0.0)
    out = io.StringIO()
    with status_line("loading", Console(file=out)) as status:
        wait_for_lines(out, 1)
        status.update("computing")
        wait_for_lines(out, 2)
        time.sleep(0.1)
    assert out.getvalue().splitlines() == ["still    loading (0 s)", "still    computing (0 s)"]


def test_an_activity_that_has_just_begun_is_not_printed_as_still_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(progress, "QUIET_INTERVALS", (0.0,))
    out = io.StringIO()
    with status_line("sampling: 0 of 4 completions", Console(file=out)) as status:
        time.sleep(0.1)
        assert not out.getvalue()
        status._since -= progress.STILL_SECONDS
        assert re.fullmatch(r"still    sampling: 0 of 4 completions \([3-9] s\)", wait_for_lines(out, 1)[0])


def test_counted_activity_shows_the_time_left() -> None:
    with status_line("loading", Console(file=io.StringIO())) as status:
        status.update("answering: 0 of 6")
        assert "left" not in status.text()
        status._since -= 60
        status._pace._started -= 60
        status.update("answering: 2 of 6")
        assert "left" not in status.text()  # the first ones are slower
        status.update("answering: 3 of 6")
        assert re.fullmatch(r"answering: 3 of 6 \(6\d s, (1 min( \d+ s)?|5\d s) left\)", status.text())
        assert len(status.text(24)) == 24 and status.text(24).endswith(" left)")


def test_evaluation_and_sampling_are_shown_below_the_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, soft_wrap=True)
    log = logging.getLogger("strop.training.loop")
    with run_progress(console) as show:
        start = {"event": "start", "time": 0.0, "step": 0, "steps": 12, "engine": "fast", "why": ""}
        show({**start, "parameters": {"trainable": 1, "all": 10}})
        show({**STEP, "time": 1.0, "step": 4, "steps": 12})
        assert show._bar is not None
        for text, shown in (
            ("evaluating: 3 of 10 batches", "evaluating: 3 of 10"),
            ("sampling: 1 of 4", "sampling: 1"),
        ):
            log.info(text)
            show._bar.refresh()
            assert shown in out.getvalue()
        show({"event": "samples", "time": 3.0, "step": 4, "samples": [SAMPLE]})
        assert show._status.text().startswith("computing step 5 ")


def test_requested_stop_is_not_printed_twice() -> None:
    out = io.StringIO()
    with run_progress(Console(file=out)) as show:
        show({"event": "stop", "time": 1.0, "step": 4, "why": "signal"})
        assert not out.getvalue()
        show({"event": "stop", "time": 1.0, "step": 4, "why": "the time budget is spent"})
    assert out.getvalue() == "stopped  after step 4: the time budget is spent\n"


def test_time_left_of_answers_counts_unfinished_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "GENERATION_INTERVALS", (-1.0,))
    out = io.StringIO()
    with generation_progress(Console(file=out)) as advance:
        for done in (0, 1.5, 3.5):
            advance("base and tuned", done, 12)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["answers  base and tuned 0/12 rows", "answers  base and tuned 1/12 rows"]
    assert re.fullmatch(r"answers  base and tuned 3/12 rows, (\d min )?[\d.]+ s left", lines[2])


def test_generation_progress_removes_its_log_handler() -> None:
    with generation_progress(Console(file=io.StringIO())) as advance:
        advance("base", 1, 2)
    assert not logging.getLogger("strop").handlers


def test_first_sample_shows_the_end_of_the_prompt_and_the_reference() -> None:
    out = io.StringIO()
    sample = {"prompt": "[b]what\nis 2?", "reference": "4", "completion": "it is\n4 [/b]"}
    long = {"prompt": "p" * 200 + "END", "reference": "right", "completion": "c" * 200}
    with run_progress(Console(file=out, soft_wrap=True, width=80)) as show:
        show({"event": "samples", "time": 1.0, "step": 20, "samples": [sample, long]})
        show({"event": "samples", "time": 2.0, "step": 40, "samples": [long]})
    assert out.getvalue().splitlines() == [
        "sample   step 20: [b]what is 2?",
        "      -> it is 4 [/b]",
        "expected 4",
        "         1 of 2, all are in events.jsonl",
        f"sample   step 40: …{'p' * 58}END",
        f"      -> {'c' * 70}…",
        "expected right",
    ]


def test_cut_sample_is_marked() -> None:
    out = io.StringIO()
    sample = {"prompt": "what is 2?", "reference": "4", "completion": "it is", "cut": True}
    with run_progress(Console(file=out, soft_wrap=True, width=80)) as show:
        show({"event": "samples", "time": 1.0, "step": 20, "samples": [sample]})
    assert "      -> it is … (cut)" in out.getvalue()


def test_warnings_are_printed_while_progress_is_shown() -> None:
    """In a process without logging handlers, as the command line."""
    code = (
        "import logging; from strop.display.terminal import generation_progress\n"
        "with generation_progress() as advance: logging.getLogger('strop.x').warning('counted as a miss')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stderr.split() == ["counted", "as", "a", "miss"], ended


def test_markup_in_events_is_printed_literally() -> None:
    out = io.StringIO()
    choice = {"field": "lora.new_tokens", "value": [MARKUP], "origin": "option", "why": MARKUP}
    figures: dict[str, Any] = {"step": 1, "to": 0, "passed": [], "rate_scale": 0.5, "rows": [MARKUP], "why": MARKUP}
    events: list[dict[str, Any]] = [
        {"event": "machine", "lines": [MARKUP]},
        {"event": "recipe", "changed": None, "choices": [choice]},
        {"event": "note", "text": MARKUP},
        *({"event": name, **figures} for name in ("skip", "doubt", "rollback", "stop")),
        {"event": "override", "field": "data.train", "now": MARKUP, "was": [MARKUP]},
    ]
    with run_progress(Console(file=out, soft_wrap=True)) as show:
        for event in events:
            show(event)
    assert [line.count(MARKUP) for line in out.getvalue().splitlines()] == [1, 2, 1, 2, 2, 1, 1, 2]


@pytest.mark.parametrize(("done", "shown"), [(True, "dry run of 1,024 tokens"), (False, "skipping the dry run")])
def test_dry_run_event_shows_predicted_memory(done: bool, shown: str) -> None:
    """The event keeps the name that it has in events.jsonl."""
    out = io.StringIO()
    event = {"event": "rehearsal", "predicted_bytes": 2**30, "usable_bytes": 2**31, "tokens": 1024, "done": done}
    with run_progress(Console(file=out, soft_wrap=True)) as show:
        show(event)
    assert out.getvalue() == f"memory   1.00 GiB predicted, 2.0 usable: {out.getvalue().partition('usable: ')[2]}"
    assert shown in out.getvalue()


def test_markup_in_a_status_line_on_a_terminal_is_printed_literally() -> None:
    out = io.StringIO()
    with status_line(f"merging into {MARKUP}", Console(file=out, force_terminal=True, width=200)) as status:
        status.update(f"reading {MARKUP}")
    assert MARKUP in out.getvalue()


@pytest.mark.parametrize(("level", "expected"), [(logging.WARNING, ["w"]), (logging.DEBUG, ["i", "w", "d"])])
def test_messages_reach_other_handlers_as_without_a_display(level: int, expected: list[str]) -> None:
    messages: list[str] = []
    handler, root, logger = logging.Handler(), logging.getLogger(), logging.getLogger("strop.x")
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    before, shown = root.level, list[str]()
    root.addHandler(handler)
    root.setLevel(level)
    try:
        with progress.activity_messages(shown.append), progress.activity_messages(shown.append):
            logger.info("i")
            logger.warning("w")
            logger.debug("d")
        logger.info("later")
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    assert messages == expected + ["later"] * (level == logging.DEBUG) and shown == ["i", "i"]
