"""Commands for other tools and clusters: import and launch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from strop.cli.options import DevicesPerMachine, Json, Machines
from strop.display.tables import command_name, console, messages, print_json
from strop.errors import FolderError

if TYPE_CHECKING:
    from strop.interop.job import JobFile

JobRecipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Cores = Annotated[int, typer.Option(min=1, help="CPU cores per device.")]
RunOut = Annotated[str | None, typer.Option(help="Run folder; default: the recipe's, else runs/NAME-N.")]
JobOut = Annotated[
    Path | None, typer.Option("--file", help="Job file to write; default: named after the run, in this folder.")
]
Replace = Annotated[bool, typer.Option("--force", help="Replace an existing job file.")]


def import_(
    tool: Annotated[
        str, typer.Argument(metavar="TOOL", help="axolotl, llamafactory, trl, unsloth, torchtune or swift.")
    ],
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="YAML config; for trl and unsloth a script or notebook, which is not run."),
    ],
    out: Annotated[Path | None, typer.Option(help="Recipe file to write; default: print the recipe.")] = None,
    as_json: Json = False,
) -> None:
    """Convert another tool's config to a recipe, and list the settings that have no equivalent."""
    from strop.interop.draft import REQUIRED_OPTIONS, import_config
    from strop.runs.folder import write_atomic

    imported = import_config(tool, file)
    if out is not None:
        if out.exists():
            raise FolderError(f"{out}: already exists", fix="give another name with --out")
        try:
            write_atomic(out, imported.to_yaml())
        except OSError as error:
            fix = "give a file in a writable folder with --out"
            raise FolderError(f"{out}: cannot be written: {error.strerror}", fix=fix) from None
    elif not as_json:
        print(imported.to_yaml(), end="")
    messages.print(f"[bold]imported[/] {len(imported.draft.fields)} fields")
    for title, color, notes in (
        ("new meaning", "yellow", imported.draft.differs),
        ("no equivalent", "red", imported.draft.unsupported),
        ("no effect", "dim", imported.draft.ignored),  # on the trained weights
    ):
        for note in notes if out else ():  # a printed recipe contains the notes as comments
            location = f"{note.key}, line {note.line}" if note.line else note.key
            messages.print(f"[{color}]{title:13} [/]{escape(location)}{': ' * bool(note.text)}{escape(note.text)}")
    missing = "".join(f" {' '.join(REQUIRED_OPTIONS[field])}" for field in imported.missing)
    recipe = shlex.quote(str(out)) if out else "RECIPE.yaml"
    messages.print(f"next     {command_name()} train {recipe}{missing} --print-recipe", markup=False)
    print_json({**imported.as_json(), "out": str(out) if out else None, "recipe": imported.to_yaml()}, as_json)


def slurm(
    recipe: JobRecipe, nodes: Machines = 1, devices: DevicesPerMachine = 1, cores: Cores = 4,
    time: Annotated[str, typer.Option(help="Time limit: minutes, H:MM:SS or D-HH:MM:SS.")] = "24:00:00",
    out: RunOut = None, file: JobOut = None, force: Replace = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Write a Slurm batch script that saves before the time limit and resumes when it is requeued."""
    from strop.interop.job import make_job, write_slurm_job

    job = make_job(recipe, nodes=nodes, devices=devices, cores=cores, out=out)
    _print_job_file(write_slurm_job(job, file, time=time, force=force), as_json)


def ray(
    recipe: JobRecipe, nodes: Machines = 1, devices: DevicesPerMachine = 1, cores: Cores = 4, out: RunOut = None,
    file: JobOut = None, force: Replace = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Write a Python file for Ray Train that restarts lost workers."""
    from strop.interop.job import make_job, write_ray_job

    job = make_job(recipe, nodes=nodes, devices=devices, cores=cores, out=out)
    _print_job_file(write_ray_job(job, file, force=force), as_json)


def kubernetes(
    recipe: JobRecipe,
    image: Annotated[str, typer.Option(help="Container image that contains strop.")],
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim with the data, and for the run folder.")],
    nodes: Machines = 1, devices: DevicesPerMachine = 1, cores: Cores = 4, out: RunOut = None, file: JobOut = None,
    force: Replace = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Write a TrainJob for Kubeflow Trainer v2, with the recipe in a ConfigMap."""
    from strop.interop.job import make_job, write_kubernetes_job

    job = make_job(recipe, nodes=nodes, devices=devices, cores=cores, out=out)
    _print_job_file(write_kubernetes_job(job, file, image=image, claim=claim, force=force), as_json)


def skypilot(
    recipe: JobRecipe,
    bucket: Annotated[
        str | None, typer.Option(help="Bucket for the run folder, created if missing; one node only.")
    ] = None,
    volume: Annotated[str | None, typer.Option(help="Volume for the run folder, for any number of nodes.")] = None,
    gpus: Annotated[str | None, typer.Option(help="GPU type in SkyPilot's naming, such as H100.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Use spot instances: cheaper, but may be preempted.")] = False,
    nodes: Machines = 1, devices: DevicesPerMachine = 1, cores: Cores = 4, out: RunOut = None, file: JobOut = None,
    force: Replace = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Write a managed job for SkyPilot that resumes on other machines after a preemption."""
    from strop.interop.job import make_job, write_skypilot_job

    job = make_job(recipe, nodes=nodes, devices=devices, cores=cores, out=out)
    written = write_skypilot_job(job, file, gpus=gpus, bucket=bucket, volume=volume, spot=spot, force=force)
    _print_job_file(written, as_json)


def _print_job_file(written: JobFile, as_json: bool) -> None:
    job = written.job
    console.print(f"[bold]job[/]      {job.size}; run folder: {escape(job.out)}")
    for name in written.needs:
        console.print(f"[yellow]needed[/]   on the cluster: {escape(name)}")
    console.print(f"[bold]wrote[/]    {escape(str(written.file))}\nnow:\n  {escape(written.submit)}")
    print_json(written.as_json(), as_json)
