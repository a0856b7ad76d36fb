"""A pair of answers as two examples with one prompt, and what must hold of them before anything is trained; prompts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from strop.data.rendering.overlong import too_long, truncate_sides
from strop.data.rendering.render import Rendered, Renderer, RenderError
from strop.data.types import Conversation, Example


def render_pairs(renderer: Renderer, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
    """Each conversation with its two examples, chosen and rejected, or with why it has none; in order. One without a
    rejected side is rendered as it is."""
    waiting: deque[Conversation] = deque()

    def sides() -> Iterator[Conversation]:
        for conversation in conversations:
            waiting.append(conversation)
            yield from conversation.sides

    found = renderer.render_many(sides())
    for _, rendered in found:
        conversation = waiting.popleft()
        if conversation.rejected:
            rendered = _paired(conversation, [rendered, next(found)[1]])
        yield conversation, rendered


def render_prompts(renderer: Renderer, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
    """Each conversation with the one example of its prompt, as fine-tuning has it in front of the answer and serving
    asks it, nothing of it supervised, or with why it has none; in order. An answer at its end is left out."""
    for conversation in conversations:
        asked = conversation.messages if conversation.answer is None else conversation.messages[:-1]
        try:
            ids = renderer.prompt(asked, conversation.tools, options=renderer.options_for(conversation.messages))
        except RenderError as fault:
            yield conversation, RenderError(fault.code, fault.detail, file=conversation.file, line=conversation.line)
            continue
        yield conversation, [Example(ids, np.zeros(len(ids), np.float32), conversation.file, conversation.line)]


def truncate_pair(renderer: Renderer, conversation: Conversation, limit: int) -> list[Example] | None:
    """The pair within `limit` tokens, cut at the start of its prompt, on both sides alike; None where the longer answer
    leaves no room for one. Raises RenderError."""
    found = truncate_sides(renderer, conversation.sides, limit)
    if found is None:
        return None
    checked = _paired(conversation, found)
    if isinstance(checked, RenderError):
        raise checked
    assert not too_long(checked, limit)
    return checked


def _paired(conversation: Conversation, sides: Sequence[list[Example] | RenderError]) -> list[Example] | RenderError:
    """Both sides, or what is wrong with the pair: see faults.REASONS."""
    found: list[Example] = []
    for side in sides:
        if isinstance(side, RenderError):
            return side
        if len(side) != 1:
            return _fault("answer-in-parts", conversation)
        found += side
    better, worse = found
    if not np.array_equal(better.ids[: better.prompt], worse.ids[: worse.prompt]):
        return _fault("prompt-tokens-differ", conversation)
    if np.array_equal(better.ids, worse.ids):
        return _fault("same-tokens", conversation)
    return [
        replace(example, encoded_separately=better.encoded_separately or worse.encoded_separately) for example in found
    ]


def _fault(code: str, conversation: Conversation) -> RenderError:
    return RenderError(code, file=conversation.file, line=conversation.line)
