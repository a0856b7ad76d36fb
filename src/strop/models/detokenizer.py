"""Tokens as text, piece by piece: whole characters only, and nothing that may turn out to be a stop string.

And tokens one by one, as the bytes that they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 5  # tokens at the end of a prompt that the first word of an answer is decoded with


class Words:
    """The text of one answer. `stopped`: a stop string came; it and what follows are not shown.

    prompt: its ids, where the answer goes on with its text: the blank before the first word is shown then.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(prompt[-CONTEXT:])
        self._start, self._shown = 0, len(self._ids)  # decoded together from `start` on; given out up to `shown`
        if self._decode(self._shown).endswith(UNKNOWN):  # the answer may begin within a character
            self._ids, self._shown = [], 0
        self._held = ""
        self._length = 0
        self.stopped = False

    @property
    def length(self) -> int:
        """Whole characters of the tokens so far, given out or not."""
        new = self._decode(len(self._ids))[len(self._decode(self._shown)) :]
        return self._length + len(new.rstrip(UNKNOWN))

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        self._ids.append(token)
        before, now = self._decode(self._shown), self._decode(len(self._ids))
        if len(now) <= len(before) or now.endswith(UNKNOWN):  # a character that is not whole yet
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        self._length += len(now) - len(before)
        return self._certain(now[len(before) :])

    def end(self) -> str:
        """The rest, when no token follows."""
        rest = self._certain(self._decode(len(self._ids))[len(self._decode(self._shown)) :])
        held, self._held = self._held, ""
        return rest + ("" if self.stopped else held)

    def _decode(self, end: int) -> str:
        ids = self._ids[self._start : end]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _certain(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TokenBytes:
    """What tokens stand for in the midst of a text: with their blank; of a part of a character, that part."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._begin = len(self._decode(self._before))
        self._known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._found(token)
        return self._known[token]

    def _found(self, token: int) -> bytes:
        text = self._decode([*self._before, token])[self._begin :]
        if UNKNOWN not in text:
            return text.encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if single := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(single[1])
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        values = {character: byte for byte, character in bytes_to_unicode().items()}
        return bytes(values[character] for character in piece) if values.keys() >= set(piece) else text.encode()

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
