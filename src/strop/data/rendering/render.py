"""Conversation -> Example: token ids, and the weight of each token as a label.

The rendered text is encoded whole, once, as serving would; spans found in the text are then mapped to tokens
and checked: the prompt must end where a token ends, and each supervised turn must end with its stop token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np

from strop.data.rendering.encoder import ControlText, Encoder, Straddles
from strop.data.rendering.template import ChatTemplate, Draft, Reasoning, told
from strop.data.rendering.template_source import CLOCK, adds_bos, check_options, template_source, with_options
from strop.data.row_errors import RenderError as RenderError
from strop.data.types import Conversation, Example, Ids, Message, behind_reasoning
from strop.errors import ModelError

ROWS_AT_ONCE = 256

Rendered = tuple[Conversation, "list[Example] | RenderError"]
_Batch = tuple[list[Conversation], list["list[Draft] | RenderError"], "Future[list[list[int]]]"]


class Renderer:
    """Turns conversations into examples for one tokenizer and template.

    tokenizer: a fast transformers tokenizer. template: `chatml`, a file, or None for the tokenizer's own.
    loss: which tokens are supervised. options: values to write into the template, where rows are to be trained on.
    reasoning: what becomes of it. source: the template's text, in place of `template`. Raises ModelError for a
    tokenizer or template that cannot be used; a missing template is an error only once a chat needs it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None = None,
        loss: Literal["assistant", "all"] = "assistant",
        options: Mapping[str, Any] | None = None,
        reasoning: Reasoning = "auto",
        source: str | None = None,
    ) -> None:
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
        self._plain = Encoder(tokenizer, self.control)
        self._swapped: Encoder | None = None
        self._kept_characters: set[str] = set()
        self._lost_characters: set[str] = set()
        eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        # ids of the tokens that end an assistant turn (the eos token where there is no template)
        self.stop_ids = tuple(map(int, tokenizer.convert_tokens_to_ids(self._chat.stops))) if self._chat else eos
        # ids at which an answer ends: raw texts were trained to end with eos, and bases end with it
        self.ends = tuple(dict.fromkeys((*self.stop_ids, *eos)))
        # what the tokenizer puts before a raw text, found by encoding one
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        dressed = tokenizer("a")["input_ids"]
        at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        self._text_start = dressed[:at]
        self.num_before_text = at  # tokens

    @property
    def chat(self) -> ChatTemplate:
        """The template. Raises ModelError where the model has none."""
        if self._chat is None:
            raise ModelError(
                "the model has no chat template", fix="choose one: data.template: chatml, or the path of a Jinja file"
            )
        return self._chat

    @property
    def template(self) -> str | None:
        """The template's text."""
        return self._chat.source if self._chat else None

    @property
    def reasoning(self) -> Reasoning:
        """What becomes of reasoning; `auto` without a template."""
        return self._chat.reasoning if self._chat else "auto"

    @property
    def template_hash(self) -> str:
        """SHA-256 of the template's text; '' without a template."""
        return self._chat.hash if self._chat else ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides how a text becomes ids and weights: tokenizer, template, reasoning, loss."""
        tokenizer = self.tokenizer
        names = [repr(tokenizer.special_tokens_map), repr(tokenizer("a")["input_ids"]), self.template_hash, self.loss]
        names.append(self.reasoning)
        return hashlib.sha256("\n".join([tokenizer.backend_tokenizer.to_str(), *names]).encode()).hexdigest()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about the template."""
        found = self._chat.warnings if self._chat else ()
        if self._chat and adds_bos(self.tokenizer) and self.tokenizer.bos_token not in self._chat.opening:
            found += ("the chat template writes no bos token, though the tokenizer puts one before plain text",)
        return found

    @property
    def supports_system(self) -> bool:
        return self.chat.supports_system

    @property
    def supports_tools(self) -> bool:
        return self.chat.supports_tools and self.chat.supports_tool_calls

    def told(self, *, thinking: int, rows: int) -> list[str]:
        """Sentences on how the template is used on `rows` chats, of which `thinking` have reasoning."""
        return told(self.chat, thinking=thinking, rows=rows)

    def options_for(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The template's options for a row, which is rendered as one that thinks or as one that does not."""
        return self.chat.mode(messages).options

    def served(self, *, thinking: int, rows: int) -> Renderer:
        """The renderer that answers after training on `rows` chats, of which `thinking` have reasoning: its template's
        own prompt is the one that they were trained behind. Where some think and some do not, it stays as it is.
        """
        options = self._chat.served_options(thinking=thinking, rows=rows) if self._chat else {}
        if not options:
            return self
        source = with_options(self.chat.source, options, [])
        return Renderer(self.tokenizer, loss=self.loss, reasoning=self.reasoning, source=source)

    def apart(self, conversation: Conversation) -> Conversation:
        """The conversation with the reasoning that stands in the text of answers set apart: see ChatTemplate.apart."""
        if self._chat is None or not self._chat.traits.marks:
            return conversation
        messages, rejected = (
            tuple(map(self._chat.apart, turns)) for turns in (conversation.messages, conversation.rejected)
        )
        return replace(conversation, messages=messages, rejected=rejected)

    def render(self, conversation: Conversation) -> list[Example]:
        """The examples of one conversation: one, or one an assistant turn. Raises RenderError, ModelError."""
        [(_, rendered)] = self.render_many([conversation])
        if isinstance(rendered, RenderError):
            raise rendered
        return rendered

    def render_many(self, conversations: Iterable[Conversation]) -> Iterator[Rendered]:
        """Each conversation with its examples, or with why it has none; in order.

        A batch is encoded (in Rust, without the interpreter lock) while the next is read and laid out.
        """
        source = iter(conversations)
        with ThreadPoolExecutor(1) as worker:
            waiting = self._begin(source, worker)
            while waiting:
                following = self._begin(source, worker)
                yield from self._finish(*waiting)
                waiting = following

    def _begin(self, source: Iterator[Conversation], worker: ThreadPoolExecutor) -> _Batch | None:
        chunk = list(islice(source, ROWS_AT_ONCE))
        drafts: list[list[Draft] | RenderError] = []
        for conversation in chunk:
            try:
                drafts.append(self._drafts(conversation))
            except RenderError as fault:
                drafts.append(_placed(fault, conversation))
        texts = [
            "" if draft.odd else draft.text for found in drafts if not isinstance(found, RenderError) for draft in found
        ]
        return (chunk, drafts, worker.submit(self._plain.encode, texts)) if chunk else None

    def _finish(
        self, chunk: list[Conversation], drafts: list[list[Draft] | RenderError], encoded: Future[list[list[int]]]
    ) -> Iterator[Rendered]:
        encodings = iter(encoded.result())
        for conversation, found in zip(chunk, drafts, strict=True):
            if isinstance(found, RenderError):
                yield conversation, found
                continue
            own = list(islice(encodings, len(found)))
            try:
                examples = [
                    example
                    for i, (draft, ids) in enumerate(zip(found, own, strict=True))
                    for example in self._examples(conversation, draft, ids, first=i == 0)
                ]
            except RenderError as fault:
                yield conversation, _placed(fault, conversation)
            else:
                yield conversation, examples

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        options: Mapping[str, Any] | None = None,
    ) -> Ids:
        """What serving sends, generation prompt included: a prefix of the training ids. options: of the template, for
        this prompt. Raises RenderError, and ModelError for an option that the template does not read.
        """
        check_options(options or {}, self.chat.options_read - {CLOCK}, "chat_template_kwargs")
        messages = [self.chat.apart(message) for message in messages]
        encoder, text, _ = self._named(self.chat.prompt(messages, tools, options=options))
        return encoder.ids(encoder.encode([text])[0])

    def answer(self, conversation: Conversation) -> str | None:
        """The right answer, as what a model writes is read: what the last turn says, and its calls as the template
        writes them; None where that is not the assistant's. Without reasoning. Raises RenderError, ModelError."""
        said = conversation.answer
        if said is None or not conversation.messages[-1].tool_calls:
            return said
        *before, last = conversation.messages
        whole = self.render(replace(conversation, messages=(*before, replace(last, weight=1.0))))[-1]
        start = len(self.prompt(before, conversation.tools, options=self.options_for(conversation.messages)))
        return self.without_reasoning(self.tokenizer.decode(whole.ids[start:-1], skip_special_tokens=True), last)

    def without_reasoning(self, text: str, right: Message) -> str:
        """What a model wrote, from the end of its reasoning on, where the right turn reasons; else, and where no
        reasoning ends, all of it."""
        return behind_reasoning(text, self.closes if self.reasons(right) else ())

    def reasons(self, turn: Message) -> bool:
        """Does the template show this turn's reasoning?"""
        return bool(turn.reasoning) and self.chat.thinks([turn])

    @cached_property
    def closes(self) -> list[str]:
        """What ends reasoning, as it is read; none where that is special tokens alone."""
        ids = [self._plain.encode([close])[0] for close in self.chat.traits.closes]
        texts = [str(self.tokenizer.decode(some, skip_special_tokens=True)).strip() for some in ids]
        return [text for text in texts if text]

    def lost_characters(self, text: str) -> set[str]:
        """Characters of `text` that do not come back from the tokenizer: it drops them, or writes others for them."""
        signs = set(text)
        for sign in signs - self._kept_characters - self._lost_characters:
            ids = self._plain.encode(["a" + sign])[0]
            kept = sign in self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            (self._kept_characters if kept else self._lost_characters).add(sign)
        return signs & self._lost_characters

    def _drafts(self, conversation: Conversation) -> list[Draft]:
        if conversation.text is None:
            return self.chat.drafts(conversation, silent_turns=self.loss == "all")
        if self.tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no eos token to end a text with", fix="choose another model")
        odd = self.control.found(conversation.text)
        return [Draft(self.control.mask(conversation.text) if odd else conversation.text, (), odd)]

    def _named(self, draft: Draft) -> tuple[Encoder, str, tuple[tuple[int, int, float], ...]]:
        """The encoder for a draft, and its text and spans for it; an odd one's has private names of control tokens."""
        if not draft.odd:
            return self._plain, draft.text, draft.spans
        if self._swapped is None:
            self._swapped = Encoder(self.tokenizer, self.control, private=True)
        swap = self.control.swap
        spans = tuple((len(swap(draft.text[:a])), len(swap(draft.text[:b])), weight) for a, b, weight in draft.spans)
        return self._swapped, swap(draft.text), spans

    def _examples(
        self, conversation: Conversation, draft: Draft, encoded: list[int], *, first: bool
    ) -> Iterator[Example]:
        """One example of a draft; one a turn where a token of the whole text would cover the end of a prompt and the
        start of an answer, which serving never sees: it encodes the prompt, and the model goes on from there.
        """
        encoder, text, spans = self._named(draft)
        if draft.odd:
            encoded = encoder.encode([text])[0]
        try:
            ids = encoder.ids(encoded)
            yield self._example(conversation, ids, encoder.token_spans(text, ids, spans), first=first)
        except Straddles:
            for turn, (start, end, weight) in enumerate(spans):
                prompt = encoder.ids(encoder.encode([text[:start]])[0])
                ids = np.concatenate([prompt, encoder.ids(encoder.continued(text[start:end]))])
                span = (len(prompt), len(ids), weight)
                yield self._example(conversation, ids, [span], first=first and not turn, parted=True)

    def _example(
        self,
        conversation: Conversation,
        ids: Ids,
        spans: Iterable[tuple[int, int, float]],
        *,
        first: bool,
        parted: bool = False,
    ) -> Example:
        if conversation.text is not None:
            ids = np.array([*self._text_start, *ids, self.tokenizer.eos_token_id], dtype=np.int32)
            weights = np.ones(len(ids), np.float32)
        else:
            # `all` in a conversation that had to be split: the earlier text was trained on in the first example
            weights = np.full(len(ids), 1.0 if self.loss == "all" and first else 0.0, np.float32)
        for begin, end, weight in spans:
            if int(ids[end - 1]) not in self.stop_ids:
                raise RenderError("no-stop-token")
            weights[begin:end] = weight
        weights[:1] = 0.0
        if not weights.any():
            raise RenderError("nothing-supervised")
        return Example(ids, weights, conversation.file, conversation.line, parted)


def _placed(fault: RenderError, conversation: Conversation) -> RenderError:
    return RenderError(fault.code, fault.detail, file=conversation.file, line=conversation.line)
