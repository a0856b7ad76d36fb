"""Chat with a model in the terminal or through a pipe (`strop chat`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from strop import api
from strop.cli.options import CHAT_COMMANDS
from strop.display.tables import SafeConsole, escape_control, messages, print_notes
from strop.display.terminal import status_line
from strop.engine.decode.model import Model
from strop.engine.decode.sampling import Sampling
from strop.errors import InputError, ModelError, StropError, suggest
from strop.models.adapter_config import adapter_folder, adapter_kind, check_adapter_kind

SHOWN_CLASSES = 7  # of a classifier, for each line
WHOLE_SIDES = {"base": "before training", "tuned": "after training", "compare": "before and after training"}
SIDES = {"base": "without the adapter", "tuned": "with the adapter", "compare": "without the adapter and with it"}


class Session:
    """A conversation. side: "base", "tuned" or "compare"."""

    def __init__(self, model: Model, side: str, system: str | None, max_new_tokens: int, sampling: Sampling) -> None:
        self.model, self.side = model, side
        self.system = system  # of the conversation, also after /reset
        self.history: list[dict[str, Any]] = []
        self.images: list[str] = []  # files to show with the next line
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}

    def run_command(self, line: str) -> bool:
        """Run a command that begins with a slash. Return False if it ends the chat."""
        command, _, text = line.partition(" ")
        command = {"/bye": "/quit", "/exit": "/quit"}.get(command, command)
        text = text.strip()
        if command in ("/base", "/tuned", "/compare"):
            if not self.model.is_tuned:
                messages.print(f"{command}: this model has no adapter", style="yellow")
            else:
                self._switch_side(command[1:])
            if text:
                self.answer(text, _write)
        elif command == "/adapter":
            self._switch_adapter(text)
        elif command == "/image":
            if Path(text).expanduser().is_file():
                self.images.append(text)
                messages.print(f"image {len(self.images)} of the next line: {text}", style="dim", markup=False)
            else:
                messages.print(f"/image {text}: no such file", style="yellow", markup=False)
        elif command in ("/system", "/reset"):
            self.history, self.images = [], []
            self.system = text if command == "/system" else self.system
        elif command == "/help":
            for name, description in CHAT_COMMANDS.items():
                messages.print(f"{name:9} {description}", markup=False)
        elif command != "/quit":
            messages.print(
                f"no command {command}{suggest(command, CHAT_COMMANDS)}: see /help", style="yellow", markup=False
            )
        return command != "/quit"

    def _switch_side(self, side: str) -> None:
        try:
            if side != "tuned":
                with self.model.base():  # raises if the base of a model whose weights were all trained is gone
                    pass
            self.side = side
        except ModelError as error:
            messages.print(f"/{side}: {error.what}", style="yellow", markup=False)
        sides = SIDES if self.model.adapter is not None else WHOLE_SIDES
        messages.print(f"answers: {sides[self.side]}", style="dim")

    def _switch_adapter(self, name: str) -> None:
        loaded = [self.model.name, *self.model.others] if self.model.adapter is not None else []
        same_folder = [known for known in loaded if Path(known).name == name]
        if name not in loaded and len(same_folder) == 1:  # as the server names it
            name = same_folder[0]
        if name in loaded:
            previous_system = self.model.default_system
            self.model.use(name)
            self.side = "tuned"
            if self.system is None and self.model.default_system != previous_system:
                system = self.model.default_system or "none"
                when = " (used after /reset)" if self.history else ""
                messages.print(f"system prompt, as in training: {system}{when}", style="dim", markup=False)
        elif name:
            known = f"loaded: {', '.join(loaded)}" if loaded else "this model has no adapter"
            message = f"/adapter {name}: not loaded{suggest(name, loaded)}; {known}"
            messages.print(message, style="yellow", markup=False)
        else:
            messages.print("\n".join(loaded) or "this model has no adapter", markup=False)

    def answer(self, text: str, on_text: Callable[[str], None]) -> None:
        """Stream the answer to a line, or print both answers when they are complete ("compare")."""
        if self.side == "compare":
            with status_line("answering without the adapter and with it"):
                base = self._generate(text, "base", None, list(self.history))
                tuned = self._generate(text, "tuned", None, self.history)
            _print_comparison(base, tuned)
            self.images = []
        else:
            with status_line("reading the prompt") if messages.is_terminal else nullcontext() as status:

                def show(piece: str) -> None:
                    if status is not None:
                        status.stop()
                    on_text(piece)

                self._generate(text, self.side, show, self.history)
            self.images = []
            print(flush=True)
            if self.model.was_cut:
                limit = f"--max-new-tokens {self._options['max_new_tokens']}, or the model's context"
                messages.print(f"the answer was cut at its maximum length ({limit})", style="dim")

    def _generate(
        self, text: str, side: str, on_text: Callable[[str], None] | None, history: list[dict[str, Any]]
    ) -> str:
        options = {**self._options, "images": self.images or None, "system": None if history else self.system}
        with self.model.base() if side == "base" else nullcontext():
            return self.model.chat(text, history=history, on_text=on_text, **options)


def chat_in_terminal(
    name: str,
    *,
    system: str | None,
    base: bool,
    max_new_tokens: int,
    sampling: Mapping[str, float | int | None],
    adapters: Sequence[str] = (),
    quantization: str = "auto",
    dtype: str = "auto",
    force: bool = False,
) -> None:
    """Load a model and answer each line of stdin. sampling: None stands for the setting in the model's config."""
    folder = adapter_folder(name)
    if folder is not None and adapter_kind(folder) == "embedder":
        check_adapter_kind(folder, "text")  # raises an error that says what to use
    with status_line("loading the model") as status:
        model = api.load(name, quantization=quantization, dtype=dtype, force=force, progress=status.update)
        for adapter in adapters:
            model.add(adapter, force=force)
    if model.classes is not None:
        if base or system is not None or adapters:
            what = f"{name}: a classifier, which takes no --base, --system or --adapter"
            raise InputError(what, fix="leave them out")
        _classify_lines(model)
        return
    print_notes([*model.notes, *Sampling.notes_on_ignored_settings(model.module.generation_config)])
    if base and not model.is_tuned:
        raise InputError(f"{name}: has no adapter, so --base changes nothing", fix="leave out --base")
    overrides: dict[str, Any] = {field: value for field, value in sampling.items() if value is not None}
    settings = replace(model.sampling, **overrides)
    session = Session(model, "base" if base else "tuned", system, max_new_tokens, settings)
    interactive = sys.stdin.isatty()
    if overrides or settings != Sampling():
        source = "" if overrides else ", from the model's generation config"
        messages.print(f"answers: {settings.describe()}{source}", style="dim")
    if interactive:
        messages.print(
            f"{name}: /help lists commands, an empty line or Ctrl-D ends the chat", style="dim", markup=False
        )
    if system is None and model.default_system is not None:
        messages.print(f"system prompt, as in training: {model.default_system}", style="dim", markup=False)
    for line in _read_lines(interactive):
        try:
            if not line.startswith("/"):
                session.answer(line, _write)
            elif not session.run_command(line):
                return
        except KeyboardInterrupt:  # ends the answer, and the chat where nobody could go on
            if not interactive:
                raise
            messages.print("\n(stopped; Ctrl-C again ends the chat)", style="dim")
        except StropError as error:  # an interactive chat continues after an error
            if not interactive:
                raise
            messages.print("\n".join(error.lines()), style="red", markup=False)


def _classify_lines(model: Model) -> None:
    """Print the classes of each line of stdin with their probabilities, highest first."""
    assert model.classes is not None
    interactive = sys.stdin.isatty()
    print_notes(model.notes)
    if interactive:
        what = f"{model.name}: {len(model.classes.names)} classes; an empty line or Ctrl-D ends"
        messages.print(what, style="dim", markup=False)
    for line in filter(str.strip, _read_lines(interactive)):
        try:
            [result] = model.classify(line)
        except StropError as error:  # such as a text that is too long
            if not interactive:
                raise
            messages.print("\n".join(error.lines()), style="red", markup=False)
            continue
        shares = [f"{name} {share:.1%}" for name, share in list(result["probabilities"].items())[:SHOWN_CLASSES]]
        more = len(model.classes.names) - len(shares)
        found = f"{', '.join(result['labels']) or '(none)'}: " if model.classes.several else ""
        _write(found + ", ".join(shares) + (f", {more} more" if more else "") + "\n")


def _read_lines(interactive: bool) -> Iterator[str]:
    while True:
        if interactive:
            messages.print("> ", end="")
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            return
        text = line.rstrip("\r\n").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if not line or (interactive and not text):
            return
        if text:
            yield text


def _write(text: str) -> None:
    print(escape_control(text) if sys.stdout.isatty() else text, end="", flush=True)


def _print_comparison(base: str, tuned: str) -> None:
    """Print both answers in columns on a terminal, or one after the other into a pipe."""
    if sys.stdout.isatty():
        table = Table("base", "tuned", expand=True)
        table.add_row(Text(base), Text(tuned))
        SafeConsole().print(table)
    else:
        print(f"base: {base}\ntuned: {tuned}", flush=True)
