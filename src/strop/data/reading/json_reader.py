"""JSON Lines, JSON arrays and `{"data": [...]}` -> rows. JSON Lines are streamed; one JSON value is held as text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from strop.data.reading.files import COLUMN_NAMES, RowFault, refuse, texts, whole
from strop.data.reading.json_reader import BLANK, Refused, scan
from strop.data.types import Row
from strop.errors import DataError, Where


def rows(name: str, path: str, encoding: str, columns: Mapping[str, str], bad: list[RowFault]) -> Iterator[Row]:
    known = {*COLUMN_NAMES, *columns.values()}
    top = islice((text for _, text in texts(name, path, encoding, []) if text.strip(BLANK)), 2)
    if _is_document(list(top), path, known):
        yield from _document_rows(name, whole(path, encoding), known, bad)
        return
    for number, text in texts(name, path, encoding, bad):
        line = text.strip(BLANK)
        if not line:
            continue
        try:
            value, end = scan(line)
            if line[end:].strip(BLANK) == ",":
                raise Refused("trailing-comma", "a comma behind the row: JSON Lines has no commas between rows", end)
            if end < len(line):
                raise Refused("broken-json", "something follows the object: JSON Lines has one object a line", end)
        except Refused as error:
            bad.append(RowFault(*_line_fault(name, number, text, error)))
            continue
        yield from _row(name, number, value, bad)


def _line_fault(name: str, number: int, text: str, error: Refused) -> tuple[str, Where]:
    code, what = error.code, error.what
    if code == "truncated":
        if text.endswith("\n"):
            code = "broken-json"
        else:
            what = f"the file is cut off in the middle of this line ({what})"
    indent = len(text) - len(text.lstrip(BLANK))
    column = "" if error.pos is None else f"column {error.pos + indent + 1}: "
    return code, Where(name, number, column + what)


def _row(name: str, number: int, value: Any, bad: list[RowFault]) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(name, number, value)
    else:
        kind = {list: "an array", str: "a string", type(None): "null", bool: "true or false"}.get(
            type(value), "a number"
        )
        bad.append(RowFault("not-an-object", Where(name, number, f"the row is {kind}, not an object")))


# --- a JSON file that is one value -------------------------------------------------------------------------------


def _is_document(top: list[str], path: str, known: set[str]) -> bool:
    """Whether a file that starts with these lines (the first two that are not blank) is one JSON value."""
    first = top[0].strip(BLANK) if top else ""
    if not first.startswith("{"):
        return first.startswith("[")
    try:
        value, _ = scan(first, strict=False)
    except Refused:
        stem, suffix = os.path.splitext(path.lower())
        return first == "{" or ".json" in (suffix, os.path.splitext(stem)[1])
    return len(top) == 1 and not known & set(value) and any(map(_is_rows, value.values()))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and (not value or any(isinstance(item, dict) for item in value))


def _document_rows(name: str, text: str, known: set[str], bad: list[RowFault]) -> Iterator[Row]:
    start = _skip(text, 0)
    if text[start] == "[":
        yield from _elements(name, text, start, bad)
        return
    members, end = _members(name, text, start)
    if _skip(text, end) < len(text):
        raise _broken(name, text, end, "several JSON values that are not one a line", "write one object a line (jq -c)")
    lists = [(key, at) for key, (at, value) in members.items() if _is_rows(value)]
    if known & set(members) or not lists:
        value = {key: value for key, (_, value) in members.items()}
        yield from _row(name, text.count("\n", 0, start) + 1, value, bad)
    elif len(lists) > 1:
        keys = ", ".join(key for key, _ in lists)
        raise refuse(
            name, f"one object with several lists of rows: {keys}", "keep one list, or write one file for each"
        )
    else:
        yield from _elements(name, text, lists[0][1], bad, to_end=False)


def _members(name: str, text: str, pos: int) -> tuple[dict[str, tuple[int, Any]], int]:
    """The members of the object at `pos`, key -> (offset of the value, value), and the offset behind it."""
    members: dict[str, tuple[int, Any]] = {}
    end = _end_of(name, text, pos)  # a NaN or a key that stands twice is named when its row is read
    pos = _skip(text, pos + 1)
    while text[pos] != "}":
        key, pos = scan(text, pos, strict=False)
        at = _skip(text, _skip(text, pos) + 1)
        value, pos = scan(text, at, strict=False)
        members[key] = (at, value)
        pos = _skip(text, pos)
        pos = _skip(text, pos + 1) if text[pos] == "," else pos
    return members, end


def _elements(name: str, text: str, pos: int, bad: list[RowFault], *, to_end: bool = True) -> Iterator[Row]:
    """The rows of the array at `pos`, each with the line on which it starts; all on one line: with its number."""
    newline = text.find("\n", pos)
    numbered = newline < 0 or _skip(text, newline) == len(text)
    line, counted = 0 if numbered else 1, 0
    pos = _skip(text, pos + 1)
    while text[pos : pos + 1] != "]":
        line, counted = line + (1 if numbered else text.count("\n", counted, pos)), pos
        try:
            value, end = scan(text, pos)
            yield from _row(name, line, value, bad)
        except Refused as error:
            if error.pos is not None:
                raise _broken(name, text, error.pos, error.what) from error
            bad.append(RowFault(error.code, Where(name, line, error.what)))
            end = _end_of(name, text, pos)
        pos = _skip(text, end)
        if text[pos : pos + 1] == ",":
            comma, pos = pos, _skip(text, pos + 1)
            if text[pos : pos + 1] == "]":
                raise _broken(name, text, comma, "a comma behind the last row", "remove it")
        elif text[pos : pos + 1] != "]":
            what = "a comma is missing between two rows" if pos < len(text) else "the array is not closed"
            raise _broken(name, text, pos, what)
    if to_end and _skip(text, pos + 1) < len(text):
        raise _broken(name, text, _skip(text, pos + 1), "something follows the array")


def _end_of(name: str, text: str, pos: int) -> int:
    """The offset behind the value at `pos`. Raises DataError where it is broken."""
    try:
        return scan(text, pos, strict=False)[1]
    except Refused as error:
        raise _broken(name, text, error.pos or pos, error.what) from error


def _skip(text: str, pos: int) -> int:
    while text[pos : pos + 1] in BLANK and pos < len(text):
        pos += 1
    return pos


def _broken(name: str, text: str, pos: int, what: str, fix: str = "") -> DataError:
    column = pos - text.rfind("\n", 0, pos)
    if pos >= len(text.rstrip(BLANK)):
        what, fix = f"the file is cut off ({what})", fix or "copy or download it again"
    return refuse(name, f"column {column}: {what}", fix or "repair the file", text.count("\n", 0, pos) + 1)


# ---- from strop.data.reading.strictjson ----
"""JSON as RFC 8259 says it, and no more: no NaN, no duplicate keys, no lone surrogates.

Python's own parser takes all three; the hooks below cost little, since its C scanner calls them.
"""

from __future__ import annotations

import json
from typing import Any

BLANK = " \t\r\n"  # JSON's white space; str.strip() alone would also take U+2028 and U+001C


class Refused(ValueError):
    """`what` is wrong, `code` its reason, `pos` the offset into the text (None: somewhere in the value)."""

    def __init__(self, code: str, what: str, pos: int | None = None) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.pos = pos


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Refused("duplicate-key", f"the key {twice[:40]!r} stands twice in one object")
    return value


def _constant(name: str) -> Any:
    raise Refused("not-json-number", f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if value - value != 0:
        raise Refused("not-json-number", f"{digits[:40]} is beyond what a float holds")
    return value


_strict = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite).raw_decode
_lenient = json.JSONDecoder().raw_decode


def scan(text: str, pos: int = 0, *, strict: bool = True) -> tuple[Any, int]:
    """The JSON value that starts at `pos` and the offset behind it. Raises Refused."""
    try:
        value, end = (_strict if strict else _lenient)(text, pos)
    except json.JSONDecodeError as error:
        # An escape or a string that runs to the end of the text was cut off; the scanner names its start.
        cut = error.pos >= len(text.rstrip(BLANK)) or error.msg.startswith(("Unterminated", "Invalid \\u"))
        code = "truncated" if cut else "broken-json"
        raise Refused(code, f"not valid JSON: {error.msg}", error.pos) from error
    except RecursionError as error:
        raise Refused("broken-json", "not valid JSON: nested too deep", pos) from error
    except ValueError as error:
        if isinstance(error, Refused):
            raise
        raise Refused("broken-json", f"not a usable number: {error}", pos) from error  # int() of > 4300 digits
    if strict and (text.find("\\ud", pos, end) >= 0 or text.find("\\uD", pos, end) >= 0):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise Refused(
                "lone-surrogate", "half of a surrogate pair (\\ud800 to \\udfff) is not a character"
            ) from error
    return value, end


def loads(text: str) -> Any:
    """The one JSON value that is `text`. Raises Refused."""
    start = len(text) - len(text.lstrip(BLANK))
    value, end = scan(text, start)
    if text[end:].strip(BLANK):
        raise Refused("broken-json", "not valid JSON: something follows the value", end)
    return value
