"""Measure how a chat template ends turns, and writes reasoning, tools and tool calls, by rendering test conversations.

The test conversations consist of words for which no template has special cases, so this works for any model family.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any, Literal

from strop.data.rendering.template_source import DEFAULT_DAY, TEMPLATE_ERRORS, BoundedTemplate, compared_values
from strop.data.types import MARK, Image, Message, content_parts, shared_prefix_length


@dataclass(frozen=True)
class InputFormat:
    """The form in which a template expects tools, tool calls and reasoning."""

    tools_variable: str = "tools"
    tools_as_text: bool = False  # tools are JSON in a string
    no_tools_value: Any = None  # value of the variable without tools
    arguments: Literal["object", "text"] = "object"  # arguments of a call are an object, or JSON in a string
    # ids of calls. `unchanged`: as in the row; `generated`: missing ids are added; `nine_chars`: nine letters or digits
    ids: Literal["unchanged", "generated", "nine_chars"] = "unchanged"
    # `fields`: reasoning is in a field of the message; `parts`, `blocks`: in a part or block of its content
    reasoning: Literal["fields", "parts", "blocks"] = "fields"
    content_as_parts: bool = False  # texts without an image are lists of parts, too
    required: dict[str, Any] = field(default_factory=dict)  # variables that the template requires, and their values

    def tool_variables(self, tools: Sequence[Any] | None) -> dict[str, Any]:
        """Return the template's variables for these tools."""
        value = list(tools) if tools else self.required.get(self.tools_variable, self.no_tools_value)
        if tools and self.tools_as_text:
            value = json.dumps(value, ensure_ascii=False)
        return {"tools": self.no_tools_value, **self.required, self.tools_variable: value}

    def convert_messages(self, messages: Sequence[Message], *, reasoning: bool) -> list[dict[str, Any]]:
        """Return messages in this format, with or without reasoning."""
        values = []
        open_calls: list[tuple[str | None, str]] = []  # id and name of each call without a result
        num_calls = 0
        reasoning = reasoning and any(message.reasoning for message in messages)
        for message in messages:
            value: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.images or self.content_as_parts:
                value["content"] = list(content_parts(message, lambda _: {"type": "image"}))
            if reasoning and message.role == "assistant" and (message.reasoning or self.reasoning == "blocks"):
                value |= self._reasoning_fields(message)
            if message.tool_calls:
                calls = [self._convert_call(call, num_calls + i) for i, call in enumerate(message.tool_calls)]
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

    def _convert_call(self, call: dict[str, Any], number: int) -> dict[str, Any]:
        if self.arguments == "text":
            function = call["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": arguments}}
        id = call.get("id")
        if id is None and self.ids != "unchanged":
            id = f"call{number:05}"
        return call if id is None else {**call, "id": self._valid_id(id)}

    def _match_result(
        self, message: Message, open_calls: list[tuple[str | None, str]]
    ) -> tuple[str | None, str | None]:
        """Return id and name of the call that a tool result belongs to, and remove it from the open calls.

        The call is found by the id or the name of the result. A result without either belongs to the first open call.
        """
        call_id = None if message.call_id is None else self._valid_id(message.call_id)
        index = next((i for i, (id, _) in enumerate(open_calls) if call_id is not None and id == call_id), None)
        if index is None:
            index = next((i for i, (_, name) in enumerate(open_calls) if message.name == name), None)
        if index is None and call_id is None and message.name is None and open_calls:
            index = 0
        if index is None:
            return call_id, None
        id, name = open_calls.pop(index)
        return call_id or id, name

    def _valid_id(self, id: str) -> str:
        if self.ids != "nine_chars" or (len(id) == 9 and id.isalnum()):
            return id
        return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


@dataclass(frozen=True)
class TurnEnding:
    """The ending of a turn: the suffix `removed` of its text is replaced with `added`, whose last token is `stop`.

    origin: `written`: the template writes the stop token; `later`: it writes it only before another turn; `role`: it is
    the token that begins the next turn; `eos`: it is the tokenizer's end-of-sequence token.
    """

    removed: str
    added: str
    stop: str
    origin: str


@dataclass(frozen=True)
class PromptSplice:
    """An edit that makes a conversation's rendered prompt a prefix of its rendered training text.

    The prompt ends with `prompt_end`; at that place the training text has `text_head` and `removed`. The edited text
    is the prompt, `inserted`, and the rest of the training text after `removed`. outside_reasoning: the two differ in
    what the template writes around turns, not in reasoning.
    """

    prompt_end: str
    text_head: str
    removed: str
    inserted: str
    outside_reasoning: bool = False


@dataclass(frozen=True)
class Mode:
    """The options, endings and splices with which rows are rendered."""

    options: dict[str, Any]  # variables for the template
    ending: TurnEnding
    call_ending: TurnEnding | None  # ending of turns with calls, if it differs
    splices: tuple[PromptSplice, ...] = ()  # for turns without reasoning
    thinking_splices: tuple[PromptSplice, ...] = ()  # for turns with reasoning


@dataclass(frozen=True)
class Traits:
    """The measured behaviour of a chat template."""

    input_format: InputFormat
    opening: str  # rendered prompt with one user turn
    texts: tuple[str, ...]  # rendered conversations, in which control tokens are searched
    system: bool  # whether the template supports a system turn
    tools: bool  # whether it shows tools
    calls: bool  # whether it shows tool calls
    call_error: str  # its error message if it does not support calls
    parallel_calls: bool  # whether it shows several calls in a turn
    reasoning: bool  # whether it shows reasoning
    reasoning_with_calls: bool  # whether it shows reasoning in turns with calls
    reasoning_ends: tuple[str, ...]  # texts between reasoning and answer
    image_tokens: tuple[str, ...]  # tokens that it writes for an image
    reasoning_marks: tuple[tuple[str, str], ...]  # delimiters of reasoning, such as <think> and </think>
    needs_empty_block: bool  # prompts open or write a reasoning block, so rows without reasoning need an empty one
    default_mode: Mode  # for rows without reasoning
    empty_block_mode: Mode  # for rows without reasoning, with the empty block that the template writes
    thinking_mode: Mode  # for rows with reasoning

    @property
    def endings(self) -> list[TurnEnding]:
        modes = (self.default_mode, self.empty_block_mode, self.thinking_mode)
        return [ending for mode in modes for ending in (mode.ending, mode.call_ending) if ending is not None]


USER, ANSWER, SYSTEM, TOOL = "Qzuserq", "Qzanswerq", "Qzsystemq", "qztoolq"
NEXT, REASONING, VALUE, OTHER_VALUE = "Qznextq", "Qzthoughtq", "qzvalueq", "qzotherq"

_REASONING_OPTION = re.compile("think|reason|thought")  # in the name of an option that may turn reasoning on and off
_PRINTED_PART = re.compile(r"""["']type["']: ["'](thinking|thoughts)["']""")  # a content part printed as a dict
_OPEN_BLOCK = re.compile(r"<([^<>/]*(?:think|thought|reason)[^<>/]*)>\s*$", re.IGNORECASE)

QUESTION, NEXT_QUESTION = Message("user", USER), Message("user", NEXT)
PLAIN, THINKING = Message("assistant", ANSWER), Message("assistant", ANSWER, reasoning=REASONING)
RESULT = Message("tool", NEXT, name=TOOL, call_id="abcdefghi")
SCHEMA = {
    "type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"],
}  # fmt: skip
TOOL_DEFINITION = {"type": "function", "function": {"name": TOOL, "description": "x", "parameters": SCHEMA}}


def _call(value: str = VALUE, id: str | None = "abcdefghi") -> dict[str, Any]:
    call = {"type": "function", "function": {"name": TOOL, "arguments": {"x": value, "y": True}}}
    return call if id is None else {"id": id, **call}


CALLING = Message("assistant", "", tool_calls=(_call(),))
CALLING_TWICE = Message("assistant", "", tool_calls=(_call(), _call(OTHER_VALUE, "abcdefghj")))
# Messages before an assistant turn, and the text of the last one
CONTEXTS = [([QUESTION], USER), ([QUESTION, CALLING, RESULT], NEXT)]


class Prober:
    """Measure the traits of a template.

    variables_read: the variables that it reads. variables: bos_token, eos_token, ... added: the tokenizer's added
    tokens. fixed: options set by the user, which are not tried.
    """

    def __init__(
        self, jinja: BoundedTemplate, source: str, variables_read: frozenset[str], variables: Mapping[str, Any],
        added: Sequence[str], fixed: frozenset[str],
    ) -> None:  # fmt: skip
        self._jinja, self._source, self._variables = jinja, source, variables
        self._added = [token for token in added if not token.isspace()]
        self._variables_read, self._fixed = variables_read, fixed
        self._tree = jinja.environment.parse(source)
        self._input_format = InputFormat()

    def measure(self) -> Traits | None:
        """Return the traits, or None if the template shows no assistant turn or does not end it."""
        self._input_format = plain = self._find_plain_format()
        conversation = self._render([QUESTION, PLAIN])
        if ANSWER not in conversation or USER not in conversation:  # templates that only show lists of parts
            self._input_format = replace(plain, content_as_parts=True)
            as_parts = self._render_if_shown([QUESTION, PLAIN], ANSWER)
            if ANSWER not in conversation or USER in as_parts:
                conversation = as_parts
            else:
                self._input_format = plain
        if ANSWER not in conversation:
            return None
        tools = self._find_tools()
        self._calls = self._find_calls()
        self._find_reasoning()
        switches = list(self._reasoning_switches())
        with_call = [QUESTION, replace(THINKING, content="", tool_calls=(_call(),))]
        with_system = [Message("system", SYSTEM), QUESTION]
        self._delimiters = list(dict.fromkeys(self._find_delimiters(switches)))
        self._inner_tokens = self._find_inner_tokens(switches)
        splices, prompt_kind = self._find_splices({}, PLAIN)
        default = self._make_mode({}, tuple(splice for splice in splices if splice.outside_reasoning))
        if default is None:
            return None
        fallback = replace(default, splices=splices)
        empty_block_mode = None if prompt_kind == "writes_block" else self._find_empty_block_mode(switches)
        two_exchanges = self._render_if_shown([QUESTION, PLAIN, NEXT_QUESTION], NEXT)
        image_tokens = self._find_image_tokens()
        return Traits(
            input_format=self._input_format,
            opening=self._render([QUESTION], generation=True),
            texts=(conversation, two_exchanges, self._render_if_shown(with_system, USER), *image_tokens),
            system=bool(self._render_if_shown(with_system, SYSTEM, generation=True)),
            tools=tools,
            calls=self._calls,
            call_error="" if self._calls else self._call_error(),
            parallel_calls=self._calls and bool(self._render_if_shown([QUESTION, CALLING_TWICE], OTHER_VALUE)),
            reasoning=bool(self._delimiters),
            reasoning_with_calls=any(self._render_if_shown(with_call, REASONING, options) for options in switches),
            reasoning_ends=tuple(dict.fromkeys(closing for _, closing in self._delimiters)),
            image_tokens=image_tokens,
            reasoning_marks=tuple(dict.fromkeys(self._find_reasoning_marks())),
            needs_empty_block=prompt_kind in ("opens_block", "writes_block"),
            default_mode=default,
            empty_block_mode=empty_block_mode or fallback,
            thinking_mode=self._find_thinking_mode(switches) or fallback,
        )

    def _render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] = (), generation: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        values = self._input_format.convert_messages(messages, reasoning=True)
        variables = {**self._variables, **self._input_format.tool_variables(tools), **(options or {})}
        return self._jinja.render(messages=values, add_generation_prompt=generation, **variables)

    def _render_if_shown(
        self, messages: Sequence[Message], text: str, options: Mapping[str, Any] | None = None,
        *, tools: Sequence[Any] = (), generation: bool = False,
    ) -> str:  # fmt: skip
        """Return the rendered messages if they contain `text`, otherwise ''."""
        try:
            rendered = self._render(messages, tools=tools, generation=generation, options=options)
        except TEMPLATE_ERRORS:
            return ""
        return rendered if text in rendered else ""

    def _find_tokens(self, text: str) -> list[tuple[int, int, str]]:
        """Return (start, end, token) of each added token in a text."""
        present = sorted((token for token in self._added if token in text), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, present)) or "(?!)")
        return [(match.start(), match.end(), match[0]) for match in pattern.finditer(text)]

    def _find_plain_format(self) -> InputFormat:
        """Find the value of the tools variable without tools, and the variables that the template requires."""
        required: dict[str, Any] = {}
        while True:
            first_error: Exception | None = None
            no_tools_value: Any
            for no_tools_value in (None, []):
                self._input_format = InputFormat(no_tools_value=no_tools_value, required=dict(required))
                try:
                    self._render([QUESTION, PLAIN])
                    return self._input_format
                except TEMPLATE_ERRORS as error:
                    first_error = first_error or error
            assert first_error is not None
            missing = re.match(r"'(\w+)' is undefined", str(first_error))  # Jinja's message
            if missing is None or (name := missing[1]) in required or name not in self._variables_read:
                raise first_error
            required[name] = f"{DEFAULT_DAY:%Y-%m-%d}" if "date" in name else "[]" if _is_tools_name(name) else ""

    def _find_image_tokens(self) -> tuple[str, ...]:
        """Return the added tokens that the template writes for an image, in order."""
        with_image = replace(QUESTION, content=MARK + USER, images=(Image("", "", 1, 1),))
        text, plain = (self._render_if_shown([message], USER) for message in (with_image, QUESTION))
        known = {token for *_, token in self._find_tokens(plain)}
        return tuple(dict.fromkeys(token for *_, token in self._find_tokens(text) if token not in known))

    def _find_tools(self) -> bool:
        """Set the variable and format in which tools are shown. Return whether tools are supported."""
        plain = self._input_format
        for name in ["tools", *sorted(name for name in self._variables_read if _is_tools_name(name))]:
            for as_text in (False, True):
                self._input_format = replace(plain, tools_variable=name, tools_as_text=as_text)
                if self._render_if_shown([QUESTION], TOOL, tools=[TOOL_DEFINITION]):
                    return True
        self._input_format = plain
        return False

    def _find_calls(self) -> bool:
        """Set the formats of ids and arguments in which calls are shown. Return whether calls are supported."""
        plain = self._input_format
        for ids in ("unchanged", "generated", "nine_chars"):
            candidates: list[tuple[bool, InputFormat]] = []
            for arguments in ("object", "text"):
                self._input_format = replace(plain, ids=ids, arguments=arguments)
                text = self._exchange_with_call(ids)
                if text:
                    call = text[: text.rindex(VALUE) + len(VALUE) + 20]
                    is_malformed = r"\"x\"" in call or "{'x'" in call  # JSON encoded twice, or the repr of a dict
                    candidates.append((is_malformed, self._input_format))
            if candidates:
                self._input_format = min(candidates, key=lambda candidate: candidate[0])[1]
                return True
        self._input_format = plain
        return False

    def _call_error(self) -> str:
        try:
            self._render([QUESTION, CALLING])
        except TEMPLATE_ERRORS as error:
            return str(error)
        return ""

    def _exchange_with_call(self, ids: str) -> str:
        """Return a rendered call with its result and an answer, or '' if the template refuses ids of this form."""
        examples = {
            "unchanged": (None, "call_0123456789"),
            "generated": ("call_0123456789", None),
            "nine_chars": ("abcdefghi",),
        }[ids]
        text = ""
        for id in examples:
            result = Message("tool", NEXT, name=TOOL, call_id=id)
            messages = [QUESTION, Message("assistant", "", tool_calls=(_call(id=id),))]
            text = self._render_if_shown([*messages, result, PLAIN], VALUE) or self._render_if_shown(messages, VALUE)
            result_shown = ids == "nine_chars" or self._render_if_shown([*messages, result], NEXT)
            if not text or (not result_shown and self._shows_results()):
                return ""
        return text

    def _shows_results(self) -> bool:
        """Return whether the template shows results of calls whose ids have nine characters."""
        original, self._input_format = self._input_format, replace(self._input_format, ids="nine_chars")
        shown = bool(self._render_if_shown([QUESTION, CALLING, RESULT], NEXT))
        self._input_format = original
        return shown

    def _find_reasoning(self) -> None:
        """Set the format in which reasoning is shown, if it is supported."""
        plain = self._input_format
        for reasoning in ("fields", "parts", "blocks"):
            self._input_format = replace(plain, reasoning=reasoning)
            for options in self._reasoning_switches():
                text = self._render_if_shown([QUESTION, THINKING], REASONING, options)
                if text.count(REASONING) == 1 and text.count(ANSWER) == 1 and not _PRINTED_PART.search(text):
                    return
        self._input_format = plain

    def _reasoning_switches(self) -> Iterator[dict[str, Any]]:
        """Yield options that may turn reasoning on or off, starting with the template's defaults."""
        yield {}
        for name in sorted(self._variables_read - self._fixed):
            if _REASONING_OPTION.search(name):
                for value in dict.fromkeys([True, False, *compared_values(self._tree, name)]):
                    yield {name: value}

    def _find_inner_tokens(self, switches: Sequence[dict[str, Any]]) -> set[str]:
        """Return the tokens between reasoning and answer and inside calls, which do not end the assistant turn."""
        parts: list[str] = []
        for options in switches:
            text = self._render_if_shown([QUESTION, THINKING], REASONING, options)
            if text.count(REASONING) == 1 and text.count(ANSWER) == 1 and text.index(REASONING) < text.index(ANSWER):
                parts.append(text[text.index(REASONING) : text.index(ANSWER)])
        if self._calls:
            prompt = self._render_if_shown([QUESTION], USER, generation=True)
            call = self._render_if_shown([QUESTION, CALLING], VALUE)
            if call.startswith(prompt):
                parts.append(call[len(prompt) : call.rindex(VALUE)])
            calls = self._render_if_shown([QUESTION, CALLING_TWICE], OTHER_VALUE)
            if VALUE in calls:
                parts.append(calls[calls.rindex(VALUE) : calls.rindex(OTHER_VALUE)])
        return {token for part in parts for *_, token in self._find_tokens(part)}

    def _find_ending(
        self, messages: list[Message], mark: str, next_message: Message, options: dict[str, Any],
        default_ending: TurnEnding | None = None,
    ) -> TurnEnding | None:  # fmt: skip
        """Find the ending of the last turn, whose content ends with `mark`. default_ending: ending of other turns."""
        rendered_turn = self._render_if_shown(messages, mark, options)
        with_next = self._render_if_shown([*messages, next_message], NEXT, options)
        if not rendered_turn:
            return None
        tail, before_next, between = rendered_turn.rpartition(mark)[2], with_next.rpartition(NEXT)[0], ""
        if mark in before_next:
            between = before_next.rpartition(mark)[2]
            if ending_tokens := self._find_ending_tokens(rendered_turn, tail, between):
                start, _, stop = ending_tokens[-1]
                return TurnEnding(tail[start:], stop, stop, "written")
        for text in (tail, between):
            first = next((token for token in self._find_tokens(text) if token[2] not in self._inner_tokens), None)
            if first is None:
                continue
            start, end, stop = first
            if default_ending is not None and default_ending.stop != stop == self._first_token(rendered_turn):
                return replace(default_ending, removed=text[start:], added=default_ending.stop)
            if text is tail:
                return TurnEnding(tail[start:], stop, stop, "written")
            origin = "role" if rendered_turn.partition(USER)[0].rstrip().endswith(stop) else "later"
            if between.startswith(tail):
                return TurnEnding("", between[len(tail) : end], stop, origin)
            return TurnEnding(tail, between[:end], stop, origin)
        eos = self._variables.get("eos_token")
        has_prompt = self._render_if_shown([QUESTION], USER, generation=True) != self._render_if_shown([QUESTION], USER)
        return TurnEnding("", str(eos), str(eos), "eos") if eos and has_prompt else None

    def _find_ending_tokens(self, rendered_turn: str, tail: str, between: str) -> list[tuple[int, int, str]]:
        """Return the tokens that end a turn both at the end and before another turn, as (start, end, token).

        tail, between: the text after the turn's content at the end, and before the content of the next turn.
        """
        turn_start, shared = self._first_token(rendered_turn), shared_prefix_length(tail, between)
        tokens = takewhile(lambda token: token[1] <= shared and token[2] != turn_start, self._find_tokens(tail))
        return [token for token in tokens if token[2] not in self._inner_tokens]

    def _first_token(self, text: str) -> str:
        """Return the first added token other than bos."""
        bos = self._variables.get("bos_token")
        return next((token for *_, token in self._find_tokens(text) if token != bos), "")

    def _find_delimiters(self, switches: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """Yield the text before reasoning and the text between reasoning and answer, for each option and context."""
        for options in switches:
            for messages, mark in CONTEXTS:
                text = self._render_if_shown([*messages, THINKING], REASONING, options)
                before, _, after = text.partition(REASONING)
                if mark in before and ANSWER in after and REASONING not in after:
                    yield before.rpartition(mark)[2], after.partition(ANSWER)[0]

    def _find_reasoning_marks(self) -> Iterator[tuple[str, str]]:
        """Yield delimiters such as <think> and </think>."""
        for opening, closing in self._delimiters:
            match = re.search(r"([<\[])([^<>\[\]/]+)([>\]])\s*$", opening)
            if match and closing.lstrip().startswith(end := f"{match[1]}/{match[2]}{match[3]}"):
                yield match[0].rstrip(), end

    def _find_splices(self, options: dict[str, Any], answer: Message) -> tuple[tuple[PromptSplice, ...], str]:
        """Return the splices for turns like `answer`, and the kind of its prompt after a user turn.

        The kind is prefix (of the training text, without opening a reasoning block), opens_block (it opens a reasoning
        block), writes_block (it writes a complete block) or other.
        """
        splices: list[PromptSplice] = []
        prompt_kinds, header = [], ""
        call = replace(answer, content="", tool_calls=(_call(),))
        for messages, mark in CONTEXTS:
            prompt = self._render_if_shown(messages, mark, options, generation=True)
            prompt_end = prompt.rpartition(mark)[2]
            for turn, content in ((answer, ANSWER), (call, TOOL)):
                content = REASONING if turn.reasoning else content
                _, has_mark, turn_text = self._render_if_shown([*messages, turn], content, options).rpartition(mark)
                if not prompt or not has_mark or content not in turn_text:
                    continue
                written, _, rest = turn_text.partition(content)
                closing = rest.partition(TOOL if turn.tool_calls else ANSWER)[0] if turn.reasoning else None
                splice, prompt_kind = self._find_splice(prompt_end, written, closing, header)
                prompt_kinds.append(prompt_kind)
                splices += [splice] if splice is not None else []
            if prompt_kinds[:1] == ["prefix"]:
                header = header or prompt_end
        ordered = sorted(dict.fromkeys(splices), key=lambda splice: -len(splice.prompt_end + splice.removed))
        return tuple(ordered), prompt_kinds[0] if prompt_kinds else "other"

    def _find_splice(
        self, prompt: str, written: str, reasoning_closing: str | None, header: str
    ) -> tuple[PromptSplice | None, str]:
        """Return the splice for a turn, if one is needed, and the kind of its prompt as in `_find_splices`.

        prompt: the text after the last message in the prompt. written: the text between the last message and the answer
        in the training text. reasoning_closing: the text after the reasoning of the answer, if it has any. header:
        `prompt` after a user turn, if it is known from an earlier context, else ''.
        """
        head = self._shared_prefix(prompt, written)
        text_rest, prompt_rest = written[len(head) :], prompt[len(head) :]
        splice = partial(PromptSplice, prompt, head)
        if reasoning_closing is not None:
            if not prompt_rest:
                return None, "prefix"
            if (start := text_rest.find(prompt_rest)) > 0:
                return splice(text_rest[: start + len(prompt_rest)], "", outside_reasoning=True), "prefix"
            if header.endswith(prompt_rest) and prompt_rest != header:
                return splice("", "", outside_reasoning=True), "prefix"
            closings = [reasoning_closing, *(closing for _, closing in self._delimiters)]
            is_closed = any(mark and mark in prompt_rest for mark in map(self._closing_mark, closings))
            return (None, "other") if text_rest or is_closed else (splice("", ""), "opens_block")
        closing = self._find_block_closing(prompt, written)
        if closing is None:
            if not prompt_rest:
                return None, "prefix"
            if text_rest.endswith(prompt_rest):  # earlier text changes when an answer follows
                return splice(text_rest, "", outside_reasoning=True), "prefix"
            # the training text continues the turn, but the prompt begins a new one
            if header.endswith(prompt_rest) and not text_rest:
                return splice("", "", outside_reasoning=True), "prefix"
            num_marks = len(self._find_tokens(prompt_rest)) or len(re.findall(r"<[^<>]+>", prompt_rest))
            if "</" not in prompt_rest and num_marks < 2:  # not a reasoning block
                return None, "other"
            return splice(text_rest if prompt_rest.endswith(text_rest) else "", ""), "writes_block"
        mark = self._closing_mark(closing)
        if not prompt_rest and mark in text_rest:
            return None, "opens_block"
        if text_rest and closing.endswith(text_rest):
            return splice("", closing.removesuffix(text_rest)), "opens_block"
        return splice(text_rest if mark in text_rest else "", closing), "opens_block"

    def _shared_prefix(self, prompt: str, written: str) -> str:
        """Return the shared prefix of two texts, shortened so that it does not end inside an added token of either."""
        end = shared_prefix_length(prompt, written)
        for text in (prompt, written):
            end = min([end, *(start for start, stop, _ in self._find_tokens(text) if start < end < stop)])
        return prompt[:end]

    def _find_block_closing(self, prompt: str, written: str) -> str | None:
        """Return the text that closes the reasoning block that a prompt opens, or None if it opens none."""
        for opening, closing in self._delimiters:
            is_open = prompt.startswith(opening) and self._closing_mark(closing) not in prompt[len(opening) :]
            if is_open and not prompt == opening == written:
                return closing
            if prompt == opening.rstrip() and prompt != written:
                return opening[len(prompt) :] + closing
        match = _OPEN_BLOCK.search(prompt)
        if match and f"</{match[1]}>" in self._source:
            return f"\n</{match[1]}>\n\n" if prompt.endswith("\n") else f"</{match[1]}>"
        return None

    def _closing_mark(self, closing: str) -> str:
        """Return the first added token of a text that closes a reasoning block, or the text if it has none."""
        tokens = self._find_tokens(closing)
        return tokens[0][2] if tokens else closing.strip()

    def _make_mode(
        self, options: dict[str, Any], splices: tuple[PromptSplice, ...], thinking: tuple[PromptSplice, ...] = ()
    ) -> Mode | None:
        ending = self._find_ending([QUESTION, PLAIN], ANSWER, NEXT_QUESTION, options)
        if ending is None:
            return None
        call_ending = self._find_ending([QUESTION, CALLING], VALUE, RESULT, options, ending) if self._calls else None
        return Mode(options, ending, call_ending, splices, thinking)

    def _find_empty_block_mode(self, switches: Sequence[dict[str, Any]]) -> Mode | None:
        """Return a mode with options that change the prompt so that it no longer opens a reasoning block."""
        prompt = self._render_if_shown([QUESTION], USER, generation=True)
        for options in switches[1:]:
            switched = self._render_if_shown([QUESTION], USER, options, generation=True)
            splices, prompt_kind = self._find_splices(options, PLAIN)
            differs = switched and switched.rpartition(USER)[2] != prompt.rpartition(USER)[2]
            if differs and prompt_kind in ("prefix", "writes_block"):
                return self._make_mode(options, splices)
        return None

    def _find_thinking_mode(self, switches: Sequence[dict[str, Any]]) -> Mode | None:
        """Return a mode for rows with reasoning, preferably with a prompt that does not open a reasoning block."""
        for preferred_kind in ("prefix", "opens_block"):
            for options in switches:
                splices, prompt_kind = self._find_splices(options, THINKING)
                if prompt_kind == preferred_kind and (
                    mode := self._make_mode(options, self._find_splices(options, PLAIN)[0], splices)
                ):
                    return mode
        return None


def _is_tools_name(name: str) -> bool:
    return "tool" in name or "function" in name
