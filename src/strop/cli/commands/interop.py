"""Commands for other tools and clusters: import and launch."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from strop.cli.options import Json
from strop.cli.tables import command_name, console, print_json
from strop.errors import FolderError


def import_(
    peer: Annotated[str, typer.Argument(metavar="TOOL", help="axolotl, llamafactory, trl, unsloth or torchtune.")],
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="YAML config; for trl and unsloth a script or notebook, which is not run."),
    ],
    out: Annotated[Path | None, typer.Option(help="Recipe file to write; default: print the recipe.")] = None,
    as_json: Json = False,
) -> None:
    """Convert another tool's config to a recipe, and list the settings that have no equivalent."""
    from strop.interop.draft import MISSING, import_config
    from strop.runs.folder import write_atomic

    imported = import_config(peer, file)
    if out is not None:
        if out.exists():
            raise FolderError(f"{out}: already exists", fix="give --out another name")
        try:
            write_atomic(out, imported.to_yaml())
        except OSError as error:
            fix = "give --out a file in a writable folder"
            raise FolderError(f"{out}: cannot be written: {error.strerror}", fix=fix) from None
    elif not as_json:
        print(imported.to_yaml(), end="")
    console.print(f"[bold]taken[/]    {len(imported.draft.fields)} fields")
    for title, color, notes in (
        ("differs", "yellow", imported.draft.differs),
        ("left out", "red", imported.draft.unsupported),
        ("own way", "dim", imported.draft.ignored),
    ):
        for note in notes if out else ():  # a printed recipe lists them itself
            place = f"{note.key}, line {note.line}" if note.line else note.key
            console.print(f"[{color}]{title:8} [/]{escape(place)}{': ' * bool(note.text)}{escape(note.text)}")
    flags = {"model.name": "--model", "data.train": "--data"}
    missing = "".join(f" {flags[name]} {MISSING[name]}" for name in imported.missing)
    recipe = shlex.quote(str(out)) if out else "RECIPE.yaml"
    console.print(f"next     {command_name()} train {recipe}{missing} --print-recipe", markup=False)
    print_json({**imported.as_json(), "out": str(out) if out else None, "recipe": imported.to_yaml()}, as_json)


def _write_job(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")],
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    devices: Annotated[int, typer.Option(min=1, help="Devices per machine: GPUs, or processes on a CPU.")] = 1,
    cores: Annotated[int, typer.Option(min=1, help="CPU cores per device.")] = 4,
    out: Annotated[str | None, typer.Option(help="Run folder; default: the recipe's, else runs/NAME-N.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Job file to write; default: named after the run, in this folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing job file.")] = False,
    as_json: Json = False,
    *,
    write: Callable[..., Any],
) -> None:
    from strop.config.load import resolve
    from strop.interop.job import make_job
    from strop.objectives.table import check_devices

    check_devices(resolve(recipe).recipe.train, nodes * devices)
    job = make_job(recipe, nodes=nodes, devices=devices, cores=cores, out=out)
    launched = write(job, file, force=force)
    console.print(f"[bold]job[/]      {job.size}; run folder: {escape(job.out)}")
    for name in launched.needs:
        console.print(f"[yellow]needed[/]   on the cluster: {escape(name)}")
    console.print(f"[bold]wrote[/]    {escape(str(launched.file))}\nnow:\n  {escape(launched.submit)}")
    print_json(launched.as_json(), as_json)


def _job_command(after: str) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Decorate a function that writes a job file: its options follow the option `after` of `_write_job`."""

    def decorate(write: Callable[..., Any]) -> Callable[..., None]:
        shared = [p for p in inspect.signature(_write_job, eval_str=True).parameters.values() if p.name != "write"]
        own = [p for p in inspect.signature(write, eval_str=True).parameters.values() if p.name not in ("job", "how")]
        position = [p.name for p in shared].index(after) + 1
        parameters = [*shared[:position], *own, *shared[position:]]

        @functools.wraps(write)
        def run(**values: Any) -> None:
            options = {p.name: values.pop(p.name) for p in own}
            _write_job(**values, write=functools.partial(write, **options))

        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in keywords}
        return run

    return decorate


@_job_command(after="cores")
def slurm(
    *job: Any,
    time: Annotated[str, typer.Option(help="Time limit: minutes, H:MM:SS or D-HH:MM:SS.")] = "24:00:00",
    **how: Any,
) -> Any:
    """Write a Slurm batch script that saves before the time limit and resumes when it is requeued."""
    from strop.interop.job import launch_slurm

    return launch_slurm(*job, time=time, **how)


@_job_command(after="recipe")
def ray(*job: Any, **how: Any) -> Any:
    """Write a Python file for Ray Train that restarts lost workers."""
    from strop.interop.job import launch_ray

    return launch_ray(*job, **how)


@_job_command(after="recipe")
def kubernetes(
    *job: Any,
    image: Annotated[str, typer.Option(help="Container image that contains strop.")],
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim with the data, and for the run folder.")],
    **how: Any,
) -> Any:
    """Write a TrainJob for Kubeflow Trainer v2, with the recipe in a ConfigMap."""
    from strop.interop.job import launch_kubernetes

    return launch_kubernetes(*job, image=image, claim=claim, **how)


@_job_command(after="recipe")
def skypilot(
    *job: Any,
    bucket: Annotated[
        str | None, typer.Option(help="Bucket for the run folder, created if missing; one node only.")
    ] = None,
    volume: Annotated[str | None, typer.Option(help="Volume for the run folder, for any number of nodes.")] = None,
    gpus: Annotated[str | None, typer.Option(help="GPU type in SkyPilot's naming, such as H100.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Use spot instances: cheaper, but may be preempted.")] = False,
    **how: Any,
) -> Any:
    """Write a managed job for SkyPilot that resumes on other machines after a preemption."""
    from strop.interop.job import launch_skypilot

    return launch_skypilot(*job, gpus=gpus, bucket=bucket, volume=volume, spot=spot, **how)
