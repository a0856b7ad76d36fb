"""Data types: `Row` (as read), `Conversation` (messages), `Example` (token ids and loss weights).

`reading/` reads rows from files, `formats.py` converts rows to conversations, and `rendering/` renders conversations to
examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from strop.errors import suggest

Role = Literal["system", "user", "assistant", "tool"]
Ids = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
LogProbs = npt.NDArray[np.float64]

# The data of an objective: conversations (their assistant turns are trained on), preference pairs, answers labelled
# good or bad, prompts for which the model samples completions, texts with their class, or texts that match.
DataKind = Literal["turns", "pairs", "labels", "prompts", "classes", "triplets"]
TEXT_KINDS: tuple[DataKind, ...] = ("classes", "triplets")  # texts are encoded without a chat template
RENDERED_PROMPTS: tuple[DataKind, ...] = ("prompts", *TEXT_KINDS)  # without an answer, so without a stop token
Label = str | tuple[str, ...]  # the class of a text, or all classes of a text that may have several
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # the place of an image in the text of a message
IMAGE_TEXT = "[image "  # the start of its description, where a message is shown
PREFERENCE_KINDS: tuple[DataKind, ...] = ("pairs", "labels")


@dataclass(frozen=True, slots=True)
class Row:
    """A record of a data file, with its values unchanged. `line` counts from 1."""

    file: str
    line: int
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a message, without its pixels.

    digest: SHA-256 of its bytes. path: the file with them. width, height: in pixels, upright. notes: what is done to
    its pixels: `rotated`, `transparent`, `16-bit`.
    """

    digest: str
    path: str
    width: int
    height: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a conversation. images: one for each mark (MARK) in `content`, in order."""

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    weight: float = 1.0  # loss weight of the message's tokens; 0 excludes them
    call_id: str | None = None  # tool turns only: the id of the tool call
    images: tuple[Image, ...] = ()

    @property
    def text(self) -> str:
        """The content, with a description in place of each image."""
        if not self.images:
            return self.content
        parts = content_parts(self, lambda image: {"text": f"{IMAGE_TEXT}{image.width}x{image.height}]"})
        return "".join(part["text"] for part in parts)


def content_parts(message: Message, image_part: Callable[[Image], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the text and the images of a message as content parts, in order."""
    images = iter(message.images)
    for i, text in enumerate(message.content.split(MARK) if message.images else [message.content]):
        if i:
            yield image_part(next(images))
        if text:
            yield {"type": "text", "text": text}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation, raw text or preference pair, converted from a row."""

    file: str
    line: int
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None  # raw text for continued pretraining; `messages` is then empty
    rejected: tuple[Message, ...] = ()  # the rejected conversation of a preference pair; `messages` is the chosen one
    desirable: bool | None = None  # whether a labelled answer is good
    label: Label | None = None  # of a text to classify
    passages: tuple[str, ...] = ()  # of a triplet, whose anchor is `text`: the positive and the negatives

    @property
    def has_images(self) -> bool:
        return any(turn.images for turn in (*self.messages, *self.rejected))

    @property
    def place(self) -> str:
        """The file and line of the row."""
        return f"{self.file}:{self.line}"

    @property
    def texts(self) -> tuple[str, ...]:
        """The anchor and the passages of a triplet."""
        return (self.text or "", *self.passages)

    @property
    def answer(self) -> str | None:
        """The content of the last turn, or None if it is not the assistant's."""
        last = self.messages[-1] if self.messages else None
        return last.content if last is not None and last.role == "assistant" else None

    @property
    def prompt(self) -> Conversation:
        """The turns before the first assistant turn with a nonzero weight."""
        turns = enumerate(self.messages)
        end = next((i for i, turn in turns if turn.role == "assistant" and turn.weight), len(self.messages))
        return replace(self, messages=self.messages[:end], rejected=(), desirable=None, label=None, passages=())

    @property
    def sides(self) -> tuple[Conversation, ...]:
        """The chosen and the rejected conversation of a preference pair; otherwise the conversation itself."""
        if not self.rejected:
            return (self,)
        chosen = replace(self, rejected=())
        return chosen, replace(chosen, messages=self.rejected)


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a classifier: their names in the order of its outputs, and whether a text may have several."""

    names: tuple[str, ...]
    several: bool = False

    def find_error(self, label: Label) -> str | None:
        """Return why a label is not valid, or None."""
        if isinstance(label, str) == self.several:
            return f"{'one label' if self.several else 'a list of labels'}, unlike the first training row"
        unknown = next((name for name in label_names(label) if name not in self.names), None)
        known = ", ".join(self.names[:8]) + ", ..." * (len(self.names) > 8)
        return (
            None if unknown is None else f"unknown label {unknown!r}{suggest(unknown, self.names)}; known are {known}"
        )

    def indices(self, label: Label) -> tuple[int, ...]:
        return tuple(self.names.index(name) for name in label_names(label))


def label_names(label: Label) -> tuple[str, ...]:
    return (label,) if isinstance(label, str) else label


@dataclass(frozen=True, slots=True)
class SoftLabels:
    """Distributions over k token ids, next to the labels of an example of n tokens.

    ids, probs: (n, k). The ids of a supervised token are different and contain its label. Their probabilities sum to at
    most 1, and all other ids have the rest together; an id with a negative probability is one of the others. weight,
    temperature: the loss is weight * temperature^2 * the Kullback-Leibler divergence of the model at that temperature
    from the distribution, and (1 - weight) * the cross entropy of the label (Hinton et al., arXiv:1503.02531, section
    2).
    """

    ids: Ids
    probs: npt.NDArray[np.float32]
    weight: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """A training sequence.

    ids: token ids, shape (n,). weights: loss weight of each token as a *label*, shape (n,); tokens of weight 0 are not
    supervised. Position 0 is never supervised, because no token predicts it. encoded_separately: the prompt and the
    answer were tokenized separately, because otherwise one token would cover the end of the prompt and the start of
    the answer. soft: distributions next to the labels.
    """

    ids: Ids
    weights: npt.NDArray[np.float32]
    file: str
    line: int
    encoded_separately: bool = False
    soft: SoftLabels | None = None

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

    def computed_tokens(self, packed: bool, share_prompt: bool = True) -> int:
        return len(self)


@dataclass(frozen=True, slots=True)
class ExampleGroup:
    """Answers to one prompt that are trained on in the same step: one row of the effective batch, never split.

    reference_logprobs: the log-probability of each of `examples` and `kl_examples` under the reference model; empty
    until it is computed.
    """

    examples: tuple[Example, ...]  # the trained answers: chosen and rejected, or one labelled answer
    kl_examples: tuple[Example, ...] = ()  # this prompt with another row's answer, for the KL estimate of KTO
    desirable: bool = True  # whether a labelled answer is good
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

    def computed_tokens(self, packed: bool, share_prompt: bool = True) -> int:
        """Return the number of tokens computed for the group in a micro-batch, including padding.

        share_prompt: a packed micro-batch computes the prompt once for all examples.
        """
        if packed:
            return len(self) - ((len(self.examples) - 1) * self.examples[0].prompt_length if share_prompt else 0)
        return len(self.examples) * max(map(len, self.examples))


@dataclass(frozen=True, slots=True)
class LabelledText(ExampleGroup):
    """A text with its classes, as indices of the classifier's outputs. Only its last token is supervised."""

    classes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Triplet(ExampleGroup):
    """An anchor, a text that matches it, and any number of texts that do not.

    examples: anchor, positive and negatives; only the last token of each is supervised. The other fields are set in a
    training step: the gradient of the batch's loss with respect to each text's vector, (n, h), fp32; the loss of the
    anchor; and whether the positive is nearer to the anchor than all other texts of the batch.
    """

    gradients: npt.NDArray[np.float32] | None = None
    loss: float = 0.0
    is_first: bool = False

    def computed_tokens(self, packed: bool, share_prompt: bool = True) -> int:
        """Return the number of tokens computed for the texts in a micro-batch, including padding."""
        return len(self) if packed else len(self.examples) * max(map(len, self.examples))


@dataclass(frozen=True, slots=True)
class Prompt(ExampleGroup):
    """A prompt for which the model samples completions.

    examples: one example with the prompt's tokens, none of them supervised.
    """

    gold: str | None = None  # the reference answer
    row: int = 0  # index among the prompts
    reasoning_ends: tuple[str, ...] = ()  # texts that end the reasoning of a completion; empty: nothing is stripped
    messages: tuple[Mapping[str, Any], ...] = ()  # of the prompt, in the `messages` format

    def computed_tokens(self, packed: bool, share_prompt: bool = True) -> int:
        return len(self)


@dataclass(frozen=True, slots=True)
class RolloutGroup(ExampleGroup):
    """Completions sampled for one prompt, and their rewards. Equal ones with one reward are stored once.

    examples: the weight of a completion's tokens is the number of times it was sampled. sampling_logprobs: the
    log-probability of each supervised token when it was sampled, for all completions in order.
    reference_token_logprobs, teacher_token_logprobs: the same under the reference model and the teacher, if there are.
    """

    advantages: tuple[float, ...] = ()  # one entry per example
    stopped: tuple[bool, ...] = ()  # whether a stop token ended the completion, one entry per example
    rewards: tuple[float, ...] = ()  # one entry per sampled completion
    reward_parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by name; entries as in rewards
    counts_of_traces: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # in an environment; as in rewards
    sampling_logprobs: LogProbs = field(default_factory=lambda: np.zeros(0))
    reference_token_logprobs: LogProbs = field(default_factory=lambda: np.zeros(0))
    teacher_token_logprobs: LogProbs = field(default_factory=lambda: np.zeros(0))

    @property
    def counts(self) -> list[int]:
        """Number of times that each completion was sampled."""
        return [int(example.weights[-1]) for example in self.examples]


def strip_reasoning(text: str, reasoning_ends: Iterable[str]) -> str:
    """Return the part of a completion after its reasoning, or all of it if none of `reasoning_ends` is in it."""
    end = next((end for end in reasoning_ends if end in text), None)
    return text if end is None else text.partition(end)[2].lstrip()


def shared_prefix_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return the number of items before the first difference of two sequences."""
    differences = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differences, min(len(left), len(right)))


Item = Example | ExampleGroup  # a row of the effective batch
