"""Reading files as rows: values, line numbers, errors, weights and file types."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import pickle
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from strop.config.names import DATA_SUFFIXES, is_data_file
from strop.data.reading.files import TYPES
from strop.data.reading.sources import read_rows, resolve
from strop.data.row_errors import RowError
from strop.data.types import Row
from strop.errors import DataError

ODD = [
    {"text": text} for text in ("007", "NA", "2024-01-31", "null", "", " x ", "1e5", "日本", "a\0b", "l\nm", "\u2028")
]
SETTINGS = settings(max_examples=60)


def read(spec: str | list[str] | Path, **options: Any) -> tuple[list[Row], list[RowError]]:
    bad: list[RowError] = []
    return list(read_rows(spec if isinstance(spec, list) else str(spec), errors=bad, **options)), bad


def values(spec: str | list[str] | Path, **options: Any) -> list[dict[str, Any]]:
    rows, bad = read(spec, **options)
    assert bad == []
    return [row.value for row in rows]


def faults(path: Path, **options: Any) -> list[tuple[str, int | None]]:
    return [(fault.code, fault.where.line) for fault in read(path, **options)[1]]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(spec: str | list[str] | Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(spec, **options)
    return "\n".join(caught.value.lines())


def as_bytes(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind in (".csv", ".tsv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, ["text"], delimiter="," if kind == ".csv" else "\t", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()
    if kind == ".parquet":
        sink = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if kind == ".json":
        return json.dumps(rows).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# --- values and lines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_strings_stay_strings_in_every_file_type(tmp_path: Path, suffix: str) -> None:
    rows = (
        ODD
        if suffix not in (".csv", ".tsv") or sys.version_info >= (3, 11)
        else [r for r in ODD if "\0" not in r["text"]]
    )
    assert values(write(tmp_path / f"d{suffix}", as_bytes(suffix, rows))) == rows


def test_null_members_of_parquet_objects_are_left_out(tmp_path: Path) -> None:
    calls = [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "time", "arguments": {"zone": "CET"}}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    rows.append({"messages": [{"role": "user", "content": "hi"}]})
    assert (
        values(write(tmp_path / "d.parquet", as_bytes(".parquet", rows))) == rows
    )  # Parquet stores every name in each
    empty = as_bytes(".parquet", [{"prompt": "a", "completion": None}, {"prompt": "b", "completion": "c"}])
    assert values(write(tmp_path / "e.parquet", empty))[0] == {"prompt": "a", "completion": None}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_gzip_and_zstandard_read_like_the_plain_file(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"row {n}"} for n in range(3000)]
    plain = as_bytes(suffix, rows)
    half = len(plain) // 2
    frames = zstandard.compress(plain[:half]) + zstandard.compress(plain[half:])
    assert values(write(tmp_path / f"a{suffix}.gz", gzip.compress(plain))) == rows
    assert values(write(tmp_path / f"a{suffix}.zst", frames)) == rows


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_or_invalid_compression_is_refused(tmp_path: Path, suffix: str) -> None:
    plain = "".join(json.dumps({"text": os.urandom(20).hex()}) + "\n" for _ in range(500)).encode()
    packed = gzip.compress(plain) if suffix == ".gz" else zstandard.compress(plain)
    assert "truncated" in refusal(write(tmp_path / f"a.jsonl{suffix}", packed[:-30]))
    assert "cannot be read" in refusal(write(tmp_path / f"b.jsonl{suffix}", b"not compressed at all" * 9))


@SETTINGS
@given(texts=st.lists(st.text(st.characters(exclude_categories=("Cs",))), min_size=1), blank=st.lists(st.booleans()))
def test_rows_keep_their_line_numbers(tmp_path: Path, texts: list[str], blank: list[bool]) -> None:
    lines, expected = [], []
    for place, text in enumerate(texts):
        lines += [""] if place < len(blank) and blank[place] else []
        lines.append(json.dumps({"text": text}, ensure_ascii=place % 2 == 0))
        expected.append((len(lines), {"text": text}))
    rows, bad = read(write(tmp_path / "d.jsonl", "\n".join(lines)))
    assert ([(row.line, row.value) for row in rows], bad) == (expected, [])


@SETTINGS
@given(cells=st.lists(st.tuples(st.text("a,\"\n\r 0;'é"), st.text("b\n")), min_size=1))
def test_csv_records_have_the_line_they_start_on(tmp_path: Path, cells: list[tuple[str, str]]) -> None:
    out, starts = io.StringIO(), []
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(["prompt", "completion"])
    for pair in cells:
        starts.append(out.getvalue().count("\n") + 1)
        writer.writerow(pair)
    rows, bad = read(write(tmp_path / "d.csv", out.getvalue()))
    assert bad == []
    assert [(row.line, *row.value.values()) for row in rows] == [
        (n, *pair) for n, pair in zip(starts, cells, strict=True)
    ]


def test_rows_of_a_json_array_have_the_line_they_start_on(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", '\n[\n {"text": "a"}, {"text": "b"},\n\n {\n "text": "c"\n }\n]\n')
    assert [row.line for row in read(path)[0]] == [3, 3, 5]


@pytest.mark.parametrize("text", ['[{"text": "a"}, 3, {"text": "c"}]\n', '{"data": [{"text": "a"}, 3, {"text": "c"}]}'])
def test_rows_of_a_json_array_on_one_line_are_numbered(tmp_path: Path, text: str) -> None:
    """This is how json.dump writes: with line numbers, all rows would be at line 1."""
    rows, bad = read(write(tmp_path / "d.json", text))
    assert [row.line for row in rows] == [1, 3] and [fault.where.line for fault in bad] == [2]


def test_json_lines_in_a_json_file_and_an_array_in_a_jsonl_file_are_read(tmp_path: Path) -> None:
    assert values(write(tmp_path / "d.json", '{"text": "a"}\n{"text": "b"}\n')) == [{"text": "a"}, {"text": "b"}]
    assert values(write(tmp_path / "d.jsonl", '[{"text": "a"},\n{"text": "b"}]')) == [{"text": "a"}, {"text": "b"}]


def test_object_that_wraps_a_list_of_rows_is_unwrapped(tmp_path: Path) -> None:
    wrapped = '{"version": 1,\n "data": [\n{"text": "a"},\n{"text": "b"}]}'
    for name in ("a.json", "A.JSON"):
        rows, _ = read(write(tmp_path / name, wrapped))
        assert [(row.line, row.value) for row in rows] == [(3, {"text": "a"}), (4, {"text": "b"})]
    assert len(values(write(tmp_path / "b.jsonl", '{"data": [{"text": "a"}, {"text": "b"}]}'))) == 2
    two = write(tmp_path / "c.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}')
    assert "several lists of rows: train, test" in refusal(two)


def test_object_that_is_a_row_is_not_unwrapped(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}]}
    assert values(write(tmp_path / "a.json", json.dumps(row, indent=1))) == [row]
    assert values(write(tmp_path / "b.jsonl", json.dumps(row))) == [row]
    dialog = {"dialog": [{"role": "user", "content": "a"}]}
    assert values(write(tmp_path / "c.jsonl", json.dumps(dialog)), columns={"messages": "dialog"}) == [dialog]


def test_text_rows_are_paragraphs(tmp_path: Path) -> None:
    rows, _ = read(write(tmp_path / "d.txt", "\n a\r\nb\n\n \nc"))
    assert [(row.line, row.value["text"]) for row in rows] == [(2, " a\r\nb"), (6, "c")]


@pytest.mark.parametrize("blank", ["", "\n"])
def test_json_lines_in_a_text_file_are_refused(tmp_path: Path, blank: str) -> None:
    text = f'{blank}{{"prompt": "a", "completion": "b"}}\n{blank}' * 3
    message = refusal(write(tmp_path / "d.txt", text))
    assert "d.txt: JSON Lines in a file for plain text" in message and "rename it to d.jsonl, or give" in message
    assert "rename it to D.jsonl, or" in refusal(write(tmp_path / "D.TXT", text))
    assert "rename it to e.jsonl.gz, or" in refusal(write(tmp_path / "e.txt.gz", gzip.compress(text.encode())))


@pytest.mark.parametrize(
    "text",
    ["{a} b", "{}\n{}", '{"a": 1}\nis an object', '{"a": 1} and more', '{\n "a": 1\n}', "[1]", '{"a": 1,}', "12"],
)
def test_text_that_begins_like_json_is_text(tmp_path: Path, text: str) -> None:
    assert values(write(tmp_path / "d.txt", text)) == [{"text": text}]


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_mark_determines_the_encoding(tmp_path: Path, codec: str) -> None:
    text = '{"text": "é\u2028日"}\n{"text": "b"}\n'
    assert values(write(tmp_path / "d.jsonl", text.encode(codec))) == [{"text": "é\u2028日"}, {"text": "b"}]
    assert values(write(tmp_path / "d.json", f"[{text.splitlines()[-1]}]".encode(codec))) == [{"text": "b"}]


def test_encoding_option_reads_other_encodings(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "é"}\n'.encode("latin-1"))
    assert values(path, encoding="latin-1") == [{"text": "é"}]
    wide = write(tmp_path / "w.jsonl", '{"text": "é"}\n'.encode("utf-16-le"))
    assert "--data.encoding utf-16-le" in refusal(wide)
    assert values(wide, encoding="utf-16-le") == [{"text": "é"}]
    assert "not a text encoding" in refusal(path, encoding="rot13")
    assert "not a text encoding" in refusal(path, encoding="utf-9")
    assert "not valid utf-16" in refusal(write(tmp_path / "o.jsonl", codecs.BOM_UTF16_LE + b'{\0"\0\0\xd8\0'))


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{oops", "broken-json"),
        ('{"text": "a"},', "trailing-comma"),
        ('{"text": "a"} {"text": "b"}', "broken-json"),
        ('{"text": "a", "text": "b"}', "duplicate-key"),
        ('{"a": {"b": 1, "b": 2}}', "duplicate-key"),
        ('{"text": NaN}', "not-json-number"),
        ('{"text": -Infinity}', "not-json-number"),
        ('{"text": 1e999}', "not-json-number"),
        ('{"text": "\\ud800"}', "lone-surrogate"),
        ('{"\\uDC00": 1}', "lone-surrogate"),
        ("[1]", "not-an-object"),
        ("null", "not-an-object"),
        ('{"n": ' + "9" * 5000 + "}", "broken-json"),
        ('{"n": ' + "[" * 200_000, "broken-json"),
        (b'{"text": "\xe9"}', "encoding"),
        (b'{"text": "\xed\xa0\x80"}', "encoding"),
        ('{"text": "a\x01"}', "broken-json"),
    ],
)
def test_invalid_lines_are_reported_and_the_others_read(tmp_path: Path, line: str | bytes, code: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    good = b'{"text": "\\ud83d\\ude00"}\n'
    path = write(tmp_path / "d.jsonl", good + raw + b"\n\n" + good + raw + b"\n" + good)
    if code == "broken-json" and len(raw) > 4000 and sys.version_info < (3, 11) and b"9" in raw:
        pytest.skip("this Python reads numbers of any length")
    rows, bad = read(path)
    assert [(fault.code, fault.where.line) for fault in bad] == [(code, 2), (code, 5)]
    assert [(row.line, row.value["text"]) for row in rows] == [(1, "😀"), (4, "😀"), (6, "😀")]


def test_places_in_a_line_are_counted_from_1(tmp_path: Path) -> None:
    (fault,) = read(write(tmp_path / "d.jsonl", '{"text": "a"}\n  {"text": oops}\n'))[1]
    assert str(fault.where).endswith("d.jsonl:2: column 12: not valid JSON: Expecting value")
    (fault,) = read(write(tmp_path / "d.jsonl", b'{"text": "caf\xe9"}\n'))[1]
    assert "byte 14 of the line (0xe9) is not valid utf-8; set --data.encoding" in fault.where.what


@pytest.mark.parametrize("cut", ['{"text": "a', '{"text": ', '{"text', "{", '{"text": "a"', '{"text": "\\u12'])
def test_truncated_last_line_is_reported_as_truncated(tmp_path: Path, cut: str) -> None:
    (fault,) = read(write(tmp_path / "d.jsonl", '{"text": "a"}\n' + cut))[1]
    assert (fault.code, fault.where.line) == ("truncated", 2)
    assert "truncated" in fault.where.what
    assert faults(write(tmp_path / "d.jsonl", f'{{"text": "a"}}\n{cut}\n{{"text": "a"}}')) == [("broken-json", 2)]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('[{"text": "a"},\n]', 1, "a comma after the last row"),
        ('[{"text": "a"}\n {"text": "b"}]', 2, "a comma is missing"),
        ('[{"text": "a"},\n {"text": "b"', 2, "truncated"),
        ('[{"text": "a"}\n', 2, "truncated"),
        ('[{"text": "a"},\n oops]', 2, "Expecting value"),
        ('[{"text": "a"}]\n{"text": "b"}', 2, "extra text after the array"),
        ('{\n"data": [{"text": "a"}]\n', 3, "truncated"),
        ('[{"n": NaN,\n"a" 1}]', 2, "Expecting ':'"),
        ('{"n": NaN,\n"data": [{"a" 1}]}', 2, "Expecting ':'"),
        ('{\n"text": "a"}\n{\n"text": "b"}', 2, "several JSON values"),
    ],
)
def test_invalid_json_file_is_refused_with_line_and_column(tmp_path: Path, text: str, line: int, what: str) -> None:
    message = refusal(write(tmp_path / "d.json", text))
    assert f"d.json:{line}: column" in message
    assert what in message


def test_json_array_continues_after_an_invalid_row(tmp_path: Path) -> None:
    rows = '{"text": "a"},\n{"n": NaN},\n{"a": 1, "a": 2},\n"x",\n{"text": "b"}'
    expected = [("not-json-number", 2), ("duplicate-key", 3), ("not-an-object", 4)]
    assert faults(write(tmp_path / "d.json", f"[{rows}]")) == expected
    assert faults(write(tmp_path / "w.json", f'{{"data": [{rows}]}}')) == expected


def test_csv_records_of_wrong_length_or_with_stray_quotes_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", 'prompt,completion\na,b\nc\n"d" e,f\ng,h,i\n"j\nk",l\n"m,n\n')
    assert faults(path) == [("cells", 3), ("cells", 4), ("cells", 5), ("cells", 8)]
    assert [row.line for row in read(path)[0]] == [2, 6]
    assert faults(write(tmp_path / "e.csv", b"prompt,completion\na,\xe9\nb,c\n")) == [("encoding", 2)]


def test_unclosed_quote_reports_its_lines_or_refuses_the_file(tmp_path: Path) -> None:
    swallowed = 'prompt,completion\na,b\n"c,d\ne,f\ng,{}\ni,j\n'
    message = refusal(write(tmp_path / "a.csv", swallowed.format("h")))
    assert "a.csv:3: a quote at the start of a cell is not closed before the file ends (lines 3 to 6)" in message
    for end, what in (('"h"', "',' expected after"), ('h"', "1 cell, expected 2")):
        rows, bad = read(write(tmp_path / "b.csv", swallowed.format(end)))
        assert [row.line for row in rows] == [2, 6] and len(bad) == 1
        assert bad[0].where.line == 3 and what in bad[0].where.what and bad[0].where.what.endswith("(lines 3 to 5)")


@pytest.mark.parametrize("content", ["", "\n \n\r\n", "[]", '{"data": []}'])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    assert "no rows: it is empty" in refusal(write(tmp_path / "d.json", content))


def test_file_with_only_a_header_is_refused(tmp_path: Path) -> None:
    assert "or a header" in refusal(write(tmp_path / "d.csv", "prompt,completion\n"))
    assert values(write(tmp_path / "e.csv", "SEP=|\nprompt|completion\na|b\n")) == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("d.jsonl", pickle.dumps({"a": 1}), "pickle"),
        ("d.pkl", b"", "run code"),
        ("d.docx", b"", "unknown file type .docx"),
        ("rows.csv.zip", b"", "a .zip archive is not read"),
        ("rows.tar.gz", b"", "a .tar archive is not read"),
        ("data", b"", "unknown file type (no suffix)"),
        ("d.jsonl", gzip.compress(b"{}", mtime=0), "gzip data without the suffix .gz"),
        ("d.jsonl", zstandard.compress(b"{}"), "zstandard data"),
        ("d.csv", b"PK\x03\x04xx", "zip archive"),
        ("d.json", b"PAR1xx", "Parquet without the suffix"),
        ("d.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n", "git lfs pull"),
        ("d.parquet", b"PAR1 nothing", "Parquet cannot be read"),
        ("d.parquet.gz", b"", "compressed Parquet"),
    ],
)
def test_files_of_another_type_are_refused(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    assert what in refusal(write(tmp_path / name, content))


def test_parquet_values_out_of_range_are_refused(tmp_path: Path) -> None:
    text, number = pyarrow.array(["a"]), pyarrow.array([1])
    for odd in (
        pyarrow.array([2**62], pyarrow.timestamp("us")),
        pyarrow.array([2**30], pyarrow.date32()),
        pyarrow.StructArray.from_arrays([number, number], names=["twice", "twice"]),
    ):
        file = tmp_path / "d.parquet"
        parquet.write_table(pyarrow.table({"text": text, "odd": odd}), file)
        assert "Parquet cannot be read after row 0" in refusal(file)


# --- header or not -----------------------------------------------------------------------------------------------


def test_header_is_decided_by_known_names_or_by_the_option(tmp_path: Path) -> None:
    known = write(tmp_path / "known.tsv", "question\tanswer\n1\t2\n")
    assert values(known) == [{"question": "1", "answer": "2"}]
    own = write(tmp_path / "own.tsv", "frage\tantwort\n1\t2\n")
    assert "prompt=1,completion=2 (no header" in refusal(own)
    assert "or --data.columns prompt=frage,completion=antwort (line 1 is the header)" in refusal(own)
    assert values(own, columns={"prompt": "frage", "completion": "antwort"}) == [{"frage": "1", "antwort": "2"}]
    assert "no column 'frge' (did you mean frage?)" in refusal(own, columns={"prompt": "frge"})


def test_columns_by_number_mean_no_header(tmp_path: Path) -> None:
    by_number = {"prompt": "1", "completion": "2"}
    plain = write(tmp_path / "plain.csv", "a b,007\nc d,NA\n")
    assert values(plain, columns=by_number) == [{"1": "a b", "2": "007"}, {"1": "c d", "2": "NA"}]
    assert "no column 3: there are 2" in refusal(plain, columns={"prompt": "1", "completion": "3"})
    known = write(tmp_path / "known.csv", "question,answer\n1,2\n")
    assert "prompt=question,completion=answer" in refusal(known, columns=by_number)
    assert "names a column twice" in refusal(write(tmp_path / "twice.csv", "text,text\n1,2\n"))


@pytest.mark.parametrize("mark", [";", "\t"])
def test_csv_separator_of_excel_is_detected(tmp_path: Path, mark: str) -> None:
    expected = [{"prompt": "hi, you", "completion": "yo"}]
    for start in ("", f"sep={mark}\r\n"):
        text = f"\ufeff{start}prompt{mark}completion\r\nhi, you{mark}yo\r\n"
        assert values(write(tmp_path / "d.csv", text)) == expected
    own = write(tmp_path / "own.csv", f"frage{mark}antwort\nhi, you{mark}yo\n")
    assert "or --data.columns prompt=frage,completion=antwort (line 1 is the header)" in refusal(own)
    assert values(own, columns={"prompt": "frage", "completion": "antwort"})[0]["antwort"] == "yo"
    plain = write(tmp_path / "one.csv", f"Hello{mark} you\nBye\n")
    assert values(plain, columns={"text": "1"}) == [{"1": f"Hello{mark} you"}, {"1": "Bye"}]
    both = write(tmp_path / "both.csv", f"frage, kurz{mark}antwort\n1{mark}2\n")
    shown = mark.replace("\t", "<tab>")
    assert f"begin the file with the line sep={shown} if that" in refusal(both)


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", "|"), (".tsv", ","), (".tsv", ";"), (".tsv", "|")])
def test_other_separators_are_detected(tmp_path: Path, suffix: str, mark: str) -> None:
    named = write(tmp_path / f"a{suffix}", f'prompt{mark}completion\n"hi{mark} you"{mark}yo\n')
    assert values(named) == [{"prompt": f"hi{mark} you", "completion": "yo"}]
    plain = write(tmp_path / f"b{suffix}", f"Hello{mark} you\nBye\n")
    assert values(plain, columns={"text": "1"}) == [{"1": f"Hello{mark} you"}, {"1": "Bye"}]


def test_fixes_for_one_column_can_be_followed(tmp_path: Path) -> None:
    other = write(tmp_path / "other.csv", "prompt:completion\nhi:yo\n")
    for columns in ({}, {"prompt": "1", "completion": "2"}):
        message = refusal(other, columns=columns)
        assert "begin the file with the line sep=: if that separates the cells" in message
    sep = write(tmp_path / "sep.csv", "sep=:\nprompt:completion\nhi:yo\n")
    assert values(sep) == [{"prompt": "hi", "completion": "yo"}]
    one = write(tmp_path / "one.csv", "saying\nHello you\n")
    message = refusal(one)
    assert "--data.columns text=1 (no header) or --data.columns text=saying (line 1 is the header)" in message
    assert values(one, columns={"text": "saying"}) == [{"saying": "Hello you"}]
    assert len(values(one, columns={"text": "1"})) == 2


def test_cr_line_ends_are_reported(tmp_path: Path) -> None:
    _, bad = read(write(tmp_path / "d.csv", "prompt,completion\rhi,yo\r"))
    assert "CR only" in bad[0].where.what


def test_empty_cells_at_the_end_of_a_header_are_not_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "prompt, completion ,,\nhi,yo,,\na,b,,c\nd,e\n")
    rows, bad = read(path)
    assert [row.value for row in rows] == [{"prompt": "hi", "completion": "yo"}]
    assert [(fault.where.line, fault.where.what) for fault in bad] == [
        (3, "cell 4 has text, but no name in the header"),
        (4, "2 cells, expected 4"),
    ]
    assert "names a column twice: ''" in refusal(write(tmp_path / "e.csv", "prompt,,,completion\n1,,,2\n"))


# --- which files -------------------------------------------------------------------------------------------------


def test_specs_resolve_files_globs_weights_and_parallel_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "odd@2.jsonl", "x@2", "[1].jsonl"):
        write(tmp_path / name, '{"text": "a"}\n')
    write(tmp_path / "l.nl", "eins\nzwei\r\n")
    write(tmp_path / "l.cm", "one\ntwo\n")
    assert [source.path for source in resolve("?.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [(s.path, s.weight) for s in resolve(["b.jsonl@0.5", "odd@2.jsonl", "x@2", "[1].jsonl@3"])] == [
        ("b.jsonl", 0.5),
        ("odd@2.jsonl", 1.0),
        ("x@2", 1.0),
        ("[1].jsonl", 3.0),
    ]
    rows, _ = read("l.nl+l.cm", columns={"prompt": "1", "completion": "2"})
    assert [(r.file, r.line, r.value) for r in rows] == [
        ("l.nl", 1, {"1": "eins", "2": "one"}),
        ("l.nl", 2, {"1": "zwei", "2": "two"}),
    ]


def test_parallel_files_of_unequal_length_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_number = {"prompt": "1", "completion": "2"}
    write(tmp_path / "a", "1\n2\n")
    write(tmp_path / "b", "1\n")
    write(tmp_path / "c.jsonl", "{}\n{}\n")
    assert "--data.columns prompt=1,completion=2" in refusal("a+b")
    assert "b:1: ends after line 1" in refusal("a+b", columns=by_number)
    assert "numbers, not names" in refusal("a+b", columns={"prompt": "3"})
    assert "only plain text" in refusal("a+c.jsonl", columns=by_number)
    assert "bb: no such file (did you mean b?)" in refusal("a+bb", columns=by_number)
    write(tmp_path / "d", b"1\n\xff\n")
    assert read("a+d", columns=by_number)[1][0].where.line == 2


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", '{"text": "a"}\n')
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "x.csv", "")
    assert "did you mean train.jsonl?" in refusal("trian.jsonl")
    assert "no folder nowhere" in refusal("nowhere/train.jsonl")
    assert f"give {os.path.join('folder', 'x.csv')}" in refusal("folder")
    (tmp_path / "hub" / "en").mkdir(parents=True)
    assert "hub: is a folder\nFix: name the files to train on; hub has no file of a known type" in refusal("hub")
    for name in ("train", "test"):
        write(tmp_path / "hub" / "en" / f"{name}.jsonl", "")
    assert f"Fix: give {os.path.join('hub', 'en', 'train.jsonl')}" in refusal("hub")
    write(tmp_path / "hub" / "train.jsonl", "")
    assert "name the files to train on; hub has several data files: en/test.jsonl, " in refusal("hub")
    write(tmp_path / "folder" / "state.json", "{}")
    assert "save_to_disk" in refusal("folder")
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    assert "a link to gone.jsonl, which does not exist" in refusal("link.jsonl")
    assert "no file matches" in refusal("*.tsv")
    assert "named twice" in refusal(["train.jsonl", "*.jsonl"])
    for weight in ("0", "-1", "-.5"):
        assert "weight must be above 0" in refusal(f"train.jsonl@{weight}")
    assert "no data file named" in refusal([])
    assert "NUL" in refusal("a\0b.jsonl")
    if os.path.exists("/dev/null"):
        assert "not a regular file" in refusal("/dev/null")


def test_weights_repeat_rows_and_choose_fractions_by_content(tmp_path: Path) -> None:
    texts = [{"text": f"row {n}"} for n in range(2000)]
    forth = write(tmp_path / "a.jsonl", as_bytes(".jsonl", texts))
    back = write(tmp_path / "b.jsonl", as_bytes(".jsonl", texts[::-1]))
    left_out: Counter[str] = Counter()
    some = values(f"{forth}@0.25", left_out=left_out)
    assert 400 < len(some) < 600
    assert left_out == {str(forth): 2000 - len(some)}
    assert values(f"{back}@0.25") == some[::-1]
    more = Counter(row["text"] for row in values(f"{forth}@2.25"))
    assert set(more.values()) == {2, 3}
    assert [text for text, count in more.items() if count == 3] == [row["text"] for row in some]


def test_recipes_page_and_readers_know_the_same_file_types() -> None:
    assert set(DATA_SUFFIXES) == set(TYPES)
    assert all(is_data_file(f"A{suffix.upper()}.gz") for suffix in TYPES) and not is_data_file("recipe.yaml")
