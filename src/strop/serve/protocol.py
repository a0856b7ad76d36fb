"""OpenAI's request and response objects for chat and plain completions.

Unknown parameters and values that would have no effect are rejected.
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from strop.engine.decode.sampling import Token
from strop.models.tokenizer import TextStream, TokenBytes


def fail_with(message: str) -> WrapValidator:
    """Replace every validation error of a field with this message."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError("invalid_value", "{message}", {"message": message}) from None

    return WrapValidator(check)


Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stops = Annotated[
    Stop | Annotated[list[Stop], Field(max_length=16)] | None,
    fail_with("must be a string of 1 to 256 characters, or a list of at most 16 such strings"),
]
NO_EFFECT = "no effect"  # marks parameters that accept only values without effect
OnlyOne = Annotated[Literal[1] | None, fail_with("only 1 is supported"), NO_EFFECT]
OnlyZero = Annotated[Annotated[float, Field(ge=0, le=0)] | None, fail_with("only 0 is supported"), NO_EFFECT]
OnlyFalse = Annotated[Literal[False] | None, fail_with("only false is supported"), NO_EFFECT]
EmptyDict = Annotated[
    Annotated[dict[str, float], Field(max_length=0)] | None, fail_with("only an empty object is supported"), NO_EFFECT
]
OnlyAuto = Annotated[Literal["auto", "none"] | None, fail_with('only "auto" and "none" are supported')]
TokenId = Annotated[int, Field(ge=0)]


class StrictBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(StrictBody):
    include_usage: bool = False
    include_obfuscation: OnlyFalse = None


class JsonSchema(StrictBody):
    name: str = ""
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # accepted, because the output always follows the schema


class ResponseFormat(StrictBody):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class CommonRequest(StrictBody):
    model: str = Field(description="An id from /v1/models.")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(
        None, ge=0, le=2, description="0 is greedy. Default: the model's generation config."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(
        None, ge=0, description="0 samples from all tokens. As in vLLM, not a parameter of OpenAI."
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="1 is none; it applies to greedy answers too. As in vLLM, not one of OpenAI."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: OnlyOne = None
    presence_penalty: OnlyZero = None
    frequency_penalty: OnlyZero = None
    logit_bias: EmptyDict = None
    user: str | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(CommonRequest):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = Field(None, description="Shown to the model by its chat template.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the chat template, for example enable_thinking."
    )
    tool_choice: OnlyAuto = None
    parallel_tool_calls: Annotated[Literal[True] | None, fail_with("only true is supported")] = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = None
    store: OnlyFalse = None


class CompletionRequest(CommonRequest):
    prompt: Annotated[
        str | Annotated[list[str], Field(min_length=1, max_length=1)] | Annotated[list[TokenId], Field(min_length=1)],
        fail_with("must be a string, a list of one string, or a list of token ids; send one prompt per request"),
    ]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: OnlyFalse = None
    best_of: OnlyOne = None
    suffix: Annotated[None, fail_with("only null is supported")] = None


class ResponseWriter:
    """Creates the response to one request, or the chunks of a stream.

    prompt: token ids. chat: whether the response is a chat completion. logprobs: whether to include log-probabilities.
    """

    def __init__(self, model: str, tokenizer: Any, prompt: Sequence[int], *, chat: bool, logprobs: bool) -> None:
        self._chat, self._logprobs = chat, logprobs
        self._bytes = TokenBytes(tokenizer)
        self._text_length = 0
        self._detokenizer = TextStream(tokenizer, (), prompt)  # computes `text_offset` of plain completions
        self._partial, self._partial_offset = b"", 0  # bytes of a character that the next token may complete
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._common_fields = {"id": request_id, "created": int(time.time()), "model": model}
        self._object = "chat.completion" if chat else "text_completion"
        self._chunk_object = "chat.completion.chunk" if chat else "text_completion"

    def response(self, text: str, tokens: Sequence[Token], finish_reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        self._text_length += len(text)
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = self._choice(content, tokens, finish_reason)
        return {**self._common_fields, "object": self._object, "choices": [choice], "usage": usage}

    def first_chunk(self) -> dict[str, Any]:
        """Return the first chunk of a chat completion, which contains the role."""
        return self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, (), None)])

    def chunk(self, text: str, tokens: Sequence[Token], finish_reason: str | None) -> dict[str, Any]:
        self._text_length += len(text)
        content: dict[str, Any] = {"delta": {"content": text} if text else {}} if self._chat else {"text": text}
        return self._chunk([self._choice(content, tokens, finish_reason)])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common_fields, "object": self._chunk_object, "choices": choices}

    def _choice(self, content: dict[str, Any], tokens: Sequence[Token], finish_reason: str | None) -> dict[str, Any]:
        logprobs = self._format_logprobs(tokens, finish_reason)
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _format_logprobs(self, tokens: Sequence[Token], finish_reason: str | None) -> dict[str, Any] | None:
        if not self._logprobs or not tokens:
            return None
        if self._chat:
            content = [self._chat_logprob(token.id, token.logprob) for token in tokens]
            for entry, token in zip(content, tokens, strict=True):
                entry["top_logprobs"] = [self._chat_logprob(*alternative) for alternative in token.top_logprobs]
            return {"content": content}
        offsets = [self._push(token.id) for token in tokens]
        if finish_reason is not None:  # the text does not contain the tokens of a stop string
            offsets = [min(offset, self._text_length) for offset in offsets]
        return {
            "tokens": [self._token_text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._by_text(token.top_logprobs) for token in tokens],
            "text_offset": offsets,
        }

    def _push(self, token: int) -> int:
        """Add a token, and return the offset of its text or, if it completes a character, of this character."""
        raw, offset = self._bytes.decode(token), self._detokenizer.offset
        if _is_utf8(self._partial + raw[:1]):
            offset = self._partial_offset if self._partial else offset
            raw = self._partial + raw
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._partial_offset = offset + len(decoder.decode(raw))
        self._partial = decoder.getstate()[0]
        self._detokenizer.push(token)
        return offset

    def _chat_logprob(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._token_text(token), "logprob": logprob, "bytes": list(self._bytes.decode(token))}

    def _by_text(self, top_logprobs: Sequence[tuple[int, float]]) -> dict[str, float]:
        by_text: dict[str, float] = {}
        for token, logprob in top_logprobs:
            by_text.setdefault(self._token_text(token), logprob)  # of tokens with the same text, keep the likeliest
        return by_text

    def _token_text(self, token: int) -> str:
        """Return the text of a token, or its bytes in OpenAI's notation if they are an incomplete character."""
        raw = self._bytes.decode(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage(prompt_tokens: int, cached_tokens: int, new_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _is_utf8(data: bytes) -> bool:
    """Return whether data is valid UTF-8, whose last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return True
