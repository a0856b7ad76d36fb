"""Detected GPUs are those that CUDA may use."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from strop.machine import probe
from strop.machine.probe import visible_gpus

UUIDS = ("GPU-aa1", "GPU-ab2", "GPU-b3")


@pytest.mark.parametrize(
    "selection, indices",
    [
        ("", []),
        ("-1", []),
        ("0", [0]),
        ("2, 0", [2, 0]),
        ("1,7,0", [1]),
        ("1,1", []),
        ("GPU-b", [2]),
        ("GPU-ab,GPU-aa", [1, 0]),
        ("GPU-a", []),
        ("none", []),
    ],
)
def test_visible_gpus_follow_cuda(selection: str, indices: list[int]) -> None:
    assert visible_gpus(selection, UUIDS) == indices


def test_probe_lists_only_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"uuid": UUIDS, "name,memory.total": ("A, 24564 MiB", "B, 8192 MiB", "C, 81559 MiB")}
    answers["compute_cap"] = ("8.9", "7.5", "9.0")
    monkeypatch.setattr(probe, "nvidia_smi", lambda fields: answers[fields])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert probe.probe().gpus == answers["name,memory.total"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert probe.probe().gpus == ("B, 8192 MiB", "C, 81559 MiB") and probe.compute_capability(0) == 7.5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert probe.probe().gpus == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1f")  # a MIG part: only CUDA knows of which GPU
    assert len(probe.probe().gpus) == 3


def test_arm_cpu_is_named_by_lscpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd85\n"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, **how: cpuinfo if str(p) == "/proc/cpuinfo" else read(p, **how))
    lines = "  BIOS Model name: -\n  Model name:  Cortex-X925\n  Thread(s) per core: 1\n  Model name:  Cortex-A725\n"
    (tmp_path / "lscpu").write_text(f"#!/bin/sh\necho '{lines}'\n")
    (tmp_path / "lscpu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe._cpu.__wrapped__() == ("Cortex-X925 + Cortex-A725", {"fp", "asimd", "sve", "bf16", "i8mm"})
    monkeypatch.setattr(probe, "_cpu", probe._cpu.__wrapped__)
    assert probe.probe().vector == ("asimd", "sve", "bf16") and probe.probe().expected_dtype == "bf16"
    (tmp_path / "lscpu").unlink()
    assert probe._cpu()[0] == platform.machine()
