"""Detect the CPU, memory, cgroup limits and NVIDIA GPUs of this machine without torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from strop.machine import cgroup

MAX_TILED_RANK = 32  # largest LoRA rank for which strop.engine.kernels.cpu is faster than PyTorch
# CUDA compute capability of the first GPUs with bf16 (Ampere), and with fp16 at a multiple of the rate of fp32 (Volta)
MIN_BF16_CAPABILITY, MIN_FP16_CAPABILITY = 8.0, 7.0
_KNOWN_EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni", "avx_vnni", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Cpu:
    """A CPU, and which of strop's kernels it can run."""

    cpu: str  # its name
    vector: tuple[str, ...]  # vector extensions, named as in Linux's /proc/cpuinfo

    @property
    def has_avx512_bf16(self) -> bool:
        return "avx512_bf16" in self.vector

    @property
    def has_bf16(self) -> bool:
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(self.vector)  # the last is ARM's

    def note_on(self, device: str, dtype: str) -> str:
        """Return a note if the CPU is the device and is known to have no instructions for the dtype, or ""."""
        if device != "cpu" or dtype != "bf16" or self.has_bf16 or not self.vector:
            return ""
        return "this CPU has no instructions for bf16, which can take 30 times as long as fp32: leave model.dtype out"

    @property
    def expected_dtype(self) -> str:
        """The dtype that is probably the fastest on this CPU, without a measurement."""
        return "bf16" if self.has_bf16 else "fp32"

    @property
    def has_int8_dot(self) -> bool:
        """True if the CPU has instructions for dot products of 8-bit integers (VNNI)."""
        return "avx512_vnni" in self.vector or "avx_vnni" in self.vector

    def has_tiled_attention(self, head_size: int) -> bool:
        """Return whether bf16 attention is tiled, so that the probabilities are not stored."""
        return self.has_avx512_bf16 and head_size % 32 == 0

    def has_bf16_matmul(self, sizes: Sequence[int]) -> bool:
        """Return whether strop's bf16 matmul kernels are used for these sizes. With AMX, oneDNN is faster."""
        return self.has_avx512_bf16 and "amx_bf16" not in self.vector and all(size % 32 == 0 for size in sizes)


@dataclass(frozen=True)
class Machine(Cpu):
    """The resources available to this process, which lock.json stores as `machine`."""

    system: str
    python: str
    cores: int
    memory_bytes: int  # RAM or the cgroup's limit
    free_bytes: int
    gpus: tuple[str, ...]
    card_free_bytes: int | None = None  # free memory of the run's GPU; None until the run has measured it

    def describe(self, processes: int = 1) -> list[str]:
        """Return lines about the machine. processes: number of those on it that share the free memory."""
        gpus = ", ".join(self.gpus) or "no GPU"
        memory = f"{self.memory_bytes / 2**30:.1f} GiB memory, {self.free_bytes / 2**30:.1f} free"
        memory += f" for each of {processes} processes" if processes > 1 else ""
        return [
            f"{self.cpu}, {self.cores} core{'s' * (self.cores != 1)} ({', '.join(self.vector) or 'plain'}), {memory}",
            f"{gpus}; {self.system}, Python {self.python}",
        ]


def this_cpu() -> Cpu:
    """Return the CPU of this machine. Faster than `probe`, which also asks for the free memory."""
    return Cpu(_cpu()[0], vector_extensions())


def probe(memory: int | None = None) -> Machine:
    """Return the resources of this machine. memory: a memory limit for this process, in bytes."""
    total, free = psutil.virtual_memory().total, free_bytes()
    limits = cgroup.memory_limit()
    limit = limits[0] if limits else None
    if memory is not None:
        limit = min(memory, limit or memory)
        free = min(free, memory - psutil.Process().memory_info().rss)
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        cpu=_cpu()[0],
        vector=vector_extensions(),
        cores=min(available_cores(), cgroup.cores() or available_cores()),
        memory_bytes=min(total, limit) if limit else total,
        free_bytes=max(free, 0),
        gpus=_query_gpus("name,memory.total"),
    )


def free_bytes() -> int:
    """Return the host memory that this process may still allocate."""
    available, limits = psutil.virtual_memory().available, cgroup.memory_limit()
    return min(available, limits[1]) if limits else available


def vector_extensions() -> tuple[str, ...]:
    """Return the CPU's vector extensions that matter to strop's kernels, named as in /proc/cpuinfo."""
    flags = _cpu()[1]
    return tuple(flag for flag in _KNOWN_EXTENSIONS if flag in flags)


def available_cores() -> int:
    """Return the number of cores that this process may use, which is PyTorch's default number of threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_wsl() -> bool:
    """Return whether this is Linux inside Windows (WSL)."""
    return "microsoft" in platform.release().lower()


def compute_capability(index: int = 0) -> float | None:
    """Return the compute capability of an NVIDIA GPU, or None if the driver does not report it."""
    capabilities = _query_gpus("compute_cap")
    try:
        return float(capabilities[index])
    except (IndexError, ValueError):
        return None


def gpu_dtype(capability: float) -> tuple[str, str]:
    """Return the fastest dtype of an NVIDIA GPU with this compute capability, and the reason."""
    if capability >= MIN_BF16_CAPABILITY:
        return "bf16", "the GPU supports bf16"
    if capability >= MIN_FP16_CAPABILITY:
        return "fp16", "the GPU has no bf16"
    return "fp32", "the GPU has no fast 16-bit type"


@cache  # a plan calls `probe` hundreds of times
def _cpu() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = [line.partition(":") for line in text.splitlines()]
    info = {key.strip(): value.strip() for key, _, value in reversed(fields)}
    name = info.get("model name") or _lscpu_name() or platform.machine()
    return name, set(info.get("flags", info.get("Features", "")).split())


def _lscpu_name() -> str | None:
    """Return the CPU's name from `lscpu`, which knows the numbers that Linux reports in place of a name on ARM."""
    try:
        done = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.CalledProcessError):
        return None
    fields = [line.strip().partition(":") for line in done.stdout.splitlines()]
    names = [value.strip() for key, _, value in fields if key == "Model name" and value.strip() != "-"]
    return " + ".join(names) or None  # one for each kind of core


def _query_gpus(fields: str) -> tuple[str, ...]:
    """Query the driver about the visible GPUs in PCI bus order. torch may still be unable to use them."""
    uuids, lines = nvidia_smi("uuid"), nvidia_smi(fields)
    selection = os.environ.get("CUDA_VISIBLE_DEVICES")
    if selection is None or selection.startswith("MIG-") or len(uuids) != len(lines):
        return lines
    return tuple(lines[index] for index in visible_gpus(selection, uuids))


def visible_gpus(selection: str, uuids: Sequence[str]) -> list[int]:
    """Return the indices of the GPUs in CUDA_VISIBLE_DEVICES, a list of indices or prefixes of UUIDs."""
    # Like CUDA, ignore everything after the first invalid entry, and return nothing if a GPU is listed twice.
    indices: list[int] = []
    for entry in (entry.strip() for entry in selection.split(",")):
        matches = [index for index, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if entry.isdigit():
            matches = [int(entry)] if int(entry) < len(uuids) else []
        if len(matches) != 1:
            return indices
        if matches[0] in indices:
            return []
        indices += matches
    return indices


@cache
def nvidia_smi(fields: str) -> tuple[str, ...]:
    """Return nvidia-smi's line with these fields for each GPU, or () if nvidia-smi is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return ()
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:  # the driver hangs
        return ()
    return tuple(line.strip() for line in result.stdout.splitlines()) if result.returncode == 0 else ()
