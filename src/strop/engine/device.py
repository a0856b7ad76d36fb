"""Choose the device and the dtype of a run. On a CPU, the faster dtype is measured once per machine and cached."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version

from strop.engine.kernels.cpu.precision import Precision, measure
from strop.errors import DeviceError
from strop.machine.doctor import why_no_code
from strop.machine.memory import keep_heap_pages
from strop.machine.probe import MAX_TILED_RANK, gpu_dtype, is_wsl, probe, this_cpu
from strop.machine.rates import generation_dtype, load_precision, save_precision
from strop.models.families.table import overflows_fp16

LOG = logging.getLogger(__name__)

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second name is for PyTorch before 2.9
MIN_CPU_SHARE = 0.8  # of all threads' time; measured: 0.99 on a quiet machine, 0.64 beside one busy process
PRIMITIVES = 32  # matmul shapes of one layer, forward and backward
PRIMITIVES_WITH_ADAPTERS = 64  # the same if oneDNN also computes the matmuls of adapters

_estimates: dict[int, tuple[str, str]] = {}  # by threads: the results of pick_dtype in this process that were disturbed


def prepare_process(*, deterministic: bool = False, rank: int = 0) -> None:
    """Set environment variables and flags that must be set before the first matmul and before CUDA starts.

    Variables that the user has set are kept.

    - oneDNN and PyTorch each cache the code of the last 1,024 matmul shapes, 0.6 to 1.3 MiB per shape. Each length of a
      packed micro-batch is a new shape: on SmolLM2 the caches grew to 0.7 GiB (docs/log). As lengths rarely repeat, the
      caches are limited to the shapes of one layer.
    - On a GPU, each length leaves free blocks of another size. PyTorch reuses them only in expandable segments. Some
      drivers fail with them in WSL (pytorch#192330).
    - CUDA numbers GPUs in the order of the driver, which `strop plan` uses.
    - GPU matmuls that are split along the summed dimension accumulate in fp32 and round once.

    deterministic: configure cuBLAS for `repeatable`; it reads its configuration only when it starts. rank: the rank of
    the adapters. Up to MAX_TILED_RANK, CPUs with tiled kernels do not use oneDNN for the matmuls of adapters.
    """
    keep_heap_pages()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    capacity = PRIMITIVES if rank <= MAX_TILED_RANK and this_cpu().has_avx512_bf16 else PRIMITIVES_WITH_ADAPTERS
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(capacity))
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if sys.platform == "linux" and not is_wsl() and not any(name in os.environ for name in ALLOCATOR):
        name = ALLOCATOR[Version(torch.__version__) < Version("2.9")]
        os.environ[name] = "expandable_segments:True"


def explain_driver_error(error: BaseException) -> DeviceError | None:
    """Return an error with a fix for one that expandable segments cause in the driver (pytorch#192330), or None."""
    settings = " ".join(os.environ.get(name, "") for name in ALLOCATOR)
    if "CUDA driver error: unknown error" not in str(error) or "expandable_segments:True" not in settings:
        return None
    what = "the driver cannot allocate memory of the GPU in expandable segments: CUDA driver error: unknown error"
    return DeviceError(what, fix=f"set {ALLOCATOR[0]}=expandable_segments:False, or update the NVIDIA driver")


@contextmanager
def repeatable() -> Iterator[None]:
    """Use deterministic algorithms, so that a GPU computes the same bits each time."""
    settings: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # not needed, and takes time
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


def pick_device(requested: str) -> str:
    """Return the device to use. `auto` prefers CUDA, then MPS, then the CPU. Raises DeviceError."""
    kind, _, index = requested.partition(":")
    if requested == "auto":
        cuda = torch.cuda.is_available() and why_no_code() is None
        return "cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu"
    usable = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    if not usable[kind] or (index and int(index) >= torch.cuda.device_count()):
        what = f"--model.device {requested}: torch {torch.__version__} cannot use it here"
        raise DeviceError(what, fix="use cpu, or leave model.device at auto")
    if kind == "cuda" and (why_not := why_no_code(int(index or 0))):
        raise DeviceError(f"--model.device {requested}: {why_not[0]}", fix=why_not[1])
    return requested


def pick_dtype(device: str) -> tuple[str, str]:
    """Return the dtype of the frozen weights on this device, and the reason."""
    if device.startswith("cuda"):
        if torch.version.hip is not None:
            return "bf16", "the GPU supports bf16"
        major, minor = torch.cuda.get_device_capability(device)
        return gpu_dtype(major + minor / 10)
    if device == "mps":
        return "fp32", "bf16 is not reliable on every MPS release"
    machine, threads = probe(), torch.get_num_threads()
    cached = load_precision(machine, threads) or _estimates.get(threads)
    if cached is not None:
        return cached
    LOG.info("measuring whether bf16 or fp32 is faster on this CPU")
    measured, disturbed = measure_precision()
    if disturbed:
        why = "estimated from the CPU's instructions, because other programs disturbed the measurement"
        _estimates[threads] = machine.expected_dtype, why
        return _estimates[threads]
    return measured.dtype, measured.why


def measure_precision() -> tuple[Precision, bool]:
    """Measure and store which dtype is faster on this CPU.

    The second result is True if other programs used the cores meanwhile. Then nothing is stored, because wrong rates
    would slow down all later runs.
    """
    threads, cpu_start, start = torch.get_num_threads(), time.process_time(), time.perf_counter()
    measured = measure("cpu")
    cpu_s, elapsed = time.process_time() - cpu_start, time.perf_counter() - start
    disturbed = (cpu_s - measured.bf16_cpu_s) / (elapsed - measured.bf16_s) < MIN_CPU_SHARE * threads  # of fp32
    if not disturbed:
        save_precision(probe(), threads, measured.dtype, measured.why)
    return measured, disturbed


def pick_generation_dtype(device: str, trained: str | None, family: str = "") -> tuple[str, list[str]]:
    """Return the dtype to generate in, and a note if it is not the dtype of training.

    trained: None if unknown. family: the model_type of the base.
    """
    fastest, why = ("fp32", "") if trained == "fp32" else pick_dtype(device)  # on a CPU this measures
    if fastest == "fp16" and overflows_fp16(family):
        fastest = "fp32"
    dtype = generation_dtype(trained, device, fastest)
    if trained in (None, dtype):
        return dtype, []
    return dtype, [f"trained in {trained}, loaded in {dtype} ({why}): --dtype {trained} loads it as trained"]
