"""Read data files as rows with file and line, values unchanged.

An error of one row goes to a list and the row is skipped, so that all errors are reported together. An error of a whole
file is a DataError.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from strop.data.reading import files, hub, tables
from strop.data.reading.json_reader import json_rows
from strop.data.row_errors import RowError, file_error
from strop.data.types import Row
from strop.errors import DataError, nearest

_MAX_WEIGHT = 1000.0


@dataclass(frozen=True)
class Source:
    """Files that are read as one. path: as shown to the user. files: to open; several are parallel files.

    weight: how often each row is read; a fraction selects a share of the rows.
    """

    path: str
    files: tuple[str, ...]
    weight: float = 1.0


# --- which files -------------------------------------------------------------------------------------------------


def resolve(spec: str | Sequence[str]) -> list[Source]:
    """Return the sources that a spec names, in order.

    A spec is a file, a glob, `a.nl+b.cm` (parallel files), or `owner/name` on the Hub, each optionally with `@weight`.
    Raises DataError for an unknown name, a folder, a weight out of bounds, or a file named twice.
    """
    sources = [source for part in ([spec] if isinstance(spec, str) else spec) for source in _resolve(part)]
    if not sources:
        raise DataError("no data file named", fix="give one with --data.train FILE")
    counts = Counter(os.path.realpath(file) for source in sources for file in source.files)
    repeated = [path for path, count in counts.items() if count > 1]
    if repeated:
        raise file_error(os.path.relpath(repeated[0]), "named twice", "to repeat its rows, write FILE@2")
    return sources


def _resolve(spec: str) -> list[Source]:
    if weighted := _match_weight(spec):
        weight = float(weighted[2])
        if not 0 < weight <= _MAX_WEIGHT:
            raise DataError(f"{spec}: the weight must be above 0 and at most {_MAX_WEIGHT:g}")
        return [replace(source, weight=weight) for source in _resolve(weighted[1])]
    if os.path.isfile(spec):
        return [Source(spec, (spec,))]
    if os.path.isdir(spec):
        if {"state.json", "dataset_dict.json"} & {*os.listdir(spec)}:
            what = "a folder written by save_to_disk of datasets, whose Arrow files are not supported"
            raise file_error(spec, what, 'write it as Parquet: load_from_disk(FOLDER).to_parquet("rows.parquet")')
        suffixes = sorted({os.path.splitext(name)[1] for name in os.listdir(spec)} & {*files.TYPES, *files.COMPRESSION})
        globs = " or ".join(f"{os.path.join(spec, '*')}{suffix}" for suffix in suffixes)
        raise file_error(spec, "is a folder", f"name its files: {globs}" if globs else "it has no data files")
    if any(sign in spec for sign in "*?["):
        names = sorted(name for name in glob.glob(spec, recursive=True) if os.path.isfile(name))
        if not names and not hub.is_dataset(spec):
            raise file_error(spec, "no file matches")
        if names:
            return [Source(name, (name,)) for name in names]
    parts = tuple(spec.split("+"))
    if len(parts) > 1 and any(os.path.isfile(part) for part in parts):
        for part in parts:
            if not os.path.isfile(part):
                raise _missing(part)
        return [Source(spec, parts)]
    if hub.is_dataset(spec):
        return [Source(shown, (local,)) for shown, local in hub.download(spec)]
    raise _missing(spec)


def _match_weight(spec: str) -> re.Match[str] | None:
    """Match `name@weight`, unless a file has exactly that name."""
    return None if os.path.exists(spec) else re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)", spec)


def needs_download(spec: str) -> bool:
    """Return whether reading `spec` downloads a data set from the Hub."""
    weighted = _match_weight(spec)
    name = weighted[1] if weighted else spec
    return not glob.glob(name, recursive=True) and hub.is_dataset(name)


def _missing(path: str) -> DataError:
    folder, name = os.path.split(path)
    if "\0" in path:
        return DataError("a file name contains a NUL character", fix="name a file that exists")
    if os.path.exists(path):
        return file_error(path, "is not a regular file")
    if os.path.islink(path):
        return file_error(path, f"a link to {os.readlink(path)}, which does not exist", "name a file that exists")
    if not os.path.isdir(folder or "."):
        return file_error(path, f"no such file: there is no folder {folder}")
    siblings = os.listdir(folder or ".")
    return file_error(path, f"no such file{nearest(name, siblings)}", "a Hub data set is named owner/name")


# --- rows --------------------------------------------------------------------------------------------------------


def read_rows(
    spec: str | Sequence[str],
    *,
    encoding: str = "utf-8",
    columns: Mapping[str, str] | None = None,
    bad: list[RowError],
    left_out: Counter[str] | None = None,
    documents: bool = False,
) -> Iterator[Row]:
    """Yield the rows of all sources, in order. Memory does not grow with the file, except for JSON arrays.

    Args:
        spec: see `resolve`.
        encoding: encoding of text files.
        columns: names of columns. Used here only for files without names: values that are numbers count the cells of
            CSV, TSV and parallel files from 1.
        bad: receives the errors of rows.
        left_out: receives, by path, the number of rows that a fractional weight left out.
        documents: read a plain text file as one row, instead of one row a paragraph.

    Raises:
        DataError: a whole file cannot be read; possibly after some rows.
    """
    for source in resolve(spec):
        before = len(bad)
        empty = True
        for row in _read(source, encoding, columns or {}, bad, documents):
            empty = False
            yield from _repeat(row, source, left_out)
        if empty and len(bad) == before:
            raise file_error(source.path, f"0 rows in {source.path}", "the file is empty, or has only blank lines")


def _repeat(row: Row, source: Source, left_out: Counter[str] | None) -> Iterator[Row]:
    copies, fraction = divmod(source.weight, 1)
    if fraction:  # chosen by content, so that the choice does not depend on the order of rows or on a seed
        text = json.dumps(row.value, sort_keys=True, default=str).encode()
        copies += int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64 < fraction
    if not copies and left_out is not None:
        left_out[source.path] += 1
    for _ in range(int(copies)):
        yield row


def _read(
    source: Source, encoding: str, columns: Mapping[str, str], bad: list[RowError], documents: bool
) -> Iterator[Row]:
    if len(source.files) > 1:
        return tables.parallel_rows(source.path, source.files, encoding, columns, bad)
    name, path = source.path, source.files[0]
    reader = files.reader_of(path)
    if reader == "json":
        return json_rows(name, path, encoding, columns, bad)
    if reader == "parquet":
        return tables.parquet_rows(name, path)
    if reader == "text" and documents:
        return tables.document_rows(name, files.read_text(path, encoding))
    lines = files.decoded_lines(name, path, encoding, bad)
    if reader == "text":
        return tables.paragraph_rows(name, lines)
    return tables.table_rows(name, lines, "," if reader == "csv" else "\t", columns, bad)
