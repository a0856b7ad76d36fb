"""Sweeps over settings: `sweep` is the public function; its modules are imported when it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from strop import api
from strop.config.arguments import public
from strop.config.options import Options
from strop.display.progress import show_steps
from strop.engine.kernels.warmup import import_libraries

if TYPE_CHECKING:
    from strop.runs.events import Event
    from strop.sweeping.run import Sweep


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
    from strop.display.tables import messages
    from strop.display.terminal import status_line

    with show_steps(progress, "loading the libraries"):
        import_libraries()
    from strop.sweeping.loop import Progress
    from strop.sweeping.request import SweepOptions
    from strop.sweeping.run import run_sweep

    values = api.flatten_options(options)
    path = None if recipe is None else Path(recipe)
    chosen = SweepOptions(metric, trials, sampler, selection, test, seeds, prune, max_new_tokens)
    if progress is False:
        return run_sweep(path, over, values, chosen, memory, resume_existing, Progress(event=callback), ray)
    with status_line("loading the libraries") as status:
        shown = Progress(lambda text: messages.print(text, markup=False), status.update, callback)
        return run_sweep(path, over, values, chosen, memory, resume_existing, shown, ray)
