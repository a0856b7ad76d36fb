"""Answers that must be JSON: tokens that would break it cannot come. Needs the package llguidance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from strop.engine.decode.sampling import Logits, Mask, NoToken
from strop.serve.guard import ApiError
from strop.serve.models import Served
from strop.serve.protocol import ResponseFormat


class Grammars:
    """Masks for requests with a response_format; each tokenizer is prepared once, in about a second."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._tokenizers: dict[int, Any] = {}

    def mask(self, served: Served, wanted: ResponseFormat | None) -> Mask | None:
        """None for text. Raises Refusal where the format cannot be guaranteed."""
        if wanted is None or wanted.type == "text":
            return None
        if find_spec("llguidance") is None:
            fix = "install llguidance beside strop (pip install llguidance)"
            raise ApiError(400, f"{wanted.type} cannot be guaranteed here: {fix}", param="response_format")
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        schema: dict[str, Any] = {"type": "object"}
        if wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise ApiError(400, "response_format.json_schema is missing", param="response_format")
            schema = wanted.json_schema.json_schema
        key = id(served.tokenizer)
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
            if key not in self._tokenizers:
                stops = list(served.ends)
                self._tokenizers[key] = from_tokenizer(served.tokenizer, n_vocab=self._vocabulary, eos_token=stops)
        except ValueError as error:
            raise ApiError(400, f"response_format: {str(error)[:300]}", param="response_format") from None
        fault = LLMatcher.validate_grammar(grammar, self._tokenizers[key])
        if fault:
            raise ApiError(400, f"response_format: {fault.splitlines()[0][:300]}", param="response_format")
        return _Grammar(LLMatcher(self._tokenizers[key], grammar))


class _Grammar:
    """What one answer may go on with."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._taken = matcher, 0

    def __call__(self, tokens: Sequence[int], scores: Logits) -> None:
        for token in tokens[self._taken :]:
            self._matcher.consume_token(token)
        self._taken = len(tokens)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(scores)].astype(bool)
        if self._matcher.is_error() or not allowed.any():  # it would allow the end of a turn, in the midst of JSON
            raise NoToken("format")
        scores[: len(allowed)][~allowed] = -np.inf
        scores[len(allowed) :] = -np.inf
