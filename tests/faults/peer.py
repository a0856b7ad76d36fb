"""Run the fault suite, shortened, on a plain TRL SFTTrainer script, in TRL's Python with a model and rows.

    PYTHON_OF_TRL -m tests.faults.peer LAB_FOLDER OUT.json

The script follows TRL's documentation: save_strategy="steps", resume_from_checkpoint=True, save_model at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from tests.faults.harness import Ended, child, instants

STEPS = 20
KILLS = 20
Case = dict[str, Any]


def train(
    lab: Path, out: Path, *, callbacks: tuple[Any, ...] = (), prepare: Callable[[Any], None] | None = None
) -> int:
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (lab / "rows.jsonl").read_text().splitlines()]
    pairs = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
    config = SFTConfig(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=4, save_steps=1, save_total_limit=2,
        learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, seed=0,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        str(lab / "model"), args=config, train_dataset=Dataset.from_list(pairs), callbacks=list(callbacks),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    if prepare is not None:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=bool(out.is_dir() and get_last_checkpoint(str(out))))
    trainer.save_model(str(out / "final"))
    return 0


def result(out: Path) -> str:
    file = out / "final" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"


class Peer:
    def __init__(self, lab: Path, work: Path) -> None:
        self.lab, self.work, self.number = lab, work, 0
        whole = self.out()
        started = time.time()
        ended = self.run(whole)
        assert ended.code == 0, ended.output
        self.expected, self.longest = result(whole), ended.seconds
        saves = [file.stat().st_mtime - started for file in whole.glob("checkpoint-*/trainer_state.json")]
        self.training = (0.5 * min(saves), max(saves))

    def out(self) -> Path:
        self.number += 1
        return self.work / f"r{self.number}"

    def run(self, out: Path, *, hurt: tuple[int, float] | None = None, **options: Any) -> Ended:
        return child(lambda: train(self.lab, out, **options), self.work / "output.txt", hurt=hurt)

    def verdict(self, out: Path, ended: Ended) -> str:
        if ended.code != 0:
            return "lost: " + (ended.output.strip().splitlines() or [f"exit {ended.code}"])[-1][:160]
        return "identical" if result(out) == self.expected else "another adapter"


class At(TrainerCallback):
    """Call a function at the end of a step."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.act()


def kills(peer: Peer) -> list[str]:
    busy = [peer.training[0] + after for after in instants(KILLS, peer.training[1] - peer.training[0], 1)]
    result = []
    for after in busy:
        out = peer.out()
        peer.run(out, hurt=(signal.SIGKILL, after))
        result.append(peer.verdict(out, peer.run(out)))
    return result


def damage(peer: Peer) -> list[str]:
    whole = peer.out()
    peer.run(whole, callbacks=(At(11, lambda: os.kill(os.getpid(), signal.SIGKILL)),))
    newest = Path(str(get_last_checkpoint(str(whole))))
    names = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    result = []
    for name in names:
        for how in ("truncated", "flipped", "removed"):
            out = peer.out()
            shutil.copytree(whole, out)
            file = out / newest.name / name
            data = bytearray(file.read_bytes())
            if how == "flipped":
                data[len(data) // 2] ^= 4
            file.write_bytes(data[: len(data) // 2] if how == "truncated" else data)
            if how == "removed":
                file.unlink()
            result.append(peer.verdict(out, peer.run(out)))
    return result


def full_disk(peer: Peer) -> list[str]:
    result = []
    for step in (3, 9, 15):
        out = peer.out()
        limit = At(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY)))
        peer.run(out, callbacks=(limit,))
        result.append(peer.verdict(out, peer.run(out)))
    return result


def not_finite(peer: Peer) -> list[str]:
    """Inject one and three NaN losses; record what is saved, and the exit code."""
    result = []
    for bad in ({7}, {7, 8, 9}):
        out, count = peer.out(), iter(range(1, 1000))

        def poison(trainer: Any, bad: set[int] = bad, count: Any = count) -> None:
            compute = trainer.compute_loss

            def poisoned(*args: Any, **options: Any) -> Any:
                loss = compute(*args, **options)
                scale = math.nan if next(count) in bad else 1.0
                return (loss[0] * scale, *loss[1:]) if isinstance(loss, tuple) else loss * scale

            trainer.compute_loss = poisoned

        ended = peer.run(out, prepare=poison)
        text = f"exit {ended.code}"
        with contextlib.suppress(FileNotFoundError):
            from safetensors.torch import load_file

            tensors = load_file(out / "final" / "adapter_model.safetensors").values()
            share = sum(int(not torch.isfinite(tensor).all()) for tensor in tensors) / len(tensors)
            text += f", {share:.0%} of the saved tensors hold NaN"
        result.append(text)
    return result


def out_of_memory(peer: Peer) -> list[str]:
    result = []
    for call in (3, 11, 17):
        out, count = peer.out(), iter(range(1, 1000))

        def starve(trainer: Any, call: int = call, count: Any = count) -> None:
            compute = trainer.compute_loss

            def starved(*args: Any, **options: Any) -> Any:
                if next(count) == call:
                    raise torch.OutOfMemoryError("CUDA out of memory (injected)")
                return compute(*args, **options)

            trainer.compute_loss = starved

        result.append(peer.verdict(out, peer.run(out, prepare=starve)))
    return result


def interrupts(peer: Peer) -> list[str]:
    result = []
    for place, after in enumerate(instants(6, peer.training[1] - peer.training[0], 3)):
        out = peer.out()
        ended = peer.run(out, hurt=((signal.SIGINT, signal.SIGTERM)[place % 2], peer.training[0] + after))
        result.append(f"exit {ended.code}, then {peer.verdict(out, peer.run(out))}")
    return result


def main() -> None:
    lab, target = Path(sys.argv[1]), Path(sys.argv[2])
    work = lab / "peer"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    random.seed(0)
    torch.set_num_threads(1)
    peer = Peer(lab, work)
    cases = (kills, damage, full_disk, not_finite, out_of_memory, interrupts)
    results = {case.__name__: case(peer) for case in cases}
    from importlib.metadata import version

    names = ("trl", "transformers", "torch", "peft")
    target.write_text(json.dumps({"versions": {name: version(name) for name in names}, **results}, indent=1))


if __name__ == "__main__":
    main()
