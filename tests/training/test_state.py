"""Checkpoints: random generators, versions, and unreadable files."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import strop
from strop.errors import CheckpointError
from strop.training import state
from strop.training.loop import fit
from strop.training.state import random_states, set_random_states
from tests.support import tiny

QUICK = {
    "model.device": "cpu", "model.dtype": "fp32", "lora.r": 4, "train.max_steps": 2, "train.batch_size": 4,
    "train.save_steps": 1, "train.learning_rate": 1e-3,
}  # fmt: skip


def test_cpu_run_ignores_a_gpu_that_pytorch_cannot_use(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the driver is too old, device_count reports a GPU, but CUDA does not start."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("get_rng_state", "set_rng_state", "empty_cache", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    run = strop.train(model=str(tiny_folder), data=str(rows_file), out=str(tmp_path / "run"), **QUICK)
    assert run.report["steps"] == 2


def test_random_state_is_restored_on_a_gpu_of_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device.index], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: calls.append((str(state), str(device))))
    saved = random_states(torch.device("cuda:1"))
    assert saved.keys() == {"cpu", "cuda1"}
    set_random_states(saved, torch.device("cuda:0"))
    set_random_states(saved, torch.device("cpu"))
    assert calls == [(str(torch.tensor([1], dtype=torch.uint8)), "cuda:0")]


def saved(tmp_path: Path) -> tuple[Path, Any]:
    job = tiny.job(tmp_path / "run", tiny.examples(8), **{"train.max_steps": 2, "train.save_steps": 1})
    fit(job)
    return job.folder.checkpoints()[-1][1], job


def test_checkpoint_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    checkpoint, job = saved(tmp_path)
    file = checkpoint / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_tomorrow": 1}))
    with pytest.raises(CheckpointError, match="another version of strop: of_tomorrow"):
        state.restore_checkpoint(checkpoint, job.state)


@pytest.mark.parametrize("name", ["manifest.json", "optimizer.safetensors"])
def test_unreadable_checkpoint_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """After a read error, the previous checkpoint is used."""
    checkpoint, job = saved(tmp_path)
    opened = io.open

    def bad(file: Any, *args: Any, **options: Any) -> Any:
        if str(file) == str(checkpoint / name):
            raise OSError(errno.EIO, "Input/output error", str(file))
        return opened(file, *args, **options)

    monkeypatch.setattr(io, "open", bad)  # pathlib's
    text: list[str] = []
    assert state.newest_checkpoint(job.folder, text.append).name == "step-000001"
    assert "cannot be read: Input/output error" in text[0]
