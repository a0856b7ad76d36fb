"""The bytes of a data file -> decoded lines, gzip and zstandard included, in memory of one line."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from strop.errors import DataError, Where

# What a suffix says about the content. `.gz` and `.zst` may follow any but .parquet.
TYPES: dict[str, tuple[str, str]] = {
    ".jsonl": ("json", "JSON Lines: one object a line; a JSON array works too (on one line: rows have their number)"),
    ".ndjson": ("json", "the same as .jsonl"),
    ".json": ("json", 'a JSON array of objects, an object that holds one (`{"data": [...]}`), or JSON Lines'),
    ".csv": (
        "csv",
        "comma separated, quotes as in RFC 4180; with a header, or columns by number; semicolons or tabs where the "
        "first line has them and no comma, or is `sep=;`",
    ),
    ".tsv": ("tsv", "tab separated, otherwise as .csv"),
    ".parquet": ("parquet", "Parquet; the line is the number of the row"),
    ".txt": (
        "text",
        "plain text; a row is a paragraph (blank lines part paragraphs), or the file with `data.format: document`",
    ),
}
COMPRESSION = (".gz", ".zst")

# Why a row cannot be read; formats.REASONS adds why one cannot be used.
REASONS: dict[str, str] = {
    "broken-json": "the line is not JSON",
    "trailing-comma": "a comma behind the row; JSON Lines has none",
    "truncated": "the file ends in the middle of this line",
    "not-an-object": "the row is JSON, but not an object",
    "duplicate-key": "an object holds the same key twice",
    "not-json-number": "NaN, Infinity, or a number beyond what a float holds",
    "lone-surrogate": "half of a surrogate pair, which is no character",
    "encoding": "bytes that are no text in this encoding",
    "cells": "a CSV or TSV record that is broken, or has more or fewer cells than the others",
}
# Names that tell a header from a first record, and a row from an object that wraps rows; every key of formats.FORMATS
# is among them (tested).
COLUMN_NAMES = frozenset(
    {
        *("answer", "answers", "category", "chosen", "chosen_messages", "completion", "completions", "context"),
        *("conversation", "conversations", "history", "input", "instances", "instruction", "kto_tag", "label"),
        *("messages", "output", "prompt", "query", "question", "rejected", "rejected_messages", "rejected_response"),
        *("response", "responses", "scores", "system", "text", "thumbs", "tools"),
    }
)

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip data without the suffix .gz"),
    (b"\x28\xb5\x2f\xfd", "zstandard data without the suffix .zst"),
    (b"PAR1", "Parquet without the suffix .parquet"),
    (b"PK\x03\x04", "a zip archive"),
    (b"version https://git-lfs.github.com/spec/", "Git LFS's pointer to the data, not the data (git lfs pull)"),
    *((b"\x80" + bytes([protocol]), "a pickle, which can run code when it is opened") for protocol in range(2, 6)),
)
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")
_BOMS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class RowError:
    """Why one row cannot be used: a reason of formats.REASONS, and the place."""

    code: str
    where: Where


def refuse(path: str, what: str, fix: str = "", line: int | None = None) -> DataError:
    """A DataError about one place of one file."""
    return DataError(f"{path}: {what}", fix=fix, where=[Where(path, line, what)])


def kind(path: str) -> str:
    """The reader of a file: json, csv, tsv, parquet or text. Raises DataError for any other suffix."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSION:
        suffix = os.path.splitext(stem)[1]
        if suffix == ".parquet":
            raise refuse(path, "compressed Parquet (Parquet compresses inside)", "decompress it")
    if suffix in TYPES:
        return TYPES[suffix][0]
    if suffix in _PICKLES:
        raise refuse(path, "a pickle or weights file can run code when it is opened", "write the rows as JSON Lines")
    known = ", ".join(TYPES)
    raise refuse(path, f"unknown file type {suffix or '(no suffix)'}", f"known are {known}, and each with .gz or .zst")


class _Zstandard(io.RawIOBase):
    """A readable stream over zstandard frames that notices a cut (zstandard's own reader ends without a word)."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame = self._new()
        self._inside = False
        self._left = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            data = self._left or self._raw.read(1 << 14)
            self._left = b""
            if not data:
                if self._inside:
                    raise EOFError("the zstandard data is cut off")
                return 0
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise OSError(str(error)) from error
            self._inside = not self._frame.eof
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, self._new()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


@contextmanager
def opened(path: str) -> Iterator[io.BufferedReader]:
    """The decompressed bytes of a file. Raises DataError where it cannot be read to its end."""
    try:
        with open(path, "rb") as raw:
            if path.lower().endswith(".gz"):
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw))
            elif path.lower().endswith(".zst"):
                yield io.BufferedReader(_Zstandard(raw))
            else:
                yield raw
    except EOFError as error:
        raise refuse(path, "the compressed file is cut off", "copy or download it again") from error
    except (OSError, zlib.error) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise refuse(path, f"cannot be read: {what}") from error


def _encoding(path: str, stream: io.BufferedReader, asked: str) -> str:
    """The encoding by byte-order mark, else the one asked for. Raises DataError for bytes that are no text."""
    try:
        b"    ".decode(asked)  # of no bytes at all Python does not look up the codec
    except UnicodeDecodeError:
        pass  # UTF-32 holds no such character
    except (LookupError, ValueError) as error:
        raise DataError(f"--data.encoding {asked}: not a text encoding", fix="try utf-8, latin-1 or cp1252") from error
    head = stream.peek(64)[:64]
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise refuse(path, what, "write the rows as JSON Lines, CSV, text or Parquet, with the suffix that says so")
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    if codecs.lookup(asked).name == "utf-8" and len(head) >= 2 and 0 in head[:2] and head[:2] != b"\0\0":
        guess = "utf-16-le" if head[1] == 0 else "utf-16-be"
        raise refuse(path, "looks like UTF-16 without a byte-order mark", f"--data.encoding {guess}")
    return asked


def lines(path: str, encoding: str) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """(line number from 1, the line with its line end), or the error where the bytes of a line do not decode.

    Lines end at \\n alone. A byte-order mark wins over `encoding`. Raises DataError.
    """
    with opened(path) as stream:
        name = _encoding(path, stream, encoding)
        if codecs.lookup(name).name.startswith(("utf-16", "utf-32")):
            yield from _wide_lines(path, stream, name)
            return
        for number, raw in enumerate(stream, 1):
            try:
                text = raw.decode(name)
            except UnicodeDecodeError as error:
                yield number, error
            else:
                yield number, text
            name = "utf-8" if name == "utf-8-sig" else name  # the mark stands on the first line only


def _wide_lines(path: str, stream: io.BufferedReader, name: str) -> Iterator[tuple[int, str]]:
    # \n is more than one byte here, so the decoder must run before lines are cut, and cannot go on after an error.
    number = 0
    try:
        with io.TextIOWrapper(stream, encoding=name, newline="\n") as decoded:
            for number, text in enumerate(decoded, 1):
                yield number, text
    except UnicodeDecodeError as error:
        raise refuse(path, undecodable(error), "give the right --data.encoding", number + 1) from error


def undecodable(error: UnicodeDecodeError) -> str:
    """What is wrong with the bytes of a line, for people."""
    byte = error.object[error.start]
    return f"byte {error.start + 1} of the line (0x{byte:02x}) is not {error.encoding}"


def whole(path: str, encoding: str) -> str:
    """The whole text of a file. Raises DataError, at the first line that does not decode."""
    parts: list[str] = []
    for number, text in lines(path, encoding):
        if isinstance(text, UnicodeDecodeError):
            raise refuse(path, undecodable(text), "give the right --data.encoding, such as latin-1 or cp1252", number)
        parts.append(text)
    return "".join(parts)


def texts(name: str, path: str, encoding: str, bad: list[RowError]) -> Iterator[tuple[int, str]]:
    """The lines of a file; those that do not decode go to `bad`."""
    for number, text in lines(path, encoding):
        if isinstance(text, UnicodeDecodeError):
            bad.append(encoding_fault(name, number, text))
        else:
            yield number, text


def encoding_fault(name: str, number: int, error: UnicodeDecodeError) -> RowError:
    what = f"{undecodable(error)}; say --data.encoding, such as latin-1 or cp1252"
    return RowError("encoding", Where(name, number, what))
