"""Bad input files: each gives the expected rows and errors."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from strop.data.formats import ConversationReader
from strop.data.reading.sources import read_rows
from strop.data.row_errors import RowError
from strop.data.types import Conversation
from strop.errors import DataError
from tests.fuzz_data import try_file
from tests.support.shared_data import shared

OUTCOMES = [  # file, lines used, (reason, line) of each bad row
    ("good.jsonl", [1, 2], []),
    ("bad_line_2.jsonl", [1, 3], [("broken-json", 2)]),
    ("blank_lines.jsonl", [1, 4], []),
    ("content_list.jsonl", [1, 2], []),
    ("content_null.jsonl", [1], [("no-content", 2)]),
    ("content_number.jsonl", [1], [("not-text", 2)]),
    ("date_like.jsonl", [1, 2], []),
    ("date_like_mixed.jsonl", [1, 2], []),
    ("dup_keys.jsonl", [], [("duplicate-key", 1)]),
    ("extra_fields_msgs.jsonl", [1], []),
    ("json_array_in_jsonl.jsonl", [1, 2], []),
    ("latin1.jsonl", [], [("encoding", 1)]),
    ("lone_surrogate.jsonl", [], [("lone-surrogate", 1)]),
    ("messages_string.jsonl", [1], [("bad-messages", 2)]),
    ("nan_value.jsonl", [], [("not-json-number", 1)]),
    ("nul_byte.jsonl", [1], []),
    ("pretty_json_array.jsonl", [2, 14], []),
    ("trailing_comma.jsonl", [2], [("trailing-comma", 1)]),
    ("utf8_bom.jsonl", [1, 2], []),
]
REFUSALS = [
    ("empty_file.jsonl", "no rows: it is empty"),
    ("only_newlines.jsonl", "no rows: it is empty"),
    ("missing_key_row2.jsonl", "two formats in one file: messages and text"),
]


def check(path: str, **options: str) -> tuple[list[Conversation], list[RowError]]:
    bad: list[RowError] = []
    return list(ConversationReader(read_rows(path, errors=bad, **options), errors=bad)), bad


@pytest.mark.parametrize(("name", "used", "errors"), OUTCOMES)
def test_bad_file_gives_the_expected_rows_and_errors(name: str, used: list[int], errors: list[tuple[str, int]]) -> None:
    read, bad = check(shared(f"bad/{name}"))
    assert [conversation.line for conversation in read] == used
    assert [(fault.code, fault.where.line) for fault in bad] == errors
    assert all(fault.where.file.endswith(name) for fault in bad)


@pytest.mark.parametrize(("name", "what"), REFUSALS)
def test_a_bad_file_is_refused(name: str, what: str) -> None:
    with pytest.raises(DataError) as caught:
        check(shared(f"bad/{name}"))
    assert what in caught.value.what
    assert all(place.file.endswith(name) for place in caught.value.where)


def test_every_shared_bad_file_is_covered() -> None:
    names = {path.name for path in Path(shared("bad")).iterdir()}
    assert names == {name for name, *_ in OUTCOMES} | {name for name, _ in REFUSALS}


def test_values_are_unchanged() -> None:
    assert [conversation.text for conversation in check(shared("bad/date_like.jsonl"))[0]] == [
        "2020-01-01",
        "2020-01-02",
    ]
    assert check(shared("bad/nul_byte.jsonl"))[0][0].text == "a\0b"
    assert check(shared("bad/utf8_bom.jsonl"))[0][0].messages == check(shared("bad/good.jsonl"))[0][0].messages
    assert check(shared("bad/content_list.jsonl"))[0][1].messages[0].content == "a"
    assert check(shared("bad/extra_fields_msgs.jsonl"))[0][0].messages[0].name == "bob"
    assert check(shared("bad/latin1.jsonl"), encoding="latin-1")[0][0].messages[0].content == "café"


def test_mixed_file_reports_a_line_of_each_format() -> None:
    with pytest.raises(DataError) as caught:
        check(shared("bad/missing_key_row2.jsonl"))
    assert [(place.line, place.what) for place in caught.value.where] == [
        (1, "a row of format messages"),
        (2, "a row of format text"),
    ]


def test_random_and_mutated_files_give_rows_errors_or_a_data_error(tmp_path: Path) -> None:
    chance = random.Random(0)
    outcomes = [try_file(chance, tmp_path) for _ in range(400)]
    assert outcomes.count("refused") > 30  # both results occur
    assert sum(outcome == "read" for outcome in outcomes) > 30


def test_a_row_of_12_megabytes_is_read(tmp_path: Path) -> None:
    text = "x" * 12_000_000
    for name, content in (("d.jsonl", json.dumps({"text": text})), ("d.csv", f"text\n{text}"), ("d.txt", text)):
        (tmp_path / name).write_text(content)
        assert check(str(tmp_path / name))[0][0].text == text


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    texts = [os.urandom(500).hex() for _ in range(8000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    contents = {".jsonl": lines, ".jsonl.gz": gzip.compress(lines, 1), ".jsonl.zst": zstandard.compress(lines)}
    contents |= {".csv": "\n".join(["text", *texts]).encode(), ".txt": "\n\n".join(texts).encode()}
    for suffix, content in contents.items():
        (tmp_path / f"d{suffix}").write_bytes(content)
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet", row_group_size=500)
    for suffix in (*contents, ".parquet"):
        tracemalloc.start()
        assert sum(1 for _ in read_rows(str(tmp_path / f"d{suffix}"), errors=[])) == 8000
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 2_000_000, suffix  # the files have 8 MB
