"""The sizes of a model from its config alone: what the plan and `strop modules` need, without torch or weights."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from strop.errors import ModelError, nearest
from strop.models.families.gguf_header import read_gguf_config
from strop.models.families.shape import EMBEDDINGS, EXPERTS, LinearKind, embedding_kind, expert_target_sets, target_sets
from strop.models.source import base_of_run, demo_file, read_headers, hub_config, prequantized, read_config
from strop.runs.folder import is_run

LARGEST, MOST_LAYERS = 1 << 28, 10_000  # of what a config may say; beyond that there is work without end
SMALLEST = 512  # weights below this many are not worth their constants: a quantized base keeps them in 16 bit


# What families call the number of their layers, and lists that have an entry a layer.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
LAYER_LISTS = ("layer_types", "layers_block_type", "hybrid_override_pattern")


@dataclass(frozen=True)
class _Family:
    """What a family's configs leave unsaid."""

    head_size: int | None = None  # where the config names none; None: hidden / heads
    tied: bool = False
    qkv_bias: bool | None = None  # None: as attention_bias says
    fused: bool = False  # one projection for q, k, v and one for gate, up
    norms: int = 2  # of width `hidden`, in a layer
    head_norms: bool = False  # of q and k


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(qkv_bias=False),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(head_size=128, head_norms=True),
    "phi3": _Family(qkv_bias=False, fused=True),
    "gemma2": _Family(head_size=256, tied=True, norms=4),
    "gemma3_text": _Family(head_size=256, tied=True, norms=4, head_norms=True),
}


@dataclass(frozen=True)
class LinearShape:
    """A linear layer of each decoder layer, or the experts of one: path in it, and its sizes.

    share: how many there are in a layer, in the mean: 1 of 4 layers has one, or one has 128. active: which part of them
    a token goes through. sets: the named target sets that hold it; None: as its path says. kept: a quantized base keeps
    it in 16 bit.
    """

    path: str
    inputs: int
    outputs: int
    bias: bool = False
    share: float = 1
    active: float = 1
    sets: tuple[str, ...] | None = None
    kept: bool = False

    @property
    def name(self) -> str:
        if "experts" in (self.sets or ()):
            return ".".join(self.path.split(".")[-2:])
        return self.path.rpartition(".")[2]

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def weights(self) -> int:
        return round(self.share * self.inputs * self.outputs)

    @property
    def active_weights(self) -> int:
        return round(self.active * self.weights)

    @property
    def rows(self) -> int:
        """Outputs of all that there are in a layer."""
        return round(self.share * self.outputs)

    @property
    def ends(self) -> int:
        """Inputs and outputs of all that there are in a layer: numbers of an adapter of rank 1."""
        return round(self.share * (self.inputs + self.outputs))

    @property
    def small(self) -> bool:
        return self.inputs * self.outputs < SMALLEST


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model's sizes. known: its family is in the table, so that `parameters` is exact."""

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
    known: bool = True
    activation: str = "silu"
    softcap: bool = False  # of the attention's scores
    rope: str = "default"
    prequantized: str | None = None  # how the weights are quantized on disk
    experts: int = 1  # of a layer's MLP; the sizes here are of one
    balanced: bool = False  # its config asks for a loss that keeps experts evenly used
    other_biases: int = 0  # numbers of biases that are not those of `linears`: of norms, of a head
    positions: int | None = None  # that it was made for, where its config says
    learned: bool = False  # it has a learned vector for each of them, and none for more

    @property
    def query(self) -> int:
        return self.heads * self.head_size

    @property
    def key_value(self) -> int:
        return self.key_value_heads * self.head_size

    @property
    def head_norms(self) -> bool:
        """Norms of q and k, head by head (Qwen 3, Gemma 3)."""
        return _FAMILIES.get(self.family, _Family()).head_norms

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def quantizable(self) -> int:
        """Weights that a quantized base holds in 4 or 8 bit."""
        return self.layers * sum(linear.weights for linear in self.linears if not (linear.small or linear.kept))

    @property
    def idle(self) -> int:
        """Weights of experts that a token does not go through."""
        return self.layers * sum(linear.weights - linear.active_weights for linear in self.linears)

    @property
    def in_experts(self) -> tuple[LinearShape, ...]:
        return tuple(linear for linear in self.linears if "experts" in (linear.sets or ()))

    @property
    def biases(self) -> int:
        """Numbers of all biases."""
        return self.layers * sum(linear.rows for linear in self.linears if linear.bias) + self.other_biases

    def beyond(self, lengths: Sequence[int] | npt.NDArray[np.int64], drawn: int = 0) -> str | None:
        """Says how many rows of these lengths are longer than what the model was made for; None where none is.

        drawn: tokens of the longest answer that is drawn to each."""
        if self.positions is None:
            return None
        over = int((np.asarray(lengths) + drawn > self.positions).sum())
        rows = f"rows, with an answer of {drawn:,} tokens," if drawn else "rows"
        said = f"{over:,} of {len(lengths):,} {rows} are longer than the {self.positions:,} tokens"
        return f"{said} that the model was made for" if over else None

    @property
    def parameters(self) -> int:
        layer = sum(linear.weights for linear in self.linears) + self.norm_weights
        return self.layers * layer + self.biases + self.embedding * (1 if self.tied else 2) + self.hidden

    @staticmethod
    def of(config: Mapping[str, Any]) -> ModelShape:
        """From config.json. Raises ModelError where it lacks a size that no decoder does without."""
        text = next((config[part] for part in ("text_config", "decoder_config", "decoder") if config.get(part)), config)
        name = str(text.get("model_type") or config.get("model_type") or "")
        family = _FAMILIES.get(name)
        known = family is not None and text is config
        family = family or _Family()
        get = _getter(text, name)
        hidden = get("hidden_size", "n_embd", "d_model", "dim", "emb_dim")
        heads = get("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", default=1)
        size = text.get("head_dim") or family.head_size or hidden // heads
        few = get("num_key_value_heads", default=heads)
        inner = get("intermediate_size", "n_inner", "ffn_dim", "d_ff", default=4 * hidden)
        experts, chosen = (
            _experts(text),
            get("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", default=1),
        )
        wide = get("moe_intermediate_size", default=inner)
        biased = bool(text.get("attention_bias", False))
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        linears = _linears(family, hidden, heads * size, few * size, inner, biased, bool(text.get("mlp_bias")))
        return ModelShape(
            family=name,
            layers=get(*LAYERS, default=len(next((text[name] for name in LAYER_LISTS if text.get(name)), ())) or None),
            hidden=hidden,
            heads=heads,
            key_value_heads=few,
            head_size=size,
            intermediate=inner if experts == 1 else wide * min(chosen, experts),
            vocabulary=get("vocab_size", "n_words"),
            tied=family.tied if tied is None else bool(tied),
            linears=linears if experts == 1 else (*linears[:-3], *_experts_of(hidden, wide, experts, chosen)),
            norm_weights=family.norms * hidden + (2 * size if family.head_norms else 0),
            known=known,
            activation=str(text.get("hidden_activation") or text.get("hidden_act") or "silu"),
            softcap=bool(text.get("attn_logit_softcapping")),
            rope=_rope(text),
            prequantized=prequantized(config),
            experts=experts,
            balanced=bool(text.get("output_router_logits") and text.get("router_aux_loss_coef")),
            positions=text.get("max_position_embeddings") or text.get("n_positions"),
        )

    def linear_kinds(self) -> list[LinearKind]:
        """As lora.linear_kinds finds them in the model itself."""
        kinds = [
            LinearKind(
                x.name, EXPERTS if "experts" in (x.sets or ()) else "Linear", x.inputs, x.outputs,
                max(1, round(self.layers * x.share)), target_sets(f"model.layers.0.{x.path}") if x.sets is None else x.sets,
                "small" if x.small else None,
            )
            for x in self.linears
        ]  # fmt: skip
        return [*kinds, LinearKind("lm_head", "Linear", self.hidden, self.vocabulary, 1, (), "output head")]


def _linears(
    family: _Family, hidden: int, query: int, narrow: int, inner: int, biased: bool, mlp_bias: bool
) -> tuple[LinearShape, ...]:
    if family.fused:
        return (
            LinearShape("self_attn.o_proj", query, hidden),
            LinearShape("self_attn.qkv_proj", hidden, query + 2 * narrow),
            LinearShape("mlp.gate_up_proj", hidden, 2 * inner),
            LinearShape("mlp.down_proj", inner, hidden),
        )
    in_bias = biased if family.qkv_bias is None else family.qkv_bias
    out_bias = biased if family.qkv_bias is None else False
    return (
        LinearShape("self_attn.q_proj", hidden, query, in_bias),
        LinearShape("self_attn.k_proj", hidden, narrow, in_bias),
        LinearShape("self_attn.v_proj", hidden, narrow, in_bias),
        LinearShape("self_attn.o_proj", query, hidden, out_bias),
        LinearShape("mlp.gate_proj", hidden, inner, mlp_bias),
        LinearShape("mlp.up_proj", hidden, inner, mlp_bias),
        LinearShape("mlp.down_proj", inner, hidden, mlp_bias),
    )


def _experts_of(hidden: int, inner: int, experts: int, chosen: int) -> tuple[LinearShape, LinearShape]:
    active = min(1.0, chosen / experts)
    up, down = "gate_up_proj", "down_proj"
    return (
        LinearShape(f"mlp.experts.{up}", hidden, 2 * inner, False, experts, active, expert_target_sets(up)),
        LinearShape(f"mlp.experts.{down}", inner, hidden, False, experts, active, expert_target_sets(down)),
    )


def _rope(config: Mapping[str, Any]) -> str:
    """The kind of rotary embedding; of several, one for each kind of layer, that of the first."""
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(section, Mapping):
        return "default"
    if section and all(isinstance(value, Mapping) for value in section.values()):
        section = next(iter(section.values()))
    return str(section.get("rope_type") or section.get("type") or "default")


def _experts(config: Mapping[str, Any]) -> int:
    section = {**config, **(config.get("ffn_config") or {})}
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return max(1, *(int(section.get(name) or 1) for name in names))


def _getter(config: Mapping[str, Any], family: str) -> Any:
    def get(*names: str, default: int | None = None) -> int:
        found = next((config[name] for name in names if config.get(name)), default)
        if isinstance(found, list) and found and all(isinstance(one, int) for one in found):
            found = round(sum(found) / len(found))  # a number a layer: their mean
        if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
            what = f"a config of type {family or 'unknown'} has no {names[0]}"
            raise ModelError(what, fix="use a decoder-only language model")
        if found > (MOST_LAYERS if names == LAYERS else LARGEST):
            raise ModelError(f"a config of type {family or 'unknown'}: {names[0]} {found} cannot be", fix="mend it")
        return found

    return get


def linear_kinds_from_headers(folder: Path) -> list[LinearKind]:
    """The linear layers and embeddings of a folder by its weight files' headers: of any family, without torch.

    Whether a matrix is laid out as a linear layer's is what the headers do not say; the model's own code does.
    """
    found: dict[tuple[str, int, int], tuple[int, str]] = {}
    for _, header in read_headers(folder):
        for name, entry in header.items():
            path, _, last = name.rpartition(".")
            if last == "weight" and len(entry["shape"]) == 2 and entry["dtype"].startswith(("BF", "F")):
                key = (path.rpartition(".")[2], *entry["shape"])
                found[key] = (found[key][0] + 1 if key in found else 1, path)
    kinds = []
    for (leaf, outputs, inputs), (count, path) in found.items():
        if leaf != "lm_head" and (leaf in EMBEDDINGS or "emb" in leaf or leaf == "wpe"):
            kinds.append(embedding_kind(leaf, outputs, inputs, count))
            continue
        kept = "output head" if leaf == "lm_head" else "small" if inputs * outputs < SMALLEST else None
        kinds.append(LinearKind(leaf, "Linear", inputs, outputs, count, target_sets(path), kept))
    return kinds


@dataclass(frozen=True)
class ModelInfo:
    """A model that was looked at from outside. parameters: by its files' headers where there are any. refused: why no
    run would train it, where that is known."""

    name: str
    shape: ModelShape
    parameters: int
    config: Mapping[str, Any] | None = None  # config.json, where there is one
    refused: str | None = None


def read_model_info(name: str, revision: str | None = None) -> ModelInfo:
    """A model's shape from config.json, a GGUF file's header or a run's base; of a Hub id the config alone is fetched.

    Raises ModelError where there is no such model, or its files do not say.
    """
    path = Path(name.removeprefix("gguf:").partition("#sha256=")[0]).expanduser()
    if name == "demo" or name.startswith("demo:"):
        path = demo_file()
    if is_run(path):
        return read_model_info(*base_of_run(path))
    if path.suffix == ".gguf":
        shape = ModelShape.of(read_gguf_config(path))
        return ModelInfo(name, shape, shape.parameters)
    if path.suffix == ".json":
        if not path.is_file():
            near = nearest(str(path), [str(entry) for entry in path.parent.glob("*")])
            raise ModelError(f"{path}: no such config file{near}")
        config = read_config(path.parent, path.name)
        shape = _shape(config)
        return ModelInfo(name, shape, shape.parameters, config)
    folder = path if path.is_dir() else None
    config = read_config(folder) if folder else hub_config(name, revision)
    shape = _shape(config)
    counted = _counted(folder) if folder and not shape.prequantized else shape.parameters
    return ModelInfo(name, shape, counted, config)


def _shape(config: Mapping[str, Any]) -> ModelShape:
    """Sizes that a config leaves to its family are the family's own, as transformers has them (without torch)."""
    try:
        return ModelShape.of(config)
    except ModelError:
        from transformers import CONFIG_MAPPING, AutoConfig

        kind = str(config.get("model_type"))
        if kind in _FAMILIES or kind not in CONFIG_MAPPING:
            raise
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            return ModelShape.of(AutoConfig.from_pretrained(folder).to_dict())


def _counted(folder: Path) -> int:
    """Parameters by the headers of the weight files; 0 is never one: a folder without weights counts by its config."""
    if not any(folder.glob("*.safetensors")):
        return _shape(read_config(folder)).parameters
    return sum(math.prod(entry["shape"]) for _, header in read_headers(folder) for entry in header.values())


# ---- from strop.models.targets ----
"""The linear layers of a model by kind, and which of them an adapter's targets name. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from strop.errors import ModelError, nearest

TARGET_SETS = ("all-linear", "attention", "gate", "experts")
EXPERTS = "Experts"  # the type of a mixture's: each kind is a parameter that holds all experts of a layer
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


@dataclass(frozen=True)
class LinearKind:
    """All linear layers that share a leaf name and a shape, such as q_proj in each block."""

    name: str
    type: str
    in_features: int
    out_features: int
    count: int
    sets: tuple[str, ...]  # the named target sets that hold it
    kept_16_bit: str | None  # why a quantized base keeps it in 16 bit, if it does

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features * self.count


def target_names(kinds: Sequence[LinearKind], targets: str | Sequence[str]) -> list[str]:
    """Leaf names that peft is to adapt. Raises ModelError for a name that matches nothing, listing those there are."""
    names: list[str] = []
    for target in [targets] if isinstance(targets, str) else targets:
        leaf = target.rpartition(".")[2]
        picked = [kind.name for kind in kinds if target in kind.sets or kind.name in (target, leaf)]
        if not picked:
            known = list(dict.fromkeys(kind.name for kind in kinds))
            raise ModelError(
                f"lora.target_modules: {target} matches no linear layer{nearest(target, known)}",
                fix=f"choose among {', '.join([*TARGET_SETS, *known])}",
            )
        names += picked
    return list(dict.fromkeys(names))


def matches_pattern(pattern: str, path: str) -> bool:
    """Whether a pattern of ranks or alphas is for the module at this path, as peft picks it."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def embedding_kind(name: str, rows: int, size: int, count: int = 1) -> LinearKind:
    """An embedding as `strop modules` lists it: no adapter sits on it, and it stays in 16 bit."""
    return LinearKind(name, "Embedding", rows, size, count, (), "embedding")


def target_sets(path: str) -> tuple[str, ...]:
    """The named target sets that a linear layer at this path belongs to."""
    parent, _, leaf = path.rpartition(".")
    if leaf in EMBEDDINGS or not parent:
        return ()
    near = parent.split(".")[-2:]  # BERT's: attention.self.query
    return (
        "all-linear",
        *(("attention",) if any("attn" in part or "attention" in part for part in near) else ()),
        *(("gate",) if leaf in ("gate_proj", "gate_up_proj") else ()),
    )


def expert_target_sets(parameter: str) -> tuple[str, ...]:
    """The same, of a parameter that holds experts."""
    return ("all-linear", "experts", *(("gate",) if parameter in ("gate_proj", "gate_up_proj") else ()))


def is_router(path: str) -> bool:
    """Whether a linear layer chooses experts: it is adapted where it is named, and not by any set."""
    parent, _, leaf = path.rpartition(".")
    return leaf in ("router", "shared_expert_gate") or parent.rpartition(".")[2] == "router"
