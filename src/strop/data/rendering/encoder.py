"""Encode texts to token ids, convert character spans to token spans, and escape control tokens in user text."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from strop.data.row_errors import RenderError
from strop.data.types import Ids, Message


class ControlText:
    """Escape control tokens in user text as private-use characters, one for each token.

    `mask` escapes user text before it is rendered. In the rendered text, `swap` then restores user text, and replaces
    the control tokens that the template wrote with private-use characters.
    """

    FIRST = 0xF0000  # start of supplementary private use area A

    def __init__(self, tokens: Sequence[str]) -> None:
        assert len(tokens) < 0xFFFE, "more control tokens than private characters"
        self.private = {token: chr(self.FIRST + i) for i, token in enumerate(tokens)}
        self._swapped = {**self.private, **{mark: token for token, mark in self.private.items()}}
        longest_first = sorted(self.private, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.marks = re.compile(f"[{chr(self.FIRST)}-{chr(self.FIRST + max(len(tokens) - 1, 0))}]")
        self._either = re.compile(f"{self.pattern.pattern}|{self.marks.pattern}")

    def occurs_in(self, value: Any) -> bool:
        """Return whether any string of `value` contains a control token."""
        if isinstance(value, str):
            return self.pattern.search(value) is not None
        if isinstance(value, Message):
            fields = (value.reasoning, value.tool_calls, value.name, value.call_id)
            return self.pattern.search(value.content) is not None or (any(fields) and self.occurs_in(fields))
        if isinstance(value, dict):
            return any(self.occurs_in(item) for item in (*value.keys(), *value.values()))
        return isinstance(value, (list, tuple)) and any(self.occurs_in(item) for item in value)

    def mask(self, value: Any) -> Any:
        """Replace each control token in the strings of `value` with its private-use character. Raises RenderError."""
        if isinstance(value, str):
            if self.marks.search(value):
                raise RenderError("control-token", "the row also contains private-use characters")
            return self.pattern.sub(lambda match: self.private[match[0]], value)
        if isinstance(value, dict):
            return {self.mask(key): self.mask(item) for key, item in value.items()}
        return [self.mask(item) for item in value] if isinstance(value, (list, tuple)) else value

    def swap(self, text: str) -> str:
        return self._either.sub(lambda match: self._swapped[match[0]], text)


class TokenStraddlesPrompt(Exception):
    """Raised when a token covers the end of a prompt and the start of an answer."""


class Encoder:
    """Encode texts, and convert spans of characters to spans of tokens.

    private: treat private-use characters as control tokens, and the names of control tokens as plain text. `true_ids`
    converts the resulting ids to those of the original tokenizer.
    """

    def __init__(self, tokenizer: Any, control: ControlText, *, private: bool = False) -> None:
        names = control.private if private else {}
        added: dict[str, int] = tokenizer.added_tokens_encoder
        self._pattern = control.marks if private else control.pattern
        self._is_control = np.zeros(max(tokenizer.get_vocab().values()) + 1, np.bool_)  # by id
        self._is_control[[added[token] for token in control.private]] = True
        self._true_ids: dict[int, int] = {}  # id of the modified tokenizer -> id of the original one
        self._forbidden: frozenset[int] = frozenset()
        self._tails: dict[str, list[int]] = {}  # cache of _encode_tail
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        if private:
            state = json.loads(self._backend.to_str())
            for token in state["added_tokens"]:
                token["content"] = names.get(token["content"], token["content"])
            self._backend = Tokenizer.from_str(json.dumps(state))
            true_ids = {self._backend.token_to_id(names.get(token, token)): i for token, i in added.items()}
            self._true_ids = {private_id: i for private_id, i in true_ids.items() if private_id is not None}
            self._forbidden = frozenset(added[token] for token in names) - self._true_ids.keys()

    def encode(self, texts: list[str]) -> list[list[int]]:
        # The backend is shared with transformers, which may have changed these settings. They are only reset if needed:
        # setting them while another thread encodes raises "Already borrowed".
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.encode_special_tokens:
            self._backend.encode_special_tokens = False
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_continuation(self, text: str) -> list[int]:
        """Encode a text that follows other text, without the space that some tokenizers insert before a text."""
        ids = self.encode([text])[0]
        if self._backend.decode(ids, skip_special_tokens=False) == text:
            return ids
        for prefix in ("\n", "a", "1"):
            prefix_ids, combined = self.encode([prefix, prefix + text])
            if combined[: len(prefix_ids)] == prefix_ids:
                return combined[len(prefix_ids) :]
        return ids

    def true_ids(self, encoded: list[int]) -> Ids:
        """Convert ids to those of the original tokenizer. Raises RenderError if plain text became a control token."""
        if self._true_ids:
            if not self._forbidden.isdisjoint(encoded):
                raise RenderError("control-token", "the tokenizer makes the token from plain text")
            encoded = [self._true_ids.get(i, i) for i in encoded]
        return np.array(encoded, dtype=np.int32)

    def token_spans(
        self, text: str, ids: Ids, spans: Sequence[tuple[int, int, float]]
    ) -> Iterator[tuple[int, int, float]]:
        """Convert spans (start, end, weight) of characters to spans of tokens.

        Control tokens in the text are aligned with those in the ids. Tokenizers encode the text between control tokens
        separately, so the start of a span is found by encoding the text from the preceding control token to the span.
        Raises TokenStraddlesPrompt if a span does not start at a token, RenderError if it does not end with a control
        token.
        """
        if not spans:
            return
        matches = [*self._pattern.finditer(text)]
        positions = self._is_control[ids].nonzero()[0].tolist()
        if len(matches) != len(positions):
            raise RenderError("control-token")
        ends = [match.end() for match in matches]
        for start, end, weight in spans:
            k = bisect_right(ends, start) - 1  # the last control token before the span
            tail_start, first = (matches[k].start(), positions[k]) if k >= 0 else (0, 0)
            tail = self._encode_tail(text[tail_start:start])
            token_start = first + len(tail)
            if ids[first:token_start].tolist() != tail:
                raise TokenStraddlesPrompt
            last = bisect_right(ends, end) - 1
            if last < 0 or ends[last] != end:
                raise RenderError("no-stop-token")
            yield token_start, positions[last] + 1, weight

    def _encode_tail(self, tail: str) -> list[int]:
        """Encode the text between a control token and an answer: usually the generation prompt, so it is cached."""
        ids = self._tails.get(tail)
        if ids is None:
            ids = self.true_ids(self.encode([tail])[0]).tolist()
            if len(tail) < 200 and len(self._tails) < 1000:
                self._tails[tail] = ids
        return ids
