"""The models a server has: adapters on one base, and the base alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.data.rendering.render import Renderer, RenderError
from strop.data.row_formats import BadRow, asked
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
class Served:
    """One model by the id that clients use. adapter: peft's name of it, None for the base.

    system: the system prompt that every training row had; a chat without one gets it, as in training.
    """

    id: str
    adapter: str | None
    tokenizer: Any
    renderer: Renderer
    system: str | None
    more_ends: tuple[int, ...] = ()  # at which the model itself ends an answer

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids at which an answer ends."""
        return (*self.renderer.ends, *self.more_ends)

    def prompt(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        options: dict[str, Any] | None = None,
    ) -> Ids:
        """The token ids of a chat, generation prompt included, as in training; options: of the template, where the
        request has some. Raises Refusal for what the model cannot be shown.
        """
        if self.renderer.template is None:
            raise ApiError(400, "the model has no chat template: ask it by /v1/completions", param="messages")
        if self.renderer.control.found(dict(options or {})):
            what = "chat_template_kwargs: a value holds a control token"
            raise ApiError(400, what, param="chat_template_kwargs")
        try:
            said = asked({"messages": messages, "tools": tools})
            if said.tools and not self.renderer.chat.supports_tools:
                what = "tools: the model's chat template shows none: send no tools, or ask another model"
                raise ApiError(400, what, param="tools")
            given = said.messages
            if self.system is not None and given[0].role != "system":
                given = (Message("system", self.system), *given)
            return self.renderer.prompt(given, said.tools, options=options)
        except ModelError as error:
            raise ApiError(400, f"{error.what}: {error.fix}", param="chat_template_kwargs") from None
        except BadRow as error:
            raise ApiError(400, error.what, param="tools" if error.code == "bad-tools" else "messages") from None
        except RenderError as error:  # its fix is for training
            raise ApiError(400, error.what, param="messages") from None

    def text(self, text: str) -> Ids:
        """The token ids of a plain text, which may hold control tokens."""
        ids: Ids = self.tokenizer(text, return_tensors="np")["input_ids"][0].astype("int32")
        return ids


@dataclass(frozen=True)
class Loaded:
    """module: the transformers or peft model; models by id, the first named first."""

    module: Any
    models: dict[str, Served]
    notes: Sequence[str]


def served_name(name: str) -> str:
    """The id of what a run, a folder, a file or a Hub id holds."""
    path = Path(name).expanduser()
    if is_run(path):
        return RunFolder(path).name
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else name


def check_names(names: Sequence[str]) -> list[str]:
    """The ids of what is to be served. Raises ModelError for two of one name, or that cannot go together."""
    ids = [served_name(name) for name in names]
    for place, own in enumerate(ids):
        if own in ids[:place] or own == BASE:
            raise ModelError(f"{names[place]}: a model called {own} is served already", fix="rename the folder")
    if len(names) > 1:
        for name in names:
            if adapter_folder(name) is None:
                raise ModelError(
                    f"{name}: has no adapter", fix="several models can be served where all are runs of one base"
                )
    return ids


def load_models(names: Sequence[str], *, device: str, dtype: str, quantization: str, force: bool) -> Loaded:
    """Runs (or adapter folders) of one base, or one model. Raises ModelError where they do not go together."""
    ids = check_names(names)
    first = load(names[0], device=device, dtype=dtype, quantization=quantization, force=force)
    own_text, more = (first.tokenizer, first.renderer), generation_stop_ids(first.module.generation_config)
    if first.adapter is None:
        return Loaded(first.module, {ids[0]: Served(ids[0], None, *own_text, None, more)}, first.notes)
    models = {ids[0]: Served(ids[0], "default", *own_text, first.default_system, more)}
    notes = []
    for own, name in zip(ids[1:], names[1:], strict=True):
        folder = adapter_folder(name)
        assert folder is not None and first.source is not None
        tokenizer = load_tokenizer(tokenizer_source(folder, first.source))
        if len(tokenizer) > len(first.module.get_input_embeddings().weight):
            raise ModelError(f"{name}: has more tokens than {names[0]}", fix="serve it on its own, or name it first")
        first.add(name, force=force, own_template=True)
        identity = read_identity(folder)
        if identity.get("quantization", "none") != read_identity(first.adapter).get("quantization", "none"):
            notes.append(f"{name}: was trained on a base quantized otherwise than {names[0]}'s, which both get here")
        renderer = make_renderer(tokenizer, identity)
        models[own] = Served(own, first.others[name], tokenizer, renderer, identity.get("system"), more)
    models[BASE] = Served(BASE, None, *own_text, None, more)
    return Loaded(first.module, models, [*first.notes, *notes])
