"""What every job file is made from, and how it gets onto the disk. The files are text: no SDK, no torch."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from strop.config.load import resolve
from strop.config.schema import Recipe
from strop.errors import DeviceError, FolderError, RecipeError
from strop.runs.folder import next_numbered, write_atomic

LONGEST_NAME = 40  # of the 63 characters of a Kubernetes name, which gets endings such as -node-0-0-abcde


@dataclass(frozen=True)
class Job:
    """A recipe on `nodes` machines with `devices` each. recipe, out: paths as seen from `folder`. cores: of a device.

    cards: a device is a card; else it is a process on the CPU. name: letters, digits and dashes alone. needs: its
    recipe's files.
    """

    name: str
    recipe: str
    folder: Path
    out: str
    nodes: int
    devices: int
    cores: int
    cards: bool
    needs: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """What each rank runs, after `python -m strop.cli`. A job that is started again says the same once more."""
        return ["train", self.recipe, f"--out={self.out}", "--resume"]

    @property
    def size(self) -> str:
        kind = "card" if self.cards else "CPU process"
        return f"{_count(self.nodes, 'node')} with {_count(self.devices, kind)} each"


@dataclass(frozen=True)
class Launched:
    """A job file that was written. submit: the command that hands it in. needs: files that must be where it runs."""

    file: Path
    submit: str
    job: Job
    needs: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        job = self.job
        return {
            "file": str(self.file), "submit": self.submit, "nodes": job.nodes, "devices": job.devices, "run": job.out,
            "needs": list(self.needs),
        }  # fmt: skip


def job_of(recipe: Path, *, nodes: int, devices: int, cores: int, out: str | None) -> Job:
    """Checks a recipe and names its run folder, so that a job that is started again finds it.

    Raises RecipeError for a recipe that is wrong, DeviceError for one that cannot run on several devices.
    """
    found = resolve(recipe).recipe
    device = found.model.device
    if device == "mps":
        raise DeviceError("model.device mps: a job runs on cards or CPUs", fix="set model.device to cuda, cpu or auto")
    if device.startswith("cuda:") and nodes * devices > 1:
        raise DeviceError(f"model.device {device}: names one card", fix="set model.device to cuda")
    path = os.path.relpath(recipe)
    folder = out or found.out or str(next_numbered(Path("runs"), _name(recipe.stem)))
    return Job(
        name=_name(Path(folder).name),
        recipe=f"./{path}" if path.startswith("-") else path,
        folder=Path.cwd(),
        out=folder,
        nodes=nodes,
        devices=devices,
        cores=cores,
        cards=device != "cpu",
        needs=_files(found),
    )


def write(job: Job, file: Path, text: str, submit: str, *, force: bool, needs: tuple[str, ...] = ()) -> Launched:
    """Raises FolderError where the file is there already or is a folder, RecipeError for a path that is not text."""
    if file.is_dir():
        raise FolderError(f"{file}: is a folder", fix="give --file the name of a file")
    if file.exists() and not force:
        raise FolderError(f"{file}: is there already", fix="give --file another name, or --force to replace it")
    if not file.parent.is_dir():
        raise FolderError(f"{file.parent}: no such folder", fix="make it, or give --file another name")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RecipeError(f"{job.folder / job.recipe!r}: not a name in UTF-8", fix="rename the file") from None
    try:
        write_atomic(file, text)
    except OSError as error:
        raise FolderError(f"{file}: cannot be written: {error.strerror}", fix="give --file another name") from None
    return Launched(file, submit, job, needs)


def shown(path: Path) -> str:
    """A path as a word of a command line."""
    word = str(path)
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def shell(words: list[str], indent: str = "    ") -> str:
    """Words of a command, each on a line of its own, whatever is in them."""
    return f" \\\n{indent}".join(shlex.quote(word) for word in words)


def must_be_relative(job: Job, where: str) -> None:
    """Raises RecipeError for a run folder that is a path of this machine."""
    if Path(job.out).expanduser().is_absolute() or ".." in Path(job.out).parts:  # ~ is a home of the machine there
        raise RecipeError(f"--out {job.out}: the run is kept {where}", fix=f"give a path in it: --out runs/{job.name}")


def _name(text: str) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST_NAME].strip("-")
    return plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")


def _files(recipe: Recipe) -> tuple[str, ...]:
    """Files and folders on this disk that the recipe names; a pattern stands for the files that it finds."""
    data, model, rewards = recipe.data, recipe.model, recipe.train.rewards
    named: list[str | None] = [model.name, model.adapter, data.template]
    for rows in (data.train, data.eval):
        named += [rows] if isinstance(rows, str) else rows or []
    for reward in rewards.split(",") if isinstance(rewards, str) else rewards or []:
        named.append(reward.strip().rpartition(":")[0])
    places = {name: os.path.expanduser(name) for name in named if name}
    return tuple(name for name, place in places.items() if os.path.exists(place) or glob(place, recursive=True))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"
