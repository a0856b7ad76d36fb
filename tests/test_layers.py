"""Imports only go to lower layers without cycles, and modules that must start fast do not import torch.

Imports at the top of a file, inside functions and for type checking all count.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

SOURCE = ROOT / "src" / "strop"

# From the bottom up: a folder may import itself and the folders in the rows above it.
LAYERS: list[set[str]] = [
    {"errors"},
    {"runs"},
    {"config"},
    {"data", "machine"},
    {"models", "display"},
    {"engine"},
    {"objectives", "distributed"},
    {"evaluation", "planning"},
    {"training", "exporting"},
    {"api"},
    {"serve", "interop", "sweeping"},
    {"dash", "demo"},
    {"cli", "testing"},
    {"__main__"},
]
SIDEWAYS: set[tuple[str, str]] = set()
# The modules that may import code of one kind of processor; only engine may.
CHOOSERS = {"engine/kernels/dispatch.py", "engine/device.py"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "core", "base", "manager"}
FILES = sorted(SOURCE.rglob("*.py"))


def place(file: Path) -> str:
    return str(file.relative_to(SOURCE))


def module_of(file: Path) -> str:
    parts = ("strop", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """Yield the modules of strop that a file imports at any depth; `from strop.engine import eager` is eager.py."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "strop")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(file)}: a relative import"
            if node.module and node.module.split(".")[0] == "strop":
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name for name in inner if name in MODULES)
                if any(name not in MODULES for name in inner):
                    yield node.module


def level(layers: Sequence[set[str]], name: str) -> int:
    return next(number for number, layer in enumerate(layers) if name in layer)


@pytest.mark.parametrize("file", FILES, ids=place)
def test_imports_point_down(file: Path) -> None:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    here = parts[0]
    assert not FORBIDDEN_NAMES & set(parts)
    if here == "__init__":
        return
    wrong = []
    for module in imports(file):
        there = module.split(".")[1] if "." in module else ""
        if not there:  # strop's name and version
            continue
        allowed = there == here or level(LAYERS, there) < level(LAYERS, here) or (here, there) in SIDEWAYS
        unit_between = module == "strop.data.types" and here in ("engine", "model")
        if not (allowed or unit_between):
            wrong.append(module)
    assert not wrong


def test_processors_are_reached_through_one_place() -> None:
    own = ("engine/kernels/cpu/", "engine/kernels/cuda/")
    reached = {
        place(file)
        for file in FILES
        for module in imports(file)
        if module.startswith(("strop.engine.kernels.cpu", "strop.engine.kernels.cuda"))
        and not place(file).startswith(own)
    }
    assert reached == CHOOSERS
    for_cards = [file for file in FILES if place(file).startswith(own[1])]
    assert not [
        file for file in for_cards if any(module.startswith("strop.engine.kernels.cpu") for module in imports(file))
    ]


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return a cycle of imports, with the first module repeated at the end, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_have_no_cycles() -> None:
    graph = {name: set(imports(file)) - {name} for name, file in MODULES.items()}
    graph["strop"] = set()  # the Python API imports from everywhere; others import only the version from it
    assert not circle(graph)
    assert circle({**graph, "strop.errors": {"strop.cli.app"}})  # an injected cycle is detected


def test_tests_mirror_the_source() -> None:
    """The folder of a test is that of the files it tests, so that the tests of a file are easy to find."""
    rooms = {str(file.parent.relative_to(SOURCE)) for file in FILES}
    tests = {str(file.parent.relative_to(ROOT / "tests")) for file in (ROOT / "tests").rglob("test_*.py")}
    assert tests - rooms == {"faults", "simulated_gpu"}  # tests of whole runs: injected faults, and a simulated GPU


@pytest.mark.parametrize(
    "code", ["import strop", "import strop.cli.app", "from strop.cli.app import build; build(['train'])"]
)
def test_starts_without_torch(code: str) -> None:
    check = f"import sys; {code}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_check_needs_no_torch(tiny_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a b", "completion": "c d"}\n', encoding="utf-8")
    check = (
        "import sys; from strop.cli.app import main\n"
        f"sys.argv = ['strop', 'check', '--model', {str(tiny_folder)!r}, '--data', {str(rows)!r}]\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() in (["0", "False"], ["None", "False"]), done.stdout + done.stderr
