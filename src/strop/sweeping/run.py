"""Start, resume or join a sweep."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from strop.display.tables import Printed
from strop.distributed.devices import find_ranks
from strop.errors import FolderError, InputError, RecipeError
from strop.runs.folder import next_numbered, read_json, suggest_new, write_atomic, write_json
from strop.sweeping.loop import STATE_FILE, Progress, SweepFolder
from strop.sweeping.plan import Planner, SweepPlan, check_fits, plan_sweep
from strop.sweeping.ray_tune import check_ray, run_slots
from strop.sweeping.request import Request, SweepOptions, make_request
from strop.sweeping.space import apply_setting, as_yaml, corners, given_values
from strop.sweeping.split import Split, data_options, split_rows
from strop.sweeping.study import check_optuna
from strop.sweeping.tables import describe_plan, print_sweep

VERSION = 1


class Sweep(Printed):
    """A sweep.

    Attributes:
        folder: the folder of the sweep.
        state: the contents of sweep.json.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder, self.state = folder, state

    @property
    def result(self) -> dict[str, Any] | None:
        """The comparison of the settings and the final check, or None before the end."""
        result: dict[str, Any] | None = self.state["result"]
        return result

    def __fspath__(self) -> str:
        return str(self.folder)

    def _print(self, out: Any) -> None:
        print_sweep(self.state, out)


def run_sweep(
    path: Path | None, over: Mapping[str, Any] | None, values: Mapping[str, Any], options: SweepOptions,
    memory: int | str | None, resume_existing: bool, progress: Progress, ray: bool = False,
) -> Sweep:  # fmt: skip
    """Start or resume a sweep, and work on it until it is finished; `sweep` documents the arguments."""
    check_optuna()
    if ray:
        check_ray()
    if find_ranks() is not None:
        fix = "start one process on each machine, without a launcher: they share the folder"
        raise InputError("sweep: trials run on one device each", fix=fix)
    if path is not None and is_sweep(path):
        if not resume_existing:
            raise FolderError(f"{path}: contains a sweep", fix=f"resume it with `strop sweep --resume {path}`")
        if over or values or options != SweepOptions():
            raise RecipeError(f"{path}: a sweep keeps its options", fix=f"strop sweep --resume {path}")
        folder = open_sweep(path, memory, progress)
    else:
        request = make_request(path, over, values, options)
        out = Path(os.path.expanduser(request.resolved.recipe.out or next_numbered(Path("runs"), "sweep")))
        if is_sweep(out):
            if not resume_existing:
                fix = f"resume it with `strop sweep --resume {shlex.quote(str(out))}`"
                fix = f"{fix}, or give another folder, such as {suggest_new(out)}"
                raise FolderError(f"{out}: contains a sweep", fix=fix)
            folder = open_sweep(out, memory, progress)
            folder.check_same(request)
        else:
            folder = create_sweep(out, request, memory, progress)
    folder.write_state()
    if ray and folder.state["result"] is None:
        run_slots(folder, partial(_do_step, folder.path, memory), progress)
    return Sweep(folder.path, folder.work())


def _do_step(path: Path, memory: int | str | None) -> bool:
    return open_sweep(path, memory, Progress()).step()


def is_sweep(path: Path) -> bool:
    return (path / STATE_FILE).is_file()


def create_sweep(out: Path, request: Request, memory: int | str | None, progress: Progress) -> SweepFolder:
    """Split the rows, plan all trials, and write the folder of a sweep. Nothing is left of a sweep that is refused."""
    allowed = {"data", "recipe.yaml", ".sweep.lock", ".create.lock"}
    if out.is_dir() and any(entry.name not in allowed and not entry.name.startswith(".") for entry in out.iterdir()):
        raise FolderError(f"{out}: is not empty", fix=f"give another folder, such as {suggest_new(out)}")
    existed = out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".create.lock"):
        if not is_sweep(out):  # another process may have created it
            try:
                prepared = prepare(request, out / "data", memory, progress)
                check_fits(prepared.plan)
                write_atomic(out / "recipe.yaml", as_yaml(given_values(request.resolved)))
                state = {
                    "version": VERSION, "request": request.as_json(), "split": prepared.split.as_json(),
                    "plan": prepared.plan.as_json(), "default": request.default, "metric": request.options.metric,
                    "trials": [], "selection": None, "final": [], "result": None,
                }  # fmt: skip
                write_json(out / STATE_FILE, state)
            except BaseException:
                if not existed:
                    shutil.rmtree(out, ignore_errors=True)
                raise
    return SweepFolder(out, request, memory, progress)


@dataclass(frozen=True)
class Prepared:
    split: Split
    plan: SweepPlan


def prepare(request: Request, folder: Path, memory: int | str | None, progress: Progress) -> Prepared:
    """Split the rows into `folder`, plan all settings, and show both."""
    progress.status("reading and checking the rows")
    options = request.options
    split = split_rows(request.resolved, folder, selection=options.selection, test=options.test, metric=options.metric)
    progress.status("planning the trials")
    planner = Planner(apply_setting(request.resolved, data_options(split, request.resolved.recipe.data)), memory)
    settings = [{}, *(request.points if request.sampler == "grid" else corners(request.space))]
    plan = plan_sweep(planner, settings, request.trials, options.seeds)

    for line in describe_plan(request, split, plan):
        progress.line(line)
    return Prepared(split, plan)


def dry_run(request: Request, memory: int | str | None, progress: Progress) -> Prepared:
    """Plan a sweep without a folder."""
    with tempfile.TemporaryDirectory(prefix="strop-sweep-") as folder:
        return prepare(request, Path(folder), memory, progress)


def open_sweep(path: Path, memory: int | str | None, progress: Progress) -> SweepFolder:
    """Open an existing sweep. Raises InputError if its data files have changed."""
    state = read_json(path / STATE_FILE)
    if state.get("version") != VERSION:
        raise FolderError(f"{path / STATE_FILE}: damaged, or of another version of strop", fix="start a new sweep")
    saved = state["request"]
    over = {
        field: values["choices"] if "choices" in values else (values["low"], values["high"])
        for field, values in saved["over"].items()
    }
    names = SweepOptions.__dataclass_fields__
    options = SweepOptions(**{name: saved[name] for name in names})
    request = make_request(path / "recipe.yaml", over, {}, options)
    folder = SweepFolder(path, request, memory, progress)
    folder.check_same(request)
    return folder
