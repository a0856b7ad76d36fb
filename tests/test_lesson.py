"""The blocks of the lesson and of the tutorial run in order, on a tiny model instead of the demo model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.pages import Block, blocks, commands
from tests.support.runs import run

PAGE = ROOT / "docs" / "lesson.md"
BLOCKS = blocks(PAGE)
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a folder for all blocks as the current folder, with small files under the demo's names."""
    folder = tmp_path_factory.mktemp("lesson")
    for name, number in (("small.jsonl", 12), ("small-held.jsonl", 4)):
        messages = [
            {"prompt": f"count to {n}", "completion": json.dumps({"intent": "count", "to": n})} for n in range(number)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in messages), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("strop.demo.data_files", lambda: (folder / "small.jsonl", folder / "small-held.jsonl"))
        yield folder


def run_block(block: Block, model: Path, names: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    text = re.sub(r'(?<=--model )demo\b|(?<=modules )demo\b|"demo"', lambda m: repr(str(model)), block.text)
    if block.language == "python":
        exec(compile(text, str(block), "exec"), names)
        return
    for words in commands(text):
        code, _, output = run(*words[1:], capsys=capsys)
        assert code == 0, f"{block}: {output}"


def test_the_lesson_runs_from_top_to_bottom(
    workplace: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, object] = {}
    ran = [block for block in BLOCKS if "run" in block.marks]
    for block in ran:
        run_block(block, tiny_folder, names, capsys)
    assert len(ran) > 15 and {"runs", "merged", "mixed", "script"} <= {path.name for path in workplace.iterdir()}


def test_the_tutorial_runs_from_top_to_bottom(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(ROOT / "docs" / "tutorial.md"):
        if "run" in block.marks:
            run_block(block, tiny_folder, names, capsys)
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 60 and (tmp_path / "expenses-model" / "README.md").is_file()


def test_the_page_of_python_runs_from_top_to_bottom(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    ran = [block for block in blocks(ROOT / "docs" / "python.md") if "run" in block.marks]
    for block in ran:
        run_block(block, tiny_folder, names, capsys)
    out = capsys.readouterr().out
    assert len(ran) == 9 and "missing.jsonl" in out and "8 of 8" in out and "adapter on its base" in out
    assert (tmp_path / "sums.gguf").is_file() and isinstance(names["history"], list) and len(names["history"]) == 2


def test_the_first_run_on_pairs_of_the_page_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = blocks(ROOT / "docs" / "preferences.md")
    rows = next(block.text for block in page if block.language == "jsonl")
    for name in ("pairs.jsonl", "held_out_pairs.jsonl"):
        (tmp_path / name).write_text(rows, encoding="utf-8")
    (ran,) = [block for block in page if "run" in block.marks]
    run_block(ran, tiny_folder, {}, capsys)
    assert "preference" in json.loads((tmp_path / "runs" / "pairs" / "report.json").read_text())["evaluation"]["metric"]


def test_the_table_of_methods_is_that_of_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of the lesson's machine; others need some MiB more or less."""
    monkeypatch.setattr("strop.machine.probe._cpu", lambda: ("a Xeon", {"avx512f", "avx512_bf16", "amx_bf16"}))
    code, out, err = run("plan", "--compare", "--memory", "8GB", capsys=capsys)
    printed = re.sub(r"[ │┃]+", " ", out + err)
    shown = next(block for block in BLOCKS if "QLoRA (nf4)" in block.text).text.strip().splitlines()
    lines = [re.sub(r" +", " ", line) for line in shown]
    assert code == 0 and len(lines) == 5 and all(line in printed for line in lines), printed


def test_every_section_has_all_parts() -> None:
    sections = re.split(r"^## ", TEXT, flags=re.M)[1:]
    assert [int(section.partition(".")[0]) for section in sections] == list(range(1, 16))
    for section in sections:
        for part in ("**The usual snippet**", "*Exercise.*", "<summary>Solution</summary>"):
            assert part in section, section[:40]
