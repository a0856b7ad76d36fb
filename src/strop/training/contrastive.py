"""The contrastive objective in training, with GradCache (arXiv:2101.06983).

Before each step, the texts of the effective batch are embedded in micro-batches without gradients. The loss of the
whole batch and its gradient with respect to each vector follow. The micro-batches of the step then propagate these
gradients to the weights, so that memory does not depend on the size of the effective batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from strop.config.schema import TrainSection
from strop.data.batching import in_row_order
from strop.data.types import Example, Item, Triplet
from strop.distributed.devices import SINGLE_PROCESS, Devices
from strop.engine.decode.embed import Pooling, Vectors, embed_examples
from strop.engine.step import Step
from strop.engine.train.buffers import copy_like
from strop.evaluation.retrieval import Retrieval, score_retrieval, summarize_scores
from strop.objectives import require
from strop.objectives.embedding import contrastive_losses
from strop.training.criteria import EVALUATING, Criterion, Metrics, Split, micro_batches_of


@dataclass(frozen=True)
class EmbedCriterion(Criterion):
    """InfoNCE over the texts of the effective batch, averaged over its anchors: see `contrastive_losses`."""

    options: TrainSection
    devices: Devices = SINGLE_PROCESS

    @property
    def prepares(self) -> bool:
        return True

    @property
    def pooling(self) -> Pooling:
        assert self.options.pooling is not None, "options are set before a run starts"
        return self.options.pooling

    def prepare(self, step: Step, items: Sequence[Item], index: int, split: Split) -> list[Item]:
        """Return the triplets with the loss of each anchor, and its gradient with respect to each vector."""
        batch = _as_triplets(items)
        examples = [example for triplet in batch for example in triplet.examples]
        parts = self._embed(step, batch, split)
        vectors = torch.from_numpy(np.concatenate(parts)).double().requires_grad_()
        losses, are_first = self._contrast(vectors, batch)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        assert vectors.grad is not None and len(examples) == len(vectors)
        gradients = np.split(vectors.grad.float().numpy(), np.cumsum([len(part) for part in parts])[:-1])
        return [
            replace(triplet, gradients=gradient, loss=loss, is_first=is_first)
            for triplet, gradient, loss, is_first in zip(
                batch, gradients, losses.tolist(), are_first.tolist(), strict=True
            )
        ]

    def divisor(self, items: Sequence[Item]) -> float:
        return float(len(items))

    def loss(self, step: Step, items: Sequence[Item], statistic: float) -> tuple[Tensor, Metrics]:
        """Return the loss sum of the anchors of a micro-batch, whose gradient is that of the loss of the whole batch.

        The loss of triplets that were not prepared is computed over the micro-batch alone.
        """
        batch = _as_triplets(items)
        vectors = embed_examples(step, self.pooling, [example for triplet in batch for example in triplet.examples])
        gradients = [triplet.gradients for triplet in batch if triplet.gradients is not None]
        if len(gradients) < len(batch):
            losses, are_first = self._contrast(vectors, batch)
            return losses.sum(), {"accuracy": are_first.float()}
        firsts = [float(triplet.is_first) for triplet in batch]
        slopes, accuracy = copy_like([np.concatenate(gradients), firsts], vectors)
        product = (vectors * slopes).sum()
        return product + (sum(triplet.loss for triplet in batch) - product.detach()), {"accuracy": accuracy}

    def evaluate(self, step: Step, items: Sequence[Item], split: Split) -> dict[str, Any]:
        """Return the loss in batches of the training size, and scores of retrieval with intervals, or only a NaN loss.

        The candidates are all texts of the held-out rows.
        """
        batch = _as_triplets(items)
        parts = self._embed(step, batch, split, EVALUATING)
        if not all(np.isfinite(part).all() for part in parts):
            return {"loss": math.nan}
        total = 0.0
        for rows in np.array_split(np.arange(len(batch)), max(1, len(batch) // self.options.batch_size)):
            vectors = torch.from_numpy(np.concatenate([parts[row] for row in rows])).double()
            total += float(self._contrast(vectors, [batch[row] for row in rows.tolist()])[0].sum())
        retrieval = Retrieval.from_rows([triplet.examples for triplet in batch])
        scores = score_retrieval(retrieval, retrieval.select(np.concatenate(parts)))
        return {"loss": total / len(batch), **summarize_scores(scores)}

    def _contrast(self, vectors: Tensor, batch: Sequence[Triplet]) -> tuple[Tensor, Tensor]:
        return contrastive_losses(vectors, batch, require(self.options.temperature))

    def _embed(self, step: Step, batch: Sequence[Triplet], split: Split, activity: str = "") -> list[Vectors]:
        """Return the vectors of the texts of each triplet, (n, h), computed without gradients on all devices."""
        batches = list(micro_batches_of(batch, split))

        def embed(rows: Sequence[int]) -> list[Vectors]:
            examples: list[Example] = [example for row in rows for example in batch[row].examples]
            vectors = embed_examples(step, self.pooling, examples).cpu().numpy()
            return np.split(vectors, np.cumsum([len(batch[row].examples) for row in rows])[:-1])

        with torch.no_grad():
            parts = self.devices.map(batches, embed, lambda rows: sum(len(batch[row]) for row in rows), activity)
        return in_row_order(batches, parts)


def _as_triplets(items: Sequence[Item]) -> Sequence[Triplet]:
    return cast("Sequence[Triplet]", items)
