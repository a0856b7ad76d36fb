"""Facts about this machine, without torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

_VECTOR = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Machine:
    """cores: those this process may use. memory_bytes: what it may use at most (RAM or the cgroup's limit)."""

    system: str
    python: str
    cpu: str
    vector: tuple[str, ...]
    cores: int
    memory_bytes: int
    free_bytes: int
    gpus: tuple[str, ...]

    def lines(self) -> list[str]:
        """The machine in two lines."""
        cards = ", ".join(self.gpus) or "no GPU"
        memory = f"{self.memory_bytes / 2**30:.1f} GiB memory, {self.free_bytes / 2**30:.1f} free"
        return [
            f"{self.cpu}, {self.cores} core{'s' * (self.cores != 1)} ({', '.join(self.vector) or 'plain'}), {memory}",
            f"{cards}; {self.system}, Python {self.python}",
        ]


def probe(memory: int | None = None) -> Machine:
    """This machine. memory: bytes that this process is to have of it at most, where that is less."""
    name, flags = _cpu()
    available = psutil.virtual_memory().available
    limit = _cgroup_bytes("memory.max", "memory/memory.limit_in_bytes")
    used = _cgroup_bytes("memory.current", "memory/memory.usage_in_bytes")
    total = psutil.virtual_memory().total
    free = min(available, limit - used) if limit and used is not None else available
    if memory is not None:
        limit = min(memory, limit or memory)
        free = min(free, memory - psutil.Process().memory_info().rss)
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        cpu=name,
        vector=tuple(flag for flag in _VECTOR if flag in flags),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=min(total, limit) if limit else total,
        free_bytes=max(free, 0),
        gpus=_gpus(),
    )


def _cpu() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = [line.partition(":") for line in text.splitlines()]
    found = {key.strip(): value.strip() for key, _, value in reversed(fields)}
    return found.get("model name", platform.machine()), set(found.get("flags", found.get("Features", "")).split())


def _cgroup_bytes(*names: str) -> int | None:
    """The first of these cgroup files that holds a number below 2^60 (above it means no limit)."""
    for name in names:
        try:
            text = (Path("/sys/fs/cgroup") / name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _gpus() -> tuple[str, ...]:
    """Cards as the NVIDIA driver lists them; torch may still not be able to use them."""
    if not shutil.which("nvidia-smi"):
        return ()
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:  # a driver that hangs
        return ()
    return tuple(line.strip() for line in found.stdout.splitlines()) if found.returncode == 0 else ()
