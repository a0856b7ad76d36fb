"""Compile the Triton kernels for an architecture, without a GPU, and report what each reads, writes and needs.

    python -m tests.support.ptx 90 120        prints JSON: {"90": {kernel: {...}}, ...}, with variants for the first

Each operation is called on tensors without memory (`meta`), with the shapes of an 8B Llama or as given below, so that
Triton sees the types and divisors of a real run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from strop.engine.kernels import eager
from strop.engine.kernels.cuda import dequantize, dropout, elementwise, rope
from strop.engine.train.attention import Heads
from strop.engine.train.dropout import DropoutSpec
from strop.engine.train.norms import Norm

OPS: Any = eager
T = 2048
H, INNER, V, DTYPE = 4096, 14336, 128256, torch.bfloat16


class Driver:
    """A simulated driver for an architecture, which launches nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def meta(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def heads_and_inputs(normed: bool) -> tuple[Heads, Tensor, Tensor, Tensor]:
    norm = Norm(OPS, meta(128), 1e-6, 0.0) if normed else None
    shape = Heads(OPS, 32, 8, 128, 1.0, 0, 0.0, norm, norm)
    return shape, meta(T, 48 * 128), meta(T, 64, dtype=torch.float32), meta(T, 64, dtype=torch.float32)


def rotate(normed: bool) -> None:
    shape, qkv, cos, sin = heads_and_inputs(normed)
    rope.rotate_qk(qkv, shape, cos, sin)


def rotate_backward(normed: bool) -> None:
    shape, qkv, cos, sin = heads_and_inputs(normed)
    grads = meta(T, 32, 128), meta(T, 8, 128), meta(T, 8, 128)
    rope.rotate_qk_backward(grads, qkv, shape, cos, sin)


def separate_rope(backward: bool) -> None:
    shape, qkv, cos, sin = heads_and_inputs(False)
    rope.apply_rope(backward, qkv, shape, cos, sin, True, None)


def four_bit() -> None:
    constants, levels, scale = (meta(n, dtype=kind) for n, kind in (
        (H * H // 64, torch.uint8), (256, torch.float32), (H * H // 64 // 256, torch.float32)))  # fmt: skip
    nested = dequantize.Nested(levels, scale, 256, 0.1)
    code = meta(16, dtype=torch.float32)
    dequantize.four_bit(meta(H * H // 2, dtype=torch.uint8), code, constants, 64, nested, meta(H, H))


def dropout_masks() -> DropoutSpec:
    return DropoutSpec(1, 2**32 - T, meta(T, dtype=torch.int64), (1, T, 3), (6554, 6554, 6554))


OPERATIONS: dict[str, Callable[[], object]] = {
    "norm": lambda: elementwise.rms_norm(meta(T, H), meta(H), 1e-5, 0.0),
    "norm, of 576": lambda: elementwise.rms_norm(meta(T, 576), meta(576), 1e-5, 0.0),
    "norm backward": lambda: elementwise.rms_norm_backward(meta(T, H), meta(T, H), meta(H), 1e-5, 0.0),
    "glu": lambda: elementwise.glu(meta(T, 2 * INNER), "silu"),
    "glu backward": lambda: elementwise.glu_backward(meta(T, INNER), meta(T, 2 * INNER), "silu"),
    "glu backward, gelu": lambda: elementwise.glu_backward(meta(T, INNER), meta(T, 2 * INNER), "gelu_pytorch_tanh"),
    "scale": lambda: elementwise.scale_columns_(meta(T, H), meta(H, dtype=torch.float32)),
    "scale, backward": lambda: elementwise.scale_columns_backward(meta(T, H), meta(T, H), meta(H, dtype=torch.float32)),
    "cross entropy": lambda: elementwise.cross_entropy_(
        meta(T, V), meta(T, dtype=torch.int64), meta(T, dtype=torch.float32), 0.0, True
    ),
    "rotate": lambda: rotate(True),
    "rotate, no norms": lambda: rotate(False),
    "rotate backward": lambda: rotate_backward(True),
    "rotate backward, no norms": lambda: rotate_backward(False),
    "separate rope": lambda: separate_rope(False),
    "separate rope, backward": lambda: separate_rope(True),
    "apply_masks": lambda: dropout.apply_masks(meta(T, H), dropout_masks()),
    "apply_masks_backward": lambda: dropout.apply_masks_backward(meta(T, 3 * H), dropout_masks()),
    "four bit": four_bit,
    "eight bit": lambda: dequantize.eight_bit(meta(H, H, dtype=torch.int8), meta(H, dtype=torch.float32), meta(H, H)),
}


def compiled(arch: int, operation: Callable[[], object]) -> list[Any]:
    """Return the kernels that an operation launches."""
    kernels: list[Any] = []
    run = JITFunction.run
    triton.runtime.driver.set_active(Driver(arch))
    JITFunction.run = lambda self, *args, **options: kernels.append(run(self, *args, **{**options, "warmup": True}))
    try:
        operation()
    finally:
        JITFunction.run = run
    return kernels


def stats(kernel: Any) -> dict[str, Any]:
    """Return accesses of global memory by kind; registers; stack (for spilled registers) and shared memory in bytes."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout)}
    accesses = re.findall(r"\b((?:ld|st)\.global)[\w.:]*?((?:\.v\d)?\.[bsuf]\d+)\b", ptx)
    return {
        "accesses": dict(Counter("".join(access) for access in accesses)),
        "f64": len(re.findall(r"\.f64", ptx)),
        "rounded": len(re.findall(r"cvt\.rn\.bf16", ptx)),
        "warps": kernel.metadata.num_warps,
        **{name.lower(): used[name] for name in ("REG", "STACK", "SHARED", "LOCAL")},
    }


def variants(arch: int, operation: Callable[[], object]) -> int:
    """Return the number of variants that are compiled for 1, 7 and 2,048 rows."""
    global T
    hashes = set()
    for rows_at_once in (1, 7, 2048):
        T = rows_at_once
        hashes |= {kernel.hash for kernel in compiled(arch, operation)}
    return len(hashes)


def main() -> None:
    report: dict[str, dict[str, Any]] = {}
    for arch in sys.argv[1:]:
        operations = {
            name: operation for name, operation in OPERATIONS.items() if arch == sys.argv[1] or "," not in name
        }
        kernels = {name: compiled(int(arch), operation) for name, operation in operations.items()}
        report[arch] = {name: stats(kernel) for name, (kernel,) in kernels.items()}
    for name, kernel in report[sys.argv[1]].items():
        kernel["variants"] = variants(int(sys.argv[1]), OPERATIONS[name])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
