"""Which token comes next: greedy, or sampled as the request and the model's own generation config say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from strop.model.generate import Sampling

COLDEST = 1e-4  # below it logits divided by the temperature may overflow, and sampling is greedy anyway

# (tokens so far, logits): sets what may not come to -inf; raises NoToken
Mask = Callable[[Sequence[int], Tensor], None]


class NoToken(Exception):
    """No token can come next. end: failed (the model's numbers are not finite) or format (what a grammar asks for)."""

    def __init__(self, end: str) -> None:
        super().__init__(end)
        self.end = end


@dataclass(frozen=True)
class Token:
    """logprob: of the model's own distribution, before any sampling; likeliest: tokens with theirs, from the top."""

    id: int
    logprob: float = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Picks the tokens of one request. logprobs: how many likeliest to tell of; None: not even the token's own.

    mask: what a grammar forbids. Random numbers are the request's own: what else is in the batch does not matter.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], logprobs: int | None, mask: Mask | None = None
    ) -> None:
        self._logprobs, self._mask = logprobs, mask
        self.tokens: list[int] = []
        self._prompt = list(prompt)
        self._greedy = sampling.temperature < COLDEST
        self._penalty = sampling.repetition_penalty
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)
        self._warp = LogitsProcessorList()
        if not self._greedy:
            if sampling.temperature != 1:
                self._warp.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self._warp.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warp.append(TopPLogitsWarper(sampling.top_p))

    @property
    def plain(self) -> bool:
        """The likeliest token and nothing else is asked for, so that a whole batch can be told at once."""
        return self._greedy and self._logprobs is None and self._mask is None and self._penalty == 1

    def take(self, token: int) -> Token:
        self.tokens.append(token)
        return Token(token)

    def pick(self, logits: Tensor) -> Token:
        """logits: (vocabulary,), of the next token. Raises NoToken."""
        logits = scores = logits.float().cpu()
        if not logits.max().isfinite():
            raise NoToken("failed")
        if self._penalty != 1 or self._mask is not None or not self._greedy:
            seen = torch.tensor([[*self._prompt, *self.tokens]])
            scores = logits.clone()
            if self._penalty != 1:
                scores = RepetitionPenaltyLogitsProcessor(self._penalty)(seen, scores[None])[0]
            if self._mask is not None:
                self._mask(self.tokens, scores)
            scores = self._warp(seen, scores[None])[0]
        if self._greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._random))
        self.tokens.append(token)
        if self._logprobs is None:
            return Token(token)
        logs = logits.log_softmax(-1)
        top = logs.topk(self._logprobs)
        return Token(token, float(logs[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
