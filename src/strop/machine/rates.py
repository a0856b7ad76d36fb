"""The cache of this machine's speed (measured by `strop doctor`) and faster dtype (measured by a run)."""

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
    bf16_flops: float  # FLOP/s of matmuls with frozen weights
    fp32_flops: float
    bandwidth: float  # of memory, bytes/s
    threads: int
    costs: dict[str, dict[str, float]]  # fields of planning.time.Rate, by dtype
    unpacked_per_s: dict[str, float]  # weights dequantized per second, by quantization scheme
    integers: dict[str, float]  # FLOP/s with train.int8_matmul, by quantization scheme; empty if unsupported
    busy: bool = False  # other programs were using the machine, so the rates are too low


def save_rates(machine: Machine, device: str, rates: Rates) -> None:
    file = _rates_file(machine, device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(rates))


def load_rates(machine: Machine, device: str) -> Rates | None:
    """Return the stored rates, or None if there are none with the fields of this version of strop."""
    stored = read_json(_rates_file(machine, device))
    return Rates(**{"busy": False, **stored}) if {*stored, "busy"} == {field.name for field in fields(Rates)} else None


def generation_dtype(trained: str | None, device: str, fastest: str) -> str:
    """Return the dtype to generate in, from the dtype of training (None: unknown) and the fastest on the device.

    It is the dtype of training, or fp32, which represents all values, where the device is not made for it.
    """
    if trained is None or trained == fastest:
        return fastest
    return "fp16" if trained == "fp16" and device.startswith("cuda") else "fp32"


def save_precision(machine: Machine, threads: int, dtype: str, why: str) -> None:
    file = _precision_file(machine, threads)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"dtype": dtype, "why": why})


def load_precision(machine: Machine, threads: int | None = None) -> tuple[str, str] | None:
    """Return (dtype of the frozen weights, reason) that a run measured, or None. threads: PyTorch's default if None."""
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
