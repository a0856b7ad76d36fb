"""Control tokens as text: where a template writes them, and where a person wrote what looks like one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from strop.data.row_errors import RenderError
from strop.data.types import Message


class ControlText:
    """Control tokens, and the private characters that stand for them where they are mere text.

    `swap` exchanges the two: what the template wrote becomes private characters, what a person wrote its own text.
    """

    FIRST = 0xF0000  # supplementary private use area A

    def __init__(self, tokens: Sequence[str]) -> None:
        assert len(tokens) < 0xFFFE, "more control tokens than private characters"
        self.private = {token: chr(self.FIRST + i) for i, token in enumerate(tokens)}
        self._swapped = {**self.private, **{mark: token for token, mark in self.private.items()}}
        longest_first = sorted(self.private, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.marks = re.compile(f"[{chr(self.FIRST)}-{chr(self.FIRST + max(len(tokens) - 1, 0))}]")
        self._either = re.compile(f"{self.pattern.pattern}|{self.marks.pattern}")

    def found(self, value: Any) -> bool:
        """Is there a control token in any string of `value`?"""
        if isinstance(value, str):
            return self.pattern.search(value) is not None
        if isinstance(value, Message):
            rest = (value.reasoning, value.tool_calls, value.name, value.call_id)
            return self.pattern.search(value.content) is not None or (any(rest) and self.found(rest))
        return any(self.found(item) for item in _inner(value))

    def mask(self, value: Any) -> Any:
        """`value` with each control token in its strings replaced by its private character."""
        if isinstance(value, str):
            if self.marks.search(value):
                raise RenderError("control-token", "the row also holds private-use characters")
            return self.pattern.sub(lambda match: self.private[match[0]], value)
        if isinstance(value, dict):
            return {self.mask(key): self.mask(item) for key, item in value.items()}
        return [self.mask(item) for item in value] if isinstance(value, (list, tuple)) else value

    def swap(self, text: str) -> str:
        return self._either.sub(lambda match: self._swapped[match[0]], text)


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple)) else []
