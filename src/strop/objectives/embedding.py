"""Embeddings: the InfoNCE loss with in-batch negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from strop.data.types import Mask, Triplet
from strop.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

EMBED = Objective(
    name="embed", data_kind="triplets", source="InfoNCE, arXiv:1807.03748, equation 4", learning_rate_factor=0.5,
    reference=False, options={"pooling": "last", "temperature": 0.05},
)  # fmt: skip


def contrastive_losses(vectors: Tensor, batch: Sequence[Triplet], temperature: float) -> tuple[Tensor, Tensor]:
    """Return the loss of each anchor, (N,), and whether its positive is the nearest candidate, (N,), bool.

    The loss is the cross entropy of the positive among the candidates, which are the positives and negatives of the
    whole batch, as MultipleNegativesRankingLoss of sentence-transformers with `scale` 1 / temperature. Candidates that
    match the anchor (see `find_false_negatives`) are left out.

    Args:
        vectors: (T, h), of unit length: anchor, positive and negatives of the first triplet, then of the others.
        batch: N triplets, which have T texts.
        temperature: the divisor of the cosine similarities.
    """
    import torch
    from torch.nn.functional import cross_entropy

    anchors = np.cumsum([0, *(len(triplet.examples) for triplet in batch)])[:-1]
    is_candidate = np.ones(len(vectors), np.bool_)
    is_candidate[anchors] = False
    candidates = np.flatnonzero(is_candidate)
    left_out = find_false_negatives(batch)
    own = torch.from_numpy(np.searchsorted(candidates, anchors + 1)).to(vectors.device)
    rows, columns = (torch.from_numpy(index).to(vectors.device) for index in (anchors, candidates))
    scores = vectors[rows] @ vectors[columns].t() / temperature
    scores = scores.masked_fill(torch.from_numpy(left_out).to(vectors.device), float("-inf"))
    losses = cross_entropy(scores, own, reduction="none")
    return losses, scores.detach().argmax(1) == own


def find_false_negatives(batch: Sequence[Triplet]) -> Mask:
    """Return which candidates match an anchor without being its positive, (N, M), bool.

    A candidate matches an anchor if it is the anchor itself, or the positive of an equal anchor. Texts are equal if
    their tokens are. The M candidates are the positives and negatives of the N triplets, in their order.
    """
    numbers: dict[bytes, int] = {}  # of different texts

    def number_of(ids: bytes) -> int:
        return numbers.setdefault(ids, len(numbers))

    texts = [[number_of(example.ids.tobytes()) for example in triplet.examples] for triplet in batch]
    anchors, candidates = [row[0] for row in texts], [text for row in texts for text in row[1:]]
    order, rows = np.unique(anchors, return_inverse=True)  # different anchors
    matches = np.zeros((len(order), len(numbers)), np.bool_)
    matches[np.arange(len(order)), order] = True
    matches[rows, [row[1] for row in texts]] = True
    left_out: Mask = matches[rows][:, candidates]
    positives = np.cumsum([0, *(len(row) - 1 for row in texts)])[:-1]
    left_out[np.arange(len(texts)), positives] = False
    return left_out
