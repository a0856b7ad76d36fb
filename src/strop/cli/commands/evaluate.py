"""`strop eval`: compare base and tuned model on the same rows."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from strop import api
from strop.cli.options import Devices, Force, Json, Quantization
from strop.cli.progress import console_for, generation_progress, is_main_process
from strop.cli.tables import print_evaluation, print_json, print_leaderboard, print_notes
from strop.engine.kernels import warmup


def evaluate(
    names: Annotated[
        list[str],
        typer.Argument(metavar="RUN|MODEL...", help="Runs or models to evaluate; several give a leaderboard."),
    ],
    data: Annotated[list[str], typer.Option("--data", help="Rows to evaluate on.")],
    metric: Annotated[
        str,
        typer.Option(help="exact, exact_json, contains, regex, choice, file.py:function; for pairs: preference."),
    ] = "exact",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 80,
    samples: Annotated[int, typer.Option(min=0, help="Number of answers to show.")] = 3,
    general: Annotated[
        bool, typer.Option("--general", help="Also evaluate on a general set, to find what training made worse.")
    ] = False,
    regression_data: Annotated[
        list[str] | None, typer.Option(help="Also evaluate on these rows, which should not get worse.")
    ] = None,
    regression_metric: Annotated[
        str | None, typer.Option(help="Metric of the regression rows; default: as --metric.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="lm-eval task, by name or .yaml file (needs lm-eval); may be repeated.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Number of documents per task.")] = None,
    devices: Devices = None,
    judge: Annotated[
        str | None,
        typer.Option(help="Judge that picks the better answer of base and tuned: file.py:function, or a server's URL."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model of the judge's server.")] = None,
    quantization: Quantization = "auto",
    force: Force = False,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Compare base and tuned model on rows that were not trained on."""
    from strop.distributed.launch import count_processes, launch_processes

    if number := count_processes(devices):
        launch_processes(number, sys.argv[1:])
        return
    main = is_main_process()
    with generation_progress(console_for(main)) as advance:
        warmup.load(warmup.DECODE if main else None)
        result = api.evaluate(
            names if len(names) > 1 else names[0], data, metric=metric, max_new_tokens=max_new_tokens, general=general,
            regression_data=regression_data or (), regression_metric=regression_metric, tasks=tasks or (),
            task_limit=task_limit, judge=judge, judge_model=judge_model, quantization=quantization, force=force,
            progress=advance, **(options or {}),
        )  # fmt: skip
    if not main:
        return
    results = result["runs"] if len(names) > 1 else [result]
    for evaluation in results:
        print_evaluation(evaluation, samples)
    parts = [part for evaluation in results for part in (evaluation, evaluation.get("regression", {}))]
    interrupted = [part["interrupted"] for part in parts if "interrupted" in part]
    print_notes([f"interrupted {when}" for when in interrupted])
    if len(names) > 1:
        print_leaderboard(result["leaderboard"], results[0]["metric"])
    print_json(result, as_json)
    if interrupted:
        raise typer.Exit(130)
