"""How a chat template is used, in words: for `strop check`, the report and the model card."""

from __future__ import annotations

from collections.abc import Iterator

from strop.data.rendering.options import CLOCK, fixed_day, literal
from strop.data.rendering.template import ChatTemplate

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
