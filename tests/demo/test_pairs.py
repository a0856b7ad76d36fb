"""The demo's preference pairs: kinds of mistakes, the seed, and their use as training rows."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest

from strop.config.schema import DataSection
from strop.data.prepare import prepare
from strop.demo import data_files
from strop.demo.pairs import KINDS, PROSE, make_pairs, write_pairs
from tests.support.families import tokenizer


def rows() -> list[dict[str, object]]:
    return [json.loads(line) for line in data_files()[0].read_text(encoding="utf-8").splitlines()]


def test_rejected_answers_have_one_mistake_of_their_kind() -> None:
    pairs = make_pairs(rows())
    counts = Counter(pair["kind"] for pair in pairs)
    assert set(counts) == set(KINDS) and min(counts.values()) > len(pairs) / 10
    for pair in pairs:
        right, text = json.loads(pair["chosen"][0]["content"]), pair["rejected"][0]["content"]
        if pair["kind"] == "prose":
            assert pair["chosen"][0]["content"] in text and text in {
                p.format(json.dumps(right, ensure_ascii=False)) for p in PROSE
            }
            continue
        wrong = json.loads(text)
        differs = {name for name in right.keys() | wrong.keys() if right.get(name) != wrong.get(name)}
        assert len(differs) == 1
        (name,) = differs
        assert {"wrong slot": name in right and name in wrong and name != "intent", "missing slot": name not in wrong,
                "extra slot": name not in right, "wrong intent": name == "intent"}[pair["kind"]]  # fmt: skip


def test_pairs_depend_on_the_seed() -> None:
    assert make_pairs(rows(), 3) == make_pairs(rows(), 3) != make_pairs(rows(), 4)


def test_pairs_are_valid_training_rows(tmp_path: Path) -> None:
    write_pairs(tmp_path / "train.jsonl", tmp_path / "held.jsonl")
    section = DataSection(train=str(tmp_path / "train.jsonl"), eval=str(tmp_path / "held.jsonl"))
    prepared = prepare(section, tokenizer("chatml"), data_kind="pairs")
    assert prepared.report.rows["used"] == 693 and len(prepared.train_items or ()) == 693
    assert prepared.eval_items is not None and len(prepared.eval_items) == 176
    assert prepared.report.answers["length_accuracy"] < 0.75


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("names", [["mine.jsonl", "held.jsonl"], ["held.jsonl", "mine.jsonl"], ["one.jsonl"], []])
def test_existing_files_are_not_overwritten(names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["pairs", *names])
    with pytest.raises(SystemExit, match="two new files"):
        runpy.run_module("strop.demo.pairs", run_name="__main__")
    assert Path("mine.jsonl").read_text(encoding="utf-8") == "mine" and not Path("held.jsonl").exists()
