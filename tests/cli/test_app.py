"""The command line as a contract: help texts are changed on purpose only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from strop.cli.app import COMMANDS, GROUPS
from tests import ROOT
from tests.support.helptexts import FILE, helptexts


def test_help_says_what_it_said() -> None:
    """After a change that is meant: python -m tests.support.helptexts"""
    assert helptexts() == FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*COMMANDS, *GROUPS])
def test_a_command_is_in_the_file_named_after_it(name: str) -> None:
    """Those of a group are in the group's file."""
    commands = GROUPS[name][1] if name in GROUPS else {COMMANDS[name].__name__: COMMANDS[name]}
    file = {"eval": "evaluate", "import": "import_", "export-script": "export_script"}.get(name, name)
    assert {command.__module__ for command in commands.values()} == {f"strop.commands.{file}"}
    tree = ast.parse((ROOT / "src" / "strop" / "commands" / f"{file}.py").read_text(encoding="utf-8"))
    public = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    assert sorted(public) == sorted(commands)


def test_a_command_ends_without_looking_for_rubbish() -> None:
    script = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
        "from strop import cli; sys.argv = ['strop', '--version']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.parametrize("debug", ["", "1"])
def test_libraries_have_no_last_word(debug: str) -> None:
    """nanobind, in triton from 3.9 on, calls all that Python leaves where it is when it ends a leak."""
    script = (
        "import atexit, os, sys; atexit.register(lambda: os.write(2, b'nanobind: leaked 513 functions!')); "
        "from strop import cli; sys.modules['triton'] = sys; sys.argv = ['strop', '--colour']; cli.main()"
    )
    environment = {**os.environ, "STROP_DEBUG": debug}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "--colour" in done.stderr
    assert ("nanobind" in done.stderr) == bool(debug)
