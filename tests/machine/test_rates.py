"""Stored measurements, and damaged cache files."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from strop.machine import rates
from strop.machine.memory import load_measured, save_measured
from strop.machine.probe import probe


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_measurements_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    machine = probe()
    values = {field.name: {} if "dict" in str(field.type) else 1 for field in fields(rates.Rates)}
    stored = rates.Rates(**values)  # type: ignore[arg-type]
    rates.save_rates(machine, "cpu", stored)
    rates.save_precision(machine, 2, "bf16", "measured")
    save_measured("shape", {"recompute": True})
    assert rates.load_rates(machine, "cpu") == stored and rates.load_precision(machine, 2) == ("bf16", "measured")
    assert load_measured("shape") == {"recompute": True}
    rates.save_rates(machine, "cpu", replace(stored, busy=True))
    older = next(file for file in tmp_path.rglob("*.json") if "busy" in file.read_text())
    assert rates.load_rates(machine, "cpu").busy  # type: ignore[union-attr]
    older.write_text(json.dumps({name: value for name, value in asdict(stored).items() if name != "busy"}))
    assert not rates.load_rates(machine, "cpu").busy  # type: ignore[union-attr]
    files = list(tmp_path.rglob("*.json"))
    assert len(files) == 3
    for file in files:
        file.write_text(text)
    assert rates.load_rates(machine, "cpu") is None and rates.load_precision(machine, 2) is None
    assert load_measured("shape") == {}
