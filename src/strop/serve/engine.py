"""Continuous batching: one thread owns the model; requests join and leave its batch between two tokens.

new requests -> waiting -> reading (their prompts, some hundred tokens a step) -> a row of the batch -> done
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from strop.data.conversation import Ids
from strop.machine.memory import is_out_of_memory
from strop.model.generate import Sampling
from strop.serve.decoder import Decoder, Text
from strop.serve.kept import Kept
from strop.serve.metrics import Metrics
from strop.serve.sampling import Mask, NoToken, Sampler, Token
from strop.serve.slots import Slots
from strop.serve.words import Words

READ_AT_ONCE = 512  # prompt tokens between two steps of the running answers: a long prompt must not hold them up


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
    """One request. `told` is called from the engine's thread with each Piece, and last with one that has an end."""

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
    kept_tokens: int = 0
    cancelled: bool = False
    started: float = field(default_factory=time.monotonic)


class _Row:
    """A job with a place in the batch."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.sampler = Sampler(job.sampling, job.ids.tolist(), job.logprobs, job.mask)
        self.words = Words(job.tokenizer, job.stops)
        self.untold: list[Token] = []


class Full(Exception):
    """As many requests wait as may."""


class Engine:
    """slots: requests answered together; queue: how many more may wait; keep_tokens: of answered texts (see Kept).

    failed: the thread ended by a fault of ours; `on_failure` is told of it, from there.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int,
        queue: int,
        keep_tokens: int,
        metrics: Metrics,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder, self._on_failure = decoder, on_failure
        self._slots, self._queue, self._metrics = slots, queue, metrics
        self._kept = Kept(keep_tokens)
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._reading: list[tuple[Job, Text]] = []
        self._rows: dict[str, list[_Row]] = {}
        self._closing = False
        self.failed = False
        self._thread = threading.Thread(target=self._run, name="strop-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

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
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _active(self) -> int:
        rows = tuple(self._rows.copy().values())  # at once: the engine's thread may change it meanwhile
        return len(self._reading) + sum(map(len, rows))

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                going = True
                while going:
                    try:
                        going = self._admit()
                        self._read()
                        for lane in list(self._rows):
                            self._step(lane)
                    except (RuntimeError, MemoryError) as error:
                        if not is_out_of_memory(error):
                            raise
                        self._drop_all("memory")
                        self._kept.clear()
        finally:  # after a fault of ours too: nobody may wait for an answer that does not come
            with self._changed:
                self.failed = not self._closing
                self._closing = True
            self._drop_all("failed" if self.failed else "closed")
            if self.failed:
                self._on_failure()

    def _drop_all(self, end: str) -> None:
        with self._changed:
            jobs = [*self._waiting, *(job for job, _ in self._reading)]
            jobs += [row.job for rows in self._rows.values() for row in rows]
            self._waiting.clear()
            self._reading, self._rows = [], {}
            self._decoder.lanes.clear()
            self._metrics.active.set(0)
            self._metrics.waiting.set(0)
        for job in jobs:
            job.told(Piece("", (), end))

    def _admit(self) -> bool:
        """Sorts out who left and who comes in; waits where there is nothing to do. False where it is time to end."""
        with self._changed:
            while True:
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                self._reading = [(job, text) for job, text in self._reading if not job.cancelled]
                for lane, rows in list(self._rows.items()):
                    for place in reversed([place for place, row in enumerate(rows) if row.job.cancelled]):
                        self._metrics.finished.labels(rows[place].job.model, "cancelled").inc()
                        self._leave(lane, place)
                while self._waiting and self._active() < self._slots:
                    job = self._waiting[0]
                    kv = self._kept.find(job.adapter, job.ids)
                    text = Text(job.ids, job.adapter, kv)
                    job.kept_tokens = text.done
                    self._metrics.prompt_tokens.inc(len(job.ids))
                    self._metrics.kept_tokens.inc(text.done)
                    self._reading.append((job, text))
                    self._waiting.popleft()
                self._metrics.waiting.set(len(self._waiting))
                self._metrics.active.set(self._active())
                if self._closing:
                    return False
                if self._active():
                    return True
                self._changed.wait()

    def _read(self) -> None:
        """Reads on in the prompts of the first lane; those read to the end take their row and their first token."""
        if not self._reading:
            return
        lane = self._decoder.lane(self._reading[0][0].adapter)
        mine = [(job, text) for job, text in self._reading if self._decoder.lane(job.adapter) == lane]
        mine = mine[:1] if mine[0][1].alone else mine
        finished = self._decoder.read([text for _, text in mine], READ_AT_ONCE)
        if len(mine) > 1 and not all(logits.max().isfinite() for logits in finished.values()):
            for _, text in mine:  # NaN passes from one to those beside it: whose it was shows when each is read alone
                text.kv, text.alone = [], True
            return
        for place, logits in finished.items():
            job, text = mine[place]
            self._reading.remove((job, text))
            self._decoder.lanes.setdefault(lane, Slots()).add(text.kv)
            self._rows.setdefault(lane, []).append(_Row(job))
            self._metrics.first_token.observe(time.monotonic() - job.started)
            row = self._rows[lane][-1]
            self._advance(lane, len(self._rows[lane]) - 1, _picked(row, logits))

    def _step(self, lane: str) -> None:
        """The next token of every row of a lane."""
        rows = self._rows.get(lane)
        if not rows:
            return
        logits = self._decoder.step(lane, [row.sampler.tokens[-1] for row in rows], [row.job.adapter for row in rows])
        most = logits.max(-1)
        likeliest, finite = most.indices.tolist(), most.values.isfinite().tolist()
        picked = [
            row.sampler.take(likeliest[place]) if row.sampler.plain and finite[place] else _picked(row, logits[place])
            for place, row in enumerate(rows)
        ]
        for place in reversed(range(len(rows))):  # from the end: a row that leaves is replaced by the last
            self._advance(lane, place, picked[place])

    def _advance(self, lane: str, place: int, token: Token | NoToken) -> None:
        """Tells a row's new token; takes it out of the batch where it was the last."""
        row = self._rows[lane][place]
        if isinstance(token, NoToken):
            row.job.told(Piece("", tuple(row.untold), token.end))
            self._metrics.finished.labels(row.job.model, token.end).inc()
            self._leave(lane, place, keep=False)
            return
        self._metrics.new_tokens.inc()
        stop = token.id in row.job.stop_ids
        row.untold.append(token)
        text = row.words.end() if stop else row.words.push(token.id)
        end = "stop" if stop or row.words.stopped else None
        if end is None and len(row.sampler.tokens) >= row.job.max_new_tokens:
            text, end = text + row.words.end(), "length"
            if row.words.stopped:
                end = "stop"
        if text or end:
            row.job.told(Piece(text, tuple(row.untold), end))
            row.untold = []
        if end is not None:
            self._metrics.finished.labels(row.job.model, end).inc()
            self._metrics.whole.observe(time.monotonic() - row.job.started)
            self._leave(lane, place)

    def _leave(self, lane: str, place: int, *, keep: bool = True) -> None:
        """Frees a row; what it holds is kept for requests that begin alike, or wiped out (NaN times 0 is NaN)."""
        slots, rows = self._decoder.lanes[lane], self._rows[lane]
        row = rows[place]
        if keep:
            ids = np.concatenate([row.job.ids, np.array(row.sampler.tokens, np.int32)])[: slots.lengths[place]]
            self._kept.add(row.job.adapter, ids, slots.take(place))
        else:
            slots.wipe(place)
        slots.remove(place)
        rows[place] = rows[-1]
        rows.pop()
        if not rows:
            del self._rows[lane]


def _picked(row: _Row, logits: torch.Tensor) -> Token | NoToken:
    try:
        return row.sampler.pick(logits)
    except NoToken as none:
        return none
