"""The command line as a contract: help texts are changed on purpose only."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from strop.cli import COMMANDS, GROUPS
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
