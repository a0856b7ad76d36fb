"""Sampling settings, and the state of sequences that are being decoded."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from strop.data.images import FIRST_IMAGE_ID
from strop.data.types import Ids
from strop.engine.kernels.dispatch import argmax, sample_token, token_logprobs
from strop.errors import InputError

MIN_TEMPERATURE = 1e-4  # at lower temperatures decoding is greedy, because logits / temperature may overflow

# Fields of a generation config that change the output and are not implemented.
IGNORED_FIELDS = (
    "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "sequence_bias", "guidance_scale",
    "exponential_decay_length_penalty", "min_length", "min_new_tokens", "num_beams",
)  # fmt: skip

Logits = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

# Sets the logits (vocabulary,) of tokens that may not follow the completion to -inf. Raises NoToken.
Mask = Callable[[Sequence[int], Logits], None]


@dataclass(frozen=True)
class PassOutput:
    """Output of a forward pass for P positions.

    argmax: most likely next tokens, (P,). finite: whether the logits of a position are finite, (P,). logits: shape
    (P, vocabulary), valid until the next pass; None if they were not requested.
    """

    argmax: npt.NDArray[np.int64]
    finite: npt.NDArray[np.bool_]
    logits: Logits | None = None

    @staticmethod
    def from_logits(logits: Logits) -> PassOutput:
        return PassOutput(*argmax(logits), logits)

    def rows(self, begin: int, end: int) -> PassOutput:
        part = slice(begin, end)
        return PassOutput(self.argmax[part], self.finite[part], None if self.logits is None else self.logits[part])


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    Attributes:
        temperature: 0 for greedy decoding.
        top_p: sample from the most likely tokens with this total probability; 1 for all.
        top_k: sample from this many most likely tokens; 0 for all.
        repetition_penalty: above 1, tokens that were used before become less likely; 1 for no penalty.
        seed: makes the output reproducible. Prompt i of a list is sampled with seed + i, so that equal prompts get
            different answers; the other prompts do not matter.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError for values that `strop chat` refuses too."""
        for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
            if not isinstance(value := getattr(self, name), Real):
                raise InputError(f"{name}: must be a number (got {value!r})", fix="give a number")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(
                f"temperature: must be at least 0 (got {self.temperature})", fix="for example temperature=0.7"
            )
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            what = f"repetition_penalty: must be above 0 (got {self.repetition_penalty})"
            raise InputError(what, fix="for example repetition_penalty=1.1, or 1 for none")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: must be above 0 and at most 1 (got {self.top_p})", fix="for example top_p=0.9")
        if self.top_k < 0:
            raise InputError(
                f"top_k: must be at least 0 (got {self.top_k})", fix="for example top_k=50, or 0 for no limit"
            )

    @staticmethod
    def from_generation_config(config: Any) -> Sampling:
        """Return the settings of a transformers.GenerationConfig."""
        penalty = float(config.repetition_penalty or 1.0)
        if not config.do_sample:
            return Sampling(repetition_penalty=penalty)
        # The values for unset fields are the defaults of transformers.
        temperature = 1.0 if config.temperature is None else float(config.temperature)
        top_p = 1.0 if config.top_p is None else float(config.top_p)
        top_k = 50 if config.top_k is None else max(0, int(config.top_k))  # -1 means no limit in some configs
        return Sampling(temperature, min(max(top_p, 1e-6), 1.0), top_k, penalty)  # 0 keeps the most likely token

    @staticmethod
    def notes_on_ignored_settings(config: Any) -> list[str]:
        """Return a note that names the settings of a generation config which are ignored, or []."""
        changed = config.to_diff_dict()
        ignored = [f"{name} {changed[name]}" for name in IGNORED_FIELDS if changed.get(name)]
        return [f"settings of the model's generation config that are ignored: {', '.join(ignored)}"] if ignored else []

    def override(self, *, seed: int | None, **values: float | None) -> Sampling:
        """Return a copy with other values of the fields. seed: None for no seed; other fields: None keeps the value."""
        given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return replace(self, seed=seed, **given)

    def describe(self) -> str:
        """Return the settings as text, for example "temperature 0.7, top_p 0.9"."""
        if self.temperature == 0:
            parts = ["greedy"]
        else:
            parts = [f"temperature {self.temperature:g}"]
            parts += [f"top_p {self.top_p:g}"] if self.top_p < 1 else []
            parts += [f"top_k {self.top_k}"] if self.top_k else []
        parts += [f"repetition penalty {self.repetition_penalty:g}"] if self.repetition_penalty != 1 else []
        return ", ".join(parts)


class NoToken(Exception):
    """Raised when a sequence has no possible next token.

    finish_reason: "failed" (the logits are not finite) or "format" (the grammar allows no token).
    """

    def __init__(self, finish_reason: str) -> None:
        super().__init__(finish_reason)
        self.finish_reason = finish_reason


@dataclass(frozen=True)
class ExpectedCompletion:
    """A reference completion whose tokens are scored.

    ids: the tokens after the prompt. first: the first position in prompt + completion whose next token is scored; None
    for the last position of the prompt.
    """

    ids: Ids
    first: int | None = None


@dataclass(frozen=True)
class Token:
    """A generated token.

    logprob: under the model's distribution, before any sampling setting. top_logprobs: the most likely tokens with
    their log-probabilities, in descending order.
    """

    id: int
    logprob: float = 0.0
    top_logprobs: tuple[tuple[int, float], ...] = ()


class SequenceState:
    """A sequence that is being decoded: its prompt, its completion, and its blocks in the cache.

    The random numbers depend only on the seed and the position. The output therefore does not depend on other sequences
    in the batch, or on speculative decoding.

    Args:
        prompt: token ids, at least one.
        adapter: name of the LoRA adapter; None for the base model.
        stop_ids: tokens that end the completion. They are included in it.
        num_logprobs: number of most likely tokens to return with each token; 0: only the log-probability of the token
            itself; None: no log-probabilities.
        mask: restricts the next token, for a grammar.
        expected: a reference completion, which is processed and scored together with the prompt. The completion is the
            longest prefix of it that greedy decoding generates, and the first token that differs. Allowed only if
            `needs_argmax_only`.
        turn_tokens: maximum length of a turn, if the completion is sampled turn by turn: a stop token then pauses the
            sequence, and `extend` continues it. max_new_tokens is the limit for all turns and the text between them.

    Attributes:
        first_scored: first position whose logits are needed; the cache is searched only for the tokens before it.
        num_cached: number of positions whose keys and values are in the cache.
        num_reused: number of these that were in the cache before.
        finish_reason: "" until the sequence is finished; then "stop", "length", or the finish_reason of a NoToken.
        expected_logprobs: log-probabilities of the scored tokens, fp64.
        space: positions in space of the first tokens, (3, m), of models with such positions (`find_positions`).
    """

    def __init__(
        self, prompt: Ids, adapter: str | None, *, stop_ids: Sequence[int] = (), max_new_tokens: int = 1,
        sampling: Sampling | None = None, num_logprobs: int | None = None, mask: Mask | None = None,
        expected: ExpectedCompletion | None = None, turn_tokens: int | None = None,
    ) -> None:  # fmt: skip
        assert len(prompt) and max_new_tokens
        self.adapter, self.stop_ids, self.max_new_tokens = adapter, frozenset(stop_ids), max_new_tokens
        self.has_turns = turn_tokens is not None
        self.max_end = len(prompt) + min(max_new_tokens, turn_tokens or max_new_tokens)  # length that ends the turn
        self.prompt_length = len(prompt)
        self.expected = expected
        reference = np.empty(0, np.int32) if expected is None else expected.ids
        self.max_length = len(prompt) + max(max_new_tokens, len(reference))
        self._ids = np.empty(self.max_length, np.int32)
        self._ids[: len(prompt)], self._ids[len(prompt) : len(prompt) + len(reference)] = prompt, reference
        self.length, self.num_cached, self.finish_reason = len(prompt) + len(reference), 0, ""
        self.is_scoring = expected is not None  # whether the expected completion is still to be processed
        self.first_scored = len(prompt) - 1 if expected is None or expected.first is None else expected.first
        self.expected_logprobs = np.empty(self.length - self.first_scored - 1)
        self._argmax = np.empty(self.length - self.first_scored, np.int64)
        self.blocks: list[int] = []
        self.block_hashes: list[bytes] = []  # of its full blocks; a hash covers all tokens up to the end of the block
        self.pending_hashes: list[bytes] = []  # of the blocks that this sequence will fill
        self.num_reused = 0
        self.space: Positions = np.empty((3, 0), np.int64)
        self._sampling, self._num_logprobs, self._mask = sampling or Sampling(), num_logprobs, mask
        self.greedy = self._sampling.temperature < MIN_TEMPERATURE
        seed = self._sampling.seed
        self._seed = secrets.randbits(63) if seed is None else seed % 2**63
        assert self.needs_argmax_only or not self.is_scoring

    @property
    def ids(self) -> Ids:
        return self._ids[: self.length]

    @property
    def completion(self) -> list[int]:
        tokens: list[int] = self._ids[self.prompt_length : self.length].tolist()
        return tokens

    @property
    def num_uncached(self) -> int:
        return self.length - self.num_cached

    @property
    def needs_argmax_only(self) -> bool:
        """True if the most likely token is needed and no logits."""
        penalty = self._sampling.repetition_penalty
        return self.greedy and self._num_logprobs is None and self._mask is None and penalty == 1

    @property
    def num_final(self) -> int:
        """The number of cached positions whose tokens will not change. An expected completion may be replaced."""
        return min(self.num_cached, self.prompt_length) if self.is_scoring else self.num_cached

    def score_expected(
        self, start: int, argmax: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float64]
    ) -> tuple[Token, ...]:
        """Record the scores of a part of the expected completion. Return the completion when all parts are scored.

        start: the first position of the part. argmax: the most likely next tokens, -1 if the logits are not finite.
        logprobs: the log-probabilities of the expected next tokens.
        """
        begin = start - self.first_scored
        self._argmax[begin : begin + len(argmax)] = argmax
        self.expected_logprobs[begin : begin + len(argmax)] = logprobs[: len(self.expected_logprobs) - begin]
        if self.num_cached < self.length:
            return ()
        reference, end = self._ids[self.prompt_length : self.length].tolist(), self.length
        self.is_scoring, self.length = False, self.prompt_length
        generated = self._argmax[self.prompt_length - 1 - self.first_scored : end - self.first_scored].tolist()
        for i, token in enumerate(generated):
            if token < 0:
                self.finish_reason = "failed"
                break
            self.append(token)
            if self.finish_reason or i == len(reference) or token != reference[i]:
                break
        self.num_cached = max(self.prompt_length, self.length - 1)
        return tuple(map(Token, self.completion))

    def append(self, token: int) -> None:
        """Append a token to the completion, and set `finish_reason` if this ends it."""
        self._ids[self.length] = token
        self.length += 1
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif self.length >= self.max_end:
            self.finish_reason = "length"

    def extend(self, ids: Ids, turn_tokens: int) -> None:
        """Append text between two turns, and start the next turn. Its end must be below the limit of all turns."""
        assert self.finish_reason == "stop" and self.length + len(ids) < self.max_length
        self._ids[self.length : self.length + len(ids)] = ids
        self.length += len(ids)
        self.max_end, self.finish_reason = min(self.length + turn_tokens, self.max_length), ""

    def sample(self, output: PassOutput, row: int) -> Token:
        """Sample the next token from a row of the output, without appending it. Raises NoToken."""
        if self.needs_argmax_only:
            if not output.finite[row]:
                raise NoToken("failed")
            return Token(int(output.argmax[row]))
        assert output.logits is not None
        logits = output.logits[row]
        scores, sampling = logits, self._sampling
        if not np.isfinite(logits.max()):
            raise NoToken("failed")
        if sampling.repetition_penalty != 1 or self._mask is not None:
            scores = logits.copy()
            if sampling.repetition_penalty != 1:  # CTRL (arXiv:1909.05858)
                earlier = np.unique(self.ids)
                earlier = earlier[earlier < FIRST_IMAGE_ID]
                penalty = np.float32(sampling.repetition_penalty)
                scores[earlier] = np.where(scores[earlier] < 0, scores[earlier] * penalty, scores[earlier] / penalty)
            if self._mask is not None:
                self._mask(self.completion, scores)
        if self.greedy:
            token = int(scores.argmax())
        else:
            # A counter-based generator (Philox, Salmon et al. 2011) gives one random number per position.
            generator = np.random.Generator(np.random.Philox(key=self._seed, counter=self.length))
            token = sample_token(scores, sampling.temperature, sampling.top_k, sampling.top_p, generator.random())
        if self._num_logprobs is None:
            return Token(token)
        if not self._num_logprobs:
            return Token(token, float(token_logprobs(logits[None], np.array([token]))[0]))
        wide = logits.astype(np.float64)
        logprobs = wide - (wide.max() + np.log(np.exp(wide - wide.max()).sum()))
        top = np.argsort(-logprobs, kind="stable")[: self._num_logprobs]
        return Token(token, float(logprobs[token]), tuple((int(id), float(logprobs[id])) for id in top))
