"""The training loop: steps, evaluation, checkpoints and rollbacks. Start reading at `fit`."""

from __future__ import annotations

import logging
import math
import shlex
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from strop.data.batching import Batch, BatchStream
from strop.data.store import JoinedItems
from strop.data.types import Item
from strop.distributed.devices import find_ranks
from strop.engine.kernels import warmup
from strop.errors import DivergedError, NonFiniteError, Stopped, first_line
from strop.machine.memory import memory_in_use
from strop.runs.events import SIGNAL
from strop.training import guard
from strop.training.criteria import KEPT
from strop.training.gradients import (
    LocalGradient,
    TotalGradient,
    apply_memory_settings,
    clip_gradients,
    compute_gradients,
    free_step_memory,
    micro_batches,
    retry_with_less_memory,
    rows_of_rank,
    sum_gradients,
)
from strop.training.guard import Diverged, Verdict
from strop.training.optim import allocate_state, rate_factor, set_rate, warmup_steps
from strop.training.state import (
    Job,
    all_tensors,
    batch_stream,
    checkpoint_error,
    first_not_finite,
    newest_checkpoint,
    prune_checkpoints,
    random_states,
    restore_checkpoint,
    save_checkpoint,
    set_random_states,
)

LOG = logging.getLogger(__name__)

COMPARE_EVERY = 50  # steps between comparisons of the devices' weights
SAVE_EVERY_S = 600.0  # maximum time between checkpoints, even if train.save_steps is larger
# Fields of Progress that a rollback does not restore: memory settings, logged warnings, and counters.
KEPT_BY_ROLLBACK = (
    "halvings", "recompute", "streamed", "offload", "loss_scale", "scale_steps", "told", "skipped_steps",
    "tokens", "supervised_tokens", "seconds",
    "eval_seconds", "compile_seconds", "save_seconds", "budget_from", "communication_s", "waiting_s", "computing_s",
    "slowest_s",
)  # fmt: skip


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the supervised tokens or rows of the effective batch
    grad_norm: float  # before clipping
    tokens: int
    supervised_tokens: int
    verdict: Verdict
    metrics: dict[str, float]  # means over the effective batch
    total: TotalGradient

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def problem(self) -> str:
        if self.finite:
            return f"loss {self.loss:.4g} is far above that of the steps before"
        return f"{'loss' if not math.isfinite(self.loss) else 'gradient'} is not finite"

    @property
    def applied(self) -> bool:
        return self.verdict in (Verdict.GOOD, Verdict.DOUBTFUL)


def fit(job: Job) -> str:
    """Train to the end of the recipe, and return why training ended: steps, time, patience, or a listener's reason.

    Raises Stopped after Ctrl-C or SIGTERM, when the current step is saved; DivergedError or NonFiniteError if training
    diverges again after a rollback; MemoryLimitError; DiskError.
    """
    apply_memory_settings(job)
    if _is_out_of_patience(job):  # the process was killed after its last save, before the report
        return "patience"
    if reason := job.devices.run_on_main(lambda: job.log.end_reason):  # of a listener, when the run was resumed
        return reason
    if job.devices.run_on_main(lambda: not job.folder.checkpoints()):
        save(job)  # a rollback needs a checkpoint
    with stop_signals() as stop_requested:
        while True:
            try:
                return _run_steps(job, stop_requested)
            except Diverged as diverged:
                _roll_back(job, diverged)


def _run_steps(job: Job, stop_requested: Callable[[], bool]) -> str:
    """Run the remaining steps, and return why training ended. Raises Diverged if a rollback is needed."""
    train, progress = job.recipe.train, job.state.progress
    stream = batch_stream(job.recipe, len(job.train), progress.position)
    limit = parse_seconds(train.max_time) if train.max_time else math.inf
    saved_at, ended = time.monotonic(), ""
    job.model.train()
    for batch in stream:
        if batch.index not in progress.passed:
            _step_and_log(job, batch, stream)
        progress.step, progress.position = batch.index + 1, dict(batch.position)
        flags = stop_requested(), _seconds_spent(job) >= limit, time.monotonic() - saved_at > SAVE_EVERY_S
        stopping, out_of_time, save_due = job.devices.any_rank(*flags)
        epoch_ends = progress.step % stream.steps_per_epoch == 0
        ended = "steps" if progress.step == stream.total_steps else "time" if out_of_time else ""
        eval_due = progress.step % train.eval_steps == 0 if train.eval_steps else epoch_ends
        saved = bool(ended == "time" and job.eval and not eval_due)
        if saved:  # before the evaluation, which does not count if the run continues
            progress.budget_from += _seconds_spent(job)
            save(job)
        if job.eval and (ended or eval_due):
            evaluate(job)
            ended = ended or ("patience" if _is_out_of_patience(job) else "")
            ended = ended or job.devices.run_on_main(lambda: job.log.end_reason)
            (stopping,) = job.devices.any_rank(stop_requested())
        stopping = stopping and not ended
        due = progress.step % train.save_steps == 0 if train.save_steps else epoch_ends
        due = (due or save_due) and not progress.streak  # a rollback needs a state from before the bad steps
        if ended == "time" and not saved:
            progress.budget_from += _seconds_spent(job)
        if not saved and (ended or stopping or due or progress.best_step == progress.step):
            save(job)
            saved_at = time.monotonic()
        if stopping:
            job.log.emit("stop", step=progress.step, why=SIGNAL)
            what = f"stopped after step {progress.step} of {stream.total_steps}"
            raise Stopped(what, fix=f"continue with `strop resume {shlex.quote(str(job.folder.path))}`")
        if ended:
            break
    if ended != "steps":
        reasons = {"time": "the time budget is spent", "patience": "the evaluation loss no longer improves"}
        job.log.emit("stop", step=progress.step, why=reasons.get(ended, ended))
    return ended


def _step_and_log(job: Job, batch: Batch, stream: BatchStream) -> None:
    """Train one step and log it. Raises Diverged if a rollback is needed."""
    progress, started = job.state.progress, time.perf_counter()
    communication_s, waiting_s = job.devices.communication_s, job.devices.waiting_s
    rate = rate_at(job, batch.index, stream.total_steps)
    result = train_step(job, batch, rate)
    seconds = time.perf_counter() - started
    progress.tokens += result.tokens
    progress.supervised_tokens += result.supervised_tokens
    progress.seconds += seconds
    sending, waiting = job.devices.communication_s - communication_s, job.devices.waiting_s - waiting_s
    device_times = _count_device_times(job, result, sending, waiting)
    if result.applied:
        progress.moved = True
        _log_step(job, batch, result, rate, seconds, stream.total_steps, device_times)
    if result.verdict is not Verdict.GOOD:
        _log_bad_step(job, batch, result)
    if result.verdict is Verdict.ROLL_BACK:
        raise Diverged(f"{result.problem} ({len(progress.streak)} bad steps in a row)", finite=result.finite)


def rate_at(job: Job, index: int, total: int) -> float:
    """Return the learning rate of step `index` (from 0) of `total`."""
    train = job.recipe.train
    assert train.learning_rate is not None
    factor = rate_factor(index, total, warmup_steps(train.warmup, total), train.lr_scheduler)
    return train.learning_rate * factor * job.state.progress.rate_scale


def train_step(job: Job, batch: Batch, rate: float) -> StepResult:
    """Train on an effective batch. A rejected step leaves the weights unchanged."""
    rows = [row_of(job, batch.epoch, row) for row in batch.rows]
    job.step.masks.begin(job.recipe.seed, batch.index)

    def prepare() -> list[Item]:
        return job.criterion.prepare(job.step, rows, batch.index, partial(micro_batches, job))

    items = retry_with_less_memory(job, rows, prepare) if job.criterion.prepares else prepare()
    first = result = _update(job, items, rate)
    for _ in range(job.criterion.updates - 1):
        if not result.applied:
            break
        result = _update(job, items, rate, first)
    if (batch.index + 1) % COMPARE_EVERY == 0:
        job.devices.check_equal(lambda: all_tensors(job.state))
    return result


def _update(job: Job, items: Sequence[Item], rate: float, first: StepResult | None = None) -> StepResult:
    """Do one optimizer step. first: the result of the first step on the same completions."""

    def compute() -> LocalGradient:
        allocate_state(job.state.optimizer)
        return compute_gradients(job, items)

    weights, progress = list(job.state.weights.values()), job.state.progress
    scale = progress.loss_scale, progress.scale_steps
    while True:
        total = sum_gradients(job, items, retry_with_less_memory(job, items, compute))
        if progress.loss_scale != 1:
            torch._foreach_mul_([weight.grad for weight in weights if weight.grad is not None], 1 / progress.loss_scale)
        norm = clip_gradients(weights, job.recipe.train.max_grad_norm or math.inf)
        # the only synchronization with the device in a step
        scalars = torch.stack([x.to(total.loss) for x in (total.loss, norm, *total.metrics.values())])
        loss, grad_norm, *means = scalars.tolist()
        if not guard.lower_loss_scale(progress, loss, grad_norm):
            break
        job.state.optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(grad_norm):  # the scale is not the cause
        progress.loss_scale, progress.scale_steps = scale
    tokens, supervised = sum(map(len, items)), sum(item.supervised for item in items)
    metrics = {name: value for name, value in zip(total.metrics, means, strict=True) if math.isfinite(value)}
    if first is None:
        guard.check_rollouts(job.state.progress, metrics, grad_norm)
    else:  # the policy has changed since the completions were sampled
        metrics = {**metrics, "off": first.metrics["off"]}
        tokens, supervised = tokens + first.tokens, supervised + first.supervised_tokens
    judged: float | None = loss
    if KEPT in metrics:
        judged, kept = job.criterion.separate(items, loss, metrics)
        loss, metrics = kept if judged is None else judged, {**metrics, KEPT: kept}
    verdict = guard.judge_step(job.state.progress, judged, grad_norm)
    result = StepResult(loss, grad_norm, tokens, supervised, verdict, metrics, total)
    if result.applied:
        set_rate(job.state.optimizer, rate)
        is_first, zero_expected = first is None, metrics.get("equal_groups") == 1 and "teacher_kl" not in metrics
        zero_expected = zero_expected or loss == 0  # no candidate of the batch differs from the positives
        enabled = is_first and bool(total.metrics.keys() - {KEPT})
        with guard.check_update(job.state, grad_norm, enabled=enabled, zero_expected=zero_expected):
            job.state.optimizer.step()
        if job.recipe.model.dtype == "fp16":
            guard.raise_loss_scale(progress)
    job.state.optimizer.zero_grad(set_to_none=True)
    return result


def evaluate(job: Job) -> None:
    """Evaluate the held-out rows, update the best step, and log sample completions."""
    progress, started, held_out = job.state.progress, time.perf_counter(), job.eval
    compiled = warmup.compile_seconds()
    assert held_out is not None
    LOG.info("evaluating %d rows", len(held_out))
    job.model.eval()
    split = partial(micro_batches, job)
    metrics = retry_with_less_memory(job, held_out, lambda: job.criterion.evaluate(job.step, held_out, split))
    loss = metrics.pop("loss")
    job.model.train()
    seconds = time.perf_counter() - started
    progress.eval_seconds += seconds
    finite_loss = loss if math.isfinite(loss) else None
    progress.eval_loss = finite_loss
    better = finite_loss is not None and (progress.best_loss is None or loss < progress.best_loss)
    if better:
        progress.best_loss, progress.best_step, progress.evals_without_better = loss, progress.step, 0
        progress.held_out = metrics
    elif progress.moved:  # not counted if the weights have not changed since the last evaluation
        progress.evals_without_better += 1
    progress.moved = False
    job.log.emit("eval", step=progress.step, loss=finite_loss, best=better, seconds=round(seconds, 3), **metrics)
    if job.samples is not None:
        started = time.perf_counter()
        job.devices.run_on_main(lambda: _log_samples(job))
        progress.eval_seconds += time.perf_counter() - started
    progress.compile_seconds += warmup.compile_seconds() - compiled


def _log_samples(job: Job) -> None:
    """Log completions of the sample prompts. A failure is logged as a note, and the run continues."""
    assert job.samples is not None
    step, random, reason = job.state.progress.step, random_states(job.state.device), ""
    job.model.eval()
    try:
        number = len(job.samples.ids)
        samples = job.samples.complete(job.model, lambda done: LOG.info("sampling: %d of %d completions", done, number))
    except Exception as error:  # the generation code of a model can raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
    finally:
        job.model.train()
        set_random_states(random, job.state.device)
    if reason:
        free_step_memory(job)
        job.log.emit("note", text=f"step {step}: no sample completions: {reason}")
    else:
        job.log.emit("samples", step=step, samples=samples)


def save(job: Job) -> None:
    """Write a checkpoint. Raises Diverged if a weight is not finite."""
    started, progress = time.perf_counter(), job.state.progress
    LOG.info("saving a checkpoint")
    job.devices.check_equal(lambda: all_tensors(job.state))  # so that all devices decide the same below
    if (not_finite := first_not_finite(job.state)) is not None:
        progress.streak = [*progress.streak, progress.step - 1]
        raise Diverged(f"{not_finite} contains NaN or infinity", finite=False)
    checkpoint = job.folder.checkpoint(progress.step)
    with job.devices.all_or_none():
        if job.devices.is_main:
            save_checkpoint(job.folder, job.state)
            if not progress.streak:  # otherwise a rollback may need an older checkpoint
                prune_checkpoints(job.folder, job.recipe.train.keep_checkpoints, progress.best_step)
    seconds = time.perf_counter() - started
    progress.save_seconds += seconds
    job.log.emit("save", step=progress.step, checkpoint=checkpoint.name, seconds=round(seconds, 3))


def restore_newest(job: Job, *, prefer_good: bool = False) -> Path:
    """Load the newest intact checkpoint, and return its path. prefer_good: as in newest_checkpoint."""

    def note(text: str) -> None:
        job.log.emit("note", text=text)

    checkpoint = job.devices.run_on_main(lambda: newest_checkpoint(job.folder, note, prefer_good=prefer_good))
    restore_checkpoint(checkpoint, job.state, note)
    progress = job.state.progress
    # recomputed, because the number of rows or the batch size may have changed
    before, stream = progress.position, batch_stream(job.recipe, len(job.train))
    progress.position = stream.position_of(progress.step)
    if before and (before["rows"], before["batch_size"]) != (stream.num_rows, stream.batch_size):
        was, now = (
            progress.step / math.ceil(before["rows"] / before["batch_size"]),
            progress.step / stream.steps_per_epoch,
        )
        note(f"steps have other rows than before: {progress.step} steps were {was:.1f} epochs, and count as {now:.1f}")
    if progress.step > stream.total_steps:
        note(f"no step is left: {progress.step} are done, and the recipe now has {stream.total_steps}")
    reset_lost_best(job)
    return checkpoint


def reset_lost_best(job: Job) -> None:
    progress, best_step = job.state.progress, job.state.progress.best_step
    if best_step is None or best_step == progress.step:
        return
    checkpoint = job.folder.checkpoint(best_step)
    why = job.devices.run_on_main(lambda: checkpoint_error(checkpoint))
    if why is not None:
        job.log.emit("note", text=f"{checkpoint}: the best weights so far are lost: {why}")
        progress.forget_best()


def _roll_back(job: Job, diverged: Diverged) -> None:
    """Restore the last good checkpoint, skip the bad batches, and lower the learning rate.

    Raises DivergedError or NonFiniteError if the run was rolled back before.
    """
    before, stream = job.state.progress, batch_stream(job.recipe, len(job.train))
    if before.rollbacks:
        raise _divergence_error(job, diverged, stream)
    checkpoint = restore_newest(job, prefer_good=True)
    progress = job.state.progress
    progress.passed = sorted({*progress.passed, *before.streak})
    progress.streak, progress.rollbacks = [], before.rollbacks + 1
    progress.rate_scale = before.rate_scale * guard.RATE_CUT
    for name in KEPT_BY_ROLLBACK:
        setattr(progress, name, getattr(before, name))
    skipped = [
        {"step": index + 1, "rows": _row_locations(job, stream.epoch_of(index), stream.rows(index))}
        for index in progress.passed
    ]
    job.log.emit(
        "rollback", step=before.step, to=progress.step, checkpoint=checkpoint.name, why=diverged.why, passed=skipped,
        rate_scale=progress.rate_scale,
    )  # fmt: skip


def _divergence_error(job: Job, diverged: Diverged, stream: BatchStream) -> DivergedError:
    progress = job.state.progress
    rate = rate_at(job, progress.step, stream.total_steps)
    advice = guard.suggest_fixes(progress, rate, str(job.recipe.model.dtype), diverged)
    newest = job.folder.checkpoints()[-1][1]
    rows = [
        location
        for index in progress.streak
        for location in _row_locations(job, stream.epoch_of(index), stream.rows(index))
    ]
    job.log.emit("stop", step=progress.step, why=diverged.why, rows=rows, advice=advice)
    what = f"step {progress.step + 1}: {diverged.why}, again after a rollback with a lower learning rate"
    error_class = DivergedError if diverged.finite else NonFiniteError
    return error_class(f"{what}; the last good state is {newest}", fix="; ".join(advice))


def _is_out_of_patience(job: Job) -> bool:
    patience = job.recipe.train.early_stopping
    return patience is not None and job.state.progress.evals_without_better >= patience


def _seconds_spent(job: Job) -> float:
    progress = job.state.progress
    return progress.seconds + progress.eval_seconds + progress.save_seconds - progress.budget_from


def _count_device_times(job: Job, result: StepResult, communication_s: float, waiting_s: float) -> dict[str, float]:
    """Add the times of a step on several devices to Progress, and return them for the log.

    balance: the mean computation time of the ranks divided by that of the slowest.
    """
    if job.devices.world_size == 1:
        return {}
    progress, mean, slowest = job.state.progress, statistics.fmean(result.total.seconds), max(result.total.seconds)
    progress.communication_s += communication_s
    progress.waiting_s += waiting_s
    progress.computing_s += mean
    progress.slowest_s += slowest
    balance = round(mean / max(slowest, 1e-9), 4)
    return {"communication_s": round(communication_s, 6), "waiting_s": round(waiting_s, 6), "balance": balance}


def _log_step(
    job: Job, batch: Batch, result: StepResult, rate: float, seconds: float, total: int, device_times: dict[str, float]
) -> None:
    progress, number = job.state.progress, batch.index + 1
    if progress.first_loss is None:
        progress.first_loss = result.loss
    progress.last_loss, progress.figures = result.loss, result.metrics
    for find_warning in (guard.likelihood_drop_warning, guard.equal_rewards_warning):
        if (warning := find_warning(progress, result.metrics)) is not None:
            job.log.emit("note", text=f"step {number}: {warning}")
    if number % job.recipe.train.log_steps and number != total:
        return
    job.log.emit(
        "step", step=number, steps=total, epoch=batch.epoch, loss=result.loss, grad_norm=result.grad_norm,
        learning_rate=rate, tokens=progress.tokens, tokens_per_s=round(result.tokens / seconds, 1),
        seconds=round(progress.seconds, 3), seconds_left=round(_seconds_left(job, number, total), 1),
        **result.metrics, **device_times, **memory_in_use(str(job.state.device)),
    )  # fmt: skip


def _seconds_left(job: Job, number: int, total: int) -> float:
    """Return the forecast after step `number`: of its steps and, after the first one, of evaluations with samples.

    Kernels are compiled once, so that the time of compiling is not expected again.
    """
    progress = job.state.progress
    seconds = (total - number) * progress.seconds / number
    if job.eval:
        stream, every = batch_stream(job.recipe, len(job.train)), job.recipe.train.eval_steps
        done = (number - 1) // (every or stream.steps_per_epoch)  # one that follows this step is not done
        evaluating = max(0.0, progress.eval_seconds - progress.compile_seconds)
        seconds += (stream.count_evaluations(every) - done) * evaluating / done if done else 0.0
    return seconds


def _log_bad_step(job: Job, batch: Batch, result: StepResult) -> None:
    """Log a "doubt" event if the update was applied, otherwise "skip"."""
    if not result.applied:
        job.state.progress.skipped_steps += 1
    kind = "doubt" if result.applied else "skip"
    rows, bad_ranks = batch.rows, result.total.bad_ranks
    if bad_ranks:
        items = [row_of(job, batch.epoch, row) for row in rows]
        rows = tuple(rows[index] for rank in bad_ranks for index in rows_of_rank(job, items, rank))
    fields = {"ranks": list(bad_ranks)} if bad_ranks and job.devices.world_size > 1 else {}
    job.log.emit(kind, step=batch.index + 1, why=result.problem, rows=_row_locations(job, batch.epoch, rows), **fields)


def row_of(job: Job, epoch: int, row: int) -> Item:
    return job.train.item(row, epoch) if isinstance(job.train, JoinedItems) else job.train[row]


def _row_locations(job: Job, epoch: int, rows: Sequence[int]) -> list[str]:
    return [f"{item.file}:{item.line}" for item in (row_of(job, epoch, row) for row in rows)]


def parse_seconds(text: str) -> float:
    """Parse a valid duration such as 90s, 30m, 2h, 1d, or a number of seconds."""
    factor = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1])
    return float(text) if factor is None else float(text[:-1]) * factor


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True after Ctrl-C or SIGTERM. A second signal raises KeyboardInterrupt.

    The first one logs at once what it does, because the step may take long.
    """
    received: list[int] = []
    ranks = find_ranks()

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            earlier_handler = old[signal.Signals(number)]
            if callable(earlier_handler):  # it records that the command was interrupted
                earlier_handler(number, frame)
            raise KeyboardInterrupt
        received.append(number)
        if ranks is None or ranks.rank == 0:
            again = "Ctrl-C again stops" if number == signal.SIGINT else "a second signal stops"
            text = f"stopping after this step and saving; {again} at once, without saving"
            # in another thread, because this one may hold the locks and buffers of the output
            threading.Thread(target=LOG.warning, args=(text,), daemon=True).start()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: False
        return
    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
