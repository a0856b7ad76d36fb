"""The rows of an objective that does not learn from turns: units of answers that are never parted, and prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeVar, overload

import numpy as np

from strop.data.rendering.render import Renderer
from strop.data.store import Conversations, Examples
from strop.data.types import Example, Prompt, Unit

Learning = Literal["turns", "pairs", "labels", "prompts"]
"""What an objective learns from: the turns of conversations, pairs of answers, answers with a label, or prompts, to
which the model answers itself."""
JUDGED: tuple[Learning, ...] = ("pairs", "labels")  # answers that are there, and were compared or judged


def shorter(learning: Learning) -> str:
    """What data.overlong may make of rows that are too long."""
    if learning == "prompts":
        return "drop"
    return "drop or truncate-start" if learning in JUDGED else "drop, truncate-start or split"


U = TypeVar("U", bound=Unit, covariant=True)

MOST_TRIED = 1000  # rows that are looked at for an answer to another prompt


class Lazy(Sequence[U]):
    """Units that are made when asked for: `one` makes the i-th."""

    @abstractmethod
    def one(self, i: int) -> U: ...

    @overload
    def __getitem__(self, i: int) -> U: ...
    @overload
    def __getitem__(self, i: slice) -> list[U]: ...
    def __getitem__(self, i: int | slice) -> U | list[U]:
        if isinstance(i, slice):
            return [self.one(k) for k in range(*i.indices(len(self)))]
        return self.one(range(len(self))[i])


class Units(Lazy[Unit]):
    """Units, read when asked for. examples: chosen and rejected in turn (pairs), or answers (labels)."""

    def __init__(self, examples: Examples, learning: Learning, max_length: int) -> None:
        assert learning == "labels" or len(examples) % 2 == 0
        self._examples, self._pairs, self._max_length = examples, learning == "pairs", max_length

    def __len__(self) -> int:
        return len(self._examples) // 2 if self._pairs else len(self._examples)

    def one(self, i: int) -> Unit:
        if self._pairs:
            return Unit((self._examples[2 * i], self._examples[2 * i + 1]))
        answer = self._examples[i]
        return Unit((answer,), self._beside(i, answer), bool(self._examples.judged[i]))

    def _beside(self, i: int, answer: Example) -> tuple[Example, ...]:
        """This prompt with the answer of the next row that has another prompt and is not too long: the same in each
        epoch and for any batch, so that the reference need be computed once."""
        prompt = answer.ids[: answer.prompt]
        for step in range(1, min(len(self), MOST_TRIED)):
            other = self._examples[(i + step) % len(self)]
            own = other.ids[other.prompt :]
            if len(prompt) + len(own) <= self._max_length and not np.array_equal(other.ids[: other.prompt], prompt):
                weights = np.concatenate([np.zeros(len(prompt), np.float32), other.weights[other.prompt :]])
                return (replace(answer, ids=np.concatenate([prompt, own]), weights=weights),)
        return ()


class Prompts(Lazy[Prompt]):
    """Prompts with the right answers that their rows have. examples: of their tokens, one of each conversation.
    renderer: says how a model's answer is read."""

    def __init__(self, examples: Examples, conversations: Conversations, renderer: Renderer) -> None:
        assert len(examples) == len(conversations)
        self._examples, self._conversations, self._renderer = examples, conversations, renderer

    def __len__(self) -> int:
        return len(self._examples)

    def one(self, i: int) -> Prompt:
        said, renderer = self._conversations[i], self._renderer
        reasons = said.answer is not None and renderer.reasons(said.messages[-1])
        closes = tuple(renderer.closes) if reasons else ()
        return Prompt((self._examples[i],), gold=renderer.answer(said), row=i, closes=closes)


def units_of(
    examples: Examples | None,
    conversations: Conversations | None,
    learning: Learning,
    max_length: int,
    renderer: Renderer,
) -> Units | Prompts | None:
    """What an objective trains on, of rows that are there; None where there are none."""
    if examples is None or conversations is None:
        return None
    if learning == "prompts":
        return Prompts(examples, conversations, renderer)
    return Units(examples, learning, max_length)
