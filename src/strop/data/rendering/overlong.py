"""Truncate or split rows that are longer than data.max_length. The stop token and the system turn are never lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from strop.data.rendering.render import Renderer, check_pair
from strop.data.row_errors import RenderError
from strop.data.types import JUDGED, Conversation, DataKind, Example, Message


def allowed_overlong(data_kind: DataKind) -> str:
    """Return the values of data.overlong for an objective, besides refuse, as a phrase."""
    if data_kind == "prompts":
        return "drop"
    return "drop or truncate-start" if data_kind in JUDGED else "drop, truncate-start or split"


def is_too_long(examples: Sequence[Example], limit: int) -> bool:
    return any(len(example) > limit for example in examples)


def truncate_start(
    renderer: Renderer, conversation: Conversation, examples: list[Example], limit: int
) -> list[Example] | None:
    """Return the end of the row within `limit` tokens: the system turn and the last turns. Raises RenderError.

    If the last exchange is too long, only the end of its user turn is kept. Returns None if the answer is too long.
    """
    if conversation.text is not None:
        [example] = examples
        head = example.ids[: renderer.num_before_text]  # such as bos
        size = limit - len(head)
        if size < 2:  # nothing would be trained on
            return None
        tail_weights = _without_first(example.weights[-size:])
        weights = np.concatenate([np.zeros(len(head), np.float32), tail_weights])
        return [replace(example, ids=np.concatenate([head, example.ids[-size:]]), weights=weights)]
    shorter = truncate_sides(renderer, [conversation], limit)
    return shorter[0] if shorter else None


def truncate_sides(renderer: Renderer, sides: Sequence[Conversation], limit: int) -> list[list[Example]] | None:
    """Remove the same start of the shared prefix from all conversations, so that each fits in `limit` tokens.

    Whole exchanges are removed first, then the start of the last exchange's user turn. Returns None if that is not
    enough.
    """
    head, exchanges = _exchanges(sides[0])
    turns = [side.messages for side in sides]
    num_shared = len(turns[0])
    if len(turns) > 1:
        aligned = enumerate(zip(*turns, strict=False))
        num_shared = next((i for i, pair in aligned if pair[0] != pair[1]), num_shared)
        exchanges = _exchanges(replace(sides[0], messages=turns[0][:num_shared]))[1]
    ends = [list(side[num_shared:]) for side in turns]

    def render_sides(parts: list[list[Message]]) -> list[list[Example]]:
        return [_render(renderer, side, head, [*parts, end]) for side, end in zip(sides, ends, strict=True)]

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
    """Remove the prompt's start from chosen and rejected alike; None if they still do not fit. Raises RenderError."""
    sides = truncate_sides(renderer, conversation.sides, limit)
    if sides is None:
        return None
    examples = check_pair(conversation, sides)
    if isinstance(examples, RenderError):
        raise examples
    assert not is_too_long(examples, limit)
    return examples


def split(renderer: Renderer, conversation: Conversation, examples: list[Example], limit: int) -> list[Example] | None:
    """Return the row as several examples within `limit` tokens; None if one exchange is too long. Raises RenderError.

    Conversations are split between exchanges, each piece with the system turn; pieces whose turns all have weight 0 are
    left out. Raw text is split anywhere, every token supervised once.
    """
    if conversation.text is not None:
        [example] = examples
        # a piece begins with the last token of the previous one, as context: position 0 is never supervised
        starts = range(0, len(example) - 1, limit - 1)
        return [
            replace(example, ids=example.ids[i : i + limit], weights=_without_first(example.weights[i : i + limit]))
            for i in starts
        ]
    head, exchanges = _exchanges(conversation)
    pieces: list[Example] = []
    begin = 0
    while begin < len(exchanges):
        piece: list[Example] | None = None
        end = begin
        while end < len(exchanges):
            longer = _render(renderer, conversation, head, exchanges[begin : end + 1])
            if is_too_long(longer, limit):
                break
            piece, end = longer, end + 1
        if piece is None:
            return None
        pieces += piece
        begin = end
    return pieces


def _exchanges(conversation: Conversation) -> tuple[list[Message], list[list[Message]]]:
    """Return the system turns at the start, and the other turns split before each user turn."""
    head: list[Message] = []
    exchanges: list[list[Message]] = []
    for message in conversation.messages:
        if message.role == "system" and not exchanges:
            head.append(message)
        elif message.role == "user" or not exchanges:
            exchanges.append([message])
        else:
            exchanges[-1].append(message)
    return head, exchanges


def _render(
    renderer: Renderer, conversation: Conversation, head: list[Message], exchanges: list[list[Message]]
) -> list[Example]:
    """Render a part of a conversation; return no examples if its turns have weight 0."""
    try:
        return renderer.render(replace(conversation, messages=(*head, *(turn for part in exchanges for turn in part))))
    except RenderError as error:
        if error.code == "nothing-supervised":
            return []
        raise


def _without_first(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    weights = weights.copy()
    weights[0] = 0.0
    return weights
