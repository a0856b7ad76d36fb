"""Texts that match: the columns that are read, what is refused and by which line, and their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import strop
from strop.config.schema import DataSection
from strop.data.check import write_cleaned_copy
from strop.data.prepare import Prepared, prepare
from strop.data.store import Triplets
from strop.errors import DataError
from tests.support.families import tokenizer
from tests.support.texts import write


def read(path: Path, rows: list[dict[str, Any]], **options: Any) -> Prepared:
    data = DataSection(train=str(write(path / "rows.jsonl", rows)), **options)
    embed = {"train.objective": "embed"}
    return prepare(data, tokenizer("chatml"), strict=False, data_kind="triplets", cache=path / "cache", options=embed)


def texts(prepared: Prepared) -> list[tuple[str | None, ...]]:
    return [(row.text, *row.passages) for row in prepared.train_conversations]


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=False)]


GOOD = [{"anchor": "hello there", "positive": "hi"}, {"anchor": "the weather", "positive": "in Paris", "negative": "a"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"anchor": "a", "positive": "b"}, [("a", "b")]),
        ({"query": "a", "pos": ["b", "c"], "neg": ["d", "e"]}, [("a", "b", "d", "e"), ("a", "c", "d", "e")]),
        ({"query": "a", "pos": '["b", "c"]', "neg": ""}, [("a", "b"), ("a", "c")]),
        ({"question": "a", "answer": "b"}, [("a", "b")]),
        ({"query": "a", "document": "b", "hard_negatives": ["c"]}, [("a", "b", "c")]),
        ({"sentence1": "a", "sentence2": "b", "score": 1.0}, [("a", "b")]),
        ({"anchor": "a", "positive": "b", "negative_1": "c", "negative_12": "d"}, [("a", "b", "c", "d")]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, [("a", "b", "c")]),
        ({"prompt": turns("a"), "chosen": turns("a", "b")[1:], "rejected": turns("a", "c")[1:]}, [("a", "b", "c")]),
        ({"chosen": turns("a", "b"), "rejected": turns("a", "c")}, [("a", "b", "c")]),
        ({"prompt": "a", "completion": "b"}, [("a", "b")]),
        ({"prompt": turns("a"), "completion": turns("a", "b")[1:]}, [("a", "b")]),
        ({"query": "a", "response": "b", "rejected_response": ["c"]}, [("a", "b", "c")]),
    ],
)
def test_columns_of_other_tools_and_preferences_are_read(
    row: dict[str, Any], expected: list[tuple[str, ...]], tmp_path: Path
) -> None:
    prepared = read(tmp_path, [row])
    assert texts(prepared) == expected, prepared.report.dropped
    columns = " ".join(prepared.report.warnings)
    assert "not read" not in columns or "score" in row


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"anchor": "x"}, "missing-column", "needs one of anchor, query"),
        ({"anchor": "x", "positive": None}, "no-content", "positive is null"),
        ({"anchor": " ", "positive": "y"}, "empty-text", "anchor is empty"),
        ({"anchor": "x", "positive": ""}, "empty-text", "positive is empty"),
        ({"query": "x", "pos": []}, "no-positive", "pos is an empty list"),
        ({"query": "x", "pos": ["y", " "]}, "empty-text", "pos[1] is empty"),
        ({"query": "x", "pos": ["y"], "neg": ["z", 3]}, "not-text", "neg[1] is a number"),
        ({"anchor": "x", "positive": {"text": "y"}}, "not-text", "positive is an object"),
        ({"anchor": "x", "positive": "x"}, "same-texts", "anchor and positive are the same text"),
        ({"anchor": "x", "positive": "y", "negative": "x"}, "same-texts", "anchor and a negative"),
        ({"anchor": "x", "positive": "y", "negative": ["z", "y"]}, "same-texts", "both a positive and a negative"),
        ({"sentence1": "x", "sentence2": "y", "label": 0}, "no-positive", "leave out rows whose label is not 1"),
        ({"anchor": "the weather", "positive": "a"}, "contradiction", "contradicts"),
        ({"chosen": "x", "rejected": "y"}, "no-prompt", "no prompt"),
        ({"chosen": turns("x", "y") * 2, "rejected": turns("x", "z")}, "bad-messages", "give texts instead"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_line(
    row: dict[str, Any], reason: str, message: str, tmp_path: Path
) -> None:
    prepared = read(tmp_path, [*GOOD, row])
    [dropped] = prepared.report.dropped
    assert (dropped["line"], dropped["reason"]) == (3, reason) and message in dropped["what"]
    assert prepared.refusal is not None and "1 of 3 training rows cannot be used" in str(prepared.refusal)
    assert "--objective embed --fix" in prepared.refusal.fix or reason == "missing-column"
    kept = read(tmp_path, [*GOOD, row], bad_rows="drop")
    assert kept.refusal is None and len(kept.train_items or ()) == 2
    out = tmp_path / "clean.jsonl"
    changes = write_cleaned_copy(DataSection(train=str(tmp_path / "rows.jsonl")), tokenizer("chatml"), out, "triplets")
    assert [change.line for change in changes if change.change.startswith("dropped")] == [3]
    clean = [json.loads(line) for line in out.read_text().splitlines()]
    assert clean[0] == {**GOOD[0], "negatives": []} and clean[1]["negatives"] == ["a"]
    assert texts(read(tmp_path, clean)) == texts(kept)


def test_tables_are_read(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text('query,pos,neg\na,b,\nc,"[""d"", ""e""]",f\n')
    prepared = prepare(DataSection(train=str(table)), tokenizer("chatml"), data_kind="triplets")
    assert texts(prepared) == [("a", "b"), ("c", "d", "f"), ("c", "e", "f")]


def test_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    words = tokenizer("llama3")  # which writes bos before a text
    file = write(tmp_path / "rows.jsonl", [*GOOD, {"anchor": "a <|eot_id|> b", "positive": " c "}])
    prepared = prepare(DataSection(train=str(file)), words, data_kind="triplets")
    expected = ["hello there", "hi", "the weather", "in Paris", "a", "a <|eot_id|> b", " c "]
    assert [example.ids.tolist() for example in prepared.train] == [words(text)["input_ids"] for text in expected]
    assert all(np.flatnonzero(example.weights).tolist() == [len(example) - 1] for example in prepared.train)
    items = prepared.train_items
    assert isinstance(items, Triplets) and [len(item.examples) for item in items] == [2, 3, 2] and items.negatives == 1
    assert prepared.report.answers == {"triplets": 3, "negatives": 1}
    assert any("encoded as control tokens" in warning for warning in prepared.report.warnings)


def test_rows_of_an_anchor_are_held_out_together_and_known_texts_are_reported(tmp_path: Path) -> None:
    rows = [{"query": f"q{n % 20}", "pos": [f"p{n}", f"r{n % 7}"]} for n in range(60)]
    prepared = read(tmp_path, rows, eval="30%")
    assert prepared.eval_conversations is not None
    training, held_out = (
        {row.text for row in part} for part in (prepared.train_conversations, prepared.eval_conversations)
    )
    assert held_out and not training & held_out
    assert any(
        "7 of " in text and "evaluation texts are also training texts" in text for text in prepared.report.warnings
    )


def test_an_anchor_of_training_rows_is_a_known_text(tmp_path: Path) -> None:
    swapped = [{"anchor": f"answer {n}", "positive": f"question {n}"} for n in range(4)]
    held_out = write(tmp_path / "held_out.jsonl", swapped)
    rows = [{"anchor": f"question {n}", "positive": f"answer {n}"} for n in range(4)]
    prepared = read(tmp_path, rows, eval=str(held_out))
    assert "8 of 8 evaluation texts are also training texts" in prepared.report.warnings


def test_long_texts_keep_their_end(tmp_path: Path) -> None:
    words, text = tokenizer("llama3"), "hello " * 40 + "the weather in Paris"
    file = write(tmp_path / "rows.jsonl", [GOOD[0], {"anchor": "short", "positive": text}])
    section = DataSection(train=str(file), max_length=12, overlong="truncate-start")
    anchor, positive = prepare(section, words, data_kind="triplets").train[2:]
    whole = words(text)["input_ids"]
    assert anchor.ids.tolist() == words("short")["input_ids"]
    assert positive.ids.tolist() == [whole[0], *whole[-11:]] and positive.weights.tolist() == [0.0] * 11 + [1.0]
    with pytest.raises(DataError, match=r"longer than data\.max_length"):
        prepare(section.model_copy(update={"overlong": "refuse"}), words, data_kind="triplets")


def test_other_objectives_name_what_to_use(tmp_path: Path, tiny_folder: Path) -> None:
    file = write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(DataError, match="no format has the columns") as caught:
        strop.check(model=str(tiny_folder), data=str(file))
    assert 'objective="embed"' in caught.value.fix
    other = write(tmp_path / "other.jsonl", [{"text": "x", "label": "y"}])
    with pytest.raises(DataError, match="1 of 1 training rows cannot be used"):
        prepare(DataSection(train=str(other)), tokenizer("chatml"), data_kind="triplets")
