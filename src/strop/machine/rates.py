"""Cached measurements of this machine, without torch: speeds (by `strop doctor`) and the faster dtype (by a run)."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from strop.machine.probe import Machine, available_cores
from strop.runs.folder import cache_folder, read_json, write_json
from strop.runs.lock import sha256_text

RATES_VERSION = 3  # part of the cache key; increase it when Rates changes


@dataclass(frozen=True)
class Rates:
    bf16_flops: float  # FLOP/s of frozen matmuls, as in fp32_flops
    fp32_flops: float
    bandwidth: float  # of memory, bytes/s
    threads: int
    costs: dict[str, dict[str, float]]  # fields of planning.time.Rate, by dtype
    unpacked_per_s: dict[str, float]  # weights dequantized per second, by quantization scheme
    integers: dict[str, float]  # FLOP/s of frozen matmuls with train.int8_matmul, by scheme; empty without support

    @property
    def dtype(self) -> str:
        """The dtype to use; bf16 is less precise, so it must be at least 20 % faster."""
        return "bf16" if self.bf16_flops >= 1.2 * self.fp32_flops else "fp32"


def save_rates(machine: Machine, device: str, rates: Rates) -> None:
    file = _rates_file(machine, device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(rates))


def load_rates(machine: Machine, device: str) -> Rates | None:
    """Return the stored rates; None if there are none, or if another version of strop wrote other fields."""
    stored = read_json(_rates_file(machine, device))
    return Rates(**stored) if set(stored) == {field.name for field in fields(Rates)} else None


def save_precision(machine: Machine, threads: int, dtype: str, why: str) -> None:
    file = _precision_file(machine, threads)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"dtype": dtype, "why": why})


def load_precision(machine: Machine, threads: int | None = None) -> tuple[str, str] | None:
    """Return (dtype of the frozen weights, reason) measured by a run. threads: default: PyTorch's number of threads."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    stored = read_json(_precision_file(machine, threads or (int(setting) if setting.isdigit() else available_cores())))
    return (stored["dtype"], stored["why"]) if stored else None


def _precision_file(machine: Machine, threads: int) -> Path:
    key = sha256_text(f"{machine.cpu} {version('torch')} {threads} {platform.machine()}")[:16]
    return cache_folder() / "precision" / f"{key}.json"


def _rates_file(machine: Machine, device: str) -> Path:
    threads = os.environ.get("OMP_NUM_THREADS", "")
    gpus = machine.gpus if device != "cpu" else ""
    key = sha256_text(f"{RATES_VERSION} {machine.cpu} {machine.cores} {threads} {gpus} {device}")[:16]
    return cache_folder() / "rates" / f"{key}.json"
