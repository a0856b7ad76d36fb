"""Adapters and quantization for mixture-of-experts layers, which transformers 5 stores as 3-d parameters."""

# PEFT (`target_parameters`) adds B A to the whole parameter before each matmul. In bf16 this rounds small LoRA updates
# away, and autograd saves the sum, which is as large as all experts. Here the outputs of an expert and its adapter are
# added and rounded once, and only the experts that tokens are routed to are computed. The file format is PEFT's.

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd import Function

from strop.models.families.shape import EXPERT_FIELDS
from strop.models.quantize import QuantizedLinear, dequantize_weight, layer_index, quantizable_linears, quantize_weight

OFFSET = "nested_offset"  # a field of bitsandbytes' quantization state, the only one that differs between experts


def is_standard_experts(module: nn.Module) -> bool:
    """Return whether a module has the attributes of transformers' experts layers, which `experts_forward` needs."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "num_experts"))


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
    """Yield (module path, parameter name, module, parameter) of each parameter of shape (experts, .., ..)."""
    for path, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(count, int) and weight.dim() == 3 and len(weight) == count:
                yield path, name, module, weight


def expert_sizes(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """Return (inputs, outputs) of one expert's matmul with a parameter."""
    _, first, second = weight.shape
    return (first, second) if getattr(module, "is_transposed", False) else (second, first)


def parameter_adapter_leaves(model: nn.Module) -> set[str]:
    """Return the leaf names of linear layers that PEFT must adapt through their weight parameter in this model."""
    # In a mixture, even one that has only dense layers, PEFT treats layers with transformers 4's names of experts as
    # experts, and skips dense ones.
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    may_have_experts = any((getattr(config, field, None) or 1) > 1 for field in EXPERT_FIELDS)
    may_have_experts &= getattr(config, "enable_moe_block", None) is not False  # Gemma 4
    has_experts = may_have_experts or next(expert_parameters(model), None) is not None
    return {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"} if has_experts else set()


def quantizable_names(model: nn.Module) -> set[str]:
    """Return the names of all weights that are quantized: of linear layers except the head, and of experts."""
    parameter_leaves = parameter_adapter_leaves(model)
    linears = {name for name in quantizable_linears(model) if name.split(".")[-2] not in parameter_leaves}
    experts = {f"{path}.{name}" for path, name, module, _ in expert_parameters(model) if is_standard_experts(module)}
    return linears | experts


def pack_experts(weight: Tensor, scheme: str, *, double: bool, device: str = "cpu") -> dict[str, Tensor]:
    """Quantize each expert of a parameter (experts, a, b) and stack the packed tensors."""
    experts = [quantize_weight(expert, scheme, double=double, device=device) for expert in weight]
    packed: dict[str, Tensor] = {}
    for name in experts[0]:
        if name.startswith("quant_state."):
            states = [json.loads(bytes(expert[name].tolist())) for expert in experts]
            if OFFSET in states[0]:
                packed[OFFSET] = torch.tensor([state.pop(OFFSET) for state in states])
            packed[name] = torch.tensor(list(json.dumps(states[0]).encode()), dtype=torch.uint8)
        elif name.endswith("quant_map"):
            packed[name] = experts[0][name]
        else:
            packed[name] = torch.stack([expert[name] for expert in experts])
    return packed


class PackedExperts:
    """A quantized parameter of shape (experts, a, b). packed: the result of `pack_experts`."""

    def __init__(self, packed: dict[str, Tensor], shape: torch.Size, scheme: str, dtype: torch.dtype) -> None:
        self.packed, self.shape, self.scheme, self.dtype = packed, shape, scheme, dtype

    def dequantize(self, expert: int) -> Tensor:
        """Return the weight (a, b) of one expert. Raises KeyError or ValueError if `packed` is incomplete."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.packed.items():
            is_state = name.startswith("quant_state.")
            if is_state and OFFSET in self.packed:
                state = json.loads(bytes(tensor.tolist())) | {OFFSET: float(self.packed[OFFSET][expert])}
                tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
            elif name != OFFSET:
                tensors[name] = tensor if is_state or name.endswith("quant_map") else tensor[expert]
        return dequantize_weight(tensors, self.scheme, self.shape[1:], self.dtype)

    def dequantize_all(self) -> Tensor:
        return torch.stack([self.dequantize(expert) for expert in range(self.shape[0])])

    def to(self, device: torch.device) -> PackedExperts:
        return PackedExperts({k: v.to(device) for k, v in self.packed.items()}, self.shape, self.scheme, self.dtype)


class QuantizedExperts(nn.Module):
    """An experts layer with quantized parameters. Its nn.Parameters are placeholders: zeros expanded to the shape."""

    packed: dict[str, PackedExperts]
    num_experts: int

    def set_packed(self, name: str, packed: PackedExperts) -> None:
        self.packed = {**self.__dict__.get("packed", {}), name: packed}
        device = next(iter(packed.packed.values())).device
        placeholder = torch.zeros((), dtype=packed.dtype, device=device).expand(packed.shape)
        setattr(self, name, nn.Parameter(placeholder, requires_grad=False))

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedExperts:
        for name in self.packed:
            setattr(self, name, nn.Parameter(getattr(self, name)[:1, :1, :1].clone(), requires_grad=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, packed in self.packed.items():
            self.set_packed(name, packed.to(getattr(self, name).device))
        return self

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return experts_forward(self, {}, x, index, weights)


def make_quantized(module: nn.Module) -> QuantizedExperts:
    """Change an experts layer's class so that it can have packed parameters. Returns the layer."""
    if isinstance(module, QuantizedExperts):
        return module
    kind = type(module)
    module.__class__ = type(f"Quantized{kind.__name__}", (QuantizedExperts, kind), {})
    assert isinstance(module, QuantizedExperts)
    return module


def dequantize_experts(model: nn.Module, layers: int) -> None:
    """Dequantize the experts of the first `layers` decoder layers permanently; see also `dequantize_layers`."""
    for name, module in model.named_modules():
        index = layer_index(name)
        if isinstance(module, QuantizedExperts) and (index is None or index < layers):
            for leaf, packed in module.packed.items():
                setattr(module, leaf, nn.Parameter(packed.dequantize_all(), requires_grad=False))
            module.packed = {}
            module.__class__ = type(module).__mro__[2]


def dequantization_growth(model: nn.Module) -> list[int]:
    """Return the number of bytes by which each decoder layer grows when its weights are dequantized permanently."""
    growth: Counter[int] = Counter()
    for name, module in model.named_modules():
        index = layer_index(name)
        if index is not None and isinstance(module, QuantizedLinear):
            packed_bytes = module.weight.nbytes + sum(tensor.nbytes for tensor in module.constants.values())
            growth[index] += module.in_features * module.out_features * module.dtype.itemsize - packed_bytes
        elif index is not None and isinstance(module, QuantizedExperts):
            for packed in module.packed.values():
                packed_bytes = sum(tensor.nbytes for tensor in packed.packed.values())
                growth[index] += packed.shape.numel() * packed.dtype.itemsize - packed_bytes
    return [growth[index] for index in sorted(growth)]


def count_trained_in_experts(model: nn.Module) -> int:
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper) and m.get_param().dim() == 3]
    weights = [p for m in wrappers for part in (m.lora_A, m.lora_B) for p in part.parameters()]
    return sum(weight.numel() for weight in weights)


class _Matmul(Function):
    """Compute onto + x W^T (x W if transposed), rounded once. The backward dequantizes W again instead of saving it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: PackedExperts, expert: int, transposed: bool, onto: Tensor | None
    ) -> Tensor:
        ctx.expert_args = (packed, expert, transposed)
        return _matmul(x, packed.dequantize(expert).to(x.dtype), transposed, onto)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        packed, expert, transposed = ctx.expert_args
        grad_x = _matmul(grad, packed.dequantize(expert).to(grad.dtype), not transposed, None)
        return grad_x, None, None, None, grad if ctx.needs_input_grad[4] else None


def _matmul(x: Tensor, weight: Tensor, transposed: bool, onto: Tensor | None) -> Tensor:
    weight = weight if transposed else weight.t()
    return x @ weight if onto is None else torch.addmm(onto, x, weight)


Factors = tuple[Tensor, Tensor, float]  # LoRA matrices A (experts, r, in) and B (experts, out, r), and the scale


def split_by_expert(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return A (experts, r, in) and B (experts, out, r) from PEFT's a (experts x r, in) and b (out, r x experts)."""
    return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)


def experts_forward(
    module: Any, adapters: dict[str, list[Factors]], x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Return the output (tokens, hidden) of an experts layer with adapters, skipping experts without tokens."""
    # adapters: by parameter name. x: hidden states (tokens, hidden). index, weights: each token's experts and routing
    # weights (tokens, k).
    k = index.shape[-1]
    sorted_experts, order = torch.sort(index.reshape(-1), stable=True)
    counts = torch.bincount(sorted_experts, minlength=module.num_experts)[: module.num_experts].tolist()
    outputs, start = [], 0
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    for expert, count in enumerate(counts):
        if count:
            rows = order[start : start + count]
            hidden = _expert_linear(module, up_name, expert, x[rows // k], adapters.get(up_name, []))
            hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
            out = _expert_linear(module, "down_proj", expert, hidden, adapters.get("down_proj", []))
            if getattr(module, "has_post_expert_norm", False):
                out = module.post_expert_norm(out)
            outputs.append(out * weights.reshape(-1)[rows, None])
            start += count
    weighted = torch.cat(outputs)
    per_choice = weighted.new_zeros(index.numel(), x.shape[-1]).index_copy(0, order[:start], weighted)
    return per_choice.view(len(x), k, -1).sum(1).to(x.dtype)


def _expert_linear(module: Any, name: str, expert: int, x: Tensor, adapters: list[Factors]) -> Tensor:
    onto = None
    if adapters:
        deltas = [((x.to(a.dtype) @ a[expert].t()) @ b[expert].t()) * scale for a, b, scale in adapters]
        onto = sum(deltas[1:], deltas[0]).to(x.dtype)
    packed = getattr(module, "packed", {}).get(name)
    if packed is not None:
        result: Tensor = _Matmul.apply(x, packed, expert, module.is_transposed, onto)  # type: ignore[no-untyped-call]
    else:
        result = _matmul(x, getattr(module, name)[expert], module.is_transposed, onto)
    return result + getattr(module, f"{name}_bias")[expert] if module.has_bias else result


def patch_experts_forward(model: nn.Module) -> None:
    """Make adapted experts layers compute `experts_forward`. Only the outermost of nested PEFT wrappers is patched."""
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inner = {id(wrapper.base_layer) for wrapper in wrappers}
    for wrapper in wrappers:
        if id(wrapper) not in inner and is_standard_experts(wrapper.get_base_layer()):
            wrapper.forward = partial(_wrapped_forward, wrapper)


def _wrapped_forward(outer: ParamWrapper, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Forward of an experts layer with one PEFT wrapper for each adapted parameter. outer: the outermost wrapper."""
    adapters: dict[str, list[Factors]] = {}
    wrapper: Any = outer
    while isinstance(wrapper, ParamWrapper):
        if not wrapper.disable_adapters and not wrapper.merged:
            adapters[wrapper.parameter_name] = [
                (*split_by_expert(wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts),
                 wrapper.scaling[name])
                for name in wrapper.active_adapters if name in wrapper.lora_A
            ]  # fmt: skip
        wrapper = wrapper.base_layer
    if not any(adapters.values()):
        return cast(Tensor, wrapper(x, index, weights))
    return experts_forward(wrapper, adapters, x, index, weights)


def is_weight_adapter(module: nn.Module) -> bool:
    """Return whether a module is PEFT's parameter adapter on a linear layer's weight, which is equivalent to LoRA."""
    return type(module) is ParamWrapper and module.parameter_name == "weight" and bool(module.num_experts == 1)
