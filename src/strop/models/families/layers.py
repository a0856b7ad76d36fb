"""The families whose layers the fast step knows, one row each: where a family differs from Llama. No torch in here.

A row is all that a new family of this kind needs, with its tiny config in tests/support/random_models.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """Where a family's model differs from Llama's. Names are those of transformers' modules."""

    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused_heads: bool = False  # one projection gives q, k and v of the first head, then of the next
    o: str = "o_proj"
    mlp: str = "mlp"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")  # or what stands in front of an activation that gates nothing
    gated: bool = True
    down: str = "down_proj"
    # What the model's own modules compute: an MLP that is a mixture of experts, in the layers where it is one, and what
    # stands in attention's place (the module's name), on one row after the other.
    mixture: bool = False
    mixer: str | None = None
    per_layer: bool = False  # what each token has for each layer is added behind it (Gemma 4)
    one_window: bool = False  # the config's sliding window holds in each layer, whatever it says of the layers' types
    sinks: bool = False  # each head's softmax counts a score beside those of the keys
    gated_heads: bool = False  # behind each head's query stands what its output is multiplied by, as a sigmoid
    # Norms: in front of a block, and of what it adds to the residual stream.
    layer_norm: bool = False  # the mean is taken off as well
    norm_biases: bool = False  # they have biases, which the fast step does not train
    norm_offset: float = 0.0  # 1: the norms' weights are stored as their difference from 1
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None
    final_norm: str = "norm"
    embedding_norm: bool = False  # the last norm stands in front of the first layer as well
    q_norm: str = "q_norm"  # over each head, or over all of them, as its weight is long
    k_norm: str = "k_norm"
    v_norm: str = "v_norm"
    # The blocks read the same input and are added together; or the config's field that says so. Without a norm of its
    # own the MLP reads what attention's norm gives.
    parallel: bool | str = False
    # Rotary embedding: which numbers turn together, how the angles are given, and what is turned.
    pairs: Literal["halves", "neighbours"] = "halves"
    angles: Literal["halves", "neighbours", "once"] = "halves"
    backwards: bool = False
    turned_first: bool = False  # in front of the norms of q and k
    turned: Callable[[Any], bool] = lambda attention: True  # the layer has positions
    query_scale: Callable[[Any, Any], Any] | None = None  # (config, positions): what the turned q are multiplied by
    # Multipliers, by the config.
    embedding: Callable[[Any], float] = lambda config: 1.0
    residual: Callable[[Any], float] = lambda config: 1.0
    logits: Callable[[Any], float] = lambda config: 1.0

    @property
    def by_hand(self) -> bool:
        """No layer has parts that the model's own modules compute."""
        return not self.by_model

    @property
    def by_model(self) -> str:
        """What the model's own modules compute, in words for the user."""
        named = ((self.mixer, self.mixer), ("experts", self.mixture), ("inputs of each layer", self.per_layer))
        parts = [name for name, there in named if there]
        return f"{' and '.join(map(str, parts))} by the model's own modules" if parts else ""

    @property
    def aside(self) -> bool:
        """Attention does not turn q and k itself."""
        return self.query_scale is not None or self.turned_first or self.pairs == "neighbours"

    @property
    def norms(self) -> tuple[str, ...]:
        """Of a layer, but for those of q and k."""
        names = (self.attention_norm, self.mlp_norm, self.after_attention, self.after_mlp)
        return tuple(name for name in names if name)


def _far_queries(config: Any, positions: Any) -> Any:
    """Llama 4's scale of queries that stand far behind the first token (Ministral 3)."""
    rope = config.rope_parameters
    return 1 + rope["llama_4_scaling_beta"] * (positions / rope["original_max_position_embeddings"]).floor().log1p()


GEMMA = Family(
    norm_offset=1.0,
    mlp_norm="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)
OLMO = Family(
    attention_norm=None,
    mlp_norm=None,
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)
COHERE = Family(
    layer_norm=True, parallel=True, mlp_norm=None, pairs="neighbours", angles="neighbours",
    logits=lambda config: float(config.logit_scale),
)  # fmt: skip
GRANITE = Family(
    embedding=lambda config: float(config.embedding_multiplier),
    residual=lambda config: float(config.residual_multiplier),
    logits=lambda config: 1 / float(config.logits_scaling),
)
WINDOWED = Family(one_window=True)
MIXTURE = Family(mixture=True)
LFM2 = Family(
    mixer="conv", o="out_proj", mlp="feed_forward", gate_up=("w1", "w3"), down="w2", attention_norm="operator_norm",
    mlp_norm="ffn_norm", final_norm="embedding_norm", q_norm="q_layernorm", k_norm="k_layernorm",
)  # fmt: skip
MAMBA = Family(mixer="mamba", mlp="feed_forward", mlp_norm="pre_ff_layernorm", final_norm="final_layernorm")
QWEN_NEXT = Family(mixer="linear_attn", gated_heads=True, norm_offset=1.0)
GLM = Family(gate_up=("gate_up_proj",), pairs="neighbours")
FAMILIES = {
    "llama": Family(),
    "mistral": WINDOWED,
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": replace(WINDOWED, qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "gemma": Family(norm_offset=1.0),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma4_text": replace(GEMMA, norm_offset=0.0, per_layer=True),
    "smollm3": Family(turned=lambda attention: bool(attention.use_rope)),
    "olmo2": OLMO,
    "olmo3": OLMO,
    "granite": GRANITE,
    "cohere": COHERE,
    "cohere2": replace(COHERE, turned=lambda attention: attention.sliding_window is not None),
    "glm": GLM,
    "glm4": replace(GLM, after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
    "phi": Family(
        o="dense", gate_up=("fc1",), gated=False, down="fc2", layer_norm=True, norm_biases=True, parallel=True,
        mlp_norm=None, final_norm="final_layernorm",
    ),
    "stablelm": Family(layer_norm=True, norm_biases=True, parallel="use_parallel_residual"),
    "starcoder2": replace(
        WINDOWED, gate_up=("c_fc",), gated=False, down="c_proj", layer_norm=True, norm_biases=True
    ),
    "exaone4": replace(OLMO, turned=lambda attention: attention.sliding_window is None or attention.is_sliding),
    "ministral": Family(),
    "ministral3": replace(WINDOWED, query_scale=_far_queries),
    "arcee": Family(gate_up=("up_proj",), gated=False),
    "seed_oss": Family(),
    "helium": Family(pairs="neighbours"),
    "hunyuan_v1_dense": Family(q_norm="query_layernorm", k_norm="key_layernorm", turned_first=True),
    "ernie4_5": Family(pairs="neighbours"),
    "apertus": Family(
        gate_up=("up_proj",), gated=False, attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm"
    ),
    "gpt_neox": Family(
        attention="attention", qkv=("query_key_value",), fused_heads=True, o="dense", gate_up=("dense_h_to_4h",),
        gated=False, down="dense_4h_to_h", layer_norm=True, norm_biases=True, final_norm="final_layer_norm",
        parallel="use_parallel_residual",
    ),
    "nanochat": Family(
        gate_up=("fc1",), gated=False, down="fc2", embedding_norm=True, backwards=True, turned_first=True
    ),
    "mixtral": replace(WINDOWED, mixture=True),
    "qwen2_moe": MIXTURE,
    "qwen3_moe": replace(WINDOWED, mixture=True),
    "olmoe": MIXTURE,
    "glm4_moe": MIXTURE,
    "dots1": MIXTURE,
    "ernie4_5_moe": replace(MIXTURE, pairs="neighbours"),
    "gpt_oss": replace(MIXTURE, angles="once", sinks=True),
    "qwen3_next": replace(QWEN_NEXT, mixture=True),
    "lfm2": LFM2,
    "lfm2_moe": replace(LFM2, mixture=True),
    "bamba": MAMBA,
    "jamba": replace(MAMBA, mixture=True, turned=lambda attention: False),
    "granitemoehybrid": replace(
        GRANITE, mixer="mamba", mlp="shared_mlp", gate_up=("input_linear",), down="output_linear",
        turned=lambda attention: attention.config.position_embedding_type == "rope",
    ),
    "qwen3_5_text": QWEN_NEXT,
    "qwen3_5_moe_text": replace(QWEN_NEXT, mixture=True),
}  # fmt: skip


def linears(layer: Any, family: Family) -> Iterator[list[Any]]:
    """The layer's linear modules, in groups that share their input; none of what the model's own modules compute."""
    mixed, many = mixer_module(layer, family) is not None, moe_module(layer, family) is not None
    attention = getattr(layer, family.attention, None)
    own = (
        getattr(attention, name, None) for name in family.qkv
    )  # Gemma 4 has no v_proj, and no k_proj, in some layers
    yield [] if mixed else [one for one in own if one is not None]
    yield [] if mixed else [getattr(attention, family.o)]
    mlp = getattr(layer, family.mlp)
    yield [] if many else [getattr(mlp, name) for name in family.gate_up]
    yield [] if many else [getattr(mlp, family.down)]


def find_rotary(decoder: Any) -> Any | None:
    """The rotary embedding, by the names that transformers gives it."""
    return next((getattr(decoder, name) for name in ("rotary_emb", "pos_emb") if hasattr(decoder, name)), None)


def mixer_module(layer: Any, family: Family) -> Any | None:
    """The model's own module in attention's place; None: attention stands there."""
    return getattr(layer, family.mixer, None) if family.mixer else None


def moe_module(layer: Any, family: Family) -> Any | None:
    """The mixture of experts in the MLP's place; None: an MLP stands there."""
    mlp = getattr(layer, family.mlp)
    return mlp if family.mixture and not hasattr(mlp, family.down) else None


def model_computed_modules(decoder: Any, family: Family) -> Iterator[Any]:
    """All that the model's own modules compute."""
    for layer in decoder.layers:
        names = ("per_layer_input_gate", "per_layer_projection") if family.per_layer else ()
        parts = mixer_module(layer, family), moe_module(layer, family), *(getattr(layer, name, None) for name in names)
        yield from (part for part in parts if part is not None)
    if family.per_layer and hasattr(decoder, "per_layer_model_projection"):
        yield decoder.per_layer_model_projection


def load_balancing(config: Any) -> float:
    """The coefficient of the loss that keeps a mixture's experts evenly used; 0 where its config leaves it off."""
    text = config.get_text_config()
    return float(getattr(text, "router_aux_loss_coef", 0) or 0) if getattr(text, "output_router_logits", False) else 0.0


def layer_norms(decoder: Any, family: Family) -> Iterator[Any]:
    """The norms of all layers that the family's row names, and the last one."""
    for layer in decoder.layers:
        attention = getattr(layer, family.attention, None)
        owners = [*((layer, name) for name in family.norms), (attention, family.q_norm), (attention, family.k_norm)]
        yield from (getattr(owner, name) for owner, name in owners if getattr(owner, name, None) is not None)
    yield getattr(decoder, family.final_norm)


def text_decoder(base: Any) -> tuple[Any, Any]:
    """(decoder, its config) of a causal language model, or of the text half of a model with other towers."""
    inner = getattr(base, base.base_model_prefix, None) or base.model  # Llama 4's prefix is of another class
    halves = (getattr(inner, name, None) for name in ("language_model", "text_model"))
    return next((half for half in halves if half is not None), inner), base.config.get_text_config()


# By the names of configs: what the loops of engine.cpu call them.
ACTIVATIONS = {
    "silu": "SILU", "swish": "SILU", "gelu_pytorch_tanh": "GELU_TANH", "gelu_new": "GELU_TANH",
    "gelu_fast": "GELU_TANH", "gelu": "GELU", "relu2": "RELU2", "relu": "RELU", "xielu": "XIELU",
}  # fmt: skip


def activation_name(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu"))
