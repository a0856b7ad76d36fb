"""A mixture's experts, which transformers 5 holds as one parameter of three dimensions: adapters on them, 4 and 8 bit.

peft adapts such a parameter by adding B A to the whole of it before each product (`target_parameters`). In bf16 that
rounds young adapters away, and the sum waits for the backward pass: the experts once more. Here an expert's product and
its adapter's are two, added and rounded once, and only experts that were chosen are touched; the adapter's format and
its numbers are peft's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd import Function

from strop.models.quantize import QuantizedLinear, layer_index, quantize_weight, quantizable_linears

OFFSET = "nested_offset"
EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def is_experts(module: nn.Module) -> bool:
    """Whether a module is transformers' usual layer of experts, whose forward is computed here where there are adapters
    or packed weights on it."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "num_experts"))


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
    """(module's path, parameter's name, module, parameter) of each parameter (experts, .., ..) of a mixture."""
    for path, module in model.named_modules():
        number = getattr(module, "num_experts", None)
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(number, int) and weight.dim() == 3 and len(weight) == number:
                yield path, name, module, weight


def expert_sizes(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """(inputs, outputs) of one expert's product with a parameter."""
    _, first, second = weight.shape
    return (first, second) if getattr(module, "is_transposed", False) else (second, first)


def adapted_as_parameters(model: nn.Module) -> set[str]:
    """Names of linear layers that peft adapts by their weight in a mixture: in target_modules it takes the names that
    experts had before transformers 5 for the experts, and leaves the dense and shared ones of that name out."""
    return set(EXPERT_NAMES) if next(expert_parameters(model), None) is not None else set()


def quantizable_names(model: nn.Module) -> set[str]:
    """The weights that are quantized, by name: of linear layers but the head's, and of experts."""
    apart = adapted_as_parameters(model)
    linears = {name for name in quantizable_linears(model) if name.split(".")[-2] not in apart}
    experts = {f"{path}.{name}" for path, name, module, _ in expert_parameters(model) if is_experts(module)}
    return linears | experts


def pack_experts(weight: Tensor, scheme: str, *, double: bool, device: str = "cpu") -> dict[str, Tensor]:
    """A parameter (experts, a, b), each expert quantized for itself; the constants of all laid one behind the other."""
    packed = [quantize_weight(one, scheme, double=double, device=device) for one in weight]
    made: dict[str, Tensor] = {}
    for name in packed[0]:
        if name.startswith("quant_state."):
            about = [json.loads(bytes(one[name].tolist())) for one in packed]
            if OFFSET in about[0]:
                made[OFFSET] = torch.tensor([one.pop(OFFSET) for one in about])
            made[name] = torch.tensor(list(json.dumps(about[0]).encode()), dtype=torch.uint8)
        elif name.endswith("quant_map"):
            made[name] = packed[0][name]
        else:
            made[name] = torch.stack([one[name] for one in packed])
    return made


class PackedExperts:
    """A parameter (experts, a, b) as `pack_experts` gives it."""

    def __init__(self, packed: dict[str, Tensor], shape: torch.Size, scheme: str, dtype: torch.dtype) -> None:
        self.packed, self.shape, self.scheme, self.dtype = packed, shape, scheme, dtype

    def dequantized(self, expert: int) -> Tensor:
        """The weight (a, b) of one expert. Raises KeyError or ValueError where what was packed is not whole."""
        parts: dict[str, Tensor] = {}
        for name, part in self.packed.items():
            if name == OFFSET:
                continue
            parts[name] = part if name.endswith("quant_map") or name.startswith("quant_state.") else part[expert]
            if name.startswith("quant_state.") and OFFSET in self.packed:
                about = json.loads(bytes(part.tolist())) | {OFFSET: float(self.packed[OFFSET][expert])}
                parts[name] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
        with torch.device("meta"):
            like = nn.Linear(self.shape[2], self.shape[1], bias=False)
        layer = QuantizedLinear(like, self.scheme, self.dtype)
        layer.fill(parts)
        return layer.dequantized()

    def whole(self) -> Tensor:
        return torch.stack([self.dequantized(expert) for expert in range(self.shape[0])])

    def to(self, device: torch.device) -> PackedExperts:
        return PackedExperts({k: v.to(device) for k, v in self.packed.items()}, self.shape, self.scheme, self.dtype)


class QuantizedExperts(nn.Module):
    """A layer of experts whose parameters are packed. Each is still there by its name, for its shape, type and device:
    one number, as often as the shape says."""

    packed: dict[str, PackedExperts]
    num_experts: int

    def hold(self, name: str, packed: PackedExperts) -> None:
        """Puts a packed parameter in the place of a plain one."""
        self.packed = {**self.__dict__.get("packed", {}), name: packed}
        device = next(iter(packed.packed.values())).device
        shape = torch.zeros((), dtype=packed.dtype, device=device).expand(packed.shape)
        setattr(self, name, nn.Parameter(shape, requires_grad=False))

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedExperts:
        for name in self.packed:
            setattr(self, name, nn.Parameter(getattr(self, name)[:1, :1, :1].clone(), requires_grad=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, packed in self.packed.items():
            self.hold(name, packed.to(getattr(self, name).device))
        return self

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return experts_forward(self, {}, x, index, weights)


def make_quantized(module: nn.Module) -> QuantizedExperts:
    """The same layer, which may hold packed parameters from now on."""
    if isinstance(module, QuantizedExperts):
        return module
    kind = type(module)
    module.__class__ = type(f"Quantized{kind.__name__}", (QuantizedExperts, kind), {})
    assert isinstance(module, QuantizedExperts)
    return module


def make_dequantized(module: QuantizedExperts) -> None:
    """The layer with its weights dequantized once: the same numbers, faster, in 16-bit memory."""
    for name, packed in module.packed.items():
        setattr(module, name, nn.Parameter(packed.whole(), requires_grad=False))
    module.packed = {}
    module.__class__ = type(module).__mro__[2]


def dequantize_experts(model: nn.Module, layers: int) -> None:
    """As `quantize.make_resident`, of experts."""
    for name, module in model.named_modules():
        number = layer_index(name)
        if isinstance(module, QuantizedExperts) and (number is None or number < layers):
            make_dequantized(module)


def dequantized_growth(model: nn.Module) -> list[int]:
    """Bytes by which each decoder layer grows when its packed weights are dequantized once."""
    found: dict[int, int] = {}
    for name, module in model.named_modules():
        grown, number = 0, layer_index(name)
        if isinstance(module, QuantizedLinear):
            held = module.weight.nbytes + sum(tensor.nbytes for tensor in module.constants.values())
            grown = module.in_features * module.out_features * module.dtype.itemsize - held
        elif isinstance(module, QuantizedExperts):
            for packed in module.packed.values():
                held = sum(tensor.nbytes for tensor in packed.packed.values())
                grown += packed.shape.numel() * packed.dtype.itemsize - held
        if grown and number is not None:
            found[number] = found.get(number, 0) + grown
    return [found[number] for number in sorted(found)]


def count_trained_in_experts(model: nn.Module) -> int:
    """Trained weights that sit on experts."""
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper) and m.get_param().dim() == 3]
    own = [p for m in wrappers for part in (m.lora_A, m.lora_B) for p in part.parameters()]
    return sum(weight.numel() for weight in own)


class _Product(Function):
    """onto + x W^T (or x W), rounded once, with W of one expert given anew in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: PackedExperts, expert: int, transposed: bool, onto: Tensor | None
    ) -> Tensor:
        ctx.of = (packed, expert, transposed)
        return _product(x, packed.dequantized(expert).to(x.dtype), transposed, onto)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        packed, expert, transposed = ctx.of
        back = _product(grad, packed.dequantized(expert).to(grad.dtype), not transposed, None)
        return back, None, None, None, grad if ctx.needs_input_grad[4] else None


def _product(x: Tensor, weight: Tensor, transposed: bool, onto: Tensor | None) -> Tensor:
    weight = weight if transposed else weight.t()
    return x @ weight if onto is None else torch.addmm(onto, x, weight)


Factors = tuple[Tensor, Tensor, float]  # A (experts, r, in), B (experts, out, r) and the scale


def split_by_expert(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A (experts, r, in) and B (experts, out, r) of a (experts x r, in) and b (out, r x experts), where the experts are
    innermost: peft's layout."""
    return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)


def adapter_factors(wrapper: ParamWrapper, name: str) -> Factors:
    weights = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    return *split_by_expert(*weights, wrapper.num_experts), wrapper.scaling[name]


def experts_forward(
    module: Any, adapters: dict[str, list[Factors]], x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """What a layer of experts makes of x (tokens, hidden). index, weights (tokens, k): which experts, and their shares.

    adapters: of a parameter, by its name. Experts that no token has chosen are not computed.
    """
    k = index.shape[-1]
    chosen, order = torch.sort(index.reshape(-1), stable=True)
    counts = torch.bincount(chosen, minlength=module.num_experts)[: module.num_experts].tolist()
    parts, at = [], 0
    first = "gate_up_proj" if module.has_gate else "up_proj"
    for expert, count in enumerate(counts):
        if count:
            rows = order[at : at + count]
            inner = _expert(module, first, expert, x[rows // k], adapters.get(first, []))
            inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            out = _expert(module, "down_proj", expert, inner, adapters.get("down_proj", []))
            if getattr(module, "has_post_expert_norm", False):
                out = module.post_expert_norm(out)
            parts.append(out * weights.reshape(-1)[rows, None])
            at += count
    done = torch.cat(parts)
    result = done.new_zeros(index.numel(), x.shape[-1]).index_copy(0, order[:at], done)
    return result.view(len(x), k, -1).sum(1).to(x.dtype)


def _expert(module: Any, name: str, expert: int, x: Tensor, adapters: list[Factors]) -> Tensor:
    onto = None
    if adapters:
        changes = [((x.to(a.dtype) @ a[expert].t()) @ b[expert].t()) * scale for a, b, scale in adapters]
        onto = sum(changes[1:], changes[0]).to(x.dtype)
    packed = getattr(module, "packed", {}).get(name)
    if packed is not None:
        result: Tensor = _Product.apply(x, packed, expert, module.is_transposed, onto)  # type: ignore[no-untyped-call]
    else:
        result = _product(x, getattr(module, name)[expert], module.is_transposed, onto)
    return result + getattr(module, f"{name}_bias")[expert] if module.has_bias else result


def patch_experts_forward(model: nn.Module) -> None:
    """The adapters on layers of experts are computed as above from now on."""
    inner = {id(module.base_layer) for module in model.modules() if isinstance(module, ParamWrapper)}
    for module in model.modules():
        if isinstance(module, ParamWrapper) and id(module) not in inner and is_experts(module.get_base_layer()):
            module.forward = partial(_wrapped, module)


def _wrapped(outer: ParamWrapper, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The forward of the outermost of the wrappers that sit on a layer of experts."""
    found: dict[str, list[Factors]] = {}
    wrapper: Any = outer
    while isinstance(wrapper, ParamWrapper):
        if not wrapper.disable_adapters and not wrapper.merged:
            names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
            found[wrapper.parameter_name] = [adapter_factors(wrapper, name) for name in names]
        wrapper = wrapper.base_layer
    if not any(found.values()):
        result: Tensor = wrapper(x, index, weights)
        return result
    return experts_forward(wrapper, found, x, index, weights)


def is_weight_adapter(module: nn.Module) -> bool:
    """Whether this is peft's adapter on a linear layer's weight (a mixture's dense and shared layers): the same sum."""
    return type(module) is ParamWrapper and module.parameter_name == "weight" and bool(module.num_experts == 1)
