"""The training loop: one step, and what happens between steps. Read `fit` first."""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strop.config.schema import Recipe
from strop.data.batches import Batch, BatchStream
from strop.data.conversation import Example
from strop.data.pack import group_by_length, pack
from strop.errors import NonFiniteError, Stopped
from strop.evaluation.loss import TokenLoss, mean_loss
from strop.runs.events import EventLog
from strop.runs.folder import RunFolder
from strop.training import state as checkpoints
from strop.training.optim import rate_factor, set_rate, warmup_steps
from strop.training.state import TrainState

SAVE_EVERY_S = 600.0  # at least this often, whatever the recipe says about steps
SKIPS_IN_A_ROW = 3  # non-finite steps passed over before the run stops


@dataclass(frozen=True)
class Job:
    """What the loop works on. `token_loss` gives the summed loss of the supervised tokens of a micro-batch.

    packed: it computes no padding, so that rows of any lengths make a micro-batch.
    """

    recipe: Recipe
    folder: RunFolder
    model: nn.Module
    token_loss: TokenLoss
    train: Sequence[Example]
    eval: Sequence[Example] | None
    state: TrainState
    log: EventLog
    packed: bool = False


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the supervised tokens of the effective batch. grad_norm: before clipping."""

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def stream_of(recipe: Recipe, num_rows: int, position: dict[str, int] | None = None) -> BatchStream:
    train = recipe.train
    return BatchStream(
        num_rows,
        batch_size=train.batch_size,
        seed=recipe.seed,
        epochs=train.epochs,
        max_steps=train.max_steps,
        position=position or None,
    )


def fit(job: Job) -> None:
    """Trains to the end of the recipe, from wherever the state stands.

    Raises Stopped after Ctrl-C or SIGTERM, once the step is finished and saved; NonFiniteError after
    SKIPS_IN_A_ROW steps whose loss or gradient was not finite (none of which touched the weights).
    """
    train, state = job.recipe.train, job.state
    progress = state.progress
    stream = stream_of(job.recipe, len(job.train), progress.position)
    total, epoch_steps = stream.total_steps, math.ceil(len(job.train) / train.batch_size)
    warmup = warmup_steps(train.warmup, total)
    assert train.learning_rate is not None
    limit = seconds(train.max_time) if train.max_time else math.inf
    saved_at, saved_step, skips = time.monotonic(), progress.step, 0
    job.model.train()
    with stop_signals() as stop_asked:
        for batch in stream:
            started = time.perf_counter()
            rate = train.learning_rate * rate_factor(progress.step, total, warmup, train.lr_scheduler)
            result = step(job, batch, rate)
            took = time.perf_counter() - started
            progress.step += 1
            progress.position = dict(batch.position)
            progress.tokens += result.tokens
            progress.supervised_tokens += result.supervised_tokens
            progress.seconds += took
            if result.finite:
                skips = 0
                _log_step(job, batch, result, rate, took, total)
            else:
                skips += 1
                _skip(job, batch, result)
                if skips == SKIPS_IN_A_ROW:
                    raise _not_finite(job, batch)
            epoch_ends = progress.step % epoch_steps == 0
            last = progress.step == total or _spent(job) >= limit
            if job.eval and (last or (progress.step % train.eval_steps == 0 if train.eval_steps else epoch_ends)):
                evaluate(job)
            stopping = stop_asked()
            every = progress.step % train.save_steps == 0 if train.save_steps else epoch_ends
            best_is_new = progress.best_step == progress.step
            if last or stopping or every or best_is_new or time.monotonic() - saved_at > SAVE_EVERY_S:
                save(job)
                saved_at, saved_step = time.monotonic(), progress.step
            if stopping and not last:
                job.log.emit("stop", step=progress.step, why="signal")
                raise Stopped(f"stopped after step {progress.step} of {total}", fix=f"strop resume {job.folder.path}")
            if train.early_stopping and progress.evals_without_better >= train.early_stopping:
                why = f"{progress.evals_without_better} evaluations without a better loss"
                job.log.emit("stop", step=progress.step, why=why)
                last = True
            if last:
                break
    if saved_step != progress.step:
        save(job)


def step(job: Job, batch: Batch, rate: float) -> StepResult:
    """One optimizer step over an effective batch: forward and backward by micro-batch, clip, update.

    This is the one place that divides the loss: by the supervised weight of the whole effective batch, so that
    micro-batches of any size give the same gradient. A step that is not finite leaves the weights as they are.
    """
    train, weights = job.recipe.train, list(job.state.weights.values())
    examples = [job.train[row] for row in batch.rows]
    divisor = sum(float(example.weights.sum()) for example in examples)
    assert divisor > 0
    loss_sum: Tensor | float = 0.0
    for group in micro_batches(job, examples):
        loss = job.token_loss([examples[row] for row in group]) / divisor
        loss.backward()  # type: ignore[no-untyped-call]
        loss_sum = loss_sum + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(weights, train.max_grad_norm or math.inf)
    loss_value, norm_value = torch.stack([torch.as_tensor(loss_sum), norm.cpu()]).tolist()
    result = StepResult(
        loss_value, norm_value, sum(len(example) for example in examples), sum(e.supervised for e in examples)
    )
    if result.finite:
        set_rate(job.state.optimizer, rate)
        job.state.optimizer.step()
    job.state.optimizer.zero_grad(set_to_none=True)
    return result


def micro_batches(job: Job, examples: Sequence[Example]) -> list[list[int]]:
    """Which examples are computed together: packed into the budget of tokens, or like lengths where padding counts."""
    train, lengths = job.recipe.train, [len(example) for example in examples]
    if job.packed and train.micro_batch_tokens is not None:
        return pack(lengths, max(train.micro_batch_tokens, *lengths))
    return group_by_length(lengths, tokens=train.micro_batch_tokens, rows=train.micro_batch)


def evaluate(job: Job) -> None:
    progress, started = job.state.progress, time.perf_counter()
    assert job.eval is not None
    job.model.eval()
    loss = mean_loss(job.token_loss, job.eval, lambda examples: micro_batches(job, examples))
    job.model.train()
    took = time.perf_counter() - started
    progress.eval_seconds += took
    shown = loss if math.isfinite(loss) else None
    progress.eval_loss = shown
    better = shown is not None and (progress.best_loss is None or loss < progress.best_loss)
    if better:
        progress.best_loss, progress.best_step, progress.evals_without_better = loss, progress.step, 0
    else:
        progress.evals_without_better += 1
    job.log.emit("eval", step=progress.step, loss=shown, best=better, seconds=round(took, 3))


def save(job: Job) -> None:
    started = time.perf_counter()
    checkpoint = checkpoints.save(job.folder, job.state)
    checkpoints.prune(job.folder, job.recipe.train.keep_checkpoints, job.state.progress.best_step)
    took = time.perf_counter() - started
    job.state.progress.save_seconds += took
    job.log.emit("save", step=job.state.progress.step, checkpoint=checkpoint.name, seconds=round(took, 3))


def seconds(text: str) -> float:
    """90s, 30m, 2h, 1d or plain seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    assert match is not None  # the schema has checked it
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM once: the function yielded says True. Twice: KeyboardInterrupt at once."""
    asked: list[int] = []

    def handle(number: int, frame: object) -> None:
        if asked:
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


def _spent(job: Job) -> float:
    progress = job.state.progress
    return progress.seconds + progress.eval_seconds + progress.save_seconds


def _log_step(job: Job, batch: Batch, result: StepResult, rate: float, took: float, total: int) -> None:
    progress = job.state.progress
    if progress.first_loss is None:
        progress.first_loss = result.loss
    progress.last_loss = result.loss
    if progress.step % job.recipe.train.log_steps and progress.step != total:
        return
    job.log.emit(
        "step",
        step=progress.step,
        steps=total,
        epoch=batch.epoch,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=rate,
        tokens=progress.tokens,
        tokens_per_s=round(result.tokens / took, 1),
        seconds_left=round((total - progress.step) * progress.seconds / progress.step, 1),
    )


def _skip(job: Job, batch: Batch, result: StepResult) -> None:
    job.state.progress.skipped_steps += 1
    what = "loss" if not math.isfinite(result.loss) else "gradient"
    rows = [f"{job.train[row].file}:{job.train[row].line}" for row in batch.rows]
    job.log.emit("skip", step=job.state.progress.step, why=f"{what} is not finite", rows=rows)


def _not_finite(job: Job, batch: Batch) -> NonFiniteError:
    saved = job.folder.checkpoints()
    where = f"the last good state is {saved[-1][1]}" if saved else "nothing was saved yet"
    step = job.state.progress.step
    return NonFiniteError(
        f"loss or gradient not finite in {SKIPS_IN_A_ROW} steps in a row, up to step {step}: {where}",
        fix="lower --train.learning_rate, or look at the rows named in events.jsonl",
    )
