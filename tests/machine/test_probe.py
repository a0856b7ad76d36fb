"""Which cards a plan counts: those that CUDA may use."""

from __future__ import annotations

import pytest

from strop.machine import probe
from strop.machine.probe import visible_gpus

UUIDS = ("GPU-aa1", "GPU-ab2", "GPU-b3")


@pytest.mark.parametrize(
    "asked, found",
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
def test_cards_as_cuda_reads_them(asked: str, found: list[int]) -> None:
    assert visible_gpus(asked, UUIDS) == found


def test_a_plan_takes_the_cards_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"uuid": UUIDS, "name,memory.total": ("A, 24564 MiB", "B, 8192 MiB", "C, 81559 MiB")}
    told["compute_cap"] = ("8.9", "7.5", "9.0")
    monkeypatch.setattr(probe, "_asked", lambda fields: told[fields])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert probe.probe().gpus == told["name,memory.total"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert probe.probe().gpus == ("B, 8192 MiB", "C, 81559 MiB") and probe.compute_capability(0) == 7.5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert probe.probe().gpus == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1f")  # a part of a card: CUDA alone knows of which
    assert len(probe.probe().gpus) == 3
