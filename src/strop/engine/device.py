"""Choose the device and the dtype of a run. The CPU's faster precision is measured once a machine and cached."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version

from strop.engine.kernels.cpu.precision import measure as measure
from strop.errors import DeviceError
from strop.machine.memory import keep_heap_pages
from strop.machine.probe import TILED_RANK, probe
from strop.machine.rates import load_precision, save_precision

LOG = logging.getLogger(__name__)

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second until PyTorch 2.8
MIN_BF16_CAPABILITY = (8, 0)  # compute capability of the first GPUs with bf16 (Ampere)
PRIMITIVES = 32  # matmul shapes of one layer, forward and backward
PRIMITIVES_WITH_ADAPTERS = 64  # also those of the adapters, where oneDNN computes them


def prepare_process(*, deterministic: bool = False, rank: int = 0) -> None:
    """Set environment variables and flags that must be set before the first matmul and before CUDA starts.

    Variables that the user has set are kept.

    oneDNN and PyTorch each cache the code of the last 1,024 matmul shapes. Packed micro-batches differ in length, and
    each length is a new shape of 0.6 to 1.3 MiB; on SmolLM2 this grew to 0.7 GiB (docs/log). Lengths rarely repeat, so
    only the shapes of one layer are worth caching. On a GPU micro-batches leave free blocks of as many sizes, which
    PyTorch can reuse if its segments are expandable. GPUs are numbered in the driver's order, so that `strop plan`,
    which asks the driver, and CUDA mean the same one. Matmuls that a GPU splits are summed in fp32 and rounded once.

    deterministic: also configure cuBLAS for `repeatable`; it reads its configuration when it starts. rank: of the
    adapters; up to 32, oneDNN does not compute their matmuls on CPUs with tiled kernels.
    """
    keep_heap_pages()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    capacity = PRIMITIVES if rank <= TILED_RANK and probe().has_avx512_bf16 else PRIMITIVES_WITH_ADAPTERS
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(capacity))
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        name = ALLOCATOR[Version(torch.__version__) < Version("2.9")]
        os.environ[name] = "expandable_segments:True"


@contextmanager
def repeatable() -> Iterator[None]:
    """Make a GPU compute the same bits each time: attention's backward and sums by index use a fixed order.

    Uninitialized memory is not filled, which PyTorch otherwise does in this mode.
    """
    memory: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        memory.fill_uninitialized_memory = before[1]


def pick_device(asked: str) -> str:
    """Return the device to use; `auto` is CUDA, then MPS, then the CPU. Raises DeviceError."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    usable = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    kind, _, index = asked.partition(":")
    if not usable[kind] or (index and int(index) >= torch.cuda.device_count()):
        what = f"--model.device {asked}: torch {torch.__version__} cannot use it here"
        raise DeviceError(what, fix="use cpu, or leave model.device at auto")
    return asked


def pick_dtype(device: str) -> tuple[str, str]:
    """Return the dtype of the frozen weights on this device, bf16 or fp32, and the reason."""
    if device.startswith("cuda"):
        bf16 = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= MIN_BF16_CAPABILITY
        return ("bf16", "the GPU supports bf16") if bf16 else ("fp32", "the GPU has no bf16, and fp16 overflows")
    if device == "mps":
        return "fp32", "bf16 is not reliable on every MPS release"
    machine, threads = probe(), torch.get_num_threads()
    known = load_precision(machine, threads)
    if known is not None:
        return known
    LOG.info("measuring whether bf16 or fp32 is faster on this CPU")
    measured = measure(device)
    save_precision(machine, threads, measured.dtype, measured.why)
    return measured.dtype, measured.why
