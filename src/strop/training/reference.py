"""The reference model of preference and policy objectives, and log-probabilities of answers under it.

The reference is the model at the start of training, adapters included, without dropout. (A new adapter does not change
the model.) DoRA, trained biases, new tokens and a start adapter therefore need no special case. Log-probabilities are
computed once, by the training step and in the micro-batches of the first epoch. The run folder stores them with a key
and the start weights. Those of the first step's rows are checked at the start and at the end of training.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from strop.data.store import LazySequence
from strop.data.types import ExampleGroup
from strop.errors import CheckpointError, RunError
from strop.runs.folder import apply_umask, disk_errors, fsync_folder
from strop.training.criteria import (
    BLOCK,
    PreferenceCriterion,
    answer_logprobs,
    micro_batches_of,
    mismatched_logprobs,
)
from strop.training.gradients import micro_batches, within_memory
from strop.training.rollouts import PolicyCriterion
from strop.training.state import Job, batch_stream, temporary_values

LOG = logging.getLogger(__name__)

TOLERANCE = 1e-5  # relative difference between stored and recomputed log-probabilities
TOLERANCE_OTHER_SPLIT = 3e-3  # the same if micro-batches have changed, so that bf16 rounds differently
LOSS_TOLERANCE = 1e-6  # difference of the losses before the first step


class WithReference(LazySequence[ExampleGroup]):
    """ExampleGroups (called units) with log-probabilities under the reference. values: (N, K), fp64."""

    def __init__(self, units: Sequence[ExampleGroup], values: Tensor) -> None:
        self._units, self._values = units, values

    def __len__(self) -> int:
        return len(self._units)

    def item(self, i: int) -> ExampleGroup:
        return replace(self._units[i], reference_logprobs=tuple(self._values[i].tolist()))


def with_reference(job: Job, key: Mapping[str, str]) -> Job:
    """Return the job with reference log-probabilities (for a policy objective, with the start weights instead).

    key: identifies what the reference depends on: the base, its storage, the template and the rows. A job whose
    objective needs no reference is returned unchanged.

    Raises CheckpointError if a resumed run has lost its start weights; RunError if recomputed rows differ.
    """
    criterion = job.criterion
    if isinstance(criterion, PolicyCriterion) and criterion.options.beta:
        values, start = _load(job, key, {"train": (), "eval": ()})
        if not job.folder.reference.is_file():  # completions sampled later need it too
            _save(job, key, values, start)
        return replace(job, criterion=replace(criterion, start=start))
    if not isinstance(criterion, PreferenceCriterion) or not criterion.objective.reference:
        return job
    sets = {"train": cast("Sequence[ExampleGroup]", job.train), "eval": cast("Sequence[ExampleGroup]", job.eval or ())}
    values, start = _load(job, key, sets)
    started = time.perf_counter()
    LOG.info("computing reference log-probabilities")
    with _reference_model(job, start):
        computed = sum(_fill(job, sets[name], values[name], batches) for name, batches in _batches(job).items())
    if computed:
        with job.devices.all_or_none():
            if job.devices.is_main:
                _save(job, key, values, start)
        job.log.emit("reference", rows=computed, seconds=round(time.perf_counter() - started, 3))
    train, held_out = (WithReference(units, values[name]) for name, units in sets.items())
    job = replace(job, train=train, eval=held_out if job.eval else None)
    check_reference(job, key)
    return job


def check_reference(job: Job, key: Mapping[str, str]) -> None:
    """Recompute the reference of the first step's rows, and raise RunError if it differs from the stored one.

    Before the first step, the loss must be that of a policy that equals its reference (ln 2 for DPO).
    """
    criterion = job.criterion
    if not isinstance(criterion, PreferenceCriterion) or not criterion.objective.reference:
        return
    units = [cast(ExampleGroup, job.train[row]) for row in batch_stream(job.recipe, len(job.train)).rows(0)]
    at_start = job.state.progress.step == 0
    start = {} if at_start else _load(job, key, {})[1]  # at the start, the model is the reference
    stored = torch.tensor([unit.reference_logprobs for unit in units], dtype=torch.float64)
    recomputed = torch.full_like(stored, math.nan)
    batches = [units] * job.devices.world_size
    with _reference_model(job, start), torch.no_grad():
        within_memory(job, units, lambda: _score(job, batches, list(range(len(units))), recomputed))
    progress = job.state.progress
    tolerance = TOLERANCE_OTHER_SPLIT if progress.halvings or progress.recompute else TOLERANCE
    off = ((recomputed - stored).abs() / stored.abs().clamp(min=1.0)).nan_to_num(0.0).max()
    fix = "start the run again; if it happens again, please report it"
    if off > tolerance:
        what = f"the reference of the first rows has changed: log-probabilities differ by {float(off):.1e} (relative)"
        raise RunError(what, fix=fix)
    loss, expected = (_mean_loss(criterion, units, values) for values in (recomputed, stored))
    if at_start and abs(loss - expected) > LOSS_TOLERANCE:
        what = f"before the first step the loss is {loss:.8f}, not {expected:.8f}: the model is not its reference"
        raise RunError(what, fix=fix)
    fields = {"loss": loss} if at_start else {}
    job.log.emit("reference-check", step=progress.step, rows=len(units), off=float(off), **fields)


def _mean_loss(criterion: PreferenceCriterion, units: Sequence[ExampleGroup], values: Tensor) -> float:
    """Return the mean loss of an effective batch, given its log-probabilities (N, K)."""
    sums = values[:, : len(units[0].examples)].flatten().view(len(units), -1).unbind(1)
    return float(criterion.loss_of_sums(sums, units, 0.0)[0]) / criterion.divisor(units)


def _batches(job: Job) -> dict[str, Iterator[list[int]]]:
    """Return the rows of each set in batches: the steps of the first epoch, and the blocks of an evaluation."""
    stream = batch_stream(job.recipe, len(job.train))
    steps = range(min(stream.total_steps, stream.steps_per_epoch))
    held_out = len(job.eval or ())
    blocks = range(0, held_out, BLOCK)
    return {
        "train": (list(stream.rows(step)) for step in steps),
        "eval": (list(range(begin, min(begin + BLOCK, held_out))) for begin in blocks),
    }


def _fill(job: Job, units: Sequence[ExampleGroup], values: Tensor, batches: Iterator[list[int]]) -> int:
    """Compute the missing values, one batch per device at a time; return the number of rows computed."""
    missing = [rows for rows in batches if values[rows].isnan().all(1).any()]
    for begin in range(0, len(missing), job.devices.world_size):
        at_once = missing[begin : begin + job.devices.world_size]
        own = at_once[job.devices.rank] if job.devices.rank < len(at_once) else []
        by_rank = [[units[row] for row in rows] for rows in at_once]
        by_rank += [[]] * (job.devices.world_size - len(by_rank))
        flat = [unit for batch in by_rank for unit in batch]  # memory settings must be reduced equally on all devices
        with torch.no_grad():
            within_memory(job, flat, lambda by_rank=by_rank, own=own: _score(job, by_rank, own, values))  # type: ignore[misc]
        for rows, results in zip(at_once, job.devices.gather(values[own]), strict=False):
            values[rows] = results
    return sum(map(len, missing))


def _score(job: Job, by_rank: Sequence[Sequence[ExampleGroup]], rows: Sequence[int], values: Tensor) -> None:
    """Write the log-probabilities of this rank's batch into `values` at `rows`, in a step's micro-batches."""
    batch, last = by_rank[job.devices.rank], values.shape[1] - 1

    def write(group: list[int], column: int, logprobs: Tensor) -> None:
        values[torch.tensor([rows[row] for row in group]), column] = logprobs.cpu().double()

    def score_answers(group: list[int]) -> None:
        for side, logprobs in enumerate(answer_logprobs(job.step, [batch[row] for row in group])):
            write(group, side, logprobs)

    def score_mismatched(group: list[int]) -> None:
        write(group, last, mismatched_logprobs(job.step, [batch[row] for row in group]))

    def split(rank: int) -> list[list[int]]:
        return micro_batches(job, by_rank[rank]) if by_rank[rank] else []

    def split_mismatched(rank: int) -> list[list[int]]:
        units = by_rank[rank]
        groups = micro_batches_of(units, partial(micro_batches, job))
        with_mismatched = ([row for row in group if units[row].kl_examples] for group in groups)
        return [group for group in with_mismatched if group]

    job.devices.run_passes(split, score_answers, backward=False)
    job.devices.run_passes(split_mismatched, score_mismatched, backward=False)


@contextmanager
def _reference_model(job: Job, start: Mapping[str, Tensor]) -> Iterator[None]:
    """Use the start weights (if `start` is empty: the current ones), without dropout, inside the block."""
    with temporary_values(job.state.weights, start):
        job.model.eval()
        try:
            yield
        finally:
            job.model.train()


def _load(
    job: Job, key: Mapping[str, str], sets: Mapping[str, Sequence[ExampleGroup]]
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """Return (values, start weights) from the run folder; at the start of a run, NaN and the current weights.

    values: log-probabilities of "train" and "eval", (N, K), fp64; NaN where they are not computed yet.
    """
    path, start, stored_key = job.folder.reference, {}, None
    try:
        with safe_open(path, framework="pt") as file:
            stored_key = json.loads(file.metadata()["key"])
            start = {name: file.get_tensor(f"weight/{name}") for name in job.state.weights}
            values = {name: file.get_tensor(name) for name in ("train", "eval")}
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        start = {}
    if not start:
        if job.state.progress.step:
            what = f"{path}: the weights that the run started from are missing or damaged"
            raise CheckpointError(what, fix="start the run again with `strop train`")
        start = {name: weight.detach().cpu().clone() for name, weight in job.state.weights.items()}
    if stored_key != dict(key):
        values = {name: torch.full((len(units), 2), math.nan, dtype=torch.float64) for name, units in sets.items()}
    return values, start


def _save(job: Job, key: Mapping[str, str], values: dict[str, Tensor], start: Mapping[str, Tensor]) -> None:
    path: Path = job.folder.reference
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    weights = {f"weight/{name}": weight.contiguous() for name, weight in start.items()}
    with disk_errors(path):
        save_file({**weights, **values}, temp, metadata={"key": json.dumps(dict(key))})
        apply_umask(temp)
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        temp.replace(path)
        fsync_folder(path.parent)
