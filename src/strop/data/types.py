"""Units of training data: `Row` (as read), `Conversation` (messages), `Example` (token ids and weights).

`reading/` turns bytes into rows, `formats.py` turns rows into conversations, and `rendering/` turns conversations into
examples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant", "tool"]
Ids = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
LogProbs = npt.NDArray[np.float64]

# What an objective learns from: the turns of conversations, pairs of answers, answers with a label, or prompts, for
# which the model samples completions.
DataKind = Literal["turns", "pairs", "labels", "prompts"]
JUDGED: tuple[DataKind, ...] = ("pairs", "labels")  # kinds with answers that were compared or judged


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file, with its values unchanged. `line` counts from 1."""

    file: str
    line: int
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    weight: float = 1.0  # of the message's tokens in the loss; 0 excludes them
    call_id: str | None = None  # for a tool turn, the id of the call that it answers


@dataclass(frozen=True, slots=True)
class Conversation:
    """The content of one row."""

    file: str
    line: int
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None  # raw text for continued pretraining; `messages` is then empty
    rejected: tuple[Message, ...] = ()  # of a preference pair: the worse answer; `messages` has the better one
    desirable: bool | None = None  # the label of a judged answer

    @property
    def answer(self) -> str | None:
        """The content of the last turn, or None if it is not the assistant's."""
        last = self.messages[-1] if self.messages else None
        return last.content if last is not None and last.role == "assistant" else None

    @property
    def prompt(self) -> Conversation:
        """The turns before the first trained answer, which is the one that was compared or judged."""
        turns = enumerate(self.messages)
        end = next((i for i, turn in turns if turn.role == "assistant" and turn.weight), len(self.messages))
        return replace(self, messages=self.messages[:end], rejected=(), desirable=None)

    @property
    def sides(self) -> tuple[Conversation, ...]:
        """The chosen and the rejected conversation of a preference pair; otherwise the conversation itself."""
        if not self.rejected:
            return (self,)
        chosen = replace(self, rejected=())
        return chosen, replace(chosen, messages=self.rejected)


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence.

    ids: token ids, shape (n,). weights: shape (n,), the weight of each token as a *label* (0: not supervised). Position
    0 is never supervised, because no token predicts it. encoded_separately: the prompt and the answer were tokenized
    separately, because one token would have covered the end of one and the start of the other.
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
    def prompt_length(self) -> int:
        """Number of tokens before the first supervised one."""
        return int(np.flatnonzero(self.weights)[0])

    @property
    def examples(self) -> tuple[Example, ...]:
        """The example itself, so that an `Example` can be used like an `ExampleGroup`."""
        return (self,)

    def computed_tokens(self, packed: bool, shares: bool = True) -> int:
        return len(self)


@dataclass(frozen=True, slots=True)
class ExampleGroup:
    """Answers to one prompt that one step needs together: one row of the effective batch, never split.

    reference_logprobs: the log-probability of each of `examples` and `kl_examples` under the model as it was when
    training began; empty until it is computed.
    """

    examples: tuple[Example, ...]  # the trained answers: chosen and rejected, or one judged answer
    kl_examples: tuple[Example, ...] = ()  # this prompt with another row's answer, for the KL estimate of KTO
    desirable: bool = True  # the label of a judged answer
    reference_logprobs: tuple[float, ...] = ()

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
        """Return the tokens that a micro-batch computes: padded, or packed with a prompt once if `shares`."""
        if packed:
            return len(self) - ((len(self.examples) - 1) * self.examples[0].prompt_length if shares else 0)
        return len(self.examples) * max(map(len, self.examples))


@dataclass(frozen=True, slots=True)
class Prompt(ExampleGroup):
    """A prompt for which the model samples completions.

    examples: one example with the prompt's tokens, none of them supervised.
    """

    gold: str | None = None  # the reference answer
    row: int = 0
    reasoning_ends: tuple[str, ...] = ()  # end the reasoning of a completion; empty if the gold answer has none

    def computed_tokens(self, packed: bool, shares: bool = True) -> int:
        return len(self)


@dataclass(frozen=True, slots=True)
class RolloutGroup(ExampleGroup):
    """Completions that were sampled for one prompt, and their rewards. Equal completions are stored once.

    examples: the weight of a completion's tokens is the number of times it was sampled. sampling_logprobs,
    reference_token_logprobs: of all supervised tokens, completion after completion, when sampled and under the
    reference model (empty without one).
    """

    advantages: tuple[float, ...] = ()  # one entry an example, like `stopped`
    stopped: tuple[bool, ...] = ()  # ended by a stop token
    rewards: tuple[float, ...] = ()  # one entry a sampled completion
    sampling_logprobs: LogProbs = field(default_factory=lambda: np.zeros(0))
    reference_token_logprobs: LogProbs = field(default_factory=lambda: np.zeros(0))

    @property
    def counts(self) -> list[int]:
        return [int(example.weights[-1]) for example in self.examples]


def strip_reasoning(text: str, reasoning_ends: Iterable[str]) -> str:
    """Return the part of a completion after its reasoning, or all of it if none of `reasoning_ends` is in it."""
    end = next((end for end in reasoning_ends if end in text), None)
    return text if end is None else text.partition(end)[2].lstrip()


Item = Example | ExampleGroup  # one row of the effective batch
