"""Experiment trackers through accelerate. None runs unless `track` names it."""

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

_COMPARED = ("accuracy", "margin", "chosen_change", "rejected_change", "desirable_change", "undesirable_change", "kl")
_SHOWN = {
    "step": ("loss", "learning_rate", "grad_norm", "tokens_per_s", *_COMPARED),
    "eval": ("loss", *_COMPARED),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises RecipeError for a tracker whose package is not installed."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, which wandb leaves where it has run
            raise RecipeError(
                f"--track {name}: the package {name} is not installed",
                fix=f"pip install {name}, or take it out of `track`",
            )


@contextmanager
def tracking(names: Sequence[str], folder: Path, config: dict[str, Any]) -> Iterator[Sequence[Listener]]:
    """A listener that sends the numbers of step and eval events to the named trackers; none where names is empty.

    What a tracker prints goes to stderr. Raises RecipeError where one does not begin: then nothing is left in the
    folder. One that fails later is told of, and the run goes on.
    """
    if not names:
        yield ()
        return
    from accelerate import Accelerator

    names = sorted(names, key=lambda name: name == "tensorboard")  # last: it alone writes into the folder
    accelerator = Accelerator(log_with=names, project_dir=str(folder), cpu=config["model.device"] == "cpu")
    plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()}
    project, more = _named(names, folder.resolve().name)
    with redirect_stdout(sys.stderr), _beginning(names):
        accelerator.init_trackers(project, config=plain, init_kwargs=more)

    working = True

    def send(event: Event) -> None:
        nonlocal working
        kind = event["event"]
        numbers = {f"{'eval' if kind == 'eval' else 'train'}/{key}": event.get(key) for key in _SHOWN.get(kind, ())}
        told = {key: value for key, value in numbers.items() if value is not None}
        if working and (back := rewound_to(event)) is not None:
            working = _tried(names, lambda: _undo(accelerator.trackers, back))
        if working and told:
            working = _tried(names, lambda: accelerator.log(told, step=event["step"]))

    try:
        yield (send,)
    finally:
        with redirect_stdout(sys.stderr):
            _tried(names, accelerator.end_training)


def _undo(trackers: Sequence[Any], step: int) -> None:
    """TensorBoard no longer shows what stands behind this step. wandb and trackio cannot take a number back."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.writer.close()  # the next number opens a file that begins with this
            tracker.writer.purge_step = step + 1


def _tried(names: Sequence[str], act: Callable[[], object]) -> bool:
    """Whether it went well."""
    try:
        act()
    except Exception as error:  # of any library, of a network or of a disk: no reason to end a run
        said = f"{type(error).__name__}: {first_line(error)}"
        LOG.warning("--track %s: gets no more numbers, events.jsonl has them all: %s", ",".join(names), said)
        return False
    return True


@contextmanager
def _beginning(names: Sequence[str]) -> Iterator[None]:
    """A tracker without a login, a connection or a place to write is no fault of strop's."""
    try:
        yield
    except Exception as error:  # each tracker has types of its own
        wandb = "`wandb login`, or set WANDB_MODE=offline, or " if "wandb" in names else ""
        what = f"--track {','.join(names)}: {' '.join(str(error).split()) or type(error).__name__}"
        raise RecipeError(what, fix=f"{wandb}take it out of `track`") from None


def _named(names: Sequence[str], run: str) -> tuple[str, dict[str, Any]]:
    """The project's name, and more for each tracker. accelerate gives wandb the project outright, and then wandb does
    not look at WANDB_PROJECT; where that is set, the folder's name is the run's."""
    project = os.environ.get("WANDB_PROJECT") if "wandb" in names else None
    return (project, {"wandb": {"name": os.environ.get("WANDB_NAME", run)}}) if project else (run, {})
