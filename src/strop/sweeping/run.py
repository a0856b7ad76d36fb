"""Start, resume or join a sweep."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from typing_extensions import Unpack

from strop import api
from strop.config.arguments import public
from strop.config.options import Options
from strop.display.tables import Printed, console
from strop.distributed.devices import find_ranks
from strop.errors import FolderError, InputError, RecipeError
from strop.runs.events import Event
from strop.runs.folder import next_numbered, read_json, write_atomic, write_json
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


@public
def sweep(
    recipe: api.PathLike | None = None,
    *,
    over: Mapping[str, Any] | None = None,
    trials: int | None = None,
    metric: str = "exact",
    sampler: str = "auto",
    selection: str | None = None,
    test: str | None = None,
    seeds: int = 3,
    prune: bool = False,
    max_new_tokens: int | None = None,
    memory: int | str | None = None,
    resume_existing: bool = False,
    ray: bool = False,
    callback: Callable[[Event], None] | None = None,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> Sweep:
    """Train with several settings, and find out whether one is better than the default.

    Rows are split into training, selection and test rows. Trials are compared on the selection rows. The recommended
    setting and the default are trained again with new seeds, and compared once on the test rows.

    Args:
        recipe: path of a recipe file, or of a sweep folder to resume.
        over: values by recipe field: a list of choices such as `[8, 16, 32]`, or a range as a tuple of two numbers.
        trials: number of trials. The first one is the recipe without changes. Default: 12, or those of a grid.
        metric: as in `evaluate`.
        sampler: "grid", "random", "tpe", or "auto": grid if `trials` allows all combinations, else TPE.
        selection: share of the rows such as "15%", or a file, on which trials are compared. Default: the recipe's
            `eval`, or 15 %.
        test: the same for the rows of the final check. Default: 15 %.
        seeds: number of seeds of the final check.
        prune: end trials early whose evaluation loss is high, by successive halving.
        max_new_tokens: maximum length of an answer, as in `evaluate`.
        memory: maximum memory to use, in bytes or as text such as "8GB".
        resume_existing: resume the sweep if `out` already contains it.
        ray: run the trials with Ray Tune, one on each node or GPU of the Ray cluster.
        callback: called with each event of each run of this process.
        progress: None and True print a line for each trial, False nothing.
        **options: recipe fields, as for `train`. `out` is the folder of the sweep.

    Returns:
        The sweep, with `folder`, `state` and `result`.

    Raises:
        InputError: If an option, the model or the data is invalid, or Optuna is not installed.
        RunError: If a setting does not fit in memory, or all trials fail.
        Stopped: After Ctrl-C or SIGTERM.

    Examples:
        >>> strop.sweep(model="demo", data="rows.jsonl", over={"lora.r": [8, 16, 32]}, metric="exact_json")
        >>> strop.sweep("runs/sweep-1", resume_existing=True).result["verdict"]
    """
    from strop.display.terminal import status_line

    values = api.flatten_options(options)
    path = None if recipe is None else Path(recipe)
    chosen = SweepOptions(metric, trials, sampler, selection, test, seeds, prune, max_new_tokens)
    if progress is False:
        return run_sweep(path, over, values, chosen, memory, resume_existing, Progress(event=callback), ray)
    with status_line("loading the libraries") as status:
        shown = Progress(lambda text: console.print(text, markup=False), status.update, callback)
        return run_sweep(path, over, values, chosen, memory, resume_existing, shown, ray)


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
                fix = f"resume it with `strop sweep --resume {shlex.quote(str(out))}`, or give --out a new folder"
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
        raise FolderError(f"{out}: is not empty", fix="give --out a new folder")
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
