"""Which token comes next: greedy, or sampled as the request and the model's own generation config say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

COLDEST = 1e-4  # below it logits divided by the temperature may overflow, and sampling is greedy anyway

Mask = Callable[[Sequence[int], Tensor], None]  # (tokens so far, logits): sets what may not come to -inf


@dataclass(frozen=True)
class Choice:
    """temperature 0: greedy. top_k 0 and top_p 1: all tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def changed(self, temperature: float | None, top_p: float | None, seed: int | None) -> Choice:
        """With what a request asks for."""
        return replace(
            self,
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p if top_p is None else top_p,
            seed=seed,
        )


def model_choice(config: Any) -> Choice:
    """What a model's generation config says; greedy where it says nothing."""

    def given(name: str, otherwise: float) -> float:
        value = getattr(config, name, None)
        return otherwise if value is None else value

    penalty = given("repetition_penalty", 1.0)
    if not given("do_sample", 0):
        return Choice(repetition_penalty=penalty)
    return Choice(given("temperature", 1.0), given("top_p", 1.0), int(given("top_k", 0)), penalty)


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

    def __init__(self, choice: Choice, prompt: Sequence[int], logprobs: int | None, mask: Mask | None = None) -> None:
        self._logprobs, self._mask = logprobs, mask
        self.tokens: list[int] = []
        self._prompt = list(prompt)
        self._greedy = choice.temperature < COLDEST
        self._penalty = choice.repetition_penalty
        self._random = torch.Generator()
        if choice.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(choice.seed)
        self._warp = LogitsProcessorList()
        if not self._greedy:
            if choice.temperature != 1:
                self._warp.append(TemperatureLogitsWarper(choice.temperature))
            if choice.top_k:
                self._warp.append(TopKLogitsWarper(choice.top_k))
            if choice.top_p < 1:
                self._warp.append(TopPLogitsWarper(choice.top_p))

    @property
    def plain(self) -> bool:
        """The likeliest token and nothing else is asked for, so that a whole batch can be told at once."""
        return self._greedy and self._logprobs is None and self._mask is None and self._penalty == 1

    def take(self, token: int) -> Token:
        self.tokens.append(token)
        return Token(token)

    def pick(self, logits: Tensor) -> Token:
        """logits: (vocabulary,), of the next token."""
        logits = scores = logits.float().cpu()
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
