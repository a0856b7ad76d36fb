"""A loaded model that generates text and keeps a conversation: what `strop.load` returns."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

from strop.data.rendering.render import Renderer
from strop.data.types import Ids, Message
from strop.engine.decode.generate import Completion, generate
from strop.engine.decode.sampling import Sampling
from strop.engine.device import pick_device, pick_dtype, prepare_process
from strop.errors import InputError, ModelError, RecipeError
from strop.machine.torch_state import default_torch_state, isolated_torch_state
from strop.models.adapters import (
    adapter_disabled,
    adapter_folder,
    attach_adapter,
    attach_second,
    base_source,
    make_renderer,
    read_identity,
    tokenizer_source,
)
from strop.models.introspect import max_positions
from strop.models.load import DTYPES, check_device_and_dtype, load_base
from strop.models.source import SCHEMES, Source, locate, prequantized
from strop.models.tokenizer import load_tokenizer


@dataclass
class Model:
    """A loaded model, with or without adapters. Threads may share it; one generates at a time."""

    name: str
    module: Any
    tokenizer: Any
    renderer: Renderer
    adapter: Path | None  # the adapter's folder; None for a base without one
    default_system: str | None = None  # the system prompt that every training row had
    notes: Sequence[str] = ()  # differences that `force` accepted
    source: Source | None = None  # of the base
    quantization: str = "none"  # of the base
    history: list[Message] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)  # added adapters: name -> name in PEFT
    _settings: dict[str, tuple[Renderer, str | None]] = field(default_factory=dict)  # renderer, default_system by name
    _lock: Any = field(default_factory=RLock, repr=False, compare=False)

    @property
    def sampling(self) -> Sampling:
        """The sampling settings in the model's generation config."""
        return Sampling.from_generation_config(self.module.generation_config)

    def add(self, name: str, *, force: bool = False, own_template: bool = False) -> None:
        """Load another adapter onto the same base; `use` switches to it.

        Args:
            name: a run or adapter folder.
            force: accept another base or template.
            own_template: allow another chat template, which is then used for this adapter's prompts.

        Raises:
            ModelError: if it was trained on another base or with another template, or does not fit.
        """
        folder = adapter_folder(name)
        if folder is None or self.adapter is None or self.source is None:
            raise ModelError(f"{name}: not an adapter", fix="give a run or adapter folder")
        if name in (self.name, *self.others):
            raise ModelError(f"{name}: is already loaded", fix="give each adapter once")
        template, added_template = (read_identity(path).get("template") for path in (self.adapter, folder))
        if template != added_template and not (force or own_template):
            what = f"{name}: was trained with another chat template than {self.name}"
            raise ModelError(what, fix="load it by itself, or with --force")
        inner = f"adapter{len(self.others) + 1}"
        with self._lock, isolated_torch_state():
            self.notes = [*self.notes, *attach_second(self.module, folder, self.source, inner, force=force)]
        self.others[name] = inner
        identity = read_identity(folder)
        self._settings.setdefault(self.name, (self.renderer, self.default_system))
        self._settings[name] = make_renderer(self.tokenizer, identity), identity.get("system")

    def use(self, name: str) -> None:
        """Switch to an adapter, its template and its system prompt. name: this model's name, or an added adapter."""
        self.renderer, self.default_system = self._settings.get(name, (self.renderer, self.default_system))
        self.module.set_adapter("default" if name == self.name else self.others[name])

    @contextmanager
    def base(self) -> Iterator[None]:
        """Disable the adapter inside the block; other threads wait."""
        assert self.adapter is not None
        with self._lock, adapter_disabled(self.module):
            yield

    def answer(self, prompts: Sequence[Ids], **options: Any) -> list[Completion]:
        """Return one completion for each prompt of token ids. options: keyword arguments of `generate`."""
        with self._lock, default_torch_state():
            return generate(self.module, self.tokenizer, prompts, stop_ids=self.renderer.end_ids, **options)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Answer user texts, each as the start of a new conversation.

        Args:
            prompts: one text or several.
            system: the system prompt; None: that of the training rows, if they all had the same one.
            max_new_tokens: the limit for each answer.
            sampling: None: greedy decoding.
        """
        texts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        if not all(isinstance(text, str) for text in texts):
            raise InputError("generate: a prompt must be a string", fix="give strings; `chat` keeps a conversation")
        ids = [self.renderer.prompt([*self._opening(system), Message("user", text)]) for text in texts]
        return [answer.text for answer in self.answer(ids, max_new_tokens=max_new_tokens, sampling=sampling)]

    def chat(
        self,
        text: str,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Answer the next user message of the conversation in `history`.

        Args:
            text: the user's message.
            system: starts a new history with this system prompt. None: continue; a new history starts with the system
                prompt of the training rows, if they all had the same one.
            max_new_tokens: the limit for the answer.
            sampling: None: the settings in the model's generation config.
            on_text: receives pieces of the answer as they are generated.

        Raises:
            InputError: if the conversation is longer than the model's maximum.
        """
        if system is not None or not self.history:
            self.history = self._opening(system)
        messages = [*self.history, Message("user", text)]
        prompt = self.renderer.prompt(messages)
        longest = max_positions(self.module) or sys.maxsize
        if len(prompt) >= longest:
            what = f"the conversation has {len(prompt):,} tokens, and the model was made for {longest:,}"
            raise InputError(what, fix="start again: /reset in a chat, `history.clear()` in Python")
        max_new_tokens = min(max_new_tokens, longest - len(prompt))
        sampling = sampling or self.sampling
        answer = self.answer([prompt], max_new_tokens=max_new_tokens, sampling=sampling, on_text=on_text)[0]
        self.history = [*messages, Message("assistant", answer.text)]
        return answer.text

    def _opening(self, system: str | None) -> list[Message]:
        text = self.default_system if system is None else system
        return [] if text is None else [Message("system", text)]


def load_renderer(name: str) -> Renderer:
    """Return a model's renderer, without its weights; name: as for `load`. Raises ModelError."""
    folder = adapter_folder(name)
    source = locate(name) if folder is None else base_source(folder)
    return _make_renderer(folder, source)


def _make_renderer(folder: Path | None, source: Source) -> Renderer:
    """Return the renderer of a base, or of the adapter in a folder."""
    tokenizer = load_tokenizer(source if folder is None else tokenizer_source(folder, source))
    return make_renderer(tokenizer, {} if folder is None else read_identity(folder))


def load(
    name: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
    force: bool = False,
    scores: bool = False,
) -> Model:
    """Load a model to generate with.

    Args:
        name: a run, adapter or model folder, a .gguf file, a Hub id or `demo`.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, bf16, fp32 or fp16. auto: bf16 on CUDA; on a CPU the dtype that was measured to be faster.
        quantization: none, nf4, fp4 or int8. auto: the scheme that the adapter was trained with, or that of the
            weights on disk. As many layers as fit into the GPU's memory are then dequantized once.
        force: accept an adapter that was trained on another base, if it fits; `notes` say what differs.
        scores: load a reward model, which generates nothing.

    Raises:
        ModelError: if the model cannot be loaded.
        RecipeError: for an unknown option value.
    """
    name = os.fspath(name)
    if quantization not in (known := ("auto", "none", *SCHEMES)):
        raise RecipeError(f"--quantization {quantization}: no such scheme", fix=f"choose among {', '.join(known)}")
    check_device_and_dtype(device, dtype)
    folder = adapter_folder(name)
    source = locate(name) if folder is None else base_source(folder)
    prepare_process()
    chosen_device = pick_device(device)
    chosen_dtype = DTYPES[pick_dtype(chosen_device)[0] if dtype == "auto" else dtype]
    renderer = _make_renderer(folder, source)
    identity = read_identity(folder) if folder is not None else {}
    trained_on = str(identity.get("quantization") or prequantized(source.config()) or "none")
    scheme = trained_on if quantization == "auto" else quantization
    base = load_base(
        source, chosen_dtype, chosen_device, quantization=scheme,
        double=bool(identity.get("double_quantization", True)),
        resident_layers=None if quantization == "auto" else 0,
    )  # fmt: skip
    if folder is None:
        return Model(name, base, renderer.tokenizer, renderer, None, source=source, quantization=scheme)
    module, notes = attach_adapter(base, folder, source, force=force, scores=scores)
    return Model(
        name, module.eval(), renderer.tokenizer, renderer, folder, identity.get("system"), notes, source, scheme
    )
