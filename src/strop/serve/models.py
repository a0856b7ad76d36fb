"""The models that a server offers: a base model and adapters on it. Also masks for constrained decoding."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from strop.data.converters import parse_request, read_images
from strop.data.rendering.image_encoder import share_image_encoder
from strop.data.rendering.render import Renderer
from strop.data.row_errors import InvalidRow, RenderError
from strop.data.types import Ids, Message
from strop.engine.decode.generate import generation_stop_ids
from strop.engine.decode.model import load
from strop.engine.decode.sampling import Logits, Mask, NoToken
from strop.engine.images import ImageFeatures, image_features
from strop.errors import ModelError
from strop.models.adapter_config import adapter_folder, read_adapter_config, read_identity
from strop.models.adapters import locate_tokenizer, make_renderer
from strop.models.tokenizer import load_tokenizer, trained_token_rows
from strop.runs.folder import RunFolder, is_run
from strop.serve.protocol import ResponseFormat
from strop.serve.server import ApiError

BASE = "base"


@dataclass(frozen=True)
class ServedModel:
    """A model that clients can request."""

    id: str
    adapter: str | None  # PEFT's name of the adapter; None for the base
    tokenizer: Any
    renderer: Renderer
    system: str | None  # the system prompt of training, used for chats without one
    generation_stop_ids: tuple[int, ...] = ()  # from the model's generation config
    why_no_images: str | None = None  # why images of requests are refused, though the model may read them
    features: ImageFeatures | None = None  # of a model that reads images

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (*self.renderer.end_ids, *self.generation_stop_ids)

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None,
        template_options: dict[str, Any] | None = None,
    ) -> Ids:  # fmt: skip
        """Render a chat with the generation prompt as in training, and return token ids. Raises ApiError if invalid."""
        if self.renderer.template is None:
            raise ApiError(400, "the model has no chat template: use /v1/completions", param="messages")
        if self.renderer.control.occurs_in(dict(template_options or {})):
            raise ApiError(400, "chat_template_kwargs: a value contains a control token", param="chat_template_kwargs")
        try:
            conversation = read_images(parse_request({"messages": messages, "tools": tools}), None, conversation=True)
            if conversation.tools and not self.renderer.chat.traits.tools:
                raise ApiError(400, "tools: not supported by the model's chat template", param="tools")
            turns = conversation.messages
            if self.why_no_images is not None and any(turn.images for turn in turns):
                raise ApiError(400, f"images: {self.why_no_images}", param="messages")
            if self.system is not None and turns[0].role != "system":
                turns = (Message("system", self.system), *turns)
            return self.renderer.prompt(turns, conversation.tools, options=template_options)
        except ModelError as error:
            raise ApiError(400, f"{error.what}: {error.fix}", param="chat_template_kwargs") from None
        except InvalidRow as error:
            raise ApiError(400, error.what, param="tools" if error.code == "bad-tools" else "messages") from None
        except RenderError as error:  # its fix is for training rows
            raise ApiError(400, error.what, param="messages") from None

    def image_loader(self, ids: Ids) -> Callable[[], None] | None:
        """Return a function that computes the images of a prompt, or None without images."""
        images = [] if self.features is None else self.features.images_of(ids)
        return partial(self.features.load, images) if self.features is not None and images else None

    def tokenize(self, text: str) -> Ids:
        """Return the token ids of plain text, which may contain control tokens."""
        ids: Ids = self.tokenizer(text, return_tensors="np")["input_ids"][0].astype("int32")
        return ids


@dataclass(frozen=True)
class LoadedModels:
    module: Any  # the transformers or PEFT model
    models: dict[str, ServedModel]  # by id, in the order of the names
    notes: Sequence[str]  # shown at start
    dtype: str  # of the weights that are not quantized


def _model_id(name: str) -> str:
    """Return the id that clients use for a run, a folder, a file or a Hub id."""
    path = Path(name).expanduser()
    if is_run(path):
        return RunFolder(path).name
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else name


def check_names(names: Sequence[str]) -> list[str]:
    """Return the ids of the models. Raises ModelError if two are equal, or if one of several has no adapter."""
    ids = [_model_id(name) for name in names]
    for i, (name, model_id) in enumerate(zip(names, ids, strict=True)):
        if model_id in ids[:i] or model_id == BASE:
            why = "is that of the base model" if model_id == BASE else "is used twice"
            raise ModelError(f"{name}: the id {model_id} {why}", fix="rename the folder")
        if len(names) > 1 and adapter_folder(name) is None:
            raise ModelError(f"{name}: has no adapter", fix="to serve several models, give runs of one base")
    return ids


def load_models(names: Sequence[str], *, device: str, dtype: str, quantization: str, force: bool) -> LoadedModels:
    """Load one model, or the adapters of several runs on their base. Raises ModelError if these cannot share it."""
    listed = check_names(names)
    if len(names) > 1:  # adapters that train token embeddings are loaded last, since others cannot be added to them
        names = sorted(names, key=_count_trained_tokens)
    ids = [_model_id(name) for name in names]
    first = load(names[0], device=device, dtype=dtype, quantization=quantization, force=force)
    stop_ids = generation_stop_ids(first.module.generation_config)
    features = image_features(first.module)
    why = None if features is None else features.why_not_decoded
    why_no_images = None if why is None else f"models with {why} are not served by strop: use vLLM (--engine vllm)"
    base = ServedModel(BASE, None, first.tokenizer, first.renderer, None, stop_ids, why_no_images, features)
    if first.adapter is None:
        return LoadedModels(
            first.module, {ids[0]: replace(base, id=ids[0], system=first.default_system)}, first.notes, first.dtype
        )
    models = {ids[0]: replace(base, id=ids[0], adapter="default", system=first.default_system)}
    for model_id, name in zip(ids[1:], names[1:], strict=True):
        folder = adapter_folder(name)
        assert folder is not None and first.source is not None
        tokenizer = load_tokenizer(locate_tokenizer(folder, first.source))
        share_image_encoder(tokenizer, first.tokenizer)
        if len(tokenizer) > len(first.module.get_input_embeddings().weight):
            raise ModelError(f"{name}: has more tokens than {names[0]}", fix="serve it by itself")
        first.add(name, force=force, own_template=True)
        identity = read_identity(folder)
        renderer = make_renderer(tokenizer, identity)
        adapter, system = first.others[name], identity.get("system")
        models[model_id] = ServedModel(
            model_id, adapter, tokenizer, renderer, system, stop_ids, why_no_images, features
        )
    models[BASE] = base
    if features is not None and features.depends_on_adapter:  # the encoder has one state for all requests
        why_no_images = f"the image encoder was trained, and is that of {ids[0]}: serve the other model by itself"
        models = {
            id: served if id == ids[0] else replace(served, why_no_images=why_no_images)
            for id, served in models.items()
        }
    models = {id: models[id] for id in (*listed, BASE)}
    return LoadedModels(first.module, models, first.notes, first.dtype)


def _count_trained_tokens(name: str) -> int:
    folder = adapter_folder(name)
    return 0 if folder is None else sum(map(len, trained_token_rows(read_adapter_config(folder)).values()))


class Grammars:
    """Creates masks for requests with a response_format. The first mask of a tokenizer takes about a second."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._tokenizers: dict[int, Any] = {}

    def mask(self, served: ServedModel, response_format: ResponseFormat | None) -> Mask | None:
        """Return the mask of a request; None for plain text. Raises ApiError if the format cannot be guaranteed."""
        if response_format is None or response_format.type == "text":
            return None
        if find_spec("llguidance") is None:
            message = f"response_format {response_format.type} needs llguidance on the server: pip install llguidance"
            raise ApiError(400, message, param="response_format")
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        schema: dict[str, Any] = {"type": "object"}
        if response_format.type == "json_schema":
            if response_format.json_schema is None:
                raise ApiError(400, "response_format.json_schema is missing", param="response_format")
            schema = response_format.json_schema.json_schema
        key = id(served.tokenizer)
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
            if key not in self._tokenizers:
                stop_ids = list(served.stop_ids)
                self._tokenizers[key] = from_tokenizer(served.tokenizer, n_vocab=self._vocabulary, eos_token=stop_ids)
        except ValueError as error:
            raise ApiError(400, f"response_format: {str(error)[:300]}", param="response_format") from None
        error_text = LLMatcher.validate_grammar(grammar, self._tokenizers[key])
        if error_text:
            raise ApiError(400, f"response_format: {error_text.splitlines()[0][:300]}", param="response_format")
        return _GrammarMask(LLMatcher(self._tokenizers[key], grammar))


class _GrammarMask:
    """The mask of one completion. Each call advances the grammar by the new tokens."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._num_consumed = matcher, 0

    def __call__(self, tokens: Sequence[int], scores: Logits) -> None:
        for token in tokens[self._num_consumed :]:
            self._matcher.consume_token(token)
        self._num_consumed = len(tokens)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(scores)].astype(bool)
        if self._matcher.is_error() or not allowed.any():  # after an error, the end would be allowed in incomplete JSON
            raise NoToken("format")
        scores[: len(allowed)][~allowed] = -np.inf
        scores[len(allowed) :] = -np.inf
