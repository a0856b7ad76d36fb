"""Common problems are triggered, and each message refers to its heading in docs/troubleshooting.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import strop
from strop.config.load import resolve
from strop.engine.device import pick_device
from strop.engine.train import fast
from strop.errors import (
    TROUBLESHOOTING_PAGE,
    DeviceError,
    DiskError,
    GatedError,
    MemoryLimitError,
    NonFiniteError,
    QuantizerError,
    StropError,
)
from strop.evaluation.diagnosis import diagnose
from strop.machine import doctor
from strop.machine.probe import Machine
from strop.models.quantize import dequantize_weight, quantize_weight
from strop.planning import calibrate
from strop.planning.memory import CUDA_CONTEXT_BYTES
from strop.runs.folder import disk_errors
from strop.training.loop import fit
from strop.training.optim import make_optimizer
from strop.training.preflight import _probe_machine
from tests import ROOT
from tests.support import tiny
from tests.support.failures import curve, falling, starved
from tests.support.hub_standin import serve
from tests.support.steps import changed_step

PAGE = ROOT / TROUBLESHOOTING_PAGE
REFERENCE = re.compile(rf"{TROUBLESHOOTING_PAGE}#(\w+)")


def headings() -> set[str]:
    return set(re.findall(r'^<a id="(\w+)"></a>\n\n## ', PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def classes(kind: type[StropError]) -> list[type[StropError]]:
    return [kind, *(inner for subclass in kind.__subclasses__() for inner in classes(subclass))]


def test_every_heading_that_messages_refer_to_exists() -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in (PAGE.parents[1] / "src").rglob("*.py"))
    referred = {kind.page for kind in classes(StropError) if kind.page} | set(REFERENCE.findall(source))
    assert referred <= headings() and len(headings()) == 9


def test_out_of_memory_refers_to_its_heading(tmp_path: Path) -> None:
    job = replace(tiny.job(tmp_path / "r", tiny.examples(8), **{"train.max_steps": 2}), memory_key="trouble")
    with pytest.raises(MemoryLimitError) as raised:
        fit(starved(job, set(range(1, 100))))
    assert f"{TROUBLESHOOTING_PAGE}#memory" in raised.value.lines()[-1]


def without_bitsandbytes(patch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        patch.setitem(sys.modules, name, None)  # importing it fails


def eight_bit() -> object:
    section = resolve(None, {"model": "m", "data": "d", "train.optimizer": "adamw_8bit"}).recipe.train
    return make_optimizer({"w": nn.Parameter(torch.zeros(2))}, section)


@pytest.mark.parametrize(
    "use", [lambda: quantize_weight(torch.zeros(64, 64), "nf4"), eight_bit], ids=["4 bit", "8-bit optimizer"]
)
def test_missing_bitsandbytes_refers_to_its_heading(use: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    without_bitsandbytes(monkeypatch)
    with pytest.raises(QuantizerError, match="cannot be used here") as raised:
        use()
    assert f"{TROUBLESHOOTING_PAGE}#bitsandbytes" in raised.value.fix
    result = calibrate.check_four_bit_step()
    assert result.level == "error" and "bitsandbytes" in result.why and "install" in result.fix


@pytest.mark.parametrize("name", ["quantize_4bit", "dequantize_4bit"])
def test_bitsandbytes_built_for_another_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes can be imported, but its functions raise."""

    def other_cuda(*args: object, **named: object) -> None:
        raise RuntimeError("\nCUDA SETUP ERROR: no kernel image is available for execution on the device\nmore")

    def no_memory(*args: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"bitsandbytes.functional.{name}", other_cuda)
    with pytest.raises(QuantizerError, match="cannot be used here: CUDA SETUP ERROR") as raised:
        dequantize_weight(quantize_weight(torch.ones(64, 64), "nf4"), "nf4", torch.Size((64, 64)), torch.float32)
    assert f"{TROUBLESHOOTING_PAGE}#bitsandbytes" in raised.value.fix
    result = calibrate.check_four_bit_step()
    assert result.level == "error" and "#bitsandbytes" in result.why and "install" in result.fix
    monkeypatch.setattr(f"bitsandbytes.functional.{name}", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        dequantize_weight(quantize_weight(torch.ones(64, 64), "nf4"), "nf4", torch.Size((64, 64)), torch.float32)


def test_missing_cuda_refers_to_its_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError) as raised:
        pick_device("cuda")
    assert f"{TROUBLESHOOTING_PAGE}#cuda" in raised.value.fix
    machine = Machine("a CPU", (), "Linux", "3.11", 2, 1 << 34, 1 << 34, ("NVIDIA RTX 4090, 24564 MiB",))
    (result,) = calibrate.check_gpus(machine)
    assert result.level == "error" and "cannot use it" in result.what and "#cuda" in result.why and result.fix


def test_missing_kernels_refer_to_their_heading(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU for which no kernel can be compiled, both the doctor and a run report it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(calibrate, "pick_dtype", lambda device: ("bf16", "a test"))
    machine = Machine("a CPU", (), "Linux", "3.11", 2, 1 << 34, 1 << 34, ("NVIDIA RTX 4090, 24564 MiB",))
    monkeypatch.setattr(calibrate, "why_no_code", lambda: None)
    for reason, fix in (
        ("Triton cannot be used: no C compiler", "gcc"),
        ("Triton cannot be used: No module named 'triton'", "install triton"),
        ("flash attention cannot be used: its results are wrong", "# update torch or the driver"),
        ("", ""),
    ):
        monkeypatch.setattr(calibrate, "describe_gpu_failures", lambda device, reason=reason: reason)
        _, result = calibrate.check_gpus(machine)
        assert (result.level, "#triton" in result.why) == (("warning", True) if reason else ("ok", False))
        assert fix in result.fix and bool(fix) == bool(result.fix)
    monkeypatch.undo()
    chosen = fast.backend_for
    monkeypatch.setattr(
        fast,
        "backend_for",
        lambda *of, **how: replace(chosen(*of, **how), failures="Triton cannot be used: no C compiler"),
    )
    events: list[dict[str, object]] = []
    options = {"train.max_steps": 1, "model.dtype": "fp32", "device": "cpu", "out": tmp_path / "run"}
    strop.train(model=str(tiny_folder), data=str(rows_file), callback=events.append, **options)
    notes = [str(event["text"]) for event in events if event["event"] == "note"]
    assert [note for note in notes if "no C compiler" in note and "#triton" in note]


def test_run_that_cannot_use_a_gpu_notes_it(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("strop.machine.probe._query_gpus", lambda fields: ("NVIDIA RTX 4090, 24564 MiB",))
    options = {"model": str(tiny_folder), "data": str(rows_file), "train.max_steps": 1, "model.dtype": "fp32"}
    notes = {}
    for device in ("auto", "cpu"):
        events: list[dict[str, object]] = []
        strop.train(**options, device=device, out=tmp_path / device, callback=events.append)
        notes[device] = [str(event["text"]) for event in events if event["event"] == "note"]
    assert len(notes["auto"]) == 1 and "RTX 4090" in notes["auto"][0] and "#cuda" in notes["auto"][0]
    assert not notes["cpu"]
    monkeypatch.setattr("strop.training.preflight.why_no_code", lambda: ("torch has no code for P100", "pip install x"))
    events = []
    strop.train(**options, out=tmp_path / "old", callback=events.append)
    (note,) = [str(event["text"]) for event in events if event["event"] == "note"]
    assert note == "torch has no code for P100: training runs on the CPU; `pip install x` installs one that has"


def test_reserved_gpu_memory_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strop.training.preflight.pick_device", lambda asked: "cuda:1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 30)
    result = _probe_machine(resolve(None, {"model": "m", "data": "d"}).recipe, None)
    assert result.card_free_bytes == (4 << 30) + CUDA_CONTEXT_BYTES


def test_nan_loss_refers_to_its_heading(tmp_path: Path) -> None:
    job = tiny.job(tmp_path / "r", tiny.examples(8), **{"train.max_steps": 8})
    broken = replace(job, step=changed_step(job.step, token_loss=lambda rows: job.step.token_loss(rows) * float("nan")))
    with pytest.raises(NonFiniteError) as raised:
        fit(broken)
    assert f"{TROUBLESHOOTING_PAGE}#nan" in raised.value.fix


def test_rising_loss_refers_to_its_heading() -> None:
    (result,) = diagnose(curve("step", {1: 10.0, 2: 15.0, 3: 138.0}), 0.02)
    assert f"{TROUBLESHOOTING_PAGE}#rising" in result


def test_flat_loss_refers_to_its_heading() -> None:
    (result,) = diagnose(curve("step", falling(2.0, 2.0)), 0.02)
    assert f"{TROUBLESHOOTING_PAGE}#flat" in result


def test_full_disk_refers_to_its_heading(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as raised, disk_errors(tmp_path):
        raise OSError(28, "No space left on device")
    assert f"{TROUBLESHOOTING_PAGE}#disk" in raised.value.fix


def test_gated_model_refers_to_its_heading(tmp_path: Path, tiny_folder: Path) -> None:
    files = {"config.json": (tiny_folder / "config.json").read_bytes()}
    with serve("models", "owner/closed", files, gated=True) as (address, _):
        env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        env.pop("HF_HUB_CACHE", None)
        command = [sys.executable, "-m", "strop.cli", "plan", "--model", "owner/closed", "--json"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 2 and error["kind"] == GatedError.__name__, done.stderr
    assert "hf auth login" in error["fix"] and f"{TROUBLESHOOTING_PAGE}#gated" in error["fix"]


def test_doctor_reports_a_4_bit_step_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrate.check_four_bit_step().level == "ok"
    monkeypatch.setattr(calibrate.QuantizedLinear, "forward", lambda self, x: x.detach() * 1 + 0 * x)
    assert calibrate.check_four_bit_step().level == "error"


def test_doctor_reports_a_4_bit_step_that_leaves_the_weight_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    assert calibrate.check_four_bit_step().level == "error"


def test_doctor_reports_a_check_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    (result,) = [f for f in doctor.examine(crash, tmp_path).findings if "ends with" in f.what]  # type: ignore[arg-type]
    assert result.level == "error" and "no kernel image" in result.what and result.fix
    monkeypatch.setattr(calibrate, "_four_bit_update", crash)
    result = calibrate.check_four_bit_step()
    assert result.level == "error" and "no kernel image" in result.what


def test_other_messages_of_the_page_are_those_of_the_code() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "strop").rglob("*.py"))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    _, _, section = page.partition("## Other messages\n")
    messages = [text for heading in re.findall(r"^### (.*)$", section, re.M) for text in heading.split(", or ")]
    assert len(messages) >= 10 and all(message in code for message in messages)
