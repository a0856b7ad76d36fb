"""The example on the page about imports: a config and the recipe that it becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ROOT
from tests.support.pages import blocks
from tests.support.runs import run


def test_example_of_the_page_is_what_the_import_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = [block for block in blocks(ROOT / "docs" / "import.md") if block.language in ("text", "yaml")]
    config, recipe, report = (block.text for block in page[:3])
    (tmp_path / "config.yml").write_text(config, encoding="utf-8")
    out = tmp_path / "recipe.yaml"
    code, *printed = run("import", "axolotl", tmp_path / "config.yml", "--out", out, capsys=capsys)
    head, *written = out.read_text(encoding="utf-8").split("# Imported, with")[0].splitlines()
    assert code == 0 and "config.yml" in head and written == recipe.splitlines()
    words = " ".join(" ".join(printed).split())
    assert [line for line in report.splitlines()[:-1] if " ".join(line.split()) not in words] == []
