"""The models of a server: one base model, and the adapters on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.data.converters import parse_request
from strop.data.rendering.render import Renderer
from strop.data.row_errors import InvalidRow, RenderError
from strop.data.types import Ids, Message
from strop.engine.decode.generate import generation_stop_ids
from strop.engine.decode.model import load
from strop.errors import ModelError
from strop.models.adapters import adapter_folder, make_renderer, read_identity, tokenizer_source
from strop.models.tokenizer import load_tokenizer
from strop.runs.folder import RunFolder, is_run
from strop.serve.guard import ApiError

BASE = "base"


@dataclass(frozen=True)
class ServedModel:
    """A model by the id that clients use.

    adapter: PEFT's name of the adapter; None for the base. system: the system prompt of all training rows, which a chat
    without a system prompt gets. generation_stop_ids: from the model's generation config.
    """

    id: str
    adapter: str | None
    tokenizer: Any
    renderer: Renderer
    system: str | None
    generation_stop_ids: tuple[int, ...] = ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (*self.renderer.end_ids, *self.generation_stop_ids)

    def prompt(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        template_options: dict[str, Any] | None = None,
    ) -> Ids:
        """Return the token ids of a chat with the generation prompt, as in training. Raises ApiError if invalid."""
        if self.renderer.template is None:
            raise ApiError(400, "the model has no chat template: use /v1/completions", param="messages")
        if self.renderer.control.is_in(dict(template_options or {})):
            message = "chat_template_kwargs: a value contains a control token"
            raise ApiError(400, message, param="chat_template_kwargs")
        try:
            conversation = parse_request({"messages": messages, "tools": tools})
            if conversation.tools and not self.renderer.chat.supports_tools:
                message = "tools: not supported by the model's chat template; remove tools, or use another model"
                raise ApiError(400, message, param="tools")
            turns = conversation.messages
            if self.system is not None and turns[0].role != "system":
                turns = (Message("system", self.system), *turns)
            return self.renderer.prompt(turns, conversation.tools, options=template_options)
        except ModelError as error:
            raise ApiError(400, f"{error.what}: {error.fix}", param="chat_template_kwargs") from None
        except InvalidRow as error:
            raise ApiError(400, error.what, param="tools" if error.code == "bad-tools" else "messages") from None
        except RenderError as error:  # without its fix, which is about training
            raise ApiError(400, error.what, param="messages") from None

    def text(self, text: str) -> Ids:
        """Return the token ids of plain text, which may contain control tokens."""
        ids: Ids = self.tokenizer(text, return_tensors="np")["input_ids"][0].astype("int32")
        return ids


@dataclass(frozen=True)
class LoadedModels:
    """module: the transformers or PEFT model. models: by id, in the order of the names. notes: to show at start."""

    module: Any
    models: dict[str, ServedModel]
    notes: Sequence[str]


def served_name(name: str) -> str:
    """Return the id of a run, a folder, a file or a Hub id."""
    path = Path(name).expanduser()
    if is_run(path):
        return RunFolder(path).name
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else name


def check_names(names: Sequence[str]) -> list[str]:
    """Return the ids of the models to serve. Raises ModelError if two are equal, or if they cannot share a base."""
    ids = [served_name(name) for name in names]
    for place, model_id in enumerate(ids):
        if model_id in ids[:place] or model_id == BASE:
            raise ModelError(f"{names[place]}: the id {model_id} is used twice", fix="rename the folder")
    if len(names) > 1:
        for name in names:
            if adapter_folder(name) is None:
                raise ModelError(f"{name}: has no adapter", fix="to serve several models, give runs of one base")
    return ids


def load_models(names: Sequence[str], *, device: str, dtype: str, quantization: str, force: bool) -> LoadedModels:
    """Load one model, or the adapters of several runs on their base. Raises ModelError if these cannot share it."""
    ids = check_names(names)
    first = load(names[0], device=device, dtype=dtype, quantization=quantization, force=force)
    stop_ids = generation_stop_ids(first.module.generation_config)

    def served(model_id: str, adapter: str | None, system: str | None) -> ServedModel:
        return ServedModel(model_id, adapter, first.tokenizer, first.renderer, system, stop_ids)

    if first.adapter is None:
        return LoadedModels(first.module, {ids[0]: served(ids[0], None, None)}, first.notes)
    models = {ids[0]: served(ids[0], "default", first.default_system)}
    notes = []
    for model_id, name in zip(ids[1:], names[1:], strict=True):
        folder = adapter_folder(name)
        assert folder is not None and first.source is not None
        tokenizer = load_tokenizer(tokenizer_source(folder, first.source))
        if len(tokenizer) > len(first.module.get_input_embeddings().weight):
            raise ModelError(f"{name}: has more tokens than {names[0]}", fix="serve it alone, or name it first")
        first.add(name, force=force, own_template=True)
        identity = read_identity(folder)
        if identity.get("quantization", "none") != read_identity(first.adapter).get("quantization", "none"):
            notes.append(f"{name}: was trained on another quantization of the base than {names[0]}, which is used here")
        renderer = make_renderer(tokenizer, identity)
        models[model_id] = ServedModel(
            model_id, first.others[name], tokenizer, renderer, identity.get("system"), stop_ids
        )
    models[BASE] = served(BASE, None, None)
    return LoadedModels(first.module, models, [*first.notes, *notes])
