"""Injected out-of-memory errors, and loss curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from strop.training.state import Job
from tests.support.steps import changed_step


def no_memory(calls: set[int], number: list[int]) -> Callable[[Any], None]:
    def maybe(_: Any) -> None:
        number[0] += 1
        if number[0] in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return maybe


def starved(job: Job, calls: set[int], recompute: list[str] | None = None) -> Job:
    good, maybe = job.step.token_loss, no_memory(calls, [0])

    def compute(rows: Any) -> torch.Tensor:
        maybe(rows)
        return good(rows)

    calls_ = recompute if recompute is not None else []
    return replace(job, step=changed_step(job.step, token_loss=compute, checkpoint=lambda: calls_.append("recompute")))


def curve(kind: str, losses: dict[int, float]) -> list[dict[str, Any]]:
    return [{"event": kind, "step": step, "loss": loss} for step, loss in losses.items()]


def falling(first: float, last: float, steps: int = 60) -> dict[int, float]:
    return {n: first + (last - first) * n / steps + 0.05 * (-1) ** n for n in range(1, steps + 1)}
