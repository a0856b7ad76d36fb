"""Run scenarios on the simulated GPU and print each outcome as JSON.

python -m tests.simulated_gpu.simulate LIBRARY FOLDER '[{"scenario": name, ...}, ...]'
Each scenario may set the GPU's `capability` and `memory_bytes`.
"""

from __future__ import annotations

from tests.simulated_gpu import fake  # first: before torch

# isort: split

import gc
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
from strop.engine.kernels.operations import TRITON
from strop.engine.train.fast import FastLoss
from strop.errors import Stopped
from strop.runs.folder import cache_folder
from strop.training import loop, optim
from tests import ROOT
from tests.simulated_gpu import sizes, traffic
from tests.support import tiny_families
from tests.support.scripts import script
from tests.support.tiny import save_tiny, write_rows

GPU = fake.SimulatedGpu()
FOLDER = Path(sys.argv[2])


def base(kind: str) -> str:
    """Return the folder of a base model; kind: "tiny", a model type of transformers, or an existing folder."""
    folder = FOLDER / kind
    if not folder.is_dir():
        save_tiny(folder) if kind == "tiny" else tiny_families.save(kind, folder)
    return str(folder)


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {  # of objectives that train neither on rows of chats nor on pairs
    "kto": lambda n: {"prompt": f"say {n}", "completion": f"the number {n}", "label": n % 2 == 0},
    "classify": lambda n: {"text": f"say {n}", "label": "abc"[n % 3]},
    "embed": lambda n: {"anchor": f"say {n}", "positive": f"the number {n}"},
}


def rows(objective: str = "sft") -> str:
    """Return a file with rows of an objective."""
    file = FOLDER / f"{objective}.jsonl"
    if objective == "sft":
        return str(file if file.is_file() else write_rows(file, 24))
    make = ROWS.get(objective, lambda n: {"prompt": f"say {n}", "chosen": f"the number {n}", "rejected": f"no {n}"})
    file.write_text("".join(json.dumps(make(n)) + "\n" for n in range(24)), encoding="utf-8")
    return str(file)


def new_out() -> str:
    return str(next(path for path in (FOLDER / f"run-{n}" for n in count()) if not path.exists()))


@contextmanager
def steps_marked() -> Iterator[None]:
    """Record waits of the host during a step under the stage `step`."""
    own = loop.train_step

    def step(*arguments: Any) -> Any:
        GPU.stage, GPU.deterministic = "step", torch.are_deterministic_algorithms_enabled()
        try:
            return own(*arguments)
        finally:
            GPU.stage = ""

    loop.train_step = step
    try:
        yield
    finally:
        loop.train_step = own


@contextmanager
def failing(calls: Sequence[int], above: int | None) -> Iterator[None]:
    """Have the GPU run out of memory in these calls of the step's loss, and in all with more tokens than `above`."""
    own, call_count = FastLoss.token_loss, count()

    def loss(self: Any, examples: Any) -> Any:
        if next(call_count) in calls or (above is not None and sum(map(len, examples)) > above):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return own(self, examples)

    FastLoss.token_loss = loss
    try:
        yield
    finally:
        FastLoss.token_loss = own


@contextmanager
def failing_state(at: int | None) -> Iterator[None]:
    own, call_count = optim._allocate_state, count()

    def make(weight: Any, optimizer: Any, *where: Any) -> None:
        if next(call_count) == at:
            optimizer.state[weight] = {"step": torch.zeros(())}  # half of the state exists
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        own(weight, optimizer, *where)

    with patch.object(optim, "_allocate_state", make):
        yield


@contextmanager
def stopping() -> Iterator[None]:
    """Stop a run in its first step, as Ctrl-C does."""

    @contextmanager
    def stop_signals() -> Iterator[Callable[[], bool]]:
        yield lambda: True

    with patch.object(loop, "stop_signals", stop_signals):
        yield


@contextmanager
def kernels_counted(used: bool) -> Iterator[Counter[str]]:
    """Count launches of Triton kernels by name; used: they work on this GPU."""
    launches: Counter[str] = Counter()
    with ExitStack() as stack:
        if used:
            from strop.engine.kernels.cuda import launch

            def note(kernel: Any, grid: Any, arguments: Any, constants: Any) -> None:
                devices = {x.device.type for x in arguments if isinstance(x, torch.Tensor)}
                assert devices == {"cuda"}, (kernel, devices)
                launches[kernel.__name__] += 1

            stack.enter_context(patch("strop.engine.kernels.cuda.selftest.find_failures", lambda device: {}))
            stack.enter_context(patch.object(launch, "enqueue", note))
        yield launches


def train(
    model: str = "tiny",
    resume: bool = False,
    kernels: bool = False,
    fail_calls: Sequence[int] = (),
    fail_above: int | None = None,
    fail_state: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a tiny model, and return the waits within its steps, by kind and line.

    resume: stop after the first step, and resume. fail_state: run out of memory for the optimizer state of this weight,
    the first time.
    """
    out = new_out()
    recipe = {
        "model": base(model), "data": rows(options.get("train.objective", "sft")), "out": out, "model.device": "cuda",
        "train.max_steps": 3,
        "train.batch_size": 8, "lora.r": 4, "train.save_steps": 2, **options,
    }  # fmt: skip
    GPU.waits.clear()
    fake.Properties.emptied = 0
    with ExitStack() as stack:
        for context in (steps_marked(), failing(fail_calls, fail_above), failing_state(fail_state)):
            stack.enter_context(context)
        started = stack.enter_context(kernels_counted(kernels))
        stack.enter_context(GPU.present())
        # it compares values, and there are none here
        stack.enter_context(patch("strop.training.run.check_causal", lambda job, items: None))
        if resume:
            with pytest.raises(Stopped), stopping():
                strop.train(**recipe)
            run = strop.resume(out)
        else:
            run = strop.train(**recipe)
    waits = [[kind, line, number] for (stage, kind, line), number in GPU.waits.items() if stage == "step"]
    events = [json.loads(line) for line in (Path(out) / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    packed = [line for _, kind, line in GPU.waits if kind == "copy to the host" and "models/quantize.py" in line]
    return {
        "emptied": fake.Properties.emptied, "quantized_there": len(packed), "folder": out, "waits": waits,
        "steps": run.report["steps"], "events": events, "kernels": dict(started), "deterministic": GPU.deterministic,
    }  # fmt: skip


def answer(model: str, **options: Any) -> dict[str, Any]:
    """Return the answer of a model, and how many of its linear layers are in 4 or 8 bits."""
    from strop.models.quantize import QuantizedLinear

    with GPU.present():
        loaded = strop.load(model, device="cuda")
        text = loaded.chat("what is 2", max_new_tokens=4)
    packed = sum(isinstance(module, QuantizedLinear) for module in loaded.module.modules())
    return {"text": text, "packed": packed, "notes": loaded.notes}


def evaluate(model: str) -> dict[str, Any]:
    """Evaluate base and tuned model, as `strop eval` does."""
    with GPU.present():
        report = strop.evaluate(model, rows(), max_new_tokens=4)
    return {"rows": report["rows"], "loss": report["tuned"]["loss"]}


def serve(model: str, texts: int = 3) -> dict[str, Any]:
    """Generate with the base and two adapters in one batch, and return how often the host waits."""
    from strop.engine.decode.batch import Batch, decode_all
    from strop.engine.decode.hf_fallback import HfDecoder
    from strop.engine.decode.sampling import Sampling, SequenceState

    with GPU.present():
        loaded = strop.load(model, device="cuda")
        module = loaded.module
        module.load_adapter(str(Path(model) / "adapter"), adapter_name="other")
        adapters = [None, "default", "other"]
        prompts = [
            SequenceState(
                np.arange(5 + n, 12 + n, dtype=np.int32), adapters[n % 3], max_new_tokens=4, sampling=Sampling(0.0)
            )
            for n in range(texts)
        ]
        batch = Batch(HfDecoder(module, keep=64), texts)
        GPU.waits.clear()
        result = sum(len(news.tokens) for news in decode_all(batch, prompts))
    return {"tokens": result, "waits": [[kind, line, number] for (_, kind, line), number in GPU.waits.items()]}


def merge(model: str) -> dict[str, Any]:
    """Merge a run's adapter into its base, and return what was read from the GPU."""
    GPU.waits.clear()
    with GPU.present():
        merged = strop.merge(model, f"{new_out()}-merged", dtype="fp32")
    return {"files": len(merged.files), "asked": [[kind, line] for (_, kind, line) in GPU.waits]}


def newest_attention() -> dict[str, Any]:
    """Activate flash attention 3, and return why it is not used, and how often each function was called."""
    from strop.engine.kernels.cuda import attention

    module, switched = torch.nn.attention, Counter()
    with ExitStack() as stack:
        for name in ("activate_flash_attention_impl", "restore_flash_attention_impl"):
            stack.enter_context(patch.object(module, name, lambda *_, name=name: switched.update([name])))
        stack.enter_context(patch.object(attention, "find_spec", lambda name: object()))
        stack.enter_context(GPU.present())
        why = attention.activate_flash3.__wrapped__(torch.device("cuda"))
    return {"why": why, "switched": dict(switched)}


def benchmark(*, kernels: bool, items: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Run items of benchmarks/card.py on a tiny model."""
    of = script(ROOT / "benchmarks" / "card.py")
    sys.path.append(str(ROOT / "benchmarks"))  # it imports modules next to it
    options = Namespace(folder=FOLDER / "tiny-of-benchmark" / "tiny", device="cuda")
    with kernels_counted(kernels), GPU.present():
        return [of.run(options, *item) for item in items]


def step(**case: Any) -> dict[str, Any]:
    """Run one step of a model of any size (sizes.py)."""
    return sizes.step(GPU, sizes.Case(**case))


def moved(**case: Any) -> list[dict[str, Any]]:
    """Return the FLOPs and bytes of each operation of such a step (traffic.py)."""
    return traffic.step(GPU, sizes.Case(**case))


def moved_by(operation: str) -> list[dict[str, Any]]:
    """Return the same for one known operation."""
    return traffic.run_known(GPU, operation)


SCENARIOS: dict[str, Callable[..., Any]] = {
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

NO_TRITON = dict.fromkeys(TRITON, "left out")


def main() -> None:
    fake.install()
    gc.freeze()  # each run collects garbage
    outcomes: list[Any] = []
    for scenario in json.loads(sys.argv[3]):
        fake.Properties.capability = tuple(scenario.pop("capability", (9, 0)))
        fake.Properties.memory_bytes = scenario.pop("memory_bytes", 80 << 30)
        shutil.rmtree(cache_folder() / "memory", ignore_errors=True)  # recorded when an earlier scenario ran out
        if (of := scenario.pop("of", None)) is not None:  # the run of an earlier scenario
            scenario["model"] = outcomes[of]["folder"]
        try:  # an operation cannot be tried without values
            with patch("strop.engine.kernels.cuda.selftest.find_failures", lambda device: NO_TRITON):
                outcomes.append(SCENARIOS[scenario.pop("scenario")](**scenario))
        except BaseException as error:
            outcomes.append({"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})
    print(json.dumps(outcomes))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
