"""Commands that train: train, resume and demo."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from strop import api
from strop.cli.options import Devices, Json, Memory, RecipeOrModel, console_for, is_main_process, read_argument
from strop.display.tables import command_name, console, messages, print_json, print_run_summary
from strop.display.terminal import generation_progress, run_progress
from strop.engine.kernels import warmup
from strop.errors import Stopped


def train(
    recipe: RecipeOrModel = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print every value with its origin, without training.")
    ] = False,
    resume_existing: Annotated[
        bool, typer.Option("--resume", help="Resume the run if --out already contains it, for restarted jobs.")
    ] = False,
    devices: Devices = None,
    memory: Memory = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Fine-tune a model and write a run folder."""
    from strop.config.load import resolve
    from strop.distributed.launch import count_processes, launch_processes

    file, options = read_argument(recipe, "model.name", options)
    resolved = resolve(file, options)
    if not print_recipe:
        api.check_recipe_inputs(resolved.recipe, resume_existing)
    num_processes = count_processes(devices, resolved.recipe.model.device)
    if print_recipe:
        from strop.machine.memory import parse_memory

        warmup.load(None)
        from strop.training.preflight import preview

        complete = preview(resolved, memory=parse_memory(memory), devices=num_processes or 1)
        if as_json:
            choices = [asdict(choice) for choice in complete.choices.values()]
            print_json({"recipe": complete.recipe.model_dump(), "choices": choices}, as_json)
        else:
            print(complete.as_yaml(), end="")
        return
    if num_processes:
        launch_processes(num_processes, sys.argv[1:])
        return
    is_main = is_main_process()
    with run_progress(console_for(is_main)) as progress:
        warmup.load(warmup.TRAIN if is_main else None)
        run = api.train(
            file, callback=progress, progress=False, memory=memory, resume_existing=resume_existing, **options
        )
    if is_main:
        print_run_summary(run.report, as_json)


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            help="What may differ from the start of the run: lr, schedule, base, data, template, versions, or a field."
        ),
    ] = None,
    devices: Devices = None,
    memory: Memory = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Resume a run from its newest complete checkpoint; recipe flags change values that --allow-changed names."""
    from strop.config.load import read_resolved
    from strop.distributed.launch import count_processes, launch_processes
    from strop.runs.folder import open_run

    folder = open_run(run)
    device = read_resolved(folder.recipe).recipe.model.device if devices else "auto"
    if num_processes := count_processes(devices, device):
        launch_processes(num_processes, sys.argv[1:])
        return
    is_main, was_finished = is_main_process(), folder.finished
    with run_progress(console_for(is_main)) as progress:
        warmup.load(warmup.TRAIN if is_main else None)
        changes = options or {}
        resumed = api.resume(
            run, callback=progress, progress=False, allow_changed=allow_changed or (), memory=memory, **changes
        )
    if is_main:
        if was_finished:
            messages.print(f"{run} is finished; nothing to resume", markup=False)
        print_run_summary(resumed.report, as_json)


@contextmanager
def _continued_by(words: Sequence[str], folder: Path) -> Iterator[None]:
    """After Ctrl-C, name what is kept, and the command that continues."""
    from strop.runs.folder import is_run

    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        kept = f"the training up to the last save is kept in {folder}" if is_run(folder) else "training had not begun"
        what = error.what if isinstance(error, Stopped) else f"stopped; {kept}"
        raise Stopped(what, fix=f"continue with `strop {shlex.join(words)}`") from None


def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/demo-N.")] = None, as_json: Json = False
) -> None:
    """Fine-tune a small real model on this CPU in minutes, and compare it with its base."""
    from strop.demo import data_files
    from strop.evaluation.tables import print_samples, print_scores
    from strop.runs.folder import RunFolder, is_run, next_numbered

    train_file, eval_file = data_files()
    fresh = next_numbered(Path("runs"), "demo")
    newest = fresh.with_name(f"demo-{int(fresh.name.removeprefix('demo-')) - 1}")
    folder = out or newest
    evaluation = RunFolder(folder).read_report().get("evaluation") or {"interrupted": ""}
    is_resumed = is_run(folder) and bool({"interrupted", "unfinished"} & evaluation.keys())
    if is_resumed:
        text = f"resuming {folder}, which was interrupted; to start afresh: {command_name()} demo --out {fresh}"
        messages.print(text, markup=False)
    else:
        folder = out or fresh
    with _continued_by(["demo", *(["--out", str(out)] if out else [])], folder):
        with run_progress() as progress:
            warmup.load()
            run = api.train(
                model="demo", data=train_file, out=folder, callback=progress, progress=False, resume_existing=is_resumed
            )
        messages.print(f"trained  {run.report['seconds']:.0f} s, {run.report['tokens_per_s']:.0f} tokens/s")
        with generation_progress() as advance:
            result = api.evaluate(folder, eval_file, metric="exact_json", general=True, progress=advance)
        from strop.evaluation.run import why_incomplete

        if unfinished := why_incomplete(result):
            raise Stopped(f"stopped: interrupted {unfinished}")
    samples = result["samples"]
    print_samples(samples[:: max(1, len(samples) // 3)][:3])  # spread over the rows
    print_scores(result)
    general = result["general"]
    right = f"{general['base']:.0%} right before, {general['tuned']:.0%} after"
    console.print(f"{general['rows']} general questions: {right} (docs/keep.md)")
    console.print(
        f"\nwrote    {folder}/adapter (PEFT format)\n         {folder}/report.html\n         {folder}/report.json"
    )
    command = command_name()
    messages.print(
        f"\nchat with it:\n  {command} chat {folder}\n"
        "train on your own data:\n"
        f"  {command} check --model demo --data YOURS.jsonl --show 3\n"
        f"  {command} train --model demo --data YOURS.jsonl --out {folder.parent}/mine",
        markup=False,
    )
    print_json(result, as_json)
