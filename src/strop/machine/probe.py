"""Facts about this machine, without torch."""

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

CGROUP = Path("/sys/fs/cgroup")
TILED_RANK = 32  # above it PyTorch's own products of a LoRA are as fast as the fast step's (engine.cpu.lora_tiles)
_VECTOR = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni", "avx_vnni", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Machine:
    """cores: those this process may use. memory_bytes: what it may use at most (RAM or the cgroup's limit).
    card_free_bytes: of the card that a run takes, where a run has looked."""

    system: str
    python: str
    cpu: str
    vector_extensions: tuple[str, ...]
    cores: int
    memory_bytes: int
    free_bytes: int
    gpus: tuple[str, ...]
    card_free_bytes: int | None = None

    @property
    def tiles(self) -> bool:
        """The CPU has the instruction of the fast step's own products in bf16 (engine.cpu.tile)."""
        return "avx512_bf16" in self.vector

    @property
    def integers(self) -> bool:
        """The CPU has the instruction for sums of 8-bit products (engine.cpu.integers)."""
        return "avx512_vnni" in self.vector or "avx_vnni" in self.vector

    def has_tiles(self, head_size: int) -> bool:
        """The fast step's attention in bf16 runs in tiles here (engine.cpu), and keeps no probabilities."""
        return self.tiles and head_size % 32 == 0

    def has_products(self, sizes: Sequence[int]) -> bool:
        """The fast step multiplies frozen weights in bf16 of these sizes itself (engine.cpu.frozen): with AMX oneDNN is
        faster."""
        return self.tiles and "amx_bf16" not in self.vector and all(size % 32 == 0 for size in sizes)

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
    limit, total, free = _limit_bytes(), psutil.virtual_memory().total, free_bytes()
    if memory is not None:
        limit = min(memory, limit or memory)
        free = min(free, memory - psutil.Process().memory_info().rss)
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        cpu=_cpu()[0],
        vector=vector_extensions(),
        cores=min(affinity(), _cgroup_cores() or affinity()),
        memory_bytes=min(total, limit) if limit else total,
        free_bytes=max(free, 0),
        gpus=_gpus(),
    )


def free_bytes() -> int:
    """Of the host's memory, that this process may still have."""
    available, limit, used = psutil.virtual_memory().available, _limit_bytes(), _cgroup_used()
    return min(available, limit - used) if limit and used is not None else available


def _limit_bytes() -> int | None:
    return _cgroup_bytes("memory.max", "memory/memory.limit_in_bytes")


def vector_extensions() -> tuple[str, ...]:
    """The CPU's instruction sets that strop has code for, by Linux's names."""
    flags = _cpu()[1]
    return tuple(flag for flag in _VECTOR if flag in flags)


def affinity() -> int:
    """Cores that this process may run on; PyTorch takes as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compute_capability(index: int = 0) -> float | None:
    """Of an NVIDIA card; None where the driver does not say."""
    found = _nvidia("compute_cap")
    try:
        return float(found[index])
    except (IndexError, ValueError):
        return None


@cache  # a plan looks at the machine hundreds of times
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
        text = _cgroup_text(name).strip()
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _cgroup_text(name: str) -> str:
    try:
        return (CGROUP / name).read_text(encoding="utf-8")
    except OSError:
        return ""


def _cgroup_used() -> int | None:
    """Bytes that the cgroup cannot give back: pages of files that lie there unused are no memory in use."""
    used = _cgroup_bytes("memory.current", "memory/memory.usage_in_bytes")
    lines = (_cgroup_text("memory.stat") or _cgroup_text("memory/memory.stat")).splitlines()
    stat = dict(line.split(" ", 1) for line in lines if " " in line)
    cache = stat.get("total_inactive_file") or stat.get("inactive_file") or "0"
    return None if used is None else max(0, used - int(cache))


def _cgroup_cores() -> int | None:
    """Whole cores of the cgroup's time; None where it has no limit."""
    both = _cgroup_text("cpu.max").split()
    both = both or [_cgroup_text(f"cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(both) != 2 or not all(text.isdigit() for text in both):  # "max 100000", -1, or no such file
        return None
    return max(1, int(both[0]) // int(both[1]))


def _gpus() -> tuple[str, ...]:
    """Cards as the NVIDIA driver lists them; torch may still not be able to use them."""
    return _nvidia("name,memory.total")


def _nvidia(fields: str) -> tuple[str, ...]:
    """What the driver says of each card that CUDA may use here, in CUDA's order (with CUDA_DEVICE_ORDER=PCI_BUS_ID,
    which a run sets)."""
    uuids, lines = _asked("uuid"), _asked(fields)
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None or asked.startswith("MIG-") or len(uuids) != len(lines):  # a part of a card has its own uuid
        return lines
    return tuple(lines[place] for place in visible_gpus(asked, uuids))


def visible_gpus(asked: str, uuids: Sequence[str]) -> list[int]:
    """The cards of CUDA_VISIBLE_DEVICES, by their places among all: numbers, or beginnings of a uuid. As CUDA reads it,
    nothing counts behind the first that is not there, and nothing at all where one is named twice."""
    found: list[int] = []
    for word in (word.strip() for word in asked.split(",")):
        if word.isdigit():
            meant = [int(word)] if int(word) < len(uuids) else []
        else:
            meant = [place for place, uuid in enumerate(uuids) if word and uuid.startswith(word)]
        if len(meant) != 1:
            return found
        if meant[0] in found:
            return []
        found += meant
    return found


@cache
def _asked(fields: str) -> tuple[str, ...]:
    if not shutil.which("nvidia-smi"):
        return ()
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:  # a driver that hangs
        return ()
    return tuple(line.strip() for line in found.stdout.splitlines()) if found.returncode == 0 else ()
