"""Render preference pairs as two examples with the same prompt tokens, and prompts without an answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from strop.data.rendering.overlong import is_too_long, truncate_sides
from strop.data.rendering.render import Rendered, Renderer
from strop.data.row_errors import RenderError
from strop.data.types import Conversation, Example


def render_pairs(renderer: Renderer, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
    """Yield each conversation with its chosen and rejected example, or with why it has none, in order.

    A conversation without a rejected side is rendered as usual.
    """
    pending: deque[Conversation] = deque()

    def sides() -> Iterator[Conversation]:
        for conversation in conversations:
            pending.append(conversation)
            yield from conversation.sides

    results = renderer.render_many(sides())
    for _, rendered in results:
        conversation = pending.popleft()
        if conversation.rejected:
            rendered = _check_pair(conversation, [rendered, next(results)[1]])
        yield conversation, rendered


def render_prompts(renderer: Renderer, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
    """Yield each conversation with one unsupervised example of its prompt, or with why it has none, in order.

    The prompt has the same tokens as in fine-tuning and at inference. An answer at the end is left out.
    """
    for conversation in conversations:
        messages = conversation.messages if conversation.answer is None else conversation.messages[:-1]
        try:
            ids = renderer.prompt(messages, conversation.tools, options=renderer.options_for(conversation.messages))
        except RenderError as error:
            yield conversation, error.at(conversation.file, conversation.line)
            continue
        yield conversation, [Example(ids, np.zeros(len(ids), np.float32), conversation.file, conversation.line)]


def truncate_pair(renderer: Renderer, conversation: Conversation, limit: int) -> list[Example] | None:
    """Truncate the start of the prompt on both sides alike, so that both fit in `limit` tokens.

    Returns None if the longer answer leaves no room for a prompt. Raises RenderError.
    """
    sides = truncate_sides(renderer, conversation.sides, limit)
    if sides is None:
        return None
    examples = _check_pair(conversation, sides)
    if isinstance(examples, RenderError):
        raise examples
    assert not is_too_long(examples, limit)
    return examples


def _check_pair(
    conversation: Conversation, sides: Sequence[list[Example] | RenderError]
) -> list[Example] | RenderError:
    """Return both sides, or what is wrong with the pair."""
    examples: list[Example] = []
    for side in sides:
        if isinstance(side, RenderError):
            return side
        if len(side) != 1:
            return _error("answer-in-parts", conversation)
        examples += side
    chosen, rejected = examples
    if not np.array_equal(chosen.ids[: chosen.prompt_length], rejected.ids[: rejected.prompt_length]):
        return _error("prompt-tokens-differ", conversation)
    if np.array_equal(chosen.ids, rejected.ids):
        return _error("same-tokens", conversation)
    separately = chosen.encoded_separately or rejected.encoded_separately
    return [replace(example, encoded_separately=separately) for example in examples]


def _error(code: str, conversation: Conversation) -> RenderError:
    return RenderError(code, file=conversation.file, line=conversation.line)
