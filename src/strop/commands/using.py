"""Commands that use what was trained. Heavy imports stay inside."""

from __future__ import annotations

from typing import Annotated

import typer

from strop.flags import Force, Json, ModelName, Quantization
from strop.terminal import answering, print_general, print_json, print_notes, print_samples, print_scores


def evaluate(
    name: ModelName,
    data: Annotated[list[str], typer.Option("--data", help="Rows to answer.")],
    metric: Annotated[str, typer.Option(help="exact, exact_json, contains, regex, or file.py:function.")] = "exact",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 80,
    samples: Annotated[int, typer.Option(min=0, help="Answers to show.")] = 3,
    general: Annotated[bool, typer.Option("--general", help="Ask a general set too: what did training break?")] = False,
    quantization: Quantization = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare base and tuned on rows that were not trained on."""
    from strop.evaluation.run import evaluate_model

    with answering() as advance:
        result = evaluate_model(
            name,
            data,
            metric=metric,
            max_new_tokens=max_new_tokens,
            advance=advance,
            quantization=quantization,
            force=force,
            general=general,
        )
    print_notes(result["notes"])
    print_scores(result)
    if "general" in result:
        print_general(result["general"])
    print_samples(result["samples"][:samples])
    print_json(result, as_json)


def chat(
    name: ModelName,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base, without the adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Sample among the likeliest tokens of this total share.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    quantization: Quantization = "auto",
    force: Force = False,
) -> None:
    """Talk to a model in the terminal, or through a pipe: one line a turn."""
    from strop.chat import converse

    converse(
        name,
        system=system,
        base=base,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        quantization=quantization,
        force=force,
    )
