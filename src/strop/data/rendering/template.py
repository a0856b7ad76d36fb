"""A chat template: prompts and training texts, and where assistant turns lie in them.

What a template does is found by rendering (traits.py), so this holds for any Jinja template.
Templates come from model files, which are not trusted: they run in a sandbox, and bounded (bounded.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from strop.data.rendering.encoder import ControlText
from strop.data.rendering.prober import Prober
from strop.data.rendering.sandbox import BoundedTemplate
from strop.data.rendering.template_source import check_options, day_formats, names_read, suspicions, with_options
from strop.data.rendering.traits import Join, Mode
from strop.data.row_errors import TEMPLATE_FAULTS, RenderError
from strop.data.types import Conversation, Message
from strop.errors import ModelError

MAX_TEMPLATE_CHARS = 1_000_000
OTHER = "choose another data.template"

Reasoning = Literal["auto", "as-is", "empty", "drop", "refuse"]


@dataclass(frozen=True)
class Draft:
    """A training text and its supervised spans [start, end) in characters, each with its weight.

    A span runs from the end of the generation prompt to the end of the stop token. `odd`: the text holds
    control tokens as mere text, which stand there as the private characters of ControlText.
    """

    text: str
    spans: tuple[tuple[int, int, float], ...]
    odd: bool


class ChatTemplate:
    """A template, what it was found to do, and what becomes of reasoning.

    source, hash; options: what was written into it; traits; opening: how a prompt looks; stops: end-of-turn tokens as
    text; reasoning: the choice, with `auto` decided; warnings: sentences for the user.
    Raises ModelError where the template is broken or ends an assistant turn with no token that could stop generation.
    """

    def __init__(
        self,
        source: str,
        *,
        added: dict[str, bool],
        variables: dict[str, Any],
        options: Mapping[str, Any] | None = None,
        reasoning: Reasoning = "auto",
    ) -> None:
        """added: text of each added token -> is it special? variables: bos_token, eos_token, ... for the template.
        options: values to write into the template; None: it has them already, and its clock runs on.
        """
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(f"the chat template has {len(source)} characters", fix=OTHER)
        try:
            self._jinja = BoundedTemplate(source)
            tree = self._jinja.environment.parse(source)
            self.options_read = names_read(tree)
            if options is not None:
                check_options(options, self.options_read, "data.template_options")
                source = with_options(source, options, day_formats(tree))
                self._jinja = BoundedTemplate(source)
            self._variables = {**variables, "documents": None}
            fixed = frozenset(options or ())
            prober = Prober(self._jinja, source, self.options_read, self._variables, list(added), fixed)
            traits = prober.traits()
        except TEMPLATE_FAULTS as fault:
            raise ModelError(f"the chat template is broken: {fault}", fix=OTHER) from fault
        if traits is None:
            raise ModelError("the chat template shows no assistant turn that could be told from the rest", fix=OTHER)
        if options is not None and traits.dialect.given:
            source = with_options(source, traits.dialect.given, [])
            self._jinja = BoundedTemplate(source)
        self.source, self.traits = source, traits
        self.hash = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self.opening = traits.opening
        self.stops = tuple(dict.fromkeys(ending.stop for ending in traits.endings))
        special = [token for token, is_special in added.items() if is_special]
        texts = (traits.opening, *traits.texts)
        written = [token for token in added if not token.isspace() and any(token in text for text in texts)]
        self.control = ControlText(list(dict.fromkeys([*special, *self.stops, *written])))
        self.warnings = tuple(suspicions(tree, source))
        self.options = dict(options or {})
        self.reasoning = reasoning if reasoning != "auto" else "empty" if self.traits.needs_empty else "as-is"

    @property
    def supports_system(self) -> bool:
        return self.traits.system

    @property
    def supports_tools(self) -> bool:
        return self.traits.tools

    @property
    def supports_tool_calls(self) -> bool:
        return self.traits.calls

    @property
    def supports_reasoning(self) -> bool:
        return self.traits.reasoning or self.traits.reasoning_beside_calls

    def thinks(self, messages: Sequence[Message]) -> bool:
        """Is this a row whose reasoning is shown?"""
        traits = self.traits
        return self.reasoning != "drop" and any(
            message.reasoning and (traits.reasoning or (message.tool_calls and traits.reasoning_beside_calls))
            for message in messages
        )

    def served_options(self, *, thinking: int, rows: int) -> dict[str, Any]:
        """The options with which the template asks as it does in training, where all rows think, or none does."""
        if 0 < thinking < rows or not rows:
            return {}
        if thinking:
            return self.traits.thinking.options
        return self.traits.empty.options if self.reasoning in ("empty", "drop") else self.traits.bare.options

    def apart(self, message: Message) -> Message:
        """An answer whose text begins with reasoning between the marks that the template itself writes around it, with
        the reasoning in its own field: there the marks would be plain text, behind the template's own."""
        text = message.content.lstrip()
        for begin, end in self.traits.marks if message.role == "assistant" and not message.reasoning else ():
            thought, closed, said = text.removeprefix(begin).partition(end)
            if text.startswith(begin) and closed and (said.strip() or message.tool_calls):
                return replace(message, content=said.lstrip(), reasoning=thought.strip() or None)
        return message

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        options: Mapping[str, Any] | None = None,
    ) -> Draft:
        """The text that serving sends: the messages and the generation prompt (no spans). Raises RenderError.

        options: of this prompt alone; None: the template's own.
        """
        values, shown, odd = self._values(messages, tools, self.thinks(messages))
        if self.control.found(dict(options or {})):
            raise RenderError("control-token", "in an option of the template")
        text = self._try(values, self._given(shown, options or {}), generation=True)
        self._check_shown(messages, values, text)
        return Draft(text, (), odd)

    def mode(self, messages: Sequence[Message]) -> Mode:
        """How a row is rendered. Raises RenderError where it is refused for its reasoning, or for having none."""
        if self.thinks(messages):
            return self.traits.thinking
        if self.reasoning in ("empty", "drop"):
            return self.traits.empty
        if self.reasoning == "refuse":
            if any(message.reasoning for message in messages):  # and yet it is not shown
                raise RenderError("reasoning-not-shown")
            if self.traits.needs_empty:
                raise RenderError("reasoning-missing")
        return self.traits.bare

    def drafts(self, conversation: Conversation, *, silent_turns: bool = False) -> list[Draft]:
        """The training texts of a conversation: one, or one a turn where the template rewrites earlier turns.

        Each assistant turn is checked: its prompt must be a prefix of its text. Raises RenderError.
        silent_turns: give spans to turns of weight 0 too. Messages after the last such turn are left out.
        """
        messages = conversation.messages
        if silent_turns and (others := [m.role for m in messages if m.role != "assistant" and m.weight != 1.0]):
            raise RenderError("other-weight", others[0])
        mode, thinks = self.mode(messages), self.thinks(messages)
        values, tools, odd = self._values(messages, conversation.tools, thinks)
        given = self._given(tools, mode.options)
        turns: list[tuple[str, int, int, float]] = []
        last = 0
        for i, message in enumerate(messages):
            if message.role != "assistant" or not (message.weight or silent_turns):
                continue
            last = i
            prompt = self._try(values[:i], given, generation=True)
            text = self._try(values[: i + 1], given)
            joins = mode.thinking if thinks and message.reasoning else mode.plain
            text = _joined(prompt, text, joins, values[i - 1]["content"] if i else "")
            end, text = _ended(text, mode, calls=bool(message.tool_calls))
            if inside := [stop for stop in self.stops if text.find(stop, len(prompt), end - 1) >= 0]:
                raise RenderError("stop-inside", inside[0])
            self._check_turn(message, values[i], text[len(prompt) :], thinks)
            turns.append((text, len(prompt), end, message.weight))
        if not turns:
            raise RenderError("nothing-supervised")
        whole = turns[-1][0]
        self._check_shown(messages[:last], values[:last], whole, skip="assistant")
        if all(whole.startswith(text) for text, *_ in turns):
            return [Draft(whole, tuple(turn[1:] for turn in turns), odd)]
        return [Draft(text, ((start, end, weight),), odd) for text, start, end, weight in turns]

    def _values(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], reasoning: bool
    ) -> tuple[list[dict[str, Any]], list[Any] | None, bool]:
        """Messages and tools as the template sees them, control tokens in them masked; were there any?"""
        if not self.supports_system and any(message.role == "system" for message in messages):
            raise RenderError("system-unsupported")
        if tools and not self.supports_tools:
            raise RenderError("tools-unsupported", "a list of tools")
        for message in messages:
            if message.tool_calls and not self.supports_tool_calls:
                raise RenderError("tools-unsupported", f"a call: {self.traits.call_fault}".rstrip(": "))
            if len(message.tool_calls) > 1 and not self.traits.parallel:
                raise RenderError("tools-unsupported", "more than one call in a turn")
        values = self.traits.dialect.values(messages, reasoning=reasoning)
        shown = list(tools) or None
        if any(map(self.control.found, messages)) or self.control.found(shown):
            return self.control.mask(values), self.control.mask(shown), True
        return values, shown, False

    def _check_turn(self, message: Message, value: dict[str, Any], text: str, thinks: bool) -> None:
        """A turn whose words, reasoning or calls are not in its text would train on something else, silently."""
        self._check_shown([message], [value], text)
        content = value["content"]
        if isinstance(content, str) and not _holds(text, content.strip()) and self.reasoning != "drop":
            thought, _, answer = content.rpartition("</think>")
            thought = self.control.marks.sub("", thought).replace("<think>", "").strip()
            if thought not in text[: text.rindex(answer.strip())].replace("</think>", ""):
                raise RenderError("reasoning-lost")
        if thinks and message.reasoning:
            beside = bool(message.tool_calls)
            shown = self.traits.reasoning_beside_calls if beside else self.traits.reasoning
            if shown and not _holds(text, self._masked(message.reasoning).strip()):
                raise RenderError("text-lost", "the reasoning of a turn" + (" with calls" if beside else ""))
        for call in message.tool_calls:
            if not all(_holds(text, self._masked(part)) for part in _strings(call["function"])):
                raise RenderError("text-lost", "a tool call")

    def _masked(self, text: str) -> str:
        return str(self.control.mask(text)) if self.control.found(text) else text

    def _check_shown(
        self, messages: Sequence[Message], values: list[dict[str, Any]], text: str, skip: str = ""
    ) -> None:
        """A template that drops or rewrites the text of a message would train on something else, silently."""
        for message, value in zip(messages, values, strict=True):
            content = message.content if isinstance(value["content"], str) else self._masked(message.content)
            content = (value["content"] if isinstance(value["content"], str) else content).strip()
            if message.role == skip or _holds(text, content):
                continue
            if message.role == "assistant" and "</think>" in content and content.split("</think>")[-1].strip() in text:
                continue  # thinking written into the text, which some templates set apart
            raise RenderError("text-lost", "the text beside a tool call" if message.tool_calls else message.role)

    def _given(self, tools: list[Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """The template's variables beside the messages."""
        return {**self._variables, **self.traits.dialect.variables(tools), **options}

    def _try(self, messages: list[dict[str, Any]], given: dict[str, Any], *, generation: bool = False) -> str:
        try:
            return self._jinja.render(messages=messages, add_generation_prompt=generation, **given)
        except TEMPLATE_FAULTS as fault:
            raise RenderError("template-refused", str(fault)) from fault


def _joined(prompt: str, text: str, joins: Sequence[Join], last: Any) -> str:
    """The training text behind the prompt that serving sends. last: what the message before the turn says.

    Raises RenderError where the two do not go together.
    """
    ways = [(prompt, "")]  # what the text has in place of the prompt, and what is written between prompt and rest
    for join in joins:
        if prompt.endswith(join.prompt):
            way = (prompt[: len(prompt) - len(join.prompt)] + join.head + join.drop, join.insert)
            ways.insert(0 if join.head == join.prompt else len(ways), way)
    for lead, insert in ways:
        if text.startswith(lead):
            return prompt + insert + text[len(lead) :]
    # a template may write what came before otherwise once an answer follows: then the prompt's way counts
    for form in (
        (last, json.dumps(last, ensure_ascii=False), json.dumps(last)) if isinstance(last, str) and last else ()
    ):
        at = prompt.rfind(form)
        for lead, insert in ways:
            if at >= 0 and text.count(lead[at:]) == 1:
                return prompt + insert + text[text.index(lead[at:]) + len(lead) - at :]
    raise RenderError("prompt-not-prefix")


def _ended(text: str, mode: Mode, *, calls: bool) -> tuple[int, str]:
    """Where the stop token of the last turn ends, and the text up to there."""
    for ending in (mode.call_ending if calls else None, mode.ending):
        if ending is not None and text.endswith(ending.cut):
            text = text[: len(text) - len(ending.cut)] + ending.add
            return len(text), text
    raise RenderError("no-stop-token")


def _holds(text: str, part: str) -> bool:
    """Is `part` in the text, as it is or as JSON has it?"""
    if part in text:
        return True
    return any(json.dumps(part, ensure_ascii=plain)[1:-1] in text for plain in (False, True))


def _strings(value: Any) -> list[str]:
    """The strings of a call: its name, and the names and texts of its arguments."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        inner = [part for item in value.values() for part in _strings(item)]
        return [*(key for key in value if key not in ("name", "arguments")), *inner]
    return [part for item in value for part in _strings(item)] if isinstance(value, (list, tuple)) else []


# ---- from strop.data.rendering.describe ----
"""How a chat template is used, in words: for `strop check`, the report and the model card."""

from __future__ import annotations

from collections.abc import Iterator

from strop.data.rendering.template import ChatTemplate
from strop.data.rendering.template_source import CLOCK, fixed_day, literal

_ENDS = {
    "written": "",
    "later": ", which the template writes only where another turn follows: strop writes it after the last one too",
    "role": ", which begins the next turn: the template ends a turn with nothing else, so it is what stops an answer",
    "eos": ", the tokenizer's own end: the template has no token that ends a turn and stands nowhere else",
}


def told(chat: ChatTemplate, *, thinking: int, rows: int) -> list[str]:
    """Sentences: how turns end, what becomes of reasoning and why, which options are set, and the date."""
    return [*_ends(chat), *_reasoning(chat, thinking, rows), *_options(chat)]


def _ends(chat: ChatTemplate) -> Iterator[str]:
    usual, calls = chat.traits.bare.ending, chat.traits.bare.call_ending
    yield f"an answer ends with {usual.stop}{_ENDS[usual.how]}"
    if calls is not None and calls.stop != usual.stop:
        yield f"a turn that calls tools ends with {calls.stop}{_ENDS[calls.how]}"


def _reasoning(chat: ChatTemplate, thinking: int, rows: int) -> Iterator[str]:
    if not (chat.supports_reasoning or chat.traits.needs_empty):
        return
    why = {
        "as-is": "rows without it are trained as the template writes them",
        "empty": "rows without it are trained behind the block that the template writes when reasoning is off",
        "drop": "it is left out of all rows",
        "refuse": "rows that do not go with the template are refused",
    }[chat.reasoning]
    yield f"reasoning: {chat.reasoning}: {why} ({thinking:,} of {rows:,} rows have reasoning that is shown)"
    if options := chat.served_options(thinking=thinking, rows=rows):
        said = ", ".join(f"{name}={literal(value)}" for name, value in options.items())
        yield f"served as trained: {said} is the template's default from now on"


def _options(chat: ChatTemplate) -> Iterator[str]:
    said = [f"{name}={literal(value)}" for name, value in chat.options.items() if name != CLOCK]
    if said:
        yield f"options written into the template: {', '.join(said)}"
    if needed := ", ".join(f"{name}={literal(value)}" for name, value in chat.traits.dialect.given.items()):
        yield f"written into the template, which does not render without: {needed}"
    if day := fixed_day(chat.source):
        how = f"--data.template_options {CLOCK}=YYYY-MM-DD sets it"
        yield f"the template's date is {day}, in training and serving; {how}"
