"""The machine that a plan is for: this machine, a size of memory, or a GPU by name, and how fast it is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from strop.errors import RecipeError
from strop.machine.doctor import is_installed
from strop.machine.probe import Machine, compute_capability, probe
from strop.machine.rates import load_precision, load_rates
from strop.planning.time import CORE_FP32, GUESS, Rate, has_bf16

MIN_BF16_CAPABILITY = 8.0  # CUDA compute capability of the first GPUs with bf16 (Ampere)
# Words that make a GPU of the same number a different model.
_VARIANTS = {"ti", "super", "laptop", "mobile", "max", "sff", "d", "xt", "nvl"}


@dataclass(frozen=True)
class DeviceSpec:
    """A GPU, Apple chip or CPU by its maker's data sheet."""

    name: str
    kind: str  # consumer, workstation, data center, Apple, CPU, or unknown
    memory_gb: float  # memory in GiB, as makers count it; shared with the system on Apple chips and CPUs
    bandwidth_gbs: float  # memory bandwidth in GB/s (10^9 bytes)
    tflops: float  # dense matmul rate with fp32 accumulation, in bf16, or in fp32 if `bf16` is False
    device: str = "cuda"  # device of the recipe (cuda, mps or cpu)
    bf16: bool = True

    @property
    def rate(self) -> Rate:
        source = f"data sheet of {self.name}" if self.kind != UNKNOWN.kind else f"a guess: {self.name}"
        return Rate(self.tflops * 1e12, self.bandwidth_gbs * 1e9, source, peak=True)


UNKNOWN = DeviceSpec("a GPU that is not in the table", "unknown", 0, 500, 60)


def _specs(kind: str, table: str, device: str = "cuda") -> list[DeviceSpec]:
    specs = []
    for row in table.strip().splitlines():
        name, memory, bandwidth, rate, *rest = (part.strip() for part in row.split("|"))
        specs.append(DeviceSpec(name, kind, float(memory), float(bandwidth), float(rate), device, "fp32" not in rest))
    return specs


# GeForce GPUs run at half their rate with fp32 accumulation; the table has that half.
SPECS = [
    *_specs("consumer", """
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
    *_specs("workstation", """
        RTX A4000 | 16 | 448 | 76.7
        RTX A5000 | 24 | 768 | 111.1
        RTX A6000 | 48 | 768 | 154.8
        RTX 4000 Ada | 20 | 360 | 106.9
        RTX 5000 Ada | 32 | 576 | 261.1
        RTX 6000 Ada | 48 | 960 | 364.2
        RTX PRO 6000 Blackwell | 96 | 1792 | 503.8
    """),
    *_specs("data center", """
        T4 | 16 | 320 | 8.1 | fp32
        V100 16GB | 16 | 900 | 15.7 | fp32
        V100 32GB | 32 | 900 | 15.7 | fp32
        A10 | 24 | 600 | 125
        A10G | 24 | 600 | 70
        A30 | 24 | 933 | 165
        L4 | 24 | 300 | 121
        L40 | 48 | 864 | 181
        L40S | 48 | 864 | 362
        A100 40GB | 40 | 1555 | 312
        A100 80GB | 80 | 2039 | 312
        H100 PCIe | 80 | 2000 | 756
        H100 SXM | 80 | 3350 | 989
        H200 | 141 | 4800 | 989
        B200 | 180 | 8000 | 2250
        MI210 | 64 | 1638 | 181
        MI300X | 192 | 5300 | 1307
    """),
    *_specs("Apple", """
        M1 | 16 | 68 | 2.6 | fp32
        M1 Max | 32 | 400 | 10.4 | fp32
        M2 | 24 | 100 | 3.6 | fp32
        M2 Ultra | 192 | 800 | 27.2 | fp32
        M3 Max | 64 | 400 | 14.2 | fp32
        M4 | 32 | 120 | 4.3 | fp32
        M4 Max | 64 | 546 | 17.2 | fp32
    """, "mps"),
    *_specs("CPU", """
        CPU 8 cores AVX2 | 32 | 60 | 0.6 | fp32
        CPU 16 cores AVX512-BF16 | 64 | 80 | 3.2
        CPU 32 cores AMX | 256 | 300 | 30
    """, "cpu"),
]  # fmt: skip


def find_spec(name: str) -> DeviceSpec:
    """Return the device of this name, in any spelling ("rtx4090", "NVIDIA GeForce RTX 4090")."""
    normalized_name = _normalized(name)
    by_name = {_normalized(spec.name): spec for spec in SPECS}
    if normalized_name in by_name:
        return by_name[normalized_name]
    longer = [spec for key, spec in by_name.items() if normalized_name and key.startswith(normalized_name)]
    if longer:
        return min(longer, key=lambda spec: (len(spec.name), spec.memory_gb))
    matched = match_driver_name(name)
    if matched is not None:
        return matched
    near = difflib.get_close_matches(normalized_name, by_name, n=1, cutoff=0.5)
    hint = f" (did you mean {by_name[near[0]].name}?)" if near else ""
    known = ", ".join(spec.name for spec in SPECS)
    fix = f"choose one of {known}; or give --memory and --device"
    raise RecipeError(f"--gpu {name}: not in the table{hint}", fix=fix)


def match_driver_name(name: str) -> DeviceSpec | None:
    """Return the GPU of a driver's name ("NVIDIA A100-SXM4-80GB, 81920 MiB"), or None if it is not in the table."""
    # Every word of the table's name must be in the driver's name. Words such as Ti, Super and Laptop must be in both.
    words = set(re.findall(r"[a-z0-9]+", name.partition(",")[0].lower()))
    table = {spec: set(spec.name.lower().replace(" sxm", "").split()) for spec in SPECS if spec.device == "cuda"}
    matching = [spec for spec, names in table.items() if names <= words and not (_VARIANTS & words) - names]
    return max(matching, key=lambda spec: len(table[spec]), default=None)


def _normalized(name: str) -> str:
    text = re.sub(r"nvidia|geforce|amd|radeon|apple|tesla|instinct", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", text)


@dataclass(frozen=True)
class Target:
    machine: Machine  # facts of the machine, with the memory that counts
    device: str  # device for a recipe that leaves it open
    dtype: tuple[str, str]  # (name, reason) of the compute dtype for a recipe that leaves it open
    rate_of: Callable[[str], Rate]  # returns the speed of the device in a dtype


def target_for(device: str, memory: int | None = None, gpu: str | None = None) -> Target:
    machine = probe()
    if gpu is not None:
        return _target_of_spec(machine, find_spec(gpu), memory)
    kind, _, number = device.partition(":")
    if kind == "auto":
        kind = "cuda" if machine.gpus and memory is None else "cpu"
    if kind == "cuda":
        if not machine.gpus and memory is None:
            raise RecipeError("--device cuda: this machine has no GPU", fix="give --gpu NAME, or --memory SIZE")
        index = min(int(number or 0), max(0, len(machine.gpus) - 1))
        spec = match_driver_name(machine.gpus[index]) if machine.gpus else None
        if spec is None and machine.gpus:
            capability = compute_capability(index) or MIN_BF16_CAPABILITY
            spec = replace(UNKNOWN, bf16=capability >= MIN_BF16_CAPABILITY)
        return _target_of_spec(machine, spec or UNKNOWN, memory, gpus=machine.gpus if memory is None else ())
    if memory is not None:
        machine = replace(machine, memory_bytes=memory, free_bytes=memory)
    rates, precision = load_rates(machine, "cpu"), load_precision(machine) if is_installed("torch") else None
    if kind == "mps":
        rate = Rate(CORE_FP32 * 30, 200e9, "an Apple GPU in the table")
        return Target(machine, kind, ("fp32", "bf16 is not reliable on every MPS release"), lambda _: rate)
    guess = "bf16" if has_bf16(machine) else "fp32", f"guessed from {GUESS}"
    dtype = precision or (guess if rates is None else (rates.dtype, "measured by strop doctor"))
    return Target(machine, "cpu", dtype, partial(Rate.of_cpu, machine, rates))


def _target_of_spec(machine: Machine, spec: DeviceSpec, memory: int | None, gpus: tuple[str, ...] = ()) -> Target:
    size = memory or int(spec.memory_gb * (1 << 30))
    dtype = ("bf16", "the GPU computes in bf16") if spec.bf16 else ("fp32", "the GPU has no fast bf16")
    if spec.device != "cuda":
        machine = replace(machine, memory_bytes=size, free_bytes=size, gpus=())
    else:
        machine = replace(machine, gpus=gpus or (f"{spec.name}, {size >> 20} MiB",))
    return Target(machine, spec.device, dtype, lambda _: spec.rate)
