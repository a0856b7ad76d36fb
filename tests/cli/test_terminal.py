"""What a run prints where there is no terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from strop.cli import chat
from strop.cli import progress as signs
from strop.cli.app import COMMANDS, GROUPS
from strop.cli.examples import EXAMPLES
from strop.cli.invocation import as_typed, typed
from strop.cli.progress import alive
from strop.cli.terminal import (
    OFTEN_SECONDS,
    PLAIN_SECONDS,
    Screen,
    answering,
    print_adapters,
    print_end,
    print_json,
    watching,
)
from strop.config.schema import option_fields
from tests.support.commands import fault
from tests.support.helptexts import helptexts
from tests.support.pages import commands


def test_into_a_file_progress_is_a_line_now_and_then() -> None:
    out = io.StringIO()
    step: dict[str, Any] = {"event": "step", "loss": 1.5, "tokens_per_s": 400.0, "seconds_left": 62.0}
    parameters = {"trainable": 1, "all": 10}
    with watching(Console(file=out, soft_wrap=True)) as watch:
        watch(
            {
                "event": "start",
                "time": 0.0,
                "step": 0,
                "steps": 3,
                "engine": "fast",
                "why": "",
                "parameters": parameters,
            }
        )
        for i, seconds in enumerate((1.0, 1.5, 1.0 + PLAIN_SECONDS[0]), start=1):
            watch({**step, "time": seconds, "step": i})
        watch({"event": "end", "time": 99.0, "step": 3})
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert lines == [f"step     {i}  loss 1.5000  400 tokens/s  1:02 left" for i in (1, 3)]


def test_a_long_run_says_less() -> None:
    out = io.StringIO()
    step: dict[str, Any] = {"event": "step", "loss": 1.5, "tokens_per_s": 400.0, "seconds_left": 62.0, "steps": 9}
    often, seldom = PLAIN_SECONDS
    with watching(Console(file=out)) as watch:
        times = (1.0, OFTEN_SECONDS + 2, OFTEN_SECONDS + 2 + often, OFTEN_SECONDS + 2 + seldom)
        for number, seconds in enumerate(times, start=1):
            watch({**step, "time": seconds, "step": number})
    told = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert told == ["1", "2", "4"]


def lines_of(out: io.StringIO, number: int) -> list[str]:
    """The first lines that are printed, waited for."""
    until = time.monotonic() + 60
    while len(out.getvalue().splitlines()) < number and time.monotonic() < until:
        time.sleep(0.005)
    return out.getvalue().splitlines()[:number]


def test_while_nothing_is_printed_it_says_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(signs, "TICK_SECONDS", 0.001)
    out = io.StringIO()
    with alive(Console(file=out), "loading the libraries"):
        assert lines_of(out, 1) == ["still    loading the libraries (0 s)"]
        logging.getLogger("strop.engine.kernels.warmup").info("compiling %s", "loops")
        before = len(out.getvalue().splitlines())
        assert "still    compiling loops (0 s)" in lines_of(out, before + 3)
    ended = out.getvalue()
    logging.getLogger("strop").info("no longer")
    assert not logging.getLogger("strop").handlers and out.getvalue() == ended


def test_behind_the_last_step_no_further_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(signs.Alive, "now", lambda _, what: told.append(what))
    step: dict[str, Any] = {"event": "step", "loss": 1.5, "tokens_per_s": 400.0, "seconds_left": 0.0, "time": 1.0}
    with watching(Console(file=io.StringIO())) as watch:
        for number in (1, 2):
            watch({**step, "step": number, "steps": 2})
    assert told == ["computing step 2", "saving"]


def test_answers_begin_with_a_sign_and_end_it() -> None:
    out = io.StringIO()
    with answering(Console(file=out)) as advance:
        advance("base", 1, 2)
    assert not logging.getLogger("strop").handlers


def test_commands_are_written_as_they_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "strop").write_text("#!/bin/sh\n", encoding="utf-8")
    (folder / "strop").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(folder / "strop"), "demo"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert as_typed() == ".venv/bin/strop"
    assert typed("use `strop resume runs/a`, not strop's") == "use `.venv/bin/strop resume runs/a`, not strop's"
    monkeypatch.setenv("PATH", str(folder))
    assert as_typed() == "strop" and typed("strop runs") == "strop runs"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "strop" / "__main__.py")])
    assert as_typed().endswith(" -m strop")


def test_every_command_has_two_examples_that_are_right() -> None:
    names = {*COMMANDS, *(f"{group} {name}" for group, (_, made) in GROUPS.items() for name in made)}
    assert set(EXAMPLES) == names
    for name, examples in EXAMPLES.items():
        assert len(examples) == 2
        for example in examples:
            words = next(words for words in commands(example.partition(" > ")[0]) if words[0] == "strop")
            assert " ".join(words[1:]).startswith(name) and fault(words[1:]) is None, example


def test_help_has_the_default_and_the_choices_of_every_field() -> None:
    said = helptexts()
    assert "[none|nf4|fp4|int8|auto] [default: none]" in said and "[cosine|linear|constant]" in said
    for name, info in option_fields():
        line = next(line for line in said.splitlines() if f"--{name} " in line)
        assert info.is_required() or "[default: " in line


def test_a_shell_can_complete_the_fields_of_a_recipe() -> None:
    asked = {"_STROP_COMPLETE": "complete_bash", "COMP_WORDS": "strop train --model.q", "COMP_CWORD": "2"}
    call = "import sys; sys.argv = ['strop']; from strop.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", call], env={**os.environ, **asked}, capture_output=True, text=True)
    assert "--model.quantization" in done.stdout.split()


@pytest.mark.parametrize("name", ["runs", "modules"])
def test_help_fits_into_80_columns_without_colour(name: str) -> None:
    call = f"import sys; sys.argv = ['strop', '{name}', '--help']; from strop.cli.app import main; main()"
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "FORCE_COLOR": ""}
    done = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True)
    assert "Examples:" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80 and "\x1b" not in done.stdout


def test_memory_is_told_as_predicted_and_as_measured(capsys: pytest.CaptureFixture[str]) -> None:
    memory = {"predicted_peak_bytes": 2**30, "measured_peak_bytes": 5 * 2**28}
    figures = {"steps": 3, "tokens": 9, "seconds": 1.0, "tokens_per_s": 9.0, "supervised_tokens_per_s": 4.0}
    print_end({"run": "r", "adapter": "a", "memory": memory, **figures}, False)
    assert "memory   1.25 GiB measured, 1.00 predicted (+25%)" in capsys.readouterr().err


ODD = "[INST] x [/INST] [red]y[/]"  # words that a console could take for its own marks


def test_texts_in_brackets_are_printed_as_they_are() -> None:
    out = io.StringIO()
    choice = {"field": "lora.new_tokens", "value": [ODD], "origin": "option", "why": ODD}
    passed: dict[str, Any] = {"step": 1, "to": 0, "passed": [], "rate_scale": 0.5, "rows": [ODD], "why": ODD}
    events: list[dict[str, Any]] = [
        {"event": "machine", "lines": [ODD]},
        {"event": "recipe", "resuming": False, "choices": [choice]},
        {"event": "note", "text": ODD},
        *({"event": name, **passed} for name in ("skip", "doubt", "rollback", "stop")),
        {"event": "override", "field": "data.train", "now": ODD, "was": [ODD]},
    ]
    with watching(Console(file=out, soft_wrap=True)) as watch:
        for event in events:
            watch(event)
    assert [line.count(ODD) for line in out.getvalue().splitlines()] == [1, 2, 1, 2, 2, 1, 1, 2]


def test_names_in_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"steps": 3, "tokens": 9, "seconds": 1.0, "tokens_per_s": 9.0, "supervised_tokens_per_s": 4.0}
    print_end({"run": "runs/a[/b]", "adapter": "runs/a[/b]/adapter", "diagnosis": [ODD], **figures}, False)
    said = capsys.readouterr().err
    assert "runs/a[/b]/adapter" in said and "runs/a[/b]/report.html" in said and ODD in said
    assert "chat 'runs/a[/b]'" in said  # as a shell takes it
    out, facts = io.StringIO(), {"base": "[/b]", "rank": 4, "target_modules": ["q_proj"], "size_bytes": 1}
    print_adapters([{"folder": "a[red]x", "score": "-", **facts}], Console(file=out, width=200))
    assert "a[red]x" in out.getvalue() and "[/b]" in out.getvalue()


def test_a_sign_of_life_on_a_terminal_takes_any_name() -> None:
    out = io.StringIO()
    with alive(Console(file=out, force_terminal=True, width=200), f"merging into {ODD}") as sign:
        sign.now(f"reading {ODD}")
    assert ODD in out.getvalue()


def test_texts_of_others_are_shown_and_not_obeyed() -> None:
    out = io.StringIO()
    Screen(file=out, soft_wrap=True).print("rows.jsonl:100: a\x1b[2J\x1b]0;t\x07\x9b31m\x7fb\nc", markup=False)
    assert out.getvalue() == "rows.jsonl:100: a\\x1b[2J\\x1b]0;t\\x9b31m\\x7fb\nc\n"


def test_on_a_terminal_an_answer_moves_no_cursor(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    chat._write("a\x1b[2J\n")
    assert capsys.readouterr().out == "a\\x1b[2J\n"


@pytest.mark.parametrize("coding", ["ascii", "utf-8"])
def test_json_is_json_on_any_stdout(coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=coding, errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    print_json({"file": "rü\udcff.jsonl"}, True)
    out.flush()
    assert json.loads(out.buffer.getvalue()) == {"file": "rü\udcff.jsonl"}  # type: ignore[attr-defined]
