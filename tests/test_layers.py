"""Imports point down only (DESIGN 4), and what must start fast starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

SOURCE = ROOT / "src" / "strop"

# from the bottom up; a module may import its own row only where the row's own entry says so
LAYERS = [
    {"errors"},
    {"runs"},
    {"config"},
    {"data", "model", "engine", "machine"},
    {"adapters", "evaluation", "planning"},
    {"training", "exporting", "serve"},
    {"flags", "terminal"},
    {"chat", "demo"},
    {"commands"},
    {"cli"},
]
SIDEWAYS = {
    ("model", "engine"),
    ("model", "machine"),
    ("engine", "machine"),
    ("evaluation", "adapters"),
}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "core", "base", "manager"}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def level(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


def imports(file: Path) -> set[str]:
    """Modules of strop that a file imports, at any depth; imports for type checking count too, but for Example."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("strop."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("strop.")}
    return found


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_down(file: Path) -> None:
    here = file.relative_to(SOURCE).with_suffix("").parts[0]
    assert not FORBIDDEN_NAMES & set(file.relative_to(SOURCE).with_suffix("").parts)
    if here == "__init__":
        return
    wrong = []
    for module in imports(file):
        there = room(module)
        allowed = there == here or level(there) < level(here) or (here, there) in SIDEWAYS
        unit_between = module == "strop.data.conversation" and here in ("engine", "model")
        if not (allowed or unit_between):
            wrong.append(module)
    assert not wrong


def test_files_stay_readable() -> None:
    long = {str(file): lines for file in SOURCE.rglob("*.py") if (lines := len(file.read_text().splitlines())) > 400}
    assert not long


@pytest.mark.parametrize("code", ["import strop", "import strop.cli", "from strop.cli import build; build(['train'])"])
def test_starts_without_torch(code: str) -> None:
    check = f"import sys; {code}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_check_needs_no_torch(tiny_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a b", "completion": "c d"}\n', encoding="utf-8")
    check = (
        "import sys; from strop.cli import main\n"
        f"sys.argv = ['strop', 'check', '--model', {str(tiny_folder)!r}, '--data', {str(rows)!r}]\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["0", "False"], ["None", "False"]), done.stdout + done.stderr
