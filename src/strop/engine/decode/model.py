"""Load a model to generate text or to chat with it: `strop.load`."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from strop.data.converters import ParsedRow, convert_prompt, list_images, read_images
from strop.data.rendering.render import Renderer
from strop.data.row_errors import InvalidRow
from strop.data.store import request_message
from strop.data.types import Classes, Conversation, Example, Ids, Message
from strop.display.progress import show_wait
from strop.engine.decode.batch import drop_decoder
from strop.engine.decode.classify import Classifier
from strop.engine.decode.embed import Embedder, Pooling, Vectors
from strop.engine.decode.generate import Completion, generate
from strop.engine.decode.sampling import Sampling
from strop.engine.device import pick_device, pick_generation_dtype, prepare_process
from strop.engine.images import image_features, install_images
from strop.errors import InputError, ModelError, RecipeError, suggest
from strop.machine.torch_state import default_torch_state, isolated_torch_state
from strop.models.adapter_config import (
    adapter_folder,
    adapter_kind,
    base_of_model,
    read_identity,
    unfinished_notes,
)
from strop.models.adapters import (
    adapter_disabled,
    attach_adapter,
    attach_another_adapter,
    locate_base,
    locate_tokenizer,
    make_renderer,
    model_identity,
    read_classes,
)
from strop.models.embedder import read_pooling
from strop.models.host_layers import load_from_host
from strop.models.introspect import max_positions
from strop.models.load import (
    DTYPES,
    GGUF_NOTE,
    check_device_and_dtype,
    load_base,
    load_config,
    refuse_embedder,
    stored_dtype_name,
)
from strop.models.lora import grow_vocabulary
from strop.models.source import SCHEMES, Source, fingerprint, locate, prequantized
from strop.models.streaming import fits_in_memory, load_streamed
from strop.models.tokenizer import load_tokenizer

LOG = logging.getLogger(__name__)


@dataclass(repr=False)
class Model:
    """A loaded model, with or without adapters, which `strop.load` returns.

    It can be shared by threads, of which one generates at a time. Programs use the methods `generate`, `chat`,
    `classify`, `embed`, `base`, `add` and `use`.

    Attributes:
        name: what was loaded.
        adapter: the adapter's folder, or None.
        default_system: the system prompt of the training rows, if they all had the same one.
        notes: differences from training.
        quantization, dtype: how the weights are stored.
        was_cut: whether the last answers reached the limit of their length.
    """

    name: str
    module: Any
    tokenizer: Any
    renderer: Renderer
    adapter: Path | None  # the adapter's folder; None without an adapter
    default_system: str | None = None  # the system prompt of the training rows, if they all had the same one
    notes: Sequence[str] = ()  # differences from training, such as those accepted because of `force`
    source: Source | None = None  # of the base model, or of a model whose weights were all trained
    quantization: str = "none"  # of the base model
    dtype: str = "bf16"  # of the weights that are not quantized
    classes: Classes | None = None  # of a classifier, which generates no text
    pooling: Pooling | None = None  # of a model of embeddings, which generates no text
    untuned: Mapping[str, str] | None = None  # name and fingerprint of the base, if all weights were trained
    has_base: bool = True  # whether that base is there, if it is used without it because of `force`
    was_cut: bool = False  # whether the last answers reached the limit of their length
    others: dict[str, str] = field(default_factory=dict)  # the names in PEFT of added adapters
    _settings: dict[str, tuple[Renderer, str | None]] = field(default_factory=dict)  # renderer, default_system by name
    _base: Any = None  # the base of a model whose weights were all trained, once it is loaded
    _is_base: bool = False  # inside `base`
    _lock: Any = field(default_factory=RLock, repr=False, compare=False)

    def __repr__(self) -> str:
        adapter = "" if self.adapter is None else f", adapter={str(self.adapter)!r}"
        for name, peft_name in self.others.items():
            adapter += f", in use: {name!r}" if self.module.active_adapter == peft_name else ""
        return f"Model({self.name!r}{adapter}, quantization={self.quantization!r}, dtype={self.dtype!r})"

    @property
    def is_tuned(self) -> bool:
        """Whether `base` gives another model: with an adapter, or if all weights were trained."""
        return self.adapter is not None or self.untuned is not None

    @property
    def max_length(self) -> int:
        """The number of tokens of a prompt and its completion that the model supports; sys.maxsize if unknown."""
        return max_positions(self.module) or sys.maxsize

    @property
    def sampling(self) -> Sampling:
        """The sampling settings in the model's generation config."""
        return Sampling.from_generation_config(self.module.generation_config)

    def add(self, name: str, *, force: bool = False, own_template: bool = False) -> None:
        """Load another adapter for the same base model. Call `use` to switch to it.

        Args:
            name: a run or adapter folder.
            force: accept an adapter that was trained on another base model or with another chat template.
            own_template: accept another chat template, and use it for the adapter's prompts.

        Raises:
            ModelError: if the adapter was trained on another base model or with another template, or does not fit.
        """
        folder = adapter_folder(name)
        if folder is None:
            raise ModelError(f"{name}: not an adapter", fix="give a run or adapter folder")
        if self.adapter is None or self.source is None:
            what = f"{name}: {self.name} was loaded without an adapter, and takes none"
            raise ModelError(what, fix="load a run or adapter folder, and add others to it")
        if name in (self.name, *self.others):
            raise ModelError(f"{name}: is already loaded", fix="give each adapter once")
        identity, own = read_identity(folder), read_identity(self.adapter)
        if own.get("template") != identity.get("template") and not (force or own_template):
            what = f"{name}: was trained with another chat template than {self.name}"
            raise ModelError(what, fix="load it by itself, or with --force")
        peft_name = f"adapter{len(self.others) + 1}"
        with self._lock, isolated_torch_state():
            notes = attach_another_adapter(self.module, folder, self.source, peft_name, force=force)
        if (features := image_features(self.module)) is not None:
            features.refresh()
        for what in ("quantization", "dtype"):
            if own.get(what) and identity.get(what) not in (None, own[what]):
                notes.append(f"{name}: was trained on another {what} of the base than {self.name}, which is used here")
        self.notes = [*self.notes, *notes, *unfinished_notes(name)]
        self.others[name] = peft_name
        self._settings.setdefault(self.name, (self.renderer, self.default_system))
        tokenizer, loaded = load_tokenizer(locate_tokenizer(folder, self.source)), self.tokenizer
        if (tokenizer.get_vocab(), tokenizer.chat_template) == (loaded.get_vocab(), loaded.chat_template):
            tokenizer = loaded  # which knows the model's images
        self._settings[name] = make_renderer(tokenizer, identity), identity.get("system")

    def use(self, name: str) -> None:
        """Switch to an adapter, its tokenizer, template and system prompt. name: the model's name, or an added adapter.

        Raises InputError for another name, and inside `base`.
        """
        if name not in (self.name, *self.others):
            raise InputError(f"{name}: not loaded", fix=f"use {', '.join((self.name, *self.others))}, or `add` it")
        with self._lock:
            if self._is_base:
                what = f"use {name}: inside `base`, which has no adapter"
                raise InputError(what, fix="call it before or after the block")
            self.renderer, self.default_system = self._settings.get(name, (self.renderer, self.default_system))
            self.tokenizer = self.renderer.tokenizer  # new tokens are those of one adapter
            self.module.set_adapter("default" if name == self.name else self.others[name])

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier. Raises ModelError for a model that generates text."""
        if self.classes is None:
            raise ModelError(f"{self.name}: not a classifier", fix="give a run of --train.objective classify")
        return Classifier(self.module, self.classes.several)

    def classify(self, texts: str | Sequence[str | Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Classify texts with a run of `train.objective: classify`.

        Args:
            texts: one or several texts; or conversations, each a list of messages such as {"role": "user", ...}.

        Returns:
            For each text its `label` (`labels`, a list, if texts may have several) and `probabilities`, a dict from
            label to probability, highest first.

        Raises:
            InputError: if a text is empty, or has more tokens than the model supports.
            ModelError: if the model is not a classifier.
        """
        classifier, examples = self.classifier, self.encode_texts([texts] if isinstance(texts, str) else texts)
        with self._lock, default_torch_state():
            rows = classifier.probabilities(examples).tolist()
        assert self.classes is not None
        return [describe_classes(self.classes, row) for row in rows]

    def make_embedder(self) -> Embedder:
        """Return the model of embeddings in its current state. Raises ModelError for another model."""
        if self.pooling is None:
            raise ModelError(f"{self.name}: not a model of embeddings", fix="give a run of --train.objective embed")
        return Embedder(self.module, self.pooling)

    @cached_property
    def embedder(self) -> Embedder:
        """The model of embeddings with its adapter. Raises ModelError for another model."""
        return self.make_embedder()

    def embed(self, texts: str | Sequence[str]) -> Vectors:
        """Embed texts with a run of `train.objective: embed`.

        Args:
            texts: one or several texts.

        Returns:
            A vector of length 1 for each text, (N, D), float32. The dot product of two is their cosine similarity.

        Raises:
            InputError: if a text is empty, or has more tokens than the model supports.
            ModelError: if the model is not one of embeddings.
        """
        if not isinstance(texts, Iterable):
            raise InputError(f"embed: {type(texts).__name__}, not a text", fix="give a text or a list of texts")
        embedder = self.embedder
        examples = self.encode_texts([texts] if isinstance(texts, str) else list(texts), function="embed")
        with self._lock, default_torch_state():
            return embedder.embed(examples)

    def encode_texts(
        self, texts: Sequence[str | Sequence[Mapping[str, Any]]], function: str = "classify"
    ) -> list[Example]:
        """Encode texts to classify or embed, or conversations to classify, as in training. Raises InputError."""
        limit, examples = self.max_length, []
        for number, text in enumerate(texts, 1):
            if function == "embed" and not isinstance(text, str):
                raise InputError(f"embed: text {number} is not a string", fix="give a text or a list of texts")
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise InputError(f"{function}: text {number} has half of a character", fix="give valid Unicode")
            if isinstance(text, str) and not text.strip():
                raise InputError(f"{function}: text {number} is empty", fix="give a text")
            messages = () if isinstance(text, str) else tuple(_parse_messages(text, function))
            row = Conversation("text", number, messages, text=text if isinstance(text, str) else None, label="")
            [example] = self.renderer.render(row)
            if len(example) > limit:
                what = f"{function}: text {number} has {len(example):,} tokens, and the model supports {limit:,}"
                raise InputError(what, fix="shorten it")
            examples.append(example)
        return examples

    @contextmanager
    def base(self) -> Iterator[None]:
        """Disable the adapter, or load the base of a model whose weights were all trained, inside the block.

        Other threads wait. Raises InputError for a model that is its own base.
        """
        if not self.is_tuned:
            raise InputError(f"base: {self.name} has no adapter, and is its own base", fix="leave it out")
        with self._lock:
            if self._is_base:  # in a block of the caller
                yield
                return
            self._is_base = True
            try:
                with self._without_training():
                    yield
            finally:
                self._is_base = False

    @contextmanager
    def _without_training(self) -> Iterator[None]:
        if self.untuned is None:
            with adapter_disabled(self.module):
                yield
        else:
            tuned, device = self.module, next(self.module.parameters()).device
            if self._base is None:
                storage: dict[str, Any] = {"quantization": self.quantization, "resident_layers": None}
                source = _locate_untuned(self.untuned)
                self._base = load_base(source, DTYPES[self.dtype], str(device), **storage)
                grow_vocabulary(self._base, tuned.get_input_embeddings().num_embeddings)
                install_images(self._base, self.tokenizer)
            self.module = self._base
            try:
                yield
            finally:
                drop_decoder(self.module)  # the two do not need their caches at once
                self.module = tuned

    def answer(self, prompts: Sequence[Ids], **options: Any) -> list[Completion]:
        """Return one completion for each prompt of token ids. options: keyword arguments of `generate`."""
        if self.classes is not None:
            raise ModelError(f"{self.name}: a classifier, which generates no text", fix="use `classify`")
        if self.pooling is not None:
            raise ModelError(f"{self.name}: a model of embeddings, which generates no text", fix="use `embed`")
        with self._lock, default_torch_state():
            return generate(self.module, self.tokenizer, prompts, stop_ids=self.renderer.end_ids, **options)

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[Mapping[str, Any]]],
        *,
        images: Any = None,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        progress: bool | None = None,
        **settings: Any,
    ) -> list[str]:
        """Answer user messages, each in a new conversation, or conversations.

        Args:
            prompts: one or several user messages; or conversations, each a list of messages such as {"role": "user",
                "content": "hi"}.
            images: for a model that reads images. For one message an image (a path, bytes or a PIL image) or a list of
                images; for several messages one of these for each, or None. They are where the text has `<image>`, or
                at its start.
            system: the system prompt. None: the system prompt of the training rows, if they all had the same one.
            max_new_tokens: the limit for each answer.
            sampling: None for greedy decoding, so that answers can be compared. (`chat` takes the settings in the
                model's generation config.)
            progress: False prints no line every 30 s with the number of finished answers.
            **settings: fields of `sampling`, such as `temperature=0.7`; `max_tokens` means `max_new_tokens`.

        Raises InputError for a prompt with more tokens than the model supports.
        """
        _check_kinds("generate", sampling=sampling, system=system)
        max_new_tokens, sampling = _apply_settings("generate", max_new_tokens, sampling or Sampling(), settings)
        texts: list[Any]
        texts = [prompts] if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable) else list(prompts)
        texts = [texts] if texts and isinstance(texts[0], Mapping) else texts  # one conversation
        images = [images] if isinstance(prompts, str) or images is None else images
        images = [None] * len(texts) if images == [None] else images
        if len(images) != len(texts):
            what = f"generate: {len(images)} images for {len(texts)} messages"
            raise InputError(what, fix="give one image, a list of images, or None for each message")
        conversations = [self._new_conversation(*each, system, "generate") for each in zip(texts, images, strict=True)]
        ids = [self.renderer.prompt(conversation) for conversation in conversations]
        if (longest := max(map(len, ids), default=0)) >= self.max_length:
            what = f"generate: a prompt has {longest:,} tokens, and the model supports {self.max_length:,}"
            raise InputError(what, fix="shorten it")
        with show_wait(progress, f"generating answers: 0 of {len(ids)}") as line:
            advance = line and (lambda done: line.update(f"generating answers: {int(done)} of {len(ids)}"))
            answers = self.answer(ids, max_new_tokens=max_new_tokens, sampling=sampling, advance=advance)
        return [answer.text for answer in self._check_length(answers, max_new_tokens)]

    def chat(
        self,
        text: str | Sequence[Mapping[str, Any]],
        *,
        history: list[Any] | None = None,
        images: Any = None,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        on_text: Callable[[str], None] | None = None,
        progress: bool | None = None,
        **settings: Any,
    ) -> str:
        """Answer a message, or a conversation. Each call is a new conversation, unless `history` is given.

        Args:
            text: the user's message; or a list of messages such as {"role": "user", "content": "hi"}.
            history: a list that is empty at first, or has messages such as {"role": "user", "content": "hi"}. The
                conversation in it goes on with the message, which is added to it with the answer.
            images: an image of the message (a path, bytes or a PIL image) or a list of images, as for `generate`.
            system: the system prompt of a new conversation. None: that of the training rows, if they all had the same.
            max_new_tokens: the limit for the answer.
            sampling: None for the settings in the model's generation config. (`generate` is greedy.)
            on_text: called with pieces of the answer while it is generated.
            progress: False prints no line every 30 s. With `on_text` there is none.
            **settings: fields of `sampling`, such as `temperature=0.7`; `max_tokens` means `max_new_tokens`.

        Raises:
            InputError: if a message is invalid, the conversation has more tokens than the model supports, or `system`
                is given for one that goes on.
        """
        _check_kinds("chat", sampling=sampling, system=system, history=history, on_text=on_text)
        max_new_tokens, sampling = _apply_settings("chat", max_new_tokens, sampling or self.sampling, settings)
        if isinstance(text, str) and not text.strip():
            raise InputError("chat: the message is empty", fix="give a text")
        if history is not None and not isinstance(text, str):
            raise InputError("chat: history next to messages", fix="give the whole conversation as messages")
        if history and system is not None:
            raise InputError("chat: system is given for a conversation that goes on", fix="give an empty history")
        if history and isinstance(text, str):
            messages = [*_parse_history(history), _user_message(text, images, "chat")]
            messages = [*([] if messages[0].role == "system" else self._system_messages(None)), *messages]
        else:
            messages = self._new_conversation(text, images, system, "chat")
        prompt = self.renderer.prompt(messages)
        if len(prompt) >= self.max_length:
            what = f"the conversation has {len(prompt):,} tokens, and the model supports {self.max_length:,}"
            raise InputError(what, fix="start again: /reset in a chat, an empty history in Python")
        options: Any = {"max_new_tokens": max_new_tokens, "sampling": sampling, "on_text": on_text}
        with show_wait(progress if on_text is None else False, "generating the answer"):
            answers = self.answer([prompt], **options)
        [answer] = self._check_length(answers, max_new_tokens, log=on_text is None)
        if history is not None:
            history[:] = map(_Turn, [*messages, Message("assistant", answer.text)])
        return answer.text

    def _check_length(self, answers: list[Completion], limit: int, *, log: bool = True) -> list[Completion]:
        """Set `was_cut`, and log a warning if answers were cut at the limit of their length."""
        cut = [answer.tokens for answer in answers if not answer.stopped]
        self.was_cut = bool(cut)
        if cut and log:
            number = "the answer was" if len(answers) == 1 else f"{len(cut)} of {len(answers)} answers were"
            why = "max_new_tokens sets the limit" if max(cut) == limit else "the model supports no more"
            LOG.warning("%s cut at %d tokens; %s", number, max(cut), why)
        return answers

    def _new_conversation(self, prompt: Any, images: Any, system: str | None, function: str) -> list[Message]:
        """Return the messages of a user message, or of a conversation. Raises InputError."""
        if isinstance(prompt, str):
            return [*self._system_messages(system), _user_message(prompt, images, function)]
        if images is not None:
            raise InputError(f"{function}: images next to messages", fix="give them as parts of the messages' content")
        messages = _parse_messages(prompt, function)
        if messages[0].role != "system":
            return [*self._system_messages(system), *messages]
        if system is not None:
            raise InputError(f"{function}: system is given twice", fix="leave out the argument, or the system message")
        return messages

    def _system_messages(self, system: str | None) -> list[Message]:
        text = self.default_system if system is None else system
        return [] if text is None else [Message("system", text)]


# what `help` shows, without the fields, because `load` creates models
Model.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
)


def _user_message(text: str, images: Any, function: str) -> Message:
    """Return a message of the user with its images. Raises InputError."""
    if images is None:
        return Message("user", text)
    try:
        return read_images(ParsedRow((Message("user", text),)), Path(), list_images(images, "images")).messages[0]
    except InvalidRow as error:
        raise InputError(f"{function}: {error.what}", fix="give a path, bytes or a PIL image") from None


def describe_classes(classes: Classes, probabilities: Sequence[float]) -> dict[str, Any]:
    """Return the result of `Model.classify` for one text."""
    ranked = dict(sorted(zip(classes.names, probabilities, strict=True), key=lambda pair: -pair[1]))
    if classes.several:
        return {"labels": [name for name, value in ranked.items() if value > 0.5], "probabilities": ranked}
    return {"label": next(iter(ranked)), "probabilities": ranked}


class _Turn(dict[str, Any]):
    """A message of a history as a dictionary, with the message that the model has read or generated."""

    def __init__(self, message: Message) -> None:
        super().__init__(request_message(message))
        self.message = message


def _parse_history(history: Sequence[Any]) -> list[Message]:
    """Return the messages of a history. Raises InputError."""
    if all(isinstance(turn, _Turn) and turn == _Turn(turn.message) for turn in history):
        return [turn.message for turn in history]
    return _parse_messages([*history, {"role": "user", "content": "-"}], "chat")[:-1]


def _parse_messages(messages: Any, function: str) -> list[Message]:
    """Parse a conversation that ends with a user or tool message. Raises InputError."""
    messages = [messages] if isinstance(messages, Mapping) else messages
    fix = 'give a string, or messages such as {"role": "user", "content": "hi"}'
    first = messages[0] if isinstance(messages, list | tuple) and messages else None
    if isinstance(first, Mapping) and not {"role", "from"} & first.keys():
        raise InputError(f"{function}: a message has {', '.join(map(str, first))}, and no role", fix=fix)
    try:
        return [*read_images(convert_prompt({"prompt": messages}, ("prompt",))[0], Path(), conversation=True).messages]
    except InvalidRow as error:
        raise InputError(f"{function}: {error.what}", fix=fix) from None


_OTHER_SETTINGS = {  # arguments of other libraries -> ours
    **dict.fromkeys(("max_length", "max_tokens_to_sample", "num_predict", "n_predict"), "max_new_tokens"),
    **dict.fromkeys(("do_sample", "temp"), "temperature"), **dict.fromkeys(("stream", "streamer"), "on_text"),
    "system_prompt": "system", "messages": "history", "verbose": "progress",
}  # fmt: skip


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {  # argument -> whether it has its kind, and that kind
    "sampling": (lambda value: isinstance(value, Sampling), "a strop.Sampling, or its fields, such as temperature=0.7"),
    "system": (lambda value: isinstance(value, str), "a text"),
    "history": (lambda value: isinstance(value, list), "a list, to which the message and the answer are added"),
    "on_text": (callable, "a function of a text"),
}


def _check_kinds(function: str, **arguments: Any) -> None:
    """Raise InputError for an argument of another kind; None is of any."""
    for name, value in arguments.items():
        has_kind, kind = _KINDS[name]
        if value is not None and not has_kind(value):
            raise InputError(f"{function}: {name} is {value!r:.80}", fix=f"give {kind}")


def _apply_settings(function: str, limit: int, sampling: Sampling, settings: Mapping[str, Any]) -> tuple[int, Sampling]:
    """Return the limit and the sampling settings with other values. Raises InputError for invalid names and values."""
    names = {name: name for name in vars(sampling)} | {"max_tokens": "", "max_completion_tokens": ""}
    if unknown := [name for name in settings if name not in names]:
        own = ["on_text", "history"] if function == "chat" else []
        known = ["max_new_tokens", "system", "images", "progress", *own, *vars(sampling)]
        meant = _OTHER_SETTINGS.get(unknown[0])
        near = f" (did you mean {meant}?)" if meant in known else suggest(unknown[0], known)
        raise InputError(f"{function}: unknown argument {unknown[0]}{near}", fix=f"see `help(strop.Model.{function})`")
    limit = next((value for name, value in settings.items() if not names[name]), limit)
    for name, value in {"max_new_tokens": limit, **settings}.items():
        whole = name in ("max_new_tokens", "top_k", "seed") or not names[name]
        if not isinstance(value, Integral if whole else Real) and not (name == "seed" and value is None):
            raise InputError(f"{name}: {'an integer' if whole else 'a number'}, not {value!r}", fix="give a number")
        if name != "seed" and float(value or 0) < 0:
            raise InputError(f"{name} {value}: below 0", fix="give 0 or more")
    return limit, replace(sampling, **{name: value for name, value in settings.items() if names[name]})


def load_renderer(name: str) -> Renderer:
    """Return a model's renderer without loading the weights. name: as for `load`. Raises ModelError."""
    folder = adapter_folder(name)
    source = locate(name) if folder is None else locate_base(folder)
    return _make_renderer(folder, source)


def _make_renderer(folder: Path | None, source: Source) -> Renderer:
    """Return the renderer of a base model, or of the adapter in `folder`."""
    tokenizer = load_tokenizer(source if folder is None else locate_tokenizer(folder, source))
    return make_renderer(tokenizer, model_identity(folder, source))


def _locate_untuned(base: Mapping[str, str]) -> Source:
    """Return the base of a model whose weights were all trained. Raises ModelError if it is missing or has changed."""
    source = locate(base["name"])
    if fingerprint(source) != base["fingerprint"]:
        fix = "restore its files, or use the model alone with --force"
        raise ModelError(f"its base {base['name']} has changed since training", fix=fix)
    return source


def _load_base(
    source: Source, dtype: str, device: str, quantization: str, double: bool, *, dequantizes: bool, streamed: bool
) -> tuple[Any, list[str]]:
    """Return a base, and a note if it does not fit in memory. dequantizes: once, as many layers as fit."""
    storage: dict[str, Any] = {"quantization": quantization, "double": double}
    if device.startswith("cuda") and (streamed or not fits_in_memory(source, DTYPES[dtype], quantization, device)):
        base, _ = load_from_host(source, DTYPES[dtype], device, **storage)
        return base, [f"{source.name}: is copied to the GPU for each token of the answers, because its memory is short"]
    if device != "cpu" or (not streamed and fits_in_memory(source, DTYPES[dtype], "none")):
        return load_base(source, DTYPES[dtype], device, resident_layers=None if dequantizes else 0, **storage), []
    if not streamed and quantization != "none" and fits_in_memory(source, DTYPES[dtype], quantization):
        return load_base(source, DTYPES[dtype], device, **storage), []
    base, ahead = load_streamed(source, DTYPES[dtype], **storage)
    ahead.verify()
    return base, [f"{source.name}: is read from disk for each token of the answers, because memory is short"]


def _describe_rounding(source: Source, dtype: str) -> list[str]:
    """Return a note if a dtype that was not asked for has less precision than the stored weights."""
    if source.kind == "gguf" or prequantized(source.config()) is not None:
        return []
    stored = stored_dtype_name(source)
    if torch.finfo(DTYPES[stored]).eps >= torch.finfo(DTYPES[dtype]).eps:
        return []
    return [f"stored in {stored}, loaded in {dtype}, which is faster here: --dtype {stored} loads it as stored"]


def load(
    name: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
    force: bool = False,
    scores: bool = False,
    double_quantization: bool | None = None,
    streamed: bool = False,
    base: Source | None = None,
) -> Model:
    """Load a model to generate with.

    Args:
        name: a run, adapter or model folder, a .gguf file, a Hub id, or the word `demo` for the demo model.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, bf16, fp32 or fp16. auto: that of training (or fp32, with a note, where the device is not made for
            it); without an adapter, bf16 on CUDA, and on a CPU the dtype that was measured to be faster. The weights
            of a .gguf file are always rounded to bf16 first.
        quantization: auto, none, nf4, fp4 or int8. auto: the scheme with which the adapter was trained, or that of the
            weights on disk. In this case, as many layers as fit into the GPU's memory are dequantized when loaded.
        force: accept an adapter that was trained on another base model, if it fits. The differences are in `notes`.
        scores: load a reward model, which scores texts and cannot generate.
        double_quantization: also quantize the scales of 4-bit weights; None: as in training.
        streamed: read the base from disk, or on a GPU from host memory, even if it fits in memory.
        base: of an adapter, in place of the one that it names.

    Raises:
        ModelError: if the model cannot be loaded.
        RecipeError: for an unknown option value.
    """
    name = os.fspath(name)
    if quantization not in (known := ("auto", "none", *SCHEMES)):
        raise RecipeError(f"--quantization {quantization}: no such scheme", fix=f"choose among {', '.join(known)}")
    check_device_and_dtype(device, dtype)
    folder = adapter_folder(name)
    source = locate(name) if folder is None else base or locate_base(folder)
    if folder is None:
        refuse_embedder(source)
    prepare_process()
    torch_device = pick_device(device)
    renderer = _make_renderer(folder, source)
    base_name = base_of_model(name)
    identity = model_identity(folder, source)
    notes = [GGUF_NOTE] if source.kind == "gguf" and dtype == "fp32" != identity.get("dtype") else []
    if dtype == "auto":
        family = load_config(source).model_type if torch_device.startswith("cuda") else ""
        dtype, notes = pick_generation_dtype(torch_device, identity.get("dtype"), family)
        if folder is None and "dtype" not in identity:
            notes = _describe_rounding(source, dtype)
    scheme = quantization
    if quantization == "auto":
        scheme = str(identity.get("quantization") or prequantized(source.config()) or "none")
    module, storage_notes = _load_base(
        source, dtype, torch_device, scheme,
        bool(identity.get("double_quantization", True)) if double_quantization is None else double_quantization,
        dequantizes=quantization == "auto", streamed=streamed,
    )  # fmt: skip
    notes = [*notes, *storage_notes, *unfinished_notes(name)]
    if folder is None:
        install_images(module, renderer.tokenizer)
        untuned, has_base = None if base_name is None else identity["base"], True
        if untuned is not None and force:
            try:
                _locate_untuned(untuned)
            except ModelError as error:
                has_base, notes = False, [*notes, f"{error.what}: not compared with it"]
        return Model(
            name, module, renderer.tokenizer, renderer, None, identity.get("system"), notes, source, scheme, dtype,
            untuned=untuned, has_base=has_base,
        )  # fmt: skip
    kind = adapter_kind(folder)
    expected = kind if kind in ("classifier", "embedder") else "reward" if scores else "text"
    module, mismatches = attach_adapter(module, folder, source, force=force, kind=expected)
    install_images(module, renderer.tokenizer)
    return Model(
        name, module.eval(), renderer.tokenizer, renderer, folder, identity.get("system"), [*notes, *mismatches],
        source, scheme, dtype, read_classes(folder) if kind == "classifier" else None,
        read_pooling(folder) if kind == "embedder" else None,
    )  # fmt: skip
