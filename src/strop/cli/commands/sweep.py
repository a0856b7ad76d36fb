"""The command that compares settings: sweep."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from strop.cli.options import Json, Memory, read_argument
from strop.display.tables import command_name, console, messages, print_json
from strop.display.terminal import StatusLine, activity_messages
from strop.engine.kernels import warmup

QUIET = (30.0,)  # seconds without a line where the output is not a terminal


def sweep(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|SWEEP", help="Recipe file (YAML), a model, or with --resume the folder of a sweep."
        ),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUES",
            help="Values to compare: a list as in lora.r=8,16,32 or a range as in learning_rate=1e-4..1e-3 "
            "(log scale from a factor of 10). Repeat it for several fields.",
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="exact, exact_json, contains, regex, choice or file.py:function; as in strop eval.")
    ] = "exact",
    trials: Annotated[
        int | None, typer.Option(min=2, help="Number of trials, the default included; default: 12, or those of a grid.")
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="grid, random, tpe, or auto: grid if --trials allows all combinations, else tpe.")
    ] = "auto",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the final check on the test rows.")] = 3,
    selection: Annotated[
        str | None, typer.Option(metavar="SHARE|FILE", help="Rows to compare trials on; default: the recipe's, or 15%.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="SHARE|FILE", help="Rows of the final check; default: 15%.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="End trials early whose evaluation loss is high (successive halving).")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = None,
    resume_existing: Annotated[
        bool, typer.Option("--resume", help="Resume or join the sweep in --out, or in the folder given as SWEEP.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run the trials with Ray Tune, one on each node or GPU of the cluster.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, without training.")] = False,
    memory: Memory = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Train with several settings, and find out whether one is better than the default."""
    from pathlib import Path

    from strop.sweeping.space import read_over, require_over
    from strop.sweeping.study import check_optuna

    values = read_over(over or [])
    is_folder = recipe is not None and (Path(recipe) / "sweep.json").is_file()
    if not is_folder:
        require_over(values)
    check_optuna()
    file, fields = (Path(str(recipe)), options or {}) if is_folder else read_argument(recipe, "model.name", options)
    status = StatusLine(messages, "loading the libraries", QUIET)
    status.start()
    try:
        warmup.load(None if dry_run else warmup.TRAIN)
        from strop.sweeping import run, tables
        from strop.sweeping.loop import Progress
        from strop.sweeping.plan import check_fits
        from strop.sweeping.request import SweepOptions, make_request

        def show(text: str) -> None:
            messages.print(text, markup=False)
            status.restart_quiet_time()

        chosen = SweepOptions(metric, trials, sampler, selection, test, seeds, prune, max_new_tokens)
        progress, lines = Progress(show, status.update), list[str]()
        if dry_run:
            planning = Progress(lines.append, status.update)
            prepared = run.dry_run(make_request(file, values, fields, chosen), memory, planning)
        else:
            with activity_messages(lambda _: None):
                result = run.run_sweep(file, values, fields, chosen, memory, resume_existing, progress, ray)
    finally:
        status.stop()
    if dry_run:
        console.print("\n".join(lines), markup=False)
        print_json({"plan": prepared.plan.as_json(), "split": prepared.split.as_json()}, as_json)
        check_fits(prepared.plan)
        return
    tables.print_sweep(result.state)
    folder = shlex.quote(str(result.folder))
    messages.print(
        f"\ntrain it on all rows:\n  {command_name()} train {folder}/winner.yaml --out runs/mine", markup=False
    )
    print_json({"sweep": str(result.folder), **result.state}, as_json)
