"""The files that CONTRIBUTING.md names exist."""

from __future__ import annotations

import re

import pytest

from tests import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`((?:src|tests|docs|tools|benchmarks)/[\w./-]*)`", TEXT)))


@pytest.mark.parametrize("path", PATHS)
def test_named_files_exist(path: str) -> None:
    assert (ROOT / path).exists()
    assert (ROOT / path).is_dir() == path.endswith("/")


def test_a_short_name_is_a_file_of_its_row() -> None:
    """In a row about `src/strop/cli/`, `app` is a file in that folder."""
    wrong, seen = [], 0
    for row in re.findall(r"^\| `src/.*$", TEXT, re.M):
        first, _, text = row.partition(" | ")
        folders = [
            ROOT / path if path.endswith("/") else (ROOT / path).parent for path in re.findall(r"`(src/[^`]*)`", first)
        ]
        names = re.findall(r"`([a-z_]+)`", text)
        seen += len(names)
        wrong += [
            name
            for name in names
            if not any((folder / f"{name}.py").is_file() for folder in folders)
            and not any(
                re.search(rf"def {name}\b", file.read_text()) for folder in folders for file in folder.glob("*.py")
            )
        ]
    assert not wrong and seen > 50


def test_every_folder_is_described() -> None:
    rooms = {
        path.name for path in (ROOT / "src" / "strop").iterdir() if path.is_dir() and (path / "__init__.py").exists()
    }
    assert rooms - {"demo", "runs"} <= {path.split("/")[2] for path in PATHS if path.startswith("src/strop/")}


def test_each_silent_error_on_record_has_a_test_that_names_it() -> None:
    """docs/measured.md lists sixteen errors; the docstring of a test for one has `on record, N`."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    numbers = [result for text in texts for result in re.findall(r"[Oo]n record, ([\d and]+)", text)]
    assert {int(number) for one in numbers for number in re.findall(r"\d+", one)} == set(range(1, 17))
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    listed = page[page.index("### Errors on record") :].split("\n##")[0]
    assert [int(number) for number in re.findall(r"^(\d+)\.", listed, re.MULTILINE)] == list(range(1, 17))
