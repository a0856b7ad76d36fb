"""Read JSON Lines, JSON arrays and `{"data": [...]}` as rows, with a strict JSON parser.

JSON Lines are streamed. A file with a single JSON value is read into memory as text.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from strop.data.reading.files import COLUMN_NAMES, read_decoded_lines, read_text
from strop.data.row_errors import RowError, file_error
from strop.data.types import Row
from strop.errors import DataError, Location

# RFC 8259 without extensions: no NaN, no duplicate keys, no lone surrogates. Python's parser accepts all three. Its C
# scanner calls the hooks below, so they cost little.

FIRST_LINES = 5  # nonblank lines of a plain text file that show whether it is JSON Lines
BLANK = " \t\r\n"  # whitespace in JSON; str.strip() without an argument also removes U+2028 and U+001C


class JsonError(ValueError):
    """Raised for invalid JSON. code: a key of READING_REASONS. pos: offset in the text, None if unknown."""

    def __init__(self, code: str, what: str, pos: int | None = None) -> None:
        super().__init__(what)
        self.code, self.what, self.pos = code, what, pos


def _check_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise JsonError("duplicate-key", f"the key {duplicate[:40]!r} is duplicated in one object")
    return value


def _reject_constant(name: str) -> Any:
    raise JsonError("not-json-number", f"{name} is not a JSON number")


def _parse_finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError("not-json-number", f"{digits[:40]} is too large for a float")
    return value


_strict = json.JSONDecoder(
    object_pairs_hook=_check_unique_keys, parse_constant=_reject_constant, parse_float=_parse_finite_float
).raw_decode
_lenient = json.JSONDecoder().raw_decode


def _parse_at(text: str, pos: int = 0, *, strict: bool = True) -> tuple[Any, int]:
    """Return the JSON value that starts at `pos` and the offset after it. Raises JsonError."""
    try:
        value, end = (_strict if strict else _lenient)(text, pos)
    except json.JSONDecodeError as error:
        # For a string or escape that is cut off by the end of the text, the scanner reports where it starts.
        truncated = error.pos >= len(text.rstrip(BLANK)) or error.msg.startswith(("Unterminated", "Invalid \\u"))
        code = "truncated" if truncated else "broken-json"
        problem = error.msg.removesuffix(" at").removesuffix(" starting")
        if text[error.pos : error.pos + 1] == "'":
            problem += ", not single ones (of a Python dict: write it with json.dumps)"
        raise JsonError(code, f"not valid JSON: {problem}", error.pos) from error
    except RecursionError as error:
        raise JsonError("broken-json", "not valid JSON: nested too deep", pos) from error
    except ValueError as error:
        if isinstance(error, JsonError):
            raise
        raise JsonError("broken-json", f"not a usable number: {error}", pos) from error  # int() of > 4300 digits
    if strict and (text.find("\\ud", pos, end) >= 0 or text.find("\\uD", pos, end) >= 0):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            what = "half of a surrogate pair (\\ud800 to \\udfff) is not a character"
            raise JsonError("lone-surrogate", what) from error
    return value, end


def loads(text: str) -> Any:
    """Parse `text` as one JSON value. Raises JsonError."""
    start = len(text) - len(text.lstrip(BLANK))
    value, end = _parse_at(text, start)
    if text[end:].strip(BLANK):
        raise JsonError("broken-json", "not valid JSON: extra text after the value", end)
    return value


def read_json(name: str, path: str, encoding: str, columns: Mapping[str, str], errors: list[RowError]) -> Iterator[Row]:
    """Yield the rows of a JSON file; append errors of single rows to `errors`. Raises DataError if it is not JSON."""
    known_columns = {*COLUMN_NAMES, *columns.values()}
    nonblank_lines = (text for _, text in read_decoded_lines(name, path, encoding, []) if text.strip(BLANK))
    if _is_single_value([*islice(nonblank_lines, 2)], path, known_columns):
        yield from _read_single_value(name, read_text(path, encoding), known_columns, errors)
        return
    for number, text in read_decoded_lines(name, path, encoding, errors):
        line = text.strip(BLANK)
        if not line:
            continue
        try:
            value, end = _parse_at(line)
            if line[end:].strip(BLANK) == ",":
                raise JsonError("trailing-comma", "a comma after the row: JSON Lines has no commas between rows", end)
            if end < len(line):
                what = "extra text after the object: JSON Lines has one object a line"
                raise JsonError("broken-json", what, end)
        except JsonError as error:
            errors.append(_line_error(name, number, text, error))
            continue
        yield from _to_row(name, number, value, errors)


def check_no_json_lines(name: str, path: str, encoding: str) -> None:
    """Raise DataError if the first lines of a plain text file are JSON objects. Other text may begin with `{` too."""
    lines = (text for _, text in read_decoded_lines(name, path, encoding, []) if text.strip(BLANK))
    first = [*islice(lines, FIRST_LINES)]
    if first and all(map(_is_object, first)):
        new_name = re.sub(r"\.txt(?=(\.\w+)?$)", ".jsonl", os.path.basename(path), flags=re.IGNORECASE)
        fix = f"rename it to {new_name}, or give --data.format document to train on the whole file as text"
        raise file_error(name, "JSON Lines in a file for plain text", fix)


def _is_object(text: str) -> bool:
    try:
        return bool(value := loads(text)) and isinstance(value, dict)
    except JsonError:
        return False


def _line_error(name: str, number: int, text: str, error: JsonError) -> RowError:
    code, what = error.code, error.what
    if code == "truncated":
        if text.endswith("\n"):
            code = "broken-json"
        else:
            what = f"the file is truncated in the middle of this line ({what})"
    indent = len(text) - len(text.lstrip(BLANK))
    column = "" if error.pos is None else f"column {error.pos + indent + 1}: "
    return RowError(code, Location(name, number, column + what))


def _to_row(name: str, number: int, value: Any, errors: list[RowError]) -> Iterator[Row]:
    """Yield the value as a row if it is an object; otherwise append an error."""
    if isinstance(value, dict):
        yield Row(name, number, value)
    else:
        kinds = {list: "an array", str: "a string", type(None): "null", bool: "true or false"}
        kind = kinds.get(type(value), "a number")
        errors.append(RowError("not-an-object", Location(name, number, f"the row is {kind}, not an object")))


def _is_single_value(first_lines: list[str], path: str, known_columns: set[str]) -> bool:
    """Return whether a file is a single JSON value instead of JSON Lines, judging by its first two nonblank lines."""
    first = first_lines[0].strip(BLANK) if first_lines else ""
    if not first.startswith("{"):
        return first.startswith("[")
    try:
        value, _ = _parse_at(first, strict=False)
    except JsonError:
        stem, suffix = os.path.splitext(path.lower())
        return first == "{" or ".json" in (suffix, os.path.splitext(stem)[1])
    return len(first_lines) == 1 and not known_columns & set(value) and any(map(_is_row_list, value.values()))


def _is_row_list(value: Any) -> bool:
    return isinstance(value, list) and (not value or any(isinstance(item, dict) for item in value))


def _read_single_value(name: str, text: str, known_columns: set[str], errors: list[RowError]) -> Iterator[Row]:
    start = _skip_blank(text, 0)
    if text[start] == "[":
        yield from _read_array(name, text, start, errors)
        return
    members, end = _parse_members(name, text, start)
    if _skip_blank(text, end) < len(text):
        what = "several JSON values that are not on separate lines"
        raise _syntax_error(name, text, end, what, "write one object a line (jq -c)")
    lists = [(key, pos) for key, (pos, value) in members.items() if _is_row_list(value)]
    if known_columns & set(members) or not lists:
        value = {key: value for key, (_, value) in members.items()}
        yield from _to_row(name, text.count("\n", 0, start) + 1, value, errors)
    elif len(lists) > 1:
        keys = ", ".join(key for key, _ in lists)
        fix = "keep one list, or write one file for each"
        raise file_error(name, f"one object with several lists of rows: {keys}", fix)
    else:
        yield from _read_array(name, text, lists[0][1], errors, is_whole_file=False)


def _parse_members(name: str, text: str, pos: int) -> tuple[dict[str, tuple[int, Any]], int]:
    """Return the members of the object at `pos`, key -> (offset of the value, value), and the offset after it."""
    members: dict[str, tuple[int, Any]] = {}
    end = _find_end(name, text, pos)  # NaN and duplicate keys are reported when the row is read
    pos = _skip_blank(text, pos + 1)
    while text[pos] != "}":
        key, pos = _parse_at(text, pos, strict=False)
        start = _skip_blank(text, _skip_blank(text, pos) + 1)
        value, pos = _parse_at(text, start, strict=False)
        members[key] = (start, value)
        pos = _skip_blank(text, pos)
        pos = _skip_blank(text, pos + 1) if text[pos] == "," else pos
    return members, end


def _read_array(name: str, text: str, pos: int, errors: list[RowError], *, is_whole_file: bool = True) -> Iterator[Row]:
    """Yield the rows of the array at `pos`. A row's number is its line, or its index from 1 in a one-line array."""
    newline = text.find("\n", pos)
    on_one_line = newline < 0 or _skip_blank(text, newline) == len(text)
    line, previous = 0 if on_one_line else 1, 0
    pos = _skip_blank(text, pos + 1)
    while text[pos : pos + 1] != "]":
        line, previous = line + (1 if on_one_line else text.count("\n", previous, pos)), pos
        try:
            value, end = _parse_at(text, pos)
            yield from _to_row(name, line, value, errors)
        except JsonError as error:
            if error.pos is not None:
                raise _syntax_error(name, text, error.pos, error.what) from error
            errors.append(RowError(error.code, Location(name, line, error.what)))
            end = _find_end(name, text, pos)
        pos = _skip_blank(text, end)
        if text[pos : pos + 1] == ",":
            comma, pos = pos, _skip_blank(text, pos + 1)
            if text[pos : pos + 1] == "]":
                raise _syntax_error(name, text, comma, "a comma after the last row", "remove it")
        elif text[pos : pos + 1] != "]":
            what = "a comma is missing between two rows" if pos < len(text) else "the array is not closed"
            raise _syntax_error(name, text, pos, what)
    if is_whole_file and _skip_blank(text, pos + 1) < len(text):
        raise _syntax_error(name, text, _skip_blank(text, pos + 1), "extra text after the array")


def _find_end(name: str, text: str, pos: int) -> int:
    """Return the offset after the value at `pos`. Raises DataError if it is invalid."""
    try:
        return _parse_at(text, pos, strict=False)[1]
    except JsonError as error:
        raise _syntax_error(name, text, error.pos or pos, error.what) from error


def _skip_blank(text: str, pos: int) -> int:
    while text[pos : pos + 1] in BLANK and pos < len(text):
        pos += 1
    return pos


def _syntax_error(name: str, text: str, pos: int, what: str, fix: str = "") -> DataError:
    column = pos - text.rfind("\n", 0, pos)
    if pos >= len(text.rstrip(BLANK)):
        what, fix = f"the file is truncated ({what})", fix or "copy or download it again"
    return file_error(name, f"column {column}: {what}", fix or "repair the file", text.count("\n", 0, pos) + 1)
