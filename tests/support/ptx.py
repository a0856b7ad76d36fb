"""The kernels for cards as Triton compiles them for an architecture, without a card: what each reads, writes and needs.

    python -m tests.support.ptx 90 120        prints JSON: {"90": {kernel: {...}}, ...}, with variants for the first

Each operation is called on tensors that are not there (`meta`), in the shapes of an 8B Llama or as `SHAPES` says, so
that Triton sees the types and divisors that it sees in a run.
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
from strop.engine.kernels.cuda import elementwise as loss
from strop.engine.kernels.cuda import rope as heads
from strop.engine.train.attention import Heads
from strop.engine.train.dropout import Dropped
from strop.engine.train.norms import Norm

OPS: Any = eager
T = 2048
H, INNER, V, DTYPE = 4096, 14336, 128256, torch.bfloat16


class Driver:
    """A card of an architecture that nothing is started on."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def nothing(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def turned(normed: bool) -> tuple[Heads, Tensor, Tensor, Tensor]:
    norm = Norm(OPS, nothing(128), 1e-6, 0.0) if normed else None
    shape = Heads(OPS, 32, 8, 128, 1.0, 0, 0.0, norm, norm)
    return shape, nothing(T, 48 * 128), nothing(T, 64, dtype=torch.float32), nothing(T, 64, dtype=torch.float32)


def turn(normed: bool) -> None:
    shape, qkv, cos, sin = turned(normed)
    heads.turn(qkv, shape, cos, sin)


def turn_backward(normed: bool) -> None:
    shape, qkv, cos, sin = turned(normed)
    grads = nothing(T, 32, 128), nothing(T, 8, 128), nothing(T, 8, 128)
    heads.turn_backward(grads, qkv, shape, cos, sin)


def turn_aside(back: bool) -> None:
    shape, qkv, cos, sin = turned(False)
    rope.turned(back, qkv, shape, cos, sin, True, None)


def four_bit() -> None:
    constants, levels, scale = (nothing(n, dtype=kind) for n, kind in (
        (H * H // 64, torch.uint8), (256, torch.float32), (H * H // 64 // 256, torch.float32)))  # fmt: skip
    nested = dequantize.Nested(levels, scale, 256, 0.1)
    code = nothing(16, dtype=torch.float32)
    dequantize.four_bit(nothing(H * H // 2, dtype=torch.uint8), code, constants, 64, nested, nothing(H, H))


def dropped() -> Dropped:
    return Dropped(1, 2**32 - T, nothing(T, dtype=torch.int64), (1, T, 3), (6554, 6554, 6554))


OPERATIONS: dict[str, Callable[[], object]] = {
    "norm": lambda: elementwise.rms_norm(nothing(T, H), nothing(H), 1e-5, 0.0),
    "norm, of 576": lambda: elementwise.rms_norm(nothing(T, 576), nothing(576), 1e-5, 0.0),
    "norm backward": lambda: elementwise.rms_norm_backward(nothing(T, H), nothing(T, H), nothing(H), 1e-5, 0.0),
    "glu": lambda: elementwise.glu(nothing(T, 2 * INNER), "silu"),
    "glu backward": lambda: elementwise.glu_backward(nothing(T, INNER), nothing(T, 2 * INNER), "silu"),
    "glu backward, gelu": lambda: elementwise.glu_backward(nothing(T, INNER), nothing(T, 2 * INNER), "gelu_pytorch_tanh"),
    "gains": lambda: elementwise.scale_columns_(nothing(T, H), nothing(H, dtype=torch.float32)),
    "gains, back": lambda: elementwise.scale_columns_backward(nothing(T, H), nothing(T, H), nothing(H, dtype=torch.float32)),
    "cross entropy": lambda: loss.cross_entropy_(
        nothing(T, V), nothing(T, dtype=torch.int64), nothing(T, dtype=torch.float32), 0.0, True
    ),
    "turn": lambda: turn(True),
    "turn, no norms": lambda: turn(False),
    "turn backward": lambda: turn_backward(True),
    "turn backward, no norms": lambda: turn_backward(False),
    "turn aside": lambda: turn_aside(False),
    "turn aside, back": lambda: turn_aside(True),
    "spread": lambda: dropout.spread(nothing(T, H), dropped()),
    "fold": lambda: dropout.fold(nothing(T, 3 * H), dropped()),
    "four bit": four_bit,
    "eight bit": lambda: dequantize.eight_bit(
        nothing(H, H, dtype=torch.int8), nothing(H, dtype=torch.float32), nothing(H, H)
    ),
}


def compiled(arch: int, operation: Callable[[], object]) -> list[Any]:
    """The kernels that an operation starts."""
    found: list[Any] = []
    run = JITFunction.run
    triton.runtime.driver.set_active(Driver(arch))
    JITFunction.run = lambda self, *args, **known: found.append(run(self, *args, **{**known, "warmup": True}))
    try:
        operation()
    finally:
        JITFunction.run = run
    return found


def about(kernel: Any) -> dict[str, Any]:
    """Accesses of global memory by kind, and registers, stack (what is spilled lies there), shared memory in bytes."""
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
    """How often an operation is compiled for one row, for 7 and for 2,048."""
    global T
    made = set()
    for rows_at_once in (1, 7, 2048):
        T = rows_at_once
        made |= {kernel.hash for kernel in compiled(arch, operation)}
    return len(made)


def main() -> None:
    found: dict[str, dict[str, Any]] = {}
    for arch in sys.argv[1:]:
        asked = {name: operation for name, operation in OPERATIONS.items() if arch == sys.argv[1] or "," not in name}
        kernels = {name: compiled(int(arch), operation) for name, operation in asked.items()}
        found[arch] = {name: about(kernel) for name, (kernel,) in kernels.items()}
    for name, known in found[sys.argv[1]].items():
        known["variants"] = variants(int(sys.argv[1]), OPERATIONS[name])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
