"""`strop chat`: talk to a model in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.cli.options import Force, ModelName, Quantization
from strop.cli.progress import status_line
from strop.engine.kernels import warmup


def chat(
    name: ModelName,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Start without the adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Sampling temperature; 0 decodes greedily. Default: from the model's config."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Sample from the most likely tokens with this total probability."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample from this many most likely tokens; 0: from all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of the sampling.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Another run or adapter of the same base, to switch to with /adapter; may be repeated."),
    ] = None,
    quantization: Quantization = "auto",
    force: Force = False,
) -> None:
    """Talk to a model in the terminal, or through a pipe with one line per turn."""
    with status_line("loading the libraries"):
        warmup.load(warmup.DECODE)
        from strop.cli.chat import chat_in_terminal

    chat_in_terminal(
        name, system=system, base=base, max_new_tokens=max_new_tokens,
        sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}, adapters=adapter or (),
        quantization=quantization, force=force,
    )  # fmt: skip
