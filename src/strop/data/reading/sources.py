"""Data files -> rows with file and line, values as they stand in the file.

A fault of one row is put on a list and the row skipped, so that all of them can be named in one go;
a fault of a whole file is a DataError.
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

from strop.data.reading import files, hub, json_reader, tables
from strop.data.reading.files import REASONS as REASONS
from strop.data.reading.files import RowFault as RowFault
from strop.data.reading.files import refuse
from strop.data.types import Row
from strop.errors import DataError, nearest

_MAX_WEIGHT = 1000.0


@dataclass(frozen=True)
class Source:
    """What is read as one: `path` as it is shown, `files` to open (several: parallel files), weight of its rows."""

    path: str
    files: tuple[str, ...]
    weight: float = 1.0


# --- which files -------------------------------------------------------------------------------------------------


def resolve(spec: str | Sequence[str]) -> list[Source]:
    """The sources a spec names, in order: `file`, glob, `a.nl+b.cm`, `owner/name` on the Hub, each maybe `@weight`.

    Raises DataError: nothing of that name, a folder, a weight out of bounds, a file named twice.
    """
    found = [source for one in ([spec] if isinstance(spec, str) else spec) for source in _resolve(one)]
    if not found:
        raise DataError("no data file named", fix="give one with --data.train FILE")
    twice = [path for path, count in Counter(os.path.realpath(f) for s in found for f in s.files).items() if count > 1]
    if twice:
        raise refuse(os.path.relpath(twice[0]), "named twice", "to repeat its rows, write FILE@2")
    return found


def _resolve(spec: str) -> list[Source]:
    if weight := _weighed(spec):
        value = float(weight[2])
        if not 0 < value <= _MAX_WEIGHT:
            raise DataError(f"{spec}: the weight must be above 0 and at most {_MAX_WEIGHT:g}")
        return [replace(source, weight=value) for source in _resolve(weight[1])]
    if os.path.isfile(spec):
        return [Source(spec, (spec,))]
    if os.path.isdir(spec):
        if {"state.json", "dataset_dict.json"} & {*os.listdir(spec)}:
            what = "a folder of datasets' save_to_disk, whose Arrow files are not read"
            raise refuse(spec, what, 'write it as Parquet: load_from_disk(FOLDER).to_parquet("rows.parquet")')
        kinds = sorted({os.path.splitext(name)[1] for name in os.listdir(spec)} & {*files.TYPES, *files.COMPRESSION})
        some = " or ".join(f"{os.path.join(spec, '*')}{suffix}" for suffix in kinds)
        raise refuse(spec, "is a folder", f"name its files: {some}" if some else "it holds no data files")
    if any(sign in spec for sign in "*?["):
        names = sorted(name for name in glob.glob(spec, recursive=True) if os.path.isfile(name))
        if not names and not hub.is_dataset(spec):
            raise refuse(spec, "no file matches")
        if names:
            return [Source(name, (name,)) for name in names]
    parts = tuple(spec.split("+"))
    if len(parts) > 1 and any(os.path.isfile(part) for part in parts):
        for part in parts:
            if not os.path.isfile(part):
                raise _missing(part)
        return [Source(spec, parts)]
    if hub.is_dataset(spec):
        return [Source(shown, (local,)) for shown, local in hub.fetch(spec)]
    raise _missing(spec)


def _weighed(spec: str) -> re.Match[str] | None:
    """`bare@weight`, where that is no file's own name."""
    return None if os.path.exists(spec) else re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)", spec)


def fetched(spec: str) -> bool:
    """Whether reading it would fetch a data set from the Hub."""
    weight = _weighed(spec)
    bare = weight[1] if weight else spec
    return not glob.glob(bare, recursive=True) and hub.is_dataset(bare)


def _missing(path: str) -> DataError:
    folder, name = os.path.split(path)
    if "\0" in path:
        return DataError("a file name holds a NUL character", fix="name a file that exists")
    if os.path.exists(path):
        return refuse(path, "is not a regular file")
    if os.path.islink(path):
        return refuse(path, f"a link to {os.readlink(path)}, which is not there", "name a file that exists")
    beside = os.listdir(folder or ".") if os.path.isdir(folder or ".") else None
    if beside is None:
        return refuse(path, f"no such file: there is no folder {folder}")
    return refuse(path, f"no such file{nearest(name, beside)}", "a Hub data set is named owner/name")


# --- rows --------------------------------------------------------------------------------------------------------


def read_rows(
    spec: str | Sequence[str],
    *,
    encoding: str = "utf-8",
    columns: Mapping[str, str] | None = None,
    bad: list[RowFault],
    left_out: Counter[str] | None = None,
    documents: bool = False,
) -> Iterator[Row]:
    """The rows of all sources, in order; memory does not grow with the file, except for JSON arrays.

    documents: a plain text file is one row, not one a paragraph.

    Row faults go to `bad`. `left_out` counts, by path, rows that a fractional weight left out. `columns` matters here
    only for files without names: values that are numbers count the cells of CSV, TSV and parallel files from 1.
    Raises DataError, perhaps after rows were given, for what is wrong with a whole file.
    """
    for source in resolve(spec):
        before = len(bad)
        empty = True
        for row in _read(source, encoding, columns or {}, bad, documents):
            empty = False
            yield from _weighted(row, source, left_out)
        if empty and len(bad) == before:
            raise refuse(source.path, f"0 rows in {source.path}", "the file is empty, or holds only blank lines")


def _weighted(row: Row, source: Source, left_out: Counter[str] | None) -> Iterator[Row]:
    copies, part = divmod(source.weight, 1)
    if part:  # by content, so that the choice depends neither on the order of rows nor on a seed
        text = json.dumps(row.value, sort_keys=True, default=str).encode()
        copies += int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64 < part
    if not copies and left_out is not None:
        left_out[source.path] += 1
    for _ in range(int(copies)):
        yield row


def _read(
    source: Source, encoding: str, columns: Mapping[str, str], bad: list[RowFault], documents: bool
) -> Iterator[Row]:
    if len(source.files) > 1:
        return tables.parallel_rows(source.path, source.files, encoding, columns, bad)
    name, path = source.path, source.files[0]
    reader = files.kind(path)
    if reader == "json":
        return json_reader.rows(name, path, encoding, columns, bad)
    if reader == "parquet":
        return tables.parquet_rows(name, path)
    if reader == "text" and documents:
        return tables.document(name, files.whole(path, encoding))
    texts = files.texts(name, path, encoding, bad)
    if reader == "text":
        return tables.paragraphs(name, texts)
    return tables.table_rows(name, texts, "," if reader == "csv" else "\t", columns, bad)
