"""Find out where a chat template ends turns and writes reasoning, by rendering test conversations.

This works for any model family: the texts of the conversations are words that no template has special cases for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from strop.data.rendering.template_source import DEFAULT_DAY, TEMPLATE_ERRORS, BoundedTemplate, compared_values
from strop.data.types import Message


@dataclass(frozen=True)
class InputFormat:
    """The input format of a template: how it takes tools, calls, ids, arguments and reasoning."""

    tools: str = "tools"  # name of the variable with the tools
    tools_as_text: bool = False  # tools are JSON in a string
    no_tools: Any = None  # value of the variable without tools
    arguments: Literal["object", "text"] = "object"  # of a call, an object or JSON in a string
    # of calls: as in the row, generated if missing, or nine letters and digits (required by Mistral)
    ids: Literal["unchanged", "generated", "nine_chars"] = "unchanged"
    reasoning: Literal["fields", "parts", "blocks"] = "fields"  # of the message, or parts or blocks of its content
    required: dict[str, Any] = field(default_factory=dict)  # variables without which the template does not render

    def variables(self, tools: Sequence[Any] | None) -> dict[str, Any]:
        value = list(tools) if tools else self.required.get(self.tools, self.no_tools)
        if tools and self.tools_as_text:
            value = json.dumps(value, ensure_ascii=False)
        return {"tools": self.no_tools, **self.required, self.tools: value}

    def values(self, messages: Sequence[Message], *, reasoning: bool) -> list[dict[str, Any]]:
        """Return messages in the template's input format, with or without reasoning."""
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
        if id is None and self.ids != "unchanged":
            id = f"call{number:05}"
        return call if id is None else {**call, "id": self._valid_id(id)}

    def _match_result(
        self, message: Message, open_calls: list[tuple[str | None, str]]
    ) -> tuple[str | None, str | None]:
        """Return id and name of the call that a tool result belongs to: by id, by name, or the first open call."""
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
    """How a turn ends: the suffix `cut` of the rendered text is replaced with `add`, whose last token is `stop`.

    how: `written` by the template; `later`: written only before another turn; `role`: the token that begins the next
    turn; `eos`: the tokenizer's end-of-sequence token.
    """

    cut: str
    add: str
    stop: str
    how: str


@dataclass(frozen=True)
class PromptSplice:
    """How to splice a prompt into a training text of which it is not a prefix.

    For a prompt that ends with `prompt_end`, the training text has `text_head` and then `removed` in the same position.
    The spliced text is the prompt, `inserted`, and the training text after `removed`. outside_reasoning: the texts
    differ in what the template writes around turns, not in reasoning.
    """

    prompt_end: str
    text_head: str
    removed: str
    inserted: str
    outside_reasoning: bool = False


@dataclass(frozen=True)
class Mode:
    """How to render a row."""

    options: dict[str, Any]  # variables of the template
    ending: TurnEnding
    call_ending: TurnEnding | None  # of turns with calls; None: the same
    splices: tuple[PromptSplice, ...] = ()  # for turns without reasoning
    thinking_splices: tuple[PromptSplice, ...] = ()  # for turns with reasoning


@dataclass(frozen=True)
class Traits:
    """The measured behaviour of a chat template."""

    input_format: InputFormat
    opening: str  # text of a prompt with one user turn
    texts: tuple[str, ...]  # plain conversations as rendered, to find control tokens in
    system: bool  # supports a system turn
    tools: bool  # shows tools
    calls: bool  # shows tool calls
    call_error: str  # why calls are refused
    parallel_calls: bool  # shows several calls in a turn
    reasoning: bool  # shows reasoning
    reasoning_with_calls: bool  # shows reasoning in turns with calls
    reasoning_ends: tuple[str, ...]  # texts between reasoning and answer
    reasoning_marks: tuple[tuple[str, str], ...]  # pairs around reasoning, such as <think> and </think>
    # rows without reasoning need an empty reasoning block, because the prompt opens or writes one
    needs_empty_block: bool
    default_mode: Mode  # for rows without reasoning
    empty_block_mode: Mode  # for rows without reasoning, with the empty block written when reasoning is off
    thinking_mode: Mode  # for rows with reasoning

    @property
    def endings(self) -> list[TurnEnding]:
        endings = [
            (mode.ending, mode.call_ending) for mode in (self.default_mode, self.empty_block_mode, self.thinking_mode)
        ]
        return list(dict.fromkeys(ending for pair in endings for ending in pair if ending is not None))


# --- probes --------------------------------------------------------------------------------------------------------

USER, ANSWER, SYSTEM, TOOL = "Qzuserq", "Qzanswerq", "Qzsystemq", "qztoolq"
NEXT, REASONING, VALUE, OTHER_VALUE = "Qznextq", "Qzthoughtq", "qzvalueq", "qzotherq"

_REASONING_OPTION = re.compile("think|reason|thought")  # names of options that may turn reasoning on and off
_DATA_AS_TEXT = re.compile(r"""["']type["']: ["'](thinking|thoughts)["']""")  # content parts written as data
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


class Prober:
    """Probe one template.

    read: the variables that it reads. variables: values of the tokenizer's, such as bos_token. added: the tokenizer's
    added tokens. fixed: options set by the user, which are not probed.
    """

    def __init__(
        self, jinja: BoundedTemplate, source: str, read: frozenset[str], variables: Mapping[str, Any],
        added: Sequence[str], fixed: frozenset[str],
    ) -> None:  # fmt: skip
        self._jinja, self._source, self._variables = jinja, source, variables
        self._added = [token for token in added if not token.isspace()]
        self._read, self._fixed = read, fixed
        self._tree = jinja.environment.parse(source)
        self._input_format = InputFormat()

    def traits(self) -> Traits | None:
        """Return the traits; None if the template shows no assistant turn or does not end it."""
        self._input_format = self._find_plain_format()
        conversation = self._render([QUESTION, PLAIN])
        if ANSWER not in conversation:
            return None
        tools = self._find_tools()
        self._calls = self._find_calls()
        self._find_reasoning()
        with_call = [QUESTION, replace(THINKING, content="", tool_calls=(_call(),))]
        switches = list(self._reasoning_switches())
        reasoning_with_calls = any(self._render_if_shown(with_call, REASONING, options) for options in switches)
        self._delimiters = list(dict.fromkeys(self._find_delimiters(switches)))
        self._inner_tokens = self._find_inner_tokens(switches)
        default_splices, state = self._find_splices({}, PLAIN)
        default = self._mode({}, tuple(splice for splice in default_splices if splice.outside_reasoning))
        if default is None:
            return None
        texts = (
            conversation,
            self._render_if_shown([QUESTION, PLAIN, NEXT_QUESTION], NEXT),
            self._render_if_shown([Message("system", SYSTEM), QUESTION], USER),
        )
        return Traits(
            input_format=self._input_format,
            opening=self._render([QUESTION], generation=True),
            texts=texts,
            system=bool(self._render_if_shown([Message("system", SYSTEM), QUESTION], SYSTEM, generation=True)),
            tools=tools,
            calls=self._calls,
            call_error="" if self._calls else self._call_error(),
            parallel_calls=self._calls and bool(self._render_if_shown([QUESTION, CALLING_TWICE], OTHER_VALUE)),
            reasoning=bool(self._delimiters),
            reasoning_with_calls=reasoning_with_calls,
            reasoning_ends=tuple(dict.fromkeys(close for _, close in self._delimiters)),
            reasoning_marks=tuple(dict.fromkeys(self._reasoning_marks())),
            needs_empty_block=state in ("opens_block", "writes_block"),
            default_mode=default,
            empty_block_mode=self._empty_block_mode(switches, replace(default, splices=default_splices), state),
            thinking_mode=self._thinking_mode(switches, replace(default, splices=default_splices)),
        )

    def _render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] = (), generation: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        values = self._input_format.values(messages, reasoning=True)
        variables = {**self._variables, **self._input_format.variables(tools), **(options or {})}
        return self._jinja.render(messages=values, add_generation_prompt=generation, **variables)

    def _render_if_shown(
        self, messages: Sequence[Message], text: str, options: Mapping[str, Any] | None = None,
        *, tools: Sequence[Any] = (), generation: bool = False,
    ) -> str:  # fmt: skip
        """Return the rendered messages if they contain `text`, else ''."""
        try:
            rendered = self._render(messages, tools=tools, generation=generation, options=options)
        except TEMPLATE_ERRORS:
            return ""
        return rendered if text in rendered else ""

    def _tokens(self, text: str) -> list[tuple[int, int, str]]:
        """Return the added tokens in a text: start, end, token."""
        present = sorted((token for token in self._added if token in text), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, present)) or "(?!)")
        return [(match.start(), match.end(), match[0]) for match in pattern.finditer(text)]

    def _find_plain_format(self) -> InputFormat:
        """Find the value for no tools, and the variables that the template requires."""
        required: dict[str, Any] = {}
        while True:
            first_error: Exception | None = None
            no_tools: Any
            for no_tools in (None, []):
                self._input_format = InputFormat(no_tools=no_tools, required=dict(required))
                try:
                    self._render([QUESTION, PLAIN])
                    return self._input_format
                except TEMPLATE_ERRORS as error:
                    first_error = first_error or error
            assert first_error is not None
            missing = re.match(r"'(\w+)' is undefined", str(first_error))  # Jinja's message
            if missing is None or (name := missing[1]) in required or name not in self._read:
                raise first_error
            required[name] = f"{DEFAULT_DAY:%Y-%m-%d}" if "date" in name else "[]" if _is_tools_name(name) else ""

    def _find_tools(self) -> bool:
        """Set the variable and format with which tools are shown. Return whether tools are supported."""
        plain = self._input_format
        for name in ["tools", *sorted(name for name in self._read if _is_tools_name(name))]:
            for as_text in (False, True):
                self._input_format = replace(plain, tools=name, tools_as_text=as_text)
                if self._render_if_shown([QUESTION], TOOL, tools=[TOOL_DEFINITION]):
                    return True
        self._input_format = plain
        return False

    def _find_calls(self) -> bool:
        """Set the formats of ids and arguments with which calls are shown. Return whether calls are supported."""
        plain = self._input_format
        for ids in ("unchanged", "generated", "nine_chars"):
            candidates: list[tuple[bool, InputFormat]] = []
            for arguments in ("object", "text"):
                self._input_format = replace(plain, ids=ids, arguments=arguments)
                text = self._exchange_with_call(ids)
                if text:
                    call = text[: text.rindex(VALUE) + len(VALUE) + 20]
                    not_json = r"\"x\"" in call or "{'x'" in call  # JSON within JSON; an object as Python's repr
                    candidates.append((not_json, self._input_format))
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
        """Render a call, its result and an answer; return '' if ids of this form are refused."""
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
            if not text or (
                ids != "nine_chars" and not self._render_if_shown([*messages, result], NEXT) and self._shows_results()
            ):
                return ""
        return text

    def _shows_results(self) -> bool:
        before, self._input_format = self._input_format, replace(self._input_format, ids="nine_chars")
        shown = bool(self._render_if_shown([QUESTION, CALLING, RESULT], NEXT))
        self._input_format = before
        return shown

    def _find_reasoning(self) -> None:
        """Set the format with which reasoning is shown, if it is supported."""
        plain = self._input_format
        for form in ("fields", "parts", "blocks"):
            self._input_format = replace(plain, reasoning=form)
            for options in self._reasoning_switches():
                text = self._render_if_shown([QUESTION, THINKING], REASONING, options)
                if text.count(REASONING) == 1 and text.count(ANSWER) == 1 and not _DATA_AS_TEXT.search(text):
                    return
        self._input_format = plain

    def _reasoning_switches(self) -> Iterator[dict[str, Any]]:
        """Yield options that may turn reasoning on or off, the template's default first."""
        yield {}
        for name in sorted(self._read - self._fixed):
            if _REASONING_OPTION.search(name):
                for value in dict.fromkeys([True, False, *compared_values(self._tree, name)]):
                    yield {name: value}

    def _find_inner_tokens(self, switches: Sequence[dict[str, Any]]) -> set[str]:
        """Return the tokens after reasoning and between calls, which do not end the assistant turn."""
        inner: set[str] = set()
        for options in switches:
            text = self._render_if_shown([QUESTION, THINKING], REASONING, options)
            if text.count(REASONING) == 1 and text.count(ANSWER) == 1 and text.index(REASONING) < text.index(ANSWER):
                inner |= {token for *_, token in self._tokens(text[text.index(REASONING) : text.index(ANSWER)])}
        text = self._render_if_shown([QUESTION, CALLING_TWICE], OTHER_VALUE) if self._calls else ""
        prompt = self._render_if_shown([QUESTION], USER, generation=True)
        call = self._render_if_shown([QUESTION, CALLING], VALUE)
        if self._calls and call.startswith(prompt):
            inner |= {token for *_, token in self._tokens(call[len(prompt) : call.rindex(VALUE)])}
        if VALUE in text:
            inner |= {token for *_, token in self._tokens(text[text.rindex(VALUE) : text.rindex(OTHER_VALUE)])}
        return inner

    def _ending(
        self, messages: list[Message], mark: str, next_message: Message, options: dict[str, Any],
        default_ending: TurnEnding | None = None,
    ) -> TurnEnding | None:  # fmt: skip
        """Find how the last turn ends, whose content ends with `mark`. default_ending: how other turns end."""
        rendered_turn = self._render_if_shown(messages, mark, options)
        with_next = self._render_if_shown([*messages, next_message], NEXT, options)
        if not rendered_turn:
            return None
        tail, between = rendered_turn[rendered_turn.rindex(mark) + len(mark) :], ""
        end = with_next.rfind(NEXT)
        if mark in with_next[: max(end, 0)]:
            between = with_next[with_next.rindex(mark, 0, end) + len(mark) : end]
            ending_tokens = self._ending_tokens(rendered_turn, tail, between)
            if ending_tokens:
                start, _, stop = ending_tokens[-1]
                return TurnEnding(tail[start:], stop, stop, "written")
        for text in (tail, between):
            first = next((place for place in self._tokens(text) if place[2] not in self._inner_tokens), None)
            if first is None:
                continue
            start, end, stop = first
            if default_ending is not None and default_ending.stop != stop == self._first_token(rendered_turn):
                return replace(default_ending, cut=text[start:], add=default_ending.stop)
            if text is tail:
                return TurnEnding(tail[start:], stop, stop, "written")
            how = "role" if rendered_turn.partition(USER)[0].rstrip().endswith(stop) else "later"
            if between.startswith(tail):
                return TurnEnding("", between[len(tail) : end], stop, how)
            return TurnEnding(tail, between[:end], stop, how)
        eos = self._variables.get("eos_token")
        has_prompt = self._render_if_shown([QUESTION], USER, generation=True) != self._render_if_shown([QUESTION], USER)
        return TurnEnding("", str(eos), str(eos), "eos") if eos and has_prompt else None

    def _ending_tokens(self, rendered_turn: str, tail: str, between: str) -> list[tuple[int, int, str]]:
        """Return the tokens that end a turn, last or not, without those that begin the next turn."""
        turn_start, shared = self._first_token(rendered_turn), _shared_length(tail, between)
        places = []
        for place in self._tokens(tail):
            if place[1] > shared or place[2] == turn_start:
                break
            if place[2] not in self._inner_tokens:
                places.append(place)
        return places

    def _first_token(self, text: str) -> str:
        """Return the first added token other than bos."""
        bos = self._variables.get("bos_token")
        return next((token for *_, token in self._tokens(text) if token != bos), "")

    def _find_delimiters(self, switches: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """Yield pairs of delimiters: the text before reasoning, and the text between reasoning and answer."""
        for options in switches:
            for messages, mark in self._contexts():
                text = self._render_if_shown([*messages, THINKING], REASONING, options)
                start = text.find(REASONING)
                if text.count(REASONING) == 1 and ANSWER in text[start:] and mark in text[:start]:
                    begin = text.rindex(mark, 0, start) + len(mark)
                    yield text[begin:start], text[start + len(REASONING) : text.index(ANSWER, start)]

    def _reasoning_marks(self) -> Iterator[tuple[str, str]]:
        for lead, close in self._delimiters:
            match = re.search(r"([<\[])([^<>\[\]/]+)([>\]])\s*$", lead)
            if match and close.lstrip().startswith(end := f"{match[1]}/{match[2]}{match[3]}"):
                yield match[0].rstrip(), end

    def _contexts(self) -> list[tuple[list[Message], str]]:
        """Return the messages before an assistant turn, and the last text in them."""
        return [([QUESTION], USER), ([QUESTION, CALLING, RESULT], NEXT)]

    def _find_splices(self, options: dict[str, Any], last: Message) -> tuple[tuple[PromptSplice, ...], str]:
        """Return the splices for turns like `last`, and how its prompt after a user turn relates to the training text.

        The relation is prefix (the prompt is a prefix and opens no block), opens_block (it opens a reasoning block),
        writes_block (it writes a complete block) or other.
        """
        splices: list[PromptSplice] = []
        states, header = [], ""
        call = replace(last, content="", tool_calls=(_call(),))
        for messages, mark in self._contexts():
            prompt = self._render_if_shown(messages, mark, options, generation=True)
            for turn, first in ((last, ANSWER), (call, TOOL)):
                first = REASONING if turn.reasoning else first
                text = self._render_if_shown([*messages, turn], first, options)
                if not prompt or mark not in text or first not in text[text.rindex(mark) :]:
                    continue
                begin = text.rindex(mark) + len(mark)
                written = text[begin : text.index(first, begin)]
                prompt_end = prompt[prompt.rindex(mark) + len(mark) :]
                splice, state = self._splice(prompt_end, written, bool(turn.reasoning), header)
                states.append(state)
                splices += [splice] if splice is not None else []
            if states[:1] == ["prefix"]:
                header = header or prompt[prompt.rfind(mark) + len(mark) :]
        ordered = sorted(dict.fromkeys(splices), key=lambda splice: -len(splice.prompt_end + splice.removed))
        return tuple(ordered), states[0] if states else "other"

    def _splice(self, prompt: str, written: str, has_reasoning: bool, header: str) -> tuple[PromptSplice | None, str]:
        """Return the splice of one kind of turn, and its relation as in `_find_splices`.

        prompt, written: the text after the last message, in the prompt and in the training text up to the answer.
        header: `prompt` after a user turn, if this is another context; otherwise ''.
        """
        head = self._shared_prefix(prompt, written)
        text_rest, prompt_rest = written[len(head) :], prompt[len(head) :]
        if has_reasoning:
            if not prompt_rest:
                return None, "prefix"
            if (start := text_rest.find(prompt_rest)) > 0:
                return PromptSplice(
                    prompt, head, text_rest[: start + len(prompt_rest)], "", outside_reasoning=True
                ), "prefix"
            if header.endswith(prompt_rest) and prompt_rest != header:
                return PromptSplice(prompt, head, "", "", outside_reasoning=True), "prefix"
            return (PromptSplice(prompt, head, "", ""), "opens_block") if not text_rest else (None, "other")
        close = self._open_block_end(prompt, written)
        if close is None:
            if not prompt_rest:
                return None, "prefix"
            if text_rest.endswith(prompt_rest):  # written differently once an answer follows
                return PromptSplice(prompt, head, text_rest, "", outside_reasoning=True), "prefix"
            # the template continues the turn, but prompts for a new one
            if header.endswith(prompt_rest) and not text_rest:
                return PromptSplice(prompt, head, "", "", outside_reasoning=True), "prefix"
            num_marks = len(self._tokens(prompt_rest)) or len(re.findall(r"<[^<>]+>", prompt_rest))
            if "</" not in prompt_rest and num_marks < 2:  # unknown text
                return None, "other"
            return PromptSplice(prompt, head, text_rest if prompt_rest.endswith(text_rest) else "", ""), "writes_block"
        mark = self._block_end_mark(close)
        if not prompt_rest and mark in text_rest:
            return None, "opens_block"
        if text_rest and close.endswith(text_rest):
            return PromptSplice(prompt, head, "", close.removesuffix(text_rest)), "opens_block"
        return PromptSplice(prompt, head, text_rest if mark in text_rest else "", close), "opens_block"

    def _shared_prefix(self, prompt: str, written: str) -> str:
        """Return the shared prefix of two texts, without cutting a token of either."""
        end = _shared_length(prompt, written)
        for text in (prompt, written):
            end = min([end, *(start for start, stop, _ in self._tokens(text) if start < end < stop)])
        return prompt[:end]

    def _open_block_end(self, prompt: str, written: str) -> str | None:
        """Return the text that closes the reasoning block that a prompt opens, or None if it opens none."""
        for lead, close in self._delimiters:
            mark = self._block_end_mark(close)
            if prompt.startswith(lead) and mark not in prompt[len(lead) :] and not prompt == lead == written:
                return close
            if prompt == lead.rstrip() and prompt != written:
                return lead[len(prompt) :] + close
        match = _OPEN_BLOCK.search(prompt)
        if match and f"</{match[1]}>" in self._source:
            return f"\n</{match[1]}>\n\n" if prompt.endswith("\n") else f"</{match[1]}>"
        return None

    def _block_end_mark(self, close: str) -> str:
        tokens = self._tokens(close)
        return tokens[0][2] if tokens else close.strip()

    def _mode(
        self, options: dict[str, Any], splices: tuple[PromptSplice, ...], thinking: tuple[PromptSplice, ...] = ()
    ) -> Mode | None:
        ending = self._ending([QUESTION, PLAIN], ANSWER, NEXT_QUESTION, options)
        if ending is None:
            return None
        call_ending = self._ending([QUESTION, CALLING], VALUE, RESULT, options, ending) if self._calls else None
        return Mode(options, ending, call_ending, splices, thinking)

    def _empty_block_mode(self, switches: Sequence[dict[str, Any]], default: Mode, state: str) -> Mode:
        """Return the mode of rows without reasoning: with options that write an empty block, else the default."""
        prompt = self._render_if_shown([QUESTION], USER, generation=True)
        prompt_end = prompt[prompt.rfind(USER) :]
        if state != "writes_block":
            for options in switches[1:]:
                switched = self._render_if_shown([QUESTION], USER, options, generation=True)
                splices, switched_state = self._find_splices(options, PLAIN)
                differs = switched and switched[switched.rfind(USER) :] != prompt_end
                if differs and switched_state in ("prefix", "writes_block"):
                    return self._mode(options, splices) or default
        return default

    def _thinking_mode(self, switches: Sequence[dict[str, Any]], default: Mode) -> Mode:
        for preferred_state in ("prefix", "opens_block"):
            for options in switches:
                splices, state = self._find_splices(options, THINKING)
                if state == preferred_state and (
                    mode := self._mode(options, self._find_splices(options, PLAIN)[0], splices)
                ):
                    return mode
        return default


def _is_tools_name(name: str) -> bool:
    return "tool" in name or "function" in name


def _shared_length(left: str, right: str) -> int:
    differing = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differing, min(len(left), len(right)))
