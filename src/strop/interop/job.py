"""Describe a cluster job and write its file. Job files are plain text: no SDK and no torch are needed."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from strop.config.load import resolve
from strop.config.schema import Recipe
from strop.errors import DeviceError, FolderError, RecipeError
from strop.runs.folder import next_numbered, write_atomic

LONGEST_NAME = 40  # Kubernetes allows 63 characters and appends suffixes such as -node-0-0-abcde


@dataclass(frozen=True)
class Job:
    """A recipe to run on several nodes."""

    name: str  # letters, digits and dashes
    recipe: str  # relative to `folder`, as `out`
    folder: Path
    out: str
    nodes: int
    devices: int  # per node
    cores: int  # per device
    gpus: bool  # devices are GPUs, not CPU processes
    needs: tuple[str, ...]  # files that the recipe refers to

    @property
    def words(self) -> list[str]:
        """Return the arguments of `python -m strop.cli` for every rank; the same at each restart."""
        return ["train", self.recipe, f"--out={self.out}", "--resume"]

    @property
    def size(self) -> str:
        kind = "GPU" if self.gpus else "CPU process"
        return f"{_count(self.nodes, 'node')} with {_count(self.devices, kind)} each"


@dataclass(frozen=True)
class Launched:
    """A written job file, the command that submits it, and the files that must exist where it runs."""

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


def make_job(recipe: Path, *, nodes: int, devices: int, cores: int, out: str | None) -> Job:
    """Validate a recipe and fix its run folder, so that a restarted job resumes the same run."""
    resolved = resolve(recipe).recipe
    device = resolved.model.device
    if device == "mps":
        what = "model.device mps: jobs run on CUDA GPUs or CPUs"
        raise DeviceError(what, fix="set model.device to cuda, cpu or auto")
    if device.startswith("cuda:") and nodes * devices > 1:
        raise DeviceError(f"model.device {device}: names a single GPU", fix="set model.device to cuda")
    path = os.path.relpath(recipe)
    folder = out or resolved.out or str(next_numbered(Path("runs"), _name(recipe.stem)))
    return Job(
        name=_name(Path(folder).name), recipe=f"./{path}" if path.startswith("-") else path, folder=Path.cwd(),
        out=folder, nodes=nodes, devices=devices, cores=cores, gpus=device != "cpu", needs=_local_files(resolved),
    )  # fmt: skip


def write(job: Job, file: Path, text: str, submit: str, *, force: bool, needs: tuple[str, ...] = ()) -> Launched:
    """Write a job file. Raises FolderError if it exists or is a folder, RecipeError for a path that is not UTF-8."""
    if file.is_dir():
        raise FolderError(f"{file}: is a folder", fix="give --file the name of a file")
    if file.exists() and not force:
        raise FolderError(f"{file}: already exists", fix="give --file another name, or --force to replace it")
    if not file.parent.is_dir():
        raise FolderError(f"{file.parent}: no such folder", fix="create it, or give --file another name")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RecipeError(f"{job.folder / job.recipe!r}: not a name in UTF-8", fix="rename the file") from None
    try:
        write_atomic(file, text)
    except OSError as error:
        raise FolderError(f"{file}: cannot be written: {error.strerror}", fix="give --file another name") from None
    return Launched(file, submit, job, needs)


def quote_path(path: Path) -> str:
    """Quote a path for a command line."""
    word = str(path)
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def quote_words(arguments: list[str], indent: str = "    ") -> str:
    """Quote the words of a command, one per line with continuations."""
    return f" \\\n{indent}".join(shlex.quote(word) for word in arguments)


def require_relative_out(job: Job, where: str) -> None:
    """Raise RecipeError if the run folder is an absolute path of this machine."""
    if Path(job.out).expanduser().is_absolute() or ".." in Path(job.out).parts:  # ~ is another home folder there
        what = f"--out {job.out}: the run folder is stored {where}"
        raise RecipeError(what, fix=f"give a relative path: --out runs/{job.name}")


def _name(text: str) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST_NAME].strip("-")
    return plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")


def _local_files(recipe: Recipe) -> tuple[str, ...]:
    """Return the files, folders and matching patterns on this disk that the recipe refers to."""
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


class BlockText(str):
    """Text that YAML writes as a literal block where possible."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)  # indent lists below their key


def _represent_str(dumper: _Dumper, value: str) -> Any:
    """Use double quotes for text with YAML 1.1's further line breaks, which PyYAML preserves only there."""
    breaks = any(mark in value for mark in "\x85\u2028\u2029")
    style = '"' if breaks else "|" if isinstance(value, BlockText) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style=style)


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(BlockText, _represent_str)


def dump_with_comments(tree: Mapping[str, Any], comments: Mapping[tuple[str, ...], str]) -> str:
    """Return a YAML document with comments above keys, given by their path (list positions as text)."""
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    lines = text.removesuffix("\n").split("\n")
    places = dict(_key_positions(yaml.compose(text, Loader=yaml.SafeLoader), ()))
    for path in sorted(comments, key=lambda path: places[path], reverse=True):
        line, column = places[path]
        lines[line:line] = [f"{' ' * column}# {comment}" for comment in comments[path].splitlines()]
    return "\n".join(lines) + "\n"


def _key_positions(node: Any, path: tuple[str, ...]) -> Any:
    """Yield (path, (line, column)) for every key."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            yield inner, (key.start_mark.line, key.start_mark.column)
            yield from _key_positions(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _key_positions(value, (*path, str(number)))
