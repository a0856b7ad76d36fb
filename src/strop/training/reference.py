"""The reference model of preference and policy objectives, and log-probabilities of answers under it.

The reference is the model at the start of training, with its adapters and without dropout. Log-probabilities are
computed once, in the micro-batches of the first epoch. The run folder stores them with a key and the start weights.
Those of the first step's rows are checked at the start and at the end of training. If all weights are trained, start
weights are not stored: the log-probabilities are complete before the first step, and are checked at the start only.
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

from strop.data.store import JoinedItems, LazySequence
from strop.data.types import ExampleGroup
from strop.errors import CheckpointError, RunError
from strop.runs.folder import apply_umask, disk_errors, fsync_folder
from strop.training.criteria import BLOCK, PreferenceCriterion, answer_logprobs, micro_batches_of, mismatched_logprobs
from strop.training.gradients import micro_batches, retry_with_less_memory
from strop.training.rollouts import PolicyCriterion
from strop.training.state import Job, batch_stream, temporary_values

LOG = logging.getLogger(__name__)

TOLERANCE = 1e-5  # relative difference between stored and recomputed log-probabilities
TOLERANCE_OTHER_SPLIT = 3e-3  # the same if micro-batches have changed, so that bf16 rounds differently
LOSS_TOLERANCE = 1e-6  # difference between the losses from stored and recomputed values before the first step


class WithReference(LazySequence[ExampleGroup]):
    """ExampleGroups with their log-probabilities under the reference. values: (N, K), fp64, K per group."""

    def __init__(self, groups: Sequence[ExampleGroup], values: Tensor) -> None:
        self._groups, self._values = groups, values

    def __len__(self) -> int:
        return len(self._groups)

    def item(self, i: int) -> ExampleGroup:
        return replace(self._groups[i], reference_logprobs=tuple(self._values[i].tolist()))


def with_reference(job: Job, key: Mapping[str, str]) -> Job:
    """Return the job with what its objective needs of the reference: log-probabilities, or the start weights (GRPO).

    key: identifies the base, its storage, the template and the rows. Raises CheckpointError if a resumed run has lost
    its start weights, and RunError if recomputed log-probabilities differ.
    """
    criterion = job.criterion
    if isinstance(criterion, PolicyCriterion) and criterion.options.beta:
        values, start = _load_reference(job, key, {"train": (), "eval": ()})
        if not job.folder.reference.is_file():  # completions sampled later need it too
            _save_reference(job, key, values, start)
        return replace(job, criterion=replace(criterion, start=start))
    if not isinstance(criterion, PreferenceCriterion) or not criterion.objective.reference:
        return job
    sets = {"train": _own_groups(job), "eval": cast("Sequence[ExampleGroup]", job.eval or ())}
    values, start = _load_reference(job, key, sets)
    started = time.perf_counter()
    LOG.info("computing reference log-probabilities")
    computed = 0
    with _reference_model(job, start):
        for name, batches in _split_sets(job).items():
            computed += _compute_missing(job, sets[name], values[name], batches)
    if computed:
        with job.devices.all_or_none():
            if job.devices.is_main:
                _save_reference(job, key, values, start)
        job.log.emit("reference", rows=computed, seconds=round(time.perf_counter() - started, 3))
    own, held_out = (WithReference(groups, values[name]) for name, groups in sets.items())
    train = job.train.with_own(own) if isinstance(job.train, JoinedItems) else own
    job = replace(job, train=train, eval=held_out if job.eval else None)
    check_reference(job, key)
    return job


def check_reference(job: Job, key: Mapping[str, str]) -> None:
    """Raise RunError if recomputed log-probabilities of the first step's rows differ from the stored ones.

    Before the first step, the loss must also be that of a policy that equals its reference (ln 2 for DPO).
    """
    criterion = job.criterion
    if not isinstance(criterion, PreferenceCriterion) or not criterion.objective.reference:
        return
    own = _own_groups(job)
    groups = [own[row] for row in batch_stream(job.recipe, len(job.train)).rows(0) if row < len(own)] or [own[0]]
    at_start = job.state.progress.step == 0
    if not at_start and _is_full(job):
        return
    start = {} if at_start else _load_reference(job, key, {})[1]  # at the start, the model is the reference
    stored = torch.tensor([group.reference_logprobs for group in groups], dtype=torch.float64)
    recomputed = torch.full_like(stored, math.nan)
    by_rank = [groups] * job.devices.world_size
    with _reference_model(job, start), torch.no_grad():
        compute = partial(_compute_logprobs, job, by_rank, list(range(len(groups))), recomputed)
        retry_with_less_memory(job, groups, compute)
    progress = job.state.progress
    tolerance = TOLERANCE_OTHER_SPLIT if progress.halvings or progress.recompute else TOLERANCE
    max_difference = float(((recomputed - stored).abs() / stored.abs().clamp(min=1.0)).nan_to_num(0.0).max())
    fix = "start the run again; if it happens again, please report it"
    if max_difference > tolerance:
        difference = f"log-probabilities differ by {max_difference:.1e} (relative)"
        what = f"the reference of the first rows has changed: {difference}"
        raise RunError(what, fix=fix)
    loss, expected = (_mean_loss(criterion, groups, values) for values in (recomputed, stored))
    if at_start and abs(loss - expected) > LOSS_TOLERANCE:
        what = f"before the first step the loss is {loss:.8f}, not {expected:.8f}: the model differs from its reference"
        raise RunError(what, fix=fix)
    fields = {"loss": loss} if at_start else {}
    job.log.emit("reference-check", step=progress.step, rows=len(groups), off=max_difference, **fields)


def _is_full(job: Job) -> bool:
    return job.recipe.train.method == "full"


def _own_groups(job: Job) -> Sequence[ExampleGroup]:
    """Return the training rows without those of train.keep."""
    return cast("Sequence[ExampleGroup]", job.train.own if isinstance(job.train, JoinedItems) else job.train)


def _mean_loss(criterion: PreferenceCriterion, groups: Sequence[ExampleGroup], values: Tensor) -> float:
    """Return the mean loss of an effective batch. values: its log-probabilities, shape (N, K)."""
    sums = values[:, : len(groups[0].examples)].flatten().view(len(groups), -1).unbind(1)
    return float(criterion.loss_of_sums(sums, groups, 0.0)[0]) / criterion.divisor(groups)


def _split_sets(job: Job) -> dict[str, Iterator[list[int]]]:
    """Return batches of the rows of each set: the steps of the first epoch, and the blocks of an evaluation."""
    stream, held_out = batch_stream(job.recipe, len(job.train)), range(len(job.eval or ()))
    steps, number = range(min(stream.total_steps, stream.steps_per_epoch)), len(_own_groups(job))
    return {
        "train": ([row for row in stream.rows(step) if row < number] for step in steps),
        "eval": (list(held_out[begin : begin + BLOCK]) for begin in held_out[::BLOCK]),
    }


def _compute_missing(job: Job, groups: Sequence[ExampleGroup], values: Tensor, batches: Iterator[list[int]]) -> int:
    """Compute the missing values, with one batch per device at a time, and return the number of rows computed."""
    missing = [rows for rows in batches if rows and values[rows].isnan().all(1).any()]
    for begin in range(0, len(missing), job.devices.world_size):
        rows_by_rank = missing[begin : begin + job.devices.world_size]
        rank_rows = rows_by_rank[job.devices.rank] if job.devices.rank < len(rows_by_rank) else []
        by_rank = [[groups[row] for row in rows] for rows in rows_by_rank]
        by_rank += [[]] * (job.devices.world_size - len(by_rank))
        all_groups = [group for batch in by_rank for group in batch]  # so that all devices reduce memory equally
        with torch.no_grad():
            retry_with_less_memory(job, all_groups, partial(_compute_logprobs, job, by_rank, rank_rows, values))
        for rows, results in zip(rows_by_rank, job.devices.gather(values[rank_rows]), strict=False):
            values[rows] = results
    return sum(map(len, missing))


def _compute_logprobs(job: Job, by_rank: Sequence[Sequence[ExampleGroup]], rows: Sequence[int], values: Tensor) -> None:
    """Compute this rank's log-probabilities in micro-batches, and write them into `values` at `rows`."""
    batch, last = by_rank[job.devices.rank], values.shape[1] - 1

    def write(indices: list[int], column: int, logprobs: Tensor) -> None:
        values[torch.tensor([rows[i] for i in indices]), column] = logprobs.cpu().double()

    def score_answers(indices: list[int]) -> None:
        for side, logprobs in enumerate(answer_logprobs(job.step, [batch[i] for i in indices])):
            write(indices, side, logprobs)

    def score_mismatched(indices: list[int]) -> None:
        write(indices, last, mismatched_logprobs(job.step, [batch[i] for i in indices]))

    def split(rank: int) -> list[list[int]]:
        return micro_batches(job, by_rank[rank]) if by_rank[rank] else []

    def split_mismatched(rank: int) -> list[list[int]]:
        groups = by_rank[rank]
        batches = micro_batches_of(groups, partial(micro_batches, job))
        with_mismatched = ([i for i in indices if groups[i].kl_examples] for indices in batches)
        return [indices for indices in with_mismatched if indices]

    job.devices.run_passes(split, score_answers, backward=False)
    job.devices.run_passes(split_mismatched, score_mismatched, backward=False)


@contextmanager
def _reference_model(job: Job, start: Mapping[str, Tensor]) -> Iterator[None]:
    """Use the weights in `start` without dropout inside the block. If `start` is empty, weights are unchanged."""
    with temporary_values(job.state.weights, start):
        job.model.eval()
        try:
            yield
        finally:
            job.model.train()


def _load_reference(
    job: Job, key: Mapping[str, str], sets: Mapping[str, Sequence[ExampleGroup]]
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """Return (log-probabilities of "train" and "eval", start weights) from the run folder.

    Log-probabilities have shape (N, K) and fp64, and are NaN before they are computed. At the start of a run, the start
    weights are the current ones.
    """
    path, start, stored_key = job.folder.reference, {}, None
    try:
        with safe_open(path, framework="pt") as file:
            stored_key = json.loads(file.metadata()["key"])
            names = () if _is_full(job) else job.state.weights
            start = {name: file.get_tensor(f"weight/{name}") for name in names}
            values = {name: file.get_tensor(name) for name in ("train", "eval")}
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        start, stored_key = {}, None
    if _is_full(job) and job.state.progress.step and stored_key != dict(key):
        what = f"{path}: the reference log-probabilities are missing, or of other rows"
        raise CheckpointError(what, fix="start the run again with `strop train`")
    if not start and not _is_full(job):
        if job.state.progress.step:
            what = f"{path}: the weights that the run started from are missing or damaged"
            raise CheckpointError(what, fix="start the run again with `strop train`")
        start = {name: weight.detach().cpu().clone() for name, weight in job.state.weights.items()}
    if stored_key != dict(key):
        values = {name: torch.full((len(groups), 2), math.nan, dtype=torch.float64) for name, groups in sets.items()}
    return values, start


def _save_reference(job: Job, key: Mapping[str, str], values: dict[str, Tensor], start: Mapping[str, Tensor]) -> None:
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
