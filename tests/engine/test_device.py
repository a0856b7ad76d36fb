"""Devices and dtypes of weights that a run selects."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from strop.engine import device
from strop.engine.device import (
    ALLOCATOR,
    explain_driver_error,
    pick_device,
    pick_dtype,
    pick_generation_dtype,
    prepare_process,
    repeatable,
)
from strop.engine.kernels.cpu.precision import Precision
from strop.errors import DeviceError
from strop.machine.doctor import why_no_code
from strop.machine.memory import is_out_of_memory
from strop.machine.probe import probe
from strop.machine.rates import load_precision


def test_bf16_support_is_read_from_the_selected_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has an older and a newer GPU."""
    capability = {"cuda": (9, 0), "cuda:0": (9, 0), "cuda:1": (7, 5), "cuda:2": (6, 1)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: capability[name])
    assert pick_dtype("cuda:0")[0] == "bf16"
    dtype, why = pick_dtype("cuda:1")
    assert dtype == "fp16" and "no bf16" in why
    assert pick_dtype("cuda:2") == ("fp32", "the GPU has no fast 16-bit type")


BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # of torch 2.13 for CUDA 13


def gpu_of(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, built: list[str] = BUILT) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=None: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)


def test_a_gpu_without_code_in_torch_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first kernel fails with "no kernel image is available for execution on the device"."""
    gpu_of((6, 0), monkeypatch)
    assert pick_device("auto") == "cpu"
    what = r"model.device cuda:0: torch .* has no code for Tesla P100, of compute capability 6.0 \(sm_75, "
    with pytest.raises(DeviceError, match=what) as raised:
        pick_device("cuda:0")
    assert "'torch<2.15' --index-url https://download.pytorch.org/whl/cu126" in raised.value.fix
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 5), BUILT, True),
        ((8, 9), BUILT, True),
        ((12, 1), BUILT, True),
        ((13, 0), BUILT, True),  # compiled when it starts
        ((13, 0), BUILT[:-1], False),
        ((7, 0), BUILT, False),
        ((7, 0), ["sm_50", "sm_60", "sm_70"], True),
        ((9, 1), ["sm_90a", "compute_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((8, 0), ["sm_86"], False),
        ((6, 0), [], True),
    ],
)
def test_which_gpus_run_the_code_of_torch(
    capability: tuple[int, int], built: list[str], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_of(capability, monkeypatch, built)
    assert (why_no_code() is None) is runs
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert why_no_code() is None, "of AMD's GPUs the list has other names"


def test_a_gpu_newer_than_torch_needs_a_newer_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_of((13, 0), monkeypatch, BUILT[:-1])
    what, fix = why_no_code() or ("", "")
    assert "compute capability 13.0" in what and fix.endswith("install -U torch")


def test_expandable_segments_are_not_used_in_wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    monkeypatch.setattr(os, "environ", environment := {})
    prepare_process()
    assert not any(name in environment for name in ALLOCATOR)
    error = RuntimeError("CUDA driver error: unknown error")
    assert explain_driver_error(error) is None
    environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    explained = explain_driver_error(error)
    assert explained is not None and "PYTORCH_ALLOC_CONF=expandable_segments:False" in str(explained)
    assert explain_driver_error(RuntimeError("CUDA error: unspecified launch failure")) is None
    assert is_out_of_memory(RuntimeError("CUDA driver error: device not ready"))


@pytest.mark.parametrize(
    ("trained", "family", "dtype"),
    [(None, "llama", "fp16"), (None, "gemma3", "fp32"), ("fp16", "llama", "fp16"), ("bf16", "llama", "fp32")],
)
def test_answers_on_a_gpu_without_bf16(
    trained: str | None, family: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_of((7, 5), monkeypatch)
    assert pick_generation_dtype("cuda", trained, family)[0] == dtype


def test_disturbed_measurement_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs shared the CPU once, and every later run was trained in fp32, at half the speed."""
    monkeypatch.setattr(device, "_estimates", {})
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    slow = Precision("fp32", "bf16 13 GFLOP/s, fp32 15 GFLOP/s measured", 13e9, 15e9)
    monkeypatch.setattr(device, "measure", lambda name: slow)
    machine = replace(probe(), vector=("avx512_bf16",))
    monkeypatch.setattr(device, "probe", lambda: machine)
    monkeypatch.setattr(device.time, "process_time", iter([0.0, 0.5]).__next__)
    monkeypatch.setattr(device.time, "perf_counter", iter([0.0, 1.0]).__next__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    dtype, why = pick_dtype("cpu")
    assert dtype == "bf16" and "disturbed" in why and load_precision(machine, 2) is None
    assert pick_dtype("cpu") == (dtype, why)  # this process does not measure again, a new one does
    device._estimates.clear()
    monkeypatch.setattr(device.time, "process_time", iter([0.0, 2.0]).__next__)
    monkeypatch.setattr(device.time, "perf_counter", iter([0.0, 1.0]).__next__)
    assert pick_dtype("cpu") == ("fp32", slow.why) == load_precision(machine, 2)


def test_bf16_on_one_thread_is_no_disturbance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs without bf16, each start measured anew, and the rates of `strop doctor` counted as too low."""
    monkeypatch.setattr(device, "_estimates", {})
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    monkeypatch.setattr(device, "measure", lambda name: Precision("fp32", "measured", 3e9, 120e9, 2.0, 2.0))
    monkeypatch.setattr(device.time, "process_time", iter([0.0, 2.9]).__next__)
    monkeypatch.setattr(device.time, "perf_counter", iter([0.0, 2.5]).__next__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert pick_dtype("cpu") == ("fp32", "measured") == load_precision(probe(), 2)


def test_prepare_process_keeps_variables_that_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    monkeypatch.setattr(os, "environ", environment)
    prepare_process()
    assert environment["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"  # a setting of the user is kept
    if sys.platform == "linux":
        assert [environment.get(name) for name in ALLOCATOR].count("expandable_segments:True") == 1
    monkeypatch.setattr(os, "environ", other := {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})
    prepare_process()
    assert ALLOCATOR[0] not in other and other["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_reduced_precision_reduction_is_disabled() -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True  # PyTorch's default
    prepare_process()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize(("tiles", "rank", "kept"), [(True, 16, "32"), (True, 64, "64"), (False, 16, "64")])
def test_primitive_cache_capacity_depends_on_tiles_and_rank(
    tiles: bool, rank: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "this_cpu", lambda: replace(probe(), vector=("avx512_bf16",) if tiles else ()))
    monkeypatch.setattr(os, "environ", environment := {"LRU_CACHE_CAPACITY": "7"})
    prepare_process(rank=rank)
    assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == kept
    assert environment["LRU_CACHE_CAPACITY"] == "7"  # a setting of the user is kept


def test_repeatable_restores_the_previous_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode is that of a run with train.deterministic; all settings are restored afterwards."""
    monkeypatch.setattr(os, "environ", environment := {})
    prepare_process()
    assert "CUBLAS_WORKSPACE_CONFIG" not in environment
    prepare_process(deterministic=True)
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with repeatable():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # flash attention looks at both
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == filled


def test_allocator_variable_depends_on_the_torch_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for version, name in (("2.8.1+cu128", ALLOCATOR[1]), ("2.13.0", ALLOCATOR[0])):
        monkeypatch.setattr(os, "environ", environment := {})
        monkeypatch.setattr(device.torch, "__version__", version)
        prepare_process()
        assert environment[name] == "expandable_segments:True"
