"""The training step of a model: the fast one where it applies, else the plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from strop.engine.train.dropout import Masks
from strop.engine.train.eligibility import why_not_fast
from strop.engine.train.fast import FastLoss
from strop.engine.train.plain import LayerWatch, PlainLoss, WeightGatherer

if TYPE_CHECKING:
    from strop.data.types import Example


class Step(Protocol):
    """Computes the losses of micro-batches. Implemented by FastLoss and PlainLoss."""

    @property
    def name(self) -> str:
        """The name of the step, `fast` or `plain`."""

    @property
    def why(self) -> str:
        """The reason for the plain step, or the parts of the fast step that run the model's own modules."""

    @property
    def masks(self) -> Masks:
        """The state of dropout; call `begin` at each training step."""

    @property
    def packed(self) -> bool:
        """True if the step packs rows without padding, so that a micro-batch may mix rows of any lengths."""

    @property
    def prefix_sharing(self) -> bool:
        """True if a prefix that rows share is computed once."""

    @property
    def why_no_triton(self) -> str:
        """The reason why a GPU runs PyTorch's operations instead of strop's kernels; empty if it runs the kernels."""

    @property
    def can_offload(self) -> bool:
        """True if `offload` is supported."""

    def token_loss(self, examples: Sequence[Example]) -> Tensor:
        """Return the sum over supervised tokens of weight * cross entropy: an fp32 scalar, differentiable."""

    def log_probs(self, examples: Sequence[Example]) -> Tensor:
        """Return the sum of weight * log-probability of each example (N,), fp64, differentiable."""

    def token_log_probs(self, examples: Sequence[Example]) -> Tensor:
        """Return the log-probability of each supervised token, example after example (M,), differentiable."""

    def last_hidden(self, examples: Sequence[Example]) -> Tensor:
        """Return the normalized hidden state of the last token of each example (N, h), differentiable."""

    def checkpoint(self, layers: int | None = None) -> None:
        """Save only the input of the first `layers` layers (None: all), and recompute these layers in the backward.

        The plain step can only do this for all layers.
        """

    def offload(self) -> None:
        """Recompute all layers in the backward and keep their inputs in the host's memory."""

    def replace_weights(self, replace: Callable[[], None]) -> None:
        """Release the frozen weights, call `replace`, which replaces them in the model, and use the new weights."""

    def release_buffers(self) -> None:
        """Free the memory kept between micro-batches. It is allocated again when needed."""

    def set_memory_watch(self, watch: LayerWatch) -> None:
        """Call `watch` before each layer."""

    def set_weight_gatherer(self, gather: WeightGatherer) -> None:
        """Call `gather` before sharded weights are used."""


def step_for(model: nn.Module, *, integers: bool = False) -> Step:
    """Return the step that trains this model with its adapters. integers: as for FastLoss."""
    why = why_not_fast(model)
    return FastLoss(model, integers=integers) if why is None else PlainLoss(model, why)
