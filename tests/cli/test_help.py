"""The help as a terminal shows it, and options by their short and by other tools' names."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest

from strop.cli.app import COMMANDS, EXAMPLE_ROW, GROUPS, PANELS
from strop.cli.options import COMMON
from strop.config.names import OTHER_NAMES, SHORT_FORMS
from strop.config.schema import RowFormat, option_fields
from strop.data.formats import DOCUMENT, FORMATS
from tests import ROOT
from tests.support.helptexts import FILE, help_by_command, helptexts
from tests.support.runs import run

needs_terminal = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals exist on POSIX systems only")


def is_pinned(package: str) -> bool:
    """Return whether the installed minor version of a package is the one in constraints.txt."""
    pins = re.findall(rf"^{package}==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    return version(package).startswith(tuple(f"{pin}." for pin in pins))


def joined(text: str) -> str:
    """Return a help text as one line without its frames."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def default_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


@needs_terminal
@pytest.mark.skipif(not (is_pinned("typer") and is_pinned("rich")), reason="other versions lay out help differently")
def test_help_equals_the_snapshot() -> None:
    """After an intended change: python -m tests.support.helptexts"""
    assert helptexts() == FILE.read_text(encoding="utf-8")


@needs_terminal
def test_first_help_screen_has_at_most_60_lines() -> None:
    texts = help_by_command()
    assert len(texts["strop"].splitlines()) <= 45
    for name in ("strop", *(f"strop {name}" for name in ("train", "resume", "plan", "check"))):
        assert len(texts[name].splitlines()) <= 60, name


@needs_terminal
@pytest.mark.parametrize("width", [80, 140])
def test_help_shows_common_options_with_choices_and_defaults(width: int) -> None:
    shown = joined(help_by_command(width)["strop train"])
    short = {field: name for name, field in SHORT_FORMS.items()}
    for field in COMMON["train"]:
        assert f"--{short.get(field, field)} " in shown
    assert "[none | nf4 | fp4 | int8 | auto] [default: none]" in shown
    assert "--rank <int> Rank of the adapter. [default: 16]" in shown
    assert "--model.name" not in shown and "--train.beta" not in shown and "--help-all" in shown


@needs_terminal
@pytest.mark.parametrize("width", [80, 140])
def test_full_help_shows_every_field_with_its_default(width: int) -> None:
    shown = joined(help_by_command(width)["strop train --help-all"])
    for name, info in option_fields():
        assert f"--{name} " in shown
        if not info.is_required() and info.default not in (None, []) and info.default_factory is None:
            assert f"[default: {default_text(info.default)}]" in shown
    assert "Recipe: objectives" in shown


@needs_terminal
def test_help_shows_rows_and_their_formats() -> None:
    texts = help_by_command()
    for name in ("strop", "strop check", "strop train", "strop sweep", "strop train --help-all"):
        assert EXAMPLE_ROW in texts[name], name
    for entry in FORMATS.values():
        assert re.search(rf"^ *{entry.name} +{', '.join(entry.example)}", texts["strop check"], re.M), entry.name
        assert f"| {entry.name}" in joined(texts["strop train --help-all"])
    for objective in ("dpo", "kto", "grpo", "classify", "embed"):
        listed = joined(texts["strop train --help-all"]).partition("Rows of each objective:")[2]
        assert re.search(rf"\b{objective}\b[^{{]*{{", listed), objective
    assert '{"prompt": "hi", "chosen": "yo", "rejected": "no"}' in texts["strop train --help-all"]


@needs_terminal
def test_first_help_screen_starts_with_the_commands_of_a_first_run() -> None:
    start, _, commands = help_by_command()["strop"].partition("╭")
    words = [line.split()[1] for line in start.splitlines() if line.startswith("   strop ")]
    assert words == ["check", "train", "eval", "chat"] and "doctor" in commands and "--version" in start


@needs_terminal
def test_help_separates_the_options_of_output_and_lists_no_choice_twice() -> None:
    texts = help_by_command()
    common, _, others = texts["strop train"].partition("─ Output and help ─")
    assert "--lr" in common and "--json" not in common
    assert all(f"{option} " in others for option in ("--help-all", "--print-recipe", "--json", "--help"))
    assert "[sft |" not in texts["strop train"] and "classes (classify)" in joined(texts["strop train"])
    assert "for a sweep runs/sweep-N" in joined(texts["strop sweep"])
    assert "strop runs --delete mine --yes" in texts["strop runs"]


def test_formats_of_a_recipe_are_those_that_are_read() -> None:
    assert get_args(RowFormat) == ("auto", DOCUMENT, *FORMATS)


@pytest.mark.parametrize("command", ["", "eval", "merge", "chat", "runs", "export", "export gguf", "launch slurm"])
def test_full_help_of_a_command_without_more_options_is_its_help(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [run(*command.split(), option, capsys=capsys) for option in ("--help", "--help-all")]
    assert results[0] == results[1] and results[0][0] == 0 and "Usage" in results[0][1]


def test_help_lists_every_command_in_one_panel() -> None:
    assert sorted(name for panel in PANELS.values() for name in panel) == sorted([*COMMANDS, *GROUPS])


@pytest.mark.parametrize(
    ("option", "suggestion"),
    [
        ("--learning-rate", "--lr"),
        ("--lora_alpha", "--alpha"),
        ("--load-in-4bit", "--quantization nf4"),
        ("--per_device_train_batch_size", "--train.micro_batch"),
        ("--num_train_epochs", "--epochs"),
        ("--bf16", "--model.dtype bf16"),
        ("--optimiser", "--train.optimizer"),
    ],
)
def test_option_of_another_tool_suggests_the_right_one(
    option: str, suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = run("train", "--model", "demo", "--data", "rows.jsonl", option, "1", capsys=capsys)
    assert code == 2 and f"did you mean {suggestion}?" in " ".join(errors.split())


def test_names_of_other_tools_lead_to_existing_fields() -> None:
    fields = {field for field, _ in option_fields()}
    assert {name.partition(" ")[0] for name in OTHER_NAMES.values()} <= fields
    assert set(SHORT_FORMS.values()) <= fields


def test_field_given_by_short_and_full_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--lr", "1e-4", "--train.learning_rate", "1e-3")
    code, _, errors = run("train", "--model", "demo", "--data", "rows.jsonl", *options, capsys=capsys)
    assert code == 2 and "train.learning_rate: given twice" in errors


def test_argument_is_a_recipe_data_or_a_model(
    rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run("check", rows_file, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["rows"]["read"] == 24
    code, out, _ = run("plan", "demo", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["fits"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: demo\ndata: {rows_file}\nrank: 4\n")
    code, out, _ = run("check", recipe, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["rows"]["read"] == 24
    code, _, errors = run("train", rows_file, capsys=capsys)
    assert code == 2 and f"give it with --data {rows_file}" in "".join(errors.splitlines())


@pytest.mark.parametrize("command", ["dash", "runs"])
def test_missing_folder_of_runs_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(command, "nope", capsys=capsys)
    assert code == 2 and "nope: no such folder" in errors
