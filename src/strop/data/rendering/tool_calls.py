"""Tool calls in the form of a chat template: find the form, read calls in generated text, write results.

The form is found by rendering known calls, so it needs no list of models. Forms with JSON are supported: an object or a
list after a marker (Hermes and Qwen, Mistral), an object without a marker (Llama 3), and a name followed by an object
with the arguments (DeepSeek, newer Mistral, gpt-oss). So are a name and arguments between tags (Qwen 3.5, Nemotron 3,
GLM 4), whose values have the types of the tools' schemas. For a template that knows no tools, strop writes the form of
Hermes. Next to the form of the template, two are read that models write: `<|python_tag|>` (Llama 3.1), and gpt-oss's
name of the function after the channel.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from strop.data.rendering.prober import CALLING, CALLING_TWICE, QUESTION, TOOL, TOOL_DEFINITION
from strop.data.rendering.render import Renderer
from strop.data.rendering.template import ChatTemplate
from strop.data.row_errors import RenderError
from strop.data.types import Conversation, Ids, Message, shared_prefix_length, strip_reasoning
from strop.errors import ModelError

_NAME = r"[\w.-]+"
PYTHON_TAG = "<|python_tag|>"  # of Llama 3.1, before a call or Python code
_PYTHON_CALL = re.compile(rf"\s*({_NAME}?)(?:\.call)?(\(.*\))\s*(?:<\|\w+\|>\s*)?", re.DOTALL)
_TYPE = r'(?:"type"\s*:\s*"function"\s*,\s*)?'  # Llama 3 may write it first
_MESSAGE = "<|message|>"
_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class Call:
    """A call of a tool. id: as the model wrote it, for templates that write it with the result."""

    name: str
    arguments: dict[str, Any]
    id: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class InvalidCall:
    """A text in place of a call. why: what is wrong with it, for the model."""

    why: str


@dataclass(frozen=True)
class Turn:
    """A turn of the model.

    content: text before the first call, without reasoning. text: all of it; where there are calls, without reasoning.
    """

    content: str
    text: str
    calls: tuple[Call | InvalidCall, ...]
    reasoning: str | None = None

    def as_message(self, *, stopped: bool = True) -> Message:
        """Return the turn as a message. Invalid calls stay text, and so do those of a turn that was cut.

        Text after the first call is left out, as in the replies of OpenAI-compatible servers.
        """
        calls = [call for call in self.calls if isinstance(call, Call)]
        if calls and len(calls) == len(self.calls) and stopped:
            return Message("assistant", self.content, self.reasoning, tuple(map(call_json, calls)))
        return Message("assistant", self.text if self.calls else self.content, self.reasoning)


def call_json(call: Call) -> dict[str, Any]:
    """Return a call in the `messages` format."""
    function = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return function if call.id is None else {"id": call.id, **function}


@dataclass(frozen=True)
class CallFormat:
    """The form of calls in a template.

    opening, closing: text around each call; for `list`, around the list. shape: `object` and `list` are JSON with the
    name and the arguments, `named` is the name, `separator` and the arguments as JSON, and `tagged` is the name,
    `separator`, and for each argument `key_start`, its name, `key_end`, its value as text, and `value_end`. nested: the
    field of another object in which it is, if any. several: whether a turn may have more than one call.
    """

    opening: str
    closing: str
    shape: Literal["object", "list", "named", "tagged"] = "object"
    name_key: str = "name"
    arguments_key: str = "arguments"
    nested: str = ""
    separator: str = ""
    key_start: str = ""
    key_end: str = ""
    value_end: str = ""
    several: bool = True

    @property
    def example(self) -> str:
        """A call in this form, with its parts named."""
        if self.shape == "tagged":
            return self.write(Call("NAME", {"ARGUMENT": "VALUE"}))
        return self._write("NAME", "NAME", "ARGUMENTS")

    def write(self, call: Call) -> str:
        """Return a call as text. What a template adds, such as an id, is left out."""
        if self.shape == "tagged":
            values = (x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in call.arguments.values())
            pairs = zip(call.arguments, values, strict=True)
            text = "".join(f"{self.key_start}{key}{self.key_end}{value}{self.value_end}" for key, value in pairs)
            return f"{self.opening}{call.name}{self.separator}{text}{self.closing}"
        return self._write(call.name, json.dumps(call.name), json.dumps(call.arguments, ensure_ascii=False))

    def _write(self, name: str, quoted_name: str, arguments: str) -> str:
        if self.shape == "named":
            return f"{self.opening}{name}{self.separator}{arguments}{self.closing}"
        payload = f'{{"{self.name_key}": {quoted_name}, "{self.arguments_key}": {arguments}}}'
        payload = f'{{"{self.nested}": {payload}}}' if self.nested else payload
        return self.opening + (f"[{payload}]" if self.shape == "list" else payload) + self.closing

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]] = ()) -> Turn:
        """Read the calls in a turn's text. Text that only looks like a call becomes an InvalidCall.

        tools: JSON schemas of functions. Tagged values of arguments that are strings stay as they are.
        """
        calls = list(self._iter_tagged_calls(text, tools) if self.shape == "tagged" else self._iter_calls(text))
        if not calls:
            return Turn(text.strip(), text.strip(), ())
        content = text[: calls[0][0]].strip()
        found = [call for _, group in calls for call in group]
        return Turn(content, text.strip(), tuple(found if self.several else found[:1]))

    def _iter_calls(self, text: str) -> Iterator[tuple[int, list[Call | InvalidCall]]]:
        """Yield the position of each call in the text, and the calls there."""
        opening, closing = self.opening.strip(), self.closing.strip()
        if not opening:
            yield from self._iter_bare_calls(text)
            return
        start = text.find(opening)
        while start >= 0:
            begin = start + len(opening)
            calls, end = self._read_payload(text, begin)
            closed = text.find(closing, end) if closing else -1
            if isinstance(calls[0], Call) and closed >= 0 and text[end:closed].strip():
                calls = [InvalidCall("there is text after the JSON of the call")]
            yield start, calls
            if end == begin and closing and (closed := text.find(closing, begin)) >= 0:
                end = closed
            start = text.find(opening, max(end, begin))

    def _iter_bare_calls(self, text: str) -> Iterator[tuple[int, list[Call | InvalidCall]]]:
        """Yield calls without a marker: a text that is one or more JSON objects with a name."""
        tagged, begin = text.find(PYTHON_TAG), len(text) - len(text.lstrip())
        if tagged >= 0:
            begin = tagged + len(PYTHON_TAG)
            begin += len(text[begin:]) - len(text[begin:].lstrip())
            if text[begin : begin + 1] != "{":
                yield tagged, [_read_python_call(text[begin:])]
                return
        while re.match(r'\{\s*"', text[begin:]):
            calls, end = self._read_payload(text, begin)
            # an answer may be JSON with a name, too
            keys = "|".join(map(re.escape, (self.arguments_key, "arguments", "parameters")))
            has_arguments = re.search(rf'"({keys})"\s*:', text[begin:])
            if not (
                has_arguments and re.match(rf'\{{\s*{_TYPE}"({re.escape(self.name_key)}|{keys})"\s*:', text[begin:])
            ):
                return
            yield begin, calls
            if end == begin:
                return
            begin = end + len(text[end:]) - len(text[end:].lstrip(" \n;,"))

    def _iter_tagged_calls(
        self, text: str, tools: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, list[Call | InvalidCall]]]:
        """Yield the position of each call whose arguments are between tags, and the call."""
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        opening, closing = (re.compile(_loose(tag)) for tag in (self.opening, self.closing))
        name = re.compile(rf"\s*({_NAME}){_loose(self.separator)}")
        argument = re.compile(
            rf"{_loose(self.key_start)}(.+?){_padded(self.key_end)}(.*?){_padded(self.value_end)}", re.DOTALL
        )
        start = opening.search(text)
        while start is not None:
            end, arguments = start.end(), dict[str, Any]()
            named = name.match(text, end)
            if named is not None:
                end, properties = named.end(), schemas.get(named[1], {}).get("properties", {})
                while (found := argument.match(text, end)) is not None:
                    key, end = found[1].strip(), found.end()
                    arguments[key] = _read_value(found[2], properties.get(key, {}))
            closed, rest = closing.match(text, end), "".join(text[end:].split())
            if named is None:
                yield start.start(), [InvalidCall("the name of the function is missing")]
            elif closed is None and not "".join(self.closing.split()).startswith(rest):
                yield start.start(), [InvalidCall("an argument cannot be read")]
            else:
                yield start.start(), [_make_call(named[1], arguments)]
            start = opening.search(text, end if closed is None else closed.end())

    def _read_payload(self, text: str, begin: int) -> tuple[list[Call | InvalidCall], int]:
        """Return the calls at a position after an opening, and the position after them (begin: unreadable)."""
        name = ""
        if self.shape == "named":
            separator = re.escape(self.separator.strip())
            if _MESSAGE in self.separator:  # gpt-oss writes the channel before the name, the template after it
                separator = rf"[^{{]*?{re.escape(_MESSAGE)}"
            match = re.compile(rf"\s*({_NAME})\s*{separator}").match(text, begin)
            if match is None:
                return [InvalidCall("the name of the function is missing")], begin
            name, begin = match[1], match.end()
        while begin < len(text) and text[begin].isspace():
            begin += 1
        try:
            value, end = _DECODER.raw_decode(text, begin)
        except ValueError as error:
            return [InvalidCall(f"the call is not valid JSON: {error}")], begin
        except RecursionError:
            return [InvalidCall("the call is nested too deep")], begin
        if self.shape == "named":
            return [_make_call(name, value)], end
        values = value if self.shape == "list" and isinstance(value, list) else [value]
        return [self._read_call(item) for item in values] or [InvalidCall("the list of calls is empty")], end

    def _read_call(self, value: Any) -> Call | InvalidCall:
        if self.nested and isinstance(value, dict):
            value = value.get(self.nested, value)
        if not isinstance(value, dict) or not isinstance(value.get(self.name_key), str):
            return InvalidCall(f'the call has no "{self.name_key}"')
        known = (self.arguments_key, "arguments", "parameters")
        id = value.get("id")
        arguments: Any = next((value[key] for key in known if key in value), {})
        return _make_call(value[self.name_key], arguments, id if isinstance(id, str) else None)


def _loose(tag: str) -> str:
    """Return a pattern for a tag with any space in and around it."""
    return r"\s*".join(map(re.escape, ["", *tag.split(), ""]))


def _padded(tag: str) -> str:
    """Return a pattern for a tag, with or without the space around it."""
    return "".join(
        f"(?:{re.escape(part)})?" if part.isspace() else re.escape(part)
        for part in re.split(r"^(\s+)|(\s+)$", tag)
        if part
    )


def _read_value(text: str, schema: Mapping[str, Any]) -> Any:
    """Return the value that a text between tags means: JSON, or True, False or None, or the text."""
    if schema.get("type") == "string":
        return text
    names = {"True": True, "False": False, "None": None}
    try:
        return names[text.strip()] if text.strip() in names else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read_python_call(text: str) -> Call | InvalidCall:
    """Read a call in Python, such as `search.call(query="tea")`, with values that are literals."""
    why = f"after {PYTHON_TAG} there is neither JSON nor a call with literals by name"
    match = _PYTHON_CALL.fullmatch(text)
    if match is None:
        return InvalidCall(why)
    try:
        call = ast.parse(f"f{match[2]}", mode="eval").body
        assert isinstance(call, ast.Call)
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError, AssertionError):
        return InvalidCall(why)
    is_named = not call.args and all(keyword.arg is not None for keyword in call.keywords)
    return _make_call(match[1], arguments) if is_named else InvalidCall(why)


def _make_call(name: str, arguments: Any, id: str | None = None) -> Call | InvalidCall:
    if isinstance(arguments, str):  # JSON in a string
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return InvalidCall("the arguments are not valid JSON")
    if not isinstance(arguments, dict):
        return InvalidCall("the arguments are not an object")
    try:
        json.dumps([name, arguments, id], ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return InvalidCall("the call has half of a character, or a number that is not finite")
    return Call(name, arguments, id)


HERMES = CallFormat("<tool_call>\n", "\n</tool_call>")


def derive_call_format(chat: ChatTemplate) -> CallFormat | None:
    """Return the form in which a template writes calls, or None if it is none of the supported forms."""
    one = _rendered_turn(chat, CALLING)
    two = _rendered_turn(chat, CALLING_TWICE) if chat.traits.parallel_calls else None
    found = _find_payload(one) if one is not None else None
    if one is None:
        return None
    if found is None:
        return _find_tagged(one, two)
    form, begin, end = found
    opening, closing = one[:begin], one[end:]
    if two is not None and form.shape != "list":
        opening, closing = _per_call(opening, closing, two)
    fields = {**vars(form), "opening": opening, "closing": closing, "several": two is not None}
    derived = CallFormat(**fields)
    expected = [Call(TOOL, call["function"]["arguments"]) for call in CALLING_TWICE.tool_calls]
    reads_one = derived.parse(one).calls == (expected[0],)
    return derived if reads_one and (two is None or derived.parse(two).calls == tuple(expected)) else None


def _rendered_turn(chat: ChatTemplate, turn: Message) -> str | None:
    """Return the text of a turn with calls, without its stop token."""
    try:
        draft = chat.make_drafts(Conversation("", 0, (QUESTION, turn), (TOOL_DEFINITION,)))[-1]
    except RenderError:
        return None
    start, end, _ = draft.spans[-1]
    text = draft.text[start:end]
    return text.removesuffix(max((stop for stop in chat.stops if text.endswith(stop)), key=len))


def _find_payload(text: str) -> tuple[CallFormat, int, int] | None:
    """Return the form of the call in a text, and the positions of its JSON (for `named`: of its name)."""
    arguments = CALLING.tool_calls[0]["function"]["arguments"]
    for match in re.finditer(r"[{\[]", text):
        begin = match.start()
        try:
            value, end = _DECODER.raw_decode(text, begin)
        except ValueError:
            continue
        if value == arguments and TOOL in text[:begin]:
            name_start = text[:begin].rindex(TOOL)
            return CallFormat("", "", "named", separator=text[name_start + len(TOOL) : begin]), name_start, end
        items = value if isinstance(value, list) else [value]
        item = items[0] if len(items) == 1 else None
        if not isinstance(item, dict):
            continue
        nested = "" if TOOL in item.values() else next((key for key, x in item.items() if isinstance(x, dict)), "")
        item = item[nested] if nested else item
        names = [key for key, part in item.items() if part == TOOL]
        keys = [key for key, part in item.items() if part == arguments or part == json.dumps(arguments)]
        if names and keys:
            shape: Literal["list", "object"] = "list" if isinstance(value, list) else "object"
            return CallFormat("", "", shape, names[0], keys[0], nested), begin, end
    return None


def _find_tagged(one: str, two: str | None) -> CallFormat | None:
    """Return the form of a call with its arguments between tags, if it is one. two: a turn with two calls."""
    arguments = CALLING.tool_calls[0]["function"]["arguments"]
    (first, value), (second, flag) = arguments.items()
    flags = "|".join((json.dumps(flag), str(flag)))
    first, value, second = map(re.escape, (first, value, second))
    pattern = rf"(.*?){TOOL}(\W.*?){first}(\W.*?){value}(\W.*?\W){second}(\W.*?)(?:{flags})(.*)"
    match = re.fullmatch(pattern, one, re.DOTALL)
    if match is None or match[3] != match[5]:
        return None
    opening, before_key, key_end, between, _, rest = match.groups()
    key_start = before_key[len(before_key) - shared_prefix_length(before_key[::-1], between[::-1]) :]
    key_start = key_start[key_start.rfind("<") :] if "<" in key_start else ""
    value_end = between.removesuffix(key_start).rstrip()
    if not key_start or not value_end.strip() or not rest.startswith(value_end):
        return None
    if two is not None:  # the call only: `opening` may begin with an empty block of reasoning
        other = two[: two.rfind(TOOL)]
        opening = opening[len(opening) - shared_prefix_length(opening[::-1], other[::-1]) :]
        opening = opening[max(0, opening.find("<")) :]
    separator, closing = before_key.removesuffix(key_start), rest.removeprefix(value_end)
    form = CallFormat(
        opening, closing, "tagged", separator=separator, key_start=key_start, key_end=key_end, value_end=value_end,
        several=two is not None,
    )  # fmt: skip
    expected = [Call(TOOL, call["function"]["arguments"]) for call in CALLING_TWICE.tool_calls]
    reads_one = bool(opening.strip()) and form.parse(one).calls == (expected[0],)
    return form if reads_one and (two is None or form.parse(two).calls == tuple(expected)) else None


def _per_call(opening: str, closing: str, two: str) -> tuple[str, str]:
    """Return the parts of `opening` and `closing` that are written around each call of a turn with two calls."""
    rest = two.removeprefix(opening)
    first = next((end for start, end in _payload_spans(rest) if start == 0 or TOOL in rest[:start]), 0)
    following = rest[first:]
    second = next((start for start, _ in _payload_spans(following)), len(following))
    named = following[:second].rfind(TOOL)
    between = following[: named if named >= 0 else second]
    own_opening = opening[len(opening) - shared_prefix_length(opening[::-1], between[::-1]) :]
    if own_opening != opening:  # markers of different kinds may end with the same signs
        own_opening = own_opening[re.search(r"[<\[]|$", own_opening).start() :]  # type: ignore[union-attr]
    own_closing = closing[: shared_prefix_length(closing, between[: len(between) - len(own_opening)])]
    return (own_opening, own_closing) if own_opening.strip() else (opening, closing)


def _payload_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield the positions of JSON objects in a text."""
    end = 0
    for match in re.finditer(r"\{", text):
        if match.start() >= end:
            try:
                _, end = _DECODER.raw_decode(text, match.start())
            except ValueError:
                continue
            yield match.start(), end


def as_hermes(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, system: bool) -> list[Message]:
    """Return messages with tools, calls and results as plain messages in the form of Hermes.

    system: whether the template supports a system message. Otherwise the tools are in the first user message.
    """
    listed = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
    call_form = HERMES.opening + '{"name": ..., "arguments": ...}' + HERMES.closing
    text = f"You can call these functions:\n<tools>{listed}\n</tools>\nA call is written as {call_form}"
    plain: list[Message] = []
    results: list[str] = []
    for message in [*messages, None]:
        if message is not None and message.role == "tool":
            results.append(f"<tool_response>\n{message.content}\n</tool_response>")
            continue
        if results:
            plain.append(Message("user", "\n".join(results)))
            results = []
        if message is not None and message.tool_calls:
            calls = (json.dumps(_name_and_arguments(call), ensure_ascii=False) for call in message.tool_calls)
            parts = [message.content, *(HERMES.opening + call + HERMES.closing for call in calls)]
            message = Message("assistant", "\n".join(filter(None, parts)), reasoning=message.reasoning)
        plain += [message] if message is not None else []
    if not tools:
        return plain
    role: Literal["system", "user"] = "system" if system else "user"
    first = next((i for i, message in enumerate(plain) if message.role == role), None)
    if first is None or (system and first):
        return [Message(role, text), *plain]
    content = f"{plain[first].content}\n\n{text}" if system else f"{text}\n\n{plain[first].content}"
    return [*plain[:first], Message(role, content), *plain[first + 1 :]]


def _name_and_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    return {name: call["function"][name] for name in ("name", "arguments")}


class ToolDialogue:
    """Renders and reads a dialogue with tools for one template.

    tools: JSON schemas of functions, at least one. `why_hermes` is why calls are written in the form of Hermes, or
    None if the template has a form.

    Raises ModelError for a template whose calls cannot be read, or that writes a turn differently when results follow.
    """

    def __init__(self, renderer: Renderer, tools: Sequence[dict[str, Any]]) -> None:
        traits = renderer.chat.traits
        self._renderer, self.tools = renderer, tuple(tools)
        missing = [] if traits.tools else ["tools"]
        missing += [] if traits.calls else ["tool calls"]
        self.why_hermes = f"the chat template shows no {' and no '.join(missing)}" if missing else None
        form = HERMES if missing else derive_call_format(renderer.chat)
        fix = "choose --data.template chatml, or another model"
        if form is None:
            text = _rendered_turn(renderer.chat, CALLING)
            example = "" if text is None else f": {text.strip().replace(TOOL, 'NAME')!r:.200}"
            raise ModelError(f"the chat template writes tool calls in a form that strop cannot read{example}", fix=fix)
        self.format = form
        try:
            self.continuation([QUESTION], Turn("", "", (Call(self._first_tool, {}),)), ["1"])
        except RenderError as error:
            what = f"the chat template cannot continue after a tool call: {error.what}"
            raise ModelError(what, fix=error.fix or fix) from None

    @property
    def _first_tool(self) -> str:
        return str(self.tools[0]["function"]["name"])

    def prompt(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> Ids:
        """Return the token ids of a prompt with the tools. Raises RenderError."""
        messages, tools = self._convert(messages)
        return self._renderer.prompt(messages, tools, options=options)

    def _convert(self, messages: Sequence[Message]) -> tuple[Sequence[Message], tuple[dict[str, Any], ...]]:
        if self.why_hermes is None:
            return messages, self.tools
        return as_hermes(messages, self.tools, system=self._renderer.chat.traits.system), ()

    @cached_property
    def _reasoning_ends(self) -> list[str]:
        return [end.strip() for end in self._renderer.chat.traits.reasoning_ends if end.strip()]

    def read_turn(self, ids: Ids) -> Turn:
        """Return the turn with these token ids. Calls in its reasoning are not read."""
        tokenizer = self._renderer.tokenizer
        ids = ids[:-1] if len(ids) and int(ids[-1]) in self._renderer.end_ids else ids
        text = str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        begins = any(text.lstrip().startswith(begin) for begin, _ in self._renderer.chat.traits.reasoning_marks)
        end = next((end for end in self._reasoning_ends if end in text), None)
        if begins and end is None:  # reasoning that does not end
            return Turn(text.strip(), text.strip(), ())
        if end is not None and not begins and not self._renderer.chat.traits.needs_empty_block:
            call = text.find(self.format.opening.strip())  # the end may be in an argument of a call
            end = None if self.format.opening.strip() and 0 <= call < text.index(end) else end
        reasoning, rest = (None, text) if end is None else self._split_reasoning(text, end)
        turn = self.format.parse(rest, self.tools)
        if turn.calls:
            return replace(turn, reasoning=reasoning)
        plain = str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        return Turn(plain if end is None else strip_reasoning(plain, [end]), plain, (), reasoning)

    def _split_reasoning(self, text: str, end: str) -> tuple[str | None, str]:
        """Return the reasoning of a turn without its marks, or None if it is empty, and the text after it."""
        reasoning, _, rest = text.partition(end)
        for begin, _ in self._renderer.chat.traits.reasoning_marks:
            reasoning = reasoning.strip().removeprefix(begin.strip())
        return reasoning.strip() or None, rest

    def continuation(
        self, messages: Sequence[Message], turn: Turn, results: Sequence[str], options: Mapping[str, Any] | None = None
    ) -> Ids:
        """Return the token ids that follow the stop token of a turn with calls, up to the start of the next turn.

        messages: those before the turn. results: one text for each call. Raises RenderError.
        """
        mark, texts = "qzmarkq", [*(message.content for message in messages), *results]
        while any(mark in text for text in texts):
            mark += "q"
        stand_in, *answers = self.rendered_turn(turn, results, mark)
        before, tools = self._convert([*messages, stand_in])
        if self.why_hermes is None:
            return self._renderer.continuation(before, answers, tools, mark=mark, options=options)
        return self._renderer.continuation(before, as_hermes(answers, (), system=True), mark=mark, options=options)

    def rendered_turn(self, turn: Turn, results: Sequence[str], mark: str = "") -> list[Message]:
        """Return messages in place of a turn with calls and its results: what a turn says does not change what follows.

        They have valid calls, which a turn may not have, and no reasoning, which a template may remove.
        """
        names = [call.name if isinstance(call, Call) else self._first_tool for call in turn.calls]
        ids = [call.id if isinstance(call, Call) else None for call in turn.calls]
        values = [*[""] * (len(names) - 1), mark]
        calls = [call_json(Call(name, {"x": x}, id)) for name, x, id in zip(names, values, ids, strict=True)]
        answers = [Message("tool", result, call_id=id) for result, id in zip(results, ids, strict=False)]
        return [Message("assistant", "", tool_calls=tuple(calls)), *answers]
