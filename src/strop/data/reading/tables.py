"""Read CSV, TSV, plain text, parallel files, Parquet and Arrow as rows. Cells of CSV and TSV files stay strings."""

from __future__ import annotations

import csv
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, zip_longest
from typing import Any

from strop.data.reading.files import COLUMN_NAMES, TYPES, encoding_error, read_lines
from strop.data.row_errors import RowError, file_error
from strop.data.types import Row
from strop.errors import Location, suggest

# Column names, in lower case, whose meaning is clear enough to suggest them.
_PROMPT_NAMES = ("instruction", "prompt", "question", "query", "problem", "user", "human")
_CONTEXT_NAMES = ("context", "input", "passage", "document", "article", "text")
_ANSWER_NAMES = (
    ("completion", "response", "answer", "output", "reply", "assistant", "target"),
    ("label", "category", "intent", "summary", "solution", "translation"),  # only without one of the names above
)


class _LineCounter:
    """Feed lines to csv.reader and remember the first and last line number of the current record."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self.first: int | None = None
        self.last = 0

    def __iter__(self) -> Iterator[str]:
        for number, text in self._lines:
            self.first, self.last = self.first or number, number
            yield text

    @property
    def span(self) -> str:
        return f" (lines {self.first} to {self.last})" if self.last != self.first else ""


_UNCLOSED_QUOTE = "unexpected end of data"  # message of csv.Error


def _read_records(
    name: str, lines: Iterator[tuple[int, str]], separator: str, errors: list[RowError]
) -> Iterator[tuple[int, list[str], str]]:
    """Yield the first line number of each record, its cells, and, if it has several lines, ` (lines N to M)`."""
    csv.field_size_limit(2**31 - 1)  # the default limit of 128 KiB a cell rejects long texts
    counter = _LineCounter(lines)
    reader = csv.reader(counter, delimiter=separator, strict=True)
    while True:
        counter.first = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = _explain_csv_error(str(error)) + counter.span
            if counter.span and str(error) == _UNCLOSED_QUOTE:  # the record extends to the end of the file
                fix = "close the quote, or double it if it is part of the text"
                raise file_error(name, what, fix, counter.first) from error
            errors.append(RowError("cells", Location(name, counter.first, what)))
            continue
        if cells:
            assert counter.first is not None
            yield counter.first, cells, counter.span


def _explain_csv_error(message: str) -> str:
    if message == _UNCLOSED_QUOTE:
        return "a quote at the start of a cell is not closed before the file ends"
    if message.startswith("new-line character"):
        return "a line ends with CR only, outside quotes: save the file with line ends LF or CRLF"
    hint = "; a quote at the start of a cell needs one at its end, and quotes inside are doubled"
    return message + hint * ('"' in message)


def _detect_separator(
    lines: Iterator[tuple[int, str]], separator: str, columns: Mapping[str, str]
) -> tuple[Iterator[tuple[int, str]], str]:
    """Return the lines of a table and its separator.

    Excel separates the cells of a .csv file with semicolons or tabs in some languages, and may write `sep=;` as the
    first line. The given separator is kept if it is in the first line, or if that line is a name in `columns`.
    """
    first = next(lines, None)
    if first is None:
        return lines, separator
    if declared := re.fullmatch(r'sep=([^\w"\r\n])\r?\n?', first[1], re.IGNORECASE):
        return lines, declared[1]
    names, cells = set(columns.values()), _split_cells(first[1], separator)
    if len(cells) == 1 and not (names and names <= {cells[0].strip(), "1"}):
        marks = [mark for mark in ";\t,|" if len(_split_cells(first[1], mark)) > 1]
        candidates = [mark for mark in marks if mark != "|"] or marks
        separator = candidates[0] if len(candidates) == 1 else separator
    return chain([first], lines), separator


def _split_cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:  # reported when the record is read
        return []


def is_row_number(column: str, value: Any) -> bool:
    """Return whether a cell is in an unnamed column with row numbers, which pandas writes."""
    return re.fullmatch(r"|Unnamed: \d+|__index_level_\d+__", column) is not None and str(value).isdecimal()


def suggest_mapping(columns: Sequence[str]) -> str | None:
    """Return the value of --data.columns for columns whose names show a prompt and an answer, else None."""
    plain = {column.strip().lower(): column for column in columns if not set(column) & set(",=")}
    prompts, contexts = ([plain[name] for name in names if name in plain] for names in (_PROMPT_NAMES, _CONTEXT_NAMES))
    answers = next(filter(None, ([plain[name] for name in names if name in plain] for names in _ANSWER_NAMES)), [])
    if (
        len(answers) != 1
        or not 1 <= len(prompts + contexts) <= 2
        or (prompts[1:] and prompts[0] != plain.get("instruction"))
    ):
        return None
    prompt, *context = prompts + contexts
    if context:
        return shlex.quote(f"instruction={prompt},input={context[0]},output={answers[0]}")
    return shlex.quote(f"prompt={prompt},completion={answers[0]}")


def describe_mapping(columns: Sequence[str]) -> str:
    """Return a fix for columns whose names do not show which of them is the answer."""
    is_prompt = [column.lower() in (*_PROMPT_NAMES, *_CONTEXT_NAMES) for column in columns]
    if len(columns) == 2 and not all(is_prompt) and not any(set(column) & set(",=") for column in columns):
        is_swapped = is_prompt[1] or (columns[0].lower() in sum(_ANSWER_NAMES, ()) and not is_prompt[0])
        prompt, answer = reversed(columns) if is_swapped else columns
        mapping = shlex.quote(f"prompt={prompt},completion={answer}")
        return f"--data.columns {mapping} (if {answer} is the answer to {prompt})"
    return (
        f"--data.columns prompt=A,completion=B with the names of your columns ({', '.join(filter(None, columns[:12]))})"
    )


def read_table(
    name: str, lines: Iterator[tuple[int, str]], separator: str, columns: Mapping[str, str], errors: list[RowError]
) -> Iterator[Row]:
    """Yield the records of a CSV or TSV file. Without a header, the columns are named "1", "2", ..."""
    header, width = list[str](), 0
    for number, cells, span in _read_records(name, *_detect_separator(lines, separator, columns), errors):
        if not header:
            names, width = _parse_header(name, number, cells, columns), len(cells)
            header = names or [str(i) for i in range(1, width + 1)]
            if names:
                continue
        unnamed = [i for i, cell in enumerate(cells, 1) if i > len(header) and cell.strip()]
        if len(cells) != width:
            errors.append(
                RowError(
                    "cells",
                    Location(name, number, f"{len(cells)} cell{'s' * (len(cells) != 1)}, expected {width}{span}"),
                )
            )
        elif unnamed:
            what = f"cell {unnamed[0]} has text, but no name in the header"
            errors.append(RowError("cells", Location(name, number, what)))
        else:
            yield Row(name, number, dict(zip(header, cells, strict=False)))


def _parse_header(name: str, line: int, cells: list[str], columns: Mapping[str, str]) -> list[str] | None:
    """Return the column names of the first record, without empty ones at the end; None if it is a row, not a header.

    `columns` or known column names decide this. Raises DataError if it is unclear.
    """
    header = [cell.strip() for cell in cells]
    while header and not header[-1]:
        header.pop()
    names = set(header)
    if header and len(names) == len(header) and names <= COLUMN_NAMES and not names & set(columns.values()) and columns:
        cells_by_number = {str(i): cell for i, cell in enumerate(header, 1)}
        by_name = ",".join(f"{key}={cells_by_number.get(value, value)}" for key, value in columns.items())
        option = by_name if cells_by_number.keys() >= set(columns.values()) else suggest_mapping(header)
        what = f"the first record looks like a header ({', '.join(header)})"
        fix = f"--data.columns {option}" if option else describe_mapping(header)
        raise file_error(name, what, fix, line)
    if columns and all(value.isdecimal() for value in columns.values()):
        if missing := [value for value in columns.values() if not 0 < int(value) <= len(cells)]:
            what = f"no column {missing[0]}: there are {len(cells)}, counted from 1"
            raise file_error(name, what, _separator_fix(cells).rstrip(",") or "use a number up to that", line)
        return None
    for value in columns.values():
        if value not in names:
            known = ", ".join(cell[:40] or "(unnamed)" for cell in header[:10])
            raise file_error(name, f"no column {value!r}{suggest(value, header)}; there are: {known}", line=line)
    if len(names) < len(header) and (columns or names & COLUMN_NAMES):
        duplicate = next(cell for cell in header if header.count(cell) > 1)
        raise file_error(name, f"the header names a column twice: {duplicate!r}", "rename one", line)
    if columns or names & COLUMN_NAMES:
        return header
    numbers = {1: "text=1", 2: "prompt=1,completion=2"}.get(len(header))
    fix = f"--data.columns {numbers or 'prompt=A,completion=B with the numbers of your columns'} (no header)"
    if all(not cell or re.fullmatch(r"[^\W\d][\w .-]{0,40}", cell) for cell in header):
        mapping = suggest_mapping(header)
        option = f"--data.columns {mapping}" if mapping else describe_mapping(list(filter(None, header)))
        option = option if len(header) > 1 else f"--data.columns {shlex.quote(f'text={header[0]}')}"
        fix = f"{fix} or {option.partition(' (if ')[0]} (line {line} is the header)"
    fix = " or ".join(filter(None, (_separator_fix(header), fix)))
    raise file_error(name, "unclear whether the first record is a header", fix, line)


def _separator_fix(cells: Sequence[str]) -> str:
    """Return a fix for a first record that another separator would split."""
    mark = re.search(r"[;\t|:^~]", " ".join(cells))
    shown = mark and mark[0].replace("\t", "<tab>")
    return f"begin the file with the line sep={shown} if that separates the cells," if mark else ""


def read_paragraphs(name: str, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    """Yield each paragraph of a text file as a row."""
    for has_text, paragraph in groupby(lines, lambda line: bool(line[1].strip())):
        if has_text:
            numbers, texts = zip(*paragraph, strict=True)
            yield Row(name, numbers[0], {"text": "".join(texts).rstrip("\r\n")})


def read_document(name: str, text: str) -> Iterator[Row]:
    """Yield a whole text file as one row, without blank lines at its start and end."""
    if text.strip():
        first = next(number for number, line in enumerate(text.splitlines(), 1) if line.strip())
        yield Row(name, first, {"text": text.strip("\r\n")})


def read_parallel(
    name: str, paths: tuple[str, ...], encoding: str, columns: Mapping[str, str], errors: list[RowError]
) -> Iterator[Row]:
    """Yield a row for each line number; its columns "1", "2", ... are that line of the first, second, ... file."""
    fix = "--data.columns prompt=1,completion=2 (1 is the first file)"
    if not columns:
        raise file_error(name, "parallel files without --data.columns", fix)
    if not all(value.isdecimal() and 0 < int(value) <= len(paths) for value in columns.values()):
        raise file_error(name, "columns of parallel files are numbers, not names", fix)
    for path in paths:
        if os.path.splitext(path.lower())[1] in {*TYPES} - {".txt"}:
            raise file_error(path, "only plain text files can be parallel files")
    for number, lines in enumerate(zip_longest(*(read_lines(path, encoding) for path in paths)), 1):
        value = {}
        for i, (path, line) in enumerate(zip(paths, lines, strict=True), 1):
            if line is None:
                what = f"ends after line {number - 1}, before another file of {name}"
                raise file_error(path, what, line=number - 1)
            if isinstance(line[1], UnicodeDecodeError):
                errors.append(encoding_error(path, number, line[1]))
                break
            value[str(i)] = line[1].removesuffix("\n").removesuffix("\r")
        else:
            yield Row(paths[0], number, value)


def read_parquet(name: str, path: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    from pyarrow import parquet

    def read() -> Iterator[Any]:
        with parquet.ParquetFile(path, memory_map=True) as file:
            yield file.schema_arrow
            yield from file.iter_batches(batch_size=_batch_size(file.schema_arrow))

    return _read_batches(name, "Parquet", read())


def read_arrow(name: str, path: str) -> Iterator[Row]:
    """Yield the rows of an Arrow file, in the format of a stream or of a file."""
    import pyarrow
    from pyarrow import ipc

    def read() -> Iterator[Any]:
        with pyarrow.memory_map(path) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = ipc.open_file(source) if is_file else ipc.open_stream(source)
            yield reader.schema
            size = _batch_size(reader.schema)
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
                yield from (batch.slice(start, size) for start in range(0, batch.num_rows, size))

    return _read_batches(name, "Arrow", read())


def _batch_size(schema: Any) -> int:
    """Return how many rows to convert at a time: few if they may have images."""
    return 16 if any("binary" in str(type) for type in schema.types) else 256


def _read_batches(name: str, kind: str, batches: Iterator[Any]) -> Iterator[Row]:
    """Yield the rows of record batches. batches: the schema, and the batches.

    Null members of objects are removed: all objects of a column have the same members, null where absent.
    """
    import pyarrow

    number = 0
    try:
        names = next(batches).names
        if len(set(names)) < len(names):
            raise file_error(name, "two columns have the same name", "rename one")
        for batch in batches:
            for record in batch.to_pylist():
                number += 1
                yield Row(name, number, {key: without_nulls(value) for key, value in record.items()})
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # OverflowError: a date out of range
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "write or copy the file again, or rename it if it has another format"
        raise file_error(name, f"{kind} cannot be read after row {number}: {what}", fix) from error


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
