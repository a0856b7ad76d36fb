"""Continuous batching: one thread owns the model; requests join and leave its batch between two tokens.

new requests -> waiting -> a text of the batch (engine.answers.batch): its prompt is read, then it is written on
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from strop.data.types import Ids
from strop.engine.decode.batch import Batch, News
from strop.engine.decode.decoder import Decoder
from strop.engine.decode.sampling import Mask, Sampling, SequenceState, Token
from strop.machine.memory import is_out_of_memory
from strop.models.tokenizer import TextStream
from strop.serve.engine import Metrics


@dataclass(frozen=True)
class Piece:
    """What is new of an answer. end: None while it goes on; stop, length, or why it failed.

    That is failed, format (what a grammar asks for cannot come), memory or closed.
    """

    text: str
    tokens: tuple[Token, ...]
    end: str | None = None


@dataclass
class Job:
    """One request. `told` is called with each Piece, and last with one that has an end: as Engine.start says, or by
    `submit` itself where the engine is closed. goes_on: the answer's text goes on with the prompt's."""

    model: str
    tokenizer: Any
    stop_ids: Sequence[int]
    ids: Ids
    adapter: str | None
    max_new_tokens: int
    sampling: Sampling
    told: Callable[[Piece], None]
    stops: Sequence[str] = ()
    logprobs: int | None = None
    mask: Mask | None = None
    goes_on: bool = False
    kept_tokens: int = 0
    cancelled: bool = False
    started: float = field(default_factory=time.monotonic)


Deliver = Callable[[Sequence[tuple[Job, Piece]]], None]


def tell_each(pieces: Sequence[tuple[Job, Piece]]) -> None:
    for job, piece in pieces:
        job.told(piece)


class _Told:
    """A job with a place in the batch, and what it was told."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.words = TextStream(job.tokenizer, job.stops, job.ids.tolist() if job.goes_on else ())
        self.untold: list[Token] = []
        self.first = True


def engine_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="strop-engine")


class Full(Exception):
    """As many requests wait as may."""


class Engine:
    """slots: requests answered together; queue: how many more may wait.

    thread: an executor of one thread, the one that has computed with the model before. OpenMP keeps workers for each
    thread that computes; with two sets of them on the same cores it lets them sleep between two loops, and a step of a
    small model takes two and a half times as long.

    failed: the thread ended by a fault of ours, or of the model's code, after which nobody knows what the cache holds;
    `on_failure` is told of it, from there. Only want of memory is survived: those under way are told, and it goes on.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int,
        queue: int,
        metrics: Metrics,
        thread: ThreadPoolExecutor | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._batch, self._on_failure = Batch(decoder, slots), on_failure
        self._slots, self._queue, self._metrics = slots, queue, metrics
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._told: dict[SequenceState, _Told] = {}
        self._closing = False
        self.failed = False
        self._thread = thread or engine_thread()
        self._ended: Future[None] | None = None
        self._deliver: Deliver = tell_each

    def start(self, deliver: Deliver = tell_each) -> None:
        """deliver: called from the engine's thread, once for all that a pass brought. By itself it tells each job."""
        self._deliver = deliver
        self._ended = self._thread.submit(self._run)

    def submit(self, job: Job) -> None:
        """Raises Full."""
        with self._changed:
            if self._closing or self.failed:
                job.told(Piece("", (), "closed"))
                return
            if len(self._waiting) >= self._queue + max(0, self._slots - self._active()):
                raise Full
            self._waiting.append(job)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Its slot is free before the next token."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def close(self, timeout: float = 10.0) -> None:
        """Ends the thread; whoever waits is told so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._ended is not None:
            wait([self._ended], timeout)
        self._thread.shutdown(wait=False)

    def _active(self) -> int:
        return len(self._told)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                going = True
                while going:
                    try:
                        going = self._admit()
                        self._step()
                    except (RuntimeError, MemoryError) as error:
                        if not is_out_of_memory(error):
                            raise
                        self._drop_all("memory")
        except BaseException:
            traceback.print_exc()
            raise
        finally:  # nobody may wait for an answer that does not come
            with self._changed:
                self.failed = not self._closing
                self._closing = True
            try:
                self._drop_all("failed" if self.failed else "closed")
            finally:
                if self.failed:
                    self._on_failure()

    def _drop_all(self, end: str) -> None:
        jobs: list[Job] = []
        try:
            with self._changed:
                jobs += [*self._waiting, *(told.job for told in self._told.values())]
                self._waiting.clear()
                self._told.clear()
                self._metrics.active.set(0)
                self._metrics.waiting.set(0)
                for text in list(self._batch.texts):
                    text.end = end
                    self._batch.remove(text)
        finally:  # a decoder that has failed may fail at that too
            self._deliver([(job, Piece("", (), end)) for job in jobs])

    def _admit(self) -> bool:
        """Sorts out who left and who comes in; waits where there is nothing to do. False where it is time to end."""
        with self._changed:
            while True:
                for job in self._waiting:
                    if job.cancelled:
                        self._metrics.finished.labels(job.model, "cancelled").inc()
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                for text, told in list(self._told.items()):
                    if told.job.cancelled:
                        self._metrics.finished.labels(told.job.model, "cancelled").inc()
                        self._leave(text)
                while self._waiting and self._join(self._waiting[0]):
                    self._waiting.popleft()
                self._metrics.waiting.set(len(self._waiting))
                self._metrics.active.set(self._active())
                if self._closing:
                    return False
                if self._active():
                    return True
                self._changed.wait()

    def _join(self, job: Job) -> bool:
        text = SequenceState(
            job.ids, job.adapter, stop_ids=job.stop_ids, most=job.max_new_tokens, sampling=job.sampling,
            logprobs=job.logprobs, mask=job.mask,
        )  # fmt: skip
        if not self._batch.add(text):
            return False
        job.kept_tokens = text.found
        self._metrics.prompt_tokens.inc(len(job.ids))
        self._metrics.kept_tokens.inc(text.found)
        self._told[text] = _Told(job)
        return True

    def _step(self) -> None:
        """The next token of every text, and some more of the prompts that are being read."""
        if self._batch.texts:
            pieces: list[tuple[Job, Piece]] = []
            try:
                for news in self._batch.step():
                    if piece := self._told_by(news):
                        pieces.append(piece)
            finally:  # those that have ended are told, whatever happens to the next
                self._deliver(pieces)

    def _told_by(self, news: News) -> tuple[Job, Piece] | None:
        """What there is to tell of a text's new tokens; takes it out of the batch where a stop string came."""
        text, told = news.text, self._told[news.text]
        shown, end = "", None
        if told.first:
            self._metrics.first_token.observe(time.monotonic() - told.job.started)
            told.first = False
        for place, token in enumerate(news.tokens):
            self._metrics.new_tokens.inc()
            told.untold.append(token)
            last = bool(text.end) and place == len(news.tokens) - 1
            shown += told.words.end() if last and text.end == "stop" else told.words.push(token.id)
            if told.words.stopped:
                end = "stop"
                break
        if end is None and text.end:
            end = text.end
            if end == "length":
                shown += told.words.end()
                end = "stop" if told.words.stopped else end
        piece = Piece(shown, tuple(told.untold), end) if shown or end else None
        if piece:
            told.untold = []
        if end is not None:
            self._metrics.finished.labels(told.job.model, end).inc()
            if end in ("stop", "length"):
                self._metrics.whole.observe(time.monotonic() - told.job.started)
            self._leave(text)
        return (told.job, piece) if piece else None

    def _leave(self, text: SequenceState) -> None:
        del self._told[text]
        if text in self._batch.texts:
            self._batch.remove(text)
