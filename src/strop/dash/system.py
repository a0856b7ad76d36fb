"""Current state of the machine: CPU, memory, GPUs, disk, and the process of a run."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from strop.machine.probe import probe

GPU_QUERY_S = 4.0  # seconds between queries of the driver


class System:
    """System figures since the last call. Not thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        psutil.cpu_percent()
        self._gpus: tuple[float, list[dict[str, Any]]] = (0.0, [])
        self._nvidia_smi = shutil.which("nvidia-smi")

    def look(self, pid: int | None, busy: Callable[[int], float | None]) -> dict[str, Any]:
        """Return the figures. pid: process of a run. busy: returns the cores a process uses."""
        machine, memory = probe(), psutil.virtual_memory()
        try:
            free = shutil.disk_usage(self._root if self._root.is_dir() else Path.cwd())
            disk: dict[str, int | None] = {"free": free.free, "total": free.total}
        except OSError:
            disk = {"free": None, "total": None}
        return {
            "time": time.time(), "cpu": psutil.cpu_percent() / 100, "cores": machine.cores,
            "load": [round(load, 2) for load in psutil.getloadavg()],
            "memory": {
                "total": machine.memory_bytes, "used": machine.memory_bytes - machine.free_bytes,
                "available": machine.free_bytes, "whole_machine": memory.total,
            },
            "process": _process(pid, busy), "cards": self._gpu_figures(), "disk": disk,
            "dash": {"rss": psutil.Process().memory_info().rss},
        }  # fmt: skip

    def _gpu_figures(self) -> list[dict[str, Any]]:
        if self._nvidia_smi is None:
            return []
        asked, known = self._gpus
        if time.monotonic() - asked < GPU_QUERY_S:
            return known
        fields = "name,utilization.gpu,memory.used,memory.total,temperature.gpu,power.draw"
        command = [self._nvidia_smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):  # do not query a hanging driver again
            self._nvidia_smi, text = None, ""
        gpus = [_gpu(line.split(", ")) for line in text.splitlines() if line.count(", ") == 5]
        self._gpus = (time.monotonic(), gpus)
        return gpus


def _gpu(parts: list[str]) -> dict[str, Any]:
    share, used, total, heat, power = (_number(part) for part in parts[1:])
    mib = 1 << 20
    return {
        "name": parts[0], "utilization": None if share is None else share / 100,
        "memory_used": None if used is None else int(used * mib),
        "memory_total": None if total is None else int(total * mib), "celsius": heat, "watts": power,
    }  # fmt: skip


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None


def _process(pid: int | None, busy: Callable[[int], float | None]) -> dict[str, Any] | None:
    if pid is None:
        return None
    try:
        return {"pid": pid, "rss": psutil.Process(pid).memory_info().rss, "cpu": busy(pid)}
    except psutil.Error:
        return None
