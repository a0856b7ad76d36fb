"""Inspect a model's modules, usually on the meta device: linear layers, the text model of a multimodal one, sizes."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from strop.config.schema import LoraSection
from strop.errors import ModelError, RecipeError
from strop.models.experts import expert_parameters, expert_sizes, is_standard_experts, parameter_adapter_leaves
from strop.models.families.shape import (
    EMBEDDINGS,
    EXPERTS,
    LinearKind,
    LinearShape,
    ModelInfo,
    ModelShape,
    embedding_kind,
    expert_target_sets,
    is_router,
    target_sets,
)
from strop.models.load import load_config, model_without_weights
from strop.models.quantize import directly_read_leaves, is_plain_linear, why_kept_16_bit
from strop.models.source import Source, prequantized

UNUSED_POSITIONS = 2  # OPT and similar models do not use the first rows of their position embeddings
NOT_CAUSAL = "its tokens attend to later tokens, so it cannot be trained to predict them"


def linear_kinds(model: nn.Module) -> list[LinearKind]:
    """List the kinds of linear layers and experts of the text model, in the model's order."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    is_text, parameter_leaves = text_filter(model), parameter_adapter_leaves(model)
    read_directly = directly_read_leaves(model)
    groups: dict[tuple[Any, ...], list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        if (is_plain_linear(module) or isinstance(module, Conv1D)) and is_text(path):
            leaf = path.rpartition(".")[2]
            sizes = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
            is_router_gate = bool(parameter_leaves) and leaf == "gate" and path != leaf
            is_excluded = is_router(path) or is_router_gate or module is head or leaf in read_directly
            key = (leaf, type(module).__name__, *sizes, () if is_excluded else target_sets(path))
            groups.setdefault(key, []).append((path, module))
    sets_of_leaf = {leaf: {key[4] for key in groups if key[0] == leaf} for leaf in (key[0] for key in groups)}
    kinds = []
    for (leaf, type_name, inputs, outputs, sets), members in groups.items():
        path, module = members[0]
        is_ambiguous = len(sets_of_leaf[leaf]) > 1 or leaf.isdigit()
        why_16_bit: str | None = "Conv1D"
        if leaf in parameter_leaves and leaf != "lm_head":
            why_16_bit = "adapted by its weight"
        elif isinstance(module, nn.Linear):
            why_16_bit = why_kept_16_bit(path, module, head, read_directly)
        name = _distinct_suffix(path) if is_ambiguous else leaf
        kinds.append(LinearKind(name, type_name, inputs, outputs, len(members), sets, why_16_bit))
    return [*kinds, *_expert_kinds(model, is_text)]


def _distinct_suffix(path: str) -> str:
    """Return the suffix of a path without layer numbers: layers.0.mlp.gate -> mlp.gate, layers.0.mlp.1 -> mlp.1."""
    parts = path.split(".")
    if parts[-1].isdigit():
        start = max(n for n, part in enumerate(parts) if not part.isdigit())
    else:
        start = 1 + max((n for n, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[start:])


def _expert_kinds(model: nn.Module, is_text: Callable[[str], bool]) -> list[LinearKind]:
    counts: Counter[tuple[str, int, int, tuple[str, ...], bool]] = Counter()
    for path, name, module, weight in expert_parameters(model):
        if is_text(path):
            sizes = expert_sizes(module, weight)
            key = (f"{path.rpartition('.')[2]}.{name}", *sizes, expert_target_sets(name), is_standard_experts(module))
            counts[key] += len(weight)
    return [
        LinearKind(name, EXPERTS, inputs, outputs, count, sets, None if is_standard else "an unusual layer of experts")
        for (name, inputs, outputs, sets, is_standard), count in counts.items()
    ]


def embedding_kinds(model: nn.Module) -> list[LinearKind]:
    is_text = text_filter(model)
    return [
        embedding_kind(path.rpartition(".")[2], module.num_embeddings, module.embedding_dim)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and is_text(path)
    ]


def check_modules_to_save(model: nn.Module, names: Sequence[str], new_tokens: Sequence[str] = ()) -> None:
    """Raise an error if a name in `lora.modules_to_save` matches no module, tied weights, or one without weights.

    new_tokens: `lora.new_tokens`, with which embeddings cannot be trained in full too.
    """
    for name in names:
        modules = find_modules_to_save(model, name)
        if not name or not any(has_suffix(path, [name]) for path in modules):
            raise ModelError(f"lora.modules_to_save: no module {name}", fix="see `strop modules MODEL`")
        if empty := [path for path, module in modules.items() if next(module.parameters(), None) is None]:
            what = f"lora.modules_to_save: {name} matches all modules with this suffix, and {empty[0]} has no weights"
            others = ", ".join(path for path in count_path_kinds(modules) if path not in count_path_kinds(empty))
            raise RecipeError(what, fix=f"give a longer path, such as {others}" if others else "leave it out")
        if has_tied_embeddings(model) and any(path.rpartition(".")[2] in EMBEDDINGS for path in modules):
            what = f"lora.modules_to_save: {name} shares its weights with another module in this model"
            fix = "list new tokens in lora.new_tokens, which trains only their rows and keeps the weights tied"
            raise ModelError(what, fix=fix)
        if new_tokens and any(path.rpartition(".")[2] in EMBEDDINGS for path in modules):
            what = f"lora.modules_to_save: {name} is trained in full, and lora.new_tokens trains only its new rows"
            raise RecipeError(what, fix="give one of the two")


def find_modules_to_save(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return {path: module} of the modules that PEFT trains in full: its rule is `path.endswith(name)`."""
    return {path: module for path, module in model.named_modules(remove_duplicate=False) if path.endswith(name)}


def count_path_kinds(paths: Iterable[str]) -> dict[str, int]:
    """Count paths after replacing layer numbers with `*`."""
    return dict(Counter(re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in paths))


def has_suffix(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def has_tied_embeddings(model: nn.Module) -> bool:
    whole: Any = model  # a multimodal config may describe another modality's embeddings, so compare the weights
    if whole.config.get_text_config() is whole.config:
        return bool(getattr(whole.config, "tie_word_embeddings", False))
    head = whole.get_output_embeddings()
    return head is not None and head.weight is whole.get_input_embeddings().weight


def text_path(model: nn.Module) -> str:
    """Return the path, with a trailing dot, of a multimodal model's text model; "" for a text-only model."""
    whole: Any = model
    text = whole.config.get_text_config(decoder=True)
    if text is whole.config or not whole.config.sub_configs:
        return ""
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and module.config is text:
            return f"{path}."
    return ""


def text_filter(model: nn.Module) -> Callable[[str], bool]:
    """Return a function that returns whether a module or weight name is in the text model or the output head."""
    prefix, head = text_path(model), model.get_output_embeddings()  # type: ignore[operator]
    heads = tuple(path for path, module in model.named_modules() if module is head and head is not None)
    return lambda name: name.startswith((prefix, *heads)) if prefix else True


def find_image_tower(model: Any) -> nn.Module | None:
    """Return the part of a multimodal model that reads pixels: its largest model next to the text model, or None."""
    inner, text = _parts(model)
    towers = [
        child for child in inner.children()
        if isinstance(child, PreTrainedModel) and child is not text and child.main_input_name != "input_features"
    ]  # fmt: skip
    return max(towers, key=lambda tower: sum(weight.numel() for weight in tower.parameters()), default=None)


def find_projectors(model: Any) -> list[str]:
    """Return the names of the modules between the image tower and the text model: children of a multimodal model.

    Those of Qwen's models are in the tower.
    """
    tower, (inner, text) = find_image_tower(model), _parts(model)
    if tower is None:
        return []
    parts = {name: x for name, x in inner.named_children() if x not in (tower, text) and "audio" not in name}
    parts = parts or {name: child for name, child in tower.named_children() if "merger" in name}
    names = list[str]()
    for name, child in parts.items():
        inner_names = [f"{name}.{i}" for i in range(len(child))] if isinstance(child, nn.ModuleList) else [name]
        names += inner_names if any(True for _ in child.parameters()) else []
    return names


def tower_linears(model: Any) -> list[str]:
    """Return the paths of the linear layers in the repeated layers of the image tower.

    Its embeddings, a head that pools the whole image, and a projector in it are left out.
    """
    tower, projectors = find_image_tower(model), tuple(f"{name}." for name in find_projectors(model))
    if tower is None:
        return []
    [root] = [path for path, module in model.named_modules() if module is tower]
    return [
        f"{root}.{path}"
        for path, module in tower.named_modules()
        if re.search(r"\.\d+\.", path) and is_plain_linear(module) and not path.startswith(projectors)
    ]


def _parts(model: Any) -> tuple[Any, Any]:
    """Return the module that has the towers of a multimodal model, and its text model."""
    inner = getattr(model, model.base_model_prefix, model)
    prefix = text_path(model)
    return inner, model.get_submodule(prefix.removesuffix(".")) if prefix else inner


def shape_from_model(config: Mapping[str, Any], stored: Mapping[str, Any], meta_model: Any) -> ModelShape:
    """Return a model's shape, taking linear layers that the config does not determine from `meta_model`."""
    # stored: the content of config.json. config: the same with transformers' defaults.
    try:
        shape = ModelShape.from_config(config)
    except ModelError:  # its config has other names for its sizes
        embedding = meta_model.get_input_embeddings()
        lists = [module for module in meta_model.modules() if isinstance(module, nn.ModuleList)]
        sizes = {"hidden_size": embedding.embedding_dim, "vocab_size": embedding.num_embeddings}
        sizes["num_hidden_layers"] = max([1, *map(len, lists)])
        shape = ModelShape.from_config({**sizes, "model_type": config.get("model_type")})
    shape = replace(shape, prequantized=prequantized(stored), learned=learned_positions(meta_model) is not None)
    shape = _with_image_parts(shape, meta_model)
    if shape.known:
        return shape
    active = next((linear.active for linear in shape.expert_linears), 1.0)
    kinds = [kind for kind in linear_kinds(meta_model) if kind.sets or kind.type == EXPERTS]
    biased = {name.rpartition(".")[2] for name, m in meta_model.named_modules() if getattr(m, "bias", None) is not None}
    linears = tuple(
        LinearShape(
            kind.name, kind.in_features, kind.out_features, kind.name in biased, share=kind.count / shape.layers,
            active=active if kind.type == EXPERTS else 1, sets=kind.sets, kept_16_bit=kind.why_16_bit is not None,
        )
        for kind in kinds
    )  # fmt: skip
    shape = replace(shape, linears=linears or shape.linears)
    # PEFT's bias="all" trains every parameter with this suffix.
    biases = sum(weight.numel() for name, weight in meta_model.named_parameters() if name.endswith(".bias"))
    return replace(shape, other_biases=max(0, biases - shape.biases))


def why_not_causal(config: Any) -> str | None:
    """Return why a model is not causal, or None. BERT-like models are causal only if `is_decoder` is set."""
    model_type = str(config.model_type)
    is_causal = getattr(config, "is_decoder", None) is not False or model_type.startswith("gpt_neox")
    return None if is_causal else f"{model_type}: {NOT_CAUSAL}"


def refine_with_model(info: ModelInfo, *, lora: LoraSection | None = None, is_causal: bool = True) -> ModelInfo:
    """Return the info with exact sizes, from the model that transformers builds of the config on the meta device."""
    # lora: its modules_to_save are checked. is_causal: whether a model must be causal to be trained.
    config = info.config
    if config is None:
        return info
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            full_config = load_config(Source(info.name, "folder", Path(folder)))
        meta_model = model_without_weights(full_config)
    except ModelError as error:  # transformers has no such language model: keep the sizes in the config
        return replace(info, refused=error.lines()[0])
    if lora is not None:
        check_modules_to_save(meta_model, lora.modules_to_save, lora.new_tokens)
    if is_causal and (reason := why_not_causal(meta_model.config)):
        info = replace(info, refused=reason)
    if info.shape.known:
        return replace(info, shape=_with_image_parts(info.shape, meta_model))
    shape = shape_from_model(full_config.to_dict(), config, meta_model)
    return replace(info, shape=shape, parameters=count_parameters(meta_model))


def _with_image_parts(shape: ModelShape, meta_model: Any) -> ModelShape:
    """Return a shape with the sizes of what lora.vision trains."""
    linears = [meta_model.get_submodule(path) for path in tower_linears(meta_model)]
    modules = [x for name in find_projectors(meta_model) for x in find_modules_to_save(meta_model, name).values()]
    weights = {id(weight): weight.numel() for module in modules for weight in module.parameters()}
    sizes = sum(linear.in_features + linear.out_features for linear in linears)
    return replace(shape, projector_weights=sum(weights.values()), tower_sizes=sizes)


def max_positions(model: Any) -> int | None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions else None


def learned_positions(model: Any) -> int | None:
    """Return the number of learned position embeddings (GPT-2, OPT), which limits the sequence length, or None."""
    count = max_positions(model)
    if count is None or getattr(model.config.get_text_config(), "rope_parameters", None):
        return None
    tokens = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return count if any(count <= table.num_embeddings <= count + UNUSED_POSITIONS for table in tables) else None


def count_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
