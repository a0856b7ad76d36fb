"""The units that data passes through: Row (as in the file), Conversation (what was said), Example (what is trained).

reading/ makes rows from bytes, formats.py conversations from rows, rendering/ examples from conversations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant", "tool"]
Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
LogProbs = npt.NDArray[np.float64]


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
    """What one row says. `text` is set for raw text (continued pretraining), and then messages are empty.

    rejected: of a pair, the conversation with the worse answer; messages are then the one with the better answer.
    desirable: whether the answer was judged good; None where nobody judged.
    """

    file: str
    line: int
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    rejected: tuple[Message, ...] = ()
    desirable: bool | None = None

    @property
    def answer(self) -> str | None:
        """What the last turn says, where it is the assistant's."""
        last = self.messages[-1] if self.messages else None
        return last.content if last is not None and last.role == "assistant" else None

    @property
    def prompt(self) -> Conversation:
        """The turns in front of the first answer that is trained on, which is the one that was compared or judged."""
        turns = enumerate(self.messages)
        end = next((place for place, turn in turns if turn.role == "assistant" and turn.weight), len(self.messages))
        return replace(self, messages=self.messages[:end], rejected=(), desirable=None)

    @property
    def sides(self) -> tuple[Conversation, ...]:
        """A pair's better and worse conversation; else itself."""
        if not self.rejected:
            return (self,)
        better = replace(self, rejected=())
        return better, replace(better, messages=self.rejected)


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
    encoded_separately: bool = False

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return int(np.count_nonzero(self.weights))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt(self) -> int:
        """Number of tokens in front of the first supervised one."""
        return int(np.flatnonzero(self.weights)[0])

    @property
    def examples(self) -> tuple[Example, ...]:
        """Itself: what is computed of one row."""
        return (self,)

    def computed_tokens(self, packed: bool, shares: bool = True) -> int:
        """Tokens that a micro-batch computes for it."""
        return len(self)


@dataclass(frozen=True, slots=True)
class ExampleGroup:
    """Answers to one prompt that one step needs together: one row of the effective batch, never parted.

    examples: those that are trained on: chosen and rejected, or one answer that was judged. beside: another row's
    answer to this prompt, for KTO's estimate of the divergence. desirable: the judgement. reference: the
    log-probability of each of examples and beside under the model as it was when training began; () before it is known.
    """

    examples: tuple[Example, ...]
    kl_examples: tuple[Example, ...] = ()
    desirable: bool = True
    reference: tuple[float, ...] = ()

    @property
    def file(self) -> str:
        return self.examples[0].file

    @property
    def line(self) -> int:
        return self.examples[0].line

    @property
    def supervised(self) -> int:
        return sum(example.supervised for example in self.examples)

    def __len__(self) -> int:
        return sum(map(len, self.examples))

    def computed_tokens(self, packed: bool, shares: bool = True) -> int:
        """Tokens that a micro-batch computes for it: where rows are packed their own (shares: the prompt once), else
        rows of one length."""
        if packed:
            return len(self) - ((len(self.examples) - 1) * self.examples[0].prompt if shares else 0)
        return len(self.examples) * max(map(len, self.examples))


@dataclass(frozen=True, slots=True)
class Prompt(ExampleGroup):
    """A prompt to which answers are drawn. examples: one, of the prompt's tokens, none of them supervised. gold: the
    right answer, where the row has one. row: its place among the rows. closes: what ends the reasoning in an answer,
    where the right one has some."""

    gold: str | None = None
    row: int = 0
    reasoning_ends: tuple[str, ...] = ()

    def computed_tokens(self, packed: bool, shares: bool = True) -> int:
        return len(self)


@dataclass(frozen=True, slots=True)
class RolloutGroup(ExampleGroup):
    """Answers that were drawn to one prompt, with what they were rewarded with; equal answers stand once.

    examples: the weight of each answer's tokens is the number of times that it was drawn. advantages, stopped (ended by
    a stop token): of each. rewards: of each answer as often as it was sampled. old_logprobs, ref_logprobs: of all
    supervised tokens, answer after answer, when sampled and under the reference, fp64; ref_logprobs may be empty.
    """

    advantages: tuple[float, ...] = ()
    stopped: tuple[bool, ...] = ()
    rewards: tuple[float, ...] = ()
    old_logprobs: LogProbs = field(default_factory=lambda: np.zeros(0))
    ref_logprobs: LogProbs = field(default_factory=lambda: np.zeros(0))

    @property
    def counts(self) -> list[int]:
        """How often each answer was drawn."""
        return [int(example.weights[-1]) for example in self.examples]


def strip_reasoning(text: str, reasoning_ends: Iterable[str]) -> str:
    """An answer from the end of its reasoning on; where none of `reasoning_ends` ends it, all of it."""
    close = next((close for close in reasoning_ends if close in text), None)
    return text if close is None else text.partition(close)[2].lstrip()


Item = Example | ExampleGroup  # one row of the effective batch
