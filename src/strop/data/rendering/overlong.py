"""What becomes of a row that is longer than data.max_length. The stop token and the system turn are never lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from strop.data.rendering.render import Renderer, RenderError
from strop.data.types import Conversation, Example, Message


def too_long(examples: Sequence[Example], limit: int) -> bool:
    return any(len(example) > limit for example in examples)


def truncate_start(
    renderer: Renderer, conversation: Conversation, examples: list[Example], limit: int
) -> list[Example] | None:
    """The end of the row within `limit` tokens: the system turn and the last turns, and where one exchange is
    too long, the end of its first user turn. None where the answer alone is too long. Raises RenderError.
    """
    if conversation.text is not None:
        [example] = examples
        head = example.ids[: renderer.num_before_text]  # such as bos, which a text is asked behind
        size = limit - len(head)
        if size < 2:  # nothing could be trained on
            return None
        weights = np.concatenate([np.zeros(len(head), np.float32), _context(example.weights[-size:])])
        return [replace(example, ids=np.concatenate([head, example.ids[-size:]]), weights=weights)]
    kept = truncate_sides(renderer, [conversation], limit)
    return kept[0] if kept else None


def truncate_sides(renderer: Renderer, sides: Sequence[Conversation], limit: int) -> list[list[Example]] | None:
    """The same of conversations that begin alike and part at an answer, all of them cut at one place of what they have
    in common; one conversation alone is cut anywhere before its last exchange."""
    head, exchanges = _exchanges(sides[0])
    turns = [side.messages for side in sides]
    common = len(turns[0])
    if len(turns) > 1:
        common = next((i for i, both in enumerate(zip(*turns, strict=False)) if both[0] != both[1]), common)
        exchanges = _exchanges(replace(sides[0], messages=turns[0][:common]))[1]
    ends = [list(side[common:]) for side in turns]

    def rendered(parts: list[list[Message]]) -> list[list[Example]]:
        return [_render(renderer, side, head, [*parts, end]) for side, end in zip(sides, ends, strict=True)]

    kept: list[list[Example]] = []
    for first in range(len(exchanges) - 1, 0, -1):
        shorter = rendered(exchanges[first:])
        if any(too_long(side, limit) for side in shorter):
            break
        kept = shorter
    if kept and all(kept):
        return kept
    asked, *rest = exchanges[-1]
    low, high = 1, len(asked.content.rstrip()) - 1  # characters to cut: few enough to leave a text
    while low <= high:
        middle = (low + high) // 2
        cut = replace(asked, content=asked.content[middle:].lstrip())
        shorter = rendered([[cut, *rest]])
        if any(too_long(side, limit) for side in shorter):
            low = middle + 1
        else:
            kept, high = shorter, middle - 1
    return kept if kept and all(kept) else None


def split(renderer: Renderer, conversation: Conversation, examples: list[Example], limit: int) -> list[Example] | None:
    """The row as several examples within `limit` tokens: chats between exchanges, each with the system turn (pieces
    whose turns all have weight 0 are left out); raw text anywhere, every token supervised once.
    None where one exchange alone is too long. Raises RenderError.
    """
    if conversation.text is not None:
        [example] = examples
        # a piece begins with the last token of the one before, as context only: position 0 is never supervised
        starts = range(0, len(example) - 1, limit - 1)
        return [
            replace(example, ids=example.ids[i : i + limit], weights=_context(example.weights[i : i + limit]))
            for i in starts
        ]
    head, exchanges = _exchanges(conversation)
    pieces: list[Example] = []
    begin = 0
    while begin < len(exchanges):
        fits: list[Example] | None = None
        end = begin
        while end < len(exchanges):
            longer = _render(renderer, conversation, head, exchanges[begin : end + 1])
            if too_long(longer, limit):
                break
            fits, end = longer, end + 1
        if fits is None:
            return None
        pieces += fits
        begin = end
    return pieces


def _exchanges(conversation: Conversation) -> tuple[list[Message], list[list[Message]]]:
    """The system turns at the start, and the rest cut before each user turn."""
    messages = list(conversation.messages)
    num_head = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    exchanges: list[list[Message]] = []
    for message in messages[num_head:]:
        if message.role == "user" or not exchanges:
            exchanges.append([message])
        else:
            exchanges[-1].append(message)
    return messages[:num_head], exchanges


def _render(
    renderer: Renderer, conversation: Conversation, head: list[Message], exchanges: list[list[Message]]
) -> list[Example]:
    """The examples of a part of a conversation; none where its turns have weight 0."""
    try:
        return renderer.render(replace(conversation, messages=(*head, *(turn for part in exchanges for turn in part))))
    except RenderError as fault:
        if fault.code == "nothing-supervised":
            return []
        raise


def _context(weights: np.typing.NDArray[np.float32]) -> np.typing.NDArray[np.float32]:
    weights = weights.copy()
    weights[0] = 0.0
    return weights
