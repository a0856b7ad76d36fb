"""CSV, TSV, plain text, parallel text files and Parquet -> rows. Cells stay strings: `007`, `NA`, dates."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from typing import Any

from strop.data.reading.files import COLUMN_NAMES, TYPES, RowError, encoding_fault, lines, refuse
from strop.data.types import Row
from strop.errors import Where, nearest


class _Feed:
    """Lines for csv.reader, remembering on which line of the file a record starts, and which was the last."""

    def __init__(self, texts: Iterator[tuple[int, str]]) -> None:
        self._texts = texts
        self.start: int | None = None
        self.last = 0

    def __iter__(self) -> Iterator[str]:
        for number, text in self._texts:
            self.start, self.last = self.start or number, number
            yield text

    @property
    def span(self) -> str:
        """Of a record of several lines: which."""
        return f" (lines {self.start} to {self.last})" if self.last != self.start else ""


def _records(
    name: str, texts: Iterator[tuple[int, str]], separator: str, bad: list[RowError]
) -> Iterator[tuple[int, list[str], str]]:
    """Of each record the line on which it starts, its cells, and for people its lines where they are several. Raises
    DataError for a quote that swallows the rest of the file."""
    csv.field_size_limit(2**31 - 1)  # the limit of 128 KiB a cell is csv's own and serves nothing here
    feed = _Feed(texts)
    reader = csv.reader(feed, delimiter=separator, strict=True)
    while True:
        feed.start = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = _fault(str(error)) + feed.span
            if feed.span and str(error) == _OPEN:  # nobody knows how many rows these lines are
                raise refuse(
                    name, what, "close the quote, or double it where it is part of the text", feed.start
                ) from error
            bad.append(RowError("cells", Where(name, feed.start, what)))
            continue
        if cells:
            assert feed.start is not None
            yield feed.start, cells, feed.span


_OPEN = "unexpected end of data"  # what csv says of it


def _fault(said: str) -> str:
    """What csv says about a record, for people."""
    if said == _OPEN:
        return "a quote at the start of a cell is not closed before the file ends"
    if said.startswith("new-line character"):
        return "a line ends with CR alone, outside quotes: save the file with line ends LF or CRLF"
    hint = "; a quote at the start of a cell needs one at its end, and quotes inside are doubled"
    return said + hint * ('"' in said)


def _separated(
    texts: Iterator[tuple[int, str]], separator: str, columns: Mapping[str, str]
) -> tuple[Iterator[tuple[int, str]], str]:
    """The lines of a table, and what parts its cells: Excel writes semicolons or tabs into a .csv file, maybe behind a
    line `sep=;`. Commas part a first line that has any, and one that `columns` finds whole."""
    first = next(texts, None)
    if first is None:
        return texts, separator
    if said := re.fullmatch(r'sep=([^\w"\r\n])\r?\n?', first[1]):
        return texts, said[1]
    wanted, whole = set(columns.values()), _cells(first[1], separator)
    if separator == "," and len(whole) == 1 and not (wanted and wanted <= {whole[0].strip(), "1"}):
        others = [mark for mark in ";\t" if len(_cells(first[1], mark)) > 1]
        separator = others[0] if len(others) == 1 else separator
    return chain([first], texts), separator


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:  # told of the record, when it is read
        return []


def table_rows(
    name: str, texts: Iterator[tuple[int, str]], separator: str, columns: Mapping[str, str], bad: list[RowError]
) -> Iterator[Row]:
    header, width = list[str](), 0
    for number, cells, span in _records(name, *_separated(texts, separator, columns), bad):
        if not header:
            names, width = _header(name, number, cells, columns), len(cells)
            header = names or [str(place) for place in range(1, width + 1)]
            if names:
                continue
        unnamed = [place for place, cell in enumerate(cells, 1) if place > len(header) and cell.strip()]
        if len(cells) != width:
            bad.append(RowError("cells", Where(name, number, f"{len(cells)} cells where {width} were expected{span}")))
        elif unnamed:
            what = f"cell {unnamed[0]} holds text, and the header has no name for it"
            bad.append(RowError("cells", Where(name, number, what)))
        else:
            yield Row(name, number, dict(zip(header, cells, strict=False)))


def _header(name: str, line: int, cells: list[str], columns: Mapping[str, str]) -> list[str] | None:
    """The names of the columns, without blanks around them and without empty cells at the end; None where the first
    record is a row. Decided by `columns` or by known names; never guessed."""
    named = [cell.strip() for cell in cells]
    while named and not named[-1]:
        named.pop()
    names = set(named)
    if named and len(names) == len(named) and names <= COLUMN_NAMES and not names & set(columns.values()) and columns:
        option = ",".join(f"{key}={cell}" for key, cell in zip(columns, named, strict=False))
        raise refuse(
            name, f"the first record looks like a header ({', '.join(named)})", f"--data.columns {option}", line
        )
    if columns and all(value.isdecimal() for value in columns.values()):
        beyond = [value for value in columns.values() if not 0 < int(value) <= len(cells)]
        if beyond:
            raise refuse(name, f"no column {beyond[0]}: there are {len(cells)}, counted from 1", line=line)
        return None
    for value in columns.values():
        if value not in names:
            known = ", ".join(cell[:40] for cell in named[:10])
            raise refuse(name, f"no column {value!r}{nearest(value, named)}; there are: {known}", line=line)
    if len(names) < len(named) and (columns or names & COLUMN_NAMES):
        twice = next(cell for cell in named if named.count(cell) > 1)
        raise refuse(name, f"the header names a column twice: {twice!r}", "rename one", line)
    if columns or names & COLUMN_NAMES:
        return named
    fix = "--data.columns prompt=1,completion=2 (no header, columns by number)"
    if len(named) > 1 and all(re.fullmatch(r"[^\W\d][\w .-]{0,40}", cell) for cell in named):
        fix += f" or --data.columns prompt={named[0]},completion={named[1]} (line {line} is the header)"
    if any(mark in cell for mark in ";\t" for cell in named):
        fix += "; where other signs than commas part the cells, a first line such as sep=; says so"
    raise refuse(name, "cannot tell whether the first record is a header", fix, line)


def paragraphs(name: str, texts: Iterable[tuple[int, str]]) -> Iterator[Row]:
    start, block = 0, list[str]()
    for number, text in texts:
        if text.strip():
            start = start if block else number
            block.append(text)
        elif block:
            yield Row(name, start, {"text": "".join(block).rstrip("\r\n")})
            block = []
    if block:
        yield Row(name, start, {"text": "".join(block).rstrip("\r\n")})


def document(name: str, text: str) -> Iterator[Row]:
    """A whole file as one row, without blank lines at its ends."""
    if text.strip():
        lines = text.splitlines()
        first = next(number for number, line in enumerate(lines, 1) if line.strip())
        yield Row(name, first, {"text": text.strip("\r\n")})


def parallel_rows(
    name: str, paths: tuple[str, ...], encoding: str, columns: Mapping[str, str], bad: list[RowError]
) -> Iterator[Row]:
    """Row n holds line n of each file, under "1", "2", ..."""
    fix = "--data.columns prompt=1,completion=2 (1 is the first file)"
    if not columns:
        raise refuse(name, "which file is which?", fix)
    if not all(value.isdecimal() and 0 < int(value) <= len(paths) for value in columns.values()):
        raise refuse(name, "parallel files have numbers, not names", fix)
    for path in paths:
        if os.path.splitext(path.lower())[1] in {*TYPES} - {".txt"}:
            raise refuse(path, "only plain text files are read line by line")
    for number, several in enumerate(zip_longest(*(lines(path, encoding) for path in paths)), 1):
        value = {}
        for place, (path, item) in enumerate(zip(paths, several, strict=True), 1):
            if item is None:
                raise refuse(path, f"ends after line {number - 1}, another of {name} goes on", line=number - 1)
            if isinstance(item[1], UnicodeDecodeError):
                bad.append(encoding_fault(path, number, item[1]))
                break
            value[str(place)] = item[1].removesuffix("\n").removesuffix("\r")
        else:
            yield Row(paths[0], number, value)


def parquet_rows(name: str, path: str) -> Iterator[Row]:
    """The rows of a Parquet file, where a null in an object is an absent one: each object of a column has the names of
    all others there."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise refuse(name, "two columns have the same name", "rename one")
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(name, number, {key: _without_nulls(held) for key, held in value.items()})
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last: a date that Python lacks
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise refuse(name, f"Parquet cannot be read behind row {number}: {what}") from error


def _without_nulls(held: Any) -> Any:
    if isinstance(held, dict):
        return {key: _without_nulls(value) for key, value in held.items() if value is not None}
    return [_without_nulls(item) for item in held] if isinstance(held, list) else held
