"""The comparison with other tools is complete, matches its data, and has a test for each of strop's claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ROOT
from tests.support.scripts import script

comparison = script(ROOT / "tools" / "comparison.py")
DATA = comparison.load()
ROWS = [row for topic in DATA["topics"] for row in topic["rows"]]


def test_page_is_generated_from_the_data() -> None:
    assert comparison.PAGE.read_text(encoding="utf-8") == comparison.page(DATA)
    assert len(DATA["tools"]) == 11 and len(ROWS) >= 90


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["what"])
def test_rows_are_complete_and_claims_have_tests(row: dict[str, str]) -> None:
    assert set(row) == {"what", "ours", "look", *DATA["tools"]}
    verdict, test, *_ = row["ours"]
    assert (verdict == "no") == (test == "")
    assert not test or [file for file in (ROOT / test, *(ROOT / test).glob("test_*.py")) if file.is_file()]
    cells = [comparison.Cell.read(row[name]) for name in DATA["tools"]]
    better = verdict != "yes" and any(cell.verdict == "yes" for cell in cells)
    assert row["what"].startswith("**") == better or row["what"] == "Telemetry"


def test_cell_that_the_sources_do_not_support_is_reported(tmp_path: Path) -> None:
    one = {"name": "One", "folder": "one", "read": ["src"]}
    (tmp_path / "one" / "src").mkdir(parents=True)
    (tmp_path / "one" / "src" / "a.py").write_text("use_dora = True\n", encoding="utf-8")

    def search(cell: str, look: str) -> list[str]:
        data = {"tools": {"one": one}, "topics": [{"rows": [{"what": "w", "look": look, "one": cell}]}]}
        return list(comparison.faults(data, tmp_path))

    assert not search("src/a.py", "dora") and not search("none", "loftq") and not search("src/a.py @ = true", "x")
    assert not search("src/a.py ! another thing", "dora")
    for cell, look in (("none", "dora"), ("src/a.py", "loftq"), ("src/b.py", "dora"), ("src/a.py @ no ~ part", "dora")):
        assert len(search(cell, look)) == 1
