"""`strop chat`: a line in, an answer out, streaming; the history is kept until the end of the input."""

from __future__ import annotations

import sys
from contextlib import nullcontext

from strop.adapters import load
from strop.errors import InputError
from strop.model.generate import Sampling
from strop.terminal import console, print_notes


def converse(
    name: str,
    *,
    system: str | None,
    base: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    quantization: str = "auto",
    force: bool = False,
) -> None:
    model = load(name, quantization=quantization, force=force)
    print_notes(model.notes)
    if base and model.adapter is None:
        raise InputError(f"{name}: has no adapter, so --base changes nothing", fix="leave --base out")
    sampling = Sampling(temperature, top_p, seed)
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(f"{name}: empty line or Ctrl-D ends", style="dim", markup=False)
    if system is None and model.default_system is not None:
        console.print(f"system prompt, as in training: {model.default_system}", style="dim", markup=False)
    with model.base() if base else nullcontext():
        while True:
            if interactive:
                console.print("> ", end="")
            line = sys.stdin.readline()
            text = line.rstrip("\n")
            if not line or (interactive and not text):
                return
            if text:
                model.chat(text, system=system, max_new_tokens=max_new_tokens, sampling=sampling, on_text=_write)
                system = None  # it opened the history
                print(flush=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)
