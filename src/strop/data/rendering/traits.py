"""What a chat template was found to do (prober.py finds it)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strop.data.rendering.traits import Dialect


@dataclass(frozen=True)
class Ending:
    """How a turn ends: text that ends with `cut` gets `add` in its place, the last token of which is `stop`."""

    cut: str
    add: str
    stop: str
    how: str  # written: by the template; later: only where another turn follows; role: by that turn's own token; eos


@dataclass(frozen=True)
class Join:
    """Where a prompt that ends with `prompt` is no prefix of the training text: that has `head` there, then `drop`,
    and is written as the prompt, `insert`, and what comes after these. by_place: for what the template writes around
    turns, not for reasoning."""

    prompt: str
    head: str
    drop: str
    insert: str
    by_place: bool = False


@dataclass(frozen=True)
class Mode:
    """How a row is rendered. options: variables of the template. plain, thinking: joins of turns without and with
    reasoning. ending, call_ending: how turns end, and those with calls (None: as the others)."""

    options: dict[str, Any]
    ending: Ending
    call_ending: Ending | None
    plain: tuple[Join, ...] = ()
    thinking: tuple[Join, ...] = ()


@dataclass(frozen=True)
class Traits:
    """opening: how a prompt looks. texts: plain conversations as rendered, for the control tokens in them.
    needs_empty: whether rows without reasoning would be trained behind an opened block, or not at all, as the template
    is. bare, thinking: modes of rows without and with reasoning; empty: of rows without, where they get the block that
    the template writes when reasoning is off. call_fault: why a call is not shown. closes: what ends reasoning before
    an answer's text. marks: what reasoning stands between, where that is a pair such as <think> and </think>.
    """

    dialect: Dialect
    opening: str
    texts: tuple[str, ...]
    system: bool
    tools: bool
    calls: bool
    call_fault: str
    parallel: bool
    reasoning: bool
    reasoning_beside_calls: bool
    closes: tuple[str, ...]
    marks: tuple[tuple[str, str], ...]
    needs_empty: bool
    bare: Mode
    empty: Mode
    thinking: Mode

    @property
    def endings(self) -> list[Ending]:
        modes = (self.bare, self.empty, self.thinking)
        found = [ending for mode in modes for ending in (mode.ending, mode.call_ending) if ending is not None]
        return list(dict.fromkeys(found))


# ---- from strop.data.rendering.tool_format ----
"""The forms in which a chat template takes what it is given: tools, calls, their ids and arguments, reasoning.

Templates differ in all of these. Which forms one takes is found by trial (traits.py); a row is put into them here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from strop.data.types import Message


@dataclass(frozen=True)
class Dialect:
    """tools: the name under which tools are read, as_text: as JSON in a string; no_tools: what stands for none.
    arguments: of a call, as an object or as JSON in a string. ids: of calls, as the row has them, made where it has
    none, or in Mistral's form of nine letters and digits. reasoning: in fields of the message, or in parts of its
    content. given: further variables without which the template does not render.
    """

    tools: str = "tools"
    tools_as_text: bool = False
    no_tools: Any = None
    arguments: Literal["object", "text"] = "object"
    ids: Literal["own", "made", "nine"] = "own"
    reasoning: Literal["fields", "parts", "blocks"] = "fields"
    given: dict[str, Any] = field(default_factory=dict)

    def variables(self, tools: Sequence[Any] | None) -> dict[str, Any]:
        """tools (None: there are none) as the template's variables."""
        shown = list(tools) if tools else self.given.get(self.tools, self.no_tools)
        if tools and self.tools_as_text:
            shown = json.dumps(shown, ensure_ascii=False)
        return {"tools": self.no_tools, **self.given, self.tools: shown}

    def values(self, messages: Sequence[Message], *, reasoning: bool) -> list[dict[str, Any]]:
        """Messages as the template reads them; reasoning: with it, or without."""
        values = []
        waiting: list[tuple[str | None, str]] = []  # calls that have no result yet: id and name
        made = 0
        reasoning = reasoning and any(message.reasoning for message in messages)
        for message in messages:
            value: dict[str, Any] = {"role": message.role, "content": message.content}
            if reasoning and message.role == "assistant" and (message.reasoning or self.reasoning == "blocks"):
                value |= self._thought(message)
            if message.tool_calls:
                calls = [self._call(call, made + number) for number, call in enumerate(message.tool_calls)]
                made += len(calls)
                value["tool_calls"] = calls
                waiting = [(call.get("id"), call["function"]["name"]) for call in calls]
            name = message.name
            if message.role == "tool":
                id, called = self._answered(message, waiting)
                name = name or called
                if id is not None:
                    value["tool_call_id"] = id
            if name:
                value["name"] = name
            values.append(value)
        return values

    def _thought(self, message: Message) -> dict[str, Any]:
        if self.reasoning == "parts":
            said = [{"type": "text", "text": message.content}] if message.content else []
            return {"content": [{"type": "thinking", "thinking": message.reasoning}, *said]}
        if self.reasoning == "blocks":
            thought = [{"type": "thoughts", "text": message.reasoning}] if message.reasoning else []
            said = [{"type": "response", "text": message.content}] if message.content else []
            return {"content": {"blocks": [*thought, *said]}}
        return dict.fromkeys(("reasoning_content", "thinking", "reasoning", "thought"), message.reasoning)

    def _call(self, call: dict[str, Any], number: int) -> dict[str, Any]:
        if self.arguments == "text":
            function = call["function"]
            written = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": written}}
        id = call.get("id")
        if id is None and self.ids != "own":
            id = f"call{number:05}"
        return call if id is None else {**call, "id": self._accepted(id)}

    def _answered(self, message: Message, waiting: list[tuple[str | None, str]]) -> tuple[str | None, str | None]:
        """Id and name of the call that a result is for: by its id, else by name, else the first without a result."""
        wanted = None if message.call_id is None else self._accepted(message.call_id)
        at = next((i for i, (id, _) in enumerate(waiting) if wanted is not None and id == wanted), None)
        if at is None:
            at = next((i for i, (_, name) in enumerate(waiting) if message.name == name), None)
        if at is None and wanted is None and message.name is None and waiting:
            at = 0
        if at is None:
            return wanted, None
        id, name = waiting.pop(at)
        return wanted or id, name

    def _accepted(self, id: str) -> str:
        if self.ids != "nine" or (len(id) == 9 and id.isalnum()):
            return id
        return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:9]
