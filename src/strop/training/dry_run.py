"""Checks before the first step: memory of the largest micro-batch, accuracy of int8 matmuls, and causality.

The checks do not change the weights or the state of the random generators.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from strop.data.images import hide_images
from strop.data.types import Example, Item
from strop.engine.device import pick_dtype
from strop.engine.images import image_features
from strop.engine.step import Step, step_for
from strop.engine.train.packing import pack, pack_last_tokens, pack_separately
from strop.errors import ModelError, RecipeError, RunError
from strop.machine.memory import MemoryWatch, PeakTracker
from strop.machine.probe import Machine, probe, this_cpu
from strop.machine.rates import generation_dtype, load_precision
from strop.models.introspect import NOT_CAUSAL, why_not_causal
from strop.objectives.table import data_kind_of
from strop.planning.activations import MicroBatch, peak_live_bytes
from strop.planning.choose import usable_bytes
from strop.planning.machines import find_target
from strop.planning.memory import EvaluationLoad, Phase, RolloutLoad, predict_phases
from strop.planning.microbatch import TIMED_STEPS, first_steps_of, searched_steps
from strop.planning.time import steps_seconds
from strop.planning.workload import Workload
from strop.training.contrastive import EmbedCriterion
from strop.training.criteria import is_scored
from strop.training.gradients import apply_memory_settings, micro_batches, retry_with_less_memory
from strop.training.state import Job, batch_stream, random_states, set_random_states

LOG = logging.getLogger(__name__)

EVALUATED_ROWS = 20_000  # rows from which the memory of an evaluation is predicted
MAX_PACKED = 32  # number of the largest micro-batches that are packed to predict their memory exactly
SAFE_SHARE = 0.5  # share of the usable memory below which the dry run is skipped (largest error: below a factor of 2)

INT8_TOKENS = 512  # tokens of the rows on which int8 matmuls are compared with fp32
INT8_MAX_LOSS_ERROR, INT8_MAX_GRADIENT_ERROR = 1e-3, 0.02  # relative errors of the loss and of the gradient's norm

IMAGE_ROWS = 100  # among which a row with an image is searched
IMAGE_MAX_ERROR, IMAGE_MAX_ERROR_16_BIT = 1e-3, 0.05  # in nats a token
CAUSAL_TOKENS = 32  # length of the test row
CAUSAL_MAX_CHANGE = 5e-3  # maximum median change of log-probabilities in nats if later tokens change
CAUSAL_MAX_SHARE = 0.15  # the same, relative to the change if earlier tokens change


@dataclass(frozen=True)
class Forecast:
    items: list[Item]  # rows of the micro-batch that needs most memory
    batch: MicroBatch  # sizes of that micro-batch
    phases: dict[str, Phase]
    seconds: float | None  # training time on an otherwise idle machine; None if it is not predicted
    error_bytes: int | None = None  # measured minus predicted bytes of the dry run, if there was one

    def peak_bytes(self, device: str) -> int:
        """Predict PeakTracker.peak_bytes at the end of the run. On CUDA, it does not include the context."""
        used = [self.phases[name] for name in ("load", "draw", "train") if name in self.phases]
        has_context = device.startswith("cuda")
        return max(phase.peak_bytes - (phase.parts["framework"] if has_context else 0) for phase in used)

    def dry_run_bytes(self, device: str) -> int:
        """Predict PeakTracker.peak_bytes after the dry run, which has no optimizer state or accumulated gradients."""
        step = self.phases["train"]
        later = step.parts["optimizer"] + (step.parts["gradients"] if self.batch.more else 0)
        context = step.parts["framework"] if device.startswith("cuda") else 0
        return max(self.phases["load"].peak_bytes, step.peak_bytes - later) - context

    def calibrated_bytes(self, device: str) -> int | None:
        """Return `peak_bytes` corrected by the error of the dry run."""
        return None if self.error_bytes is None else max(0, self.peak_bytes(device) + self.error_bytes)

    @property
    def needed_bytes(self) -> int:
        return max(self.phases[name].needed_bytes for name in ("load", "train"))


def watch_memory(job: Job, machine: Machine) -> int:
    """Return the bytes that the run may use. On a CPU, steps raise an error above this limit from now on."""
    device = str(job.recipe.model.device)
    if device == "cpu":
        free = probe().free_bytes // job.devices.local_world_size
        job.step.set_memory_watch(MemoryWatch(machine.memory_bytes, free))
    return usable_bytes(machine, device)


def forecast(job: Job, workload: Workload, usable: int) -> Forecast:
    """Predict the run's memory from its rows."""
    progress, changes = job.state.progress, dict[str, object](step=job.step.name)
    changes |= {"checkpointed_layers": workload.shape.layers} if progress.recompute else {}
    changes |= {"offload": True} if progress.offload else {}
    changes |= {"resident_layers": 0} if progress.streamed else {}
    workload = workload.replace(**changes)
    largest, steps = _find_largest_batches(job, workload)
    candidates = [
        (items, describe_batch(job, items, more, workload.compute.attention_tiles)) for items, more in largest
    ]
    items, batch = max(candidates, key=lambda pair: peak_live_bytes(workload, pair[1]).total)
    rows = (job.train[row] for row in range(min(len(job.train), EVALUATED_ROWS)))
    sizes = [(len(example), example.supervised) for row in rows for example in row.examples]
    evaluation = EvaluationLoad.from_rows(sizes, job.recipe.data.max_length)
    rollouts = RolloutLoad.from_recipe(job.recipe, max(tokens for tokens, _ in sizes))
    model = job.recipe.model
    dtype = generation_dtype(model.dtype, model.device, _find_fastest_dtype(model.device))
    phases = predict_phases(workload, batch, evaluation, usable, rollouts, dtype=dtype)
    is_predicted = rollouts is None and job.devices.world_size == 1
    is_plain_sft = data_kind_of(job.recipe.train) == "turns" and not job.recipe.train.keep_share
    if is_predicted and is_plain_sft and job.step.prefix_sharing:
        steps = first_steps_of(job.recipe, cast(Sequence[Example], job.train), job.step.packed)
    return Forecast(items, batch, phases, _predict_seconds(job, workload, steps) if is_predicted else None)


def _predict_seconds(job: Job, workload: Workload, steps: Sequence[Sequence[MicroBatch]]) -> float | None:
    """Return the training time of the run, predicted as in `strop plan`. steps: micro-batches of the first steps."""
    try:
        rate = find_target(str(job.recipe.model.device)).rate_of(str(job.recipe.model.dtype))
    except RecipeError:  # PyTorch has a GPU that the driver does not list
        return None
    return batch_stream(job.recipe, len(job.train)).total_steps * steps_seconds(workload, steps, rate) / len(steps)


def _find_fastest_dtype(device: str) -> str:
    """Return the fastest dtype of the device. On a CPU without measurements, it depends on the instruction set."""
    if device != "cpu":
        return pick_dtype(device)[0]
    measured_dtype = load_precision(probe(), torch.get_num_threads())
    return measured_dtype[0] if measured_dtype else this_cpu().expected_dtype


def describe_batch(job: Job, items: Sequence[Item], step_continues: bool, tiles: bool) -> MicroBatch:
    """Return the sizes of a micro-batch, packed or padded as in the training step."""
    examples = [example for item in items for example in item.examples]
    supervised = sum(example.supervised for example in examples)
    if not job.step.packed:
        longest = max(len(example) for example in examples)
        return MicroBatch(longest * len(examples), supervised, ((len(examples), longest, longest),), step_continues)
    pack_examples = pack if isinstance(items[0], Example) else pack_separately
    pack_examples = pack_last_tokens if is_scored(job.criterion) else pack_examples
    if isinstance(job.criterion, EmbedCriterion):  # no logits are computed, whatever the pooling
        pack_examples = pack_last_tokens
    packed = pack_examples(examples, prefix_sharing=job.step.prefix_sharing, device=torch.device("cpu"))
    documents = packed.documents.shapes(in_buckets=not tiles)
    return MicroBatch(len(packed.ids), len(packed.label_rows), documents, step_continues)


def _find_largest_batches(job: Job, workload: Workload) -> tuple[list[tuple[list[Item], bool]], list[list[MicroBatch]]]:
    """Return the largest micro-batches by row lengths, and the sizes of those of the first steps.

    For each of the largest ones, return its rows and whether its step has other micro-batches.
    """
    sizes: list[tuple[int, tuple[int, ...], bool]] = []
    steps: list[list[MicroBatch]] = []
    stream = batch_stream(job.recipe, len(job.train))
    for step in islice(stream, searched_steps(stream)):
        items = [job.criterion.longest(job.train[row]) for row in step.rows]
        groups, step_sizes = micro_batches(job, items), list[MicroBatch]()
        for group in groups:
            batch_items, more = [items[row] for row in group], len(groups) > 1
            lengths = [len(example) for item in batch_items for example in item.examples]
            batch = MicroBatch.rows(lengths if job.step.packed else [max(lengths)] * len(lengths), more=more)
            batch = replace(batch, supervised=sum(item.supervised for item in batch_items))
            step_sizes.append(batch)
            sizes.append((peak_live_bytes(workload, batch).total, tuple(step.rows[row] for row in group), more))
        if len(steps) < TIMED_STEPS:
            steps.append(step_sizes)
    largest = heapq.nlargest(MAX_PACKED, sizes)
    rows_of_largest = [([job.criterion.longest(job.train[row]) for row in rows], more) for _, rows, more in largest]
    return rows_of_largest, steps


def try_largest_batch(job: Job, expected: Forecast, usable: int, memory: PeakTracker) -> Forecast:
    """Run the largest micro-batch, unless it fits easily, and return the forecast with the measured error.

    Memory is reduced as in a training step. Raises MemoryLimitError if it cannot be reduced further.
    """
    apply_memory_settings(job)
    fields = {
        "tokens": expected.batch.tokens,
        "predicted_bytes": expected.peak_bytes(memory.device),
        "usable_bytes": usable,
        "mapped_bytes": expected.phases["train"].parts["mapped_files"],
        "resident_bytes": memory.resident_bytes - memory.library_bytes,
        "predicted_seconds": None if expected.seconds is None else round(expected.seconds, 1),
    }
    (needed,) = job.devices.any_rank(expected.needed_bytes >= SAFE_SHARE * usable)
    if not needed:
        job.log.emit("rehearsal", done=False, **fields)
        return expected
    LOG.info("trying the largest micro-batch")
    device = job.state.device
    random, options = random_states(device), _get_memory_options(job)

    def compute(group: list[int]) -> None:
        loss, _ = job.criterion.loss(job.step, [expected.items[row] for row in group], 0.0)
        loss.backward()  # type: ignore[no-untyped-call]

    def split(rank: int) -> list[list[int]]:
        return micro_batches(job, expected.items)

    retry_with_less_memory(job, expected.items, lambda: job.devices.run_passes(split, compute, backward=True))
    job.state.optimizer.zero_grad(set_to_none=True)
    set_random_states(random, device)
    measured = memory.peak_bytes()
    job.log.emit("rehearsal", done=True, measured_bytes=measured, **fields)
    if _get_memory_options(job) != options:  # the prediction was for other options
        return expected
    return replace(expected, error_bytes=measured - expected.dry_run_bytes(memory.device))


def _get_memory_options(job: Job) -> tuple[int, bool, bool, bool]:
    progress = job.state.progress
    return progress.halvings, progress.recompute, progress.offload, progress.streamed


def check_int8(job: Job, items: Sequence[Item]) -> None:
    """Raise RunError if int8 matmuls change the loss or the gradient of the shortest rows too much."""
    if job.step.name == "plain":
        what = f"train.int8_matmul needs strop's fused kernels, which do not support this model: {job.step.why}"
        raise RunError(what, fix="leave train.int8_matmul out")
    rows = _select_shortest(items)
    with job.devices.all_or_none():
        loss, gradient = _loss_and_gradient(job, job.step, rows)
        reference_loss, reference_gradient = _loss_and_gradient(job, step_for(job.model), rows)
        loss_error = abs(loss - reference_loss) / max(abs(reference_loss), 1e-12)
        norm = torch.linalg.vector_norm
        gradient_error = float(norm(gradient - reference_gradient) / norm(reference_gradient))
        errors = f"relative error {loss_error:.1e} of the loss and {gradient_error:.1e} of the gradient against fp32"
        if not (loss_error <= INT8_MAX_LOSS_ERROR and gradient_error <= INT8_MAX_GRADIENT_ERROR):  # true for NaN
            limits = f"{INT8_MAX_LOSS_ERROR:.0e} and {INT8_MAX_GRADIENT_ERROR:.0e}"
            what = f"train.int8_matmul: {errors}, more than {limits}"
            raise RunError(what, fix="leave train.int8_matmul out for this model")
    job.log.emit("note", text=f"frozen weights are multiplied in 8-bit integers: {errors} on {len(rows)} rows")


def _select_shortest(items: Sequence[Item]) -> list[Item]:
    """Return the shortest items with at most INT8_TOKENS tokens in total, and at least one."""
    lengths = [sum(map(len, item.examples)) for item in items]
    order = sorted(range(len(items)), key=lengths.__getitem__)
    ends = accumulate(lengths[row] for row in order)
    return [items[row] for row, end in zip(order, ends, strict=True) if end <= INT8_TOKENS] or [items[order[0]]]


def _loss_and_gradient(job: Job, step: Step, rows: Sequence[Item]) -> tuple[float, Tensor]:
    random = random_states(job.state.device)
    loss, _ = job.criterion.loss(step, rows, 0.0)
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([weight.grad.flatten() for weight in job.state.weights.values() if weight.grad is not None])
    job.state.optimizer.zero_grad(set_to_none=True)
    step.release_buffers()
    set_random_states(random, job.state.device)
    return float(loss.detach()), gradient


def check_causal(job: Job, items: Sequence[Item]) -> None:
    """Raise ModelError if predictions depend on later tokens, as in a model that is not a decoder."""
    # The fast step (FastLoss) is always causal, and a score head does not predict tokens.
    if job.step.name != "plain" or is_scored(job.criterion):
        return
    config = cast(Any, job.model).config
    fix = "use a decoder-only language model; BERT-like models need is_decoder in their config"
    if why := why_not_causal(config):
        raise ModelError(why, fix=fix)
    rows = _make_changed_rows(items)
    job.model.eval()
    with job.devices.all_or_none(), torch.no_grad():
        [logprobs] = job.devices.run_passes(lambda rank: [rows], job.step.token_log_probs, backward=False)
    original, changed_later, changed_earlier = logprobs.view(3, -1)
    job.model.train()
    job.step.release_buffers()
    by_later, by_earlier = (float((changed - original).abs().median()) for changed in (changed_later, changed_earlier))
    if by_later > max(CAUSAL_MAX_CHANGE, CAUSAL_MAX_SHARE * by_earlier):
        raise ModelError(f"{config.model_type}: {NOT_CAUSAL}", fix=fix)


def check_images(job: Job, items: Sequence[Item]) -> None:
    """Raise ModelError if the step computes another loss on a row with an image than the model's own forward."""
    features = image_features(job.model)
    examples = [example for item in items for example in item.examples]
    rows = (example for row in range(min(len(job.train), IMAGE_ROWS)) for example in job.train[row].examples)
    if features is None or is_scored(job.criterion):
        return
    if (example := next(filter(features.is_comparable, (*examples, *rows)), None)) is None:
        return
    with job.devices.all_or_none(), torch.no_grad():
        expected, part = features.original_logprobs(job.model, example)
        job.model.eval()
        [computed] = job.devices.run_passes(lambda rank: [[part]], job.step.token_log_probs, backward=False)
        job.model.train()
        job.step.release_buffers()
        error = float((computed.float().cpu() - expected).abs().mean())
        limit = IMAGE_MAX_ERROR if job.recipe.model.dtype == "fp32" else IMAGE_MAX_ERROR_16_BIT
        if not error <= limit:
            kind = cast(Any, job.model).config.model_type
            what = f"{kind}: on a row with an image, strop's step differs by {error:.2g} nats a token from the model's"
            raise ModelError(what, fix="train on text, or choose another model that reads images")
    job.log.emit("note", text=f"images: equal to the model's own forward on a row, to {error:.1e} nats a token")


def _make_changed_rows(items: Sequence[Item]) -> list[Example]:
    """Return a row, and copies of it with other tokens after and before the supervised tokens."""
    longest = max((example for item in items for example in item.examples), key=len)
    half, quarter, positions = CAUSAL_TOKENS // 2, CAUSAL_TOKENS // 4, np.arange(CAUSAL_TOKENS)
    weights = ((positions > quarter) & (positions < half)).astype(np.float32)
    ids = np.resize(hide_images(longest.ids), CAUSAL_TOKENS)
    changed_later = np.where(positions >= half, ids[::-1], ids)
    changed_earlier = np.where(positions < quarter, ids[::-1], ids)
    return [replace(longest, ids=row, weights=weights) for row in (ids, changed_later, changed_earlier)]
