"""Truncate or split rows that are longer than data.max_length, keeping the system turn and the stop token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import numpy.typing as npt

from strop.data.rendering.render import Renderer, check_pair
from strop.data.row_errors import RenderError
from strop.data.types import Conversation, DataKind, Example, Message, shared_prefix_length


def allowed_overlong(data_kind: DataKind) -> list[str]:
    """Return the values of data.overlong other than refuse that an objective allows."""
    if data_kind == "prompts":
        return ["drop"]
    return ["drop", "truncate-start", *(["split"] if data_kind == "turns" else [])]


def is_too_long(examples: Sequence[Example], limit: int) -> bool:
    return any(len(example) > limit for example in examples)


def longest_answer(example: Example) -> int:
    """Return the number of tokens of the longest sequence of supervised tokens."""
    edges = np.flatnonzero(np.diff(example.weights != 0, prepend=False, append=False))
    return int(np.diff(edges)[::2].max(initial=0))


def truncate_start(
    renderer: Renderer, conversation: Conversation, examples: list[Example], limit: int
) -> list[Example] | None:
    """Return the system turn and the last turns that fit in `limit` tokens. Raises RenderError.

    If the last exchange is too long, only the end of its user turn is kept. Of texts, the end is kept. Returns
    None if the answer is too long.
    """
    if conversation.text is not None:
        size = limit - len(renderer.text_prefix)
        if size < 2:  # nothing would be trained on
            return None
        return [
            _keep_end(example, len(renderer.text_prefix), size) if len(example) > limit else example
            for example in examples
        ]
    shorter = truncate_sides(renderer, [conversation], limit)
    return shorter[0] if shorter else None


def _keep_end(example: Example, prefix: int, size: int) -> Example:
    """Return the first `prefix` and the last `size` tokens of a text."""
    weights = np.concatenate([np.zeros(prefix, np.float32), _zero_first(example.weights[-size:])])
    return replace(example, ids=np.concatenate([example.ids[:prefix], example.ids[-size:]]), weights=weights)


def truncate_sides(renderer: Renderer, sides: Sequence[Conversation], limit: int) -> list[list[Example]] | None:
    """Remove the same start of the shared prompt from all conversations, so that each fits in `limit` tokens.

    Whole exchanges are removed first, then the start of the last user turn. Returns None if that is not enough.
    """
    turns = [side.messages for side in sides]
    num_shared = shared_prefix_length(turns[0], turns[-1])
    system_turns, exchanges = _split_exchanges(replace(sides[0], messages=turns[0][:num_shared]))
    ends = [list(side[num_shared:]) for side in turns]

    def render_sides(parts: list[list[Message]]) -> list[list[Example]]:
        pairs = zip(sides, ends, strict=True)
        return [_render_part(renderer, side, system_turns, [*parts, end]) for side, end in pairs]

    truncated: list[list[Example]] = []
    for first in range(len(exchanges) - 1, 0, -1):
        shorter = render_sides(exchanges[first:])
        if any(is_too_long(side, limit) for side in shorter):
            break
        truncated = shorter
    if truncated and all(truncated):
        return truncated
    question, *rest = exchanges[-1]
    low, high = 1, len(question.content.rstrip()) - 1  # characters to remove; at least one is left
    while low <= high:
        middle = (low + high) // 2
        cut = replace(question, content=question.content[middle:].lstrip())
        shorter = render_sides([[cut, *rest]])
        if any(is_too_long(side, limit) for side in shorter):
            low = middle + 1
        else:
            truncated, high = shorter, middle - 1
    return truncated if truncated and all(truncated) else None


def truncate_pair(renderer: Renderer, conversation: Conversation, limit: int) -> list[Example] | None:
    """Remove the start of the prompt from both sides. Returns None if they still do not fit. Raises RenderError."""
    sides = truncate_sides(renderer, conversation.sides, limit)
    if sides is None:
        return None
    examples = check_pair(*sides)
    if isinstance(examples, RenderError):
        raise examples
    assert not is_too_long(examples, limit)
    return examples


def split(renderer: Renderer, conversation: Conversation, examples: list[Example], limit: int) -> list[Example] | None:
    """Split a row into examples of at most `limit` tokens; None if an exchange is too long. Raises RenderError.

    Conversations are split between exchanges, and each piece begins with the system turn. Pieces without a trained turn
    are left out. Raw text is split anywhere, and every token is supervised once.
    """
    if conversation.text is not None:
        [example] = examples
        # position 0 is never supervised, so a piece begins with the last token of the previous one
        return [
            replace(example, ids=example.ids[i : i + limit], weights=_zero_first(example.weights[i : i + limit]))
            for i in range(0, len(example) - 1, limit - 1)
        ]
    system_turns, exchanges = _split_exchanges(conversation)
    pieces: list[Example] = []
    piece: list[Example] = []  # exchanges[start : end - 1]
    start = 0
    for end in range(1, len(exchanges) + 1):
        longer = _render_part(renderer, conversation, system_turns, exchanges[start:end])
        if is_too_long(longer, limit) and end - start > 1:
            pieces, start = pieces + piece, end - 1
            longer = _render_part(renderer, conversation, system_turns, exchanges[start:end])
        if is_too_long(longer, limit):
            return None
        piece = longer
    return pieces + piece


def _split_exchanges(conversation: Conversation) -> tuple[list[Message], list[list[Message]]]:
    """Return the system turns at the start, and the other turns split before each user turn."""
    system_turns: list[Message] = []
    exchanges: list[list[Message]] = []
    for message in conversation.messages:
        if message.role == "system" and not exchanges:
            system_turns.append(message)
        elif message.role == "user" or not exchanges:
            exchanges.append([message])
        else:
            exchanges[-1].append(message)
    return system_turns, exchanges


def _render_part(
    renderer: Renderer, conversation: Conversation, system_turns: list[Message], exchanges: list[list[Message]]
) -> list[Example]:
    """Render a part of a conversation. Returns no examples if all of its turns have weight 0."""
    part = replace(conversation, messages=(*system_turns, *chain.from_iterable(exchanges)))
    try:
        return renderer.render(part)
    except RenderError as error:
        if error.code == "nothing-supervised":
            return []
        raise


def _zero_first(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    weights = weights.copy()
    weights[0] = 0.0
    return weights
