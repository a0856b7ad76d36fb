"""Linear layers with frozen 4-bit or 8-bit weights, which are quantized once and dequantized for each matmul."""

# NF4 and FP4 with double quantization (QLoRA, arXiv:2305.14314) and row-wise int8 (absmax / 127) use the functions and
# file format of bitsandbytes. Its Linear4bit is not used: on a CPU with AVX512-BF16 it repacks its weight in eval mode,
# and returns no gradient afterwards.

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd import Function

from strop.errors import QuantizerError, first_line
from strop.machine.memory import is_out_of_memory
from strop.models.families.shape import MIN_QUANTIZED_SIZE
from strop.models.families.table import DIRECTLY_READ

BLOCK, NESTED = 64, 256  # weights per constant; constants per nested constant
BLOCKS = [1 << bits for bits in range(5, 13)]  # block sizes of bitsandbytes
FOUR_BIT = ("nf4", "fp4")

FindKernels = Callable[[str, torch.device, torch.dtype], Any]
_find_kernels: list[FindKernels] = []  # at most one, registered by strop.engine.kernels.dispatch


def set_dequantize_kernels(find: FindKernels) -> None:
    """Register a function that returns the module with the dequantization kernels of a scheme and device, or None."""
    _find_kernels[:] = [find]


def _import_bitsandbytes() -> Any:
    """Import bitsandbytes.functional. Raises QuantizerError if it is missing or does not work on this machine."""
    try:
        import bitsandbytes.functional as functional
    except (ImportError, OSError, RuntimeError) as error:
        raise _unusable_error(error) from None
    return functional


def _unusable_error(error: Exception) -> QuantizerError:
    what = f"bitsandbytes, which quantizes, cannot be used here: {first_line(error)}"
    return QuantizerError(what, fix="pip install -U bitsandbytes, or --model.quantization none")


@contextmanager
def _native_errors() -> Iterator[None]:
    """Raise QuantizerError if bitsandbytes' native library fails, as it does for a different CUDA version."""
    try:
        yield
    except (RuntimeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise _unusable_error(error) from error


@cache
def _supports_out() -> bool:
    """Return whether bitsandbytes can dequantize into an existing CUDA tensor (since 0.50, bitsandbytes#1953)."""
    return Version(version("bitsandbytes")) >= Version("0.50")


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight of shape (n, k).

    weight: 8 bit: int8, shape (n, k). 4 bit: uint8, n * k / 2 elements, each with two indices into `code`, the first in
        the upper 4 bits.
    scale: 8 bit: fp32, shape (n,). 4 bit: fp32, one for each `block_size` consecutive values of a row.
    code: the 16 values of a 4-bit data type, fp32.
    """

    weight: Tensor
    scale: Tensor
    code: Tensor | None = None
    block_size: int = 0


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen 4-bit or 8-bit weight is dequantized in each forward and backward."""

    def __init__(self, like: nn.Linear, scheme: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.scheme, self.dtype = scheme, dtype
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = like.bias
        self.constants: dict[str, Tensor] = {}
        self._offset = torch.empty(0)  # kept on the device, as copying a number to a GPU blocks the host

    def load_packed(self, packed: dict[str, Tensor], sizes: Mapping[str, int] | None = None) -> None:
        """Set the weight and its constants (see `quantize_weight`). Raises KeyError or ValueError if incomplete."""
        # sizes: numbers of elements by name (bytes for the weight) to check instead of those of the tensors.
        weight = packed["weight"]
        if weight.is_floating_point():  # bitsandbytes can store the bytes as a float dtype, for FSDP
            weight = weight.contiguous().view(torch.uint8).view(-1, 1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.constants = {name: tensor for name, tensor in packed.items() if name != "weight"}
        sizes = {name: tensor.numel() for name, tensor in {**packed, "weight": weight}.items()} | dict(sizes or {})
        if self.scheme in FOUR_BIT:
            state = self.constants.pop(f"quant_state.bitsandbytes__{self.scheme}")
            self._state = json.loads(bytes(state.tolist()))
            if not isinstance(self._state, dict):
                raise ValueError("its quantization state is not an object")
            if tuple(self._state["shape"]) != (self.out_features, self.in_features):
                raise ValueError(f"shape {self._state['shape']}")
        for name, size in self._expected_sizes().items():
            if sizes.get(name) != size:
                raise ValueError(f"{name} has {sizes.get(name, 0)} elements, {size} expected")
        if self.scheme in FOUR_BIT and "nested_offset" in self._state:
            self._offset = torch.tensor(self._state["nested_offset"], device=self.weight.device)

    def _expected_sizes(self) -> dict[str, int]:
        """Return the number of bytes of the weight, and of elements of each constant."""
        elements = self.in_features * self.out_features
        if self.scheme == "int8":
            return {"weight": elements, "SCB": self.out_features}
        block, nested = self._state["blocksize"], self._state.get("nested_blocksize")
        if block not in BLOCKS or nested not in (None, *BLOCKS):
            raise ValueError(f"blocks of {block} and {nested}")
        blocks = -(-elements // block)
        sizes = {"weight": -(-elements // 2), "absmax": blocks, "quant_map": 16}
        if nested is not None:
            sizes |= {"nested_absmax": -(-blocks // nested), "nested_quant_map": 256}
        return sizes

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """Return the weight (out_features, in_features) in `dtype`, written to `out` if given. PEFT's DoRA calls it."""
        if out is not None and (out.dtype != self.dtype or not out.is_contiguous()):
            return out.copy_(self.dequantize())
        kernels = _find_kernels[0](self.scheme, self.weight.device, self.dtype) if _find_kernels else None
        if kernels is not None:
            return self.dequantize_by(kernels, out)
        if self.scheme == "int8":
            out = torch.empty(self.weight.shape, dtype=self.dtype, device=self.weight.device) if out is None else out
            return torch.mul(self.weight.data, self.constants["SCB"][:, None] / 127, out=out)
        bnb, constants, state = _import_bitsandbytes(), self.constants, self._state
        nested, offset = self._nested_state(bnb)
        # bitsandbytes' AVX512 kernel uses wrong constants if rows are not whole blocks. Treat all as one row then.
        n, k = self.out_features, self.in_features
        shape = torch.Size([n * k] if k % state["blocksize"] else [n, k])
        bnb_state = bnb.QuantState(
            constants["absmax"], shape, constants["quant_map"], state["blocksize"], self.scheme, self.dtype, offset,
            nested,
        )  # fmt: skip
        view = out.view(shape) if out is not None and out.device.type == "cuda" and _supports_out() else None
        with _native_errors():
            weight: Tensor = bnb.dequantize_4bit(self.weight.data, bnb_state, out=view)
        weight = weight.view(n, k)
        return weight if out is None or view is not None else out.copy_(weight)

    def dequantize_by(self, kernels: Any, out: Tensor | None = None) -> Tensor:
        """Dequantize with the kernels of a module like engine.kernels.cuda.dequantize."""
        constants = self.constants
        out = self.weight.new_empty(self.out_features, self.in_features, dtype=self.dtype) if out is None else out
        if self.scheme == "int8":
            return cast(Tensor, kernels.eight_bit(self.weight.data, constants["SCB"], out))
        state, nested = self._state, None
        if "nested_absmax" in constants:
            levels, scale = constants["nested_quant_map"], constants["nested_absmax"]
            nested = kernels.Nested(levels, scale, state["nested_blocksize"], state["nested_offset"])
        args = (self.weight.data, constants["quant_map"], constants["absmax"], state["blocksize"], nested, out)
        return cast(Tensor, kernels.four_bit(*args))

    @property
    def W_q(self) -> Tensor:
        """The packed weight, by HQQ's name. PEFT's DoRA calls `dequantize` on layers with this attribute."""
        return self.weight

    def packed_weight(self) -> PackedWeight | None:
        """Return the packed weight with fp32 constants, or None if blocks cross the ends of rows."""
        if self.scheme == "int8":
            return PackedWeight(self.weight.data, self.constants["SCB"] / 127)
        bnb, constants, state = _import_bitsandbytes(), self.constants, self._state
        if self.in_features % state["blocksize"]:
            return None
        nested, offset = self._nested_state(bnb)
        scale = constants["absmax"]
        if nested is not None:
            with _native_errors():
                scale = bnb.dequantize_blockwise(scale, nested) + offset
        return PackedWeight(self.weight.data, scale.float(), constants["quant_map"].float(), state["blocksize"])

    def _nested_state(self, bnb: Any) -> tuple[Any, Tensor | None]:
        """Return bitsandbytes' state and offset for the quantized constants; (None, None) if they are not quantized."""
        constants, state = self.constants, self._state
        if "nested_absmax" not in constants:
            return None, None
        absmax, levels = constants["nested_absmax"], constants["nested_quant_map"]
        nested = bnb.QuantState(absmax, None, levels, state["nested_blocksize"], dtype=torch.float32)
        return nested, self._offset

    def forward(self, x: Tensor) -> Tensor:
        result = self.matmul(x)
        return result if self.bias is None else result + self.bias

    def matmul(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return x W^T, added to `onto` (.., out_features) and rounded once."""
        return cast(Tensor, _Matmul.apply(x, self, onto))  # type: ignore[no-untyped-call]

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Constants follow the device but keep their dtypes: `model.to(bfloat16)` must not round them.
        self.constants = {name: tensor.to(fn(tensor).device) for name, tensor in self.constants.items()}
        self._offset = self._offset.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}"


class _Matmul(Function):
    """Compute onto + x W^T. The backward dequantizes W again instead of saving it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, onto: Tensor | None) -> Tensor:
        ctx.layer = layer
        weight = layer.dequantize().to(x.dtype)
        return F.linear(x, weight) if onto is None else addmm_linear(onto, x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.layer.dequantize().to(grad.dtype), None, grad if ctx.needs_input_grad[2] else None


def addmm_linear(onto: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), weight.t()).view(onto.shape)


def quantize_weight(weight: Tensor, scheme: str, *, double: bool = True, device: str = "cpu") -> dict[str, Tensor]:
    """Quantize a weight (out, in). Returns `weight` and its constants under bitsandbytes' names."""
    # double: quantize the constants too. device: a GPU with memory for the weight in fp32 is faster; results are equal.
    bnb = _import_bitsandbytes()
    if device.startswith("cuda") and (scheme == "int8" or weight.numel() % BLOCK == 0):
        try:
            return _quantize_by_torch(weight, scheme, double, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    if scheme == "int8":
        with _native_errors():
            quantized, scale, _ = bnb.int8_vectorwise_quant(weight.float() if weight.is_cpu else weight.half())
        return {"weight": quantized, "SCB": scale.float().flatten()}
    with _native_errors():
        packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double, quant_type=scheme)
    return {"weight": packed, **dict(state.as_dict(packed=True))}


def _quantize_by_torch(weight: Tensor, scheme: str, double: bool, device: str) -> dict[str, Tensor]:
    """Return the result of bitsandbytes on a CPU, on any device; its CUDA kernels divide differently."""
    bnb, weight_fp32 = _import_bitsandbytes(), weight.to(device).float()
    if scheme == "int8":
        scale = weight_fp32.abs().amax(1)
        quantized = torch.round(weight_fp32 * (127.0 / scale[:, None])).to(torch.int8)
        return {"weight": quantized.cpu(), "SCB": scale.cpu()}
    code = bnb.get_4bit_type(scheme, device="cpu")
    order = torch.argsort(code)
    midpoints = ((code[order[:-1]] + code[order[1:]]) / 2).to(device)
    blocks = weight_fp32.view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    indices = torch.bucketize(scaled, midpoints, out_int32=True)
    if scheme == "fp4":
        indices = order.to(device, torch.int32)[indices]
    pairs = indices.to(torch.uint8).view(-1, 2)
    packed = ((pairs[:, 0] << 4) | pairs[:, 1])[:, None].cpu()
    constants, offset, nested = absmax.cpu(), None, None
    if double:
        offset = constants.mean()
        with _native_errors():
            constants, nested = bnb.quantize_blockwise(constants - offset, blocksize=NESTED)
    state = bnb.QuantState(constants, weight.shape, code, BLOCK, scheme, weight.dtype, offset, nested)
    return {"weight": packed, **dict(state.as_dict(packed=True))}


def dequantize_weight(packed: dict[str, Tensor], scheme: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a quantized weight (see `quantize_weight`) of this shape in `dtype`."""
    layer = QuantizedLinear(nn.Linear(shape[1], shape[0], bias=False, device="meta"), scheme, dtype)
    layer.load_packed(packed)
    return layer.dequantize()


def why_kept_16_bit(name: str, module: nn.Linear, head: nn.Module | None, read_directly: Sequence[str]) -> str | None:
    """Return why a linear layer stays in 16 bit, or None. read_directly: the result of `directly_read_leaves`."""
    leaf = name.rpartition(".")[2]
    if module is head or leaf == "lm_head":
        return "output head"
    if leaf in read_directly:
        return "read by the model itself"
    return "small" if module.in_features * module.out_features < MIN_QUANTIZED_SIZE else None


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is an nn.Linear whose forward accepts and returns rows as nn.Linear's does."""
    # A subclass with its own forward is tried on one row: Falcon's passes, DeepSeek V4's grouped matmul does not.
    if not isinstance(module, nn.Linear) or type(module).forward in (nn.Linear.forward, QuantizedLinear.forward):
        return isinstance(module, nn.Linear)
    row = torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            output = module(row)
        return isinstance(output, Tensor) and tuple(output.shape) == (1, module.out_features)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False


def directly_read_leaves(model: Any) -> tuple[str, ...]:
    """Return the leaf names of linear layers whose weight the model's code reads without calling the layer."""
    return DIRECTLY_READ.get(model.config.get_text_config().model_type, ())


def quantizable_linears(model: Any) -> set[str]:
    head, modules, read_directly = model.get_output_embeddings(), model.named_modules(), directly_read_leaves(model)
    linears = [(name, module) for name, module in modules if is_plain_linear(module)]
    return {f"{name}.weight" for name, module in linears if why_kept_16_bit(name, module, head, read_directly) is None}


def replace_linears(
    model: nn.Module, scheme: str, dtype: torch.dtype, selects: Callable[[str], bool]
) -> dict[str, QuantizedLinear]:
    """Replace the linear layers whose name `selects` accepts with empty QuantizedLinear layers, returned by name."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = {name: QuantizedLinear(module, scheme, dtype) for name, module in linears if selects(name)}
    for name, layer in layers.items():
        set_attribute(model, name, layer)
    return layers


def dequantize_layers(model: nn.Module, layers: int) -> None:
    """Dequantize the linear layers of the first `layers` decoder layers permanently: faster, but with more memory."""
    for name, module in list(model.named_modules()):
        index = layer_index(name)
        if isinstance(module, QuantizedLinear) and (index is None or index < layers):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(module.dequantize(), requires_grad=False)
            plain.bias = module.bias
            set_attribute(model, name, plain)


def layer_index(name: str) -> int | None:
    """Return the index of the decoder layer in a module's name, or None for a module outside of the layers."""
    return next((int(part) for part in name.split(".")[1:] if part.isdigit()), None)


def set_attribute(model: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)
