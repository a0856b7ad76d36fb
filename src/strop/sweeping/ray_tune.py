"""Run the trials of a sweep with Ray Tune on the nodes of a Ray cluster, which share the sweep's folder.

A trial of Tune is a slot: it takes the next trial from the sweep's journal, so that settings, pruning and statistics
are those of a sweep without Ray.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from strop.errors import InputError
from strop.sweeping.loop import Progress, SweepFolder


def check_ray() -> None:
    """Raise InputError if Ray Tune is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray: the package ray is not installed", fix="pip install 'ray[tune]'")


def run_slots(folder: SweepFolder, step: Callable[[], bool], progress: Progress) -> None:
    """Run all trials, then the final check, one piece of work a slot and node (or GPU).

    step: called on a node of the cluster; opens the sweep and does one piece of its work. What a failed slot leaves is
    done by the caller, with `SweepFolder.work`.
    """
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # paths of the recipe are relative to this folder
    import ray
    from ray import tune

    cwd = os.getcwd()

    def work(slot: dict[str, Any]) -> None:
        os.chdir(cwd)
        tune.report({"worked": step()})

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    nodes = ray.nodes()
    with_gpu = any(node["Resources"].get("GPU") for node in nodes)
    cpus = min(int(node["Resources"].get("CPU", 1)) for node in nodes if node["Alive"])
    trainable = tune.with_resources(work, {"gpu": 1} if with_gpu else {"cpu": cpus})
    storage = folder.path.absolute() / "ray"
    for name in ("trials", "final"):
        if name == "final":
            folder.write_state()
            if not folder.select():
                return
        count = len(folder.state["trials"]) if name == "trials" else len(folder.final_runs())
        progress.status(f"Ray Tune runs {count} {name} on {len(nodes)} nodes")
        target = storage / name
        if tune.Tuner.can_restore(str(target)):
            tuner = tune.Tuner.restore(str(target), trainable, resume_unfinished=True, restart_errored=True)
        else:
            config = tune.RunConfig(name=name, storage_path=str(storage), verbose=0)
            tuner = tune.Tuner(trainable, param_space={"slot": tune.grid_search(list(range(count)))}, run_config=config)
        with redirect_stdout(sys.stderr):  # Tune prints tables
            failed = [result.error for result in tuner.fit() if result.error]
        folder.write_state()
        if failed:
            progress.line(
                f"note     {len(failed)} slots of Ray failed, this process does their work: {failed[0]!s:.200}"
            )
