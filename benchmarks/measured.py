"""Helpers of the benchmarks: the machine, a clock, the result of a child process, and the file of results.

Imports only the standard library at the top, because scripts of other tools use it in environments without strop.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("strop", "torch", "transformers", "peft", "bitsandbytes", "numba", "trl", "unsloth", "datasets", "triton")


def machine() -> dict[str, Any]:
    """Return the CPU's name, the cores that this process may use, memory in bytes, system and Python version."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores,
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    results = {}
    for name in packages:
        try:
            results[name] = version(name)
        except PackageNotFoundError:
            continue
    return results


def commit() -> str:
    """Return the commit of the checkout, with + if files differ from it, or an empty string outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def write(file: Path | str, results: Any, **more: Any) -> None:
    """Store results with the machine, date, commit, versions and command. more: further fields."""
    script, *words = sys.argv
    parts = (part for word in words for part in word.split() or ["''"])  # the value of an option may be a command
    short = (Path(part).name if os.path.isabs(part) else part for part in parts)  # without its folder
    command = " ".join(["python", f"benchmarks/{Path(script).name}", *short])
    of = {"date": date.today().isoformat(), "commit": commit(), "machine": machine(), "versions": versions()}
    record = {**of, "command": command, **more, "results": results}
    Path(file).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def run_jobs(
    command: Sequence[str], jobs: Iterable[Sequence[Any]], results: list[Any], row: Callable[[Any], str],
    out: Path | None,
) -> None:  # fmt: skip
    """Append the result of `command --one JOB` for each job, print its row, and store all results in `out`."""
    for job in jobs:
        results.append(child([*command, "--one", *map(str, job)]))
        print(row(results[-1]), flush=True)
        if out:
            write(out, results)


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(words: Sequence[str], env: Mapping[str, str] | None = None) -> Any:
    """Return the JSON that a process prints on its last line. Raises RuntimeError with the last output if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{' '.join(words)}:\n{(done.stderr or done.stdout)[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def read_steps(folder: Path) -> dict[str, list[Any]]:
    """Return the loss, tokens (never padding) and seconds of each step of a run of strop."""
    from strop.runs.events import read_events

    steps = [event for event in read_events(folder / "events.jsonl") if event["event"] == "step"]
    counts = [event["tokens"] for event in steps]
    tokens = [end - begin for begin, end in zip([0, *counts], counts, strict=False)]
    seconds = [n / event["tokens_per_s"] for n, event in zip(tokens, steps, strict=True)]
    return {"losses": [event["loss"] for event in steps], "tokens": tokens, "seconds": seconds}


def train_timed(trainer: Any) -> dict[str, list[Any]]:
    """Train with a trainer of transformers that logs each step, and return the same of its steps."""
    from transformers import TrainerCallback

    begun, seconds, tokens = 0.0, list[float](), list[int]()

    class StepClock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal begun
            begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - begun)

    original = trainer.training_step

    def counted(module: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        tokens.append(int(inputs["attention_mask"].sum()))
        return original(module, inputs, *more, **named)

    trainer.training_step = counted
    trainer.add_callback(StepClock())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "tokens": tokens, "seconds": seconds}


class Clock:
    """Total seconds inside `with` blocks: wall time and CPU time of all threads."""

    seconds = 0.0
    cpu_seconds = 0.0

    def __enter__(self) -> Clock:
        self._begun, self._cpu_begun = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._begun
        self.cpu_seconds += time.process_time() - self._cpu_begun


def train_clocked(trainer: Any) -> None:
    """Train with a trainer of transformers or TRL; print real tokens, seconds inside steps, and the mean loss."""
    from transformers import TrainerCallback

    clock, tokens, step = Clock(), [0], trainer.training_step

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.__exit__()

    def counted(module: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        mask = inputs.get("attention_mask")  # packed rows have none
        tokens[0] += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return step(module, inputs, *rest, **more)

    trainer.training_step = counted
    trainer.add_callback(Steps())
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"tokens": tokens[0], "seconds": clock.seconds, "loss": sum(losses) / len(losses)}))
