"""A table of model families. This module imports neither torch nor transformers.

Every causal language model of transformers can be trained through its own forward. An entry here adds the fast training
step. Its optional fields add exact sizes from the config alone, and GGUF export.

To add a family, add one entry to `FAMILIES` and one tiny config to `FAMILY_CONFIGS` in tests/support/random_models.py:

1. Read the family's `modeling_*.py` in transformers and compare it with Llama's: the names of the projections and
   norms, whether the gate and up projections are fused, how rotary embeddings are applied, and what is scaled. Set the
   fields of `Family` that describe a difference; a family with Llama's layer is `Family()`.
2. Set `config_defaults` if config.json alone determines the parameter count (see ModelShape.from_config).
3. Set `gguf` if llama.cpp supports the architecture (see strop.models.families.gguf).
4. Run `pytest tests/engine/train/test_fast.py -k NAME`: it compares the loss and every gradient with the model's own
   forward on the tiny config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class ConfigDefaults:
    """Sizes to assume where the family's config.json does not contain them."""

    head_size: int | None = None  # None: hidden size / heads
    tied: bool = False  # the output head shares the embedding's weight
    qkv_bias: bool | None = None  # None: the value of `attention_bias` in the config
    head_norms: bool = False  # q and k are normalized per head


@dataclass(frozen=True)
class GgufFormat:
    """How llama.cpp stores a family, as read by its loaders (src/models/ at 0c1e57098, llama-cpp-python 0.3.36)."""

    arch: str  # the name of the architecture in llama.cpp
    activation: str = "silu"
    permutes: bool = False  # the rows of q and k are stored as interleaved pairs
    # The sliding window. "none": the family has none. "pattern": in all layers except every `window_pattern`-th.
    # "ignored": llama.cpp uses full attention instead. "refused": strop does not export a model that has one.
    sliding_window: Literal["none", "pattern", "ignored", "refused"] = "none"
    window_pattern: int = 0
    # The model with this many layers scales attention scores by (hidden size / heads)^-0.5, not by the head size.
    hidden_scaled_at_num_layers: int = 0
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    reads_weights: bool = True  # strop reads the file tensor by tensor; otherwise transformers loads it


@dataclass(frozen=True)
class Family:
    """How a family's decoder layer differs from Llama's, and its config defaults and GGUF format.

    Strings are names of modules in transformers. "Computed by the model": by transformers' module, one row at a time.
    """

    config_defaults: ConfigDefaults | None = None
    gguf: GgufFormat | None = None

    # Attention and MLP
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused_heads: bool = False  # one projection, whose output is ordered by head: q, k, v of head 0, then of head 1, ...
    o: str = "o_proj"
    mlp: str = "mlp"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")  # only the up projection if not gated
    gated: bool = True
    down: str = "down_proj"
    head_bias: bool = False  # the output head has a bias
    moe: bool = False  # some MLPs are mixtures of experts, computed by the model
    mixer: str | None = None  # the module that replaces attention in some layers, computed by the model
    per_layer_inputs: bool = False  # each layer has its own token embeddings (Gemma 4), computed by the model
    window_in_all_layers: bool = False  # all layers use the config's sliding window; `layer_types` is ignored
    attention_sinks: bool = False  # each head has a learned extra score in its softmax
    gated_output: bool = False  # q_proj also computes a gate; attention's output is multiplied by its sigmoid

    # Norms of the input and of the output of attention and MLP
    layer_norm: bool = False  # LayerNorm, not RMSNorm
    norm_biases: bool = False  # the norms have biases, which the fast step (strop.engine.train.fast) does not train
    norm_offset: float = 0.0  # added to the stored norm weights
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None
    final_norm: str = "norm"
    embedding_norm: bool = False  # the final norm is also applied before the first layer
    q_norm: str = "q_norm"  # over each head or over all heads, depending on the length of its weight
    k_norm: str = "k_norm"
    v_norm: str = "v_norm"
    # Attention and MLP have the same input, and their outputs are added. A string names a boolean config field.
    # Without an `mlp_norm`, the MLP uses the output of attention's norm.
    parallel: bool | str = False

    # Rotary embedding
    rope_pairs: Literal["halves", "interleaved"] = "halves"  # which elements of a head rotate together
    # layout of the model's cos and sin: each angle twice, as "halves" or "interleaved", or only "once" (half as long)
    rope_angles: Literal["halves", "interleaved", "once"] = "halves"
    rope_reversed: bool = False  # rotates by the negative angle
    rope_before_norm: bool = False  # applied before the norms of q and k
    uses_rope: Callable[[Any], bool] = lambda attention: True  # whether this attention module rotates q and k
    query_scale: Callable[[Any, Any], Any] | None = None  # (config, positions): factor of the rotated q

    # Multipliers from the config
    embedding_scale: Callable[[Any], float] = lambda config: 1.0
    residual_scale: Callable[[Any], float] = lambda config: 1.0
    logit_scale: Callable[[Any], float] = lambda config: 1.0

    @property
    def fully_fused(self) -> bool:
        return not self.model_parts

    @property
    def model_parts(self) -> str:
        """A phrase for messages that lists the parts computed by the model; empty if there are none."""
        flags = ((self.mixer, self.mixer), ("experts", self.moe), ("inputs of each layer", self.per_layer_inputs))
        parts = [name for name, is_used in flags if is_used]
        return f"{' and '.join(map(str, parts))} by the model's own modules" if parts else ""

    @property
    def separate_rope(self) -> bool:
        """True if q and k are rotated before the attention kernel, which cannot rotate them in this way."""
        return self.query_scale is not None or self.rope_before_norm or self.rope_pairs == "interleaved"

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of a layer's norms, except the q and k norms."""
        names = (self.attention_norm, self.mlp_norm, self.after_attention, self.after_mlp)
        return tuple(name for name in names if name)


def _long_context_query_scale(config: Any, positions: Any) -> Any:
    """Return the factor by position of Llama 4's attention temperature tuning, which Ministral 3 also uses."""
    rope = config.rope_parameters
    return 1 + rope["llama_4_scaling_beta"] * (positions / rope["original_max_position_embeddings"]).floor().log1p()


OLMO = Family(
    attention_norm=None, mlp_norm=None, after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)  # fmt: skip
GEMMA = replace(OLMO, norm_offset=1.0, attention_norm="input_layernorm", mlp_norm="pre_feedforward_layernorm")
COHERE = Family(
    layer_norm=True, parallel=True, mlp_norm=None, rope_pairs="interleaved", rope_angles="interleaved",
    logit_scale=lambda config: float(config.logit_scale),
)  # fmt: skip
GRANITE = Family(
    embedding_scale=lambda config: float(config.embedding_multiplier),
    residual_scale=lambda config: float(config.residual_multiplier),
    logit_scale=lambda config: 1 / float(config.logits_scaling),
)
WINDOWED = Family(window_in_all_layers=True)
MOE = Family(moe=True)
LFM2 = Family(
    mixer="conv", o="out_proj", mlp="feed_forward", gate_up=("w1", "w3"), down="w2", attention_norm="operator_norm",
    mlp_norm="ffn_norm", final_norm="embedding_norm", q_norm="q_layernorm", k_norm="k_layernorm",
)  # fmt: skip
MAMBA = Family(mixer="mamba", mlp="feed_forward", mlp_norm="pre_ff_layernorm", final_norm="final_layernorm")
QWEN_NEXT = Family(mixer="linear_attn", gated_output=True, norm_offset=1.0)
GLM = Family(gate_up=("gate_up_proj",), rope_pairs="interleaved")
GLM4 = replace(GLM, after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
GEMMA_GGUF: dict[str, Any] = {"activation": "gelu_pytorch_tanh", "sliding_window": "pattern"}

FAMILIES = {
    "llama": Family(
        ConfigDefaults(), GgufFormat("llama", permutes=True, ropes=("default", "linear", "yarn", "llama3"))
    ),
    "mistral": replace(
        WINDOWED, config_defaults=ConfigDefaults(qkv_bias=False),
        gguf=GgufFormat("llama", permutes=True, sliding_window="ignored"),
    ),
    "qwen2": Family(ConfigDefaults(qkv_bias=True), GgufFormat("qwen2", sliding_window="refused")),
    "qwen3": Family(ConfigDefaults(head_size=128, head_norms=True), GgufFormat("qwen3", sliding_window="refused")),
    "phi3": replace(
        WINDOWED, qkv=("qkv_proj",), gate_up=("gate_up_proj",), config_defaults=ConfigDefaults(qkv_bias=False),
        gguf=GgufFormat("phi3", sliding_window="ignored", ropes=("default", "longrope"), reads_weights=False),
    ),
    "gemma": Family(norm_offset=1.0),
    "gemma2": replace(
        GEMMA, config_defaults=ConfigDefaults(head_size=256, tied=True),
        gguf=GgufFormat("gemma2", window_pattern=2, hidden_scaled_at_num_layers=46, ropes=("default",), **GEMMA_GGUF),
    ),
    "gemma3_text": replace(
        GEMMA, config_defaults=ConfigDefaults(head_size=256, tied=True, head_norms=True),
        gguf=GgufFormat(
            "gemma3", window_pattern=6, hidden_scaled_at_num_layers=62, ropes=("default", "linear"), **GEMMA_GGUF
        ),
    ),
    "gemma4_text": replace(GEMMA, norm_offset=0.0, per_layer_inputs=True),
    "smollm3": Family(uses_rope=lambda attention: bool(attention.use_rope)),
    "olmo2": OLMO,
    "olmo3": OLMO,
    "granite": GRANITE,
    "cohere": COHERE,
    "cohere2": replace(COHERE, uses_rope=lambda attention: attention.sliding_window is not None),
    "glm": GLM,
    "glm4": GLM4,
    "phi": Family(
        o="dense", gate_up=("fc1",), gated=False, down="fc2", layer_norm=True, norm_biases=True, parallel=True,
        mlp_norm=None, final_norm="final_layernorm", head_bias=True,
    ),
    "stablelm": Family(layer_norm=True, norm_biases=True, parallel="use_parallel_residual"),
    "starcoder2": replace(
        WINDOWED, gate_up=("c_fc",), gated=False, down="c_proj", layer_norm=True, norm_biases=True
    ),
    "exaone4": replace(OLMO, uses_rope=lambda attention: attention.sliding_window is None or attention.is_sliding),
    "ministral": Family(),
    "ministral3": replace(WINDOWED, query_scale=_long_context_query_scale),
    "arcee": Family(gate_up=("up_proj",), gated=False),
    "seed_oss": Family(),
    "helium": Family(rope_pairs="interleaved"),
    "hunyuan_v1_dense": Family(q_norm="query_layernorm", k_norm="key_layernorm", rope_before_norm=True),
    "ernie4_5": Family(rope_pairs="interleaved"),
    "apertus": Family(
        gate_up=("up_proj",), gated=False, attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm"
    ),
    "gpt_neox": Family(
        attention="attention", qkv=("query_key_value",), fused_heads=True, o="dense", gate_up=("dense_h_to_4h",),
        gated=False, down="dense_4h_to_h", layer_norm=True, norm_biases=True, final_norm="final_layer_norm",
        parallel="use_parallel_residual",
    ),
    "nanochat": Family(
        gate_up=("fc1",), gated=False, down="fc2", embedding_norm=True, rope_reversed=True, rope_before_norm=True
    ),
    "mixtral": replace(WINDOWED, moe=True),
    "qwen2_moe": MOE,
    "qwen3_moe": replace(WINDOWED, moe=True),
    "olmoe": MOE,
    "glm4_moe": MOE,
    "dots1": MOE,
    "ernie4_5_moe": replace(MOE, rope_pairs="interleaved"),
    "gpt_oss": replace(MOE, rope_angles="once", attention_sinks=True),
    "qwen3_next": replace(QWEN_NEXT, moe=True),
    "lfm2": LFM2,
    "lfm2_moe": replace(LFM2, moe=True),
    "bamba": MAMBA,
    "jamba": replace(MAMBA, moe=True, uses_rope=lambda attention: False),
    "granitemoehybrid": replace(
        GRANITE, mixer="mamba", mlp="shared_mlp", gate_up=("input_linear",), down="output_linear",
        uses_rope=lambda attention: attention.config.position_embedding_type == "rope",
    ),
    "qwen3_5_text": QWEN_NEXT,
    "qwen3_5_moe_text": replace(QWEN_NEXT, moe=True),
    **{name: Family() for name in ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")},
    "qwen3_vl_moe_text": MOE,
    "glm4v_text": replace(GLM4, rope_angles="interleaved"),
}  # fmt: skip

# By model type, linear layers whose weight the model's code reads without calling the layer, so that an adapter would
# have no effect. PEFT refuses some of them; in Bamba, Granite 4 and Zamba 2 optional fused kernels read them.
_FUSED_KERNEL = ("out_proj", "conv1d")
DIRECTLY_READ = {
    **dict.fromkeys(("falcon_h1", "mamba2", "nemotron_h", "bamba", "granitemoehybrid", "zamba2"), _FUSED_KERNEL),
    **dict.fromkeys(("mamba", "falcon_mamba"), (*_FUSED_KERNEL, "dt_proj")),
    **dict.fromkeys(("jamba", "zamba"), ("dt_proj",)),
}


def find_gguf_family(arch: str) -> tuple[str, Family] | None:
    """Return (name, family) of the first family that llama.cpp stores under this architecture."""
    entries = ((name, family) for name, family in FAMILIES.items() if family.gguf and family.gguf.arch == arch)
    return next(entries, None)


def overflows_fp16(family: str) -> bool:
    """Return whether hidden states of a family exceed 65,504, the largest value in fp16 (docs/log/2026-11.md)."""
    return family.startswith("gemma")
