"""Texts to classify: their labels, what is refused and by which line, and their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import strop
from strop.config.schema import DataSection
from strop.data.accounting import DataReport
from strop.data.check import write_cleaned_copy
from strop.data.prepare import Prepared, prepare
from strop.data.types import Classes, LabelledText
from strop.errors import DataError
from tests.support.families import tokenizer
from tests.support.texts import write


def read(path: Path, rows: list[dict[str, Any]], labels: list[str] | None = None, **options: Any) -> Prepared:
    data = DataSection(train=str(write(path / "rows.jsonl", rows)), **options)
    return prepare(data, tokenizer("chatml"), strict=False, data_kind="classes", labels=labels, cache=path / "cache")


def reasons(report: DataReport) -> list[tuple[int, str]]:
    return [(row["line"], row["reason"]) for row in report.dropped]


GOOD = [{"text": "hello there", "label": "greeting"}, {"text": "the weather in Paris", "label": "weather"}]


def test_labels_become_outputs_in_alphabetical_order_and_numbers_by_value(tmp_path: Path) -> None:
    prepared = read(tmp_path, [{"text": f"row {n}", "label": n} for n in (10, 9, 1, 10)])
    assert prepared.classes == Classes(("1", "9", "10"))
    items = prepared.train_items
    assert items is not None and [item.classes for item in items if isinstance(item, LabelledText)] == [
        (2,), (1,), (0,), (2,)
    ]  # fmt: skip
    assert prepared.report.answers["classes"] == {"1": 1, "9": 1, "10": 2}
    fixed = read(tmp_path, GOOD, labels=["weather", "greeting"])
    assert fixed.classes == Classes(("weather", "greeting"))
    assert [item.classes for item in fixed.train_items or ()] == [(1,), (0,)]  # type: ignore[union-attr]


def test_tokens_are_those_of_the_tokenizer_and_messages_those_of_a_prompt(tmp_path: Path) -> None:
    words = tokenizer("llama3")  # which writes bos before a text
    messages = [{"role": "user", "content": "hello there"}]
    file = write(tmp_path / "rows.jsonl", [*GOOD, {"text": "a <|eot_id|> b", "label": "weather"}])
    prepared = prepare(DataSection(train=str(file)), words, data_kind="classes")
    assert [example.ids.tolist() for example in prepared.train] == [
        words(text)["input_ids"] for text in ("hello there", "the weather in Paris", "a <|eot_id|> b")
    ]
    assert all(np.flatnonzero(example.weights).tolist() == [len(example) - 1] for example in prepared.train)
    assert any("encoded as control tokens" in warning for warning in prepared.report.warnings)
    turns = write(tmp_path / "turns.jsonl", [{"messages": messages, "label": "a"}, {"messages": json.dumps(
        [{"role": "user", "content": "no"}]), "label": "b"}])  # fmt: skip
    [first, _] = prepare(DataSection(train=str(turns)), words, data_kind="classes").train
    assert first.ids.tolist() == words.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "no label here", "label": None}, "no-label"),
        ({"text": "no label here", "label": "  "}, "no-label"),
        ({"text": "no label here"}, "missing-column"),
        ({"text": "a number", "label": 0.5}, "bad-label"),
        ({"text": "a list", "label": ["weather"]}, "bad-label"),
        ({"text": "hello there", "label": "weather"}, "contradiction"),
        ({"text": " ", "label": "weather"}, "empty-text"),
        ({"text": None, "label": "weather"}, "no-content"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_line(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    prepared = read(tmp_path, [*GOOD, row])
    assert reasons(prepared.report) == [(3, reason)]
    assert prepared.refusal is not None and "1 of 3 training rows cannot be used" in str(prepared.refusal)
    dropped = read(tmp_path, [*GOOD, row], bad_rows="drop")
    assert dropped.refusal is None and len(dropped.train) == 2
    out = tmp_path / "clean.jsonl"
    changes = write_cleaned_copy(DataSection(train=str(tmp_path / "rows.jsonl")), tokenizer("chatml"), out, "classes")
    assert [change.line for change in changes if change.change.startswith("dropped")] == [3]
    assert [json.loads(line) for line in out.read_text().splitlines()] == GOOD


def test_unknown_labels_are_refused_in_training_and_evaluation_rows(tmp_path: Path) -> None:
    known = read(tmp_path, GOOD, labels=["greeting", "weathr"])
    assert reasons(known.report) == [(2, "unknown-label")]
    assert "did you mean weathr?" in known.report.dropped[0]["what"]
    held_out = write(tmp_path / "eval.jsonl", [GOOD[0], {"text": "new", "label": "music"}])
    report = read(tmp_path, GOOD, eval=str(held_out)).report
    assert report.eval is not None and reasons(report.eval) == [(2, "unknown-label")]


def test_one_class_is_refused_and_rare_classes_are_reported(tmp_path: Path) -> None:
    assert "the training rows have one label, 'greeting'" in str(read(tmp_path, GOOD[:1]).refusal)
    rows = [{"text": f"row {n}", "label": "many"} for n in range(90)] + [
        {"text": f"x {n}", "label": "few"} for n in range(4)
    ]
    warnings = " ".join(read(tmp_path, rows).report.warnings)
    assert "1 classes have fewer than 5 training rows: few (4)" in warnings and "class_weights balanced" in warnings


def test_several_labels_and_none(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "one", "label": ["b", "a"]}, {"text": "two", "label": []}, {"text": "three", "label": ["c"]},
        {"text": "four", "label": ["a", "a"]}, {"text": "five", "label": "a"},
    ]  # fmt: skip
    prepared = read(tmp_path, rows, bad_rows="drop")
    assert prepared.classes == Classes(("a", "b", "c"), several=True)
    assert [item.classes for item in prepared.train_items or ()] == [(0, 1), (), (2,)]  # type: ignore[union-attr]
    assert sorted(reasons(prepared.report)) == [(4, "bad-label"), (5, "bad-label")]
    assert prepared.report.answers == {"classes": {"a": 1, "b": 1, "c": 1}, "several": True, "without_label": 1}


def test_other_columns_tables_and_usual_names_are_read(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text('sentence,intent\nhello there,greeting\nthe weather,"[""a"", ""b""]"\n')
    section = DataSection(train=str(table), bad_rows="drop")
    assert prepare(section, tokenizer("chatml"), strict=False, data_kind="classes").report.by_reason == {"bad-label": 1}
    prepared = read(
        tmp_path, [{"q": "hello", "team": "x"}, {"q": "there", "team": "y"}], columns={"text": "q", "label": "team"}
    )
    assert prepared.classes == Classes(("x", "y"))


def test_columns_that_are_missing_or_not_read_are_named(tmp_path: Path) -> None:
    rows = [
        {"text": "one", "label": "a", "system": "be brief", "split": "x"},
        {"text": "two", "label": "b"},
        {"words": "x"},
    ]
    report = read(tmp_path, rows).report
    assert "needs one of text, sentence, content, query, utterance, messages" in report.dropped[0]["what"]
    assert "columns not read: split (1 rows), system (1 rows)" in report.warnings


def test_rows_of_another_objective_name_it(tmp_path: Path) -> None:
    pair = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    path = write(tmp_path / "rows.jsonl", [pair, pair | {"prompt": "you"}])
    with pytest.raises(DataError, match="preference pairs; this objective learns from texts") as error:
        prepare(DataSection(train=str(path)), tokenizer("chatml"), data_kind="classes", cache=tmp_path / "cache")
    assert "--train.objective dpo" in str(error.value.fix)
    write(path, [pair, *GOOD])
    with pytest.raises(DataError, match="1 of 3 training rows cannot be used"):
        prepare(DataSection(train=str(path)), tokenizer("chatml"), data_kind="classes", cache=tmp_path / "cache")


def test_long_texts_keep_their_end_and_split_is_refused(tmp_path: Path) -> None:
    words, text = tokenizer("llama3"), "hello " * 40 + "the weather in Paris"
    file = write(tmp_path / "rows.jsonl", [GOOD[0], {"text": text, "label": "weather"}])
    section = DataSection(train=str(file), max_length=12, overlong="truncate-start")
    example = prepare(section, words, data_kind="classes").train[1]
    whole = words(text)["input_ids"]
    assert example.ids.tolist() == [whole[0], *whole[-11:]] and example.weights.tolist() == [0.0] * 11 + [1.0]
    with pytest.raises(DataError, match=r"longer than data\.max_length"):
        prepare(section.model_copy(update={"overlong": "refuse"}), words, data_kind="classes")
    with pytest.raises(strop.StropError, match=r"data\.overlong split"):
        strop.check(data=str(file), **{"train.objective": "classify", "data.overlong": "split"})


def test_texts_with_labels_name_the_objective(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(DataError) as error:
        prepare(DataSection(train=str(file)), tokenizer("chatml"))
    assert "--train.objective classify" in error.value.fix
    with pytest.raises(DataError) as error:
        prepare(DataSection(train=str(file), format="classification"), tokenizer("chatml"))
    assert error.value.fix == "--train.objective classify"
    turns = write(tmp_path / "turns.jsonl", [{"prompt": "hi", "completion": "yo"}])
    report = prepare(DataSection(train=str(turns), format="prompt-completion"), tokenizer("chatml"), strict=False,
                     data_kind="classes").report  # fmt: skip
    assert "texts with a label" in str(report.refusal)
