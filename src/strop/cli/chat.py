"""`strop chat`: a line in, an answer out, streaming; the history is kept until the end of the input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from rich.table import Table

from strop.cli.progress import alive
from strop.cli.terminal import Screen, console, plain, print_notes
from strop.engine.decode.model import Model, load
from strop.engine.decode.sampling import Sampling
from strop.errors import InputError, StropError, nearest

HELP = {
    "/base": "answer without the adapter",
    "/tuned": "answer with the adapter",
    "/compare": "answer each line both ways; the tuned answer stays in the history; text may follow these three",
    "/adapter": "NAME: answer with this adapter; without a name, those that are loaded",
    "/system": "TEXT: start again with this system prompt",
    "/reset": "start again, with the same system prompt",
    "/help": "this list",
    "/quit": "end (so do an empty line and Ctrl-D)",
}
SIDES = {"base": "without the adapter", "tuned": "with the adapter", "compare": "without the adapter and with it"}


class Session:
    """One conversation: who answers, and the history, which is the model's."""

    def __init__(self, model: Model, side: str, system: str | None, max_new_tokens: int, sampling: Sampling) -> None:
        self.model, self.side = model, side
        self.opening = self.system = system
        self._options = {"max_new_tokens": max_new_tokens, "sampling": sampling}

    def command(self, line: str) -> bool:
        """Does what a line that begins with / asks for; False where it asks to end."""
        word, _, rest = line.partition(" ")
        if word in ("/base", "/tuned", "/compare"):
            if self.model.adapter is None:
                console.print(f"{word}: this model has no adapter", style="yellow")
            else:
                self.side = word[1:]
                console.print(f"answers: {SIDES[self.side]}", style="dim")
            if rest.strip():
                self.turn(rest.strip(), _write)
        elif word == "/adapter":
            self._adapter(rest.strip())
        elif word in ("/system", "/reset"):
            self.model.history = []
            self.opening = self.system = rest.strip() if word == "/system" else self.opening
        elif word == "/help":
            for name, text in HELP.items():
                console.print(f"{name:9} {text}", markup=False)
        elif word != "/quit":
            console.print(f"no command {word}{nearest(word, HELP)}: see /help", style="yellow", markup=False)
        return word != "/quit"

    def _adapter(self, name: str) -> None:
        loaded = [self.model.name, *self.model.others] if self.model.adapter is not None else []
        if name in loaded:
            before = self.model.default_system
            self.model.use(name)
            self.side = "tuned"
            if self.opening is None and self.model.default_system != before:
                own = self.model.default_system or "none"
                going = "; this conversation keeps its own: /reset" if self.model.history else ""
                console.print(f"system prompt, as in its training: {own}{going}", style="dim", markup=False)
        elif name:
            what = f"/adapter {name}: not loaded{nearest(name, loaded)}: start with --adapter {name}"
            console.print(what, style="yellow", markup=False)
        else:
            console.print("\n".join(loaded) or "this model has no adapter", markup=False)

    def turn(self, text: str, on_text: Callable[[str], None]) -> None:
        """Answers a line; a comparison is shown when both answers are there."""
        if self.side == "compare":
            before, system = list(self.model.history), self.system
            with alive(console, "answering without the adapter and with it"):
                base = self._answer(text, "base", None)
                self.model.history, self.system = before, system
                tuned = self._answer(text, "tuned", None)
            _show_both(base, tuned)
        else:
            self._answer(text, self.side, on_text)
            print(flush=True)

    def _answer(self, text: str, side: str, on_text: Callable[[str], None] | None) -> str:
        with self.model.base() if side == "base" else nullcontext():
            answer = self.model.chat(text, system=self.system, on_text=on_text, **self._options)  # type: ignore[arg-type]
        self.system = None  # it opened the history
        return answer


def converse(
    name: str,
    *,
    system: str | None,
    base: bool,
    max_new_tokens: int,
    sampling: Mapping[str, float | int | None],
    adapters: Sequence[str] = (),
    quantization: str = "auto",
    force: bool = False,
) -> None:
    """sampling: fields of Sampling by name; None: as in the model's own generation config. adapters: further ones."""
    with alive(console, "loading the model"):
        model = load(name, quantization=quantization, force=force)
        for other in adapters:
            model.add(other, force=force)
    print_notes([*model.notes, *Sampling.notes_on_ignored_settings(model.module.generation_config)])
    if base and model.adapter is None:
        raise InputError(f"{name}: has no adapter, so --base changes nothing", fix="leave --base out")
    side = "base" if base else "tuned"
    chosen: dict[str, Any] = {field: value for field, value in sampling.items() if value is not None}
    drawn = replace(model.sampling, **chosen)
    session = Session(model, side, system, max_new_tokens, drawn)
    interactive = sys.stdin.isatty()
    if chosen or drawn != Sampling():
        console.print(f"answers: {drawn.describe()}{'' if chosen else ', as the model itself asks for'}", style="dim")
    if interactive:
        console.print(f"{name}: /help lists commands, an empty line or Ctrl-D ends", style="dim", markup=False)
    if system is None and model.default_system is not None:
        console.print(f"system prompt, as in training: {model.default_system}", style="dim", markup=False)
    for line in _lines(interactive):
        try:
            if not line.startswith("/"):
                session.turn(line, _write)
            elif not session.command(line):
                return
        except StropError as error:  # a person goes on; a pipe is told that it went wrong
            if not interactive:
                raise
            console.print("\n".join(error.lines()), style="red", markup=False)


def _lines(interactive: bool) -> Iterator[str]:
    while True:
        if interactive:
            console.print("> ", end="")
        line = sys.stdin.readline()
        text = line.rstrip("\r\n").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if not line or (interactive and not text):
            return
        if text:
            yield text


def _write(text: str) -> None:
    print(plain(text) if sys.stdout.isatty() else text, end="", flush=True)


def _show_both(base: str, tuned: str) -> None:
    """Side by side on a terminal; one after the other into a pipe."""
    sides: Mapping[str, str] = {"base": base, "tuned": tuned}
    if sys.stdout.isatty():
        from rich.text import Text

        table = Table(*sides, expand=True)
        table.add_row(*(Text(answer) for answer in sides.values()))
        Screen().print(table)
        return
    for side, answer in sides.items():
        print(f"{side}: {answer}", flush=True)
