"""The reference: how likely each answer was under the model as training began.

It is the model that training starts from, adapters and all else as they are then (a new adapter changes nothing), so
that DoRA, trained biases, new tokens and an adapter to start from need no rule of their own; never with dropout. It is
computed once, by the same step and in the micro-batches of the first epoch, and kept in the run folder with its key and
the weights that training started from. Some rows are computed again at the start and at the end.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from strop.data.examples import Lazy
from strop.data.types import Unit
from strop.errors import CheckpointError, RunError
from strop.runs.folder import apply_umask, disk_errors, fsync_folder
from strop.training.criteria import BLOCK, OfAnswers, beside, log_probs
from strop.training.job import Job, stream_of
from strop.training.oom import micro_batches, within_memory
from strop.training.rollouts import OfGroups
from strop.training.state import holding

LOG = logging.getLogger(__name__)

NEAR = 1e-5  # share of a log-probability by which the same computation may differ
APART = 3e-3  # the same in other micro-batches, whose products in bf16 are rounded elsewhere
LOSS_NEAR = 1e-6


class WithReference(Lazy[Unit]):
    """Units, each with the log-probabilities of the reference. values (N, K), fp64."""

    def __init__(self, units: Sequence[Unit], values: Tensor) -> None:
        self._units, self._values = units, values

    def __len__(self) -> int:
        return len(self._units)

    def one(self, i: int) -> Unit:
        return replace(self._units[i], reference=tuple(self._values[i].tolist()))


@dataclass(frozen=True)
class Reference:
    """values: by "train" and "eval", (N, K) fp64, NaN where nobody asked yet. start: the trained weights at the
    beginning, by name."""

    values: dict[str, Tensor]
    start: Mapping[str, Tensor]


def with_reference(job: Job, key: Mapping[str, str]) -> Job:
    """The job with what the reference makes of each of its rows (of answers that are yet to be drawn: with the weights
    that it is computed with); the job itself where its objective needs none.

    key: what the reference depends on: base, how it is stored, template, rows. Raises CheckpointError where a run that
    is resumed has lost what it started from; RunError where the same rows come out otherwise when computed again.
    """
    criterion = job.criterion
    if isinstance(criterion, OfGroups) and criterion.options.beta:
        return replace(job, criterion=replace(criterion, start=_start(job, key)))
    if not isinstance(criterion, OfAnswers) or not criterion.objective.reference:
        return job
    sets = {"train": cast("Sequence[Unit]", job.train), "eval": cast("Sequence[Unit]", job.eval or ())}
    known = _load(job, key, sets)
    started = time.perf_counter()
    LOG.info("computing how likely each answer is before training")
    with _starting(job, known.start):
        missing = sum(_fill(job, sets[name], known.values[name], order) for name, order in _orders(job).items())
    if missing:
        with job.devices.together():
            if job.devices.main:
                _save(job, key, known)
        job.log.emit("reference", rows=missing, seconds=round(time.perf_counter() - started, 3))
    found = [WithReference(units, known.values[name]) for name, units in sets.items()]
    job = replace(job, train=found[0], eval=found[1] if job.eval else None)
    check(job, key)
    return job


def check(job: Job, key: Mapping[str, str]) -> None:
    """Computes the reference of the first step's rows again. Raises RunError where it is not what was kept.

    Before the first step, the loss is that of a policy that equals its reference (ln 2 for DPO).
    """
    criterion = job.criterion
    if not isinstance(criterion, OfAnswers) or not criterion.objective.reference:
        return
    units = [cast(Unit, job.train[row]) for row in stream_of(job.recipe, len(job.train)).rows(0)]
    beginning = job.state.progress.step == 0
    start = (
        {} if beginning else _load(job, key, {}).start
    )  # at the beginning the model as it is, which must be the same
    kept = torch.tensor([unit.reference for unit in units], dtype=torch.float64)
    found = torch.full_like(kept, math.nan)
    with _starting(job, start), torch.no_grad():
        within_memory(job, units, lambda: _score(job, [units] * job.devices.world, list(range(len(units))), found))
    near = APART if job.state.progress.halvings or job.state.progress.recompute else NEAR
    off = ((found - kept).abs() / kept.abs().clamp(min=1.0)).nan_to_num(0.0).max()
    if off > near:
        what = f"the reference of the first rows is not what it was: log-probabilities differ by {float(off):.1e} of it"
        raise RunError(what, fix="start the run again; if it happens again, please report it")
    loss, expected = (_loss(job, units, values) for values in (found, kept))
    if beginning and abs(loss - expected) > LOSS_NEAR:
        what = (
            f"before the first step the loss is {loss:.8f}, not {expected:.8f}: the model does not equal its reference"
        )
        raise RunError(what, fix="start the run again; if it happens again, please report it")
    told = {"loss": loss} if beginning else {}
    job.log.emit("reference-check", step=job.state.progress.step, rows=len(units), off=float(off), **told)


def _start(job: Job, key: Mapping[str, str]) -> Mapping[str, Tensor]:
    """The weights that training started from: answers that are drawn later need the reference of each step's own."""
    known = _load(job, key, {"train": (), "eval": ()})
    if not job.folder.reference.is_file():
        _save(job, key, known)
    return known.start


def _loss(job: Job, units: Sequence[Unit], values: Tensor) -> float:
    """The loss of an effective batch whose log-probabilities are these."""
    sums = values[:, : len(units[0].examples)].flatten()
    step = replace(job.step, log_probs=lambda examples: sums)
    return float(job.criterion.loss(step, units, 0.0)[0]) / job.criterion.divisor(units)


def _orders(job: Job) -> dict[str, Iterator[list[int]]]:
    """The rows of each set as they are cut into micro-batches: steps of the first epoch, blocks of an evaluation."""
    stream = stream_of(job.recipe, len(job.train))
    steps = range(min(stream.total_steps, stream.steps_per_epoch))
    held_out = len(job.eval or ())
    blocks = range(0, held_out, BLOCK)
    return {
        "train": (list(stream.rows(step)) for step in steps),
        "eval": (list(range(begin, min(begin + BLOCK, held_out))) for begin in blocks),
    }


def _fill(job: Job, units: Sequence[Unit], values: Tensor, order: Iterator[list[int]]) -> int:
    """Computes what is missing, some batches on each device; gives how many rows that were."""
    missing = [rows for rows in order if values[rows].isnan().all(1).any()]
    for begin in range(0, len(missing), job.devices.world):
        at_once = missing[begin : begin + job.devices.world]
        own = at_once[job.devices.rank] if job.devices.rank < len(at_once) else []
        batches = [[units[row] for row in rows] for rows in at_once]
        batches += [[]] * (job.devices.world - len(batches))
        together = [unit for batch in batches for unit in batch]  # devices shrink alike
        with torch.no_grad():
            within_memory(job, together, lambda batches=batches, own=own: _score(job, batches, own, values))  # type: ignore[misc]
        for rows, found in zip(at_once, job.devices.gather(values[own]), strict=False):
            values[rows] = found
    return sum(map(len, missing))


def _score(job: Job, batches: Sequence[Sequence[Unit]], rows: Sequence[int], values: Tensor) -> None:
    """The log-probabilities of this rank's batch, in the micro-batches that a step makes of it, into `values` at
    `rows`. batches: by rank."""
    batch, width = batches[job.devices.rank], values.shape[1]

    def answers(group: list[int]) -> None:
        places = torch.tensor([rows[row] for row in group])
        for side, sums in enumerate(log_probs(job.step, [batch[row] for row in group])):
            values[places, side] = sums.cpu().double()

    def others(having: list[int]) -> None:
        places = torch.tensor([rows[row] for row in having])
        values[places, width - 1] = beside(job.step, [batch[row] for row in having]).cpu().double()

    turns = job.devices.turns
    turns(lambda rank: micro_batches(job, batches[rank]) if batches[rank] else [], answers, backward=False)
    turns(lambda rank: _having(job, batches[rank]), others, backward=False)


def _having(job: Job, batch: Sequence[Unit]) -> list[list[int]]:
    """Micro-batches of the units with an answer to another prompt."""
    found = []
    for begin in range(0, len(batch), BLOCK):
        for group in micro_batches(job, batch[begin : begin + BLOCK]):
            found.append([begin + row for row in group if batch[begin + row].beside])
    return [having for having in found if having]


@contextmanager
def _starting(job: Job, start: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside this block the model is what training started from (as it is now, where `start` is empty), without
    dropout."""
    with holding(job.state.weights, start):
        job.model.eval()
        try:
            yield
        finally:
            job.model.train()


def _load(job: Job, key: Mapping[str, str], sets: Mapping[str, Sequence[Unit]]) -> Reference:
    """What the run folder holds, or, at the beginning, the weights as they are and nothing computed yet."""
    path, start, said = job.folder.reference, {}, None
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()["key"])
            start = {name: file.get_tensor(f"weight/{name}") for name in job.state.weights}
            values = {name: file.get_tensor(name) for name in ("train", "eval")}
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        start = {}
    if not start:
        if job.state.progress.step:
            what = f"{path}: what the run started from is lost or damaged"
            raise CheckpointError(what, fix="start the run again with `strop train`")
        start = {name: weight.detach().cpu().clone() for name, weight in job.state.weights.items()}
    if said == dict(key):
        return Reference(values, start)
    return Reference(
        {name: torch.full((len(units), 2), math.nan, dtype=torch.float64) for name, units in sets.items()}, start
    )


def _save(job: Job, key: Mapping[str, str], known: Reference) -> None:
    path: Path = job.folder.reference
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    weights = {f"weight/{name}": weight.contiguous() for name, weight in known.start.items()}
    with disk_errors(path):
        save_file({**weights, **known.values}, temp, metadata={"key": json.dumps(dict(key))})
        apply_umask(temp)
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        temp.replace(path)
        fsync_folder(path.parent)
