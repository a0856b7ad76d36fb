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
