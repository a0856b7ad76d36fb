"""What a run will need at its peak, and the largest micro-batch tried before the first step.

A run that would find no memory in its second hour finds none in its first minute. What is tried leaves no trace in the
numbers: its gradients are dropped and the random generators put back.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from strop.data.types import Example, Item
from strop.engine.device import pick_dtype
from strop.engine.train.packing import pack, pack_apart
from strop.machine.memory import PeakTracker
from strop.machine.probe import probe
from strop.machine.rates import load_precision
from strop.objectives.table import drawn_tokens
from strop.planning.activations import MicroBatch, at_peak
from strop.planning.memory import Drawn, Phase
from strop.planning.phases import Asked, phases
from strop.planning.time import has_bf16
from strop.planning.workload import Setting
from strop.training.criteria import OfAnswers
from strop.training.job import Job, stream_of
from strop.training.oom import go_on_shrunk, micro_batches, within_memory
from strop.training.state import random_states, set_random_states

LOG = logging.getLogger(__name__)

LOOKED_AT = 20_000  # steps, from the first
LOOKED_AT_ROWS = 50_000  # where that is more than an epoch: later ones have the same rows in another order
LAID_OUT = 32  # micro-batches that are packed to see what they need, of those that need most by their rows' lengths
FAR_BELOW = 0.5  # of what may be used: no prediction was ever off by as much


@dataclass(frozen=True)
class Forecast:
    """items: the micro-batch that needs most. phases: of the run, with that micro-batch. off_bytes: by how much the
    rehearsal needed more than was predicted; None where nothing was rehearsed."""

    items: list[Item]
    batch: MicroBatch
    phases: dict[str, Phase]
    off_bytes: int | None = None

    def peak_bytes(self, device: str) -> int:
        """What MemoryMark.peak_bytes will say at the run's end; on CUDA the allocator's own, without the context."""
        used = [self.phases[name] for name in ("load", "draw", "train") if name in self.phases]
        context = device.startswith("cuda")
        return max(phase.peak_bytes - (phase.parts["framework"] if context else 0) for phase in used)

    def rehearsed_bytes(self, device: str) -> int:
        """What it will say after the rehearsal: without the optimizer's state and what earlier micro-batches leave."""
        step = self.phases["train"]
        later = step.parts["optimizer"] + (step.parts["gradients"] if self.batch.more else 0)
        context = step.parts["framework"] if device.startswith("cuda") else 0
        return max(self.phases["load"].peak_bytes, step.peak_bytes - later) - context

    def calibrated_bytes(self, device: str) -> int | None:
        """peak_bytes, moved by what the rehearsal has shown."""
        return None if self.off_bytes is None else max(0, self.peak_bytes(device) + self.off_bytes)

    @property
    def needed_bytes(self) -> int:
        return max(self.phases[name].needed_bytes for name in ("load", "train"))


def forecast(job: Job, setting: Setting, usable: int) -> Forecast:
    """By the rows themselves: which of them stand in a micro-batch, what prefix they share, what is supervised."""
    setting = setting.but(step=job.step.name)
    if job.state.progress.recompute:
        setting = setting.but(checkpoint_layers=setting.shape.layers)
    if job.state.progress.offload:
        setting = setting.but(offload=True)
    if job.state.progress.streamed:
        setting = setting.but(resident_layers=0)
    found = [(items, batch_of(job, items, more, setting.tiles)) for items, more in _candidates(job, setting)]
    items, batch = max(found, key=lambda pair: at_peak(setting, pair[1]).total)
    made = phases(setting, batch, _asked(job), usable, _drawn(job), dtype=_answers_in(job.recipe.model.device))
    return Forecast(items, batch, made)


def _answers_in(device: str) -> str:
    """What a command that answers would compute in. A CPU that has not tried it is not made to now, beside a model."""
    if device != "cpu":
        return pick_dtype(device)[0]
    known = load_precision(probe(), torch.get_num_threads())
    return known[0] if known else "bf16" if has_bf16(probe()) else "fp32"


def _asked(job: Job) -> Asked:
    """What an evaluation of rows like these asks."""
    rows = (job.train[row] for row in range(min(len(job.train), LOOKED_AT)))
    examples = (example for row in rows for example in row.examples)
    return Asked.of([(len(one), one.supervised) for one in examples], job.recipe.data.max_length)


def _drawn(job: Job) -> Drawn | None:
    """What a step draws, behind the longest prompt there is."""
    if not drawn_tokens(job.recipe.train):
        return None
    return Drawn.of(job.recipe, max(len(job.train[row]) for row in range(min(len(job.train), LOOKED_AT))))


def batch_of(job: Job, items: Sequence[Item], more: bool, tiles: bool) -> MicroBatch:
    """A micro-batch as the step computes it: packed behind shared prefixes, or padded to the longest row."""
    examples = [example for item in items for example in item.examples]
    supervised = sum(example.supervised for example in examples)
    if not job.step.packed:
        longest = max(len(example) for example in examples)
        return MicroBatch(longest * len(examples), supervised, ((len(examples), longest, longest),), more)
    lay_out = pack if isinstance(items[0], Example) else pack_apart
    packed = lay_out(examples, prefix_sharing=job.step.shares, device=torch.device("cpu"))
    documents = packed.documents.shapes(in_buckets=not tiles)
    scored = isinstance(job.criterion, OfAnswers) and job.criterion.objective.scored
    return MicroBatch(len(packed.ids), len(examples) if scored else len(packed.picked), documents, more)


def _candidates(job: Job, setting: Setting) -> list[tuple[list[Item], bool]]:
    """The micro-batches that need most by their rows' lengths, and whether others share their step. What the prefix of
    a micro-batch saves, packing alone can tell."""
    found: list[tuple[int, tuple[int, ...], bool]] = []
    stream = stream_of(job.recipe, len(job.train))
    enough = max(stream.steps_per_epoch, LOOKED_AT_ROWS // stream.batch_size)
    for step in islice(stream, min(LOOKED_AT, enough)):
        items = [job.criterion.longest(job.train[row]) for row in step.rows]
        groups = micro_batches(job, items)
        for group in groups:
            chosen, more = [items[row] for row in group], len(groups) > 1
            lengths = [len(example) for item in chosen for example in item.examples]
            batch = MicroBatch.rows(lengths if job.step.packed else [max(lengths)] * len(lengths), more=more)
            batch = replace(batch, supervised=sum(item.supervised for item in chosen))
            found.append((at_peak(setting, batch).total, tuple(step.rows[row] for row in group), more))
    largest = heapq.nlargest(LAID_OUT, found)
    return [([job.criterion.longest(job.train[row]) for row in rows], more) for _, rows, more in largest]


def rehearse(job: Job, expected: Forecast, usable: int, memory: PeakTracker) -> Forecast:
    """Forward and backward of the largest micro-batch, unless the forecast is far below what may be used; gives the
    forecast with what was learned.

    Micro-batches shrink as they would in a step; raises MemoryLimitError where nothing is left to save.
    """
    go_on_shrunk(job)  # as the steps will be computed
    tokens = expected.batch.tokens
    said = {"tokens": tokens, "predicted_bytes": expected.peak_bytes(memory.device), "usable_bytes": usable}
    said["mapped_bytes"] = expected.phases["train"].parts["mapped_files"]
    (near,) = job.devices.agree(expected.needed_bytes >= FAR_BELOW * usable)
    if not near:
        job.log.emit("rehearsal", done=False, **said)
        return expected
    LOG.info("trying the largest micro-batch")
    device = job.state.device
    random, shape = random_states(device), _shape(job)

    def compute(group: list[int]) -> None:
        loss, _ = job.criterion.loss(job.step, [expected.items[row] for row in group], 0.0)
        loss.backward()  # type: ignore[no-untyped-call]

    def all_groups() -> None:
        job.devices.turns(lambda rank: micro_batches(job, expected.items), compute, backward=True)

    within_memory(job, expected.items, all_groups)
    job.state.optimizer.zero_grad(set_to_none=True)
    set_random_states(random, device)
    measured = memory.peak_bytes()
    job.log.emit("rehearsal", done=True, measured_bytes=measured, **said)
    if _shape(job) != shape:  # it was tried in other shapes than it was predicted for
        return expected
    return replace(expected, off_bytes=measured - expected.rehearsed_bytes(memory.device))


def _shape(job: Job) -> tuple[int, bool, bool, bool]:
    progress = job.state.progress
    return progress.halvings, progress.recompute, progress.offload, progress.streamed
