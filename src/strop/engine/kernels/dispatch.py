"""What the step computes with on a device: the one place that reaches engine.cpu and engine.card."""

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
from strop.engine.kernels.compiler import ANSWERS, STEP
from strop.engine.kernels.protocols import FrozenProduct, Loops, LoraProducts, Ops, apply
from strop.engine.train import dropout, lora
from strop.engine.train.attention import ApplyRope, Attention, Heads
from strop.engine.train.dropout import DropoutOps
from strop.engine.train.linear import FusedLinear
from strop.engine.train.packing import Documents
from strop.machine.probe import TILED_RANK, probe
from strop.models.quantize import set_dequantize_kernels

# Which loops of a CPU: those that most models need, every one, or those of products in integers.
USUAL, ALL, INTEGERS = "usual", "all", "integers"
Attend = Callable[[Tensor, Heads, Tensor, Tensor, Documents], Tensor]


@dataclass(frozen=True)
class Processor:
    """ops: the element-wise operations; loops: those that only a CPU has. tiles: a CPU with a bf16 product of its own
    for short loops (AVX512-BF16). kernels: a card with kernels of its own; lacking: why a card has none of them.
    integers: engine.cpu.integers.Products, where frozen weights are multiplied in 8-bit integers."""

    ops: Ops
    loops: Loops | None = None
    card: bool = False
    tiles: bool = False
    kernels: bool = False
    lacking: str = ""
    integers: Any = None

    def tiled(self, size: int) -> bool:
        """Attention of such heads runs in tiles."""
        return self.tiles and probe().has_tiled_attention(size)

    def attention(self, size: int) -> Attend:
        """Attention of heads of this size: qkv (T, all), heads, cos and sin (T, m), documents -> (T, query size)."""
        if self.card:
            from strop.engine.kernels.cuda.attention import on_card

            if not self.kernels:
                return on_card
            from strop.engine.kernels.cuda import heads

            return partial(on_card, turns=cast(Any, heads))
        if self.tiled(size):
            from strop.engine.kernels.cpu.attention import TileAttention  # its import starts threads

            return partial(apply, TileAttention)
        return partial(apply, Attention)

    def aside(self) -> type[Function]:
        """The rotary embedding where attention cannot do it."""
        if self.loops is not None:
            from strop.engine.kernels.cpu import rope as loops  # its import starts threads

            return loops.ApplyRope
        if not self.kernels:
            return ApplyRope
        from strop.engine.kernels.cuda import rope as aside

        return aside.ApplyRope

    def lora(self, sizes: Sequence[int]) -> Callable[[Sequence[Tensor]], LoraProducts]:
        """The products of the adapters (A_1, B_1, A_2, ...) on linear layers with these inputs and outputs."""
        if not self.tiles or any(size % 32 for size in sizes):
            return lambda adapters: cast(LoraProducts, lora)
        from strop.engine.kernels.cpu import lora as lora_tiles  # its import starts threads

        return lambda adapters: cast(
            LoraProducts, lora if any(len(a) > TILED_RANK for a in adapters[::2]) else lora_tiles
        )

    def product(self, sizes: Sequence[int]) -> FrozenProduct:
        """The products of frozen linear layers with these inputs and outputs."""
        if self.integers is not None:
            return cast(FrozenProduct, self.integers.layer)
        if not self.tiles or not probe().has_bf16_matmul(sizes):
            return lora.frozen_matmul
        from strop.engine.kernels.cpu import bf16_matmul  # its import starts threads

        return bf16_matmul.product

    def head_product(self, weight: Tensor) -> FrozenProduct:
        """The same of the head (V, h)."""
        return self.product(weight.shape) if self.integers is None else self.integers.head(weight)

    def held(
        self, weight: Callable[[], Tensor], eight_bit: Callable[[], tuple[Tensor, Tensor] | None]
    ) -> Callable[[], Any]:
        """What gives a frozen weight (n, k) to `product`. eight_bit: gives int8 (n, k) and scale (n,), or None where it
        is held otherwise."""
        if self.integers is None:
            return weight
        from strop.engine.kernels.cpu.int8_matmul import Integers

        found = eight_bit()
        if found is None:
            return cache(lambda: Integers.of(weight()))
        whole = Integers(found[0], None, found[1])
        return lambda: whole

    def host_memory(self, device: torch.device) -> Any:
        """Where inputs of layers that are computed again wait for their backward, of a card."""
        from strop.engine.kernels.cuda.offload import HostMemory

        return HostMemory(device)

    def lay_out(self, linears: Sequence[FusedLinear], dtype: torch.dtype) -> None:
        """In front of a micro-batch, for all linear layers that it goes through: what a card computes of their adapters
        at once."""
        if self.card:
            from strop.engine.kernels.cuda.lora import lay_out

            lay_out(linears, dtype)


def drops_for(x: Tensor) -> DropoutOps:
    """What draws dropout's masks for a tensor like x: the same bits everywhere, by loops or kernels."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        from strop.engine.kernels.cpu import dropout as dropout_loops  # its import starts threads

        return cast(DropoutOps, dropout_loops)
    if kernels_lack(x.device, x.dtype) is None:
        from strop.engine.kernels.cuda import dropout as drops

        return cast(DropoutOps, drops)
    return cast(DropoutOps, dropout)


def kernels_lack(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why a device computes tensors of this type without a card's own kernels; None where it has them."""
    if device.type != "cuda" or dtype == torch.float64:
        return "no kernels are made for it"
    from strop.engine.kernels.cuda.available import why_not

    index = torch.cuda.current_device() if device.index is None else device.index
    return why_not(torch.device("cuda", index))


def _dequantize_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """Return strop.engine.kernels.cuda.dequantize, or None where the GPU's kernels cannot be used."""
    if kernels_lack(device, dtype) is not None:
        return None
    from strop.engine.kernels.cuda import dequantize

    return dequantize


set_dequantize_kernels(_dequantize_kernels)  # models are below the engine and do not import it


def processor_for(device: torch.device, dtype: torch.dtype, *, warm: str = USUAL, integers: bool = False) -> Processor:
    """numba's loops on a CPU, Triton's kernels on a card, else PyTorch's plain operations: the same numbers.

    warm: which loops to have compiled beforehand, in another process (engine.cpu.warm tells why); none where empty.
    integers: multiply frozen weights in 8-bit integers, on a CPU in fp32.
    """
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        from strop.engine.kernels.cpu import elementwise as kernels  # their import starts threads
        from strop.engine.kernels.cpu import norms
        from strop.engine.kernels.cpu.warmup import compile_once

        if warm:
            compile_once(dtype, kernels.cache_folder(), STEP, [warm], ("attention", "products"))
        products = None
        if integers:
            if warm:
                compile_once(dtype, kernels.cache_folder(), STEP, [INTEGERS])
            from strop.engine.kernels.cpu.int8_matmul import Products

            products = Products()
        tiles = dtype == torch.bfloat16 and probe().has_avx512_bf16
        return Processor(cast(Ops, kernels), cast(Loops, norms), tiles=tiles, integers=products)
    if device.type == "cuda":
        from strop.engine.kernels.cuda import flash

        flash.why_not(device)
        lacking = kernels_lack(device, dtype)
        if lacking is not None:
            return Processor(cast(Ops, eager), card=True, lacking=lacking)
        from strop.engine.kernels.cuda import elementwise as own

        return Processor(cast(Ops, own), card=True, kernels=True)
    return Processor(cast(Ops, eager), card=device.type != "cpu")


def save_in_turn() -> None:
    """engine.cpu.warm.save_in_turn, for what compiles loops beside others."""
    from strop.engine.kernels.cpu import warmup as warm

    warm.save_in_turn()


def frozen_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the fast step's products of frozen weights on this CPU."""
    from strop.engine.kernels.cpu.precision import SHAPES, rate

    sizes = [size for shape in SHAPES for size in shape]
    return rate(dtype, "cpu", processor_for(torch.device("cpu"), dtype).product(sizes))


def integer_flops() -> dict[str, float]:
    """The same of products in 8-bit integers, by how the weight is held; nothing where the CPU has none."""
    if not probe().has_int8_dot:
        return {}
    from strop.engine.kernels.cpu.int8_matmul import Integers
    from strop.engine.kernels.cpu.precision import rate

    product = processor_for(torch.device("cpu"), torch.float32, integers=True).product([])
    held: dict[str, Callable[[Tensor], Any]] = {
        "none": Integers.of,
        "int8": lambda weight: Integers(weight.to(torch.int8), None, weight[:, 0].contiguous()),
    }
    return {name: rate(torch.float32, "cpu", product, make) for name, make in held.items()}


def answering_loops(dtype: torch.dtype | None = None) -> Any:
    """engine.cpu.passes: the loops that read and write texts on a CPU. dtype: have those for weights of this type
    compiled beforehand, in another process (engine.cpu.warm tells why)."""
    from strop.engine.kernels.cpu import decode_layer
    from strop.engine.kernels.cpu import elementwise as kernels  # their import starts threads
    from strop.engine.kernels.cpu.warmup import compile_once

    if dtype is not None:
        parts = ("products", "attention")
        compile_once(dtype, kernels.cache_folder(), ANSWERS, parts=parts, joined=True)
    return decode_layer


def screening_loops() -> Any:
    """engine.cpu.screen: the likeliest token without the whole head."""
    from strop.engine.kernels.cpu import exact_argmax  # its import starts threads

    return exact_argmax


def likeliest(logits: Any) -> tuple[Any, Any]:
    """Of each row of logits (P, n), numpy fp32: the place of the greatest (P,), and whether all are numbers (P,)."""
    from strop.engine.kernels.cpu import sampling

    found, finite = np.empty(len(logits), np.int64), np.empty(len(logits), np.bool_)
    sampling.likeliest(logits, found, finite)
    return found, finite


def logprobs_of(logits: Any, tokens: Any) -> Any:
    """The log-probability of one token of each row: logits (P, n), numpy fp32; tokens (P,) -> (P,) fp64."""
    from strop.engine.kernels.cpu import sampling

    found = np.empty(len(logits), np.float64)
    sampling.logprobs_of(logits, tokens, found)
    return found


def draw_token(logits: Any, temperature: float, top_k: int, top_p: float, u: float) -> int:
    """A token of logits (n,), numpy fp32, drawn as engine.cpu.draws says, by u from [0, 1)."""
    from strop.engine.kernels.cpu import sampling

    return int(sampling.draw(logits, temperature, top_k, top_p, u))
