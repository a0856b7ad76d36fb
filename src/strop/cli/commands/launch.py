"""`strop launch`: job files for clusters, as a person would have written them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strop.cli.options import Json
from strop.cli.terminal import console, print_json

if TYPE_CHECKING:
    from strop.interop.job import Job, Launched

Given = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Nodes = Annotated[int, typer.Option(min=1, help="Machines.")]
Devices = Annotated[int, typer.Option(min=1, help="Devices of each machine: cards, or processes on a CPU.")]
Cores = Annotated[int, typer.Option(min=1, help="Cores of each device.")]
Out = Annotated[str | None, typer.Option(help="The run folder; default: the recipe's, else runs/NAME-N.")]
File = Annotated[Path | None, typer.Option("--file", help="The job file; default: by the run's name, in this folder.")]
Replace = Annotated[bool, typer.Option("--force", help="Replace a job file that is there.")]


def slurm(
    recipe: Given,
    nodes: Nodes = 1,
    devices: Devices = 1,
    cores: Cores = 4,
    time: Annotated[str, typer.Option(help="Time limit: minutes, H:MM:SS or D-HH:MM:SS.")] = "24:00:00",
    out: Out = None,
    file: File = None,
    force: Replace = False,
    as_json: Json = False,
) -> None:
    """Write a batch script for Slurm: saves before its time is up, and goes on in the next turn."""
    from strop.interop import slurm as system

    job = _job(recipe, nodes, devices, cores, out)
    _tell(system.launch(job, file, time=time, force=force), as_json)


def ray(
    recipe: Given,
    nodes: Nodes = 1,
    devices: Devices = 1,
    cores: Cores = 4,
    out: Out = None,
    file: File = None,
    force: Replace = False,
    as_json: Json = False,
) -> None:
    """Write a Python file for Ray Train: workers that are lost are started again."""
    from strop.interop import ray as system

    job = _job(recipe, nodes, devices, cores, out)
    _tell(system.launch(job, file, force=force), as_json)


def kubernetes(
    recipe: Given,
    image: Annotated[str, typer.Option(help="Container image with strop in it.")],
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim with the data; the run folder goes there.")],
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
    _tell(system.launch(job, file, image=image, claim=claim, force=force), as_json)


def skypilot(
    recipe: Given,
    bucket: Annotated[
        str | None, typer.Option(help="Bucket for the run folder; made where it is not there. One node.")
    ] = None,
    volume: Annotated[str | None, typer.Option(help="Volume for the run folder, of any number of nodes.")] = None,
    gpus: Annotated[str | None, typer.Option(help="SkyPilot's name of the card, such as H100.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Cheaper machines, which may be taken away.")] = False,
    nodes: Nodes = 1,
    devices: Devices = 1,
    cores: Cores = 4,
    out: Out = None,
    file: File = None,
    force: Replace = False,
    as_json: Json = False,
) -> None:
    """Write a managed job for SkyPilot: goes on elsewhere when its machines are taken away."""
    from strop.interop import skypilot as system

    job = _job(recipe, nodes, devices, cores, out)
    _tell(system.launch(job, file, gpus=gpus, store=system.Store(bucket, volume), spot=spot, force=force), as_json)


def _job(recipe: Path, nodes: int, devices: int, cores: int, out: str | None) -> Job:
    from strop.config.load import resolve
    from strop.interop.job import make_job
    from strop.objectives.table import check_devices

    check_devices(resolve(recipe).recipe.train, nodes * devices)
    return make_job(recipe, nodes=nodes, devices=devices, cores=cores, out=out)


def _tell(launched: Launched, as_json: bool) -> None:
    job = launched.job
    console.print(f"[bold]job[/]      {job.size}; run folder: ", end="")
    console.print(job.out, markup=False)
    for name in launched.needs:
        console.print("[yellow]needed[/]   where the job runs: ", end="")
        console.print(name, markup=False)
    console.print("[bold]written[/]  ", end="")
    console.print(str(launched.file), markup=False)
    console.print("now:")
    console.print(f"  {launched.submit}", markup=False, soft_wrap=True)
    print_json(launched.as_json(), as_json)
