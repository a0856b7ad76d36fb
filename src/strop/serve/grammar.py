"""Constrained decoding for response_format: masks tokens that would break the JSON. Needs the package llguidance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from strop.engine.decode.sampling import Logits, Mask, NoToken
from strop.serve.guard import ApiError
from strop.serve.models import ServedModel
from strop.serve.protocol import ResponseFormat


class Grammars:
    """Makes masks for requests with a response_format. Preparing a tokenizer takes about a second, once."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._tokenizers: dict[int, Any] = {}

    def mask(self, served: ServedModel, response_format: ResponseFormat | None) -> Mask | None:
        """Return the mask of a request; None for plain text. Raises ApiError if the format cannot be guaranteed."""
        if response_format is None or response_format.type == "text":
            return None
        if find_spec("llguidance") is None:
            message = f"response_format {response_format.type} needs llguidance on the server: pip install llguidance"
            raise ApiError(400, message, param="response_format")
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        schema: dict[str, Any] = {"type": "object"}
        if response_format.type == "json_schema":
            if response_format.json_schema is None:
                raise ApiError(400, "response_format.json_schema is missing", param="response_format")
            schema = response_format.json_schema.json_schema
        key = id(served.tokenizer)
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
            if key not in self._tokenizers:
                stop_ids = list(served.stop_ids)
                self._tokenizers[key] = from_tokenizer(served.tokenizer, n_vocab=self._vocabulary, eos_token=stop_ids)
        except ValueError as error:
            raise ApiError(400, f"response_format: {str(error)[:300]}", param="response_format") from None
        error_text = LLMatcher.validate_grammar(grammar, self._tokenizers[key])
        if error_text:
            raise ApiError(400, f"response_format: {error_text.splitlines()[0][:300]}", param="response_format")
        return _GrammarMask(LLMatcher(self._tokenizers[key], grammar))


class _GrammarMask:
    """The mask of one completion, which follows its tokens."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._num_consumed = matcher, 0

    def __call__(self, tokens: Sequence[int], scores: Logits) -> None:
        for token in tokens[self._num_consumed :]:
            self._matcher.consume_token(token)
        self._num_consumed = len(tokens)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(scores)].astype(bool)
        if self._matcher.is_error() or not allowed.any():  # in error it would allow the end, within incomplete JSON
            raise NoToken("format")
        scores[: len(allowed)][~allowed] = -np.inf
        scores[len(allowed) :] = -np.inf
