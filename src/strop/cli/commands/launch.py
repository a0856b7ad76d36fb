"""`strop launch`: write job files for clusters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strop.cli.options import Json
from strop.cli.tables import console, print_json

if TYPE_CHECKING:
    from strop.interop.job import Job, Launched

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Nodes = Annotated[int, typer.Option(min=1, help="Number of machines.")]
Devices = Annotated[int, typer.Option(min=1, help="Devices per machine: GPUs, or processes on a CPU.")]
Cores = Annotated[int, typer.Option(min=1, help="CPU cores per device.")]
Out = Annotated[str | None, typer.Option(help="Run folder; default: the recipe's, else runs/NAME-N.")]
File = Annotated[
    Path | None, typer.Option("--file", help="Job file to write; default: named after the run, in this folder.")
]
Replace = Annotated[bool, typer.Option("--force", help="Replace an existing job file.")]


def slurm(
    recipe: RecipePath,
    nodes: Nodes = 1,
    devices: Devices = 1,
    cores: Cores = 4,
    time: Annotated[str, typer.Option(help="Time limit: minutes, H:MM:SS or D-HH:MM:SS.")] = "24:00:00",
    out: Out = None,
    file: File = None,
    force: Replace = False,
    as_json: Json = False,
) -> None:
    """Write a Slurm batch script that saves before the time limit and resumes when it is requeued."""
    from strop.interop import slurm as system

    job = _job(recipe, nodes, devices, cores, out)
    _print_job(system.launch(job, file, time=time, force=force), as_json)


def ray(
    recipe: RecipePath,
    nodes: Nodes = 1,
    devices: Devices = 1,
    cores: Cores = 4,
    out: Out = None,
    file: File = None,
    force: Replace = False,
    as_json: Json = False,
) -> None:
    """Write a Python file for Ray Train that restarts lost workers."""
    from strop.interop import ray as system

    job = _job(recipe, nodes, devices, cores, out)
    _print_job(system.launch(job, file, force=force), as_json)


def kubernetes(
    recipe: RecipePath,
    image: Annotated[str, typer.Option(help="Container image that contains strop.")],
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim with the data, and for the run folder.")],
    nodes: Nodes = 1,
    devices: Devices = 1,
    cores: Cores = 4,
    out: Out = None,
    file: File = None,
    force: Replace = False,
    as_json: Json = False,
) -> None:
    """Write a TrainJob for Kubeflow Trainer v2, with the recipe in a ConfigMap."""
    from strop.interop import kubernetes as system

    job = _job(recipe, nodes, devices, cores, out)
    _print_job(system.launch(job, file, image=image, claim=claim, force=force), as_json)


def skypilot(
    recipe: RecipePath,
    bucket: Annotated[
        str | None, typer.Option(help="Bucket for the run folder, created if missing; one node only.")
    ] = None,
    volume: Annotated[str | None, typer.Option(help="Volume for the run folder, for any number of nodes.")] = None,
    gpus: Annotated[str | None, typer.Option(help="GPU type in SkyPilot's naming, such as H100.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Use spot instances: cheaper, but may be preempted.")] = False,
    nodes: Nodes = 1,
    devices: Devices = 1,
    cores: Cores = 4,
    out: Out = None,
    file: File = None,
    force: Replace = False,
    as_json: Json = False,
) -> None:
    """Write a managed job for SkyPilot that resumes on other machines after a preemption."""
    from strop.interop import skypilot as system

    job = _job(recipe, nodes, devices, cores, out)
    _print_job(system.launch(job, file, gpus=gpus, store=system.Store(bucket, volume), spot=spot, force=force), as_json)


def _job(recipe: Path, nodes: int, devices: int, cores: int, out: str | None) -> Job:
    from strop.config.load import resolve
    from strop.interop.job import make_job
    from strop.objectives.table import check_devices

    check_devices(resolve(recipe).recipe.train, nodes * devices)
    return make_job(recipe, nodes=nodes, devices=devices, cores=cores, out=out)


def _print_job(launched: Launched, as_json: bool) -> None:
    job = launched.job
    console.print(f"[bold]job[/]      {job.size}; run folder: ", end="")
    console.print(job.out, markup=False)
    for name in launched.needs:
        console.print("[yellow]needed[/]   on the cluster: ", end="")
        console.print(name, markup=False)
    console.print("[bold]wrote[/]    ", end="")
    console.print(str(launched.file), markup=False)
    console.print("now:")
    console.print(f"  {launched.submit}", markup=False, soft_wrap=True)
    print_json(launched.as_json(), as_json)
