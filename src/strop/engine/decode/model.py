"""A loaded model that answers prompts."""

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
from strop.engine.decode.sampling import ExpectedCompletion, Sampling
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
    """A loaded model that answers. `adapter` is the folder of its adapter, None for a bare base."""

    name: str
    module: Any
    tokenizer: Any
    renderer: Renderer
    adapter: Path | None
    default_system: str | None = None  # the system prompt that every training row had
    notes: Sequence[str] = ()  # what `force` let pass
    source: Source | None = None  # of the base
    quantization: str = "none"  # of the base
    history: list[Message] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)  # further adapters: their names in the module, by their names
    _ways: dict[str, tuple[Renderer, str | None]] = field(default_factory=dict)  # each one's renderer, default_system
    _turn: Any = field(default_factory=RLock, repr=False, compare=False)  # of the threads that ask it

    @property
    def sampling(self) -> Sampling:
        """How the model itself wants its answers drawn: its generation config."""
        return Sampling.own(self.module.generation_config)

    def add(self, name: str, *, force: bool = False, own_template: bool = False) -> None:
        """Loads a further adapter (a run or adapter folder) onto the same base; `use` switches to it.

        own_template: its prompts will be made by its own template. Else it must be this model's, unless forced.
        Raises ModelError where it was trained on another base or with another template, or does not fit.
        """
        folder = adapter_folder(name)
        if folder is None or self.adapter is None or self.source is None:
            raise ModelError(f"{name}: no adapter there", fix="give a run or adapter folder")
        if name in (self.name, *self.others):
            raise ModelError(f"{name}: is loaded already", fix="give each adapter once")
        own, its = (read_identity(one).get("template") for one in (self.adapter, folder))
        if own != its and not (force or own_template):
            what = f"{name}: was trained with another chat template than {self.name}"
            raise ModelError(what, fix="load it by itself, or with --force")
        inner = f"adapter{len(self.others) + 1}"
        with self._turn, isolated_torch_state():
            self.notes = [*self.notes, *attach_second(self.module, folder, self.source, inner, force=force)]
        self.others[name] = inner
        identity = read_identity(folder)
        self._ways.setdefault(self.name, (self.renderer, self.default_system))
        self._ways[name] = make_renderer(self.tokenizer, identity), identity.get("system")

    def use(self, name: str) -> None:
        """Answers with this adapter from now on, and asks as in its training: the model's own name, or one that was
        added."""
        self.renderer, self.default_system = self._ways.get(name, (self.renderer, self.default_system))
        self.module.set_adapter("default" if name == self.name else self.others[name])

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside this block the adapter is off; other threads that ask wait."""
        assert self.adapter is not None
        with self._turn, adapter_disabled(self.module):
            yield

    def answer(
        self,
        prompts: Sequence[Ids],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        on_text: Callable[[str], None] | None = None,
        advance: Callable[[int], None] | None = None,
        both: bool = False,
        partial: bool = False,
        expected: Sequence[ExpectedCompletion | None] = (),
    ) -> list[Completion]:
        """One answer for each prompt of token ids; of several threads one is answered at a time.
        both, partial, expected: as model.generate says."""
        with self._turn, default_torch_state():
            return generate(
                self.module, self.tokenizer, prompts, stop_ids=self.renderer.ends, max_new_tokens=max_new_tokens,
                sampling=sampling, on_text=on_text, advance=advance, both=both, partial=partial, expected=expected,
            )  # fmt: skip

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """The answers to user texts, each asked on its own (one text by itself is one prompt).

        system: None: the system prompt of the training rows, where they all had one. sampling: None: greedy.
        """
        texts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        if not all(isinstance(text, str) for text in texts):
            raise InputError("generate: a prompt is a text", fix="give texts; `chat` keeps a conversation")
        asked = [self.renderer.prompt([*self._opening(system), Message("user", text)]) for text in texts]
        return [answer.text for answer in self.answer(asked, max_new_tokens=max_new_tokens, sampling=sampling)]

    def chat(
        self,
        text: str,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """The answer to the next user turn; the turns before are kept in `history`. No Sampling: the model's own.

        A system prompt starts a new history; without one, a history starts with the system prompt of the training rows.
        Raises InputError where the history is longer than what the model was made for.
        """
        if system is not None or not self.history:
            self.history = self._opening(system)
        turn = [*self.history, Message("user", text)]
        prompt = self.renderer.prompt(turn)
        longest = max_positions(self.module) or sys.maxsize
        if len(prompt) >= longest:
            what = f"the conversation has {len(prompt):,} tokens, and the model was made for {longest:,}"
            raise InputError(what, fix="start again: /reset in a chat, `history` cleared in Python")
        max_new_tokens = min(max_new_tokens, longest - len(prompt))
        sampling = sampling or self.sampling
        answer = self.answer([prompt], max_new_tokens=max_new_tokens, sampling=sampling, on_text=on_text)[0]
        self.history = [*turn, Message("assistant", answer.text)]
        return answer.text

    def _opening(self, system: str | None) -> list[Message]:
        text = self.default_system if system is None else system
        return [] if text is None else [Message("system", text)]


def load_renderer(name: str) -> Renderer:
    """What renders for a model, by its name as for `load`, without its weights. Raises ModelError."""
    folder = adapter_folder(name)
    source = locate(name) if folder is None else base_source(folder)
    return _renderer_in(folder, source)


def _renderer_in(folder: Path | None, source: Source) -> Renderer:
    """Of a base, or of an adapter in a folder."""
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
    """A run folder, an adapter folder, a model folder, a .gguf file, a Hub id or `demo`, ready to answer.

    dtype `auto`: bf16 on CUDA, and what the precision probe prefers on a CPU.
    quantization: none, nf4, fp4, int8; `auto`: what the adapter was trained on (dequantized once, on a card as far as
    there is room), else as the weights are on disk.
    force: load an adapter on a base that it was not trained on, if it fits; the Model's notes say what differs.
    scores: a reward model, which answers nothing. Raises ModelError where it cannot be loaded.
    """
    name = os.fspath(name)
    if quantization not in (known := ("auto", "none", *SCHEMES)):
        raise RecipeError(f"--quantization {quantization}: no such scheme", fix=f"choose among {', '.join(known)}")
    check_device_and_dtype(device, dtype)
    folder = adapter_folder(name)
    source = locate(name) if folder is None else base_source(folder)
    prepare_process()
    where = pick_device(device)
    chosen = DTYPES[pick_dtype(where)[0] if dtype == "auto" else dtype]
    renderer = _renderer_in(folder, source)
    identity = read_identity(folder) if folder is not None else {}
    own = str(identity.get("quantization") or prequantized(source.config()) or "none")
    scheme = own if quantization == "auto" else quantization
    base = load_base(
        source, chosen, where, quantization=scheme, double=bool(identity.get("double_quantization", True)),
        resident_layers=None if quantization == "auto" else 0,
    )  # fmt: skip
    if folder is None:
        return Model(name, base, renderer.tokenizer, renderer, None, source=source, quantization=scheme)
    module, notes = attach_adapter(base, folder, source, force=force, scores=scores)
    return Model(
        name, module.eval(), renderer.tokenizer, renderer, folder, identity.get("system"), notes, source, scheme
    )
