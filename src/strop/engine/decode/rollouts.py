"""Answers drawn from a model as it is now, several to a prompt, with the log-probability of each token.

They are drawn at temperature 1 from all tokens: from the very distribution whose gradient is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from strop.data.types import Ids, LogProbs
from strop.engine.decode.batch import answer_groups
from strop.engine.decode.decoder_cache import batch_for, let_go
from strop.engine.decode.eligibility import active_adapter, unanswerable
from strop.engine.decode.sampling import Sampling, Text
from strop.errors import NonFiniteError
from strop.models.upstream_errors import attribute_errors

FROM_ALL = Sampling(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)


@dataclass(frozen=True)
class Drawn:
    """One answer: its tokens, the stop token included, and the log-probability of each, as it was drawn. stopped: ended
    by a stop token, not by the limit."""

    ids: Ids
    log_probs: LogProbs
    stopped: bool


Draws = Callable[[nn.Module, Sequence[Ids], Sequence[Sequence[int]], Sequence[int], int], list[list[Drawn]]]
"""As `draw`."""


def draw(
    model: nn.Module, prompts: Sequence[Ids], seeds: Sequence[Sequence[int]], stop_ids: Sequence[int], most: int
) -> list[list[Drawn]]:
    """To each prompt an answer for each of its seeds, of at most `most` tokens. Equal weights, prompts and seeds give
    equal answers, whatever is drawn beside them.

    Drawn by strop's engine (a prompt is read once), or by transformers' generate where that does not know the model.
    Raises NonFiniteError where the model's numbers are not finite.
    """
    if unanswerable(model) is not None:
        with torch.no_grad():
            return [_by_transformers(model, *asked, stop_ids, most) for asked in zip(prompts, seeds, strict=True)]
    adapter, options = active_adapter(model), {"stop_ids": stop_ids, "most": most, "logprobs": 0}
    groups = [
        [Text(prompt, adapter, sampling=_seeded(seed), **options) for seed in some]  # type: ignore[arg-type]
        for prompt, some in zip(prompts, seeds, strict=True)
    ]
    flat = [text for group in groups for text in group]
    told: dict[Text, list[float]] = {text: [] for text in flat}
    let_go(model)
    try:
        for news in answer_groups(batch_for(model, flat), groups):
            told[news.text] += [token.logprob for token in news.tokens]
    finally:
        let_go(model)  # a step needs the room of its cache
    if any(text.end == "failed" for text in flat):
        raise _not_finite()
    return [
        [Drawn(np.array(text.answer, np.int32), np.array(told[text]), text.end == "stop") for text in group]
        for group in groups
    ]


def _seeded(seed: int) -> Sampling:
    return Sampling(temperature=1.0, seed=seed)


def _by_transformers(model: Any, prompt: Ids, seeds: Sequence[int], stop_ids: Sequence[int], most: int) -> list[Drawn]:
    """The answers of one prompt, together; the first of their seeds stands for all."""
    device = next(model.parameters()).device
    width, training = len(prompt), model.training
    config = GenerationConfig(
        max_new_tokens=most, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0,
        eos_token_id=list(stop_ids), pad_token_id=stop_ids[0], use_cache=True,
    )  # fmt: skip
    ids = torch.from_numpy(prompt.astype(np.int64)).to(device)[None].repeat(len(seeds), 1)
    seen = _Seen(width)
    model.eval()
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards), attribute_errors(str(model.config.model_type)):
        torch.manual_seed(seeds[0])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
            logits_processor=LogitsProcessorList([seen]),
        )  # fmt: skip
    model.train(training)
    log_probs = seen.all_of(out)
    if not np.isfinite(log_probs).all():
        raise _not_finite()
    found = []
    for new, logs in zip(out[:, width:].tolist(), log_probs, strict=True):
        end = next((place + 1 for place, token in enumerate(new) if token in stop_ids), None)
        length = len(new) if end is None else end
        found.append(Drawn(np.array(new[:length], np.int32), logs[:length], end is not None))
    return found


class _Seen(LogitsProcessor):  # type: ignore[misc]
    """Keeps the log-probability of each token that is drawn; changes nothing."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._before: Tensor | None = None
        self._found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self._before = scores.float().log_softmax(-1)
        return scores

    def _take(self, ids: Tensor) -> None:
        if self._before is not None:
            self._found.append(self._before.gather(1, ids[:, -1:].to(self._before.device)))

    def all_of(self, out: Tensor) -> LogProbs:
        """(answers, tokens) of all that was drawn."""
        self._take(out)
        found: LogProbs = torch.cat(self._found, 1).double().cpu().numpy()
        return found


def _not_finite() -> NonFiniteError:
    return NonFiniteError("the model's numbers are not finite while it answers", fix="lower --train.learning_rate")
