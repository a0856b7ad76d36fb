"""Render prompts and training texts with a chat template, and find the assistant turns in them.

The behaviour of a template is measured by rendering test conversations (prober.py), so any Jinja template works.
Templates come from model files, which are not trusted: they run in a sandbox with limits (`BoundedTemplate`).
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

from strop.data.rendering.encoder import ControlText
from strop.data.rendering.prober import USER, Mode, Prober, PromptSplice
from strop.data.rendering.template_source import (
    DATE_OPTION,
    TEMPLATE_ERRORS,
    BoundedTemplate,
    check_options,
    day_formats,
    fixed_day,
    jinja_literal,
    lint_template,
    read_variables,
    write_options,
)
from strop.data.row_errors import RenderError
from strop.data.types import MARK, Conversation, Message
from strop.errors import ModelError

MAX_TEMPLATE_CHARS = 1_000_000
CHANGE = "¦"  # a text that differs from what it is added to
CHOOSE_ANOTHER = "choose another data.template"

Reasoning = Literal["auto", "as-is", "empty", "drop", "refuse"]


@dataclass(frozen=True)
class Draft:
    """A training text and its supervised spans [start, end) in characters, each with its weight.

    A span extends from the end of the generation prompt to the end of the stop token. masked: control tokens in user
    text are replaced with the private-use characters of ControlText. images: number of images in the text. seen: length
    of the start of the text that earlier drafts of the conversation have, in characters.
    """

    text: str
    spans: tuple[tuple[int, int, float], ...]
    masked: bool
    images: int = 0
    seen: int = 0

    def expand(self, placeholder: str, texts: Sequence[str]) -> Draft:
        """Replace the placeholder of each image with its text. Raises RenderError if there is not one for each."""
        pieces = self.text.split(placeholder)
        if len(pieces) - 1 != len(texts):
            raise RenderError("image-lost", f"{len(pieces) - 1} of {len(texts)}")
        ends = list(accumulate(len(piece) + len(placeholder) for piece in pieces))[:-1]
        growth = [0, *accumulate(len(text) - len(placeholder) for text in texts)]

        def moved(at: int) -> int:
            return at + growth[bisect_right(ends, at)]

        spans = tuple((moved(start), moved(end), weight) for start, end, weight in self.spans)
        text = pieces[0] + "".join(text + piece for text, piece in zip(texts, pieces[1:], strict=True))
        return replace(self, text=text, spans=spans, seen=moved(self.seen))


class ChatTemplate:
    """A chat template with its measured behaviour.

    added: text of each added token -> whether it is special. variables: bos_token, eos_token, ... for the template.
    options: values to write into the template, together with a fixed date; None: the template is used unchanged.

    Raises ModelError if the template is invalid, or if an assistant turn does not end with a token that can stop
    generation.
    """

    def __init__(
        self, source: str, *, added: dict[str, bool], variables: dict[str, Any],
        options: Mapping[str, Any] | None = None, reasoning: Reasoning = "auto",
    ) -> None:  # fmt: skip
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(f"the chat template has {len(source)} characters", fix=CHOOSE_ANOTHER)
        try:
            self._jinja = BoundedTemplate(source)
            tree = self._jinja.environment.parse(source)
            self.variables_read = read_variables(tree)
            if options is not None:
                check_options(options, self.variables_read, "data.template_options")
                source = write_options(source, options, day_formats(tree))
                self._jinja = BoundedTemplate(source)
            self._variables = {**variables, "documents": None}
            fixed = frozenset(options or ())
            prober = Prober(self._jinja, source, self.variables_read, self._variables, list(added), fixed)
            traits = prober.measure()
        except TEMPLATE_ERRORS as error:
            raise ModelError(f"the chat template is invalid: {error}", fix=CHOOSE_ANOTHER) from error
        if traits is None:
            raise ModelError("the chat template shows no separable assistant turn", fix=CHOOSE_ANOTHER)
        if options is not None and traits.input_format.required:
            source = write_options(source, traits.input_format.required, [])
            self._jinja = BoundedTemplate(source)
        self.source, self.traits = source, traits
        self.hash = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self.stops = tuple(dict.fromkeys(ending.stop for ending in traits.endings))
        special = [token for token, is_special in added.items() if is_special]
        texts = (traits.opening, *traits.texts)
        written = [token for token in added if not token.isspace() and any(token in text for text in texts)]
        self.control = ControlText(list(dict.fromkeys([*special, *self.stops, *written])))
        self.warnings = tuple(lint_template(tree, source))
        self.options = dict(options or {})
        self.reasoning = reasoning if reasoning != "auto" else "empty" if self.traits.needs_empty_block else "as-is"

    def shows_reasoning(self, messages: Sequence[Message]) -> bool:
        """Return whether any of the messages has reasoning that is shown in the rendered text."""
        traits = self.traits
        return self.reasoning != "drop" and any(
            message.reasoning and (traits.reasoning or (message.tool_calls and traits.reasoning_with_calls))
            for message in messages
        )

    def serving_options(self, *, thinking: int, rows: int) -> dict[str, Any]:
        """Return the options with which prompts equal those in training; {} if only some rows have reasoning."""
        if 0 < thinking < rows or not rows:
            return {}
        if thinking:
            return self.traits.thinking_mode.options
        return self._plain_mode.options

    def separate_reasoning(self, message: Message) -> Message:
        """Move reasoning at the start of an answer's text to `reasoning`, if it is between the template's delimiters.

        Otherwise these delimiters would be encoded as plain text, next to those that the template writes.
        """
        text = message.content.lstrip()
        for begin, end in self.traits.reasoning_marks if message.role == "assistant" and not message.reasoning else ():
            reasoning, closed, answer = text.removeprefix(begin).partition(end)
            if text.startswith(begin) and closed and (answer.strip() or message.tool_calls):
                return replace(message, content=answer.lstrip(), reasoning=reasoning.strip() or None)
        return message

    def describe(self, thinking: int, rows: int, without_system: int) -> Iterator[str]:
        """Yield sentences on how the template renders conversations.

        rows: number of conversations. thinking: those with reasoning. without_system: those without a system prompt.
        """
        explanations = {
            "written": "",
            "later": ", which the template writes only before another turn: strop also writes it after the last one",
            "role": ", which begins the next turn: the template has no other end of turn, so it stops generation",
            "eos": ", the tokenizer's end-of-sequence token: the template has no token that only ends turns",
        }
        default, calls = self.traits.default_mode.ending, self.traits.default_mode.call_ending
        yield f"an answer ends with {default.stop}{explanations[default.origin]}"
        before = re.sub(r"<[^<>]*>|\[/?[A-Z_]+\]", "\n", self.traits.opening.partition(USER)[0])  # without tokens
        system = re.search(r"^\s*system\b[\s:]*(.{8,}?)\s*(?:\buser\s*:?)?\s*$", before, re.DOTALL)
        if system and without_system:
            text = " ".join(system[1].split())
            yield f"rows without a system prompt get the template's: {text[:80]}{'...' * (len(text) > 80)}"
        if calls is not None and calls.stop != default.stop:
            yield f"a turn that calls tools ends with {calls.stop}{explanations[calls.origin]}"
        if self.traits.reasoning or self.traits.reasoning_with_calls or self.traits.needs_empty_block:
            explanation = {
                "as-is": "rows without it are trained as the template writes them",
                "empty": "rows without it are trained after the block that the template writes when reasoning is off"
                if self.traits.empty_block_mode != self.traits.default_mode or self.traits.needs_empty_block
                else "the template has no empty block, so rows without it are trained as the template writes them",
                "drop": "it is left out of all rows",
                "refuse": "rows that do not match the template are refused",
            }[self.reasoning]
            counts = f"{thinking:,} of {rows:,} rows have reasoning that is shown"
            yield f"reasoning: {self.reasoning}: {explanation} ({counts})"
            if options := self.serving_options(thinking=thinking, rows=rows):
                yield f"served as trained: {_assignments(options)} becomes the template's default"
        if values := _assignments({name: value for name, value in self.options.items() if name != DATE_OPTION}):
            yield f"options written into the template: {values}"
        if required := _assignments(self.traits.input_format.required):
            yield f"written into the template, which does not render without it: {required}"
        if day := fixed_day(self.source):
            fix = f"--data.template_options {DATE_OPTION}=YYYY-MM-DD sets it"
            yield f"the template's date is {day}, in training and serving; {fix}"

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *,
        options: Mapping[str, Any] | None = None,
    ) -> Draft:  # fmt: skip
        """Return a prompt with the generation prompt, and without spans. Raises RenderError."""
        values, tool_values, masked = self._prepare_inputs(messages, tools, self.shows_reasoning(messages))
        if self.control.occurs_in(dict(options or {})):
            raise RenderError("control-token", "in an option of the template")
        text = self._render(values, self._template_variables(tool_values, options or {}), generation=True)
        self._check_shown(messages, values, text)
        return Draft(text, (), masked, count_images(messages))

    def continuation(
        self, messages: Sequence[Message], results: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *,
        mark: str, options: Mapping[str, Any] | None = None,
    ) -> Draft:  # fmt: skip
        """Return the stop token of the last of `messages`, and what follows it in the prompt of the next turn.

        It is the difference of two renderings, with and without `results`. mark: a text that only the last of
        `messages` has, in its content or in its last call. Raises RenderError if the turn is written differently when
        results follow it.
        """
        values, tool_values, masked = self._prepare_inputs([*messages, *results], tools, False)
        variables = self._template_variables(tool_values, options or {})
        text = self._render(values[: len(messages)], variables)
        end, text = _end_turn(text, self.mode(messages), calls=bool(messages[-1].tool_calls))
        ending = text[:end].rpartition(mark)[2]
        whole = self._render(values, variables, generation=True)
        before, _, following = whole.rpartition(mark)
        stop = max((stop for stop in self.stops if ending.endswith(stop)), key=len)
        if not before or not following.startswith(ending):
            raise RenderError("turn-rewritten")
        return Draft(stop + following[len(ending) :], (), masked)

    def mode(self, messages: Sequence[Message]) -> Mode:
        """Return the mode in which to render a row. Raises RenderError if data.reasoning refuses it."""
        if self.shows_reasoning(messages):
            return self.traits.thinking_mode
        if self.reasoning == "refuse" and any(message.reasoning for message in messages):
            raise RenderError("reasoning-not-shown")
        if self.reasoning == "refuse" and self.traits.needs_empty_block:
            raise RenderError("reasoning-missing")
        return self._plain_mode

    @property
    def _plain_mode(self) -> Mode:
        """The mode of rows without reasoning."""
        return self.traits.empty_block_mode if self.reasoning in ("empty", "drop") else self.traits.default_mode

    def make_drafts(self, conversation: Conversation, *, include_untrained: bool = False) -> list[Draft]:
        """Return the training texts of a conversation: one, or one per turn if the template rewrites earlier turns.

        The prompt of each assistant turn must be a prefix of its text. Messages after the last trained turn are left
        out. include_untrained: also return spans for turns of weight 0, and what is new in each draft. Raises
        RenderError.
        """
        messages = conversation.messages
        if include_untrained and (roles := [m.role for m in messages if m.role != "assistant" and m.weight != 1.0]):
            raise RenderError("other-weight", roles[0])
        mode, has_reasoning = self.mode(messages), self.shows_reasoning(messages)
        values, tools, masked = self._prepare_inputs(messages, conversation.tools, has_reasoning)
        variables = self._template_variables(tools, mode.options)
        turns: dict[int, Draft] = {}  # texts up to the end of each turn
        for i, message in enumerate(messages):
            if message.role != "assistant" or not (message.weight or include_untrained):
                continue
            prompt = self._render(values[:i], variables, generation=True)
            text = self._render(values[: i + 1], variables)
            shows_it = has_reasoning and bool(message.reasoning)
            splices = mode.thinking_splices if shows_it else mode.splices
            spliced = _splice_prompt(prompt, text, splices, values[i - 1]["content"] if i else "")
            if spliced is None:
                raise RenderError("reasoning-off" if shows_it else "prompt-not-prefix")
            text = spliced
            end, text = _end_turn(text, mode, calls=bool(message.tool_calls))
            if inside := [stop for stop in self.stops if text.find(stop, len(prompt), end - 1) >= 0]:
                raise RenderError("stop-inside", inside[0])
            self._check_turn(message, values[i], text[len(prompt) :], has_reasoning)
            turns[i] = Draft(text, ((len(prompt), end, message.weight),), masked, count_images(messages[: i + 1]))
        if not turns:
            raise RenderError("nothing-supervised")
        last = max(turns)
        self._check_shown(messages[:last], values[:last], turns[last].text, skip="assistant")
        if all(turns[last].text.startswith(draft.text) for draft in turns.values()):
            return [replace(turns[last], spans=tuple(draft.spans[0] for draft in turns.values()))]
        if include_untrained:
            for before, i in pairwise(turns):
                prompt = turns[i].text[: turns[i].spans[0][0]]
                seen = self._seen_length(messages[:i], before, conversation.tools, variables, prompt, has_reasoning)
                turns[i] = replace(turns[i], seen=seen)
        return [*turns.values()]

    def _seen_length(
        self, messages: Sequence[Message], turn: int, tools: Sequence[dict[str, Any]],
        variables: dict[str, Any], prompt: str, reasoning: bool,
    ) -> int:  # fmt: skip
        """Return the length of the prompt of `messages` up to the end of a turn in it.

        The turn may be written differently than in its own text, so its end is found where the prompt changes if the
        turn's content or last call does.
        """
        changed = replace(messages[turn], content=f"{messages[turn].content}{CHANGE}")
        if calls := changed.tool_calls:
            function = calls[-1]["function"]
            call = {**calls[-1], "function": {**function, "arguments": {**function["arguments"], CHANGE: CHANGE}}}
            changed = replace(messages[turn], tool_calls=(*calls[:-1], call))
        others = [*messages[:turn], changed, *messages[turn + 1 :]]
        text = self._render(self._prepare_inputs(others, tools, reasoning)[0], variables, generation=True)
        tails = zip(reversed(prompt), reversed(text), strict=False)
        end = len(prompt) - next((i for i, (a, b) in enumerate(tails) if a != b), len(prompt))
        stops = [(at, stop) for stop in self.stops if (at := prompt.find(stop, end)) >= 0]
        at, stop = min(stops, default=(end, ""))
        return at + len(stop) if calls or not prompt[end:at].strip() else end

    def _prepare_inputs(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], reasoning: bool
    ) -> tuple[list[dict[str, Any]], list[Any] | None, bool]:
        """Return messages and tools in the template's input format, and whether control tokens were masked in them."""
        if not self.traits.system and any(message.role == "system" for message in messages):
            raise RenderError("system-unsupported")
        if tools and not self.traits.tools:
            raise RenderError("tools-unsupported", "a list of tools")
        for message in messages:
            if message.tool_calls and not self.traits.calls:
                raise RenderError("tools-unsupported", f"a call: {self.traits.call_error}".rstrip(": "))
            if len(message.tool_calls) > 1 and not self.traits.parallel_calls:
                raise RenderError("tools-unsupported", "more than one call in a turn")
        values = self.traits.input_format.convert_messages(messages, reasoning=reasoning)
        tool_values = list(tools) or None
        if any(map(self.control.occurs_in, messages)) or self.control.occurs_in(tool_values):
            return self.control.mask(values), self.control.mask(tool_values), True
        return values, tool_values, False

    def _check_turn(self, message: Message, value: dict[str, Any], text: str, has_reasoning: bool) -> None:
        """Raise RenderError if the content, reasoning or calls of a turn are missing in its rendered text."""
        self._check_shown([message], [value], text)
        content = value["content"]
        if isinstance(content, str) and not _contains(text, content.strip()) and self.reasoning != "drop":
            reasoning, _, answer = content.rpartition("</think>")
            reasoning = self.control.marks.sub("", reasoning).replace("<think>", "").strip()
            if reasoning not in text[: text.rindex(answer.strip())].replace("</think>", ""):
                raise RenderError("reasoning-lost")
        if has_reasoning and message.reasoning:
            calls = bool(message.tool_calls)
            shown = self.traits.reasoning_with_calls if calls else self.traits.reasoning
            if shown and not _contains(text, self._mask(message.reasoning).strip()):
                raise RenderError("text-lost", "the reasoning of a turn" + (" with calls" if calls else ""))
        for call in message.tool_calls:
            if not all(_contains(text, self._mask(part)) for part in _call_strings(call["function"])):
                raise RenderError("text-lost", "a tool call")

    def _mask(self, text: str) -> str:
        return str(self.control.mask(text)) if self.control.occurs_in(text) else text

    def _check_shown(
        self, messages: Sequence[Message], values: list[dict[str, Any]], text: str, skip: str = ""
    ) -> None:
        """Raise RenderError if the content of a message is missing in the text or changed. skip: an unchecked role."""
        for message, value in zip(messages, values, strict=True):
            content = value["content"] if isinstance(value["content"], str) else self._mask(message.content)
            content = content.strip()
            parts = content.split(MARK) if message.images else [content]
            if message.role == skip or all(_contains(text, part.strip()) for part in parts):
                continue
            if message.role == "assistant" and "</think>" in content and content.split("</think>")[-1].strip() in text:
                continue  # some templates move reasoning that is part of the content
            raise RenderError("text-lost", "the text next to a tool call" if message.tool_calls else message.role)

    def _template_variables(self, tools: list[Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._variables, **self.traits.input_format.tool_variables(tools), **options}

    def _render(self, messages: list[dict[str, Any]], variables: dict[str, Any], *, generation: bool = False) -> str:
        try:
            return self._jinja.render(messages=messages, add_generation_prompt=generation, **variables)
        except TEMPLATE_ERRORS as error:
            raise RenderError("template-refused", str(error)) from error


def count_images(messages: Sequence[Message]) -> int:
    return sum(len(message.images) for message in messages)


def _assignments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={jinja_literal(value)}" for name, value in options.items())


def _splice_prompt(prompt: str, text: str, splices: Sequence[PromptSplice], last: Any) -> str | None:
    """Return the training text, changed so that the prompt at inference is its prefix, or None if they do not match.

    With one of the `splices`, prompt = start + prompt_end and text = start + text_head + removed + rest become
    prompt + inserted + rest. last: content of the message before the turn.
    """
    candidates = [(prompt, "")]  # prefix of the text to replace with the prompt, and text to insert after the prompt
    for splice in splices:
        if prompt.endswith(splice.prompt_end):
            text_prefix = prompt[: len(prompt) - len(splice.prompt_end)] + splice.text_head + splice.removed
            candidates.insert(
                0 if splice.text_head == splice.prompt_end else len(candidates), (text_prefix, splice.inserted)
            )
    for text_prefix, insert in candidates:
        if text.startswith(text_prefix):
            return prompt + insert + text[len(text_prefix) :]
    # A template may write earlier messages differently when an answer follows. The prompt's version is used.
    forms = (last, json.dumps(last, ensure_ascii=False), json.dumps(last)) if isinstance(last, str) and last else ()
    for form in forms:
        start = prompt.rfind(form)
        for text_prefix, insert in candidates:
            if start >= 0 and text.count(text_prefix[start:]) == 1:
                return prompt + insert + text[text.index(text_prefix[start:]) + len(text_prefix) - start :]
    return None


def _end_turn(text: str, mode: Mode, *, calls: bool) -> tuple[int, str]:
    """End the last turn of the text with its stop token. Returns the length of the new text, and the text."""
    for ending in (mode.call_ending if calls else None, mode.ending):
        if ending is not None and text.endswith(ending.removed):
            text = text[: len(text) - len(ending.removed)] + ending.added
            return len(text), text
    raise RenderError("no-stop-token")


def _contains(text: str, part: str) -> bool:
    """Return whether the text contains `part`, unchanged or escaped as JSON."""
    return part in text or any(json.dumps(part, ensure_ascii=escape)[1:-1] in text for escape in (False, True))


def _call_strings(value: Any) -> list[str]:
    """Return all strings in a call: its name, and the names and string values of its arguments."""
    if isinstance(value, str):
        return [value]
    keys = [key for key in value if key not in ("name", "arguments")] if isinstance(value, Mapping) else []
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [*keys, *(string for item in items for string in _call_strings(item))]
