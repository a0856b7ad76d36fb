"""Which device and which weight type a run uses here. The CPU's precision is measured once a machine and cached."""

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
LEAST_BF16 = (8, 0)  # compute capability of the first cards with bf16 (Ampere)
PRIMITIVES, MORE_PRIMITIVES = 32, 64  # enough kinds of product for a layer, forth and back; with oneDNN's of adapters


def prepare_process(*, deterministic: bool = False, rank: int = 0) -> None:
    """What this process must set before its first matrix product, and before a card is looked at. What a user has set
    stays.

    oneDNN and PyTorch each keep the code of the last 1,024 kinds of product. Packed micro-batches differ in length, and
    each length is a kind of its own, at 0.6 to 1.3 MiB: on SmolLM2 that grew to 0.7 GiB (docs/log). No length comes
    again soon, so that only the kinds of one layer are worth their memory; rank: of the adapters, whose products are
    not oneDNN's up to 32. On a card micro-batches leave holes of as many sizes, which PyTorch fills where its segments
    can grow. Cards are numbered as the driver lists them, so that `strop plan`, which asks the driver, and CUDA mean
    the same one. A product that a card cuts up is added up in fp32, and rounded once. deterministic: what `repeatable`
    needs of cuBLAS, which reads it when it starts.
    """
    keep_heap_pages()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    kept = PRIMITIVES if rank <= TILED_RANK and probe().has_avx512_bf16 else MORE_PRIMITIVES
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(kept))
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        name = ALLOCATOR[Version(torch.__version__) < Version("2.9")]
        os.environ[name] = "expandable_segments:True"


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside it a card computes the same bits each time: attention's backward and sums by index add up in a fixed
    order. Memory that is not written yet is left as it is, which PyTorch otherwise fills there."""
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
    """`auto` is CUDA, then MPS, then the CPU. Raises DeviceError for a device that torch cannot use here."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    usable = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    kind, _, index = asked.partition(":")
    if not usable[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise DeviceError(
            f"--model.device {asked}: torch {torch.__version__} cannot use it here",
            fix="use cpu, or leave model.device at auto",
        )
    return asked


def pick_dtype(device: str) -> tuple[str, str]:
    """(bf16 or fp32, why) for the frozen weights on this device."""
    if device.startswith("cuda"):
        bf16 = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= LEAST_BF16
        return ("bf16", "the card computes in bf16") if bf16 else ("fp32", "the card has no bf16 and fp16 overflows")
    if device == "mps":
        return "fp32", "bf16 is not reliable on every MPS release"
    machine, threads = probe(), torch.get_num_threads()
    known = load_precision(machine, threads)
    if known is not None:
        return known
    LOG.info("measuring whether bf16 or fp32 is faster here")
    found = measure(device)
    save_precision(machine, threads, found.dtype, found.why)
    return found.dtype, found.why
