"""Decode data files to lines, with gzip and zstandard decompression, in memory of one line."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from strop.data.row_errors import RowError, file_error
from strop.errors import DataError, Where

# suffix -> (reader, description). `.gz` and `.zst` may follow any suffix but .parquet.
TYPES: dict[str, tuple[str, str]] = {
    ".jsonl": ("json", "JSON Lines: one object a line. A JSON array works too; on one line, its rows are numbered"),
    ".ndjson": ("json", "the same as .jsonl"),
    ".json": ("json", 'a JSON array of objects, an object with one such array (`{"data": [...]}`), or JSON Lines'),
    ".csv": (
        "csv",
        "comma separated, quotes as in RFC 4180; with a header, or columns by number; separated by semicolons or tabs "
        "if the first line has them and no comma, or is `sep=;`",
    ),
    ".tsv": ("tsv", "tab separated, otherwise as .csv"),
    ".parquet": ("parquet", "Parquet; the line is the number of the row"),
    ".txt": (
        "text",
        "plain text; a row is a paragraph (separated by blank lines), or the whole file with `data.format: document`",
    ),
}
COMPRESSION = (".gz", ".zst")

# Names that distinguish a header from a first record, and a row from an object that wraps rows. A test checks that
# every key of formats.FORMATS is among them.
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
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer instead of the data (run git lfs pull)"),
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


def reader_of(path: str) -> str:
    """Return the reader of a file: json, csv, tsv, parquet or text. Raises DataError for an unknown suffix."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSION:
        suffix = os.path.splitext(stem)[1]
        if suffix == ".parquet":
            raise file_error(path, "compressed Parquet (Parquet compresses inside)", "decompress it")
    if suffix in TYPES:
        return TYPES[suffix][0]
    if suffix in _PICKLES:
        what = "a pickle or weights file can run code when it is opened"
        raise file_error(path, what, "write the rows as JSON Lines")
    fix = f"known are {', '.join(TYPES)}, and each with .gz or .zst"
    raise file_error(path, f"unknown file type {suffix or '(no suffix)'}", fix)


class _Zstandard(io.RawIOBase):
    """A readable stream over zstandard frames that detects truncation; zstandard's own reader ends silently."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame = self._new_frame()
        self._inside = False
        self._unused = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            data = self._unused or self._raw.read(1 << 14)
            self._unused = b""
            if not data:
                if self._inside:
                    raise EOFError("the zstandard data is truncated")
                return 0
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise OSError(str(error)) from error
            self._inside = not self._frame.eof
            if self._frame.eof:
                self._unused, self._frame = self._frame.unused_data, self._new_frame()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


@contextmanager
def open_decompressed(path: str) -> Iterator[io.BufferedReader]:
    """Open the decompressed bytes of a file. Raises DataError if it cannot be read to its end."""
    try:
        with open(path, "rb") as raw:
            if path.lower().endswith(".gz"):
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw))
            elif path.lower().endswith(".zst"):
                yield io.BufferedReader(_Zstandard(raw))
            else:
                yield raw
    except EOFError as error:
        raise file_error(path, "the compressed file is truncated", "copy or download it again") from error
    except (OSError, zlib.error) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise file_error(path, f"cannot be read: {what}") from error


def _detect_encoding(path: str, stream: io.BufferedReader, requested: str) -> str:
    """Return the encoding of the byte-order mark, else the requested one. Raises DataError for bytes of other types."""
    try:
        b"    ".decode(requested)  # not b"": Python does not look up the codec for no bytes
    except UnicodeDecodeError:
        pass  # UTF-32 has no such character
    except (LookupError, ValueError) as error:
        what = f"--data.encoding {requested}: not a text encoding"
        raise DataError(what, fix="try utf-8, latin-1 or cp1252") from error
    head = stream.peek(64)[:64]
    for magic, what in _MAGIC:
        if head.startswith(magic):
            fix = "write the rows as JSON Lines, CSV, text or Parquet, with the matching suffix"
            raise file_error(path, what, fix)
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    if codecs.lookup(requested).name == "utf-8" and len(head) >= 2 and 0 in head[:2] and head[:2] != b"\0\0":
        guess = "utf-16-le" if head[1] == 0 else "utf-16-be"
        raise file_error(path, "looks like UTF-16 without a byte-order mark", f"--data.encoding {guess}")
    return requested


def read_lines(path: str, encoding: str) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Yield each line number from 1 with the line and its line end, or with the error if it does not decode.

    Lines end at \\n only. A byte-order mark overrides `encoding`. Raises DataError.
    """
    with open_decompressed(path) as stream:
        name = _detect_encoding(path, stream, encoding)
        if codecs.lookup(name).name.startswith(("utf-16", "utf-32")):
            yield from _wide_lines(path, stream, name)
            return
        for number, raw in enumerate(stream, 1):
            try:
                text: str | UnicodeDecodeError = raw.decode(name)
            except UnicodeDecodeError as error:
                text = error
            yield number, text
            name = "utf-8" if name == "utf-8-sig" else name  # only the first line has the mark


def _wide_lines(path: str, stream: io.BufferedReader, name: str) -> Iterator[tuple[int, str]]:
    # \n is more than one byte here, so the text is decoded before it is split, and decoding stops at an error.
    number = 0
    try:
        with io.TextIOWrapper(stream, encoding=name, newline="\n") as decoded:
            for number, text in enumerate(decoded, 1):
                yield number, text
    except UnicodeDecodeError as error:
        raise file_error(path, _decode_message(error), "give the right --data.encoding", number + 1) from error


def _decode_message(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"byte {error.start + 1} of the line (0x{byte:02x}) is not valid {error.encoding}"


def read_text(path: str, encoding: str) -> str:
    """Return the whole text of a file. Raises DataError at the first line that does not decode."""
    parts: list[str] = []
    for number, text in read_lines(path, encoding):
        if isinstance(text, UnicodeDecodeError):
            fix = "give the right --data.encoding, such as latin-1 or cp1252"
            raise file_error(path, _decode_message(text), fix, number)
        parts.append(text)
    return "".join(parts)


def decoded_lines(name: str, path: str, encoding: str, bad: list[RowError]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers; append those that do not decode to `bad`."""
    for number, text in read_lines(path, encoding):
        if isinstance(text, UnicodeDecodeError):
            bad.append(encoding_error(name, number, text))
        else:
            yield number, text


def encoding_error(name: str, number: int, error: UnicodeDecodeError) -> RowError:
    what = f"{_decode_message(error)}; set --data.encoding, such as latin-1 or cp1252"
    return RowError("encoding", Where(name, number, what))
