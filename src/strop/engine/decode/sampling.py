"""A text that is read and written on, and how its next tokens are drawn."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from strop.engine.kernels.dispatch import draw_token, likeliest, logprobs_of

COLDEST = 1e-4  # below it logits divided by the temperature may overflow, and sampling is greedy anyway

# of a generation config: fields that change what is written, and that Sampling does not have
PASSED_OVER = (
    "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "sequence_bias", "guidance_scale",
    "exponential_decay_length_penalty", "min_length", "min_new_tokens", "num_beams",
)  # fmt: skip

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """What a pass tells of each row (P,): its likeliest token, and whether its numbers are finite. logits (P,
    vocabulary): None where they were not asked for; they hold until the next pass."""

    likeliest: npt.NDArray[np.int64]
    finite: npt.NDArray[np.bool_]
    logits: Logits | None = None

    @staticmethod
    def of(logits: Logits) -> Seen:
        return Seen(*likeliest(logits), logits)

    def rows(self, begin: int, end: int) -> Seen:
        one = slice(begin, end)
        return Seen(self.likeliest[one], self.finite[one], None if self.logits is None else self.logits[one])


# (tokens so far, logits (vocabulary,)): sets what may not come to -inf; raises NoToken
Mask = Callable[[Sequence[int], Logits], None]


@dataclass(frozen=True)
class Sampling:
    """Greedy where temperature is 0; top_k 0: among all tokens. The seed makes sampled answers repeatable, whatever
    is answered beside them."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @staticmethod
    def own(config: Any) -> Sampling:
        """What a model's own generation config (transformers.GenerationConfig) asks for."""
        penalty = float(config.repetition_penalty or 1.0)
        if not config.do_sample:
            return Sampling(repetition_penalty=penalty)
        # where a config says to sample, and not how: transformers' own
        temperature = 1.0 if config.temperature is None else float(config.temperature)
        top_p = 1.0 if config.top_p is None else float(config.top_p)
        return Sampling(temperature, top_p, 50 if config.top_k is None else int(config.top_k), penalty)

    @staticmethod
    def notes_on_ignored_settings(config: Any) -> list[str]:
        """Notes on what a model's own generation config asks for, and is not done here."""
        own = config.to_diff_dict()
        named = [f"{name} {own[name]}" for name in PASSED_OVER if own.get(name)]
        return [f"the model's own generation config asks for {', '.join(named)}: left out"] if named else []

    def changed(self, temperature: float | None, top_p: float | None, seed: int | None) -> Sampling:
        """With what a request asks for; None: as it is, but for the seed."""
        return replace(
            self,
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p if top_p is None else top_p,
            seed=seed,
        )

    def words(self) -> str:
        if self.temperature == 0:
            said = ["greedy"]
        else:
            said = [f"temperature {self.temperature:g}"]
            said += [f"top_p {self.top_p:g}"] if self.top_p < 1 else []
            said += [f"top_k {self.top_k}"] if self.top_k else []
        return ", ".join(
            said + ([f"repetition penalty {self.repetition_penalty:g}"] if self.repetition_penalty != 1 else [])
        )


class NoToken(Exception):
    """No token can come next. end: failed (the model's numbers are not finite) or format (what a grammar asks for)."""

    def __init__(self, end: str) -> None:
        super().__init__(end)
        self.end = end


@dataclass(frozen=True)
class ExpectedCompletion:
    """The right answer to a prompt, where it is known: the tokens behind the prompt, and `first`, the first position
    of prompt and answer whose next token's log-probability is asked for; None: the prompt's last."""

    ids: Ids
    first: int | None = None


@dataclass(frozen=True)
class Token:
    """logprob: of the model's own distribution, before any sampling; likeliest: tokens with theirs, from the top."""

    id: int
    logprob: float = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()


class SequenceState:
    """ids (L,): a prompt, and then what was written behind it; adapter: None for the base alone.

    stop_ids, most: an answer ends with one of these tokens, or with so many. logprobs: how many likeliest tokens to
    tell of; None: not even the token's own. mask: what a grammar forbids. Random numbers are the text's own, one for
    each place: what is answered beside it does not matter, nor whether tokens were guessed.

    expected: the right answer, of a text that is `plain`: it is read together with the prompt. `logprobs` then has what
    the model gives each of its tokens, and as much of it as the model would have written is written already.

    done: positions that are in the cache; end: stop, length or what NoToken says, when it has ended.
    """

    def __init__(
        self,
        prompt: Ids,
        adapter: str | None,
        *,
        stop_ids: Sequence[int] = (),
        most: int = 1,
        sampling: Sampling | None = None,
        logprobs: int | None = None,
        mask: Mask | None = None,
        expected: ExpectedCompletion | None = None,
    ) -> None:
        assert len(prompt) and most
        self.adapter, self.stop_ids, self.most = adapter, frozenset(stop_ids), most
        self.prompt = len(prompt)
        self.expected = expected
        right = np.empty(0, np.int32) if expected is None else expected.ids
        self.room = len(prompt) + max(most, len(right))  # positions that it may come to have
        self._ids = np.empty(self.room, np.int32)
        self._ids[: self.prompt], self._ids[self.prompt : self.prompt + len(right)] = prompt, right
        self.length, self.done, self.end = self.prompt + len(right), 0, ""
        self.judging = expected is not None  # the expected answer is not read yet
        self.first = self.prompt - 1 if expected is None or expected.first is None else expected.first
        self.logprobs = np.empty(self.length - self.first - 1)  # of the tokens behind `first`
        self._likeliest = np.empty(self.length - self.first, np.int64)
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.coming: list[bytes] = []  # of blocks that it is going to fill
        self.found = 0  # positions of its beginning that were in the cache already
        self._sampling, self._logprobs, self._mask = sampling or Sampling(), logprobs, mask
        self.greedy = self._sampling.temperature < COLDEST
        seed = self._sampling.seed
        self._seed = secrets.randbits(63) if seed is None else seed % 2**63
        assert self.plain or not self.judging

    @property
    def ids(self) -> Ids:
        return self._ids[: self.length]

    @property
    def answer(self) -> list[int]:
        found: list[int] = self._ids[self.prompt : self.length].tolist()
        return found

    @property
    def left(self) -> int:
        """Positions that are not in the cache yet."""
        return self.length - self.done

    @property
    def plain(self) -> bool:
        """The likeliest token and nothing else is asked for."""
        penalty = self._sampling.repetition_penalty
        return self.greedy and self._logprobs is None and self._mask is None and penalty == 1

    @property
    def sure(self) -> int:
        """Positions in the cache that stay: an expected answer may turn out to be another."""
        return min(self.done, self.prompt) if self.judging else self.done

    def judge(self, at: int, likeliest: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float64]) -> tuple[Token, ...]:
        """What was read of the expected answer: behind the positions from `at` on, the likeliest tokens (-1: the
        numbers are not finite), and what those that stand there have. When all is read: the tokens that are written.
        """
        begin = at - self.first
        self._likeliest[begin : begin + len(likeliest)] = likeliest
        self.logprobs[begin : begin + len(likeliest)] = logprobs[: len(self.logprobs) - begin]
        if self.done < self.length:
            return ()
        right, read = self._ids[self.prompt : self.length].tolist(), self.length
        self.judging, self.length = False, self.prompt
        for place, token in enumerate(self._likeliest[self.prompt - 1 - self.first : read - self.first].tolist()):
            if token < 0:
                self.end = "failed"
                break
            self.append(token)
            if self.end or place == len(right) or token != right[place]:
                break
        self.done = max(self.prompt, self.length - 1)
        return tuple(map(Token, self.answer))

    def append(self, token: int) -> None:
        self._ids[self.length] = token
        self.length += 1
        if token in self.stop_ids:
            self.end = "stop"
        elif self.length - self.prompt >= self.most:
            self.end = "length"

    def pick(self, seen: Seen, row: int) -> Token:
        """The next token, which is not appended yet, by a row of what was seen. Raises NoToken."""
        if self.plain:
            if not seen.finite[row]:
                raise NoToken("failed")
            return Token(int(seen.likeliest[row]))
        assert seen.logits is not None
        logits = seen.logits[row]
        scores, about = logits, self._sampling
        if not np.isfinite(logits.max()):
            raise NoToken("failed")
        if about.repetition_penalty != 1 or self._mask is not None:
            scores = logits.copy()
            if about.repetition_penalty != 1:  # as CTRL (arXiv:1909.05858) has it: of what was said, once each
                said = np.unique(self.ids)
                penalty = np.float32(about.repetition_penalty)
                scores[said] = np.where(scores[said] < 0, scores[said] * penalty, scores[said] / penalty)
            if self._mask is not None:
                self._mask(self.answer, scores)
        if self.greedy:
            token = int(scores.argmax())
        else:
            # a number for each place, of a generator that can begin anywhere (Philox, Salmon et al. 2011)
            place = np.random.Philox(key=self._seed, counter=self.length)
            token = draw_token(scores, about.temperature, about.top_k, about.top_p, np.random.Generator(place).random())
        if self._logprobs is None:
            return Token(token)
        if not self._logprobs:
            return Token(token, float(logprobs_of(logits[None], np.array([token]))[0]))
        wide = logits.astype(np.float64)
        logs = wide - (wide.max() + np.log(np.exp(wide - wide.max()).sum()))
        top = np.argsort(-logs, kind="stable")[: self._logprobs]
        return Token(token, float(logs[token]), tuple((int(one), float(logs[one])) for one in top))
