"""The units that data passes through: Row (as in the file), Conversation (what was said), Example (what is trained).

reading/ makes rows from bytes, formats.py conversations from rows, rendering/ examples from conversations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant", "tool"]
Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file, values as they stand in the file; `line` counts from 1."""

    file: str
    line: int
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    weight: float = 1.0  # weight of this message's tokens in the loss; 0: not trained on
    call_id: str | None = None  # of a tool turn: the id of the call that it answers


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one row says. `text` is set for raw text (continued pretraining), and then messages are empty."""

    file: str
    line: int
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence.

    ids: token ids, shape (n,). weights: float32 of shape (n,), the weight of each token as a *label*
    (0: not supervised). Position 0 is never supervised: nothing predicts it.
    parted: prompt and answer were encoded one by one, because a token would have covered the end of one and the
    start of the other.
    """

    ids: Ids
    weights: npt.NDArray[np.float32]
    file: str
    line: int
    parted: bool = False

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return int(np.count_nonzero(self.weights))

    def __len__(self) -> int:
        return len(self.ids)
