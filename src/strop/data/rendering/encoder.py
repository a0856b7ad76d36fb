"""Texts -> token ids, and the tokens of spans of a text."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from strop.data.rendering.encoder import ControlText
from strop.data.row_errors import RenderError
from strop.data.types import Ids


class Straddles(Exception):
    """A token covers the end of a prompt and the start of an answer."""


class Encoder:
    """Encodes texts whole, and finds the tokens of spans.

    private: know the control tokens by their private characters only, so that their ordinary names in a text
    are plain text; ids stay those of the tokenizer.
    """

    def __init__(self, tokenizer: Any, control: ControlText, *, private: bool = False) -> None:
        names = control.private if private else {}
        added: dict[str, int] = tokenizer.added_tokens_encoder
        self._pattern = control.marks if private else control.pattern  # control tokens as this encoder knows them
        self._is_control = np.zeros(max(tokenizer.get_vocab().values()) + 1, np.bool_)  # by id
        self._is_control[[added[token] for token in control.private]] = True
        self._true_ids: dict[int, int] = {}
        self._forbidden: frozenset[int] = frozenset()
        self._tails: dict[str, list[int]] = {}
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        if private:
            state = json.loads(self._backend.to_str())
            for token in state["added_tokens"]:
                token["content"] = names.get(token["content"], token["content"])
            self._backend = Tokenizer.from_str(json.dumps(state))
            true_ids = {self._backend.token_to_id(names.get(token, token)): i for token, i in added.items()}
            self._true_ids = {own: i for own, i in true_ids.items() if own is not None}
            self._forbidden = frozenset(added[token] for token in names) - self._true_ids.keys()

    def encode(self, texts: list[str]) -> list[list[int]]:
        # The backend is shared with transformers, whose calls leave their settings on it. Set only where it must
        # be: a change while another thread encodes raises "Already borrowed".
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.encode_special_tokens:
            self._backend.encode_special_tokens = False
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def continued(self, text: str) -> list[int]:
        """A text as the tokens that follow other text: nothing is put before it, as some tokenizers put a blank."""
        alone = self.encode([text])[0]
        if self._backend.decode(alone, skip_special_tokens=False) == text:
            return alone
        for before in ("\n", "a", "1"):
            lead, whole = self.encode([before, before + text])
            if whole[: len(lead)] == lead:
                return whole[len(lead) :]
        return alone

    def ids(self, encoded: list[int]) -> Ids:
        """The tokenizer's own ids. Raises RenderError where plain text became a control token."""
        if self._true_ids:
            if not self._forbidden.isdisjoint(encoded):
                raise RenderError("control-token", "the tokenizer makes the token from plain text")
            encoded = [self._true_ids.get(i, i) for i in encoded]
        return np.array(encoded, dtype=np.int32)

    def token_spans(
        self, text: str, ids: Ids, spans: Sequence[tuple[int, int, float]]
    ) -> Iterator[tuple[int, int, float]]:
        """Spans of characters as spans of tokens. Raises Straddles where a span does not begin with a token,
        RenderError where it does not end with a control token.

        The control tokens of the text are counted in the ids: a span ends with one, and it begins so many tokens
        after one as the text between encodes to. A tokenizer encodes the pieces between control tokens one by
        one, so a text up to there is, token for token, the beginning of the whole.
        """
        if not spans:
            return
        places = [(match.start(), match.end()) for match in self._pattern.finditer(text)]
        tokens = self._is_control[ids].nonzero()[0].tolist()
        if len(places) != len(tokens):
            raise RenderError("control-token")
        ends = [end for _, end in places]
        for start, end, weight in spans:
            before = bisect_right(ends, start)
            at, first = (places[before - 1][0], tokens[before - 1]) if before else (0, 0)
            tail = self._encode_tail(text[at:start])
            begin = first + len(tail)
            if ids[first:begin].tolist() != tail:
                raise Straddles
            last = bisect_right(ends, end) - 1
            if last < 0 or ends[last] != end:
                raise RenderError("no-stop-token")
            yield begin, tokens[last] + 1, weight

    def _encode_tail(self, tail: str) -> list[int]:
        """Text from a control token to an answer: nearly always the generation prompt, so it is remembered."""
        known = self._tails.get(tail)
        if known is None:
            known = self.ids(self.encode([tail])[0]).tolist()
            if len(tail) < 200 and len(self._tails) < 1000:
                self._tails[tail] = known
        return known


# ---- from strop.data.rendering.control_tokens ----
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
