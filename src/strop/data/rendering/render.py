"""Render conversations to examples: token ids, and the weight of each token as a label.

The rendered text is encoded as a whole. Its supervised spans are then converted to tokens: a prompt must end where a
token ends, and each supervised turn must end with its stop token.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np

from strop.data.images import FIRST_IMAGE_ID, ImageTable
from strop.data.rendering.encoder import ControlText, Encoder, TokenStraddlesPrompt
from strop.data.rendering.image_encoder import image_encoder
from strop.data.rendering.template import ChatTemplate, Draft, Reasoning
from strop.data.rendering.template_source import (
    DATE_OPTION,
    adds_bos,
    check_options,
    missing_template_error,
    template_source,
    write_options,
)
from strop.data.row_errors import RenderError
from strop.data.types import Conversation, Example, Ids, Message, strip_reasoning
from strop.errors import Location, ModelError

BATCH_ROWS = 256

Rendered = tuple[Conversation, "list[Example] | RenderError"]


class Renderer:
    """Render conversations to examples for one tokenizer and chat template.

    tokenizer: a fast transformers tokenizer. template: `chatml`, a file, or None for the tokenizer's template. loss:
    which tokens are supervised. options: values to write into the template. reasoning: value of data.reasoning. source:
    text of the template, overrides `template`.

    Raises ModelError for an unusable tokenizer or template. Without a template, only raw texts can be rendered.
    """

    def __init__(
        self, tokenizer: Any, *, template: str | None = None, loss: Literal["assistant", "all"] = "assistant",
        options: Mapping[str, Any] | None = None, reasoning: Reasoning = "auto", source: str | None = None,
    ) -> None:  # fmt: skip
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError("the model has no fast tokenizer", fix="choose a model with a tokenizer.json")
        self.tokenizer = tokenizer
        self._images = image_encoder(tokenizer)
        self.loss = loss
        added = {token.content: bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
        source = source or template_source(tokenizer, template)
        self._chat = None
        if source:
            variables = tokenizer.special_tokens_map
            self._chat = ChatTemplate(source, added=added, variables=variables, options=options, reasoning=reasoning)
        if self._images is not None and self._chat is not None and self._chat.traits.image_tokens:
            self._images.candidates = self._chat.traits.image_tokens
        special = [token for token, is_special in added.items() if is_special]
        self.control = self._chat.control if self._chat else ControlText(special)
        self._encoder = Encoder(tokenizer, self.control)
        self._private_encoder: Encoder | None = None
        self._is_lost: dict[str, bool] = {}  # character -> whether the tokenizer drops or changes it
        eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        # stop_ids end an assistant turn; end_ids end a completion, and include eos, which ends raw texts
        self.stop_ids = tuple(map(int, tokenizer.convert_tokens_to_ids(self._chat.stops))) if self._chat else eos
        self.end_ids = tuple(dict.fromkeys((*self.stop_ids, *eos)))
        plain, with_special = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        starts = (i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain)
        self.text_prefix: list[int] = with_special[: next(starts, 0)]  # ids before a raw text, such as bos

    @property
    def image_table(self) -> ImageTable | None:
        """The images of rendered rows, or None for a model of texts."""
        return None if self._images is None else self._images.table

    def _check_images(self, messages: Iterable[Message]) -> None:
        """Raise RenderError for images if the model reads only text, whose chat template may refuse them in any way."""
        if self._images is None and any(message.images for message in messages):
            raise RenderError("no-images")

    def _expand_images(self, draft: Draft, messages: Iterable[Message]) -> Draft:
        """Write the text of each image in a draft. messages: of the conversation. Raises RenderError."""
        if not draft.images or self._images is None:
            return draft
        encoder = self._images
        if draft.images > 1 and not encoder.reads_several:
            raise RenderError("image-refused", "the model reads several images in another way than one, so give one")
        images = [image for message in messages for image in message.images][: draft.images]
        return draft.expand(encoder.placeholder, [encoder.expand(image.width, image.height).text for image in images])

    def _number_images(self, ids: Ids, messages: Iterable[Message]) -> Ids:
        """Replace the image tokens with the ids of the images' features, in order. Raises RenderError."""
        images = [image for message in messages for image in message.images]
        if not images or self._images is None:
            return ids
        places = (ids == self._images.image_token_id).nonzero()[0]
        numbers: list[int] = []
        for image in images:
            if len(numbers) == len(places):  # the others are in later turns
                break
            count = self._images.expand(image.width, image.height).tokens
            start = self._images.table.add(image, count)
            numbers += range(start, start + count)
        if len(numbers) != len(places):
            raise RenderError("image-lost", f"{len(places)} image tokens in place of {len(numbers)}")
        ids = ids.copy()
        ids[places] = numbers
        return ids

    @property
    def chat(self) -> ChatTemplate:
        """The chat template. Raises ModelError if there is none."""
        if self._chat is None:
            raise missing_template_error()
        return self._chat

    @property
    def template(self) -> str | None:
        return self._chat.source if self._chat else None

    @property
    def reasoning(self) -> Reasoning:
        return self._chat.reasoning if self._chat else "auto"

    @property
    def template_hash(self) -> str:
        """SHA-256 of the template's text, or '' without a template."""
        return self._chat.hash if self._chat else ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines token ids and weights: tokenizer, template, reasoning, loss."""
        tokenizer = self.tokenizer
        names = [repr(tokenizer.special_tokens_map), repr(tokenizer("a")["input_ids"]), self.template_hash, self.loss]
        names += [] if self._images is None else [self._images.fingerprint]
        text = "\n".join([tokenizer.backend_tokenizer.to_str(), *names, self.reasoning])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def warnings(self) -> tuple[str, ...]:
        warnings = self._chat.warnings if self._chat else ()
        if self._chat and adds_bos(self.tokenizer) and self.tokenizer.bos_token not in self._chat.traits.opening:
            warnings += ("the chat template writes no bos token, but the tokenizer puts one before plain text",)
        return warnings

    def options_for(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Return the template's options for a row, which depend on whether it has reasoning."""
        return self.chat.mode(messages).options

    def for_serving(self, *, thinking: int, rows: int) -> Renderer:
        """Return the renderer for inference after training on `rows` conversations, `thinking` of which have reasoning.

        Its prompts equal those in training. If only some rows have reasoning, the renderer is unchanged.
        """
        options = self._chat.serving_options(thinking=thinking, rows=rows) if self._chat else {}
        if not options:
            return self
        source = write_options(self.chat.source, options, [])
        return Renderer(self.tokenizer, loss=self.loss, reasoning=self.reasoning, source=source)

    def separate_reasoning(self, conversation: Conversation) -> Conversation:
        """Move reasoning in the text of answers to `Message.reasoning`: see ChatTemplate.separate_reasoning."""
        if self._chat is None or not self._chat.traits.reasoning_marks:
            return conversation
        messages, rejected = (
            tuple(map(self._chat.separate_reasoning, turns)) for turns in (conversation.messages, conversation.rejected)
        )
        return replace(conversation, messages=messages, rejected=rejected)

    def render(self, conversation: Conversation) -> list[Example]:
        """Return the examples of a conversation: one, or one per assistant turn. Raises RenderError, ModelError."""
        render = Renderer.render_many if conversation.label is None else render_labelled
        render = render_triplets if conversation.passages else render
        [(_, rendered)] = render(self, [conversation])
        if isinstance(rendered, RenderError):
            rendered.where = (Location(conversation.file, conversation.line, rendered.what),)
            raise rendered
        return rendered

    def render_many(self, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
        """Yield each conversation with its examples, or with the error if it cannot be rendered, in order.

        While one batch is encoded (in Rust, without the interpreter lock), the next one is read and rendered to text.
        """
        source = iter(conversations)
        previous: Iterator[Rendered] = iter(())
        with ThreadPoolExecutor(1) as worker:
            while batch := [(row, self._make_drafts(row)) for row in islice(source, BATCH_ROWS)]:
                drafts = [draft for _, result in batch if not isinstance(result, RenderError) for draft in result]
                texts = ["" if draft.masked else draft.text for draft in drafts]
                encoded = worker.submit(self._encoder.encode, texts)
                yield from previous
                previous = self._finish_batch(batch, encoded)
            yield from previous

    def _make_drafts(self, conversation: Conversation) -> list[Draft] | RenderError:
        try:
            if conversation.text is None:
                self._check_images(conversation.messages)
                drafts = self.chat.make_drafts(conversation, include_untrained=self.loss == "all")
                return [self._expand_images(draft, conversation.messages) for draft in drafts]
            if self.tokenizer.eos_token_id is None:
                raise ModelError("the tokenizer has no eos token to end a text with", fix="choose another model")
            masked = self.control.occurs_in(conversation.text)
            return [Draft(self.control.mask(conversation.text) if masked else conversation.text, (), masked)]
        except RenderError as error:
            return error

    def _finish_batch(
        self, batch: list[tuple[Conversation, list[Draft] | RenderError]], encoded: Future[list[list[int]]]
    ) -> Iterator[Rendered]:
        """Yield each conversation with its examples or error. encoded: token ids of the drafts; [] if masked."""
        encodings = iter(encoded.result())
        for conversation, drafts in batch:
            if isinstance(drafts, RenderError):
                yield conversation, drafts
                continue
            draft_encodings = list(islice(encodings, len(drafts)))
            try:
                examples = [
                    example
                    for draft, ids in zip(drafts, draft_encodings, strict=True)
                    for example in self._make_examples(conversation, draft, ids)
                ]
            except RenderError as error:
                yield conversation, error
            else:
                yield conversation, examples

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *,
        options: Mapping[str, Any] | None = None,
    ) -> Ids:  # fmt: skip
        """Return the token ids of a prompt with the generation prompt. They are a prefix of the ids in training.

        options: template options for this prompt. Raises RenderError, and ModelError for an option that the template
        does not read.
        """
        check_options(options or {}, self.chat.variables_read - {DATE_OPTION}, "chat_template_kwargs")
        self._check_images(messages)
        messages = [self.chat.separate_reasoning(message) for message in messages]
        draft = self._expand_images(self.chat.prompt(messages, tools, options=options), messages)
        encoder, text, *_ = self._encoder_for(draft)
        return self._number_images(encoder.true_ids(encoder.encode([text])[0]), messages)

    def continuation(
        self, messages: Sequence[Message], results: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *,
        mark: str, options: Mapping[str, Any] | None = None,
    ) -> Ids:  # fmt: skip
        """Return the token ids between the stop token of the last of `messages` and the next turn: the results of its
        tool calls and the generation prompt. See ChatTemplate.continuation."""
        draft = self.chat.continuation(messages, results, tools, mark=mark, options=options)
        encoder, text, *_ = self._encoder_for(draft)
        ids = encoder.true_ids(encoder.encode([text])[0])
        if int(ids[0]) not in self.stop_ids:
            raise RenderError("no-stop-token")
        return ids[1:]

    def reference_answer(self, conversation: Conversation) -> str | None:
        """Return the reference answer without reasoning, as decoded text, or None if there is none.

        Tool calls are included as the template writes them. Raises RenderError, ModelError.
        """
        answer = conversation.answer
        if answer is None or not conversation.messages[-1].tool_calls:
            return answer
        *context, last = conversation.messages
        example = self.render(replace(conversation, messages=(*context, replace(last, weight=1.0))))[-1]
        start = len(self.prompt(context, conversation.tools, options=self.options_for(conversation.messages)))
        return self.without_reasoning(self.tokenizer.decode(example.ids[start:-1], skip_special_tokens=True), last)

    def without_reasoning(self, text: str, reference: Message) -> str:
        """Return a completion without its reasoning if the reference turn has reasoning, otherwise unchanged."""
        return strip_reasoning(text, self.reasoning_ends if self.shows_reasoning(reference) else ())

    def shows_reasoning(self, turn: Message) -> bool:
        """Return whether the turn has reasoning that the template shows."""
        return bool(turn.reasoning) and self.chat.shows_reasoning([turn])

    @cached_property
    def reasoning_ends(self) -> list[str]:
        """Texts that end reasoning in a decoded completion. Special tokens are not decoded, so they are left out."""
        ids = [self._encoder.encode([end])[0] for end in self.chat.traits.reasoning_ends]
        texts = [str(self.tokenizer.decode(end, skip_special_tokens=True)).strip() for end in ids]
        return [text for text in texts if text]

    def lost_characters(self, text: str) -> set[str]:
        """Return the characters of `text` that the tokenizer drops or changes."""
        for character in set(text) - self._is_lost.keys():
            ids = self._encoder.encode(["a" + character])[0]
            self._is_lost[character] = character not in self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return {character for character in set(text) if self._is_lost[character]}

    def _encoder_for(self, draft: Draft) -> tuple[Encoder, str, tuple[tuple[int, int, float], ...], int]:
        """Return the encoder for a draft, and its text, spans and the length of the text that earlier drafts have.

        In a masked draft, control tokens in user text are private-use characters. `swap` exchanges these with the real
        control tokens, and the `private` encoder treats the private-use characters as control tokens.
        """
        if not draft.masked:
            return self._encoder, draft.text, draft.spans, draft.seen
        if self._private_encoder is None:
            self._private_encoder = Encoder(self.tokenizer, self.control, private=True)
        swap = self.control.swap
        spans = tuple((len(swap(draft.text[:a])), len(swap(draft.text[:b])), weight) for a, b, weight in draft.spans)
        return self._private_encoder, swap(draft.text), spans, len(swap(draft.text[: draft.seen]))

    def _make_examples(self, conversation: Conversation, draft: Draft, encoded: list[int]) -> Iterator[Example]:
        """Yield one example, or one per turn if a token would straddle the end of a prompt.

        Such a token never occurs at inference, where the prompt is encoded and the model continues it.
        """
        encoder, text, spans, seen = self._encoder_for(draft)
        if draft.masked:
            encoded = encoder.encode([text])[0]

        def count_tokens(end: int) -> int:
            return len(encoder.encode([text[:end]])[0]) if end and self.loss == "all" else 0

        try:
            ids = encoder.true_ids(encoded)
            yield self._make_example(conversation, ids, encoder.token_spans(text, ids, spans), seen=count_tokens(seen))
        except TokenStraddlesPrompt:
            for start, end, weight in spans:
                prompt = encoder.true_ids(encoder.encode([text[:start]])[0])
                ids = np.concatenate([prompt, encoder.true_ids(encoder.encode_continuation(text[start:end]))])
                span = (len(prompt), len(ids), weight)
                yield self._make_example(conversation, ids, [span], seen=count_tokens(seen), separately=True)
                seen = end

    def _make_example(
        self, conversation: Conversation, ids: Ids, spans: Iterable[tuple[int, int, float]], *, seen: int,
        separately: bool = False,
    ) -> Example:  # fmt: skip
        """Make an example. seen: number of tokens at its start that earlier examples of the conversation have."""
        if conversation.text is not None:
            ids = np.array([*self.text_prefix, *ids, self.tokenizer.eos_token_id], dtype=np.int32)
            weights = np.ones(len(ids), np.float32)
        else:
            weights = np.full(len(ids), 1.0 if self.loss == "all" else 0.0, np.float32)
            weights[:seen] = 0.0
        for begin, end, weight in spans:
            if int(ids[end - 1]) not in self.stop_ids:
                raise RenderError("no-stop-token")
            weights[begin:end] = weight
        weights[:1] = 0.0
        ids = self._number_images(ids, conversation.messages)
        weights[ids >= FIRST_IMAGE_ID] = 0.0
        if not weights.any():
            raise RenderError("nothing-supervised")
        return Example(ids, weights, conversation.file, conversation.line, separately)


def render_pairs(renderer: Renderer, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
    """Yield each conversation with its chosen and rejected example, or with the error, in order.

    A conversation without a rejected answer is rendered as in `render_many`.
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
            rendered = check_pair(rendered, next(results)[1])
        yield conversation, rendered


def render_prompts(renderer: Renderer, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
    """Yield each conversation with one unsupervised example of its prompt, or with the error, in order.

    The prompt has the same tokens as in fine-tuning and at inference. An answer at the end is left out.
    """
    for conversation in conversations:
        messages = conversation.messages if conversation.answer is None else conversation.messages[:-1]
        try:
            ids = renderer.prompt(messages, conversation.tools, options=renderer.options_for(conversation.messages))
        except RenderError as error:
            yield conversation, error
        else:
            yield conversation, [Example(ids, np.zeros(len(ids), np.float32), conversation.file, conversation.line)]


def render_labelled(renderer: Renderer, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
    """Yield each text to classify with its example, of which the last token is supervised, or with the error, in order.

    A text is encoded as `tokenizer(text)` does, as in transformers' text-classification pipeline, which writes no chat
    template. Messages are rendered as a prompt.
    """
    source = iter(conversations)
    while batch := list(islice(source, BATCH_ROWS)):
        texts = [conversation.text for conversation in batch if conversation.text is not None]
        encoded = iter(renderer.tokenizer(texts, verbose=False)["input_ids"] if texts else ())
        for conversation in batch:
            try:
                if conversation.text is not None:
                    ids = np.array(next(encoded), np.int32)
                else:
                    options = renderer.options_for(conversation.messages)
                    ids = renderer.prompt(conversation.messages, conversation.tools, options=options)
                example = _as_text_example(ids, conversation)
            except RenderError as error:
                yield conversation, error
            else:
                yield conversation, [example]


def render_triplets(renderer: Renderer, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
    """Yield each triplet with the examples of anchor, positive and negatives, or with the error, in order.

    Texts are encoded as `tokenizer(text)` does, as in sentence-transformers. The last token of each is supervised.
    """
    source = iter(conversations)
    while batch := list(islice(source, BATCH_ROWS)):
        texts = [text for conversation in batch for text in conversation.texts]
        encoded = iter(renderer.tokenizer(texts, verbose=False)["input_ids"])
        for conversation in batch:
            rows = list(islice(encoded, 1 + len(conversation.passages)))
            try:
                examples = [_as_text_example(np.array(ids, np.int32), conversation) for ids in rows]
            except RenderError as error:
                yield conversation, error
            else:
                yield conversation, examples


def _as_text_example(ids: Ids, conversation: Conversation) -> Example:
    if not len(ids):
        raise RenderError("no-tokens")
    return text_example(ids, conversation.file, conversation.line)


def text_example(ids: Ids, file: str, line: int) -> Example:
    """Return the example of a text to classify or embed, of which the last token is supervised."""
    weights = np.zeros(len(ids), np.float32)
    weights[-1] = 1.0
    return Example(ids, weights, file, line)


def check_pair(*sides: list[Example] | RenderError) -> list[Example] | RenderError:
    """Return the chosen and the rejected example, or the error of the pair."""
    examples: list[Example] = []
    for side in sides:
        if isinstance(side, RenderError):
            return side
        if len(side) != 1:
            return RenderError("answer-in-parts")
        examples += side
    chosen, rejected = examples
    lengths = chosen.prompt_length, rejected.prompt_length
    if not np.array_equal(chosen.ids[: min(lengths)], rejected.ids[: min(lengths)]):
        return RenderError("prompt-tokens-differ")
    if lengths[0] != lengths[1]:
        return RenderError("prompt-lengths-differ")
    if np.array_equal(chosen.ids, rejected.ids):
        return RenderError("same-tokens")
    separately = chosen.encoded_separately or rejected.encoded_separately
    return [replace(example, encoded_separately=separately) for example in examples]
