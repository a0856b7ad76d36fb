"""Read the lines of text files, decompressed and decoded. Only one line is in memory at a time."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from strop.data.row_errors import RowError, file_error
from strop.errors import DataError, Location

# suffix -> (reader, description). `.gz` and `.zst` may follow any suffix except .parquet and .arrow.
TYPES: dict[str, tuple[str, str]] = {
    ".jsonl": ("json", "JSON Lines: one object a line. A JSON array works too; on one line, its rows are numbered"),
    ".ndjson": ("json", "the same as .jsonl"),
    ".json": ("json", 'a JSON array of objects, an object with one such array (`{"data": [...]}`), or JSON Lines'),
    ".csv": (
        "csv",
        "comma separated, quotes as in RFC 4180; with a header, or columns by number; separated by semicolons, "
        "tabs or vertical bars if the first line has them and no comma, or as in a first line `sep=:`",
    ),
    ".tsv": ("tsv", "tab separated, otherwise as .csv"),
    ".parquet": ("parquet", "Parquet; the line is the number of the row"),
    ".arrow": ("arrow", "Arrow IPC, as `save_to_disk` of datasets writes it; the line is the number of the row"),
    ".txt": (
        "text",
        "plain text; a row is a paragraph (separated by blank lines), or the whole file with `data.format: document`",
    ),
}
COMPRESSION = (".gz", ".zst")

# Column names of the formats in formats.FORMATS. They distinguish a CSV header from a first record, and a JSON row from
# an object that contains a list of rows. Not here: `positive`, `negative`, `pos` and `neg`, which may be labels.
COLUMN_NAMES = frozenset((
    "anchor", "answer", "answers", "category", "chosen", "chosen_messages", "class", "completion", "completions",
    "content", "context", "conversation", "conversations", "document", "hard_negatives", "history", "input",
    "instances", "instruction", "intent", "kto_tag", "label", "labels", "messages", "negatives", "output", "prompt",
    "query", "question", "rejected", "rejected_messages", "rejected_response", "response", "responses", "scores",
    "sentence", "sentence1", "sentence2", "sentiment", "system", "system_message", "system_prompt", "text", "thumbs",
    "tools", "utterance",
))  # fmt: skip

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip data without the suffix .gz"),
    (b"\x28\xb5\x2f\xfd", "zstandard data without the suffix .zst"),
    (b"PAR1", "Parquet without the suffix .parquet"),
    (b"PK\x03\x04", "a zip archive"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer instead of the data (run git lfs pull)"),
    *((b"\x80" + bytes([protocol]), "a pickle, which can run code when it is opened") for protocol in range(2, 6)),
)
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")
_BOMS = (  # UTF-32 first, because its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def choose_reader(path: str) -> str:
    """Return the reader for a file: json, csv, tsv, parquet, arrow or text. Raises DataError for an unknown suffix."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSION:
        suffix = os.path.splitext(stem)[1]
        if suffix in (".parquet", ".arrow"):
            what = "compressed Parquet (Parquet compresses inside)" if suffix == ".parquet" else "compressed Arrow"
            raise file_error(path, what, "decompress it")
    if suffix in TYPES:
        return TYPES[suffix][0]
    if suffix in _ARCHIVES:
        raise file_error(path, f"a {suffix} archive is not read", "unpack it, and give the file with the rows")
    if suffix in _PICKLES:
        what = "a pickle or weights file can run code when it is opened"
        raise file_error(path, what, "write the rows as JSON Lines")
    fix = f"known are {', '.join(TYPES)}, and each with .gz or .zst"
    raise file_error(path, f"unknown file type {suffix or '(no suffix)'}", fix)


@contextmanager
def _open_decompressed(path: str) -> Iterator[io.BufferedReader]:
    """Open a file for reading its decompressed bytes. Raises DataError if reading fails inside the block."""
    try:
        with open(path, "rb") as raw:
            if path.lower().endswith(".gz"):
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw))
            elif path.lower().endswith(".zst"):
                import pyarrow

                yield io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
            else:
                yield raw
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, EOFError) or str(error) == "Truncated compressed stream":  # of gzip and pyarrow
            raise file_error(path, "the compressed file is truncated", "copy or download it again") from error
        what = getattr(error, "strerror", None) or str(error)
        raise file_error(path, f"cannot be read: {what}", "copy it again, or allow this user to read it") from error


def _detect_encoding(path: str, stream: io.BufferedReader, requested: str) -> str:
    """Return the encoding of the byte-order mark, else the requested one. Raises DataError if the file is not text."""
    try:
        b"    ".decode(requested)  # not b"", for which Python does not look up the codec
    except UnicodeDecodeError:
        pass  # the codec exists; four spaces are not valid UTF-32
    except (LookupError, ValueError) as error:
        what = f"--data.encoding {requested}: not a text encoding"
        raise DataError(what, fix="try utf-8, cp1252 or latin-1") from error
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
    """Yield the number (from 1) of each line, and the line with its line end, or the error if it cannot be decoded.

    Lines end at \\n only. A byte-order mark overrides `encoding`. Raises DataError.
    """
    with _open_decompressed(path) as stream:
        name = _detect_encoding(path, stream, encoding)
        if codecs.lookup(name).name.startswith(("utf-16", "utf-32")):
            yield from _read_wide_lines(path, stream, name)
            return
        for number, raw in enumerate(stream, 1):
            try:
                text: str | UnicodeDecodeError = raw.decode(name)
            except UnicodeDecodeError as error:
                error.encoding = name if error.encoding == "charmap" else error.encoding
                text = error
            yield number, text
            name = "utf-8" if name == "utf-8-sig" else name  # only the first line has the mark


def _read_wide_lines(path: str, stream: io.BufferedReader, name: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-16 or UTF-32 file, which is decoded before it is split. Raises DataError."""
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
            raise file_error(path, _decode_message(text), _encoding_fix(text), number)
        parts.append(text)
    return "".join(parts)


def read_decoded_lines(name: str, path: str, encoding: str, errors: list[RowError]) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line. Lines that cannot be decoded are appended to `errors`."""
    for number, text in read_lines(path, encoding):
        if isinstance(text, UnicodeDecodeError):
            errors.append(encoding_error(name, number, text))
        else:
            yield number, text


def encoding_error(name: str, number: int, error: UnicodeDecodeError) -> RowError:
    return RowError("encoding", Location(name, number, f"{_decode_message(error)}; {_encoding_fix(error)}"))


def _encoding_fix(error: UnicodeDecodeError) -> str:
    """Return the fix. cp1252 is named first, because latin-1 decodes its bytes 0x80 to 0x9F to control characters."""
    return "set --data.encoding" + (", such as cp1252 or latin-1" if error.encoding == "utf-8" else " to another one")
