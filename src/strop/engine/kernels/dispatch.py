"""Choose the kernels of a device: the one module that imports engine.kernels.cpu and engine.kernels.cuda."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels import eager
from strop.engine.kernels.protocols import CpuOps, FrozenMatmul, LoraOps, Ops, apply
from strop.engine.kernels.warmup import DECODE, TRAIN, compile_once
from strop.engine.train import dropout, lora
from strop.engine.train.attention import ApplyRope, Attention, Heads
from strop.engine.train.dropout import DropoutOps
from strop.engine.train.linear import FusedLinear
from strop.engine.train.packing import Documents
from strop.machine.probe import TILED_RANK, probe
from strop.models.quantize import set_dequantize_kernels

# Which CPU kernels to compile ahead of time: those that most models need, all, or those of int8 matmuls.
USUAL, ALL, INTEGERS = "usual", "all", "integers"
AttentionFunction = Callable[[Tensor, Heads, Tensor, Tensor, Documents], Tensor]


@dataclass(frozen=True)
class Backend:
    """The kernels of a device.

    Attributes:
        ops: the element-wise operations.
        cpu_ops: further element-wise operations, on a CPU only.
        gpu: the device is not a CPU.
        tiles: a CPU with AVX512-BF16, which has matmuls for compiled kernels.
        triton: a GPU with Triton kernels.
        why_no_triton: why a GPU has none, in one line; empty if it has them.
        int8: cpu.int8_matmul.Int8Matmul if frozen weights are multiplied in 8-bit integers, else None.
    """

    ops: Ops
    cpu_ops: CpuOps | None = None
    gpu: bool = False
    tiles: bool = False
    triton: bool = False
    why_no_triton: str = ""
    int8: Any = None

    def has_tiled_attention(self, size: int) -> bool:
        """Return whether heads of this size use the tiled CPU attention."""
        return self.tiles and probe().has_tiled_attention(size)

    def attention(self, size: int) -> AttentionFunction:
        """Return attention for heads of this size: (qkv (T, all), heads, cos, sin (T, m), documents) -> (T, query)."""
        if self.gpu:
            from strop.engine.kernels.cuda.attention import attention_on_gpu

            if not self.triton:
                return attention_on_gpu
            from strop.engine.kernels.cuda import rope

            return partial(attention_on_gpu, rope=cast(Any, rope))
        if self.has_tiled_attention(size):
            from strop.engine.kernels.cpu.attention import TiledAttention  # importing it starts threads

            return partial(apply, TiledAttention)
        return partial(apply, Attention)

    def rope(self) -> type[Function]:
        """Return the rotary embedding as a separate operation, for models whose attention cannot include it."""
        if self.cpu_ops is not None:
            from strop.engine.kernels.cpu import elementwise  # importing it starts threads

            return elementwise.ApplyRope
        if not self.triton:
            return ApplyRope
        from strop.engine.kernels.cuda import rope

        return rope.ApplyRope

    def lora(self, sizes: Sequence[int]) -> Callable[[Sequence[Tensor]], LoraOps]:
        """Return what chooses the operations of adapters (A_1, B_1, A_2, ...) on layers of these in- and outputs."""
        if not self.tiles or any(size % 32 for size in sizes):
            return lambda adapters: cast(LoraOps, lora)
        from strop.engine.kernels.cpu import lora as lora_tiles  # importing it starts threads

        return lambda adapters: cast(LoraOps, lora if any(len(a) > TILED_RANK for a in adapters[::2]) else lora_tiles)

    def matmul(self, sizes: Sequence[int]) -> FrozenMatmul:
        """Return the matmul of frozen linear layers with these in- and outputs."""
        if self.int8 is not None:
            return cast(FrozenMatmul, self.int8.layer)
        if not self.tiles or not probe().has_bf16_matmul(sizes):
            return lora.frozen_matmul
        from strop.engine.kernels.cpu import bf16_matmul  # importing it starts threads

        return bf16_matmul.matmul

    def head_matmul(self, weight: Tensor) -> FrozenMatmul:
        """Return the matmul of the output embedding (V, h)."""
        return self.matmul(weight.shape) if self.int8 is None else self.int8.head(weight)

    def weight_loader(
        self, weight: Callable[[], Tensor], int8: Callable[[], tuple[Tensor, Tensor] | None]
    ) -> Callable[[], Any]:
        """Return a function that gives a frozen weight (n, k) in the form that `matmul` takes.

        int8: returns int8 (n, k) and scale (n,), or None if the weight is not stored in 8 bits.
        """
        if self.int8 is None:
            return weight
        from strop.engine.kernels.cpu.int8_matmul import Int8Weight

        stored = int8()
        if stored is None:
            return cache(lambda: Int8Weight.of(weight()))
        quantized = Int8Weight(stored[0], None, stored[1])
        return lambda: quantized

    def host_memory(self, device: torch.device) -> Any:
        """Return a cuda.offload.HostMemory, where inputs of checkpointed layers wait for the backward."""
        from strop.engine.kernels.cuda.offload import HostMemory

        return HostMemory(device)

    def prepare_adapters(self, linears: Sequence[FusedLinear], dtype: torch.dtype) -> None:
        """Prepare the adapters of these layers for a micro-batch: on a GPU, cast all of them at once."""
        if self.gpu:
            from strop.engine.kernels.cuda.lora import prepare_adapters

            prepare_adapters(linears, dtype)


def dropout_ops_for(x: Tensor) -> DropoutOps:
    """Return the dropout operations for a tensor like x; all of them generate the same masks."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        from strop.engine.kernels.cpu import dropout as cpu_dropout  # importing it starts threads

        return cast(DropoutOps, cpu_dropout)
    if why_no_triton(x.device, x.dtype) is None:
        from strop.engine.kernels.cuda import dropout as cuda_dropout

        return cast(DropoutOps, cuda_dropout)
    return cast(DropoutOps, dropout)


def why_no_triton(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Return why a device computes this dtype without Triton kernels, in one line; None if it has them."""
    if device.type != "cuda" or dtype == torch.float64:
        return "no kernels are made for it"
    from strop.engine.kernels.cuda.available import triton_error

    index = torch.cuda.current_device() if device.index is None else device.index
    return triton_error(torch.device("cuda", index))


def _dequantize_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """Return cuda.dequantize, the kernels that dequantize weights to this dtype; None without Triton kernels."""
    if why_no_triton(device, dtype) is not None:
        return None
    from strop.engine.kernels.cuda import dequantize

    return dequantize


set_dequantize_kernels(_dequantize_kernels)  # models are below the engine and do not import it


def backend_for(device: torch.device, dtype: torch.dtype, *, warm: str = USUAL, integers: bool = False) -> Backend:
    """Return the kernels of a device: compiled ones on a CPU, Triton's on a GPU, else PyTorch's operations.

    Args:
        warm: which CPU kernels to compile ahead of time, in another process (warmup.py): USUAL, ALL, or "" for none.
        integers: multiply frozen weights in 8-bit integers, on a CPU in fp32.
    """
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        from strop.engine.kernels.cpu import elementwise  # importing it starts threads

        if warm:
            compile_once(dtype, elementwise.cache_folder(), TRAIN, [warm], ("attention", "matmuls"))
        int8 = None
        if integers:
            if warm:
                compile_once(dtype, elementwise.cache_folder(), TRAIN, [INTEGERS])
            from strop.engine.kernels.cpu.int8_matmul import Int8Matmul

            int8 = Int8Matmul()
        tiles = dtype == torch.bfloat16 and probe().has_avx512_bf16
        return Backend(cast(Ops, elementwise), cast(CpuOps, elementwise), tiles=tiles, int8=int8)
    if device.type == "cuda":
        from strop.engine.kernels.cuda.attention import activate_flash3

        activate_flash3(device)
        reason = why_no_triton(device, dtype)
        if reason is not None:
            return Backend(cast(Ops, eager), gpu=True, why_no_triton=reason)
        from strop.engine.kernels.cuda import elementwise as cuda_elementwise

        return Backend(cast(Ops, cuda_elementwise), gpu=True, triton=True)
    return Backend(cast(Ops, eager), gpu=device.type != "cpu")


def frozen_flops(dtype: torch.dtype) -> float:
    """Measure the FLOP/s of the fast step's matmuls of frozen weights on this CPU."""
    from strop.engine.kernels.cpu.precision import SHAPES, rate

    sizes = [size for shape in SHAPES for size in shape]
    return rate(dtype, "cpu", backend_for(torch.device("cpu"), dtype).matmul(sizes))


def int8_flops() -> dict[str, float]:
    """Measure the FLOP/s of matmuls in 8-bit integers, by how the weight is stored; empty if the CPU has none."""
    if not probe().has_int8_dot:
        return {}
    from strop.engine.kernels.cpu.int8_matmul import Int8Weight
    from strop.engine.kernels.cpu.precision import rate

    matmul = backend_for(torch.device("cpu"), torch.float32, integers=True).matmul([])
    storage: dict[str, Callable[[Tensor], Any]] = {
        "none": Int8Weight.of,
        "int8": lambda weight: Int8Weight(weight.to(torch.int8), None, weight[:, 0].contiguous()),
    }
    return {name: rate(torch.float32, "cpu", matmul, store) for name, store in storage.items()}


def decode_kernels(dtype: torch.dtype | None = None) -> Any:
    """Return cpu.decode_layer, the kernels of decoding on a CPU.

    dtype: compile those for weights of this dtype ahead of time, in another process (warmup.py).
    """
    from strop.engine.kernels.cpu import decode_layer, elementwise  # importing them starts threads

    if dtype is not None:
        compile_once(dtype, elementwise.cache_folder(), DECODE, parts=("matmuls", "attention"), whole=True)
    return decode_layer


def argmax_kernels() -> Any:
    """Return cpu.sampling with the kernels that find the most likely token without the whole head."""
    from strop.engine.kernels.cpu import sampling  # importing it starts threads

    return sampling


def likeliest(logits: Any) -> tuple[Any, Any]:
    """Return each row's first greatest logit's index (P,), and whether the row is valid (P,).

    logits (P, n): NumPy fp32. A row is valid if it has no NaN, no +infinity, and a finite logit.
    """
    from strop.engine.kernels.cpu import sampling

    indices, finite = np.empty(len(logits), np.int64), np.empty(len(logits), np.bool_)
    sampling.argmax_rows(logits, indices, finite)
    return indices, finite


def token_logprobs(logits: Any, tokens: Any) -> Any:
    """Return the log-probability of one token of each row (P,) fp64; logits (P, n): NumPy fp32, tokens (P,)."""
    from strop.engine.kernels.cpu import sampling

    logprobs = np.empty(len(logits), np.float64)
    sampling.token_logprobs(logits, tokens, logprobs)
    return logprobs


def sample_token(logits: Any, temperature: float, top_k: int, top_p: float, u: float) -> int:
    """Sample a token of logits (n,), NumPy fp32; u: a random number from [0, 1). See cpu.sampling.sample."""
    from strop.engine.kernels.cpu import sampling

    return int(sampling.sample(logits, temperature, top_k, top_p, u))
