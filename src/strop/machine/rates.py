"""Measurements of this machine, stored in the cache: speeds by `strop doctor`, the faster dtype by a run. No torch."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from strop.machine.probe import Machine, affinity
from strop.runs.folder import cache_folder, read_json, write_json
from strop.runs.lock import sha256_text

MEASURED = 3  # version of the measurements; 3 since frozen weights may be multiplied in 8-bit integers


@dataclass(frozen=True)
class Rates:
    """Speeds on one device.

    bf16_flops, fp32_flops: FLOP/s of the frozen layers' matmuls. bandwidth: of memory, bytes/s. costs: by dtype, the
    fields of planning.time.Rate. unpacked_per_s: weights dequantized a second, by scheme. integers: FLOP/s of frozen
    matmuls in 8-bit integers (int8_matmul), by scheme; empty where the CPU has none.
    """

    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    threads: int
    costs: dict[str, dict[str, float]]
    unpacked_per_s: dict[str, float]
    integers: dict[str, float]

    @property
    def dtype(self) -> str:
        """The dtype that engine.device chooses: bf16 rounds, so it must be 20 % faster."""
        return "bf16" if self.bf16_flops >= 1.2 * self.fp32_flops else "fp32"


def save_rates(machine: Machine, device: str, rates: Rates) -> None:
    file = _rates_file(machine, device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(rates))


def load_rates(machine: Machine, device: str) -> Rates | None:
    """Return the stored rates; None if there are none, or other ones by another version of strop."""
    stored = read_json(_rates_file(machine, device))
    return Rates(**stored) if set(stored) == {field.name for field in fields(Rates)} else None


def save_precision(machine: Machine, threads: int, dtype: str, why: str) -> None:
    file = _precision_file(machine, threads)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"dtype": dtype, "why": why})


def load_precision(machine: Machine, threads: int | None = None) -> tuple[str, str] | None:
    """Return (dtype of the frozen weights, reason) as a run measured it; threads: default PyTorch's."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    stored = read_json(_precision_file(machine, threads or (int(setting) if setting.isdigit() else affinity())))
    return (stored["dtype"], stored["why"]) if stored else None


def _precision_file(machine: Machine, threads: int) -> Path:
    key = sha256_text(f"{machine.cpu} {version('torch')} {threads} {platform.machine()}")[:16]
    return cache_folder() / "precision" / f"{key}.json"


def _rates_file(machine: Machine, device: str) -> Path:
    threads = os.environ.get("OMP_NUM_THREADS", "")
    gpus = machine.gpus if device != "cpu" else ""
    key = sha256_text(f"{MEASURED} {machine.cpu} {machine.cores} {threads} {gpus} {device}")[:16]
    return cache_folder() / "rates" / f"{key}.json"
