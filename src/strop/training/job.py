"""What the loop works on, and in which order it takes the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from strop.config.schema import Recipe
from strop.data.batching import BatchStream
from strop.data.types import Item
from strop.distributed.devices import ALONE, Devices
from strop.engine.step import Step
from strop.runs.events import EventLog
from strop.runs.folder import RunFolder
from strop.training.criteria import Criterion, SupervisedTokens
from strop.training.state import TrainState


@dataclass(frozen=True)
class Job:
    """One run, ready to be trained.

    stream: puts packed weights in the place of those that were dequantized once; None where there are none such.
    memory_key: what running out of memory is remembered under, with the bytes that were usable; empty: not at all.
    criterion: what a step makes smaller.
    devices: those that train it together.
    """

    recipe: Recipe
    folder: RunFolder
    model: nn.Module
    step: Step
    train: Sequence[Item]
    eval: Sequence[Item] | None
    state: TrainState
    log: EventLog
    stream: Callable[[], None] | None = None
    memory_key: str = ""
    usable_bytes: int = 0
    criterion: Criterion = field(default_factory=SupervisedTokens)
    devices: Devices = ALONE


def stream_of(recipe: Recipe, num_rows: int, position: dict[str, int] | None = None) -> BatchStream:
    """The effective batches of the run, from this position on."""
    train = recipe.train
    return BatchStream(
        num_rows,
        batch_size=train.batch_size,
        seed=recipe.seed,
        epochs=train.epochs,
        max_steps=train.max_steps,
        position=position or None,
    )
