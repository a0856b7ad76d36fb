"""The training loop: one step, and what happens between steps. Read `fit` first."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from strop.data.batching import Batch, BatchStream
from strop.data.types import Item
from strop.errors import DivergedError, NonFiniteError, Stopped
from strop.training import guard
from strop.training import state as checkpoints
from strop.training.gradients import Part, Whole, gradients, own_rows, summed
from strop.training.guard import Diverged, Verdict
from strop.training.loop import seconds, stop_signals
from strop.training.oom import go_on_shrunk, micro_batches, within_memory
from strop.training.optim import make_state, rate_factor, set_rate, warmup_steps
from strop.training.state import Job, stream_of

LOG = logging.getLogger(__name__)

COMPARE_EVERY = 50  # steps: whether all devices still hold the same numbers; and before each save
SAVE_EVERY_S = 600.0  # at least this often, whatever the recipe says about steps
# what a roll-back does not undo: how a step finds memory, what was said, and the work with its time
SPENT = (
    *("halvings", "recompute", "streamed", "offload", "told", "skipped_steps", "tokens", "supervised_tokens"),
    *("seconds", "eval_seconds", "save_seconds", "budget_from"),
    *("communication_s", "waiting_s", "computing_s", "slowest_s"),
)


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the supervised tokens (or units) of the effective batch. grad_norm: before clipping. figures:
    means of what an objective of answers tells."""

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    verdict: Verdict
    figures: dict[str, float]
    whole: Whole

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def trouble(self) -> str:
        """What is wrong with a step that is not good."""
        if self.finite:
            return f"loss {self.loss:.4g} is far above that of the steps before"
        return f"{'loss' if not math.isfinite(self.loss) else 'gradient'} is not finite"

    @property
    def taken(self) -> bool:
        return self.verdict in (Verdict.GOOD, Verdict.DOUBTFUL)


def fit(job: Job) -> str:
    """Trains to the end of the recipe, from wherever the state stands; says what ended it: steps, time or patience.

    Raises Stopped after Ctrl-C or SIGTERM, once the step is finished and saved; DivergedError (NonFiniteError) where
    going back to the last good checkpoint with a lower learning rate did not help; MemoryLimitError, DiskError.
    """
    go_on_shrunk(job)
    if _out_of_patience(job):  # it was killed between its last save and its report
        return "patience"
    if job.devices.once(lambda: not job.folder.checkpoints()):
        save(job)  # so that there always is a state to go back to
    with stop_signals() as stop_asked:
        while True:
            try:
                return _through(job, stop_asked)
            except Diverged as trouble:
                _roll_back(job, trouble)


def _through(job: Job, stop_asked: Callable[[], bool]) -> str:
    """The steps that are left. Raises Diverged where the run must go back."""
    train, progress = job.recipe.train, job.state.progress
    stream = stream_of(job.recipe, len(job.train), progress.position)
    limit = seconds(train.max_time) if train.max_time else math.inf
    saved_at, saved_step, ended = time.monotonic(), progress.step, ""
    job.model.train()
    for batch in stream:
        if batch.index not in progress.passed:
            _take(job, batch, stream)
        progress.step, progress.position = batch.index + 1, dict(batch.position)
        wishes = stop_asked(), _spent(job) >= limit, time.monotonic() - saved_at > SAVE_EVERY_S
        stopping, spent, waited = job.devices.agree(*wishes)
        epoch_ends = progress.step % stream.steps_per_epoch == 0
        ended = "steps" if progress.step == stream.total_steps else "time" if spent else ""
        if job.eval and (ended or (progress.step % train.eval_steps == 0 if train.eval_steps else epoch_ends)):
            evaluate(job)
            ended = ended or ("patience" if _out_of_patience(job) else "")
            (stopping,) = job.devices.agree(stop_asked())
        stopping = stopping and not ended
        due = progress.step % train.save_steps == 0 if train.save_steps else epoch_ends
        due = (due or waited) and not progress.streak  # a state in doubt is nothing to go back to
        if ended == "time":
            progress.budget_from += _spent(job)
        if ended or stopping or due or progress.best_step == progress.step:
            save(job)
            saved_at, saved_step = time.monotonic(), progress.step
        if stopping:
            job.log.emit("stop", step=progress.step, why="signal")
            what = f"stopped after step {progress.step} of {stream.total_steps}"
            raise Stopped(what, fix=f"strop resume {job.folder.path}")
        if ended:
            break
    assert saved_step == progress.step
    if ended != "steps":
        why = "the time budget is spent" if ended == "time" else "no better evaluation loss any more"
        job.log.emit("stop", step=progress.step, why=why)
    return ended


def _take(job: Job, batch: Batch, stream: BatchStream) -> None:
    """One step with its record. Raises Diverged where the guard says so."""
    progress, started = job.state.progress, time.perf_counter()
    sent, waited = job.devices.communication_s, job.devices.waiting_s
    rate = rate_at(job, batch.index, stream.total_steps)
    result = step(job, batch, rate)
    took = time.perf_counter() - started
    progress.tokens += result.tokens
    progress.supervised_tokens += result.supervised_tokens
    progress.seconds += took
    between = _between(job, result, job.devices.communication_s - sent, job.devices.waiting_s - waited)
    if result.taken:
        progress.moved = True
        _log_step(job, batch, result, rate, took, stream.total_steps, between)
    if result.verdict is not Verdict.GOOD:
        _log_bad(job, batch, result)
    if result.verdict is Verdict.ROLL_BACK:
        raise Diverged(f"{result.trouble} ({len(progress.streak)} bad steps in a row)", finite=result.finite)


def rate_at(job: Job, index: int, total: int) -> float:
    train = job.recipe.train
    assert train.learning_rate is not None
    factor = rate_factor(index, total, warmup_steps(train.warmup, total), train.lr_scheduler)
    return train.learning_rate * factor * job.state.progress.rate_scale


def step(job: Job, batch: Batch, rate: float) -> StepResult:
    """One step over an effective batch: forward and backward by micro-batch, clip, update; where the objective asks for
    it, several updates on the same rows.

    A step that the guard does not let pass leaves the weights as they are.
    """
    rows = [job.train[row] for row in batch.rows]
    job.step.masks.begin(job.recipe.seed, batch.index)
    cut = partial(micro_batches, job)

    def begin() -> list[Item]:
        return job.criterion.begin(job.step, rows, batch.index, cut)

    # several devices begin with the rows as they are (setup refuses what draws answers): nothing to agree on
    items = within_memory(job, rows, begin) if job.devices.world == 1 else begin()
    first = result = _update(job, items, rate)
    for _ in range(job.criterion.updates - 1):
        if not result.taken:
            break
        result = _update(job, items, rate, first)
    if (batch.index + 1) % COMPARE_EVERY == 0:
        job.devices.compare(lambda: checkpoints.tensors_of(job.state))
    return result


def _update(job: Job, items: Sequence[Item], rate: float, first: StepResult | None = None) -> StepResult:
    """One optimizer step on what was drawn or read. first: what came of the first on the same answers."""

    def compute() -> Part:
        make_state(job.state.optimizer)
        return gradients(job, items)

    part = within_memory(job, items, compute)
    whole = summed(job, items, part)
    mean, figures = whole.loss, whole.figures
    weights = list(job.state.weights.values())
    norm = torch.nn.utils.clip_grad_norm_(weights, job.recipe.train.max_grad_norm or math.inf)
    # the one wait for the device
    loss, grad_norm, *found = torch.stack([x.to(mean) for x in (mean, norm, *figures.values())]).tolist()
    tokens, supervised = sum(map(len, items)), sum(item.supervised for item in items)
    told = {name: value for name, value in zip(figures, found, strict=True) if math.isfinite(value)}
    if first is None:
        guard.drawn_right(job.state.progress, told, grad_norm)
    else:  # the policy has moved since the answers were drawn
        told = {**told, "off": first.figures["off"]}
        tokens, supervised = tokens + first.tokens, supervised + first.supervised_tokens
    verdict = guard.look(job.state.progress, loss, grad_norm)
    result = StepResult(loss, grad_norm, tokens, supervised, verdict, told, whole)
    if result.taken:
        set_rate(job.state.optimizer, rate)
        with guard.moving(
            job.state, grad_norm, watched=bool(figures) and first is None, quiet=told.get("equal_groups") == 1
        ):
            job.state.optimizer.step()
    job.state.optimizer.zero_grad(set_to_none=True)
    return result


def evaluate(job: Job) -> None:
    progress, started, held_out = job.state.progress, time.perf_counter(), job.eval
    assert held_out is not None
    LOG.info("evaluating on %d rows", len(held_out))
    job.model.eval()
    cut = partial(micro_batches, job)
    found = within_memory(job, held_out, lambda: job.criterion.evaluate(job.step, held_out, cut))
    loss = found.pop("loss")
    job.model.train()
    took = time.perf_counter() - started
    progress.eval_seconds += took
    shown = loss if math.isfinite(loss) else None
    progress.eval_loss = shown
    better = shown is not None and (progress.best_loss is None or loss < progress.best_loss)
    if better:
        progress.best_loss, progress.best_step, progress.evals_without_better = loss, progress.step, 0
        progress.held_out = found
    elif progress.moved:  # the same weights once more say nothing new
        progress.evals_without_better += 1
    progress.moved = False
    job.log.emit("eval", step=progress.step, loss=shown, best=better, seconds=round(took, 3), **found)


def save(job: Job) -> None:
    """Writes a checkpoint. Raises Diverged where a weight is not finite: such a state is never saved."""
    started, progress = time.perf_counter(), job.state.progress
    job.devices.compare(lambda: checkpoints.tensors_of(job.state))  # first: what follows is the same on all of them
    bad = checkpoints.not_finite(job.state)
    if bad is not None:
        progress.streak = [*progress.streak, progress.step - 1]
        raise Diverged(f"{bad} holds NaN or infinity", finite=False)
    checkpoint = job.folder.checkpoint(progress.step)
    with job.devices.together():
        if job.devices.main:
            checkpoints.save(job.folder, job.state)
            if not progress.streak:  # what a roll-back would go to stays
                checkpoints.prune(job.folder, job.recipe.train.keep_checkpoints, progress.best_step)
    took = time.perf_counter() - started
    progress.save_seconds += took
    job.log.emit("save", step=progress.step, checkpoint=checkpoint.name, seconds=round(took, 3))


def go_back(job: Job, *, sure: bool = False) -> Path:
    """Puts the newest checkpoint that verifies into the job, which goes on at its step; gives the checkpoint. sure: see
    checkpoints.newest."""

    def note(text: str) -> None:
        job.log.emit("note", text=text)

    checkpoint = job.devices.once(lambda: checkpoints.newest(job.folder, note, sure=sure))
    checkpoints.restore(checkpoint, job.state, note)
    progress = job.state.progress
    # of this recipe's stream: rows and batch size may have been others when it was saved
    progress.position = stream_of(job.recipe, len(job.train)).position_of(progress.step)
    forget_lost_best(job)
    return checkpoint


def forget_lost_best(job: Job) -> None:
    """Where the best weights cannot be had any more, later ones may be the best."""
    progress, kept = job.state.progress, job.state.progress.best_step
    if kept is None or kept == progress.step:
        return
    checkpoint = job.folder.checkpoint(kept)
    why = job.devices.once(lambda: checkpoints.fault(checkpoint))
    if why is not None:
        job.log.emit("note", text=f"{checkpoint}: the best weights so far are lost: {why}")
        progress.best_step, progress.best_loss, progress.held_out = None, None, {}


def _roll_back(job: Job, trouble: Diverged) -> None:
    """Back to the last good checkpoint, past the batches to blame, with a lower learning rate: once.

    Raises DivergedError the second time.
    """
    now = job.state.progress
    stream = stream_of(job.recipe, len(job.train))
    if now.rollbacks:
        raise _given_up(job, trouble, stream)
    checkpoint = go_back(job, sure=True)
    progress = job.state.progress
    progress.passed = sorted({*progress.passed, *now.streak})
    progress.streak, progress.rollbacks = [], now.rollbacks + 1
    progress.rate_scale = now.rate_scale * guard.RATE_CUT
    for name in SPENT:
        setattr(progress, name, getattr(now, name))
    job.log.emit(
        "rollback",
        step=now.step,
        to=progress.step,
        checkpoint=checkpoint.name,
        why=trouble.why,
        passed=[{"step": index + 1, "rows": _places(job, stream.rows(index))} for index in progress.passed],
        rate_scale=progress.rate_scale,
    )


def _given_up(job: Job, trouble: Diverged, stream: BatchStream) -> DivergedError:
    progress = job.state.progress
    rate = rate_at(job, progress.step, stream.total_steps)
    advice = guard.advice(progress, rate, str(job.recipe.model.dtype), trouble)
    saved = job.folder.checkpoints()[-1][1]
    rows = [place for index in progress.streak for place in _places(job, stream.rows(index))]
    job.log.emit("stop", step=progress.step, why=trouble.why, rows=rows, advice=advice)
    kind = DivergedError if trouble.finite else NonFiniteError
    what = (
        f"step {progress.step + 1}: {trouble.why}, again after going back and lowering the learning rate; "
        f"the last good state is {saved}"
    )
    return kind(what, fix="; ".join(advice))


def _out_of_patience(job: Job) -> bool:
    patience = job.recipe.train.early_stopping
    return patience is not None and job.state.progress.evals_without_better >= patience


def _spent(job: Job) -> float:
    progress = job.state.progress
    return progress.seconds + progress.eval_seconds + progress.save_seconds - progress.budget_from


def _between(job: Job, result: StepResult, sent: float, waited: float) -> dict[str, float]:
    """What a step took between the devices: seconds of sending and of waiting for the slowest, and the balance: the
    mean rank's computing time over the slowest one's. Nothing where there is one device."""
    if job.devices.world == 1:
        return {}
    progress, seconds = job.state.progress, result.whole.seconds
    progress.communication_s += sent
    progress.waiting_s += waited
    progress.computing_s += statistics.fmean(seconds)
    progress.slowest_s += max(seconds)
    balance = statistics.fmean(seconds) / max(max(seconds), 1e-9)
    return {"communication_s": round(sent, 6), "waiting_s": round(waited, 6), "balance": round(balance, 4)}


def _log_step(
    job: Job, batch: Batch, result: StepResult, rate: float, took: float, total: int, between: dict[str, float]
) -> None:
    progress, number = job.state.progress, batch.index + 1
    if progress.first_loss is None:
        progress.first_loss = result.loss
    progress.last_loss, progress.figures = result.loss, result.figures
    for said in (guard.falling(progress, result.figures), guard.unheard(progress, result.figures)):
        if said is not None:
            job.log.emit("note", text=f"step {number}: {said}")
    if number % job.recipe.train.log_steps and number != total:
        return
    job.log.emit(
        "step",
        step=number,
        steps=total,
        epoch=batch.epoch,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=rate,
        tokens=progress.tokens,
        tokens_per_s=round(result.tokens / took, 1),
        seconds_left=round((total - number) * progress.seconds / number, 1),
        **result.figures,
        **between,
    )


def _log_bad(job: Job, batch: Batch, result: StepResult) -> None:
    """skip: the step was not taken. doubt: it was, and is watched."""
    if not result.taken:
        job.state.progress.skipped_steps += 1
    kind = "doubt" if result.taken else "skip"
    rows, ranks = batch.rows, result.whole.bad
    if ranks:  # of several devices, those whose own part was not finite
        items = [job.train[row] for row in rows]
        rows = tuple(rows[place] for rank in ranks for place in own_rows(job, items, rank))
    told = {"ranks": list(ranks)} if ranks and job.devices.world > 1 else {}
    job.log.emit(kind, step=batch.index + 1, why=result.trouble, rows=_places(job, rows), **told)


def _places(job: Job, rows: Sequence[int]) -> list[str]:
    return [f"{job.train[row].file}:{job.train[row].line}" for row in rows]


# ---- from strop.training.signals ----
"""What ends a run early: signals and time. All clocks here are monotonic: a laptop that sleeps, or a clock that is
set, moves nothing."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def seconds(text: str) -> float:
    """90s, 30m, 2h, 1d or plain seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    assert match is not None  # the schema has checked it
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM once: the function yielded says True. Twice: KeyboardInterrupt at once."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked:
            before = old[signal.Signals(number)]
            if callable(before):  # the command's own, which notes that it is to say so
                before(number, frame)
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: False
        return
    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
