"""Injected faults of every kind; `make faults` runs all cases and writes docs/reliability.md.

Each case injects faults into runs of 20 steps that save after every step. The resulting adapters must be bit-identical
to those of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from strop.cli import app
from strop.runs.events import read_events
from strop.runs.folder import RunFolder, is_run
from strop.training import loop, state
from tests.faults.harness import Ended, child, die_at, instants, start, wait
from tests.support import tiny

STEPS = 20
FLAGS = {
    "fast": ["--model.dtype", "fp32", "--lora.r", "16"],
    "dropout": ["--model.dtype", "fp32", "--lora.r", "16", "--lora.dropout", "0.1", "--train.micro_batch", "2"],
}


@dataclass
class Tally:
    """The result of a case: the number of trials, and the trials with an unexpected outcome."""

    what: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def check(self, good: bool, why: str) -> None:
        if not good:
            self.wrong.append(why)


class Lab:
    """A tiny model with rows, and runs on them through the command line, in forked processes."""

    def __init__(self, folder: Path, *, eval_share: bool = False) -> None:
        os.environ["STROP_CACHE"] = str(folder / "cache")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.model = tiny.save_tiny(folder / "model")
        self.rows = tiny.write_rows(folder / "rows.jsonl", 40)
        self.more = ["--data.eval", "20%", "--train.eval_steps", "4"] if eval_share else []
        self.references: dict[str, str] = {}
        self.longest = 0.0  # duration of a run
        self.training = (0.0, 0.0)  # from its start to the first and to the last save
        self._next = 0

    def out(self) -> Path:
        self._next += 1
        return self.folder / "runs" / f"r{self._next}"

    def words(self, out: Path, kind: str) -> list[str]:
        quick = ["--train.max_steps", str(STEPS), "--train.batch_size", "4", "--train.save_steps", "1"]
        start = ["train", "--model", str(self.model), "--data", str(self.rows), "--out", str(out)]
        return [*start, *quick, *FLAGS[kind], *self.more]

    def start(self, out: Path, kind: str = "fast", **hurt: Any) -> Ended:
        return self._run(self.words(out, kind), **hurt)

    def continue_run(self, out: Path, kind: str = "fast", **hurt: Any) -> Ended:
        """Continue as a user would: resume, or start again if the run had not begun."""
        return self._run(["resume", str(out), "--json"], **hurt) if is_run(out) else self.start(out, kind, **hurt)

    def _run(
        self,
        words: list[str],
        *,
        hurt: tuple[int, float] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> Ended:
        return child(self.work(words, prepare), self.folder / "output.txt", hurt=hurt)

    @staticmethod
    def work(words: list[str], prepare: Callable[[], None] | None = None) -> Callable[[], int]:
        """Return a strop command as a function to run in a child. prepare: called in the child before."""

        def work() -> int:
            if prepare is not None:
                prepare()
            sys.argv = ["strop", *words]
            app.main()
            return 0

        return work

    def reference(self, kind: str) -> str:
        """Return the adapter of the uninterrupted run."""
        if kind not in self.references:
            self.start(self.out(), kind)  # compiles kernels, so its duration is not measured
            out, began = self.out(), time.time()
            ended = self.start(out, kind)
            assert ended.code == 0, ended.output
            self.store_times(out, began, max(self.longest, ended.seconds))
            self.references[kind] = adapter_hash(out)
        return self.references[kind]

    def store_times(self, out: Path, began: float, seconds: float) -> None:
        """Store the duration of a run, and of its part with saves, from which later instants are chosen."""
        saves = [event["time"] - began for event in read_events(out / "events.jsonl") if event["event"] == "save"]
        self.longest, self.training = seconds, (saves[0], saves[-1])

    def instants(self, number: int, seed: int) -> list[float]:
        """Return random instants, half of them over the whole run, half while it trains and saves."""
        first, last = self.training
        busy = [first + after for after in instants(number - number // 2, last - first, seed + 1)]
        mixed = [*instants(number // 2, self.longest, seed), *busy]
        random.Random(seed).shuffle(mixed)
        return mixed

    def endless_instants(self, number: int, seed: int) -> Iterator[float]:
        """Yield `number` instants and as many again, spread over the duration of the last whole run."""
        while True:
            yield from self.instants(number, seed)
            seed += 1

    def finished_well(self, tally: Tally, out: Path, ended: Ended, kind: str, what: str) -> None:
        good = ended.code == 0 and adapter_hash(out) == self.reference(kind)
        tally.check(good, f"{what}: exit {ended.code}, {'another adapter' if ended.code == 0 else ended.output[-300:]}")
        tally.check(not _litter(out), f"{what}: left {_litter(out)}")
        shutil.rmtree(out, ignore_errors=True)


def adapter_hash(out: Path) -> str:
    file = out / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"


def _litter(out: Path) -> list[str]:
    return [str(entry) for entry in out.rglob("*") if ".tmp-" in entry.name or ".old-" in entry.name]


def kills(lab: Lab, number: int, seed: int = 0) -> Tally:
    """Kill runs with SIGKILL at random instants, and every second one again while it resumes."""
    tally = Tally("kill -9 at a random instant")
    for kind in FLAGS:
        lab.reference(kind)
    before_it_began = place = 0
    times = lab.endless_instants(number, seed)
    while tally.tried < number:
        kind, out, after, began = list(FLAGS)[place % 2], lab.out(), next(times), time.time()
        ended = lab.start(out, kind, hurt=(signal.SIGKILL, after))
        tally.tried += ended.code == -signal.SIGKILL
        if ended.code == 0:  # it ended earlier: the machine is faster than in the reference run
            lab.store_times(out, began, ended.seconds)
        before_it_began += not is_run(out)
        if place % 4 >= 2:
            tally.tried += lab.continue_run(out, kind, hurt=(signal.SIGKILL, after / 2)).code == -signal.SIGKILL
        lab.finished_well(tally, out, lab.continue_run(out, kind), kind, f"{kind}, killed after {after:.3f} s")
        place += 1
    tally.figures["killed before the run had begun"] = before_it_began
    return tally


def crash_points(lab: Lab, every: int) -> Tally:
    """Kill a run with SIGKILL just before each fsync, rename and removal in turn."""
    tally, call = Tally("kill -9 before an fsync, a rename or a removal"), 1
    while True:
        out = lab.out()
        ended = lab.start(out, prepare=die_at(call))
        if ended.code == 0:  # the run has fewer such calls
            return tally
        tally.tried += 1
        lab.finished_well(tally, out, lab.continue_run(out), "fast", f"killed before call {call}")
        call += every


def cold_kills(words: Callable[[Path], list[str]], out: Path, number: int, seed: int = 1) -> Tally:
    """Kill real processes with a cold start before and after the first checkpoint."""
    tally = Tally("kill -9 of a process with a cold start")
    strop = [sys.executable, "-m", "strop.cli"]
    started = time.monotonic()
    subprocess.run([*strop, *words(out / "whole")], check=True, capture_output=True)
    expected, longest = adapter_hash(out / "whole"), time.monotonic() - started
    for place, after in enumerate(instants(2 * number, longest, seed)):
        if tally.tried == number:
            break
        run = out / f"cold{place}"
        process = subprocess.Popen([*strop, *words(run)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(after)
        process.kill()
        tally.tried += process.wait() == -signal.SIGKILL
        again = ["resume", str(run)] if is_run(run) else words(run)
        ended = subprocess.run([*strop, *again], capture_output=True, text=True)
        good = ended.returncode == 0 and adapter_hash(run) == expected
        tally.check(good, f"killed after {after:.1f} s: exit {ended.returncode}: {ended.stderr[-300:]}")
        shutil.rmtree(run, ignore_errors=True)
    return tally


def damage(lab: Lab, every: int = 1) -> Tally:
    """Truncate, remove or flip a bit in each file of the newest checkpoint."""
    tally = Tally("a file of the newest checkpoint truncated, bit-flipped or removed")
    lab.reference("fast")
    whole = _stopped_midway(lab)
    names = sorted(file.name for file in RunFolder(whole).checkpoints()[-1][1].iterdir())
    cases = [(name, how) for name in names for how in (_truncate, _flip, Path.unlink)]
    for name, how in cases[::every]:
        out = lab.out()
        shutil.copytree(whole, out)
        step, newest = RunFolder(out).checkpoints()[-1]
        how(newest / name)
        tally.tried += 1
        ended = lab.continue_run(out)
        text = f"{newest}: skipped" in ended.output
        tally.check(text, f"{how.__name__} {name} of step {step}: not reported")
        lab.finished_well(tally, out, ended, "fast", f"{how.__name__} {name}")
    shutil.rmtree(whole)
    return tally


def _stopped_midway(lab: Lab) -> Path:
    """Return a run that was interrupted after about half of its steps."""
    out = lab.out()
    ended = lab.start(out, prepare=_at_step(STEPS // 2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert ended.code == 130, ended.output
    return out


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def full_disk(lab: Lab, every: int = 1) -> Tally:
    """Limit the file size (RLIMIT_FSIZE) at each save in turn, to less than the weights or the optimizer state."""
    tally = Tally("disk full at a save")
    lab.reference("fast")
    for step in range(1, STEPS, every):
        out, small = lab.out(), 60_000 if step % 2 else 100_000

        def limit(small: int = small) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (small, resource.RLIM_INFINITY))

        ended = lab.start(out, prepare=_at_step(step, limit))
        tally.tried += 1
        good = ended.code == 1 and "cannot be written" in ended.output
        tally.check(good, f"save {step}: exit {ended.code}: {ended.output[-300:]}")
        left = RunFolder(out).checkpoints()
        whole = bool(left) and all(state.checkpoint_error(checkpoint) is None for _, checkpoint in left)
        tally.check(whole and not _litter(out), f"save {step}: left {left} {_litter(out)}")
        lab.finished_well(tally, out, lab.continue_run(out), "fast", f"disk full at save {step}")
    return tally


def not_finite(lab: Lab) -> Tally:
    """Inject NaN into the loss, a gradient, a weight or a moment: once, in three consecutive steps, and from some step
    on.
    """
    tally = Tally("NaN in loss, gradient, weight, optimizer state")
    once, thrice, for_good = {7}, {7, 8, 9}, set(range(7, 1000))
    for where in ("loss", "gradient", "weight", "moment"):
        # A weight becomes NaN between two checks: three times mean three rollbacks, and the second one ends the run.
        for steps in (once, thrice, for_good) if where in ("loss", "gradient") else (once, for_good):
            out = lab.out()
            ended = lab.start(out, prepare=_poison(where, steps))
            tally.tried += 1
            label = f"NaN in {where} at {len(steps)} steps"
            given_up = len(steps) > 3
            tally.check(ended.code == (1 if given_up else 0), f"{label}: exit {ended.code}: {ended.output[-300:]}")
            kinds = [event["event"] for event in read_events(out / "events.jsonl")]
            tally.check("skip" in kinds or "rollback" in kinds, f"{label}: nothing recorded")
            for _, checkpoint in RunFolder(out).checkpoints():
                tally.check(_all_finite(checkpoint), f"{label}: {checkpoint} holds NaN")
            tally.check(given_up or _all_finite(out / "adapter"), f"{label}: the adapter holds NaN")
            shutil.rmtree(out)
    return tally


def _all_finite(folder: Path) -> bool:
    from safetensors.torch import load_file

    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    return bool(tensors) and all(torch.isfinite(tensor).all() for tensor in tensors)


def out_of_memory(lab: Lab, number: int, seed: int = 2) -> Tally:
    """Fail allocations at random micro-batches and in evaluations; steps and weights must be the same."""
    tally, chance = Tally("out of memory at a random micro-batch, evaluation included"), random.Random(seed)
    expected = _adapter(lab, None)
    for _ in range(number):
        call = chance.randrange(1, STEPS + 1)  # micro-batches and evaluations
        out = lab.out()
        ended = lab.start(out, prepare=_starve(call))
        tally.tried += 1
        events = read_events(out / "events.jsonl")
        good = ended.code == 0 and any(event["event"] == "shrink" for event in events)
        tally.check(good, f"call {call}: exit {ended.code}: {ended.output[-300:]}")
        if good:
            result = _adapter(lab, out)
            far = max((result[name] - expected[name]).abs().max().item() for name in expected)
            tally.check(far < 1e-5, f"call {call}: the adapter is off by {far:.1e}")
            tally.figures["largest difference"] = max(far, tally.figures.get("largest difference", 0.0))
            steps = [event["step"] for event in events if event["event"] == "step"]
            tally.check(steps == list(range(1, STEPS + 1)), f"call {call}: steps {steps}")
        shutil.rmtree(out)
        shutil.rmtree(
            lab.folder / "cache" / "memory", ignore_errors=True
        )  # the next run must not use the remembered settings
    return tally


def _adapter(lab: Lab, out: Path | None) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    if out is None:
        out = lab.out()
        ended = lab.start(out)
        assert ended.code == 0, ended.output
    return load_file(out / "adapter" / "adapter_model.safetensors")


def interrupts(lab: Lab, number: int, seed: int = 3) -> Tally:
    """Send SIGINT and SIGTERM at random instants, once and twice in a row."""
    tally = Tally("SIGINT or SIGTERM at a random instant")
    lab.reference("fast")
    for place, after in enumerate(lab.instants(number, seed)):
        out, sent = lab.out(), (signal.SIGINT, signal.SIGTERM)[place % 2]
        ended = lab.start(out, hurt=(sent, after))
        tally.tried += ended.code != 0
        too_early = ended.code == -sent and not out.exists()  # before strop has started
        text = f"{sent.name} after {after:.3f} s: exit {ended.code}: {ended.output[-300:]}"
        tally.check(ended.code in (0, 130) or too_early, text)
        lab.finished_well(tally, out, lab.continue_run(out), "fast", f"{sent.name} after {after:.3f} s")
    return tally


def two_at_once(lab: Lab, number: int) -> Tally:
    """Start two processes in one folder at the same time: one trains, the other is refused."""
    tally = Tally("two runs on one folder")
    lab.reference("fast")
    for _ in range(number):
        out, log = lab.out(), lab.folder / "second.txt"
        pid, started = start(lab.work(lab.words(out, "fast")), log), time.monotonic()
        first, second = lab.start(out), wait(pid, log, started)
        tally.tried += 1
        codes = sorted((first.code, second.code))
        tally.check(codes == [0, 2], f"exits {codes}: {first.output[-300:]} {second.output[-300:]}")
        lab.finished_well(tally, out, Ended(0, 0.0, ""), "fast", "two at once")
    return tally


def _at_step(step: int, act: Callable[[], None]) -> Callable[[], None]:
    """Call `act` in the child after a step, before evaluation and save."""

    def prepare() -> None:
        take = loop._step_and_log

        def taken(job: Any, batch: Any, stream: Any) -> None:
            take(job, batch, stream)
            if batch.index + 1 == step:
                act()

        mock.patch.object(loop, "_step_and_log", taken).start()

    return prepare


def _poison(where: str, steps: set[int]) -> Callable[[], None]:
    """Inject NaN in the child at these steps (counted as executed, rollbacks included)."""

    def prepare() -> None:
        count, gradients, take = iter(range(1, 10_000)), loop.compute_gradients, loop._step_and_log

        def poisoned(job: Any, examples: Any) -> Any:
            part = gradients(job, examples)
            if next(count) in steps:
                if where == "loss":
                    return replace(part, loss=part.loss * math.nan)
                if where == "gradient":
                    next(iter(job.state.weights.values())).grad.view(-1)[0] = math.nan
            return part

        def taken(job: Any, batch: Any, stream: Any) -> None:
            take(job, batch, stream)
            if where in ("weight", "moment") and next(count) in steps:
                weight = next(iter(job.state.weights.values()))
                target = weight.data if where == "weight" else job.state.optimizer.state[weight]["exp_avg"]
                target.view(-1)[0] = math.nan

        if where in ("loss", "gradient"):
            mock.patch.object(loop, "compute_gradients", poisoned).start()
        else:
            mock.patch.object(loop, "_step_and_log", taken).start()

    return prepare


def _starve(call: int) -> Callable[[], None]:
    """Let the n-th micro-batch in the child run out of memory."""

    def prepare() -> None:
        from strop.engine.train.fast import FastLoss

        count, compute = iter(range(1, 10_000)), FastLoss.token_loss

        def starved(self: FastLoss, examples: Any) -> Any:
            if next(count) == call:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return compute(self, examples)

        mock.patch.object(FastLoss, "token_loss", starved).start()

    return prepare


@contextmanager
def one_thread() -> Iterator[None]:
    """Check that the parent has no thread pool, which would not work in forks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
