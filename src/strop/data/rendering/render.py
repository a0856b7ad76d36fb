"""Conversation -> Example: token ids, and the weight of each token as a label.

The rendered text is encoded whole, once, as serving would; spans found in the text are then mapped to tokens
and checked: the prompt must end where a token ends, and each supervised turn must end with its stop token.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from strop.data.conversation import Conversation, Example, Ids, Message
from strop.data.rendering.template import ChatTemplate, ControlText, Draft, adds_bos, template_source
from strop.data.rendering.template import RenderError as RenderError
from strop.errors import ModelError

ROWS_AT_ONCE = 256

Rendered = tuple[Conversation, "list[Example] | RenderError"]
_Batch = tuple[list[Conversation], list["list[Draft] | RenderError"], "Future[list[list[int]]]"]


class Renderer:
    """Turns conversations into examples for one tokenizer and template.

    tokenizer: a fast transformers tokenizer. template: `chatml`, a file, or None for the tokenizer's own.
    loss: which tokens are supervised. Raises ModelError for a tokenizer or template that cannot be used;
    a missing template is an error only once a chat needs it (raw text does not).
    """

    def __init__(
        self, tokenizer: Any, *, template: str | None = None, loss: Literal["assistant", "all"] = "assistant"
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError("the model has no fast tokenizer", fix="choose a model with a tokenizer.json")
        self.tokenizer = tokenizer
        self.loss = loss
        added = {token.content: bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
        source = template_source(tokenizer, template)
        self._chat = ChatTemplate(source, added=added, variables=tokenizer.special_tokens_map) if source else None
        special = [token for token, is_special in added.items() if is_special]
        self.control = self._chat.control if self._chat else ControlText(special)
        self._plain = _Encoder(tokenizer, self.control)
        self._swapped: _Encoder | None = None
        self._kept_characters: set[str] = set()
        self._lost_characters: set[str] = set()
        eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        # ids of the tokens that end an assistant turn (the eos token where there is no template)
        self.stop_ids = tuple(map(int, tokenizer.convert_tokens_to_ids(self._chat.stops))) if self._chat else eos
        # what the tokenizer puts before a raw text, found by encoding one
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        dressed = tokenizer("a")["input_ids"]
        at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        self._text_start = dressed[:at]

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
    def template_hash(self) -> str:
        """SHA-256 of the template's text; '' without a template."""
        return self._chat.hash if self._chat else ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides how a text becomes ids and weights: tokenizer, template, loss."""
        tokenizer = self.tokenizer
        names = [repr(tokenizer.special_tokens_map), repr(tokenizer("a")["input_ids"]), self.template_hash, self.loss]
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
                    self._example(conversation, draft, ids, first=i == 0)
                    for i, (draft, ids) in enumerate(zip(found, own, strict=True))
                ]
            except RenderError as fault:
                yield conversation, _placed(fault, conversation)
            else:
                yield conversation, examples

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> Ids:
        """What serving sends, generation prompt included: a prefix of the training ids. Raises RenderError."""
        draft = self.chat.prompt(messages, tools)
        if draft.odd:
            encoder, text, _ = self._other_names(draft)
            return encoder.ids(encoder.encode([text])[0])
        return self._plain.ids(self._plain.encode([draft.text])[0])

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

    def _other_names(self, draft: Draft) -> tuple[_Encoder, str, tuple[tuple[int, int, float], ...]]:
        """For an odd draft: the encoder that knows control tokens by private names, and text and spans for it."""
        if self._swapped is None:
            self._swapped = _Encoder(self.tokenizer, self.control, private=True)
        swap = self.control.swap
        spans = tuple((len(swap(draft.text[:a])), len(swap(draft.text[:b])), weight) for a, b, weight in draft.spans)
        return self._swapped, swap(draft.text), spans

    def _example(self, conversation: Conversation, draft: Draft, encoded: list[int], *, first: bool) -> Example:
        encoder, text, spans = self._plain, draft.text, draft.spans
        if draft.odd:
            encoder, text, spans = self._other_names(draft)
            encoded = encoder.encode([text])[0]
        ids = encoder.ids(encoded)
        if conversation.text is not None:
            ids = np.array([*self._text_start, *ids, self.tokenizer.eos_token_id], dtype=np.int32)
            weights = np.ones(len(ids), np.float32)
        else:
            # `all` in a conversation that had to be split: the earlier text was trained on in the first example
            weights = np.full(len(ids), 1.0 if self.loss == "all" and first else 0.0, np.float32)
        for begin, end, weight in encoder.token_spans(text, ids, spans):
            if int(ids[end - 1]) not in self.stop_ids:
                raise RenderError("no-stop-token")
            weights[begin:end] = weight
        weights[:1] = 0.0
        if not weights.any():
            raise RenderError("nothing-supervised")
        return Example(ids, weights, conversation.file, conversation.line)


def _placed(fault: RenderError, conversation: Conversation) -> RenderError:
    return RenderError(fault.code, fault.detail, file=conversation.file, line=conversation.line)


class _Encoder:
    """Encodes texts whole, and finds the tokens of spans.

    private: know the control tokens by their private characters only, so that their ordinary names in a text
    are plain text; ids stay those of the tokenizer.
    """

    def __init__(self, tokenizer: Any, control: ControlText, *, private: bool = False) -> None:
        names = control.private if private else {}
        added: dict[str, int] = tokenizer.added_tokens_encoder
        self._pattern = control.marks if private else control.pattern  # control tokens as this encoder knows them
        self._is_control = np.zeros(max(tokenizer.get_vocab().values()) + 1, np.bool_)  # by id
        self._is_control[[added[token] for token in control.private]] = True
        self._true_ids: dict[int, int] = {}
        self._forbidden: frozenset[int] = frozenset()
        self._tails: dict[str, list[int]] = {}
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        if private:
            state = json.loads(self._backend.to_str())
            for token in state["added_tokens"]:
                token["content"] = names.get(token["content"], token["content"])
            self._backend = Tokenizer.from_str(json.dumps(state))
            true_ids = {self._backend.token_to_id(names.get(token, token)): i for token, i in added.items()}
            self._true_ids = {own: i for own, i in true_ids.items() if own is not None}
            self._forbidden = frozenset(added[token] for token in names) - self._true_ids.keys()

    def encode(self, texts: list[str]) -> list[list[int]]:
        # The backend is shared with transformers, whose calls leave their settings on it. Set only where it must
        # be: a change while another thread encodes raises "Already borrowed".
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.encode_special_tokens:
            self._backend.encode_special_tokens = False
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def ids(self, encoded: list[int]) -> Ids:
        """The tokenizer's own ids. Raises RenderError where plain text became a control token."""
        if self._true_ids:
            if not self._forbidden.isdisjoint(encoded):
                raise RenderError("control-token", "the tokenizer makes the token from plain text")
            encoded = [self._true_ids.get(i, i) for i in encoded]
        return np.array(encoded, dtype=np.int32)

    def token_spans(
        self, text: str, ids: Ids, spans: Sequence[tuple[int, int, float]]
    ) -> Iterator[tuple[int, int, float]]:
        """Spans of characters as spans of tokens. Raises RenderError where a span does not begin with a token.

        The control tokens of the text are counted in the ids: a span ends with one, and it begins so many tokens
        after one as the text between encodes to. A tokenizer encodes the pieces between control tokens one by
        one, so a text up to there is, token for token, the beginning of the whole.
        """
        if not spans:
            return
        places = [(match.start(), match.end()) for match in self._pattern.finditer(text)]
        tokens = self._is_control[ids].nonzero()[0].tolist()
        if len(places) != len(tokens):
            raise RenderError("control-token")
        ends = [end for _, end in places]
        for start, end, weight in spans:
            before = bisect_right(ends, start)
            at, first = (places[before - 1][0], tokens[before - 1]) if before else (0, 0)
            tail = self._encode_tail(text[at:start])
            begin = first + len(tail)
            if ids[first:begin].tolist() != tail:
                raise RenderError("token-straddles")
            last = bisect_right(ends, end) - 1
            if last < 0 or ends[last] != end:
                raise RenderError("no-stop-token")
            yield begin, tokens[last] + 1, weight

    def _encode_tail(self, tail: str) -> list[int]:
        """Text from a control token to an answer: nearly always the generation prompt, so it is remembered."""
        known = self._tails.get(tail)
        if known is None:
            known = self.ids(self.encode([tail])[0]).tolist()
            if len(tail) < 200 and len(self._tails) < 1000:
                self._tails[tail] = known
        return known
