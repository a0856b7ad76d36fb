"""Printed results: summaries, tables, JSON and untrusted text."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
from rich.console import Console

from strop.cli import chat
from strop.display.tables import SafeConsole, print_adapters, print_json, print_run_summary

FIGURES = {
    "steps": 3,
    "tokens": 9,
    "seconds": 1.0,
    "tokens_per_s": 9.0,
    "supervised_tokens": 8,
    "supervised_tokens_per_s": 4.0,
}
MARKUP = "[INST] x [/INST] [red]y[/]"  # text that Rich could read as markup


def test_run_summary_compares_predicted_and_measured_memory(capsys: pytest.CaptureFixture[str]) -> None:
    memory = {"predicted_peak_bytes": 2**30, "measured_peak_bytes": 5 * 2**28}
    print_run_summary({"run": "r", "adapter": "a", "memory": memory, **FIGURES}, False)
    assert "memory   1.25 GiB measured, 1.00 predicted (+25%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("evaluated", "shown"),
    [
        ("held out.jsonl", "next     strop eval runs/a --data 'held out.jsonl'\n         strop chat runs/a\n"),
        (["a.jsonl", "b.jsonl"], "next     strop eval runs/a --data a.jsonl --data b.jsonl\n"),
        ("5%", "measure  strop eval runs/a --data ROWS.jsonl, on rows that it was not trained on\n"),
        (None, "ROWS.jsonl, on rows that it was not trained on; --eval 5% keeps some back in the next run\n"),
    ],
)
def test_next_commands_work_as_printed(evaluated: Any, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = [{"field": "data.eval", "value": evaluated}]
    print_run_summary({"run": "runs/a", "adapter": "runs/a/adapter", "recipe": recipe, **FIGURES}, False)
    err = capsys.readouterr().err
    assert shown in err
    report = {"run": "runs/a", "adapter": "runs/a/adapter", "recipe": recipe, **FIGURES}
    print_run_summary({**report, "objective": {"name": "kto"}}, False)  # whose rows cannot be scored
    err = capsys.readouterr().err
    assert "next     strop chat runs/a" in err and "eval runs/a --data PAIRS.jsonl, or rows with right answers" in err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_measured_memory_says_what_it_leaves_out(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    memory = {"measured_peak_bytes": 3 << 30, "predicted_peak_bytes": 2 << 30}
    report = {"run": "runs/a", "adapter": "runs/a/adapter", "memory": memory, **FIGURES}
    print_run_summary({**report, "recipe": [{"field": "model.device", "value": device}]}, False)
    scope = " besides Python and its libraries" if device == "cpu" else ""
    assert f"memory   3.00 GiB measured{scope}, 2.00 predicted (+50%)" in capsys.readouterr().out


def test_long_names_and_modules_of_adapters_fit_into_a_line() -> None:
    out = io.StringIO()
    adapter = {"folder": "runs/a-long-name-of-a-run/adapter", "base": "demo", "rank": 8, "size_bytes": 3 << 20}
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    print_adapters([{**adapter, "target_modules": names, "score": "exact 1.0%"}], Console(file=out, width=110))
    assert "runs/a-long-name-of-a-run/adapter" in out.getvalue() and "q_proj, k_proj, v_proj, ..." in out.getvalue()
    assert "3.0 MiB" in out.getvalue()


def test_markup_in_names_is_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    print_run_summary({"run": "runs/a[/b]", "adapter": "runs/a[/b]/adapter", "diagnosis": [MARKUP], **FIGURES}, False)
    shown = capsys.readouterr()
    assert "runs/a[/b]/adapter" in shown.out and "runs/a[/b]/report.html" in shown.out and MARKUP in shown.out
    assert "chat 'runs/a[/b]'" in shown.err  # quoted for a shell
    out, facts = io.StringIO(), {"base": "[/b]", "rank": 4, "target_modules": ["q_proj"], "size_bytes": 1}
    print_adapters([{"folder": "a[red]x", "score": "-", **facts}], Console(file=out, width=200))
    assert "a[red]x" in out.getvalue() and "[/b]" in out.getvalue()


def test_control_characters_are_printed_as_codes() -> None:
    out = io.StringIO()
    text = "rows.jsonl:100: a\x1b[2J\x1b]0;t\x07\x9b31m\x7fb\nc"
    SafeConsole(file=out, soft_wrap=True).print(text, markup=False)
    assert out.getvalue() == "rows.jsonl:100: a\\x1b[2J\\x1b]0;t\\x9b31m\\x7fb\nc\n"


def test_control_characters_in_an_answer_are_printed_as_codes_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    chat._write("a\x1b[2J\n")
    assert capsys.readouterr().out == "a\\x1b[2J\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_json_is_valid_for_any_encoding_of_stdout(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    print_json({"file": "rü\udcff.jsonl"}, True)
    out.flush()
    assert json.loads(out.buffer.getvalue()) == {"file": "rü\udcff.jsonl"}  # type: ignore[attr-defined]


def test_summary_names_the_time_beside_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    print_run_summary({"run": "r", "adapter": "a", "eval_seconds": 74.0, "save_seconds": 0.1, **FIGURES}, False)
    assert "and evaluation and samples 74 s\n" in capsys.readouterr().out
