"""What clients send and get: OpenAI's chat and completion objects, as far as they mean something here.

A parameter that is not listed is refused, and so is a value that would be ignored: what is accepted takes effect.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from strop.engine.decode.sampling import Token
from strop.models.tokenizer import TextStream, TokenBytes


def _in_words(words: str) -> WrapValidator:
    """Whatever is wrong with the value, its error is told in these words."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError("in_words", "{words}", {"words": words}) from None

    return WrapValidator(check)


Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stops = Annotated[
    Stop | Annotated[list[Stop], Field(max_length=16)] | None,
    _in_words("must be a text of 1 to 256 characters, or a list of at most 16 such texts"),
]
One = Annotated[Literal[1] | None, _in_words("only 1 is supported")]
Zero = Annotated[Annotated[float, Field(ge=0, le=0)] | None, _in_words("only 0 is supported")]
No = Annotated[Literal[False] | None, _in_words("only false is supported")]
TokenId = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: No = None


class JsonSchema(_Strict):
    name: str = ""
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # it always is


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Common(_Strict):
    """Fields of both kinds of request."""

    model: str = Field(description="An id that /v1/models lists.")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0: greedy. Default: the model's own.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: One = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Annotated[
        Annotated[dict[str, float], Field(max_length=0)] | None, _in_words("only an empty object is supported")
    ] = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Common):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = Field(None, description="Shown to the model by its chat template.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Values for the chat template, by the names that it reads: enable_thinking."
    )
    tool_choice: Annotated[Literal["auto", "none"] | None, _in_words('only "auto" and "none" are supported')] = None
    parallel_tool_calls: Annotated[Literal[True] | None, _in_words("only true is supported")] = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = None
    store: No = None


class CompletionRequest(Common):
    prompt: Annotated[
        str | Annotated[list[str], Field(min_length=1, max_length=1)] | Annotated[list[TokenId], Field(min_length=1)],
        _in_words("must be a text, a list of one text, or a list of token ids (several prompts: one request each)"),
    ]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: No = None
    best_of: One = None
    suffix: Annotated[None, _in_words("only null is supported")] = None


class Writer:
    """Writes the answer to one request: whole, or as chunks.

    chat: a chat or a plain completion. prompt: its ids. logprobs: whether tokens are told of.
    """

    def __init__(self, model: str, tokenizer: Any, prompt: Sequence[int], *, chat: bool, logprobs: bool) -> None:
        self._chat, self._logprobs = chat, logprobs
        self._bytes = TokenBytes(tokenizer)
        self._given = 0  # characters of the text
        self._words = TextStream(tokenizer, (), prompt)  # of a plain completion's tokens: where they begin in its text
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._kinds = (kind, kind + ".chunk" if chat else kind)

    def whole(self, text: str, tokens: Sequence[Token], end: str, usage: dict[str, Any]) -> dict[str, Any]:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        self._given += len(text)
        choice = {"index": 0, **said, "logprobs": self._told(tokens, end), "finish_reason": end}
        return {**self._head, "object": self._kinds[0], "choices": [choice], "usage": usage}

    def opening(self) -> dict[str, Any]:
        """The first chunk of a chat: whose turn it is."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, (), None)

    def chunk(self, text: str, tokens: Sequence[Token], end: str | None) -> dict[str, Any]:
        self._given += len(text)
        return self._chunk({"delta": {"content": text} if text else {}} if self._chat else {"text": text}, tokens, end)

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self._kinds[1], "choices": [], "usage": usage}

    def _chunk(self, said: dict[str, Any], tokens: Sequence[Token], end: str | None) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": self._told(tokens, end), "finish_reason": end}
        return {**self._head, "object": self._kinds[1], "choices": [choice]}

    def _told(self, tokens: Sequence[Token], end: str | None) -> dict[str, Any] | None:
        if not self._logprobs or not tokens:
            return None
        if self._chat:
            return {
                "content": [
                    {**self._one(token.id, token.logprob), "top_logprobs": [self._one(*top) for top in token.likeliest]}
                    for token in tokens
                ]
            }
        offsets = []
        for token in tokens:
            offsets.append(self._words.length)
            self._words.push(token.id)
        if end is not None:  # what a stop string took away has no place in the text
            offsets = [min(offset, self._given) for offset in offsets]
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._by_name(token.likeliest) for token in tokens],
            "text_offset": offsets,
        }

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": logprob, "bytes": list(self._bytes.of(token))}

    def _by_name(self, likeliest: Sequence[tuple[int, float]]) -> dict[str, float]:
        named: dict[str, float] = {}
        for token, logprob in likeliest:
            named.setdefault(self._name(token), logprob)  # of two tokens with one text the likelier
        return named

    def _name(self, token: int) -> str:
        """The token's text; of a part of a character its bytes, as OpenAI writes them."""
        raw = self._bytes.of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage(prompt_tokens: int, kept_tokens: int, new_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": kept_tokens},
    }
