"""CSV, TSV, plain text, parallel text files and Parquet -> rows. Cells stay strings: `007`, `NA`, dates."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest

from strop.data.conversation import Row
from strop.data.reading.files import COLUMN_NAMES, TYPES, RowFault, encoding_fault, lines, refuse
from strop.errors import Where, nearest


class _Feed:
    """Lines for csv.reader, remembering on which line of the file a record starts."""

    def __init__(self, texts: Iterator[tuple[int, str]]) -> None:
        self._texts = texts
        self.start: int | None = None

    def __iter__(self) -> Iterator[str]:
        for number, text in self._texts:
            self.start = self.start or number
            yield text


def _records(
    name: str, texts: Iterator[tuple[int, str]], separator: str, bad: list[RowFault]
) -> Iterator[tuple[int, list[str]]]:
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
            hint = "; a quote at the start of a cell needs one at its end, and quotes inside are doubled"
            bad.append(RowFault("cells", Where(name, feed.start, f"{error}{hint if chr(34) in str(error) else ''}")))
            continue
        if cells:
            assert feed.start is not None
            yield feed.start, cells


def table_rows(
    name: str, texts: Iterator[tuple[int, str]], separator: str, columns: Mapping[str, str], bad: list[RowFault]
) -> Iterator[Row]:
    header: list[str] | None = None
    for number, cells in _records(name, texts, separator, bad):
        if header is None:
            if _has_header(name, number, cells, columns):
                header = cells
                continue
            header = [str(place) for place in range(1, len(cells) + 1)]
        if len(cells) != len(header):
            what = f"{len(cells)} cells where {len(header)} were expected"
            bad.append(RowFault("cells", Where(name, number, what)))
        else:
            yield Row(name, number, dict(zip(header, cells, strict=True)))


def _has_header(name: str, line: int, cells: list[str], columns: Mapping[str, str]) -> bool:
    """Whether the first record names the columns. Decided by `columns` or by known names; never guessed."""
    names = set(cells)
    if len(names) == len(cells) and names <= COLUMN_NAMES and not names & set(columns.values()) and columns:
        option = ",".join(f"{key}={cell}" for key, cell in zip(columns, cells, strict=False))
        raise refuse(
            name, f"the first record looks like a header ({', '.join(cells)})", f"--data.columns {option}", line
        )
    if columns and all(value.isdecimal() for value in columns.values()):
        beyond = [value for value in columns.values() if not 0 < int(value) <= len(cells)]
        if beyond:
            raise refuse(name, f"no column {beyond[0]}: there are {len(cells)}, counted from 1", line=line)
        return False
    for value in columns.values():
        if value not in names:
            known = ", ".join(cell[:40] for cell in cells[:10])
            raise refuse(name, f"no column {value!r}{nearest(value, cells)}; there are: {known}", line=line)
    if len(names) < len(cells) and (columns or names & COLUMN_NAMES):
        raise refuse(name, "the header names a column twice", "rename one", line)
    if columns or names & COLUMN_NAMES:
        return True
    fix = "--data.columns prompt=1,completion=2 (no header, columns by number)"
    if len(cells) > 1 and all(re.fullmatch(r"[^\W\d][\w .-]{0,40}", cell) for cell in cells):
        fix += f" or --data.columns prompt={cells[0]},completion={cells[1]} (line {line} is the header)"
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
    name: str, paths: tuple[str, ...], encoding: str, columns: Mapping[str, str], bad: list[RowFault]
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
                    yield Row(name, number, value)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise refuse(name, f"Parquet cannot be read behind row {number}: {what}") from error
