"""The traits of a chat template, as prober.py measures them, and the forms of input that it accepts.

Templates differ in the form of tools, calls, ids, arguments and reasoning. `InputFormat` converts a row to the form
that a template accepts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from strop.data.types import Message


@dataclass(frozen=True)
class InputFormat:
    """The forms of input that a template accepts.

    Attributes:
        tools: name of the variable with the tools.
        tools_as_text: whether tools are JSON in a string.
        no_tools: value of the variable without tools.
        arguments: of a call, an object or JSON in a string.
        ids: of calls: as the row has them (own), generated where it has none (made), or nine letters and digits as
            Mistral requires (nine).
        reasoning: in fields of the message, or in parts or blocks of its content.
        required: further variables without which the template does not render.
    """

    tools: str = "tools"
    tools_as_text: bool = False
    no_tools: Any = None
    arguments: Literal["object", "text"] = "object"
    ids: Literal["own", "made", "nine"] = "own"
    reasoning: Literal["fields", "parts", "blocks"] = "fields"
    required: dict[str, Any] = field(default_factory=dict)

    def variables(self, tools: Sequence[Any] | None) -> dict[str, Any]:
        """Return the template's variables for `tools`, which may be None or empty."""
        value = list(tools) if tools else self.required.get(self.tools, self.no_tools)
        if tools and self.tools_as_text:
            value = json.dumps(value, ensure_ascii=False)
        return {"tools": self.no_tools, **self.required, self.tools: value}

    def values(self, messages: Sequence[Message], *, reasoning: bool) -> list[dict[str, Any]]:
        """Return messages as the template reads them, with or without reasoning."""
        values = []
        open_calls: list[tuple[str | None, str]] = []  # id and name of calls without a result
        num_calls = 0
        reasoning = reasoning and any(message.reasoning for message in messages)
        for message in messages:
            value: dict[str, Any] = {"role": message.role, "content": message.content}
            if reasoning and message.role == "assistant" and (message.reasoning or self.reasoning == "blocks"):
                value |= self._reasoning_fields(message)
            if message.tool_calls:
                calls = [self._call(call, num_calls + i) for i, call in enumerate(message.tool_calls)]
                num_calls += len(calls)
                value["tool_calls"] = calls
                open_calls = [(call.get("id"), call["function"]["name"]) for call in calls]
            name = message.name
            if message.role == "tool":
                id, call_name = self._match_result(message, open_calls)
                name = name or call_name
                if id is not None:
                    value["tool_call_id"] = id
            if name:
                value["name"] = name
            values.append(value)
        return values

    def _reasoning_fields(self, message: Message) -> dict[str, Any]:
        if self.reasoning == "parts":
            text = [{"type": "text", "text": message.content}] if message.content else []
            return {"content": [{"type": "thinking", "thinking": message.reasoning}, *text]}
        if self.reasoning == "blocks":
            thoughts = [{"type": "thoughts", "text": message.reasoning}] if message.reasoning else []
            response = [{"type": "response", "text": message.content}] if message.content else []
            return {"content": {"blocks": [*thoughts, *response]}}
        return dict.fromkeys(("reasoning_content", "thinking", "reasoning", "thought"), message.reasoning)

    def _call(self, call: dict[str, Any], number: int) -> dict[str, Any]:
        if self.arguments == "text":
            function = call["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": arguments}}
        id = call.get("id")
        if id is None and self.ids != "own":
            id = f"call{number:05}"
        return call if id is None else {**call, "id": self._valid_id(id)}

    def _match_result(
        self, message: Message, open_calls: list[tuple[str | None, str]]
    ) -> tuple[str | None, str | None]:
        """Return id and name of the call of a result: by id, else by name, else the first without a result."""
        wanted = None if message.call_id is None else self._valid_id(message.call_id)
        index = next((i for i, (id, _) in enumerate(open_calls) if wanted is not None and id == wanted), None)
        if index is None:
            index = next((i for i, (_, name) in enumerate(open_calls) if message.name == name), None)
        if index is None and wanted is None and message.name is None and open_calls:
            index = 0
        if index is None:
            return wanted, None
        id, name = open_calls.pop(index)
        return wanted or id, name

    def _valid_id(self, id: str) -> str:
        if self.ids != "nine" or (len(id) == 9 and id.isalnum()):
            return id
        return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


@dataclass(frozen=True)
class TurnEnding:
    """The ending of a turn: the text's suffix `cut` is replaced with `add`, whose last token is `stop`.

    how: `written` by the template; `later`: written only before another turn; `role`: the token that begins the next
    turn; `eos`: the tokenizer's end-of-sequence token.
    """

    cut: str
    add: str
    stop: str
    how: str


@dataclass(frozen=True)
class Join:
    """A join of a prompt that is not a prefix of the training text with that text.

    Where the prompt ends with `prompt`, the training text has `head` and then `drop`. The joined text is the prompt,
    `insert`, and the rest of the training text after `drop`. by_place: the difference is in what the template writes
    around turns, not in reasoning.
    """

    prompt: str
    head: str
    drop: str
    insert: str
    by_place: bool = False


@dataclass(frozen=True)
class Mode:
    """Settings to render a row.

    options: variables of the template. plain, thinking: joins of turns without and with reasoning. ending, call_ending:
    how turns end, and those with calls (None: like others).
    """

    options: dict[str, Any]
    ending: TurnEnding
    call_ending: TurnEnding | None
    plain: tuple[Join, ...] = ()
    thinking: tuple[Join, ...] = ()


@dataclass(frozen=True)
class Traits:
    """The measured behaviour of a chat template.

    Attributes:
        input_format: the forms of input that it accepts.
        opening: text of a prompt with one user turn.
        texts: plain conversations as rendered, to find control tokens in.
        system: supports a system turn.
        tools: shows tools.
        calls: shows tool calls.
        call_error: why calls are refused.
        parallel_calls: shows several calls in a turn.
        reasoning: shows reasoning.
        reasoning_with_calls: shows reasoning in turns with calls.
        reasoning_ends: texts between reasoning and answer.
        reasoning_marks: pairs around reasoning, such as <think> and </think>.
        needs_empty: whether rows without reasoning need an empty reasoning block: the prompt opens or closes a block
            that their training text would not have.
        bare: mode of rows without reasoning.
        empty: mode of rows without reasoning, with the block that the template writes when reasoning is off.
        thinking: mode of rows with reasoning.
    """

    input_format: InputFormat
    opening: str
    texts: tuple[str, ...]
    system: bool
    tools: bool
    calls: bool
    call_error: str
    parallel_calls: bool
    reasoning: bool
    reasoning_with_calls: bool
    reasoning_ends: tuple[str, ...]
    reasoning_marks: tuple[tuple[str, str], ...]
    needs_empty: bool
    bare: Mode
    empty: Mode
    thinking: Mode

    @property
    def endings(self) -> list[TurnEnding]:
        modes = (self.bare, self.empty, self.thinking)
        endings = [ending for mode in modes for ending in (mode.ending, mode.call_ending) if ending is not None]
        return list(dict.fromkeys(endings))
