"""The rows of an objective that learns from comparisons or judgements: units of answers that are never parted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, overload

import numpy as np

from strop.data.conversation import Example, Unit
from strop.data.store import Examples

Learning = Literal["turns", "pairs", "labels"]
"""What an objective learns from: the turns of conversations, pairs of answers, or answers with a label."""

MOST_TRIED = 1000  # rows that are looked at for an answer to another prompt


class Units(Sequence[Unit]):
    """Units, read when asked for. examples: chosen and rejected in turn (pairs), or answers (labels)."""

    def __init__(self, examples: Examples, learning: Learning, max_length: int) -> None:
        assert learning == "labels" or len(examples) % 2 == 0
        self._examples, self._pairs, self._max_length = examples, learning == "pairs", max_length

    def __len__(self) -> int:
        return len(self._examples) // 2 if self._pairs else len(self._examples)

    @overload
    def __getitem__(self, i: int) -> Unit: ...
    @overload
    def __getitem__(self, i: slice) -> list[Unit]: ...
    def __getitem__(self, i: int | slice) -> Unit | list[Unit]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
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
