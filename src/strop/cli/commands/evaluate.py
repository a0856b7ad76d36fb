"""`strop eval`: base and tuned on the same rows."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from strop.cli.options import Devices, Force, Json, Quantization
from strop.cli.tables import (
    print_general,
    print_judged,
    print_leaderboard,
    print_rewards,
    print_samples,
    print_scores,
    print_tasks,
)
from strop.cli.terminal import answering, print_json, print_notes, speaker
from strop.engine.kernels import warmup


def evaluate(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN|MODEL...", help="What to evaluate; several make a leaderboard.")
    ],
    data: Annotated[list[str], typer.Option("--data", help="Rows to answer.")],
    metric: Annotated[
        str, typer.Option(help="exact, exact_json, contains, regex, choice, file.py:function; of pairs preference.")
    ] = "exact",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 80,
    samples: Annotated[int, typer.Option(min=0, help="Answers to show.")] = 3,
    general: Annotated[bool, typer.Option("--general", help="Ask a general set too: what did training break?")] = False,
    regression_data: Annotated[list[str] | None, typer.Option(help="Rows of yours that should not get worse.")] = None,
    regression_metric: Annotated[str | None, typer.Option(help="Their metric, where it is another one.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="A task of lm-eval, if installed: its name, or a .yaml file.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="This many documents of each task.")] = None,
    devices: Devices = None,
    judge: Annotated[
        str | None,
        typer.Option(help="Who says which of base's and tuned's answers is better: file.py:function, or URL."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Which of the models of the server at that URL.")] = None,
    quantization: Quantization = "auto",
    force: Force = False,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Compare base and tuned on rows that were not trained on."""
    from strop.distributed.launch import joined, start, to_start

    if number := to_start(devices):
        start(number, sys.argv[1:])
        return
    with joined() as group, answering(speaker(group.main)) as advance:
        warmup.load(warmup.ANSWERS if group.main else None)
        from strop.evaluation.run import EvalOptions, evaluate_models, leaderboard

        chosen = EvalOptions(
            metric=metric,
            max_new_tokens=max_new_tokens,
            quantization=quantization,
            force=force,
            general=general,
            regression_data=regression_data or (),
            regression_metric=regression_metric,
            tasks=tasks or (),
            task_limit=task_limit,
            judge=judge,
            judge_model=judge_model,
            read=options or {},
        )
        results = evaluate_models(names, data, chosen, advance=advance if group.main else None, devices=group)
    if not group.main:
        return
    for result in results:
        print_notes(result["notes"])
        print_scores(result)
        if "rewards" in result:
            print_rewards(result["rewards"])
        if "judge" in result:
            print_judged(result["judge"])
        if "general" in result:
            print_general(result["general"])
        if "regression" in result:
            print_scores(result["regression"], title="rows that should not get worse")
        print_tasks(result.get("tasks", {}))
        print_samples(result["samples"][:samples])
    asked = [part for result in results for part in (result, result.get("regression", {}))]
    interrupted = [part["interrupted"] for part in asked if "interrupted" in part]
    print_notes([f"interrupted {when}" for when in interrupted])
    if len(results) == 1:
        print_json(results[0], as_json)
    else:
        board = leaderboard(results)
        print_leaderboard(board, results[0]["metric"])
        print_json({"runs": results, "leaderboard": board}, as_json)
    if interrupted:
        raise typer.Exit(130)
