"""LoRA on a transformers model, through peft: which linear layers, which rank, and what is refused."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import peft
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from strop.config.schema import LoraSection
from strop.errors import ModelError, nearest
from strop.model.quantize import QuantizedLinear, added, why_not
from strop.model.targets import EMBEDDINGS, LinearKind, embedding_kind, sets_of, target_names


def linear_kinds(model: nn.Module) -> list[LinearKind]:
    """Every kind of linear layer in the model's order; the output head belongs to no target set."""
    found: dict[tuple[str, str, int, int], tuple[int, str, nn.Linear]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            key = (path.rpartition(".")[2], type(module).__name__, module.in_features, module.out_features)
            found[key] = (found[key][0] + 1 if key in found else 1, path, module)
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    return [
        LinearKind(*key, count, sets_of(path), why_not(path, module, head))
        for key, (count, path, module) in found.items()
    ]


def embedding_kinds(model: nn.Module) -> list[LinearKind]:
    sizes = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Embedding)]
    return [embedding_kind(path.rpartition(".")[2], m.num_embeddings, m.embedding_dim) for path, m in sizes]


def check_lora(model: nn.Module, section: LoraSection) -> list[str]:
    """The leaf names to adapt; needs no weights (a skeleton will do).

    Raises ModelError where targets match nothing, patterns name no target, or tied embeddings would be trained as
    two copies of which one is lost on reload (peft#2018, transformers#45127).
    """
    names = target_names(linear_kinds(model), section.target_modules)
    modules = [path for path, _ in model.named_modules()]
    for field, pattern in (("rank_pattern", section.rank_pattern), ("alpha_pattern", section.alpha_pattern)):
        for key in pattern:
            if not any(_peft_match(key, path) for path in modules):
                raise ModelError(
                    f"lora.{field}: {key} matches no module{nearest(key, names)}", fix="see `strop modules MODEL`"
                )
    for name in section.modules_to_save:
        if not any(path == name or path.endswith(f".{name}") for path in modules):
            raise ModelError(f"lora.modules_to_save: no module {name}", fix="see `strop modules MODEL`")
        if name in EMBEDDINGS and _tied(model):
            raise ModelError(
                f"lora.modules_to_save: {name} shares its weights with another module in this model",
                fix="list new tokens in lora.new_tokens, which trains their rows only and keeps the tie",
            )
    return names


def add_lora(model: nn.Module, section: LoraSection, tokenizer: Any) -> peft.PeftModel:
    """The model with trainable fp32 adapters on its frozen base; `section.alpha` must be resolved.

    New tokens are added to the tokenizer, and their embedding rows are trained and saved with the adapter.
    """
    assert section.alpha is not None
    names = check_lora(model, section)
    new_rows = _add_tokens(model, section.new_tokens, tokenizer)
    config = peft.LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=names,
        bias=section.bias,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights=section.init if section.init == "gaussian" else True,  # loftq: filled in by loftq.py
        rank_pattern=dict(section.rank_pattern),
        alpha_pattern=dict(section.alpha_pattern),
        modules_to_save=list(section.modules_to_save) or None,
        task_type="CAUSAL_LM",
        **({"trainable_token_indices": new_rows} if new_rows else {}),
    )
    return sum_once(as_fp32(peft.get_peft_model(model, config)))


def sum_once(model: peft.PeftModel) -> peft.PeftModel:
    """The plain LoRA layers add the base's product to what the adapters add, and not the other way round.

    In bf16 the base's product is rounded, and what a young adapter adds to it is below half of its last bit: peft's own
    forward rounds it away (docs/performance.md has what that costs).
    """
    for module in model.modules():
        if type(module) is PeftLinear and isinstance(module.base_layer, nn.Linear):
            module.forward = partial(_summed_once, module)
    return model


def _summed_once(module: PeftLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = [name for name in module.active_adapters if name in module.lora_A]
    others = module.disable_adapters or module.merged or any(name in module.lora_variant for name in names)
    if args or kwargs or others or not names:
        result: Tensor = type(module).forward(module, x, *args, **kwargs)
        return result
    wide = x.to(module.lora_A[names[0]].weight.dtype)
    changes = [delta(module, name, module.lora_dropout[name](wide)) for name in names]
    return onto(module.base_layer, x, sum(changes[1:], changes[0]))


def delta(module: PeftLinear, name: str, x: Tensor) -> Tensor:
    """What one adapter of a layer adds, in the type of the adapter."""
    a, b = module.lora_A[name], module.lora_B[name]
    result: Tensor = b(a(x.to(a.weight.dtype))) * module.scaling[name]
    return result


def onto(base: nn.Linear, x: Tensor, change: Tensor) -> Tensor:
    """change + x W^T, rounded once, and then the bias; in fp32, where nothing is lost, in the usual order."""
    if x.dtype == torch.float32:
        return cast(Tensor, base(x)) + change
    low = change.to(x.dtype)
    result = base.product(x, low) if isinstance(base, QuantizedLinear) else added(low, x, base.weight)
    return result if base.bias is None else result + base.bias


def as_fp32(model: peft.PeftModel) -> peft.PeftModel:
    """Trainable weights in fp32 whatever the base: in bf16 small updates round away (TRAPS 2, 16)."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def num_trainable(skeleton: nn.Module, section: LoraSection) -> int:
    """Weights that `add_lora` would make trainable, counted on a model without weights, which takes the adapters."""
    bare = section.model_copy(update={"new_tokens": [], "alpha": section.alpha or 1.0})
    adapted = add_lora(skeleton, bare, None)
    width = skeleton.get_input_embeddings().embedding_dim  # type: ignore[operator]
    rows = len(section.new_tokens) * width * len(embeddings(skeleton))
    return sum(weight.numel() for weight in trainable(adapted).values()) + int(rows)


def weight_change(model: nn.Module) -> float | None:
    """How far the adapters move the weights they sit on: the median over layers of |s B A| / |W| (Frobenius norms).

    None where no plain LoRA layer sits on a floating-point weight.
    """
    shares = []
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if not (isinstance(module, PeftLinear) and isinstance(base, nn.Linear)):
            continue
        if not base.weight.is_floating_point():
            continue
        squared = 0.0
        for name in module.active_adapters:
            a, b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
            # |B A|^2 = sum of (B'B) * (A A'), two r x r matrices
            squared += module.scaling[name] ** 2 * float(((b.T @ b) * (a @ a.T)).sum())
        norm = float(torch.linalg.vector_norm(base.weight.detach(), dtype=torch.float32))
        shares.append(math.sqrt(max(squared, 0.0)) / norm if norm else 0.0)
    return statistics.median(shares) if shares else None


def _add_tokens(model: nn.Module, tokens: Sequence[str], tokenizer: Any) -> dict[str, list[int]]:
    """The rows to train, by the name of their module."""
    if not tokens:
        return {}
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    grow_vocabulary(model, len(tokenizer))
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    return dict.fromkeys((path.rpartition(".")[2] for path in embeddings(model)), ids)


def grow_vocabulary(model: Any, size: int) -> None:
    """Gives a model embedding rows for `size` tokens, where it has fewer: the mean of those there are.

    transformers would draw them at random: rows of an untied head would be others each time that the model is loaded.
    """
    before = model.get_input_embeddings().num_embeddings
    if size <= before:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    for path in embeddings(model):
        weight = model.get_submodule(path).weight
        with torch.no_grad():
            weight.copy_(grown(weight[:before], size))


def grown(weight: Tensor, size: int) -> Tensor:
    """An embedding (rows, hidden) with rows added up to `size`: their mean, taken in fp32."""
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(size - len(weight), -1)])


def embeddings(model: Any) -> list[str]:
    """Paths of the modules with a row a token: the input embeddings, and the head where it has weights of its own."""
    found = [model.get_input_embeddings(), *([] if _tied(model) else [model.get_output_embeddings()])]
    return [path for path, module in model.named_modules() if any(module is one for one in found)]


def _peft_match(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _tied(model: nn.Module) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))
