"""Compute a model's sizes and linear layers from its config alone, and select the layers that get adapters."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from strop.config.schema import LoraSection
from strop.errors import ModelError, suggest
from strop.models.families.table import FAMILIES, ConfigDefaults, Family
from strop.models.source import (
    base_of_run,
    demo_file,
    download_config,
    is_demo,
    prequantized,
    read_config,
    read_headers,
)
from strop.runs.folder import is_run

ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function")
MAX_SIZE, MAX_LAYERS = 1 << 28, 10_000  # larger values in a config are errors
MIN_QUANTIZED_SIZE = 512  # smaller weights stay in 16 bit, as quantization constants would take more memory than saved
TARGET_SETS = ("all-linear", "attention", "gate", "experts")
EXPERTS = "Experts"  # LinearKind.type of a parameter that contains all experts of a layer
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")

# Config fields with the number of experts of a mixture.
EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Config fields with the number of layers, and with a list that has one entry per layer.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
LAYER_LISTS = ("layer_types", "layers_block_type", "hybrid_override_pattern")


@dataclass(frozen=True)
class LinearKind:
    """A group of linear layers with the same leaf name and shape, such as the q_proj of all decoder layers."""

    name: str
    type: str
    in_features: int
    out_features: int
    count: int
    sets: tuple[str, ...]  # the target sets that contain it
    why_16_bit: str | None  # the reason why it stays in 16 bit in a quantized base; None if it is quantized

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features * self.count


def target_names(kinds: Sequence[LinearKind], targets: str | Sequence[str]) -> list[str]:
    """Return the leaf names for PEFT to adapt. Raises ModelError for a target that matches nothing.

    A target is a set, the end of a name as in PEFT (c_proj of attn.c_proj), or a path.
    """
    names: list[str] = []
    for target in [targets] if isinstance(targets, str) else targets:
        matching = [
            kind.name
            for kind in kinds
            if target in kind.sets or f".{kind.name}".endswith(f".{target}") or f".{target}".endswith(f".{kind.name}")
        ]
        if not matching:
            known = list(dict.fromkeys(kind.name for kind in kinds))
            what = f"lora.target_modules: {target} matches no linear layer{suggest(target, known)}"
            raise ModelError(what, fix=f"choose among {', '.join([*TARGET_SETS, *known])}")
        names += matching
    return list(dict.fromkeys(names))


def check_lora_paths(lora: LoraSection, names: Sequence[str], paths: Sequence[str]) -> None:
    """Raise ModelError for a target or a pattern that does not apply as written.

    names: of `target_names`. paths: of the modules that get adapters.
    """
    _check_targets(lora.target_modules, names, paths)
    _check_pattern("rank_pattern", lora.rank_pattern, paths, names)
    _check_pattern("alpha_pattern", lora.alpha_pattern, paths, names)


def _check_targets(targets: str | Sequence[str], names: Sequence[str], paths: Sequence[str]) -> None:
    """Raise ModelError for a target that is a path of modules if others have its leaf name: all would get adapters."""
    targets = [targets] if isinstance(targets, str) else targets
    for target in targets:
        for name in (name for name in names if f".{target}".endswith(f".{name}") and name != target):
            same = [path for path in paths if f".{path}".endswith(f".{name}")]
            if not all(any(f".{path}".endswith(f".{other}") for other in targets) for path in same):
                number = sum(f".{path}".endswith(f".{target}") for path in same)
                what = f"lora.target_modules: {target} is the end of {number} of the {len(same)} paths of {name}"
                raise ModelError(what, fix=f"give {name}: strop adapts all layers of a name")


def matches_pattern(pattern: str, path: str) -> bool:
    """Return whether PEFT applies a key of `rank_pattern` or `alpha_pattern` to a module's path."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _check_pattern(field: str, pattern: Mapping[str, float], paths: Sequence[str], names: Sequence[str]) -> None:
    """Raise ModelError for a key that applies to no module. Of those that match a module, PEFT takes the first."""
    for i, key in enumerate(pattern):
        matched = [path for path in paths if matches_pattern(key, path)]
        if not matched:
            what = f"lora.{field}: {key} matches no layer with an adapter{suggest(key, names)}"
            raise ModelError(what, fix=f"the adapters are on {', '.join(names)}")
        earlier = [[other for other in list(pattern)[:i] if matches_pattern(other, path)] for path in matched]
        if all(earlier):
            what = f"lora.{field}: {key} has no effect: {earlier[0][0]} is given before it and matches the same layers"
            raise ModelError(what, fix=f"give {key} first")


def embedding_kind(name: str, rows: int, size: int, count: int = 1) -> LinearKind:
    """Return the entry of an embedding for `strop modules`: it gets no adapter and stays in 16 bit."""
    return LinearKind(name, "Embedding", rows, size, count, (), "embedding")


def target_sets(path: str) -> tuple[str, ...]:
    parent, _, leaf = path.rpartition(".")
    if leaf in EMBEDDINGS or not parent:
        return ()
    owners = parent.split(".")[-2:]  # BERT's paths end with attention.self.query
    return (
        "all-linear",
        *(("attention",) if any("attn" in part or "attention" in part for part in owners) else ()),
        *(("gate",) if leaf in ("gate_proj", "gate_up_proj") else ()),
    )


def expert_target_sets(parameter: str) -> tuple[str, ...]:
    return ("all-linear", "experts", *(("gate",) if parameter in ("gate_proj", "gate_up_proj") else ()))


def is_router(path: str) -> bool:
    """Return whether a linear layer routes tokens to experts; no target set contains it."""
    parent, _, leaf = path.rpartition(".")
    return leaf in ("router", "shared_expert_gate") or parent.rpartition(".")[2] == "router"


@dataclass(frozen=True)
class LinearShape:
    """A linear layer of the decoder layers, or all experts of a mixture's decoder layer."""

    path: str  # relative to the decoder layer
    inputs: int
    outputs: int
    bias: bool = False
    share: float = 1  # mean number per decoder layer: 1/4 if every fourth layer has one, 128 for 128 experts
    active: float = 1  # the fraction of the experts that a token is routed to
    sets: tuple[str, ...] | None = None  # its target sets; None: derived from the path
    kept_16_bit: bool = False  # in a quantized base

    @property
    def name(self) -> str:
        return ".".join(self.path.split(".")[-2:]) if self.is_expert else self.leaf

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def is_expert(self) -> bool:
        return "experts" in (self.sets or ())

    @property
    def weights(self) -> int:
        return round(self.share * self.inputs * self.outputs)

    @property
    def active_weights(self) -> int:
        return round(self.active * self.weights)

    @property
    def total_outputs(self) -> int:
        """Mean number of outputs per decoder layer."""
        return round(self.share * self.outputs)

    @property
    def adapter_size(self) -> float:
        """Mean number of weights per decoder layer of rank-1 adapters."""
        return self.share * (self.inputs + self.outputs)

    @property
    def is_small(self) -> bool:
        return self.inputs * self.outputs < MIN_QUANTIZED_SIZE


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model, which its config determines."""

    family: str
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    linears: tuple[LinearShape, ...]
    norm_weights: int  # of one decoder layer
    known: bool = True  # the family table has config_defaults, so `parameters` is exact
    activation: str = "silu"
    softcap: bool = False  # attention scores have a soft cap
    rope: str = "default"
    prequantized: str | None = None  # how the weights are quantized on disk
    experts: int = 1  # in each MLP; `intermediate` is the total size of those that a token is routed to
    balanced: bool = False  # the config enables a load-balancing loss
    other_biases: int = 0  # bias elements outside of `linears`, such as of norms or the output head
    positions: int | None = None  # the maximum sequence length, if the config has one
    learned: bool = False  # has learned position embeddings, so longer sequences are impossible
    # not in the repr, which is a cache key
    projector_weights: int = field(default=0, repr=False)  # of the projector that lora.vision trains in full
    tower_sizes: int = field(default=0, repr=False)  # inputs and outputs of the linear layers that it adapts, in total
    image_patches: int = field(default=0, repr=False)  # of the largest image, if the image encoder is trained
    text_config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    stored_dtype: str = field(default="bfloat16", repr=False, compare=False)  # of the weight files, by the config

    @property
    def query_size(self) -> int:
        return self.heads * self.head_size

    @property
    def key_value_size(self) -> int:
        return self.key_value_heads * self.head_size

    @property
    def head_norms(self) -> bool:
        return (_config_defaults(self.family) or ConfigDefaults()).head_norms

    @property
    def embedding_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def quantizable_weights(self) -> int:
        """Number of weights that quantization stores in 4 or 8 bit."""
        return self.layers * sum(x.weights for x in self.linears if not (x.is_small or x.kept_16_bit))

    @property
    def idle_expert_weights(self) -> int:
        return self.layers * sum(linear.weights - linear.active_weights for linear in self.linears)

    @property
    def expert_linears(self) -> tuple[LinearShape, ...]:
        return tuple(linear for linear in self.linears if linear.is_expert)

    @property
    def biases(self) -> int:
        return self.layers * sum(linear.total_outputs for linear in self.linears if linear.bias) + self.other_biases

    def too_long_message(
        self, lengths: Sequence[int] | npt.NDArray[np.int64], completion_tokens: int = 0
    ) -> str | None:
        """Return a message on how many rows (lengths in tokens) exceed the model's maximum length, or None."""
        if self.positions is None:
            return None
        too_long = int((np.asarray(lengths) + completion_tokens > self.positions).sum())
        rows = f"rows, with a completion of {completion_tokens:,} tokens," if completion_tokens else "rows"
        message = f"{too_long:,} of {len(lengths):,} {rows} are longer than the {self.positions:,} tokens"
        return f"{message} that the model was made for" if too_long else None

    @property
    def parameters(self) -> int:
        layer = sum(linear.weights for linear in self.linears) + self.norm_weights
        return self.layers * layer + self.biases + self.embedding_weights * (1 if self.tied else 2) + self.hidden

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> ModelShape:
        """Return the shape from a config. Raises ModelError if a size is missing that every decoder has."""
        text = next((config[part] for part in ("text_config", "decoder_config", "decoder") if config.get(part)), config)
        name = str(text.get("model_type") or config.get("model_type") or "")
        family_defaults = _config_defaults(name)
        defaults = family_defaults or ConfigDefaults()
        family = FAMILIES[name] if family_defaults else Family()
        get = partial(_get_size, text, name)
        hidden = get("hidden_size", "n_embd", "d_model", "dim", "emb_dim")
        heads = get("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", default=1)
        head_size = text.get("head_dim") or defaults.head_size or hidden // heads
        key_value_heads = get("num_key_value_heads", default=heads)
        inner = get("intermediate_size", "n_inner", "ffn_dim", "d_ff", default=4 * hidden)
        experts = _count_experts(text)
        chosen = get("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", default=1)
        expert_inner = get("moe_intermediate_size", default=inner)
        linears = _dense_linears(family, defaults, text, hidden, heads * head_size, key_value_heads * head_size, inner)
        if experts > 1:
            linears = (*linears[:-3], *_expert_linears(hidden, expert_inner, experts, chosen))
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        list_length = len(next((text[field] for field in LAYER_LISTS if text.get(field)), ()))
        return ModelShape(
            family=name, layers=get(*LAYER_COUNTS, default=list_length or None), hidden=hidden,
            heads=heads, key_value_heads=key_value_heads, head_size=head_size,
            intermediate=inner if experts == 1 else expert_inner * min(chosen, experts),
            vocabulary=get("vocab_size", "n_words"), tied=defaults.tied if tied is None else bool(tied),
            linears=linears, norm_weights=len(family.norms) * hidden + (2 * head_size if defaults.head_norms else 0),
            known=family_defaults is not None and text is config,
            activation=next((str(text[key]) for key in ACTIVATION_KEYS if text.get(key)), "silu"),
            softcap=bool(text.get("attn_logit_softcapping")), rope=_rope_type(text),
            prequantized=prequantized(config), experts=experts,
            balanced=bool(text.get("output_router_logits") and text.get("router_aux_loss_coef")),
            positions=text.get("max_position_embeddings") or text.get("n_positions"),
            text_config={**text, "model_type": name},
            stored_dtype=_stored_dtype(config, text),
        )  # fmt: skip

    def linear_kinds(self) -> list[LinearKind]:
        """Return the same list as `introspect.linear_kinds`, without the model."""
        kinds = [
            LinearKind(
                x.name, EXPERTS if x.is_expert else "Linear", x.inputs, x.outputs, max(1, round(self.layers * x.share)),
                target_sets(f"model.layers.0.{x.path}") if x.sets is None else x.sets, "small" if x.is_small else None,
            )
            for x in self.linears
        ]  # fmt: skip
        return [*kinds, LinearKind("lm_head", "Linear", self.hidden, self.vocabulary, 1, (), "output head")]


def _stored_dtype(*configs: Mapping[str, Any]) -> str:
    names = (config.get(field) for config in configs for field in ("dtype", "torch_dtype"))
    return next((str(name).removeprefix("torch.") for name in names if name), "bfloat16")


def _config_defaults(family: str) -> ConfigDefaults | None:
    return FAMILIES[family].config_defaults if family in FAMILIES else None


def _dense_linears(
    family: Family, defaults: ConfigDefaults, config: Mapping[str, Any],
    hidden: int, query_size: int, key_value_size: int, inner: int,
) -> tuple[LinearShape, ...]:  # fmt: skip
    if len(family.qkv) == 1:
        return (
            LinearShape("self_attn.o_proj", query_size, hidden),
            LinearShape("self_attn.qkv_proj", hidden, query_size + 2 * key_value_size),
            LinearShape("mlp.gate_up_proj", hidden, 2 * inner),
            LinearShape("mlp.down_proj", inner, hidden),
        )
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    qkv_bias, o_bias = (attention_bias, attention_bias) if defaults.qkv_bias is None else (defaults.qkv_bias, False)
    return (
        LinearShape("self_attn.q_proj", hidden, query_size, qkv_bias),
        LinearShape("self_attn.k_proj", hidden, key_value_size, qkv_bias),
        LinearShape("self_attn.v_proj", hidden, key_value_size, qkv_bias),
        LinearShape("self_attn.o_proj", query_size, hidden, o_bias),
        LinearShape("mlp.gate_proj", hidden, inner, mlp_bias),
        LinearShape("mlp.up_proj", hidden, inner, mlp_bias),
        LinearShape("mlp.down_proj", inner, hidden, mlp_bias),
    )


def _expert_linears(hidden: int, inner: int, experts: int, chosen: int) -> tuple[LinearShape, LinearShape]:
    active = min(1.0, chosen / experts)
    up_sets, down_sets = expert_target_sets("gate_up_proj"), expert_target_sets("down_proj")
    return (
        LinearShape("mlp.experts.gate_up_proj", hidden, 2 * inner, False, experts, active, up_sets),
        LinearShape("mlp.experts.down_proj", inner, hidden, False, experts, active, down_sets),
    )


def _rope_type(config: Mapping[str, Any]) -> str:
    """Return the type of rotary embedding; if it differs between layer types, the first in the config."""
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(section, Mapping):
        return "default"
    if section and all(isinstance(value, Mapping) for value in section.values()):
        section = next(iter(section.values()))
    return str(section.get("rope_type") or section.get("type") or "default")


def _count_experts(config: Mapping[str, Any]) -> int:
    section = {**config, **(config.get("ffn_config") or {})}
    return max(1, *(int(section.get(field) or 1) for field in EXPERT_FIELDS))


def _get_size(config: Mapping[str, Any], family: str, *fields: str, default: int | None = None) -> int:
    """Return the first of these config fields that is set. Raises ModelError for an invalid size."""
    value = next((config[field] for field in fields if config.get(field)), default)
    if isinstance(value, list) and value and all(isinstance(size, int) for size in value):
        value = round(sum(value) / len(value))  # one value per layer: use the mean
    what = f"a config of type {family or 'unknown'}"
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(f"{what} has no {fields[0]}", fix="use a decoder-only language model")
    if value > (MAX_LAYERS if fields == LAYER_COUNTS else MAX_SIZE):
        raise ModelError(f"{what}: {fields[0]} {value} is too large", fix="correct the config.json")
    return value


def linear_kinds_from_headers(folder: Path) -> list[LinearKind]:
    """List the linear layers and embeddings of any family from the headers of its weight files, without torch."""
    # Transposed weights (Conv1D) are listed as linear layers: headers do not distinguish them.
    matrices: dict[tuple[str, int, int], tuple[int, str]] = {}
    for _, header in read_headers(folder):
        for name, entry in header.items():
            path, _, last = name.rpartition(".")
            if last == "weight" and len(entry["shape"]) == 2 and entry["dtype"].startswith(("BF", "F")):
                key = (path.rpartition(".")[2], *entry["shape"])
                matrices[key] = (matrices[key][0] + 1 if key in matrices else 1, path)
    kinds = []
    for (leaf, outputs, inputs), (count, path) in matrices.items():
        if leaf != "lm_head" and (leaf in EMBEDDINGS or "emb" in leaf or leaf == "wpe"):
            kinds.append(embedding_kind(leaf, outputs, inputs, count))
            continue
        why_16_bit = "output head" if leaf == "lm_head" else "small" if inputs * outputs < MIN_QUANTIZED_SIZE else None
        kinds.append(LinearKind(leaf, "Linear", inputs, outputs, count, target_sets(path), why_16_bit))
    return kinds


@dataclass(frozen=True)
class ModelInfo:
    """A model's sizes and config, read without its weights."""

    name: str
    shape: ModelShape
    parameters: int  # from the headers of the weight files if there are any
    config: Mapping[str, Any] | None = None  # config.json if there is one
    refused: str | None = None  # the reason why it cannot be trained, if it is known not to be trainable


def read_model_info(name: str, revision: str | None = None) -> ModelInfo:
    """Return the info of a Hub id (only its config is downloaded), folder, GGUF file, config file or run."""
    path = Path(name.removeprefix("gguf:").partition("#sha256=")[0]).expanduser()
    if is_demo(name):
        path = demo_file()
    if is_run(path):
        return read_model_info(*base_of_run(path))
    if path.suffix == ".gguf":
        from strop.models.families.gguf_header import read_gguf_config  # imports gguf

        shape = ModelShape.from_config(read_gguf_config(path))
        return ModelInfo(name, shape, shape.parameters)
    if path.suffix == ".json":
        if not path.is_file():
            near = suggest(str(path), [str(entry) for entry in path.parent.glob("*")])
            raise ModelError(f"{path}: no such config file{near}")
        config = read_config(path.parent, path.name)
        shape = _shape_with_defaults(config)
        return ModelInfo(name, shape, shape.parameters, config)
    folder = path if path.is_dir() else None
    config = read_config(folder) if folder else download_config(name, revision)
    shape = _shape_with_defaults(config)
    parameters = shape.parameters
    if folder and not shape.prequantized and any(folder.glob("*.safetensors")):
        parameters = sum(math.prod(entry["shape"]) for _, header in read_headers(folder) for entry in header.values())
    return ModelInfo(name, shape, parameters, config)


def _shape_with_defaults(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape. Missing sizes are taken from the defaults of transformers' config class, without torch."""
    try:
        return ModelShape.from_config(config)
    except ModelError:
        from transformers import CONFIG_MAPPING, AutoConfig

        model_type = str(config.get("model_type"))
        if _config_defaults(model_type) or model_type not in CONFIG_MAPPING:
            raise
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            return ModelShape.from_config(AutoConfig.from_pretrained(folder).to_dict())
