"""A chat template as text: what it can do, where assistant turns lie in it, and text that looks like control tokens.

Everything here is found by rendering, so it holds for any Jinja template; no family is known by name.
Templates come from model files, which are not trusted: they run in a sandbox, and bounded (bounded.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from strop.data.conversation import Conversation, Message
from strop.data.rendering.bounded import BoundedTemplate
from strop.data.suspicions import suspicions
from strop.errors import DataError, ModelError, Where, nearest

MAX_TEMPLATE_CHARS = 1_000_000

REASONS = {
    "template-refused": "the chat template refuses this order or kind of messages",
    "system-unsupported": "the chat template has no system turn",
    "tools-unsupported": "the chat template cannot show tools or tool calls",
    "text-lost": "the chat template does not show the text of a message as it is",
    "prompt-not-prefix": "the prompt at serving would not be a prefix of the training text",
    "no-stop-token": "an assistant turn does not end with a stop token",
    "token-straddles": "one token covers the end of the prompt and the start of the answer",
    "control-token": "text that looks like a control token cannot be told from one here",
    "nothing-supervised": "no token of the row is trained on",
}
FIXES = {
    "system-unsupported": "move the system text into the first user turn, or choose data.template",
    "tools-unsupported": "choose --data.template chatml, or a model whose own template shows tools",
    "prompt-not-prefix": "choose another data.template",
    "token-straddles": "strip the white space at the start of the answer",
    "nothing-supervised": "give an assistant turn a weight above 0",
}

# ChatML; tools and their calls as Hermes and Qwen write them; reasoning shown in every turn
CHATML = r"""BOS
{%- if tools %}
{{- '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- 'You can call these functions:\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
{{- '\n</tools>\nA call is written as <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>STOP\n' }}
{%- endif %}
{%- for message in (messages[1:] if tools and messages[0].role == 'system' else messages) %}
{%- if message.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '\n</tool_call>' }}
{%- endfor %}{% endif %}{{ 'STOP\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
NAMED = {"chatml": CHATML}

# What a template may raise on an input it was not written for.
TEMPLATE_FAULTS: tuple[type[Exception], ...] = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)

USER, ANSWER, SYSTEM, TOOL = "Qzuserq", "Qzanswerq", "Qzsystemq", "qztoolq"  # texts no template tests for


class RenderError(DataError):
    """A conversation that cannot be rendered; `code` is a key of REASONS."""

    def __init__(self, code: str, detail: str = "", *, file: str = "", line: int | None = None) -> None:
        what = REASONS[code] + (f" ({detail})" if detail else "")
        where = [Where(file, line, what)] if file else []
        super().__init__(what, fix=FIXES.get(code, ""), where=where)
        self.code = code
        self.detail = detail


@dataclass(frozen=True)
class Draft:
    """A training text and its supervised spans [start, end) in characters, each with its weight.

    A span runs from the end of the generation prompt to the end of the stop token. `odd`: the text holds
    control tokens as mere text, which stand there as the private characters of ControlText.
    """

    text: str
    spans: tuple[tuple[int, int, float], ...]
    odd: bool


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
            rest = (value.reasoning, value.tool_calls, value.name)
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


class ChatTemplate:
    """A template and what it was found to do.

    source, hash; opening: how a prompt looks; stops: end-of-turn tokens as text; supports_system,
    supports_tools, supports_tool_calls, supports_reasoning; warnings: sentences for the user.
    Raises ModelError where the template is broken or ends an assistant turn with no token of its own.
    """

    def __init__(self, source: str, *, added: dict[str, bool], variables: dict[str, Any]) -> None:
        """added: text of each added token -> is it special? variables: bos_token, eos_token, ... for the template."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(f"the chat template has {len(source)} characters", fix="choose another data.template")
        self.source = source
        self.hash = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        try:
            self._jinja = BoundedTemplate(source)
            self._variables = {**variables, "documents": None}
            ended = self._render([_user(), {"role": "assistant", "content": ANSWER}])
            self.opening = self._render([_user()], generation=True)
        except TEMPLATE_FAULTS as fault:
            raise ModelError(f"the chat template is broken: {fault}", fix="choose another data.template") from fault
        self._added = added
        # (stop token, what the template writes after it), for answers and for tool calls
        if ANSWER not in ended:
            raise ModelError("the chat template shows no assistant turn", fix="choose another data.template")
        self._endings = [self._ending(ended, ANSWER)]
        if not self._endings[0][0]:
            raise ModelError(
                "the chat template ends an assistant turn with no token that could stop generation",
                fix="choose another data.template, such as chatml",
            )
        self._probe()
        self.stops = tuple(dict.fromkeys(stop for stop, _ in self._endings))
        special = [token for token, is_special in added.items() if is_special]
        written = [token for token in added if token in self.opening and not token.isspace()]
        self.control = ControlText(list(dict.fromkeys([*special, *self.stops, *written])))
        self.warnings = tuple(suspicions(self._jinja.environment.parse(source), source))

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> Draft:
        """The text that serving sends: the messages and the generation prompt (no spans). Raises RenderError."""
        values, shown, odd = self._values(messages, tools)
        text = self._try(values, shown, generation=True)
        self._check_shown(messages, values, text)
        return Draft(text, (), odd)

    def drafts(self, conversation: Conversation, *, silent_turns: bool = False) -> list[Draft]:
        """The training texts of a conversation: one, or one a turn where the template rewrites earlier turns.

        Each assistant turn is checked: its prompt must be a prefix of its text. Raises RenderError.
        silent_turns: give spans to turns of weight 0 too. Messages after the last such turn are left out.
        """
        messages = conversation.messages
        values, tools, odd = self._values(messages, conversation.tools)
        turns: list[tuple[str, int, int, float]] = []
        last = 0
        for i, message in enumerate(messages):
            if message.role != "assistant" or not (message.weight or silent_turns):
                continue
            last = i
            prompt = self._try(values[:i], tools, generation=True)
            text = self._try(values[: i + 1], tools)
            if not text.startswith(prompt):
                raise RenderError("prompt-not-prefix")
            end = self._end(text)
            self._check_shown([message], [values[i]], text[len(prompt) :])
            turns.append((text[:end], len(prompt), end, message.weight))
        if not turns:
            raise RenderError("nothing-supervised")
        whole = turns[-1][0]
        self._check_shown(messages[:last], values[:last], whole, skip="assistant")
        if all(whole.startswith(text) for text, *_ in turns):
            return [Draft(whole, tuple(turn[1:] for turn in turns), odd)]
        return [Draft(text, ((start, end, weight),), odd) for text, start, end, weight in turns]

    def _values(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Any] | None, bool]:
        """Messages and tools as the template sees them, control tokens in them masked; were there any?"""
        if not self.supports_system and any(message.role == "system" for message in messages):
            raise RenderError("system-unsupported")
        if (tools and not self.supports_tools) or (
            not self.supports_tool_calls and any(message.tool_calls for message in messages)
        ):
            raise RenderError("tools-unsupported")
        values = [_message(message) for message in messages]
        shown = list(tools) or None
        if any(map(self.control.found, messages)) or self.control.found(shown):
            return self.control.mask(values), self.control.mask(shown), True
        return values, shown, False

    def _check_shown(
        self, messages: Sequence[Message], values: list[dict[str, Any]], text: str, skip: str = ""
    ) -> None:
        """A template that drops or rewrites the text of a message would train on something else, silently."""
        for message, value in zip(messages, values, strict=True):
            content = value["content"].strip()
            if message.role == skip or content in text:
                continue
            if json.dumps(content, ensure_ascii=False)[1:-1] in text:  # tool results, which some templates quote
                continue
            if message.role == "assistant" and "</think>" in content and content.split("</think>")[-1].strip() in text:
                continue  # thinking written into the text, which some templates set apart
            raise RenderError("text-lost", message.role)

    def _end(self, text: str) -> int:
        """Where the stop token of the last turn ends."""
        for stop, rest in self._endings:
            if text.endswith(stop + rest):
                return len(text) - len(rest)
        raise RenderError("no-stop-token")

    def _try(self, messages: list[dict[str, Any]], tools: list[Any] | None, *, generation: bool = False) -> str:
        try:
            return self._render(messages, tools, generation=generation)
        except TEMPLATE_FAULTS as fault:
            raise RenderError("template-refused", str(fault)) from fault

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None = None, *, generation: bool = False
    ) -> str:
        return self._jinja.render(messages=messages, tools=tools, add_generation_prompt=generation, **self._variables)

    def _probe(self) -> None:
        """Find by rendering what the template supports, and how it ends a tool call."""
        answer = {"role": "assistant", "content": ANSWER}
        thought = {**answer, "reasoning_content": TOOL, "thinking": TOOL}
        function = {"name": TOOL, "arguments": {"x": TOOL}}
        call = {"id": "abcdefghi", "type": "function", "function": function}
        schema = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
        tool = {"type": "function", "function": {"name": TOOL, "description": "x", "parameters": schema}}
        called = self._shows(TOOL, [_user(), {"role": "assistant", "content": "", "tool_calls": [call]}])
        self.supports_system = bool(self._shows(SYSTEM, [{"role": "system", "content": SYSTEM}, _user(), answer]))
        self.supports_tools = bool(self._shows(TOOL, [_user()], [tool]))
        self.supports_tool_calls = bool(called)
        self.supports_reasoning = bool(self._shows(TOOL, [_user(), thought]))
        if called and (ending := self._ending(called, TOOL))[0]:
            self._endings = list(dict.fromkeys([*self._endings, ending]))

    def _shows(self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
        """The rendered messages where `text` is in them, else ''."""
        try:
            rendered = self._render(messages, tools)
        except TEMPLATE_FAULTS:
            return ""
        return rendered if text in rendered else ""

    def _ending(self, text: str, mark: str) -> tuple[str, str]:
        """The first added token after the last `mark` (a special one if there is any), and what follows it."""
        tail = text[text.rindex(mark) + len(mark) :]
        for wanted in (True, False):
            found = [
                (tail.index(token), -len(token), token)
                for token, special in self._added.items()
                if special is wanted and not token.isspace() and token in tail
            ]
            if found:
                at, _, stop = min(found)
                return stop, tail[at + len(stop) :]
        return "", tail


def _user() -> dict[str, Any]:
    return {"role": "user", "content": USER}


def _message(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        value["reasoning_content"] = value["thinking"] = message.reasoning  # the two names that templates read
    if message.tool_calls:
        value["tool_calls"] = list(message.tool_calls)
    if message.name:
        value["name"] = message.name
    return value


def adds_bos(tokenizer: Any) -> bool:
    """Does the tokenizer begin a plain text with its bos token?"""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def template_source(tokenizer: Any, choice: str | None) -> str | None:
    """The template to use: `choice` (chatml, or a file) or the tokenizer's own; None where there is none.

    Raises ModelError for a choice that is neither a name nor a file.
    """
    if choice in NAMED:
        stop = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        if stop is None:
            raise ModelError(
                "the tokenizer has neither <|im_end|> nor an eos token", fix="choose another data.template"
            )
        start = "{{ bos_token }}" if adds_bos(tokenizer) else ""
        return NAMED[choice].replace("BOS", start).replace("STOP", stop)
    if choice is not None:
        path = Path(choice).expanduser()
        if not path.is_file():
            raise ModelError(
                f"data.template: no such template or file: {choice}{nearest(choice, NAMED)}",
                fix=f"give {' or '.join(NAMED)}, or the path of a Jinja file",
            )
        return path.read_text(encoding="utf-8")
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return own or None
