"""Compute the vectors of texts with a model of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import normalize

from strop.data.batching import in_row_order, pack
from strop.data.types import Example
from strop.engine.step import Step, step_for

if TYPE_CHECKING:
    from torch import Tensor, nn

MICRO_BATCH_TOKENS = 2048

Pooling = Literal["last", "mean"]
Vectors = npt.NDArray[np.float32]  # (N, h)
Compute = Callable[[list[int]], Vectors]  # examples of a batch, as indices -> vectors
RunBatches = Callable[[list[list[int]], Compute, Callable[[list[int]], float]], list[Vectors]]


def embed_examples(step: Step, pooling: Pooling, examples: Sequence[Example]) -> Tensor:
    """Return a vector of unit length for each example, (N, h), fp32, differentiable.

    pooling: `last` takes the hidden state of the last token after the final norm, `mean` averages those of all tokens.
    """
    hidden = step.last_hidden(examples) if pooling == "last" else step.mean_hidden(examples)
    return normalize(hidden.float(), dim=1)


class Embedder:
    """A model of embeddings, with one of the ways to pool the hidden states of a text."""

    def __init__(self, module: nn.Module, pooling: Pooling) -> None:
        self._step, self._pooling = step_for(module), pooling
        self._size: int = module.get_output_embeddings().weight.shape[1]  # type: ignore[operator]

    def embed(self, examples: Sequence[Example], run: RunBatches | None = None) -> Vectors:
        """Return the vector of each example, (N, h). run: runs batches, on several devices."""
        lengths = [len(example) for example in examples]

        def compute(batch: list[int]) -> Vectors:
            vectors: Vectors = embed_examples(self._step, self._pooling, [examples[row] for row in batch]).cpu().numpy()
            return vectors

        batches: Any = pack(lengths, max(MICRO_BATCH_TOKENS, *lengths, 0)) if lengths else []
        with torch.no_grad():
            if run is None:
                parts = [compute(batch) for batch in batches]
            else:
                parts = run(batches, compute, lambda batch: float(sum(lengths[row] for row in batch)))
        if not parts:
            return np.empty((0, self._size), np.float32)
        return np.array(in_row_order(batches, [list(part) for part in parts]), np.float32)
