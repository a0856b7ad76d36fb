"""Help texts, examples and the end of a command."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from strop.cli.app import COMMANDS, EXAMPLES, GROUPS, _exit_with_error
from strop.display.tables import command_name, with_command_name
from strop.errors import Stopped
from tests import ROOT
from tests.support.commands import find_error
from tests.support.pages import commands


def test_commands_are_the_only_public_functions_of_their_files() -> None:
    functions = [*COMMANDS.values(), *(command for _, commands in GROUPS.values() for command in commands.values())]
    for file in (ROOT / "src" / "strop" / "cli" / "commands").glob("[!_]*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        public = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
        assert public == {f.__name__ for f in functions if f.__module__ == f"strop.cli.commands.{file.stem}"}


def test_every_command_has_two_valid_examples() -> None:
    names = {*COMMANDS, *(f"{group} {name}" for group, (_, functions) in GROUPS.items() for name in functions)}
    assert set(EXAMPLES) == names
    for name, examples in EXAMPLES.items():
        assert len(examples) == 2
        for example in examples:
            words = next(words for words in commands(example.partition(" > ")[0]) if words[0] == "strop")
            assert " ".join(words[1:]).startswith(name) and find_error(words[1:]) is None, example


def test_shell_completes_recipe_fields() -> None:
    variables = {"_STROP_COMPLETE": "complete_bash", "COMP_WORDS": "strop train --model.q", "COMP_CWORD": "2"}
    call = "import sys; sys.argv = ['strop']; from strop.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", call], env={**os.environ, **variables}, capture_output=True, text=True)
    assert "--model.quantization" in done.stdout.split()


@pytest.mark.parametrize("name", ["runs", "modules"])
def test_help_without_colour_fits_into_80_columns(name: str) -> None:
    call = f"import sys; sys.argv = ['strop', '{name}', '--help']; from strop.cli.app import main; main()"
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "FORCE_COLOR": ""}
    done = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True)
    assert "Examples:" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80 and "\x1b" not in done.stdout


def test_messages_name_the_command_that_works_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "strop").write_text("#!/bin/sh\n", encoding="utf-8")
    (folder / "strop").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(folder / "strop"), "demo"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert command_name() == ".venv/bin/strop"
    expected = "use `.venv/bin/strop resume runs/a`, not strop's"
    assert with_command_name("use `strop resume runs/a`, not strop's") == expected
    assert with_command_name("for example: strop runs") == "for example: .venv/bin/strop runs"
    assert with_command_name("strop trains adapters, as strop does") == "strop trains adapters, as strop does"
    monkeypatch.setenv("PATH", str(folder))
    assert command_name() == "strop" and with_command_name("strop runs") == "strop runs"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "strop" / "__main__.py")])
    assert command_name() == f"{sys.executable} -m strop"  # `python` is not on the PATH, or another one
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert command_name() == f"{Path(sys.executable).name} -m strop"


def test_exit_skips_garbage_collection() -> None:
    script = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
        "from strop.cli.app import main; sys.argv = ['strop', '--version']; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.parametrize("debug", ["", "1"])
def test_library_output_at_exit_is_hidden_without_debug(debug: str) -> None:
    """nanobind (in Triton from 3.9) reports objects that are not freed at exit as leaks."""
    script = (
        "import atexit, os, sys; atexit.register(lambda: os.write(2, b'nanobind: leaked 513 functions!')); "
        "from strop.cli.app import main; sys.modules['triton'] = sys; sys.argv = ['strop', '--colour']; main()"
    )
    environment = {**os.environ, "STROP_DEBUG": debug}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "--colour" in done.stderr
    assert ("nanobind" in done.stderr) == bool(debug)


def test_requested_stop_is_one_line_and_not_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = Stopped("stopped after step 8 of 12", fix="continue with `strop resume runs/mine`")
    with pytest.raises(SystemExit) as ended:
        _exit_with_error(stopped.lines(), stopped.as_json(), stopped.exit_code)
    shown = capsys.readouterr().err
    assert ended.value.code == 130
    assert shown.count("\n") == 1 and shown.startswith("stopped after step 8 of 12; continue with `")
    assert shown.endswith("resume runs/mine`\n")
