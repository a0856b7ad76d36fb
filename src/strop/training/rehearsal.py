"""What a run will need at its peak, and the largest micro-batch tried before the first step.

A run that would find no memory in its second hour finds none in its first minute. What is tried leaves no trace in the
numbers: its gradients are dropped and the random generators put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from strop.data.conversation import Example
from strop.engine.packed import pack
from strop.machine.memory import MemoryMark
from strop.planning.activations import MicroBatch, at_peak
from strop.planning.memory import Phase, phases
from strop.planning.setting import Setting
from strop.training.loop import Job, stream_of
from strop.training.shrink import go_on_shrunk, micro_batches, random_states, set_random_states, within_memory

LOOKED_AT = 5000  # steps, from the first; others have rows of the same data in another order
FAR_BELOW = 0.5  # of what may be used: no prediction was ever off by as much


@dataclass(frozen=True)
class Forecast:
    """examples: the micro-batch that needs most. phases: of the run, with that micro-batch."""

    examples: list[Example]
    batch: MicroBatch
    phases: dict[str, Phase]
    evaluates: bool

    def peak_bytes(self, device: str) -> int:
        """What MemoryMark.peak_bytes will say at the run's end; on CUDA the allocator's own, without the context."""
        used = [self.phases[name] for name in ("load", "train", *(["evaluate"] if self.evaluates else []))]
        context = device.startswith("cuda")
        return max(phase.peak_bytes - (phase.parts["framework"] if context else 0) for phase in used)

    @property
    def needed_bytes(self) -> int:
        return max(self.phases[name].needed_bytes for name in ("load", "train"))


def forecast(job: Job, setting: Setting) -> Forecast:
    """By the rows themselves: which of them stand in a micro-batch, what prefix they share, what is supervised."""
    setting = setting.but(step=job.step.name)
    if job.state.progress.recompute:
        setting = setting.but(checkpoint_layers=setting.shape.layers)
    if job.state.progress.streamed:
        setting = setting.but(resident_layers=0)
    found = [(examples, batch_of(job, examples, more)) for examples, more in _candidates(job)]
    examples, batch = max(found, key=lambda pair: at_peak(setting, pair[1]).total)
    return Forecast(examples, batch, phases(setting, batch, job.recipe.data.max_length), job.eval is not None)


def batch_of(job: Job, examples: Sequence[Example], more: bool) -> MicroBatch:
    """A micro-batch as the step computes it: packed behind a shared prefix, or padded to the longest row."""
    supervised = sum(example.supervised for example in examples)
    if not job.step.packed:
        longest = max(len(example) for example in examples)
        return MicroBatch(longest * len(examples), supervised, ((len(examples), longest, longest),), more)
    packed = pack(examples, prefix_sharing=True, device=torch.device("cpu"))
    documents = tuple((len(b.queries), b.queries.shape[1], b.keys.shape[1]) for b in packed.layout.buckets)
    return MicroBatch(len(packed.ids), len(packed.rows), documents, more)


def _candidates(job: Job) -> list[tuple[list[Example], bool]]:
    """The micro-batch with the most tokens and the one with the most pairs of them; whether others share its step."""
    stream = stream_of(job.recipe, len(job.train))
    most: dict[str, tuple[int, list[Example], bool]] = {}
    for step in range(min(stream.total_steps, stream.steps_per_epoch, LOOKED_AT)):
        examples = [job.train[row] for row in stream.rows(step)]
        groups = micro_batches(job, examples)
        for group in groups:
            chosen = [examples[row] for row in group]
            sizes = {
                "tokens": sum(len(example) for example in chosen),
                "pairs": sum(len(example) ** 2 for example in chosen),
            }
            for name, size in sizes.items():
                if name not in most or size > most[name][0]:
                    most[name] = (size, chosen, len(groups) > 1)
    return [(examples, more) for _, examples, more in most.values()]


def rehearse(job: Job, expected: Forecast, usable: int, memory: MemoryMark) -> None:
    """Forward and backward of the largest micro-batch, unless the forecast is far below what may be used.

    Micro-batches shrink as they would in a step; raises MemoryLimitError where nothing is left to save.
    """
    go_on_shrunk(job)  # as the steps will be computed
    tokens = expected.batch.tokens
    said = {"tokens": tokens, "predicted_bytes": expected.needed_bytes, "usable_bytes": usable}
    if expected.needed_bytes < FAR_BELOW * usable:
        job.log.emit("rehearsal", done=False, **said)
        return
    random = random_states()

    def compute() -> None:
        for group in micro_batches(job, expected.examples):
            job.step.token_loss([expected.examples[row] for row in group]).backward()  # type: ignore[no-untyped-call]

    within_memory(job, expected.examples, compute)
    job.state.optimizer.zero_grad(set_to_none=True)
    set_random_states(random)
    job.log.emit("rehearsal", done=True, measured_bytes=memory.peak_bytes(), **said)
