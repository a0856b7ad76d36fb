"""Give a merged model of embeddings the files of sentence-transformers, and compare its vectors with the adapter's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize
from transformers import MODEL_MAPPING, AutoModel

from strop.data.types import Example, Triplet
from strop.engine.decode.embed import Pooling, embed_examples
from strop.engine.train.plain import PlainLoss
from strop.evaluation.retrieval import Retrieval
from strop.exporting.parity import Limit, Parity, compare, compute_in_fp32
from strop.models.embedder import set_padding
from strop.objectives.embedding import EMBED


def set_architecture(config: Any, tokenizer: Any) -> None:
    """Change a base's config and tokenizer to those of a model without an output head that takes padded batches."""
    config.architectures = [MODEL_MAPPING[type(config)].__name__]
    set_padding(tokenizer)


def compare_embedders(
    load_tuned: Callable[[], Any], folder: Path, dtype: torch.dtype, triplets: Sequence[Triplet], pooling: Pooling,
    limit: Limit,
) -> Parity:  # fmt: skip
    """Compare a merged model of embeddings with the adapter on its base.

    The positions of the result are anchors, with the softmax of their similarities to all positives and negatives at
    the default temperature as the distribution.
    """
    task = Retrieval.from_rows([triplet.examples for triplet in triplets])
    examples = [example for triplet in triplets for example in triplet.examples]
    texts = [examples[index] for index in (*task.anchors, *task.candidates)]
    vectors: list[Tensor] = []  # of the tuned and of the merged model

    def similarities(embed: Callable[[Example], Tensor]) -> _Similarities:
        with torch.no_grad():
            vectors.append(torch.stack([embed(text).float().cpu() for text in texts]))
        return _Similarities(vectors[-1][: len(task.anchors)], vectors[-1][len(task.anchors) :])

    def reference() -> _Similarities:
        step = PlainLoss(load_tuned())
        return similarities(lambda text: embed_examples(step, pooling, [text])[0])

    def merged() -> _Similarities:
        model = AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
        model = compute_in_fp32(cast(Any, model).eval())

        def embed(text: Example) -> Tensor:
            hidden = model(input_ids=torch.from_numpy(text.ids.astype(np.int64))[None]).last_hidden_state[0].float()
            return normalize(hidden[-1] if pooling == "last" else hidden.mean(0), dim=0)

        return similarities(embed)

    rows = [_as_row(index, int(matches.argmax())) for index, matches in enumerate(task.matches)]
    parity = compare(reference, merged, rows, limit)
    return replace(parity, cosine_min=float((vectors[0] * vectors[1]).sum(1).min()))


def _as_row(anchor: int, positive: int) -> Example:
    """Return a row whose "tokens" are the numbers of an anchor and of its positive."""
    return Example(np.array([anchor, positive], np.int32), np.array([0.0, 1.0], np.float32), "row", anchor + 1)


class _Similarities:
    """The vectors of anchors (Q, h) and candidates (D, h), as `parity.compare` reads them."""

    def __init__(self, anchors: Tensor, candidates: Tensor) -> None:
        self._anchors, self._candidates = anchors, candidates

    def log_probabilities(self, row: Example) -> Tensor:
        """Return (1, D)."""
        scores = self._candidates @ self._anchors[int(row.ids[0])] / EMBED.options["temperature"]
        return log_softmax(scores[None], 1)
