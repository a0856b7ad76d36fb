"""Render conversations to examples: token ids, and the weight of each token as a label.

The rendered text is encoded once as a whole, as at inference. Spans of the text are then mapped to tokens and checked:
the prompt must end where a token ends, and each supervised turn must end with its stop token.
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

from strop.data.rendering.encoder import ControlText, Encoder, TokenStraddlesPrompt
from strop.data.rendering.template import ChatTemplate, Draft, Reasoning
from strop.data.rendering.template_source import CLOCK, adds_bos, check_options, template_source, write_options
from strop.data.row_errors import RenderError
from strop.data.types import Conversation, Example, Ids, Message, strip_reasoning
from strop.errors import ModelError

BATCH_ROWS = 256

Rendered = tuple[Conversation, "list[Example] | RenderError"]
_Batch = tuple[list[Conversation], list["list[Draft] | RenderError"], "Future[list[list[int]]]"]


class Renderer:
    """Render conversations to examples for one tokenizer and template.

    tokenizer: a fast transformers tokenizer. template: `chatml`, a file, or None for the tokenizer's own. loss: which
    tokens are supervised. options: values to write into the template for training. reasoning: value of data.reasoning.
    source: the template's text, instead of `template`.

    Raises ModelError for an unusable tokenizer or template. A missing template is an error only when a chat needs it.
    """

    def __init__(
        self, tokenizer: Any, *, template: str | None = None, loss: Literal["assistant", "all"] = "assistant",
        options: Mapping[str, Any] | None = None, reasoning: Reasoning = "auto", source: str | None = None,
    ) -> None:  # fmt: skip
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError("the model has no fast tokenizer", fix="choose a model with a tokenizer.json")
        self.tokenizer = tokenizer
        self.loss = loss
        added = {token.content: bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
        source = source or template_source(tokenizer, template)
        self._chat = None
        if source:
            variables = tokenizer.special_tokens_map
            self._chat = ChatTemplate(source, added=added, variables=variables, options=options, reasoning=reasoning)
        special = [token for token, is_special in added.items() if is_special]
        self.control = self._chat.control if self._chat else ControlText(special)
        self._encoder = Encoder(tokenizer, self.control)
        self._private_encoder: Encoder | None = None
        self._is_lost: dict[str, bool] = {}  # character -> the tokenizer drops or changes it
        eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        # tokens that end an assistant turn, and those that end a completion: also eos, which ends raw texts
        self.stop_ids = tuple(map(int, tokenizer.convert_tokens_to_ids(self._chat.stops))) if self._chat else eos
        self.end_ids = tuple(dict.fromkeys((*self.stop_ids, *eos)))
        plain, with_special = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        starts = (i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain)
        self.num_before_text = next(starts, 0)  # tokens that the tokenizer puts before a raw text
        self._text_start = with_special[: self.num_before_text]

    @property
    def chat(self) -> ChatTemplate:
        """The template. Raises ModelError if there is none."""
        if self._chat is None:
            fix = "choose one: data.template: chatml, or the path of a Jinja file"
            raise ModelError("the model has no chat template", fix=fix)
        return self._chat

    @property
    def template(self) -> str | None:
        return self._chat.source if self._chat else None

    @property
    def reasoning(self) -> Reasoning:
        return self._chat.reasoning if self._chat else "auto"

    @property
    def template_hash(self) -> str:
        """SHA-256 of the template's text; '' without a template."""
        return self._chat.hash if self._chat else ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines ids and weights: tokenizer, template, reasoning, loss."""
        tokenizer = self.tokenizer
        names = [repr(tokenizer.special_tokens_map), repr(tokenizer("a")["input_ids"]), self.template_hash, self.loss]
        text = "\n".join([tokenizer.backend_tokenizer.to_str(), *names, self.reasoning])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def warnings(self) -> tuple[str, ...]:
        warnings = self._chat.warnings if self._chat else ()
        if self._chat and adds_bos(self.tokenizer) and self.tokenizer.bos_token not in self._chat.opening:
            warnings += ("the chat template writes no bos token, but the tokenizer puts one before plain text",)
        return warnings

    @property
    def supports_system(self) -> bool:
        return self.chat.traits.system

    @property
    def supports_tools(self) -> bool:
        return self.chat.traits.tools and self.chat.traits.calls

    def options_for(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Return the template's options for a row with or without reasoning."""
        return self.chat.mode(messages).options

    def for_serving(self, *, thinking: int, rows: int) -> Renderer:
        """Return the renderer for inference after training on `rows` conversations, `thinking` of which have reasoning.

        Its prompts equal those of training. If only some rows have reasoning, the renderer is unchanged.
        """
        options = self._chat.serving_options(thinking=thinking, rows=rows) if self._chat else {}
        if not options:
            return self
        source = write_options(self.chat.source, options, [])
        return Renderer(self.tokenizer, loss=self.loss, reasoning=self.reasoning, source=source)

    def separate_reasoning(self, conversation: Conversation) -> Conversation:
        """Move reasoning in the text of answers to its own field: see ChatTemplate.separate_reasoning."""
        if self._chat is None or not self._chat.traits.reasoning_marks:
            return conversation
        messages, rejected = (
            tuple(map(self._chat.separate_reasoning, turns)) for turns in (conversation.messages, conversation.rejected)
        )
        return replace(conversation, messages=messages, rejected=rejected)

    def render(self, conversation: Conversation) -> list[Example]:
        """Return the examples of one conversation: one, or one an assistant turn. Raises RenderError, ModelError."""
        [(_, rendered)] = self.render_many([conversation])
        if isinstance(rendered, RenderError):
            raise rendered
        return rendered

    def render_many(self, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
        """Yield each conversation with its examples, or with why it has none, in order.

        A batch is encoded (in Rust, without the interpreter lock) while the next is read and rendered to text.
        """
        source = iter(conversations)
        with ThreadPoolExecutor(1) as worker:
            batch = self._start_batch(source, worker)
            while batch:
                following = self._start_batch(source, worker)
                yield from self._finish_batch(*batch)
                batch = following

    def _start_batch(self, source: Iterator[Conversation], worker: ThreadPoolExecutor) -> _Batch | None:
        conversations = list(islice(source, BATCH_ROWS))
        results: list[list[Draft] | RenderError] = []
        for conversation in conversations:
            try:
                results.append(self._drafts(conversation))
            except RenderError as error:
                results.append(error.at(conversation.file, conversation.line))
        drafts = (draft for result in results if not isinstance(result, RenderError) for draft in result)
        texts = ["" if draft.masked else draft.text for draft in drafts]
        return (conversations, results, worker.submit(self._encoder.encode, texts)) if conversations else None

    def _finish_batch(
        self, conversations: list[Conversation], results: list[list[Draft] | RenderError],
        encoded: Future[list[list[int]]],
    ) -> Iterator[Rendered]:  # fmt: skip
        encodings = iter(encoded.result())
        for conversation, drafts in zip(conversations, results, strict=True):
            if isinstance(drafts, RenderError):
                yield conversation, drafts
                continue
            draft_encodings = list(islice(encodings, len(drafts)))
            try:
                examples = [
                    example
                    for i, (draft, ids) in enumerate(zip(drafts, draft_encodings, strict=True))
                    for example in self._examples(conversation, draft, ids, first=i == 0)
                ]
            except RenderError as error:
                yield conversation, error.at(conversation.file, conversation.line)
            else:
                yield conversation, examples

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *,
        options: Mapping[str, Any] | None = None,
    ) -> Ids:  # fmt: skip
        """Return the ids of a prompt at inference, generation prompt included: a prefix of the training ids.

        options: of the template, for this prompt. Raises RenderError, and ModelError for an option that the template
        does not read.
        """
        check_options(options or {}, self.chat.variables_read - {CLOCK}, "chat_template_kwargs")
        messages = [self.chat.separate_reasoning(message) for message in messages]
        encoder, text, _ = self._encoder_for(self.chat.prompt(messages, tools, options=options))
        return encoder.true_ids(encoder.encode([text])[0])

    def reference_answer(self, conversation: Conversation) -> str | None:
        """Return the reference answer as a completion would be read, without reasoning; None if there is none.

        Calls are as the template writes them. Raises RenderError, ModelError.
        """
        answer = conversation.answer
        if answer is None or not conversation.messages[-1].tool_calls:
            return answer
        *before, last = conversation.messages
        example = self.render(replace(conversation, messages=(*before, replace(last, weight=1.0))))[-1]
        start = len(self.prompt(before, conversation.tools, options=self.options_for(conversation.messages)))
        return self.without_reasoning(self.tokenizer.decode(example.ids[start:-1], skip_special_tokens=True), last)

    def without_reasoning(self, text: str, reference: Message) -> str:
        """Return a completion without its reasoning, if the reference turn has reasoning; otherwise all of it."""
        return strip_reasoning(text, self.reasoning_ends if self.shows_reasoning(reference) else ())

    def shows_reasoning(self, turn: Message) -> bool:
        """Return whether the turn has reasoning that the template shows."""
        return bool(turn.reasoning) and self.chat.shows_reasoning([turn])

    @cached_property
    def reasoning_ends(self) -> list[str]:
        """Texts that end reasoning in a decoded completion; empty if only special tokens end it."""
        ids = [self._encoder.encode([end])[0] for end in self.chat.traits.reasoning_ends]
        texts = [str(self.tokenizer.decode(end, skip_special_tokens=True)).strip() for end in ids]
        return [text for text in texts if text]

    def lost_characters(self, text: str) -> set[str]:
        """Return the characters of `text` that the tokenizer drops or changes."""
        for character in set(text) - self._is_lost.keys():
            ids = self._encoder.encode(["a" + character])[0]
            self._is_lost[character] = character not in self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return {character for character in set(text) if self._is_lost[character]}

    def _drafts(self, conversation: Conversation) -> list[Draft]:
        if conversation.text is None:
            return self.chat.drafts(conversation, include_untrained=self.loss == "all")
        if self.tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no eos token to end a text with", fix="choose another model")
        masked = self.control.occurs_in(conversation.text)
        return [Draft(self.control.mask(conversation.text) if masked else conversation.text, (), masked)]

    def _encoder_for(self, draft: Draft) -> tuple[Encoder, str, tuple[tuple[int, int, float], ...]]:
        """Return the encoder of a draft, and its text and spans for it. Masked drafts use private control tokens."""
        if not draft.masked:
            return self._encoder, draft.text, draft.spans
        if self._private_encoder is None:
            self._private_encoder = Encoder(self.tokenizer, self.control, private=True)
        swap = self.control.swap
        spans = tuple((len(swap(draft.text[:a])), len(swap(draft.text[:b])), weight) for a, b, weight in draft.spans)
        return self._private_encoder, swap(draft.text), spans

    def _examples(
        self, conversation: Conversation, draft: Draft, encoded: list[int], *, first: bool
    ) -> Iterator[Example]:
        """Yield one example of a draft, or one a turn if a token would straddle the end of a prompt.

        Inference never sees such a token: it encodes the prompt, and the model continues from there.
        """
        encoder, text, spans = self._encoder_for(draft)
        if draft.masked:
            encoded = encoder.encode([text])[0]
        try:
            ids = encoder.true_ids(encoded)
            yield self._example(conversation, ids, encoder.token_spans(text, ids, spans), first=first)
        except TokenStraddlesPrompt:
            for turn, (start, end, weight) in enumerate(spans):
                prompt = encoder.true_ids(encoder.encode([text[:start]])[0])
                ids = np.concatenate([prompt, encoder.true_ids(encoder.encode_continuation(text[start:end]))])
                span = (len(prompt), len(ids), weight)
                yield self._example(conversation, ids, [span], first=first and not turn, separately=True)

    def _example(
        self, conversation: Conversation, ids: Ids, spans: Iterable[tuple[int, int, float]], *, first: bool,
        separately: bool = False,
    ) -> Example:  # fmt: skip
        if conversation.text is not None:
            ids = np.array([*self._text_start, *ids, self.tokenizer.eos_token_id], dtype=np.int32)
            weights = np.ones(len(ids), np.float32)
        else:
            # loss `all` in a conversation of several examples: the first example already trains the earlier text
            weights = np.full(len(ids), 1.0 if self.loss == "all" and first else 0.0, np.float32)
        for begin, end, weight in spans:
            if int(ids[end - 1]) not in self.stop_ids:
                raise RenderError("no-stop-token")
            weights[begin:end] = weight
        weights[:1] = 0.0
        if not weights.any():
            raise RenderError("nothing-supervised")
        return Example(ids, weights, conversation.file, conversation.line, separately)


def render_pairs(renderer: Renderer, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
    """Yield each conversation with its chosen and rejected example, or with why it has none, in order.

    A conversation without a rejected side is rendered as usual.
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
            rendered = check_pair(conversation, [rendered, next(results)[1]])
        yield conversation, rendered


def render_prompts(renderer: Renderer, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
    """Yield each conversation with one unsupervised example of its prompt, or with why it has none, in order.

    The prompt has the same tokens as in fine-tuning and at inference. An answer at the end is left out.
    """
    for conversation in conversations:
        messages = conversation.messages if conversation.answer is None else conversation.messages[:-1]
        try:
            ids = renderer.prompt(messages, conversation.tools, options=renderer.options_for(conversation.messages))
        except RenderError as error:
            yield conversation, error.at(conversation.file, conversation.line)
            continue
        yield conversation, [Example(ids, np.zeros(len(ids), np.float32), conversation.file, conversation.line)]


def check_pair(conversation: Conversation, sides: Sequence[list[Example] | RenderError]) -> list[Example] | RenderError:
    """Return both sides, or what is wrong with the pair."""
    place = conversation.file, conversation.line
    examples: list[Example] = []
    for side in sides:
        if isinstance(side, RenderError):
            return side
        if len(side) != 1:
            return RenderError("answer-in-parts").at(*place)
        examples += side
    chosen, rejected = examples
    if not np.array_equal(chosen.ids[: chosen.prompt_length], rejected.ids[: rejected.prompt_length]):
        return RenderError("prompt-tokens-differ").at(*place)
    if np.array_equal(chosen.ids, rejected.ids):
        return RenderError("same-tokens").at(*place)
    separately = chosen.encoded_separately or rejected.encoded_separately
    return [replace(example, encoded_separately=separately) for example in examples]
