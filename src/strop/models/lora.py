"""LoRA on a transformers model, through peft: which linear layers, which rank, and what is refused."""

from __future__ import annotations

import math
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import peft
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from strop.config.schema import LoraSection
from strop.errors import ModelError, RecipeError, nearest
from strop.models.experts import adapted_as_parameters, expert_parameters, is_experts, is_weight_adapter, expert_sizes, patch_experts_forward
from strop.models.families.shape import (
    EMBEDDINGS,
    EXPERTS,
    LinearKind,
    embedding_kind,
    expert_target_sets,
    is_router,
    matches_pattern,
    target_sets,
    target_names,
)
from strop.models.introspect import in_text, text_path
from strop.models.lora import SCORE_HEAD, REWARD_TASK, add_score_head, check_score_head
from strop.models.quantize import QuantizedLinear, addmm_linear, is_plain_linear, directly_read_leaves, why_kept_16_bit

ROWS = 4096  # of a weight, looked at together
OLD_NAME = "`is_gradient_checkpointing`"  # by which peft 0.21 asks transformers 5.2x, and which that warns of


def linear_kinds(model: nn.Module) -> list[LinearKind]:
    """Every kind of linear layer that text passes through, and of experts, in the model's order; routers and the output
    head belong to no target set."""
    whole: Any = model
    head, inside, apart = whole.get_output_embeddings(), in_text(model), adapted_as_parameters(model)
    refused = directly_read_leaves(model)
    found: dict[tuple[Any, ...], list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        if (is_plain_linear(module) or isinstance(module, Conv1D)) and inside(path):
            sizes_ = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
            out_of_sets = (
                is_router(path)
                or (bool(apart) and path.endswith(".gate"))
                or module is head
                or path.rpartition(".")[2] in refused
            )
            sets = () if out_of_sets else target_sets(path)
            key = (path.rpartition(".")[2], type(module).__name__, *sizes_, sets)
            found.setdefault(key, []).append((path, module))
    leaves = {leaf: {key[4] for key in found if key[0] == leaf} for leaf in (key[0] for key in found)}
    kinds = []
    for (leaf, kind, inputs, outputs, sets), members in found.items():
        path, module = members[0]
        unlike = len(leaves[leaf]) > 1 or leaf.isdigit()
        kept = (
            "adapted by its weight" if leaf in apart and leaf != "lm_head"
            else why_kept_16_bit(path, module, head, refused) if isinstance(module, nn.Linear) else "Conv1D"
        )  # fmt: skip
        kinds.append(LinearKind(_suffix(path) if unlike else leaf, kind, inputs, outputs, len(members), sets, kept))
    return [*kinds, *_expert_kinds(model, inside)]


def _suffix(path: str) -> str:
    """The last parts of a path that tell layers of one leaf name apart: from behind its last number on, or, where it
    ends with numbers, from the word before them."""
    parts = path.split(".")
    word = max(n for n, part in enumerate(parts) if not part.isdigit())
    if word < len(parts) - 1:
        return ".".join(parts[word:])
    numbers = [n for n, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[max([0, *(n + 1 for n in numbers)]) :])


def _expert_kinds(model: nn.Module, inside: Callable[[str], bool]) -> list[LinearKind]:
    found: dict[tuple[str, int, int, tuple[str, ...], bool], int] = {}
    for path, name, module, weight in expert_parameters(model):
        if inside(path):
            key = (f"{path.rpartition('.')[2]}.{name}", *expert_sizes(module, weight), expert_target_sets(name), is_experts(module))
            found[key] = found.get(key, 0) + len(weight)
    return [
        LinearKind(name, EXPERTS, inputs, outputs, count, sets, None if usual else "an unusual layer of experts")
        for (name, inputs, outputs, sets, usual), count in found.items()
    ]


def embedding_kinds(model: nn.Module) -> list[LinearKind]:
    inside = in_text(model)
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Embedding) and inside(path)]
    return [embedding_kind(path.rpartition(".")[2], m.num_embeddings, m.embedding_dim) for path, m in found]


def check_lora(model: nn.Module, section: LoraSection) -> list[str]:
    """The leaf names to adapt; needs no weights (a skeleton will do).

    Raises ModelError where targets match nothing, patterns match no target, or tied embeddings would be trained as
    two copies of which one is lost on reload (peft#2018, transformers#45127); RecipeError where what is to be trained
    in full has no weights, or leaves nothing to adapt.
    """
    kinds = linear_kinds(model)
    names = target_names(kinds, section.target_modules)
    _check_experts(kinds, names, section)
    check_modules_to_save(model, section.modules_to_save)
    adapted = _adapted(model, names, section.modules_to_save)
    if section.modules_to_save and not adapted:
        what = f"lora.modules_to_save: {', '.join(section.modules_to_save)} leaves no layer for an adapter"
        raise RecipeError(what, fix="name smaller modules, or other lora.target_modules")
    for field, pattern in (("rank_pattern", section.rank_pattern), ("alpha_pattern", section.alpha_pattern)):
        for key in pattern:
            if not any(matches_pattern(key, path) for path in adapted):
                what = f"lora.{field}: {key} matches no layer with an adapter{nearest(key, names)}"
                raise ModelError(what, fix=f"the adapters are on {', '.join(names)}")
    return names


def check_modules_to_save(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ModelError and RecipeError for modules that cannot be trained in full."""
    for name in names:
        found = find_modules_to_save(model, name)
        if not name or not any(_ends(path, [name]) for path in found):
            raise ModelError(f"lora.modules_to_save: no module {name}", fix="see `strop modules MODEL`")
        if bare := [path for path, module in found.items() if next(module.parameters(), None) is None]:
            what = f"lora.modules_to_save: {name} stands for all modules that end so, and {bare[0]} has no weights"
            others = ", ".join(path for path in count_path_kinds(found) if path not in count_path_kinds(bare))
            raise RecipeError(what, fix=f"give more of the path, of {others}" if others else "leave it out")
        if _tied(model) and any(path.rpartition(".")[2] in EMBEDDINGS for path in found):
            raise ModelError(
                f"lora.modules_to_save: {name} shares its weights with another module in this model",
                fix="list new tokens in lora.new_tokens, which trains their rows only and keeps the tie",
            )


def find_modules_to_save(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """By path, what peft trains in full for a name in modules_to_save: all that end with it, be it inside a word."""
    return {path: module for path, module in model.named_modules(remove_duplicate=False) if path.endswith(name)}


def count_path_kinds(paths: Iterable[str]) -> dict[str, int]:
    """How many there are of each kind of path, with a star for the number of a layer."""
    return dict(Counter(re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in paths))


def add_lora(model: nn.Module, section: LoraSection, tokenizer: Any, *, scored: bool = False) -> peft.PeftModel:
    """The model with trainable fp32 adapters on its frozen base; `section.alpha` must be resolved.

    scored: with a trained head that scores texts, as a reward model has.

    New tokens are added to the tokenizer, and their embedding rows are trained and saved with the adapter.
    """
    assert section.alpha is not None
    names = check_lora(model, section)
    new_rows = _add_tokens(model, section.new_tokens, tokenizer)
    where, whole = _where(model, names), list(section.modules_to_save)
    if scored:
        check_score_head(cast(Any, model).config)
        add_score_head(model)
        whole.append(SCORE_HEAD)
    config = peft.LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        bias=section.bias,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights=section.init if section.init == "gaussian" else True,  # loftq: filled in by loftq.py
        rank_pattern=dict(section.rank_pattern),
        alpha_pattern=dict(section.alpha_pattern),
        modules_to_save=whole or None,
        task_type=REWARD_TASK if scored else "CAUSAL_LM",
        **where,
        **({"trainable_token_indices": new_rows} if new_rows else {}),
    )
    with ignore_peft_warnings():
        adapted = peft.get_peft_model(model, config)
    return patch_lora_forward(cast_trainable_to_fp32(adapted))


@contextmanager
def ignore_peft_warnings(*messages: str) -> Iterator[None]:
    """Inside it neither these warnings are shown, nor what transformers says of peft's use of an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "|".join((OLD_NAME, *messages)))
        yield


def _where(model: nn.Module, names: list[str]) -> dict[str, Any]:
    """peft's settings that say where adapters sit: linear layers by name, experts by parameter, and no other tower."""
    kinds, apart, inside = linear_kinds(model), adapted_as_parameters(model), text_path(model)
    experts = {kind.name for kind in kinds if kind.type == EXPERTS}
    by_weight = [name for name in names if name not in experts and name.rpartition(".")[2] in apart]
    parameters = [*(name for name in names if name in experts), *(f"{name}.weight" for name in by_weight)]
    chosen = [name for name in names if name not in experts and name not in by_weight]
    found: dict[str, Any] = {"target_modules": chosen}
    if parameters:
        found["target_parameters"] = parameters
    if inside and any(_ends(path, chosen) and not path.startswith(inside) for path, _ in model.named_modules()):
        found["exclude_modules"] = rf"(?!{re.escape(inside)}).*"
    if any(kind.type == "Conv1D" and kind.name in chosen for kind in kinds):
        found["fan_in_fan_out"] = True
    return found


def _adapted(model: nn.Module, names: list[str], whole: Sequence[str]) -> list[str]:
    """Paths of the layers, and of the parameters with experts, that adapters sit on, as peft's patterns meet them.

    whole: modules trained in full; none sits on those, nor inside of them."""
    where, inside = _where(model, names), in_text(model)
    layers = [path for path, _ in model.named_modules() if _ends(path, where["target_modules"])]
    weights = [path for path, _ in model.named_parameters() if _ends(path, where.get("target_parameters", ()))]
    return [
        path
        for path in (*layers, *weights)
        if inside(path) and not any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in whole)
    ]


def _ends(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _check_experts(kinds: Sequence[LinearKind], names: Sequence[str], section: LoraSection) -> None:
    """Raises ModelError for what peft's adapters on parameters cannot do."""
    if not any(kind.type == EXPERTS and kind.name in names for kind in kinds):
        return
    for field, asked in (("dropout", section.dropout > 0), ("use_dora", section.use_dora)):
        if asked:
            what = f"lora.{field}: adapters on a mixture's experts are on parameters, where peft has no {field}"
            raise ModelError(what, fix=f"leave lora.{field} out, or give --lora.target_modules attention")


def patch_lora_forward(model: peft.PeftModel) -> peft.PeftModel:
    """The plain LoRA layers add the base's product to what the adapters add, and not the other way round.

    In bf16 the base's product is rounded, and what a young adapter adds to it is below half of its last bit: peft's own
    forward rounds it away (docs/performance.md has what that costs).
    """
    for module in model.modules():
        if (type(module) is PeftLinear or is_weight_adapter(module)) and isinstance(module.base_layer, nn.Linear):
            module.forward = partial(_summed_once, module)
    patch_experts_forward(model)
    return model


def _summed_once(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = [name for name in module.active_adapters if name in module.lora_A]
    others = module.disable_adapters or module.merged or any(name in module.lora_variant for name in names)
    if args or kwargs or others or not names:
        result: Tensor = type(module).forward(module, x, *args, **kwargs)
        return result
    wide = x.to(module.lora_A[names[0]].weight.dtype)
    changes = [adapter_delta(module, name, module.lora_dropout[name](wide)) for name in names]
    return add_to_base(module.base_layer, x, sum(changes[1:], changes[0]))


def adapter_delta(module: Any, name: str, x: Tensor) -> Tensor:
    """What one adapter of a layer adds, in the type of the adapter."""
    a, b = module.lora_A[name], module.lora_B[name]
    result: Tensor = b(a(x.to(a.weight.dtype))) * module.scaling[name]
    return result


def add_to_base(base: nn.Linear, x: Tensor, change: Tensor) -> Tensor:
    """change + x W^T, rounded once, and then the bias; in fp32, where nothing is lost, in the usual order."""
    if x.dtype == torch.float32:
        return cast(Tensor, base(x)) + change
    low = change.to(x.dtype)
    result = base.product(x, low) if isinstance(base, QuantizedLinear) else addmm_linear(low, x, base.weight)
    return result if base.bias is None else result + base.bias.to(result.dtype)  # a trained one is in fp32


def cast_trainable_to_fp32(model: peft.PeftModel) -> peft.PeftModel:
    """Trainable weights in fp32 whatever the base: in bf16 small updates round away (TRAPS 2, 16). A module that is
    trained in full takes and gives the base's type."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            kind = next(module.original_module.parameters()).dtype
            for kept in module.modules_to_save.values():
                kept.register_forward_pre_hook(_widened)
                kept.register_forward_hook(lambda _, __, found, kind=kind: found.to(kind))
    return model


def set_dropout(model: peft.PeftModel, share: float) -> None:
    """Dropout in front of all adapters, in the place of what they were saved with."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(share) if share else nn.Identity()
    for config in model.peft_config.values():
        cast(peft.LoraConfig, config).lora_dropout = share


def _widened(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating-point inputs in the type of the module's weights."""
    kind = next(module.parameters()).dtype
    return tuple(x.to(kind) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def count_trainable(skeleton: nn.Module, section: LoraSection, *, scored: bool = False) -> int:
    """Weights that `add_lora` would make trainable, counted on a model without weights, which takes the adapters."""
    bare = section.model_copy(update={"new_tokens": [], "alpha": section.alpha or 1.0})
    adapted = add_lora(load_without_weights, bare, None, scored=scored)
    width = load_without_weights.get_input_embeddings().embedding_dim  # type: ignore[operator]
    rows = len(section.new_tokens) * width * len(embedding_paths(load_without_weights))
    return sum(weight.numel() for weight in trainable_parameters(adapted).values()) + int(rows)


def weight_change(parts: Iterable[nn.Module]) -> float | None:
    """How far the adapters move the weights they sit on: the median over layers of |s B A| / |W| (Frobenius norms).

    parts: of the model, each looked at before the next is asked for. None where no plain LoRA layer sits on a
    floating-point weight.
    """
    shares = []
    for module in (module for part in parts for module in part.modules()):
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
        # Some rows at a time, since they become fp32: of a head all of them are 4 bytes a number more.
        rows = torch.split(base.weight.detach(), ROWS)
        norm = float(torch.stack([torch.linalg.vector_norm(part, dtype=torch.float32) for part in rows]).norm())
        shares.append(math.sqrt(max(squared, 0.0)) / norm if norm else 0.0)
    return statistics.median(shares) if shares else None


def _add_tokens(model: nn.Module, tokens: Sequence[str], tokenizer: Any) -> dict[str, list[int]]:
    """The rows to train, by the name of their module."""
    if not tokens:
        return {}
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    grow_vocabulary(model, len(tokenizer))
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    return dict.fromkeys((path.rpartition(".")[2] for path in embedding_paths(model)), ids)


def grow_vocabulary(model: Any, size: int) -> None:
    """Gives a model embedding rows for `size` tokens, where it has fewer: the mean of those there are.

    transformers would draw them at random: rows of an untied head would be others each time that the model is loaded.
    """
    before = model.get_input_embeddings().num_embeddings
    if size <= before:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    for path in embedding_paths(model):
        weight = model.get_submodule(path).weight
        with torch.no_grad():
            weight.copy_(extend_rows(weight[:before], size))


def extend_rows(weight: Tensor, size: int) -> Tensor:
    """An embedding (rows, hidden) with rows added up to `size`: their mean, taken in fp32."""
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(size - len(weight), -1)])


def embedding_paths(model: Any) -> list[str]:
    """Paths of the modules with a row a token: the input embeddings, and the head where it has weights of its own."""
    found = [model.get_input_embeddings(), *([] if _tied(model) else [model.get_output_embeddings()])]
    return [path for path, module in model.named_modules() if any(module is one for one in found)]


def _tied(model: nn.Module) -> bool:
    """By the config; of a model with several towers, whose config may say it of one, by the weights themselves."""
    whole: Any = model
    if whole.config.get_text_config() is whole.config:
        return bool(getattr(whole.config, "tie_word_embeddings", False))
    head = whole.get_output_embeddings()
    return head is not None and head.weight is whole.get_input_embeddings().weight


# ---- from strop.models.reward_head ----
"""The head of a reward model: one number for a text, from what the model holds at its last token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from strop.errors import ModelError

SCORE_HEAD = "score"  # as the sequence classifiers of transformers call it
REWARD_TASK = "SEQ_CLS"
START = 0.02  # standard deviation at the start, as transformers has it


def check_score_head(config: Any) -> None:
    """Raises ModelError for a family of which transformers has no sequence classifier: nothing could load the head."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        what = f"{config.model_type}: transformers has no AutoModelForSequenceClassification of this family"
        raise ModelError(what, fix="choose another base for a reward model")


def add_score_head(model: nn.Module) -> None:
    """Gives a causal language model a score head, drawn anew; peft trains and saves a copy of it."""
    output = cast(Any, model).get_output_embeddings().weight
    head = nn.Linear(output.shape[1], 1, bias=False, device=output.device, dtype=torch.float32)
    if not output.is_meta:
        nn.init.normal_(head.weight, std=START)
    model.add_module(SCORE_HEAD, head.requires_grad_(False))


def find_score_head(model: nn.Module) -> nn.Module | None:
    """The score head of a model with adapters; None where it has none."""
    found: nn.Module | None = getattr(cast(Any, model).get_base_model(), SCORE_HEAD, None)
    return found


# ---- from strop.models.loftq ----
"""LoftQ's first values (arXiv:2310.08659, one round): the adapter begins as what quantization took from each weight.

peft's own replace_lora_weights_loftq needs a CUDA device and leaves LoRA's scale out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor

from strop.errors import ModelError
from strop.models.load import load_without_weights, weights_folder
from strop.models.quantize import QuantizedLinear
from strop.models.source import Source, prequantized
from strop.models.tensor_files import CheckpointLayout, CheckpointTensors

ROUNDS, SPARE = 8, 8  # of the power iteration, and directions beyond the rank that it is given (arXiv:0909.4061)


def init_loftq(model: peft.PeftModel, source: Source) -> None:
    """Sets A and B of each quantized layer to the nearest scale B A to its 16-bit weight less its quantized one.

    Reads the 16-bit weights one at a time. Draws from torch's generator. Raises ModelError where there are none.
    """
    if prequantized(source.config()):
        raise ModelError(
            f"{source.name}: its weights are quantized already, what was lost is not known",
            fix="use --lora.init default",
        )
    tensors = CheckpointTensors(weights_folder(source))
    layout = CheckpointLayout(load_without_weights(source), tensors)
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, PeftLinear):
            held = module.base_layer
            now = held.dequantized() if isinstance(held, QuantizedLinear) else held.weight
            whole = layout.read(layout.group_of(f"{path}.weight"), tensors.get)[f"{path}.weight"]
            lost = whole.to(now.device).float() - now.detach().float()
            if lost.any():
                for name in module.active_adapters:
                    _set(module, name, lost)


def _set(module: PeftLinear, name: str, lost: Tensor) -> None:
    rank = min(module.r[name], *lost.shape)
    u, s, v = torch.svd_lowrank(lost, q=min(rank + SPARE, *lost.shape), niter=ROUNDS)
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    share = (s / module.scaling[name]).sqrt()
    module.lora_A[name].weight.data[:rank] = share[:, None] * v.t()
    module.lora_B[name].weight.data[:, :rank] = u * share


def why_base_changed(config: Mapping[str, Any]) -> str | None:
    """Of an adapter's config: why it does not belong to its base as that is stored. Some ways to begin take the first
    weights out of the base (PiSSA, arXiv:2404.02948), and what was trained stands on the rest."""
    start = str(config.get("init_lora_weights", True)).lower()
    if not start.startswith(("pissa", "corda", "olora", "lora_ga", "loftq")):
        return None
    convert = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    return f"trained with init_lora_weights {start} on a base that peft changed: make it plain LoRA there, by {convert}"
