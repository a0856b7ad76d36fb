"""A thread that generates completions with continuous batching, and its Prometheus metrics."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from strop.data.types import Ids
from strop.engine.decode.batch import Batch, Progress
from strop.engine.decode.decoder import Decoder
from strop.engine.decode.sampling import Mask, Sampling, SequenceState, Token
from strop.errors import StropError
from strop.machine.memory import is_out_of_memory
from strop.models.tokenizer import TextStream

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds


class Metrics:
    """Prometheus metrics, with one registry per server, so that two servers in a process do not share them."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        counter = partial(Counter, namespace="strop", registry=registry)
        gauge = partial(Gauge, namespace="strop", registry=registry)
        histogram = partial(Histogram, namespace="strop", registry=registry, buckets=BUCKETS)
        self.requests = counter("requests", "HTTP requests by path and status.", ("path", "status"))
        self.finished = counter("answers", "Completions by model and finish reason.", ("model", "end"))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens, cached ones included.")
        self.cached_tokens = counter("kept_tokens", "Prompt tokens that were in the cache.")
        self.new_tokens = counter("new_tokens", "Generated tokens.")
        self.active = gauge("active", "Requests in the batch.")
        self.waiting = gauge("waiting", "Requests waiting for a slot.")
        self.first_token = histogram("first_token_seconds", "Time from a request to its first token.")
        self.total_time = histogram("answer_seconds", "Time from a request to the end of its completion.")

    def text(self) -> bytes:
        return generate_latest(self._registry)


@dataclass(frozen=True)
class Piece:
    """A part of a completion, delivered while it is generated. The last one has a finish reason."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None = None  # "stop", "length", or a key of app.FAILURES


@dataclass
class Job:
    """A request to the engine, which calls `on_piece` with each piece of the completion."""

    model: str
    tokenizer: Any
    stop_ids: Sequence[int]
    ids: Ids
    adapter: str | None
    max_new_tokens: int
    sampling: Sampling
    on_piece: Callable[[Piece], None]
    stop_strings: Sequence[str] = ()
    num_logprobs: int | None = None
    mask: Mask | None = None
    continues_prompt: bool = False  # a plain completion: its text continues that of the prompt
    num_cached: int = 0  # prompt tokens found in the cache; set by the engine
    load_images: Callable[[], None] | None = None  # computes the images of the prompt
    cancelled: bool = False
    started: float = field(default_factory=time.monotonic)


Deliver = Callable[[Sequence[tuple[Job, Piece]]], None]


def deliver_each(pieces: Sequence[tuple[Job, Piece]]) -> None:
    for job, piece in pieces:
        job.on_piece(piece)


class _ActiveJob:
    def __init__(self, job: Job) -> None:
        self.job = job
        prompt = job.ids.tolist() if job.continues_prompt else ()
        self.detokenizer = TextStream(job.tokenizer, job.stop_strings, prompt)
        self.undelivered: list[Token] = []
        self.has_output = False


def create_engine_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="strop-engine")


class QueueFull(Exception):
    """Raised when the request queue is full."""


class Engine:
    """Runs requests in one thread.

    If the engine runs out of memory, all current and waiting requests fail, and it continues. Any other error is a bug
    in strop or in the model's code, after which the cache may be wrong: the thread ends, `failed` is set, and
    `on_failure` is called from that thread.

    slots: maximum number of requests in the batch. queue: maximum number of waiting requests. thread: an executor with
    one thread, which also loaded the model. (OpenMP keeps a worker pool for each thread that computes. With a second
    pool on the same cores, a step of a small model takes 2.5 times as long.)
    """

    def __init__(
        self, decoder: Decoder, *, slots: int, queue: int, metrics: Metrics, thread: ThreadPoolExecutor | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._batch, self._on_failure = Batch(decoder, slots), on_failure
        self._slots, self._queue, self._metrics = slots, queue, metrics
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._active: dict[SequenceState, _ActiveJob] = {}
        self._closing = False
        self.failed = False
        self._thread = thread or create_engine_thread()
        self._ended: Future[None] | None = None
        self._deliver: Deliver = deliver_each

    def start(self, deliver: Deliver = deliver_each) -> None:
        """Start the thread. deliver: called in this thread after each step, with all new pieces."""
        self._deliver = deliver
        self._ended = self._thread.submit(self._run)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises QueueFull. If the engine is closed, the job fails at once with the reason "closed"."""
        with self._changed:
            if self._closing or self.failed:
                job.on_piece(Piece("", (), "closed"))
                return
            if len(self._waiting) >= self._queue + max(0, self._slots - self.num_active):
                raise QueueFull
            self._waiting.append(job)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Cancel a job. Its slot is released before the next step."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def close(self, timeout: float = 10.0) -> None:
        """End the thread. Unfinished jobs fail with the reason "closed"."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._ended is not None:
            wait([self._ended], timeout)
        self._thread.shutdown(wait=False)

    @property
    def num_active(self) -> int:
        return len(self._active)

    def _all_jobs(self) -> list[Job]:
        return [*self._waiting, *(active.job for active in self._active.values())]

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                running = True
                while running:
                    try:
                        running = self._admit()
                        self._step()
                    except (RuntimeError, MemoryError) as error:
                        if not is_out_of_memory(error):
                            raise
                        self._fail_all("memory")
        except BaseException:
            traceback.print_exc()
            raise
        finally:  # otherwise clients would wait forever
            with self._changed:
                self.failed = not self._closing
                self._closing = True
            try:
                self._fail_all("failed" if self.failed else "closed")
            finally:
                if self.failed:
                    self._on_failure()

    def _fail_all(self, reason: str) -> None:
        jobs: list[Job] = []
        try:
            with self._changed:
                jobs += self._all_jobs()
                self._waiting.clear()
                self._active.clear()
                self._metrics.active.set(0)
                self._metrics.waiting.set(0)
                for sequence in list(self._batch.sequences):
                    sequence.finish_reason = reason
                    self._batch.remove(sequence)
        finally:  # a failed decoder may raise here too
            self._deliver([(job, Piece("", (), reason)) for job in jobs])

    def _admit(self) -> bool:
        """Remove cancelled jobs and admit waiting ones; block if there are none. Return False to end the thread."""
        with self._changed:
            while True:
                for job in self._all_jobs():
                    if job.cancelled:
                        self._metrics.finished.labels(job.model, "cancelled").inc()
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                for sequence in [key for key, active in self._active.items() if active.job.cancelled]:
                    self._remove(sequence)
                while self._waiting and self._add_to_batch(self._waiting[0]):
                    self._waiting.popleft()
                self._metrics.waiting.set(len(self._waiting))
                self._metrics.active.set(self.num_active)
                if self._closing:
                    return False
                if self._active:
                    return True
                self._changed.wait()

    def _add_to_batch(self, job: Job) -> bool:
        sequence = SequenceState(
            job.ids, job.adapter, stop_ids=job.stop_ids, max_new_tokens=job.max_new_tokens, sampling=job.sampling,
            num_logprobs=job.num_logprobs, mask=job.mask,
        )  # fmt: skip
        if not self._batch.add(sequence):
            return False
        job.num_cached = sequence.num_reused
        self._metrics.prompt_tokens.inc(len(job.ids))
        self._metrics.cached_tokens.inc(job.num_cached)
        self._active[sequence] = _ActiveJob(job)
        return True

    def _step(self) -> None:
        if self._batch.sequences:
            pieces = list(self._load_images())
            try:
                for progress in self._batch.step():
                    if piece := self._make_piece(progress):
                        pieces.append(piece)
            finally:  # deliver finished requests even if the next one fails
                self._deliver(pieces)

    def _load_images(self) -> Iterator[tuple[Job, Piece]]:
        """Compute the images of new requests. Yield the failure of those whose images cannot be computed."""
        for sequence, active in list(self._active.items()):
            load, active.job.load_images = active.job.load_images, None
            try:
                if load is not None:
                    load()
            except StropError:
                sequence.finish_reason = "failed"
                self._remove(sequence)
                self._metrics.finished.labels(active.job.model, "failed").inc()
                yield active.job, Piece("", (), "failed")

    def _make_piece(self, progress: Progress) -> tuple[Job, Piece] | None:
        """Return the new output of a sequence, and remove it from the batch if it is finished."""
        sequence, active = progress.sequence, self._active[progress.sequence]
        detokenizer, text, reason = active.detokenizer, "", None
        if not active.has_output:
            self._metrics.first_token.observe(time.monotonic() - active.job.started)
            active.has_output = True
        for i, token in enumerate(progress.tokens):
            self._metrics.new_tokens.inc()
            active.undelivered.append(token)
            is_stop_token = sequence.finish_reason == "stop" and i == len(progress.tokens) - 1
            text += detokenizer.end() if is_stop_token else detokenizer.push(token.id)
            if detokenizer.stopped:
                reason = "stop"
                break
        if reason is None and sequence.finish_reason:
            reason = sequence.finish_reason
            if reason == "length":
                text += detokenizer.end()
                reason = "stop" if detokenizer.stopped else reason
        piece = Piece(text, tuple(active.undelivered), reason) if text or reason else None
        if piece:
            active.undelivered = []
        if reason is not None:
            self._metrics.finished.labels(active.job.model, reason).inc()
            if reason in ("stop", "length"):
                self._metrics.total_time.observe(time.monotonic() - active.job.started)
            self._remove(sequence)
        return (active.job, piece) if piece else None

    def _remove(self, sequence: SequenceState) -> None:
        del self._active[sequence]
        if sequence in self._batch.sequences:
            self._batch.remove(sequence)
