"""The rates that `strop doctor` measured on this machine, kept for `strop plan`. No torch here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from strop.machine.probe import Machine
from strop.runs.folder import cache_folder, write_json
from strop.runs.lock import sha256_text


@dataclass(frozen=True)
class Rates:
    """FLOP/s of the frozen layers' products in each type, and bytes/s of memory. head_flops, attention_flops: what the
    engine's own reach, by type: they are other shapes, with a softmax between."""

    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    threads: int
    head_flops: dict[str, float]
    attention_flops: dict[str, float]

    @property
    def dtype(self) -> str:
        """As engine.precision decides: bf16 rounds, and must be worth it."""
        return "bf16" if self.bf16_flops >= 1.2 * self.fp32_flops else "fp32"


def keep_rates(machine: Machine, device: str, rates: Rates) -> None:
    file = _file(machine, device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(rates))


def known_rates(machine: Machine, device: str) -> Rates | None:
    """None where none were measured, or by a strop that measured others."""
    file = _file(machine, device)
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return Rates(**found) if set(found) == {field.name for field in fields(Rates)} else None


def _file(machine: Machine, device: str) -> Path:
    key = sha256_text(f"{machine.cpu} {machine.cores} {machine.gpus if device != 'cpu' else ''} {device}")[:16]
    return cache_folder() / "rates" / f"{key}.json"
