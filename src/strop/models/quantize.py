"""The frozen base in 4 or 8 bit: quantized weight by weight while loading, kept on disk, given back when needed.

NF4 and FP4 with double quantization (QLoRA, arXiv:2305.14314) and int8 by rows of the weight (absmax / 127) are
bitsandbytes' own functions, and its names on disk, so that checkpoints it has quantized load too. Its Linear4bit is not
used: on a CPU with AVX512-BF16 it repacks its weight in eval mode and gives no gradient from then on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd import Function

from strop.engine.kernels.dispatch import dequantize_kernels
from strop.engine.train.linear import PackedWeight, Quantized
from strop.errors import QuantizerError
from strop.machine.memory import is_out_of_memory
from strop.models.families.shape import SMALLEST

BLOCK, NESTED = 64, 256  # weights that share a constant; constants that share one
BLOCKS = [1 << bits for bits in range(5, 13)]  # sizes that bitsandbytes makes
FOUR_BIT = ("nf4", "fp4")


def _bitsandbytes() -> Any:
    """bitsandbytes.functional. Raises QuantizerError where the package is missing or does not fit this machine."""
    try:
        import bitsandbytes.functional as functional
    except (ImportError, OSError, RuntimeError) as error:
        raise _unusable(error) from None
    return functional


def _unusable(error: Exception) -> QuantizerError:
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    what = f"bitsandbytes, which quantizes, cannot be used here: {said.strip()}"
    return QuantizerError(what, fix="pip install -U bitsandbytes, or --model.quantization none")


@contextmanager
def _native() -> Iterator[None]:
    """Around calls into bitsandbytes' library, which can be imported where it was built for another CUDA and then fails
    in each call. Memory that runs out is another trouble."""
    try:
        yield
    except (RuntimeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise _unusable(error) from error


@cache
def _writes_into() -> bool:
    """Dequantizes into a tensor that is there, on a card: from 0.50 on; before, it refuses each shape
    (bitsandbytes#1953)."""
    return Version(version("bitsandbytes")) >= Version("0.50")


class QuantizedLinear(nn.Linear, Quantized):
    """y = x W^T + b with W frozen in 4 or 8 bit, dequantized for each product and again in the backward.

    weight: the packed bytes. `constants`: tensors by bitsandbytes' names (absmax, nested_absmax, quant_map, ...).
    """

    def __init__(self, like: nn.Linear, scheme: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.scheme, self.dtype = scheme, dtype
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = like.bias
        self.constants: dict[str, Tensor] = {}
        self._offset = torch.empty(0)  # made once: the host waits for each number that it sends to a card

    def fill(self, packed: dict[str, Tensor], sizes: Mapping[str, int] | None = None) -> None:
        """packed: as `pack` gives it. sizes: how many bytes of weight and how many of each constant there are, where
        some of them come later. Raises KeyError or ValueError where it is not whole."""
        weight = packed["weight"]
        if weight.is_floating_point():  # bytes that bitsandbytes was told to store as such numbers (FSDP wants it)
            weight = weight.contiguous().view(torch.uint8).view(-1, 1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.constants = {name: tensor for name, tensor in packed.items() if name != "weight"}
        sizes = {name: tensor.numel() for name, tensor in {**packed, "weight": weight}.items()} | dict(sizes or {})
        if self.scheme in FOUR_BIT:
            self._described = json.loads(bytes(self.constants.pop(_described(self.scheme)).tolist()))
            if not isinstance(self._described, dict):
                raise ValueError("its description is no object")
            if tuple(self._described["shape"]) != (self.out_features, self.in_features):
                raise ValueError(f"shape {self._described['shape']}")
        for name, size in self._sizes().items():
            if sizes.get(name) != size:
                raise ValueError(f"{name} has {sizes.get(name, 0)} numbers, {size} expected")
        if self.scheme in FOUR_BIT and "nested_offset" in self._described:
            self._offset = torch.tensor(self._described["nested_offset"], device=self.weight.device)

    def _sizes(self) -> dict[str, int]:
        """How many bytes of weight, and how many of each constant, belong to it."""
        numbers = self.in_features * self.out_features
        if self.scheme == "int8":
            return {"weight": numbers, "SCB": self.out_features}
        block, nested = self._described["blocksize"], self._described.get("nested_blocksize")  # of the constants' own
        if block not in BLOCKS or nested not in (None, *BLOCKS):
            raise ValueError(f"blocks of {block} and {nested}")
        blocks = -(-numbers // block)
        sizes = {"weight": -(-numbers // 2), "absmax": blocks, "quant_map": 16}
        if nested is not None:
            sizes |= {"nested_absmax": -(-blocks // nested), "nested_quant_map": 256}
        return sizes

    def dequantized(self, out: Tensor | None = None) -> Tensor:
        """The weight (out, in) in `dtype`; in `out`, where it is given and of this type."""
        if out is not None and (out.dtype != self.dtype or not out.is_contiguous()):
            return out.copy_(self.dequantized())
        if (kernels := dequantize_kernels(self.weight.device, self.dtype)) is not None:
            return self._unpacked(kernels, out)
        if self.scheme == "int8":
            out = torch.empty(self.weight.shape, dtype=self.dtype, device=self.weight.device) if out is None else out
            return torch.mul(self.weight.data, self._scale()[:, None], out=out)
        bnb, known, about = _bitsandbytes(), self.constants, self._described
        nested, offset = self._nested(bnb)
        # bitsandbytes' AVX512 kernel takes wrong constants where rows are not whole blocks: then all is one row
        whole = self.in_features % about["blocksize"] == 0
        rows = (self.out_features, self.in_features) if whole else (self.out_features * self.in_features,)
        shape = torch.Size(rows)
        state = bnb.QuantState(
            known["absmax"], shape, known["quant_map"], about["blocksize"], self.scheme, self.dtype, offset, nested
        )
        into = out.view(shape) if out is not None and out.device.type == "cuda" and _writes_into() else None
        with _native():
            weight: Tensor = bnb.dequantize_4bit(self.weight.data, state, out=into)
        weight = weight.view(self.out_features, self.in_features)
        return weight if out is None or into is not None else out.copy_(weight)

    def _unpacked(self, kernels: Any, out: Tensor | None) -> Tensor:
        """The same by a card's own kernels (engine.kernels.cuda.dequantize)."""
        known = self.constants
        out = self.weight.new_empty(self.out_features, self.in_features, dtype=self.dtype) if out is None else out
        if self.scheme == "int8":
            return cast(Tensor, kernels.eight_bit(self.weight.data, known["SCB"], out))
        about, nested = self._described, None
        if "nested_absmax" in known:
            levels, scale = known["nested_quant_map"], known["nested_absmax"]
            nested = kernels.Nested(levels, scale, about["nested_blocksize"], about["nested_offset"])
        block = about["blocksize"]
        return cast(Tensor, kernels.four_bit(self.weight.data, known["quant_map"], known["absmax"], block, nested, out))

    @property
    def W_q(self) -> Tensor:
        """By this name peft knows a layer that gives its weight by `dequantize` (HQQ's), which its DoRA asks for."""
        return self.weight

    def dequantize(self) -> Tensor:
        return self.dequantized()

    def packed(self) -> PackedWeight | None:
        """The weight as it is held, its constants in fp32; None where a block of it goes over the end of a row."""
        if self.scheme == "int8":
            return PackedWeight(self.weight.data, self._scale())
        bnb, known, about = _bitsandbytes(), self.constants, self._described
        if self.in_features % about["blocksize"]:
            return None
        nested, offset = self._nested(bnb)
        scale = known["absmax"]
        if nested is not None:
            with _native():
                scale = bnb.dequantize_blockwise(scale, nested) + offset
        return PackedWeight(self.weight.data, scale.float(), known["quant_map"].float(), about["blocksize"])

    def _scale(self) -> Tensor:
        """Of each row, in 8 bit."""
        return self.constants["SCB"] / 127

    def _nested(self, bnb: Any) -> tuple[Any, Tensor | None]:
        """How the constants are quantized themselves, and what is added to them; None, None where they are not."""
        known, about = self.constants, self._described
        if "nested_absmax" not in known:
            return None, None
        nested = bnb.QuantState(
            known["nested_absmax"], None, known["nested_quant_map"], about["nested_blocksize"], dtype=torch.float32
        )
        return nested, self._offset

    def forward(self, x: Tensor) -> Tensor:
        result = self.product(x)
        return result if self.bias is None else result + self.bias

    def product(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x W^T, added to `onto` (.., out) and rounded once."""
        result: Tensor = _Product.apply(x, self, onto)  # type: ignore[no-untyped-call]
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Constants move between devices, and keep their types: `model.to(bfloat16)` must not round them.
        self.constants = {name: tensor.to(fn(tensor).device) for name, tensor in self.constants.items()}
        self._offset = self._offset.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}"


class _Product(Function):
    """x W^T (+ onto), with W given anew in the backward: nothing but the module is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, onto: Tensor | None) -> Tensor:
        ctx.layer = layer
        weight = layer.dequantized().to(x.dtype)
        return F.linear(x, weight) if onto is None else added(onto, x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.layer.dequantized().to(grad.dtype), None, grad if ctx.needs_input_grad[2] else None


def added(onto: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """onto (.., n) + x (.., k) W^T, rounded once."""
    return torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), weight.t()).view(onto.shape)


def pack(weight: Tensor, scheme: str, *, double: bool = True, device: str = "cpu") -> dict[str, Tensor]:
    """A weight (out, in) quantized: `weight` and its constants by bitsandbytes' names. double: the constants too.

    device: a card does it faster, where it has room for the weight (in fp32); the bits are those of the CPU.
    """
    bnb = _bitsandbytes()
    if device.startswith("cuda") and (scheme == "int8" or weight.numel() % BLOCK == 0):
        try:
            return _packed_by_operations(weight, scheme, double, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    if scheme == "int8":
        whole = weight.float() if weight.device.type == "cpu" else weight.half()
        with _native():
            rows, scale, _ = bnb.int8_vectorwise_quant(whole)
        return {"weight": rows, "SCB": scale.float().flatten()}
    with _native():
        packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double, quant_type=scheme)
    return {"weight": packed, **dict(state.as_dict(packed=True))}


def _packed_by_operations(weight: Tensor, scheme: str, double: bool, device: str) -> dict[str, Tensor]:
    """What bitsandbytes makes of a weight on a CPU, by PyTorch's operations on any device, and then on the CPU. (Its
    own kernels for cards divide in another way.)"""
    bnb, whole = _bitsandbytes(), weight.to(device).float()
    if scheme == "int8":
        scale = whole.abs().amax(1)
        return {"weight": torch.round(whole * (127.0 / scale[:, None])).to(torch.int8).cpu(), "SCB": scale.cpu()}
    code = bnb.get_4bit_type(scheme, device="cpu")
    order = torch.argsort(code)
    between = ((code[order[:-1]] + code[order[1:]]) / 2).to(device)
    blocks = whole.view(-1, BLOCK)
    most = blocks.abs().amax(1)
    shares = (blocks * (1.0 / most.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    places = torch.bucketize(shares, between, out_int32=True)
    if scheme == "fp4":
        places = order.to(device, torch.int32)[places]
    two = places.to(torch.uint8).view(-1, 2)
    packed, constants, offset, nested = ((two[:, 0] << 4) | two[:, 1])[:, None].cpu(), most.cpu(), None, None
    if double:
        offset = constants.mean()
        with _native():
            constants, nested = bnb.quantize_blockwise(constants - offset, blocksize=NESTED)
    state = bnb.QuantState(constants, weight.shape, code, BLOCK, scheme, weight.dtype, offset, nested)
    return {"weight": packed, **dict(state.as_dict(packed=True))}


def unpack(packed: dict[str, Tensor], scheme: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight that `pack` quantized, as a model of this type on it sees it."""
    with torch.device("meta"):
        like = nn.Linear(shape[1], shape[0], bias=False)
    layer = QuantizedLinear(like, scheme, dtype)
    layer.fill(packed)
    return layer.dequantized()


def _described(scheme: str) -> str:
    return f"quant_state.bitsandbytes__{scheme}"


def why_not(name: str, module: nn.Linear, head: nn.Module | None, apart: Sequence[str] = ()) -> str | None:
    """Why a linear layer stays in 16 bit; None where it is quantized. apart: as `passed_by` gives it."""
    if module is head or name.rpartition(".")[2] == "lm_head":
        return "output head"
    if name.rpartition(".")[2] in apart:
        return "read by the model itself"
    if module.in_features * module.out_features < SMALLEST:
        return "small"
    return None


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is y = x W^T + b and no more: of a subclass with a forward of its own, by what it makes of a row
    (Falcon's is one, DeepSeek V4's product by groups is none)."""
    if not isinstance(module, nn.Linear) or type(module).forward in (nn.Linear.forward, QuantizedLinear.forward):
        return isinstance(module, nn.Linear)
    row = torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            made = module(row)
        return isinstance(made, Tensor) and tuple(made.shape) == (1, module.out_features)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False


# Leaves whose weight the model reads itself: an adapter would be passed by, and a quantized weight not understood. peft
# refuses the first two of some; in Bamba, Granite 4 and Zamba 2 fused kernels read them, where they are installed.
FUSED = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h", "bamba", "granitemoehybrid", "zamba2")
STEPPED = ("mamba", "falcon_mamba", "jamba", "zamba")


def passed_by(model: Any) -> tuple[str, ...]:
    """The names of linear layers whose weight the model reads itself."""
    kind = model.config.get_text_config().model_type
    return (*(("out_proj", "conv1d") if kind in FUSED else ()), *(("dt_proj",) if kind in STEPPED else ()))


def quantizable(model: Any) -> set[str]:
    """The weights that are quantized, by name: of linear layers but the head's."""
    head, modules, apart = model.get_output_embeddings(), model.named_modules(), passed_by(model)
    linears = [(name, module) for name, module in modules if is_plain(module)]
    return {f"{name}.weight" for name, module in linears if why_not(name, module, head, apart) is None}


def replace_linears(
    model: nn.Module, scheme: str, dtype: torch.dtype, chosen: Callable[[str], bool]
) -> dict[str, QuantizedLinear]:
    """Puts an empty QuantizedLinear in the place of each linear layer that is chosen by name; gives them by name."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {name: QuantizedLinear(module, scheme, dtype) for name, module in linears if chosen(name)}
    for name, module in found.items():
        put_module(model, name, module)
    return found


def make_resident(model: nn.Module, layers: int) -> None:
    """Turns the quantized weights of the first `layers` decoder layers into 16-bit ones: the same numbers, faster."""
    for name, module in list(model.named_modules()):
        number = layer_number(name)
        if isinstance(module, QuantizedLinear) and (number is None or number < layers):
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.dequantized(), requires_grad=False)
            plain.bias = module.bias
            put_module(model, name, plain)


def layer_number(name: str) -> int | None:
    """The decoder layer that a module's name is in; None outside of them."""
    return next((int(part) for part in name.split(".")[1:] if part.isdigit()), None)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def folder_name(scheme: str, double: bool, dtype: str) -> str:
    """The name of a cached quantized base; the numbers in it depend on these, and on the file format's version."""
    return f"{scheme}{'-double' if double and scheme in FOUR_BIT else ''}-{dtype}-v2"
