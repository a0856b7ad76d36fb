"""Check that strop computes the same on a GPU as on a CPU; benchmarks/card.py runs each check in its own process.

agree: compares the loss and the gradients of one step in fp32 on the CPU with PyTorch's operations and with strop's
kernels on the GPU; also in 16 bit, nf4 and int8.
resumes: a run and two resumes from its middle, with train.deterministic, must give bit-identical adapters.
waits: the host must not wait for the GPU in ten steps; PyTorch raises an error if it does.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

STEPS = 10
# Error of bf16 on random weights relative to fp32. The two implementations on the GPU may differ by a fraction of it.
MOST_LOSS, MOST_GRADIENT = 5e-3, 5e-2
SCHEMES = ("none", "nf4", "int8")


def agree(folder: Path, device: str) -> dict[str, Any]:
    import torch

    from strop.engine.kernels.dispatch import describe_gpu_failures

    reason = describe_gpu_failures(torch.device("cuda")) if device == "cuda" else "no card"
    off: dict[str, dict[str, float]] = {}
    for scheme in SCHEMES:
        on_cpu = _gradients(folder, "cpu", scheme)
        for kernels in (False, True) if device == "cuda" else (False,):
            loss, gradient = _gradients(folder, device, scheme, kernels=kernels)
            cosine = torch.nn.functional.cosine_similarity(gradient, on_cpu[1], dim=0)
            name = f"{scheme}, by {'strop' if kernels else 'PyTorch'}"
            off[name] = {"loss": abs(loss / on_cpu[0] - 1), "gradient": 1 - float(cosine)}
    right = all(one["loss"] <= MOST_LOSS and one["gradient"] <= MOST_GRADIENT for one in off.values())
    return {"passed": right and (not reason or device != "cuda"), "off": off, "kernels_lack": reason}


def _gradients(folder: Path, device: str, scheme: str, *, kernels: bool = True) -> Any:
    """Return the loss, and the adapter's gradients as one row on the host, of a step on rows of several lengths."""
    import torch

    from strop.engine.kernels.operations import TRITON

    none = dict.fromkeys(TRITON, "left out")
    left_out = patch("strop.engine.kernels.cuda.selftest.find_failures", lambda device: none)
    with nullcontext() if kernels else left_out:
        step, weights = _step(folder, device, scheme)
        rows = _rows((37, 64, 5, 300))
        loss = step.token_loss(rows) / sum(row.supervised for row in rows)
        loss.backward()
    return float(loss.detach()), torch.cat([weight.grad.float().flatten().cpu() for weight in weights])


def _step(folder: Path, device: str, scheme: str) -> Any:
    import torch

    from strop.config.schema import LoraSection
    from strop.engine.device import prepare_process
    from strop.engine.step import step_for
    from strop.models.load import load_base
    from strop.models.lora import add_lora, trainable_parameters
    from strop.models.source import locate

    prepare_process()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    base = load_base(locate(str(folder)), dtype, device, quantization=scheme)
    torch.manual_seed(0)
    model = add_lora(base, LoraSection(r=16, alpha=32.0), None).train()
    weights = list(trainable_parameters(model).values())
    random = np.random.default_rng(0)
    with torch.no_grad():  # with B = 0, A would have no gradient
        for weight in weights:
            weight.copy_(torch.from_numpy(random.standard_normal(weight.shape, dtype=np.float32)) * 0.02)
    return step_for(model), weights


def _rows(lengths: tuple[int, ...]) -> list[Any]:
    from strop.data.types import Example

    random = np.random.default_rng(0)
    return [
        Example(random.integers(1, 500, length).astype(np.int32), np.float32(np.arange(length) > length // 3), "", 0)
        for length in lengths
    ]


def waits(folder: Path, device: str) -> dict[str, Any]:
    import torch

    results: dict[str, str] = {}
    for scheme in SCHEMES:
        step, weights = _step(folder, device, scheme)
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

        def one(step: Any = step, weights: Any = weights, optimizer: Any = optimizer) -> None:
            (step.token_loss(_rows((200, 60))) / 100).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        one()
        with _waits_forbidden(device):
            try:
                for _ in range(STEPS):
                    one()
            except RuntimeError as error:
                places = [
                    f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)
                ]
                results[scheme] = f"{str(error).splitlines()[0]} ({' > '.join(places[-6:])})"
    return {"passed": not results, "waits": results}


@contextmanager
def _waits_forbidden(device: str) -> Any:
    import torch

    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def resumes(folder: Path, device: str) -> dict[str, Any]:
    import strop
    from strop.demo import data_files
    from strop.errors import Stopped
    from strop.runs.lock import sha256_file
    from strop.training import loop

    place = folder / "resumes"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    options = {
        "model": str(folder), "data": str(data_files()[0]), "model.device": device, "train.max_steps": 8,
        "train.deterministic": True, "train.save_steps": 4, "data.overlong": "truncate-start",
    }  # fmt: skip
    strop.train(**options, out=str(place / "whole"))
    decisions = iter([False] * 3)

    @contextmanager
    def stop_signals() -> Any:
        yield lambda: next(decisions, True)

    with suppress(Stopped), patch.object(loop, "stop_signals", stop_signals):
        strop.train(**options, out=str(place / "first"))
    shutil.copytree(place / "first", place / "second")
    for name in ("first", "second"):
        strop.resume(place / name)
    result = {
        name: sha256_file(place / name / "adapter" / "adapter_model.safetensors")[:16]
        for name in ("whole", "first", "second")
    }
    return {"passed": len(set(result.values())) == 1, "adapters": result}


CHECKS: dict[str, Callable[[Path, str], dict[str, Any]]] = {"agree": agree, "resumes": resumes, "waits": waits}
