"""`strop chat`: talk to a model in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.cli.options import Force, ModelName, Quantization
from strop.cli.progress import alive
from strop.cli.terminal import console
from strop.engine.kernels import warmup


def chat(
    name: ModelName,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base, without the adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0: greedy. Default, as of the next two: the model's own.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Sample among the likeliest tokens of this total share.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample among this many; 0: among all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A further run or adapter on the same base, for /adapter NAME.")
    ] = None,
    quantization: Quantization = "auto",
    force: Force = False,
) -> None:
    """Talk to a model in the terminal, or through a pipe: one line a turn."""
    with alive(console, "loading the libraries"):
        warmup.load(warmup.DECODE)
        from strop.cli.chat import converse

    converse(
        name,
        system=system,
        base=base,
        max_new_tokens=max_new_tokens,
        sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed},
        adapters=adapter or (),
        quantization=quantization,
        force=force,
    )
