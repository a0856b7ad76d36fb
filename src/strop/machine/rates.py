"""What was measured on this machine and is kept: rates by `strop doctor`, the better type by a run. No torch here."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from strop.machine.probe import Machine, affinity
from strop.runs.folder import cache_folder, read_json, write_json
from strop.runs.lock import sha256_text

MEASURED = 3  # one more where what is measured changes: 3 since frozen weights may be multiplied in integers


@dataclass(frozen=True)
class Rates:
    """FLOP/s of the frozen layers' products in each type, and bytes/s of memory. costs: by type, of the parts of a step
    (the fields of planning.speed.Rate). unpacked_per_s: weights that are dequantized a second, by scheme. integers:
    FLOP/s of frozen products in 8-bit integers (int8_matmul), by scheme; empty where the CPU has none."""

    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    threads: int
    costs: dict[str, dict[str, float]]
    unpacked_per_s: dict[str, float]
    integers: dict[str, float]

    @property
    def dtype(self) -> str:
        """As engine.precision decides: bf16 rounds, and must be worth it."""
        return "bf16" if self.bf16_flops >= 1.2 * self.fp32_flops else "fp32"


def save_rates(machine: Machine, device: str, rates: Rates) -> None:
    file = _file(machine, device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(rates))


def load_rates(machine: Machine, device: str) -> Rates | None:
    """None where none were measured, or by a strop that measured others."""
    found = read_json(_file(machine, device))
    return Rates(**found) if set(found) == {field.name for field in fields(Rates)} else None


def save_precision(machine: Machine, threads: int, dtype: str, why: str) -> None:
    file = _precision_file(machine, threads)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"dtype": dtype, "why": why})


def load_precision(machine: Machine, threads: int | None = None) -> tuple[str, str] | None:
    """(type of the frozen weights, why), as a run measured it here. threads: by default those that PyTorch takes."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    known = read_json(_precision_file(machine, threads or (int(asked) if asked.isdigit() else affinity())))
    return (known["dtype"], known["why"]) if known else None


def _precision_file(machine: Machine, threads: int) -> Path:
    key = sha256_text(f"{machine.cpu} {version('torch')} {threads} {platform.machine()}")[:16]
    return cache_folder() / "precision" / f"{key}.json"


def _file(machine: Machine, device: str) -> Path:
    threads = os.environ.get("OMP_NUM_THREADS", "")
    cards = machine.gpus if device != "cpu" else ""
    key = sha256_text(f"{MEASURED} {machine.cpu} {machine.cores} {threads} {cards} {device}")[:16]
    return cache_folder() / "rates" / f"{key}.json"
