"""Add LoRA adapters, new tokens or a score head to a transformers model through PEFT, and initialize with LoftQ.

`train_all_weights` makes the model's own weights trainable instead.
"""

from __future__ import annotations

import math
import re
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import peft
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.pytorch_utils import Conv1D

from strop.config.schema import LoraSection
from strop.data.prepare import add_tokens
from strop.errors import ModelError, RecipeError
from strop.models.adapter_config import SCORE_HEAD, SCORE_TASK
from strop.models.experts import (
    QuantizedExperts,
    is_weight_adapter,
    parameter_adapter_leaves,
    patch_experts_forward,
    split_by_expert,
)
from strop.models.families.shape import (
    EXPERTS,
    check_lora_paths,
    matches_pattern,
    target_names,
)
from strop.models.introspect import (
    check_modules_to_save,
    has_suffix,
    has_tied_embeddings,
    linear_kinds,
    text_filter,
    text_path,
    tower_linears,
)
from strop.models.load import load_without_weights, weights_folder
from strop.models.quantize import QuantizedLinear, addmm_linear
from strop.models.source import Source, prequantized
from strop.models.tensor_files import CheckpointLayout, CheckpointTensors

NORM_ROWS = 4096  # rows of a weight that are converted to fp32 at once
SCORE_HEAD_STD = 0.02  # initialization in transformers' sequence classifiers
# For torch.svd_lowrank: power iterations, and extra directions beyond the rank (arXiv:0909.4061).
LOFTQ_ITERATIONS, LOFTQ_OVERSAMPLING = 8, 8


def check_lora(model: nn.Module, section: LoraSection, *, is_continued: bool = False) -> list[str]:
    """Check a LoRA section against a model, which needs no weights, and return the leaf names to adapt.

    is_continued: the section is that of an adapter to continue from, whose paths and patterns PEFT has checked.
    """
    # Raises ModelError if a target or pattern matches nothing, or if tied embeddings would be trained as two copies, of
    # which one is lost on reload (peft#2018, transformers#45127), and RecipeError if no layer is left to adapt.
    kinds = linear_kinds(model)
    names = target_names(kinds, section.target_modules)
    _check_parameters(model, names, section)
    check_modules_to_save(model, section.modules_to_save, section.new_tokens)
    if section.new_tokens:
        check_head_bias(model)
    adapted = _adapted_paths(model, names, section.modules_to_save)
    if section.modules_to_save and not adapted:
        what = f"lora.modules_to_save: {', '.join(section.modules_to_save)} leaves no layer for an adapter"
        raise RecipeError(what, fix="name smaller modules, or other lora.target_modules")
    if not is_continued:
        check_lora_paths(section, names, adapted)
    return names


def add_lora(
    model: nn.Module, section: LoraSection, tokenizer: Any, *, task: str | None = None, outputs: int = 0
) -> peft.PeftModel:
    """Add trainable fp32 adapters to a frozen base in place, and return the PEFT model."""
    # `section.new_tokens` are added to `tokenizer`, and their embedding rows are trained. task: PEFT's task type.
    # outputs: of a score head, 0 for none.
    assert section.alpha is not None
    names = check_lora(model, section)
    token_rows = _add_tokens(model, section.new_tokens, tokenizer)
    placement, modules_to_save = _peft_placement(model, names), list(section.modules_to_save)
    if section.vision == "all":
        placement |= _with_tower(model, placement)
    if outputs:
        check_score_head(cast(Any, model).config)
        add_score_head(model, outputs)
        modules_to_save.append(SCORE_HEAD)
    adapted_paths = _adapted_paths(model, names, section.modules_to_save)
    config = peft.LoraConfig(
        **section.model_dump(include={"r", "bias", "use_rslora", "use_dora"}),
        rank_pattern=_in_order_of_peft(section.rank_pattern, adapted_paths),
        alpha_pattern=_in_order_of_peft(section.alpha_pattern, adapted_paths),
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        init_lora_weights=section.init if section.init == "gaussian" else True,  # for loftq see init_loftq
        modules_to_save=modules_to_save or None,
        task_type=task or (SCORE_TASK if outputs else "CAUSAL_LM"),
        trainable_token_indices=token_rows or None,
        **placement,
    )
    with ignore_peft_warnings():
        adapted = peft.get_peft_model(model, config)
    _round_initial_values(adapted)
    return patch_lora_forward(cast_trainable_to_fp32(adapted))


def _in_order_of_peft(pattern: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Return a rank or alpha pattern whose keys keep their order when PEFT sorts them in adapter_config.json.

    Of several keys that match a module, PEFT takes the first. If there are such keys, each is put into parentheses, the
    more the earlier it is: these sort before letters and digits, and change no regular expression.
    """
    if not any(sum(matches_pattern(key, path) for key in pattern) > 1 for path in paths):
        return dict(pattern)
    items = zip(range(len(pattern), 0, -1), pattern.items(), strict=True)
    return {"(?:" * depth + key + ")" * depth: value for depth, (key, value) in items}


def _round_initial_values(model: nn.Module) -> None:
    """Round new adapters on quantized weights to the dtype of the computation, as PEFT does on 16-bit weights.

    A run then has the same bits, whether its base is dequantized once or for each matmul.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(base := module.get_base_layer(), QuantizedLinear):
            for weight in module.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.to(base.dtype)


def train_all_weights(model: nn.Module, new_tokens: Sequence[str], tokenizer: Any) -> nn.Module:
    """Make all weights of the text model trainable in place, after adding tokens. Encoders of images stay frozen."""
    _add_tokens(model, new_tokens, tokenizer)
    is_text = text_filter(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(is_text(name) and weight.is_floating_point())
    return model


@contextmanager
def ignore_peft_warnings(*messages: str) -> Iterator[None]:
    """Hide these warnings, and those about `is_gradient_checkpointing`, which peft 0.21 uses, and an adapter on a head
    that shares the embeddings' weight, which a note of the run describes."""
    with warnings.catch_warnings():
        own = "`is_gradient_checkpointing`", "Model has `tie_word_embeddings=True`"
        warnings.filterwarnings("ignore", "|".join((*own, *messages)))
        yield


def _peft_placement(model: nn.Module, names: list[str]) -> dict[str, Any]:
    """Return the fields of LoraConfig that select the text model's linear layers and expert parameters."""
    kinds, parameter_leaves, prefix = linear_kinds(model), parameter_adapter_leaves(model), text_path(model)
    experts = {kind.name for kind in kinds if kind.type == EXPERTS}
    linears = [name for name in names if name not in experts]
    parameters = [name for name in names if name in experts]
    parameters += [f"{name}.weight" for name in linears if name.rpartition(".")[2] in parameter_leaves]
    modules = [name for name in linears if name.rpartition(".")[2] not in parameter_leaves]
    fields: dict[str, Any] = {"target_modules": modules}
    if parameters:
        fields["target_parameters"] = parameters
    matched = [path for path, _ in model.named_modules() if has_suffix(path, modules) and not path.startswith(prefix)]
    if not all(map(text_filter(model), matched)):
        heads = [rf"{re.escape(path)}$" for path in filter(text_filter(model), matched)]
        fields["exclude_modules"] = rf"(?!{'|'.join([re.escape(prefix), *heads])}).*"
    if any(kind.type == "Conv1D" and kind.name in modules for kind in kinds):
        fields["fan_in_fan_out"] = True
    return fields


def _with_tower(model: nn.Module, placement: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of LoraConfig that select the linear layers of the image tower too, as one pattern."""
    names, is_text = placement["target_modules"], text_filter(model)
    paths = [path for path, _ in model.named_modules() if has_suffix(path, names) and is_text(path)]
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", path, count=1) for path in (*paths, *tower_linears(model)))
    pattern = "|".join(re.escape(kind).replace(r"\.N\.", r"\.\d+\.") for kind in kinds)
    return {"target_modules": pattern, "exclude_modules": None}


def _adapted_paths(model: nn.Module, names: list[str], modules_to_save: Sequence[str]) -> list[str]:
    """Return the paths of the layers and expert parameters to which PEFT would add adapters."""
    placement, is_text = _peft_placement(model, names), text_filter(model)
    layers = [path for path, _ in model.named_modules() if has_suffix(path, placement["target_modules"])]
    targets = placement.get("target_parameters", ())
    parameters = [path for path, _ in model.named_parameters() if has_suffix(path, targets)]
    return [
        path
        for path in (*layers, *parameters)
        if is_text(path) and not any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in modules_to_save)
    ]


def _check_parameters(model: nn.Module, names: list[str], section: LoraSection) -> None:
    """Raise ModelError for settings that PEFT's adapters on parameters do not support."""
    if "target_parameters" not in _peft_placement(model, names):
        return
    for field, is_set in (("dropout", section.dropout > 0), ("use_dora", section.use_dora)):
        if is_set:
            what = f"lora.{field}: peft adapts a mixture's experts and MLPs as parameters, where it has no {field}"
            raise ModelError(what, fix=f"leave lora.{field} out, or give --lora.target_modules attention")


def patch_lora_forward(model: peft.PeftModel) -> peft.PeftModel:
    """Make plain LoRA layers add the outputs of base and adapter before rounding to the base's dtype."""
    # PEFT rounds the base's output to bf16 first, where small LoRA updates vanish (docs/performance.md has the cost).
    for module in model.modules():
        if (type(module) is PeftLinear or is_weight_adapter(module)) and isinstance(module.base_layer, nn.Linear):
            module.forward = partial(_forward_rounded_once, module)
    patch_experts_forward(model)
    return model


def _forward_rounded_once(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = [name for name in module.active_adapters if name in module.lora_A]
    has_variant = any(name in module.lora_variant for name in names)
    if args or kwargs or module.disable_adapters or module.merged or has_variant or not names:
        return cast(Tensor, type(module).forward(module, x, *args, **kwargs))
    x_fp32 = x.to(module.lora_A[names[0]].weight.dtype)
    deltas = [adapter_delta(module, name, module.lora_dropout[name](x_fp32)) for name in names]
    return add_to_base(module.base_layer, x, sum(deltas[1:], deltas[0]))


def adapter_delta(module: Any, name: str, x: Tensor) -> Tensor:
    """Return scale * B A x, one adapter's part of a layer's output, in the adapter's dtype."""
    a, b = module.lora_A[name], module.lora_B[name]
    return cast(Tensor, b(a(x.to(a.weight.dtype))) * module.scaling[name])


def add_to_base(base: nn.Linear, x: Tensor, delta: Tensor) -> Tensor:
    """Return base(x) + delta. Below fp32, delta + x W^T is rounded only once."""
    if x.dtype == torch.float32:
        return cast(Tensor, base(x)) + delta
    delta = delta.to(x.dtype)
    result = base.matmul(x, delta) if isinstance(base, QuantizedLinear) else addmm_linear(delta, x, base.weight)
    return result if base.bias is None else result + base.bias.to(result.dtype)  # a trained bias is in fp32


def cast_trainable_to_fp32(model: peft.PeftModel) -> peft.PeftModel:
    """Cast trainable weights to fp32, as bf16 rounds small updates away, and outputs of modules_to_save back."""
    is_text = text_filter(model.get_base_model())
    for name, weight in model.get_base_model().named_parameters():
        is_adapter = ".lora_" in name or ".modules_to_save." in name
        if not is_text(name) and not is_adapter:  # biases of image encoders, with lora.bias all
            weight.requires_grad_(False)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    for module in model.modules():
        if isinstance(module, Conv1D | nn.LayerNorm) and module.bias is not None and module.bias.requires_grad:
            module.__dict__["forward"] = partial(_forward_with_cast_bias, module)
        if isinstance(module, ModulesToSaveWrapper):
            dtype = next(module.original_module.parameters()).dtype
            for trained in module.modules_to_save.values():
                trained.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
                trained.register_forward_hook(partial(_cast_outputs, dtype))
    return model


def _forward_with_cast_bias(module: Conv1D | nn.LayerNorm, x: Tensor) -> Tensor:
    """Return the output of a layer whose bias is trained in fp32, in the dtype of its input."""
    bias = module.bias.to(x.dtype)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, module.weight, bias, module.eps)
    return torch.addmm(bias, x.flatten(0, -2), module.weight).view(*x.shape[:-1], -1)  # weight: (in, out)


def _cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    dtype = next(module.parameters()).dtype
    return tuple(_cast(x, dtype) for x in args), {name: _cast(x, dtype) for name, x in kwargs.items()}


def _cast_outputs(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    """Return the output, or each of several as of a router, in a dtype."""
    return tuple(_cast(x, dtype) for x in output) if isinstance(output, tuple) else _cast(output, dtype)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def set_dropout(model: peft.PeftModel, probability: float) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(probability) if probability else nn.Identity()
    for config in model.peft_config.values():
        cast(peft.LoraConfig, config).lora_dropout = probability


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def count_trainable(meta_model: nn.Module, section: LoraSection, *, outputs: int = 0, full: bool = False) -> int:
    """Count the weights that `add_lora`, or with `full` `train_all_weights`, makes trainable."""
    # The model is on the meta device.
    without_tokens = section.model_copy(update={"new_tokens": [], "alpha": section.alpha or 1.0})
    adapted = (
        train_all_weights(meta_model, (), None) if full else add_lora(meta_model, without_tokens, None, outputs=outputs)
    )
    hidden_size = meta_model.get_input_embeddings().embedding_dim  # type: ignore[operator]
    token_weights = len(section.new_tokens) * hidden_size * len(embedding_paths(meta_model))
    return sum(weight.numel() for weight in trainable_parameters(adapted).values()) + int(token_weights)


def weight_change(parts: Iterable[nn.Module]) -> float | None:
    """Return the median over layers of |scale * B A| / |W| (Frobenius norms), or None if no layer is suitable."""
    # Suitable layers have plain LoRA and an unquantized weight. Each of `parts` is processed before the next is read.
    ratios = []
    for module in (module for part in parts for module in part.modules()):
        base = getattr(module, "base_layer", None)
        if not (isinstance(module, PeftLinear) and isinstance(base, nn.Linear) and base.weight.is_floating_point()):
            continue
        squared = 0.0
        for name in module.active_adapters:
            a, b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
            # |B A|^2 = sum((B^T B) * (A A^T)), where both factors are r x r
            squared += module.scaling[name] ** 2 * float(((b.T @ b) * (a @ a.T)).sum())
        # An fp32 copy of a whole output head would take too much memory.
        chunks = torch.split(base.weight.detach(), NORM_ROWS)
        norm = float(torch.stack([torch.linalg.vector_norm(chunk, dtype=torch.float32) for chunk in chunks]).norm())
        ratios.append(math.sqrt(max(squared, 0.0)) / norm if norm else 0.0)
    return statistics.median(ratios) if ratios else None


def _add_tokens(model: nn.Module, tokens: Sequence[str], tokenizer: Any) -> dict[str, list[int]]:
    """Add tokens and return {module name: embedding rows to train}."""
    if not tokens:
        return {}
    add_tokens(tokenizer, tokens)  # without effect if the rows were prepared with this tokenizer
    grow_vocabulary(model, len(tokenizer))
    leaves = (path.rpartition(".")[2] for path in embedding_paths(model))
    return dict.fromkeys(leaves, tokenizer.convert_tokens_to_ids(list(tokens)))


def grow_vocabulary(model: Any, size: int) -> None:
    """Extend a model's embeddings to `size` rows with the mean row, not with random rows as transformers does."""
    old_size = model.get_input_embeddings().num_embeddings
    if size <= old_size:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    for path in embedding_paths(model):
        weight = model.get_submodule(path).weight
        with torch.no_grad():
            weight.copy_(extend_rows(weight[:old_size], size))


def extend_rows(weight: Tensor, size: int) -> Tensor:
    """Extend an embedding (rows, hidden) to `size` rows with the mean row, which is computed in fp32."""
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(size - len(weight), -1)])


def embedding_paths(model: Any) -> list[str]:
    """Return the paths of the input embeddings and, unless it shares their weight, the output head."""
    tables = [model.get_input_embeddings()]
    tables += [] if has_tied_embeddings(model) else [model.get_output_embeddings()]
    return [path for path, module in model.named_modules() if any(module is table for table in tables)]


def check_head_bias(model: Any) -> None:
    """Raise ModelError if trained embedding rows would make PEFT leave out the bias of the output head."""
    # TrainableTokensLayer of peft 0.21 computes x W^T without it, so the model would lose what the bias contributes.
    if getattr(model.get_output_embeddings(), "bias", None) is not None and not has_tied_embeddings(model):
        what = "lora.new_tokens: PEFT leaves out the bias of this model's output head if rows of it are trained"
        raise ModelError(what, fix="train without new tokens, or on another base")


def check_score_head(config: Any) -> None:
    """Raise ModelError if transformers has no sequence classifier of this family that could load a score head."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        what = f"{config.model_type}: transformers has no AutoModelForSequenceClassification of this family"
        raise ModelError(what, fix="choose another base")


def add_score_head(model: nn.Module, outputs: int) -> None:
    """Add a randomly initialized score head, a linear layer without bias, of which PEFT trains a copy."""
    output = cast(Any, model).get_output_embeddings().weight
    head = nn.Linear(output.shape[1], outputs, bias=False, device=output.device, dtype=torch.float32)
    if not output.is_meta:
        nn.init.normal_(head.weight, std=SCORE_HEAD_STD)
    model.add_module(SCORE_HEAD, head.requires_grad_(False))


def find_score_head(model: nn.Module) -> nn.Module | None:
    return cast(nn.Module | None, getattr(cast(Any, model).get_base_model(), SCORE_HEAD, None))


def init_loftq(model: peft.PeftModel, source: Source) -> None:
    """Initialize A and B of each quantized layer and expert so that scale * B A approximates its quantization error."""
    # One iteration of LoftQ (arXiv:2310.08659). PEFT's replace_lora_weights_loftq needs CUDA and ignores LoRA's scale.
    # Reads the 16-bit weights one at a time (ModelError without them), and uses torch's random generator.
    if prequantized(source.config()):
        what = f"{source.name}: its weights are already quantized, so the quantization error is unknown"
        raise ModelError(what, fix="use --lora.init default")
    tensors = CheckpointTensors(weights_folder(source))
    layout = CheckpointLayout(load_without_weights(source), tensors)
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, PeftLinear):
            base, name = module.base_layer, f"{path}.weight"
            weight = base.dequantize() if isinstance(base, QuantizedLinear) else base.weight
            original = layout.read(layout.group_of(name), tensors.get)[name]
            error = original.to(weight.device).float() - weight.detach().float()
            for a, b, scale in _active_factors(module):
                _set_low_rank(a, b, scale, error)
        elif isinstance(module, ParamWrapper):
            experts, leaf = module.get_base_layer(), module.parameter_name
            if not isinstance(experts, QuantizedExperts) or leaf not in experts.packed:
                continue
            name = f"{path.partition('.base_layer')[0]}.{leaf}"  # a layer has a wrapper for each parameter
            original = layout.read(layout.group_of(name), tensors.get)[name]
            for expert, whole in enumerate(original):
                weight = experts.packed[leaf].dequantize(expert)
                error = whole.to(weight.device).float() - weight.float()
                error = error.t() if experts.is_transposed else error
                for a, b, scale in _active_factors(module):
                    a, b = split_by_expert(a, b, experts.num_experts)
                    _set_low_rank(a[expert], b[expert], scale, error)


def _active_factors(module: LoraLayer) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield A and B of each active adapter, which may be changed in place, and its scale."""
    for name in module.active_adapters:
        yield module.lora_A[name].weight.data, module.lora_B[name].weight.data, module.scaling[name]


def _set_low_rank(a: Tensor, b: Tensor, scale: float, error: Tensor) -> None:
    """Set A (r, in) and B (out, r) in place, so that scale * B A is near the error (out, in), unless it is zero."""
    rank = min(len(a), *error.shape)
    if not error.any():
        return
    u, s, v = torch.svd_lowrank(error, q=min(rank + LOFTQ_OVERSAMPLING, *error.shape), niter=LOFTQ_ITERATIONS)
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    root = (s / scale).sqrt()
    a[:rank] = root[:, None] * v.t()
    b[:, :rank] = u * root
