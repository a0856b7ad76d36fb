"""Choose the kernels for a device. Importing engine.kernels.cpu starts threads, so this module does it when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels import eager
from strop.engine.kernels.operations import (
    DORA,
    DROPOUT,
    EFFICIENT,
    EIGHT_BIT,
    FLASH,
    FOUR_BIT,
    GLU,
    LOSS,
    NORM,
    ROPE,
    SINKS,
    TRITON,
)
from strop.engine.kernels.protocols import CpuOps, FrozenMatmul, LoraOps, Ops, apply
from strop.engine.kernels.warmup import DECODE, TRAIN, compile_once
from strop.engine.train import dropout, lora
from strop.engine.train.attention import ApplyRope, Attention, Heads
from strop.engine.train.dropout import DropoutOps
from strop.engine.train.linear import FusedLinear
from strop.engine.train.packing import Documents
from strop.machine.probe import MAX_TILED_RANK, this_cpu
from strop.models.quantize import set_dequantize_kernels

USUAL, ALL, INTEGERS = "usual", "all", "integers"  # CPU kernels of most models, of all models, and of int8 matmuls
AttentionFunction = Callable[[Tensor, Heads, Tensor, Tensor, Documents], Tensor]


@dataclass(frozen=True)
class Backend:
    """The kernels of a device.

    Attributes:
        ops: element-wise operations.
        cpu_ops: more element-wise operations, on CPUs only.
        gpu: whether the device is not a CPU.
        tiles: whether the device is a CPU with the matmuls of cpu/tile.py.
        kernels: the kinds of Triton kernels that the device uses, as in operations.TRITON.
        flash, efficient, sinks: whether a GPU's flash attention and memory-efficient attention work, where they are
            supported, and whether they do with attention sinks.
        failures: which operations a GPU cannot use, and why, in one line, else empty.
        int8: the cpu.int8_matmul.Int8Matmul for frozen weights, or None.
    """

    ops: Ops
    cpu_ops: CpuOps | None = None
    gpu: bool = False
    tiles: bool = False
    kernels: frozenset[str] = frozenset()
    flash: bool = True
    efficient: bool = True
    sinks: bool = True
    failures: str = ""
    int8: Any = None

    def has_tiled_attention(self, size: int) -> bool:
        """Return whether heads of this size use the tiled CPU attention."""
        return self.tiles and this_cpu().has_tiled_attention(size)

    def attention(self, size: int) -> AttentionFunction:
        """Return a function that computes attention for heads of this size, as train.attention.Attention does."""
        if self.gpu:
            from strop.engine.kernels.cuda.attention import attention_on_gpu

            attend = partial(attention_on_gpu, flash=self.flash, efficient=self.efficient, sinks=self.sinks)
            if ROPE not in self.kernels:
                return attend
            from strop.engine.kernels.cuda import rope

            return partial(attend, rope=cast(Any, rope))
        if self.has_tiled_attention(size):
            from strop.engine.kernels.cpu.attention import TiledAttention

            return partial(apply, TiledAttention)
        return partial(apply, Attention)

    def rope(self) -> type[Function]:
        """Return the rotary embedding as a separate operation, as train.attention.ApplyRope."""
        if self.cpu_ops is not None:
            from strop.engine.kernels.cpu import elementwise

            return elementwise.ApplyRope
        if ROPE not in self.kernels:
            return ApplyRope
        from strop.engine.kernels.cuda import rope

        return rope.ApplyRope

    def lora(self, sizes: Sequence[int]) -> Callable[[Sequence[Tensor]], LoraOps]:
        """Return a function that takes adapters (A_1, B_1, A_2, ...) and returns their operations.

        sizes: numbers of inputs and outputs of the layers that have the adapters.
        """
        if not self.tiles or any(size % 32 for size in sizes):
            return lambda adapters: cast(LoraOps, lora)
        from strop.engine.kernels.cpu import lora as lora_tiles

        return lambda adapters: cast(
            LoraOps, lora if any(len(a) > MAX_TILED_RANK for a in adapters[::2]) else lora_tiles
        )

    def matmul(self, sizes: Sequence[int]) -> FrozenMatmul:
        """Return the matmul for frozen linear layers with these numbers of inputs and outputs."""
        if self.int8 is not None:
            return cast(FrozenMatmul, self.int8.layer)
        if not self.tiles or not this_cpu().has_bf16_matmul(sizes):
            return lora.frozen_matmul
        from strop.engine.kernels.cpu import bf16_matmul

        return bf16_matmul.matmul

    def head_matmul(self, weight: Tensor) -> FrozenMatmul:
        """Return the matmul for the output head (V, h)."""
        return self.matmul(weight.shape) if self.int8 is None else self.int8.head(weight)

    def weight_loader(
        self, weight: Callable[[], Tensor], int8: Callable[[], tuple[Tensor, Tensor] | None]
    ) -> Callable[[], Any]:
        """Return a function that returns a frozen weight (n, k) in the format of `matmul`.

        int8: returns an int8 weight (n, k) and its scale (n,), or None if the weight is not stored as int8.
        """
        if self.int8 is None:
            return weight
        from strop.engine.kernels.cpu.int8_matmul import Int8Weight

        stored = int8()
        if stored is None:
            return cache(lambda: Int8Weight.quantize(weight()))
        quantized = Int8Weight(stored[0], None, stored[1])
        return lambda: quantized

    def host_memory(self, device: torch.device) -> Any:
        """Return a cuda.offload.HostMemory, which stores the inputs of checkpointed layers for the backward."""
        from strop.engine.kernels.cuda.offload import HostMemory

        return HostMemory(device)

    def prepare_adapters(self, linears: Sequence[FusedLinear], dtype: torch.dtype) -> None:
        """Prepare the adapters of these layers for a micro-batch, by casting all of them at once on a GPU."""
        if self.gpu:
            from strop.engine.kernels.cuda.lora import prepare_adapters

            prepare_adapters(linears, dtype)


def dropout_ops_for(x: Tensor) -> DropoutOps:
    """Return the dropout operations for the device and dtype of x. All generate the same masks."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        from strop.engine.kernels.cpu import dropout as cpu_dropout

        return cast(DropoutOps, cpu_dropout)
    if DROPOUT in triton_kernels(x.device, x.dtype):
        from strop.engine.kernels.cuda import dropout as cuda_dropout

        return cast(DropoutOps, cuda_dropout)
    return cast(DropoutOps, dropout)


def triton_kernels(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> frozenset[str]:
    """Return the kinds of Triton kernels that work on a device, as in operations.TRITON."""
    if device.type != "cuda" or dtype == torch.float64:
        return frozenset()
    return TRITON - gpu_failures(device).keys()


def gpu_failures(device: torch.device) -> Mapping[str, str]:
    """Return the operations that cannot be used on a GPU, and why: see cuda.selftest."""
    from strop.engine.kernels.cuda import selftest

    index = torch.cuda.current_device() if device.index is None else device.index
    return selftest.find_failures(torch.device("cuda", index))


def describe_gpu_failures(device: torch.device) -> str:
    """Return the failures of a GPU in one line, or an empty string."""
    from strop.engine.kernels.cuda.selftest import describe

    return describe(gpu_failures(device))


def _dequantize_kernels(scheme: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the module cuda.dequantize, or None if its kernel for this scheme cannot be used."""
    if (EIGHT_BIT if scheme == "int8" else FOUR_BIT) not in triton_kernels(device, dtype):
        return None
    from strop.engine.kernels.cuda import dequantize

    return dequantize


def _element_wise_ops(kernels: frozenset[str]) -> Ops:
    """Return the element-wise operations of a GPU: Triton's, and eager ones in place of those that do not work."""
    parts = {NORM: "rms_norm", GLU: "glu", DORA: "scale_columns", LOSS: "cross_entropy"}
    if not kernels & parts.keys():
        return cast(Ops, eager)
    from strop.engine.kernels.cuda import elementwise

    if parts.keys() <= kernels:
        return cast(Ops, elementwise)
    failed = tuple(prefix for kind, prefix in parts.items() if kind not in kernels)
    operations = {name: value for name, value in vars(eager).items() if callable(value)}
    working = {name: getattr(elementwise, name, None) for name in operations if not name.startswith(failed)}
    return cast(Ops, SimpleNamespace(**operations | {name: value for name, value in working.items() if value}))


set_dequantize_kernels(_dequantize_kernels)  # strop.models must not import strop.engine


def backend_for(device: torch.device, dtype: torch.dtype, *, warm: str = USUAL, int8_matmul: bool = False) -> Backend:
    """Return the kernels of a device: numba kernels on a CPU, Triton kernels on a GPU, else PyTorch operations.

    Args:
        warm: which CPU kernels to compile ahead of time in another process: USUAL, ALL, or "" for none.
        int8_matmul: on a CPU in fp32, multiply frozen weights as 8-bit integers.
    """
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        from strop.engine.kernels.cpu import elementwise

        cache_folder, int8 = elementwise.numba_cache_folder(), None
        if warm:
            compile_once(dtype, cache_folder, TRAIN, [warm], ("attention", "matmuls"))
        if int8_matmul:
            if warm:
                compile_once(dtype, cache_folder, TRAIN, [INTEGERS])
            from strop.engine.kernels.cpu.int8_matmul import Int8Matmul

            int8 = Int8Matmul()
        tiles = dtype == torch.bfloat16 and this_cpu().has_avx512_bf16
        return Backend(cast(Ops, elementwise), cast(CpuOps, elementwise), tiles=tiles, int8=int8)
    if device.type == "cuda":
        from strop.engine.kernels.cuda.attention import activate_flash3

        activate_flash3(device)
        kernels = triton_kernels(device, dtype)
        flash, efficient, sinks = (name not in gpu_failures(device) for name in (FLASH, EFFICIENT, SINKS))
        failures = "" if dtype == torch.float64 else describe_gpu_failures(device)
        return Backend(
            _element_wise_ops(kernels), gpu=True, kernels=kernels, flash=flash, efficient=efficient, sinks=sinks,
            failures=failures,
        )  # fmt: skip
    return Backend(cast(Ops, eager), gpu=device.type != "cpu")


def measure_frozen_flops(dtype: torch.dtype) -> float:
    """Measure the FLOP/s of FastLoss's matmuls by frozen weights on this CPU."""
    from strop.engine.kernels.cpu.precision import SHAPES, rate

    sizes = [size for shape in SHAPES for size in shape]
    return rate(dtype, "cpu", backend_for(torch.device("cpu"), dtype).matmul(sizes))


def measure_int8_flops() -> dict[str, float]:
    """Measure the FLOP/s of 8-bit integer matmuls by quantization of the weight. Empty if the CPU has none."""
    if not this_cpu().has_int8_dot:
        return {}
    from strop.engine.kernels.cpu.int8_matmul import Int8Weight
    from strop.engine.kernels.cpu.precision import rate

    matmul = backend_for(torch.device("cpu"), torch.float32, int8_matmul=True).matmul([])
    storage: dict[str, Callable[[Tensor], Any]] = {
        "none": Int8Weight.quantize,
        "int8": lambda weight: Int8Weight(weight.to(torch.int8), None, weight[:, 0].contiguous()),
    }
    return {name: rate(torch.float32, "cpu", matmul, store) for name, store in storage.items()}


def decode_kernels(dtype: torch.dtype | None = None) -> Any:
    """Return the module cpu.decode_layer. dtype: compile the kernels for weights of this dtype ahead of time."""
    from strop.engine.kernels.cpu import decode_layer, elementwise

    if dtype is not None:
        compile_once(dtype, elementwise.numba_cache_folder(), DECODE, parts=("matmuls", "attention"), whole=True)
    return decode_layer


def sampling_kernels() -> Any:
    """Return the module cpu.sampling."""
    from strop.engine.kernels.cpu import sampling

    return sampling


def argmax(logits: Any) -> tuple[Any, Any]:
    """Return the index of the first greatest logit of each row (P,), and whether the row is valid (P,).

    logits: (P, n), NumPy fp32. A valid row has a finite logit and neither NaN nor +infinity.
    """
    indices, valid = np.empty(len(logits), np.int64), np.empty(len(logits), np.bool_)
    sampling_kernels().argmax_rows(logits, indices, valid)
    return indices, valid


def token_logprobs(logits: Any, tokens: Any) -> Any:
    """Return the log-probability of one token per row (P,), fp64. logits: (P, n), NumPy fp32. tokens: (P,)."""
    logprobs = np.empty(len(logits), np.float64)
    sampling_kernels().token_logprobs(logits, tokens, logprobs)
    return logprobs


def sample_token(logits: Any, temperature: float, top_k: int, top_p: float, u: float) -> int:
    """Sample a token from logits (n,), NumPy fp32. Arguments as in cpu.sampling.sample."""
    return int(sampling_kernels().sample(logits, temperature, top_k, top_p, u))
