"""Send metrics to experiment trackers through accelerate. None runs unless `track` names it."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from strop.errors import RecipeError, first_line
from strop.runs.events import Event, Listener, rewound_to

LOG = logging.getLogger(__name__)

_FIGURES = ("accuracy", "margin", "chosen_change", "rejected_change", "desirable_change", "undesirable_change", "kl")
_TRACKED = {"step": ("loss", "learning_rate", "grad_norm", "tokens_per_s", *_FIGURES), "eval": ("loss", *_FIGURES)}


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for a tracker whose package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a folder of that name, which wandb creates
            raise RecipeError(
                f"--track {name}: the package {name} is not installed",
                fix=f"pip install {name}, or remove it from `track`",
            )


@contextmanager
def tracking(names: Sequence[str], folder: Path, config: dict[str, Any]) -> Iterator[Sequence[Listener]]:
    """Yield a listener that sends metrics of step and eval events to the named trackers; none if there are no names.

    Output of the trackers goes to stderr. Raises RecipeError if one does not start; the folder is then unchanged. If
    one fails later, that is logged and the run continues.
    """
    if not names:
        yield ()
        return
    from accelerate import Accelerator

    names = sorted(names, key=lambda name: name == "tensorboard")  # last, because it writes into the folder
    accelerator = Accelerator(log_with=names, project_dir=str(folder), cpu=config["model.device"] == "cpu")
    plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()}
    project, init_kwargs = _project(names, folder.resolve().name)
    with redirect_stdout(sys.stderr), _starting(names):
        accelerator.init_trackers(project, config=plain, init_kwargs=init_kwargs)

    working = True

    def send(event: Event) -> None:
        nonlocal working
        kind = event["event"]
        values = {f"{'eval' if kind == 'eval' else 'train'}/{key}": event.get(key) for key in _TRACKED.get(kind, ())}
        metrics = {key: value for key, value in values.items() if value is not None}
        if working and (step := rewound_to(event)) is not None:
            working = _try(names, lambda: _undo(accelerator.trackers, step))
        if working and metrics:
            working = _try(names, lambda: accelerator.log(metrics, step=event["step"]))

    try:
        yield (send,)
    finally:
        with redirect_stdout(sys.stderr):
            _try(names, accelerator.end_training)


def _undo(trackers: Sequence[Any], step: int) -> None:
    """Make TensorBoard hide the steps after this one. wandb and trackio cannot remove values."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.writer.close()  # the next value opens a file that starts with purge_step
            tracker.writer.purge_step = step + 1


def _try(names: Sequence[str], action: Callable[[], object]) -> bool:
    """Return whether the action succeeded."""
    try:
        action()
    except Exception as error:  # any error of a library, a network or a disk: no reason to end a run
        reason = f"{type(error).__name__}: {first_line(error)}"
        LOG.warning("--track %s: stopped; events.jsonl still has all metrics: %s", ",".join(names), reason)
        return False
    return True


@contextmanager
def _starting(names: Sequence[str]) -> Iterator[None]:
    """Raise RecipeError for any error of a tracker: no login, no connection, no place to write."""
    try:
        yield
    except Exception as error:  # each tracker has its own error classes
        wandb = "`wandb login`, or set WANDB_MODE=offline, or " if "wandb" in names else ""
        what = f"--track {','.join(names)}: {' '.join(str(error).split()) or type(error).__name__}"
        raise RecipeError(what, fix=f"{wandb}remove it from `track`") from None


def _project(names: Sequence[str], run: str) -> tuple[str, dict[str, Any]]:
    """Return the project's name and the trackers' arguments.

    accelerate always passes a project to wandb, which then ignores WANDB_PROJECT; if that is set, it is the project and
    the folder's name is the run's.
    """
    project = os.environ.get("WANDB_PROJECT") if "wandb" in names else None
    return (project, {"wandb": {"name": os.environ.get("WANDB_NAME", run)}}) if project else (run, {})
