"""Choose the training step of a model: FastLoss (the fast step) if it supports the model, else PlainLoss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from strop.engine.train.dropout import Masks
from strop.engine.train.eligibility import why_not_fast
from strop.engine.train.fast import FastLoss
from strop.engine.train.plain import LayerWatch, PlainLoss, WeightGatherer

if TYPE_CHECKING:
    from strop.data.types import Example


class Step(Protocol):
    """Interface of FastLoss and PlainLoss, which compute the losses of micro-batches.

    Attributes:
        name: `fast` or `plain`.
        why: the reason for the plain step, or the parts of the fast step that call the model's modules.
        masks: the dropout masks. Call their `begin` at each training step.
        packed: whether rows are packed without padding, so that lengths in a micro-batch may differ.
        prefix_sharing: whether the shared prefix of rows is computed only once.
        soft_loss: the part of the last `token_loss` that is of soft labels, without a gradient.
        gpu_failures: which operations a GPU cannot use, and why, in one line, or an empty string.
    """

    name: str
    why: str
    masks: Masks
    packed: bool
    prefix_sharing: bool
    soft_loss: Tensor
    gpu_failures: str

    @property
    def can_offload(self) -> bool:
        """True if `offload` is supported."""

    def token_loss(self, examples: Sequence[Example]) -> Tensor:
        """Return the sum of weight * cross entropy over supervised tokens, a differentiable fp32 scalar."""

    def log_probs(self, examples: Sequence[Example]) -> Tensor:
        """Return the sum of weight * log-probability for each example, (N,), fp64, differentiable."""

    def token_log_probs(self, examples: Sequence[Example]) -> Tensor:
        """Return the log-probabilities of the supervised tokens of all examples, (M,), differentiable."""

    def top_probs(self, examples: Sequence[Example], k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Return ids and their probabilities (M, k), for the supervised tokens of all examples.

        They are the k most likely ids, the last of which is replaced by the token's own where that is not among them.
        """

    def last_hidden(self, examples: Sequence[Example]) -> Tensor:
        """Return the normalized hidden state of the last token of each example, (N, h), differentiable."""

    def mean_hidden(self, examples: Sequence[Example]) -> Tensor:
        """Return the mean of the normalized hidden states of each example's tokens, (N, h), fp32, differentiable."""

    def checkpoint(self, layers: int | None = None) -> None:
        """Save only the inputs of the first layers, and recompute these layers in the backward.

        layers: number of layers, or None for all. The plain step supports only None.
        """

    def offload(self) -> None:
        """Recompute all layers in the backward, and keep their inputs in host memory."""

    def replace_weights(self, replace: Callable[[], None]) -> None:
        """Release the frozen weights, call `replace`, which sets new ones in the model, and use these."""

    def release_buffers(self) -> None:
        """Free the buffers that are kept between micro-batches. They are allocated again when needed."""

    def set_memory_watch(self, watch: LayerWatch) -> None:
        """Call `watch` before each layer."""

    def set_weight_gatherer(self, gather: WeightGatherer) -> None:
        """Call `gather` before sharded weights are used."""


def compute_scores(step: Step, head: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Return the outputs of a score head on the last token of each example, (N, outputs), fp64, differentiable."""
    scores: Tensor = head(step.last_hidden(examples).float())
    return scores.double()


def step_for(model: nn.Module, *, int8_matmul: bool = False, dtype: torch.dtype | None = None) -> Step:
    """Return the step that trains this model with its adapters. int8_matmul, dtype: see FastLoss."""
    why = why_not_fast(model, dtype)
    step = FastLoss(model, int8_matmul=int8_matmul, dtype=dtype) if why is None else PlainLoss(model, why, dtype)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if (gather := getattr(base, "weight_gatherer", None)) is not None:  # of a base that is not all in memory
        step.set_weight_gatherer(gather)
    return step
