"""Run scenarios on the simulated GPU and print each outcome as JSON.

python -m tests.simulated_gpu.simulate LIBRARY FOLDER '[{"play": name, ...}, ...]'
Each scenario may set the GPU's `capability` and `memory_bytes`.
"""

from __future__ import annotations

from tests.simulated_gpu import fake  # first: before torch

# isort: split

import json
import shutil
import sys
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

import strop
from strop.engine.train.fast import FastLoss
from strop.errors import Stopped
from strop.runs.folder import cache_folder
from strop.training import loop, optim
from tests import ROOT
from tests.simulated_gpu import sizes, traffic
from tests.support import tiny_families
from tests.support.scripts import script
from tests.support.tiny import save_tiny, write_rows

CARD = fake.Card()
FOLDER = Path(sys.argv[2])


def base(kind: str) -> str:
    """kind: "tiny", a model type of transformers, or a folder that is there."""
    folder = FOLDER / kind
    if not folder.is_dir():
        save_tiny(folder) if kind == "tiny" else tiny_families.save(kind, folder)
    return str(folder)


def rows() -> str:
    file = FOLDER / "rows.jsonl"
    return str(file if file.is_file() else write_rows(file, 24))


def new_out() -> str:
    return str(next(path for path in (FOLDER / f"run-{n}" for n in count()) if not path.exists()))


@contextmanager
def steps_marked() -> Iterator[None]:
    """What the host waits for inside a step is noted as that."""
    own = loop.step

    def step(*arguments: Any) -> Any:
        CARD.stage, CARD.deterministic = "step", torch.are_deterministic_algorithms_enabled()
        try:
            return own(*arguments)
        finally:
            CARD.stage = ""

    loop.step = step
    try:
        yield
    finally:
        loop.step = own


@contextmanager
def failing(calls: Sequence[int], above: int | None) -> Iterator[None]:
    """The card runs out of memory in these calls of the step's loss, and in all with more tokens than `above`."""
    own, made = FastLoss.__call__, count()

    def loss(self: Any, examples: Any) -> Any:
        if next(made) in calls or (above is not None and sum(map(len, examples)) > above):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return own(self, examples)

    FastLoss.__call__ = loss
    try:
        yield
    finally:
        FastLoss.__call__ = own


@contextmanager
def failing_state(at: int | None) -> Iterator[None]:
    own, made = optim._make_state_of, count()

    def make(weight: Any, optimizer: Any, *where: Any) -> None:
        if next(made) == at:
            optimizer.state[weight] = {"step": torch.zeros(())}  # half of it is there
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        own(weight, optimizer, *where)

    with patch.object(optim, "_make_state_of", make):
        yield


@contextmanager
def stopping() -> Iterator[None]:
    """A run is asked to stop, as by Ctrl-C, in its first step."""

    @contextmanager
    def asked() -> Iterator[Callable[[], bool]]:
        yield lambda: True

    with patch.object(loop, "stop_signals", asked):
        yield


@contextmanager
def kernels_counted(used: bool) -> Iterator[Counter[str]]:
    """used: the card's own kernels work, and are noted by name where they are started."""
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        if used:
            from strop.engine.kernels.cuda import launch

            def note(kernel: Any, grid: Any, arguments: Any, constants: Any) -> None:
                devices = {x.device.type for x in arguments if isinstance(x, torch.Tensor)}
                assert devices == {"cuda"}, (kernel, devices)
                found[kernel.__name__] += 1

            stack.enter_context(patch("strop.engine.kernels.cuda.available.why_not", lambda device: None))
            stack.enter_context(patch.object(launch, "launch", note))
        yield found


def train(
    model: str = "tiny",
    resume: bool = False,
    kernels: bool = False,
    fail_calls: Sequence[int] = (),
    fail_above: int | None = None,
    fail_state: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A run of a tiny model to its end; the waits inside its steps, by kind and line. resume: it is stopped behind its
    first step, and goes on from there. fail_state: there is no memory for what the optimizer holds of a weight, the
    first time that it is the turn of this one."""
    out = new_out()
    given = {
        "model": base(model), "data": rows(), "out": out, "model.device": "cuda", "train.max_steps": 3,
        "train.batch_size": 8, "lora.r": 4, "train.save_steps": 2, **options,
    }  # fmt: skip
    CARD.waits.clear()
    fake.Kind.emptied = 0
    with ExitStack() as stack:
        for context in (steps_marked(), failing(fail_calls, fail_above), failing_state(fail_state)):
            stack.enter_context(context)
        started = stack.enter_context(kernels_counted(kernels))
        stack.enter_context(CARD.present())
        # it looks at numbers, and there are none here
        stack.enter_context(patch("strop.training.run.hold_to_order", lambda job, items: None))
        if resume:
            with pytest.raises(Stopped), stopping():
                strop.train(**given)
            run = strop.resume(out)
        else:
            run = strop.train(**given)
    waits = [[kind, line, number] for (stage, kind, line), number in CARD.waits.items() if stage == "step"]
    events = [json.loads(line) for line in (Path(out) / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    packed = [line for _, kind, line in CARD.waits if kind == "copy to the host" and "models/quantize.py" in line]
    told = {
        "emptied": fake.Kind.emptied,
        "quantized_there": len(packed),
        "folder": out,
        "steps": run.report["steps"],
        "waits": waits,
        "events": events,
    }
    return {**told, "kernels": dict(started), "deterministic": CARD.deterministic}


def answer(model: str, **options: Any) -> dict[str, Any]:
    """What a model says; how many of its linear layers are in 4 or 8 bit."""
    from strop.models.quantize import QuantizedLinear

    with CARD.present():
        loaded = strop.load(model, device="cuda")
        text = loaded.chat("what is 2", max_new_tokens=4)
    packed = sum(isinstance(module, QuantizedLinear) for module in loaded.module.modules())
    return {"text": text, "packed": packed}


def evaluate(model: str) -> dict[str, Any]:
    """Base and tuned on the rows, as `strop eval` does it."""
    with CARD.present():
        found = strop.evaluate(model, rows(), max_new_tokens=4)
    return {"rows": found["rows"], "loss": found["tuned"]["loss"]}


def serve(model: str, texts: int = 3) -> dict[str, Any]:
    """Texts of the base and of two adapters answered together; what made the host wait, a token."""
    from strop.engine.decode.batch import Batch, decode_all
    from strop.engine.decode.hf_fallback import HfDecoder
    from strop.engine.decode.sampling import Sampling, SequenceState

    with CARD.present():
        loaded = strop.load(model, device="cuda")
        module = loaded.module
        module.load_adapter(str(Path(model) / "adapter"), adapter_name="other")
        asked = [None, "default", "other"]
        prompts = [
            SequenceState(
                np.arange(5 + n, 12 + n, dtype=np.int32), asked[n % 3], max_new_tokens=4, sampling=Sampling(0.0)
            )
            for n in range(texts)
        ]
        batch = Batch(HfDecoder(module, keep=64), texts)
        CARD.waits.clear()
        told = sum(len(progress.tokens) for progress in decode_all(batch, prompts))
    return {"tokens": told, "waits": [[kind, line, number] for (_, kind, line), number in CARD.waits.items()]}


def merge(model: str) -> dict[str, Any]:
    """A run's adapter into its base; what was asked of the card."""
    CARD.waits.clear()
    with CARD.present():
        merged = strop.merge(model, f"{new_out()}-merged", dtype="fp32")
    return {"files": len(merged.files), "asked": [[kind, line] for (_, kind, line) in CARD.waits]}


def newest_attention() -> dict[str, Any]:
    """What is found of flash attention 3 where it is installed; how often it was put in and taken out."""
    from strop.engine.kernels.cuda import flash

    known, switched = torch.nn.attention, Counter()
    with ExitStack() as stack:
        for name in ("activate_flash_attention_impl", "restore_flash_attention_impl"):
            stack.enter_context(patch.object(known, name, lambda *_, name=name: switched.update([name])))
        stack.enter_context(patch.object(flash, "find_spec", lambda name: object()))
        stack.enter_context(CARD.present())
        why = flash.why_not.__wrapped__(torch.device("cuda"))
    return {"why": why, "switched": dict(switched)}


def benchmark(*, kernels: bool, items: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """What items of benchmarks/card.py tell, on a tiny model."""
    of = script(ROOT / "benchmarks" / "card.py")
    sys.path.append(str(ROOT / "benchmarks"))  # its neighbour is imported as it is needed
    options = Namespace(folder=FOLDER / "tiny-of-benchmark" / "tiny", device="cuda")
    with kernels_counted(kernels), CARD.present():
        return [of.run(options, *item) for item in items]


def step(**case: Any) -> dict[str, Any]:
    """One step of a model of any size (tests/simulated_gpu/sizes.py)."""
    return sizes.step(CARD, sizes.Case(**case))


def moved(**case: Any) -> list[dict[str, Any]]:
    """What each operation of such a step computes and moves (tests/simulated_gpu/traffic.py)."""
    return traffic.step(CARD, sizes.Case(**case))


def moved_by(operation: str) -> list[dict[str, Any]]:
    """The same of one known operation."""
    return traffic.known(CARD, operation)


PLAYS: dict[str, Callable[..., Any]] = {
    "train": train,
    "answer": answer,
    "evaluate": evaluate,
    "serve": serve,
    "merge": merge,
    "newest_attention": newest_attention,
    "benchmark": benchmark,
    "step": step,
    "moved": moved,
    "moved_by": moved_by,
}


def main() -> None:
    fake.install()
    found: list[Any] = []
    for asked in json.loads(sys.argv[3]):
        fake.Kind.capability = tuple(asked.pop("capability", (9, 0)))
        fake.Kind.memory_bytes = asked.pop("memory_bytes", 80 << 30)
        shutil.rmtree(cache_folder() / "memory", ignore_errors=True)  # what an earlier play ran out of
        if (of := asked.pop("of", None)) is not None:  # the run of an earlier play
            asked["model"] = found[of]["folder"]
        try:
            found.append(PLAYS[asked.pop("play")](**asked))
        except BaseException as error:
            found.append({"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})
    print(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
