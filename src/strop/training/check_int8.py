"""Products in 8-bit integers, held against fp32 on the run's own rows before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from strop.data.types import Item
from strop.engine.step import Step, step_for
from strop.errors import RunError
from strop.training.job import Job
from strop.training.state import random_states, set_random_states

TOKENS = 512  # of rows that are tried
LOSS, GRADIENT = 1e-3, 0.02  # how far off they may be: relative, the gradient by its norm


def hold_to_floats(job: Job, items: Sequence[Item]) -> None:
    """Raises RunError where the loss or the gradient of the shortest of these rows is further from fp32's, or the plain
    step trains the model."""
    if job.step.name == "plain":
        raise RunError(f"train.int8_matmul: the plain step cannot: {job.step.why}", fix="leave train.int8_matmul out")
    rows = _some(items)
    with job.devices.together():
        loss, gradient = _measured(job, job.step, rows)
        true_loss, true_gradient = _measured(job, step_for(job.model), rows)
        off = abs(loss - true_loss) / max(abs(true_loss), 1e-12)
        turned = float(torch.linalg.vector_norm(gradient - true_gradient) / torch.linalg.vector_norm(true_gradient))
        said = f"the loss {off:.1e} and the gradient {turned:.1e} from fp32's"
        if not (off <= LOSS and turned <= GRADIENT):  # NaN is neither
            what = f"train.int8_matmul: {said}, more than {LOSS:.0e} and {GRADIENT:.0e}"
            raise RunError(what, fix="leave train.int8_matmul out for this model")
    job.log.emit("note", text=f"frozen weights are multiplied in 8-bit integers: {said} on {len(rows)} rows")


def _some(items: Sequence[Item]) -> list[Item]:
    lengths = [sum(map(len, item.examples)) for item in items]
    order = sorted(range(len(items)), key=lengths.__getitem__)
    ends = accumulate(lengths[row] for row in order)
    return [items[row] for row, end in zip(order, ends, strict=True) if end <= TOKENS] or [items[order[0]]]


def _measured(job: Job, step: Step, rows: Sequence[Item]) -> tuple[float, Tensor]:
    random = random_states(job.state.device)
    loss, _ = job.criterion.loss(step, rows, 0.0)
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([weight.grad.flatten() for weight in job.state.weights.values() if weight.grad is not None])
    job.state.optimizer.zero_grad(set_to_none=True)
    step.release_buffers()
    set_random_states(random, job.state.device)
    return float(loss.detach()), gradient
