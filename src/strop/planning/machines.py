"""Describe the machine that a plan is for (this machine, a memory size or a named GPU) and its speed."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from strop.errors import RecipeError
from strop.machine.doctor import is_installed
from strop.machine.probe import Machine, compute_capability, gpu_dtype, probe
from strop.machine.rates import load_precision, load_rates
from strop.planning.memory import PROCESS_BYTES
from strop.planning.time import Rate

# Shares of the dense rate in a data sheet that are reached (assumed; docs/cards.md). By large matmuls: of GPUs that are
# limited by their power, and of GeForce. By attention: flash attention 2 on Hopper and newer (arXiv:2407.08608), and on
# Ampere and Ada (arXiv:2307.08691); before them PyTorch's memory-efficient attention.
POWER_LIMITED, GEFORCE = 600 / 989, 140 / 165.2
HOPPER_ATTENTION, FLASH_ATTENTION, OLD_ATTENTION = 0.35, 0.6, 0.25
MAX_SUGGESTED = 8  # GPUs in an error
HOPPER = ("H100", "H200", "B200", "Blackwell", "MI")
# Suffixes that distinguish GPUs with the same model number.
_VARIANTS = {"ti", "super", "laptop", "mobile", "max", "sff", "d", "xt", "nvl"}


@dataclass(frozen=True)
class DeviceSpec:
    """A GPU, Apple chip or CPU, with figures from its data sheet."""

    name: str
    kind: str  # consumer, workstation, data center, Apple, CPU, or unknown
    memory_gb: float  # GiB, without what error correction (ECC) takes; shared with the system on Apple chips and CPUs
    bandwidth_gbs: float  # memory bandwidth in GB/s (10^9 bytes)
    tflops: float  # dense matmul rate in `dtype`, with fp32 accumulation
    device: str = "cuda"  # cuda, mps or cpu
    dtype: str = "bf16"  # in which the device is fastest: bf16, fp16 or fp32
    fp32_tflops: float | None = None  # if dtype is fp16, in which some models overflow

    def rate_of(self, dtype: str) -> Rate:
        source = f"data sheet of {self.name}" if self.kind != UNKNOWN.kind else f"a rough estimate: {self.name}"
        flops = 1e12 * (self.fp32_tflops if dtype == "fp32" and self.fp32_tflops else self.tflops)
        if self.device == "cpu":
            return Rate(flops, self.bandwidth_gbs * 1e9, source)
        newest = any(name in self.name for name in HOPPER)
        attention = HOPPER_ATTENTION if newest else FLASH_ATTENTION if self.dtype == "bf16" else OLD_ATTENTION
        products = (GEFORCE if self.kind == "consumer" else POWER_LIMITED) * flops
        return Rate(products, self.bandwidth_gbs * 1e9, source, attention_flops=attention * flops, gpu=True)


UNKNOWN = DeviceSpec("a GPU that is not in the table", "unknown", 0, 500, 60)


def _parse_specs(kind: str, table: str, device: str = "cuda") -> list[DeviceSpec]:
    specs = []
    for row in table.strip().splitlines():
        name, memory, bandwidth, rate, dtype, fp32, *_ = (part.strip() for part in f"{row} | bf16 | 0".split("|"))
        sizes = float(memory), float(bandwidth), float(rate)
        specs.append(DeviceSpec(name, kind, *sizes, device, dtype, float(fp32) if dtype == "fp16" else None))
    return specs


# Columns: name, memory, bandwidth, dense TFLOPS, and for devices without bf16 their dtype, and the TFLOPS in fp32. The
# TFLOPS of GeForce are half of the data sheet's, which are with fp16 accumulation: with fp32 the rate is half of it.
SPECS = [
    *_parse_specs("consumer", """
        RTX 3060 | 12 | 360 | 25.5
        RTX 3060 Ti | 8 | 448 | 32.4
        RTX 3070 | 8 | 448 | 40.6
        RTX 3070 Ti | 8 | 608 | 43.5
        RTX 3080 | 10 | 760 | 59.5
        RTX 3080 Ti | 12 | 912 | 68.2
        RTX 3090 | 24 | 936 | 71
        RTX 3090 Ti | 24 | 1008 | 80
        RTX 4060 | 8 | 272 | 30.2
        RTX 4060 Ti | 16 | 288 | 44.1
        RTX 4070 | 12 | 504 | 58.3
        RTX 4070 Ti | 12 | 504 | 80.2
        RTX 4070 Ti Super | 16 | 672 | 88.2
        RTX 4080 | 16 | 717 | 97.5
        RTX 4080 Super | 16 | 736 | 104.4
        RTX 4090 | 24 | 1008 | 165.2
        RTX 5060 Ti | 16 | 448 | 47.4
        RTX 5070 | 12 | 672 | 61.7
        RTX 5070 Ti | 16 | 896 | 87.9
        RTX 5080 | 16 | 960 | 112.6
        RTX 5090 | 32 | 1792 | 209.5
        RX 7900 XTX | 24 | 960 | 122.8
    """),
    *_parse_specs("workstation", """
        RTX A4000 | 16 | 448 | 76.7
        RTX A5000 | 24 | 768 | 111.1
        RTX A6000 | 48 | 768 | 154.8
        RTX 4000 Ada | 20 | 360 | 106.9
        RTX 5000 Ada | 32 | 576 | 261.1
        RTX 6000 Ada | 48 | 960 | 364.2
        RTX PRO 6000 Blackwell | 96 | 1792 | 503.8
    """),
    *_parse_specs("data center", """
        T4 | 15 | 320 | 65 | fp16 | 8.1
        V100 16GB | 16 | 900 | 125 | fp16 | 15.7
        V100 32GB | 32 | 900 | 125 | fp16 | 15.7
        A10 | 22.5 | 600 | 125
        A10G | 22.5 | 600 | 70
        A30 | 24 | 933 | 165
        L4 | 22.5 | 300 | 121
        L40 | 45 | 864 | 181
        L40S | 45 | 864 | 362
        A100 40GB | 40 | 1555 | 312
        A100 80GB | 80 | 2039 | 312
        H100 PCIe | 80 | 2000 | 756
        H100 SXM | 80 | 3350 | 989
        H200 | 141 | 4800 | 989
        B200 | 180 | 8000 | 2250
        MI210 | 64 | 1638 | 181
        MI300X | 192 | 5300 | 1307
    """),
    *_parse_specs("Apple", """
        M1 | 16 | 68 | 2.6 | fp32
        M1 Max | 32 | 400 | 10.4 | fp32
        M2 | 24 | 100 | 3.6 | fp32
        M2 Ultra | 192 | 800 | 27.2 | fp32
        M3 Max | 64 | 400 | 14.2 | fp32
        M4 | 32 | 120 | 4.3 | fp32
        M4 Max | 64 | 546 | 17.2 | fp32
    """, "mps"),
    *_parse_specs("CPU", """
        CPU 8 cores AVX2 | 32 | 60 | 0.6 | fp32
        CPU 16 cores AVX512-BF16 | 64 | 80 | 3.2
        CPU 32 cores AMX | 256 | 300 | 30
    """, "cpu"),
]  # fmt: skip


def find_spec(name: str) -> DeviceSpec:
    """Return the device of this name, in any spelling ("rtx4090", "NVIDIA GeForce RTX 4090")."""
    key = _normalize(name)
    specs = {_normalize(spec.name): spec for spec in SPECS}
    if key in specs:
        return specs[key]
    words = _split(name)  # "A100" also means "A100 40GB", but "RTX 409" not "RTX 4090", and "RTX" no GPU
    if re.search(r"\d", key) and (longer := [spec for spec in SPECS if _split(spec.name)[: len(words)] == words]):
        return min(longer, key=lambda spec: (len(spec.name), spec.memory_gb))
    if (matched := match_driver_name(name)) is not None:
        return matched
    similar = difflib.get_close_matches(key, specs, n=1, cutoff=0.5)
    hint = f" (did you mean {specs[similar[0]].name}?)" if similar else ""
    likely = [specs[near] for near in difflib.get_close_matches(key, specs, n=MAX_SUGGESTED, cutoff=0.4)] or SPECS
    names = ", ".join(spec.name for spec in likely[:MAX_SUGGESTED])
    fix = f"choose a GPU such as {names}; or give --memory 24GB and --device cuda"
    raise RecipeError(f"--gpu {shlex.quote(name)}: not in the table{hint}", fix=fix)


def match_driver_name(name: str) -> DeviceSpec | None:
    """Return the GPU that a driver calls `name` ("NVIDIA A100-SXM4-80GB, 81920 MiB"), or None if it is unknown."""
    # All words of the table's name must be in the driver's name, and _VARIANTS of the driver's name in the table's.
    words = set(re.findall(r"[a-z0-9]+", name.partition(",")[0].lower()))
    table = {spec: set(spec.name.lower().replace(" sxm", "").split()) for spec in SPECS if spec.device == "cuda"}
    matching = [spec for spec, names in table.items() if names <= words and not (_VARIANTS & words) - names]
    return max(matching, key=lambda spec: len(table[spec]), default=None)


def _normalize(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _without_vendor(name))


def _without_vendor(name: str) -> str:
    return re.sub(r"nvidia|geforce|amd|radeon|apple|tesla|instinct", "", name.lower())


def _split(name: str) -> list[str]:
    """Return the runs of letters and of digits in a name."""
    return re.findall(r"[a-z]+|\d+", _without_vendor(name))


@dataclass(frozen=True)
class TargetMachine:
    machine: Machine  # with the memory size to plan for
    device: str  # for a recipe whose device is auto
    dtype: tuple[str, str]  # name and reason, for a recipe whose dtype is auto
    rate_of: Callable[[str], Rate]  # returns the device's speed in a dtype
    host_bytes: int | None = None  # free memory of a GPU's host; None: unknown, or not a GPU

    def with_limit(self, memory: int) -> TargetMachine:
        """Return this machine with another limit of host memory in bytes."""
        machine = replace(self.machine, memory_bytes=memory, free_bytes=max(0, memory - PROCESS_BYTES))
        return replace(self, machine=machine)


def find_target(device: str, memory: int | None = None, gpu: str | None = None) -> TargetMachine:
    """Return the machine to plan for. Of host memory, Python and its libraries take PROCESS_BYTES before a model."""
    machine = probe()
    if gpu is not None:
        return _make_target(machine, find_spec(gpu), memory)
    kind, _, number = device.partition(":")
    if kind == "auto":
        kind = "cuda" if machine.gpus and memory is None else "cpu"
    if kind == "cuda":
        if not machine.gpus and memory is None:
            raise RecipeError("--device cuda: this machine has no GPU", fix="give --gpu NAME, or --memory SIZE")
        index = min(int(number or 0), max(0, len(machine.gpus) - 1))
        spec = match_driver_name(machine.gpus[index]) if machine.gpus else None
        if spec is None and machine.gpus:
            capability = compute_capability(index)
            spec = UNKNOWN if capability is None else replace(UNKNOWN, dtype=gpu_dtype(capability)[0])
        return _make_target(machine, spec or UNKNOWN, memory, gpus=machine.gpus if memory is None else ())
    if memory is not None:
        machine = replace(machine, memory_bytes=memory, free_bytes=memory)
    machine = replace(machine, free_bytes=max(0, machine.free_bytes - PROCESS_BYTES))
    rates, precision = load_rates(machine, "cpu"), load_precision(machine) if is_installed("torch") else None
    if kind == "mps":
        typical = DeviceSpec("like a typical Apple GPU in the table", UNKNOWN.kind, 0, 200, 4, "mps", "fp32")
        rate = typical.rate_of("fp32")
        return TargetMachine(machine, kind, ("fp32", "bf16 is not reliable on every MPS release"), lambda _: rate)
    why = "estimated from the CPU's instructions; a run or `strop doctor` measures it while no other program runs"
    expected = machine.expected_dtype, why
    return TargetMachine(machine, "cpu", precision or expected, partial(Rate.of_cpu, machine, rates))


def rates_of(machine: Machine, device: str) -> Callable[[str], Rate] | None:
    """Return a function of the dtype that returns the speed of a CPU or a CUDA GPU, or None for another device."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return partial(Rate.of_cpu, machine, load_rates(machine, "cpu"))
    if kind != "cuda":
        return None
    index = min(int(number or 0), max(0, len(machine.gpus) - 1))
    return ((match_driver_name(machine.gpus[index]) if machine.gpus else None) or UNKNOWN).rate_of


def _make_target(machine: Machine, spec: DeviceSpec, memory: int | None, gpus: tuple[str, ...] = ()) -> TargetMachine:
    size = memory or int(spec.memory_gb * (1 << 30))
    reasons = {"bf16": "the GPU computes in bf16", "fp16": "the GPU has no bf16", "fp32": "it has no fast 16-bit type"}
    dtype = spec.dtype, reasons[spec.dtype]
    if spec.device != "cuda":
        machine = replace(machine, memory_bytes=size, free_bytes=max(0, size - PROCESS_BYTES), gpus=())
    else:
        machine = replace(machine, gpus=gpus or (f"{spec.name}, {size >> 20} MiB",))
    return TargetMachine(machine, spec.device, dtype, spec.rate_of, machine.free_bytes if gpus else None)
