"""Facts about each model family, one entry a family. This module imports neither torch nor transformers.

Every causal language model of transformers can be trained through its own forward. An entry here adds the fast training
step and, where given, exact sizes from the config alone and GGUF export.

To add a family, add one entry to `FAMILIES` and one tiny config to `FAMILY_CONFIGS` in tests/support/random_models.py:

1. Read the family's `modeling_*.py` in transformers and compare it with Llama's: the names of the projections and
   norms, whether the gate and up projections are fused, how rotary embeddings are applied, and what is scaled. The
   fields of `Family` name the differences; a family with Llama's layer is `Family()`.
2. Give `config_defaults` if config.json alone determines the parameter count (see ModelShape.from_config).
3. Give `gguf` if llama.cpp supports the architecture; strop.models.families.gguf reads the entry.
4. Run `pytest tests/engine/train/test_fast.py -k NAME`: it compares the loss and every gradient with the model's own
   forward on the tiny config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class ConfigDefaults:
    """Sizes that the family's config.json leaves out."""

    head_size: int | None = None  # None: hidden size / heads
    tied: bool = False  # the output head shares the embedding's weight
    qkv_bias: bool | None = None  # None: the value of `attention_bias` in the config
    head_norms: bool = False  # q and k are normalized per head


@dataclass(frozen=True)
class GgufFormat:
    """llama.cpp's storage format of a family."""

    # Checked against llama.cpp at 0c1e57098 (llama-cpp-python 0.3.36), whose loaders under src/models/ read the keys.

    arch: str  # llama.cpp's name of the architecture
    activation: str = "silu"
    permutes: bool = False  # the rows of q and k are stored as interleaved pairs
    sliding_window: Literal["none", "pattern", "ignored", "refused"] = "none"
    window_pattern: int = 0  # every n-th layer has full attention, the others a window
    double_scale_layers: int = 0  # models of this depth scale attention by hidden size / heads, not by head size
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    reads_weights: bool = True  # strop reads the file tensor by tensor; otherwise transformers loads it


@dataclass(frozen=True)
class Family:
    """Facts about a family: how its decoder layer differs from Llama's, its config and its GGUF format."""

    # Names are those of transformers' modules. "Computed by the model": by the model's own module, one row at a time.

    config_defaults: ConfigDefaults | None = None
    gguf: GgufFormat | None = None

    # Attention and MLP
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused_heads: bool = False  # one projection, with q, k and v of each head next to each other
    o: str = "o_proj"
    mlp: str = "mlp"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")  # if not gated: the up projection
    gated: bool = True
    down: str = "down_proj"
    head_bias: bool = False  # the output head has a bias
    moe: bool = False  # some MLPs are mixtures of experts, computed by the model
    mixer: str | None = None  # the module that replaces attention in some layers, computed by the model
    per_layer_inputs: bool = False  # each token adds an input to each layer (Gemma 4), computed by the model
    window_in_all_layers: bool = False  # all layers use the config's sliding window; `layer_types` is ignored
    attention_sinks: bool = False  # each head has a learned extra score in its softmax
    gated_output: bool = False  # q_proj also gives a gate: attention's output is multiplied by its sigmoid

    # Norms before a block, and of a block's output
    layer_norm: bool = False  # LayerNorm, not RMSNorm
    norm_biases: bool = False  # the norms have biases, which the fast step does not train
    norm_offset: float = 0.0  # 1: norm weights are stored as their difference from 1
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None
    final_norm: str = "norm"
    embedding_norm: bool = False  # the final norm is also applied before the first layer
    q_norm: str = "q_norm"  # over each head or over all heads, depending on the length of its weight
    k_norm: str = "k_norm"
    v_norm: str = "v_norm"
    # Attention and MLP read the same input and their outputs are added. A string is the name of a boolean config field.
    # Without an `mlp_norm` the MLP reads the output of attention's norm.
    parallel: bool | str = False

    # Rotary embedding
    rope_pairs: Literal["halves", "interleaved"] = "halves"  # which elements of a head rotate together
    # layout of the model's cos and sin; once: not repeated for the second half of a head
    rope_angles: Literal["halves", "interleaved", "once"] = "halves"
    rope_reversed: bool = False  # rotates in the other direction
    rope_before_norm: bool = False  # applied before the norms of q and k
    uses_rope: Callable[[Any], bool] = lambda attention: True  # of one attention module
    query_scale: Callable[[Any, Any], Any] | None = None  # (config, positions): factor of the rotated q

    # Multipliers from the config
    embedding_scale: Callable[[Any], float] = lambda config: 1.0
    residual_scale: Callable[[Any], float] = lambda config: 1.0
    logit_scale: Callable[[Any], float] = lambda config: 1.0

    @property
    def fully_fused(self) -> bool:
        """True if no part of a layer is computed by the model."""
        return not self.model_parts

    @property
    def model_parts(self) -> str:
        """The parts that are computed by the model, as text for messages; empty if there are none."""
        flags = ((self.mixer, self.mixer), ("experts", self.moe), ("inputs of each layer", self.per_layer_inputs))
        parts = [name for name, is_used in flags if is_used]
        return f"{' and '.join(map(str, parts))} by the model's own modules" if parts else ""

    @property
    def separate_rope(self) -> bool:
        """True if q and k are rotated before the attention kernel, not by it."""
        return self.query_scale is not None or self.rope_before_norm or self.rope_pairs == "interleaved"

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a layer, except those of q and k."""
        names = (self.attention_norm, self.mlp_norm, self.after_attention, self.after_mlp)
        return tuple(name for name in names if name)


def _long_context_query_scale(config: Any, positions: Any) -> Any:
    """Return Llama 4's scale of queries at large positions (Ministral 3)."""
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
GEMMA_GGUF: dict[str, Any] = {"activation": "gelu_pytorch_tanh", "sliding_window": "pattern"}

FAMILIES = {
    "llama": Family(
        config_defaults=ConfigDefaults(),
        gguf=GgufFormat("llama", permutes=True, ropes=("default", "linear", "yarn", "llama3")),
    ),
    "mistral": replace(
        WINDOWED,
        config_defaults=ConfigDefaults(qkv_bias=False),
        gguf=GgufFormat("llama", permutes=True, sliding_window="ignored"),
    ),
    "qwen2": Family(config_defaults=ConfigDefaults(qkv_bias=True), gguf=GgufFormat("qwen2", sliding_window="refused")),
    "qwen3": Family(
        config_defaults=ConfigDefaults(head_size=128, head_norms=True),
        gguf=GgufFormat("qwen3", sliding_window="refused"),
    ),
    "phi3": replace(
        WINDOWED,
        qkv=("qkv_proj",),
        gate_up=("gate_up_proj",),
        config_defaults=ConfigDefaults(qkv_bias=False),
        gguf=GgufFormat("phi3", sliding_window="ignored", ropes=("default", "longrope"), reads_weights=False),
    ),
    "gemma": Family(norm_offset=1.0),
    "gemma2": replace(
        GEMMA,
        config_defaults=ConfigDefaults(head_size=256, tied=True),
        gguf=GgufFormat("gemma2", window_pattern=2, double_scale_layers=46, ropes=("default",), **GEMMA_GGUF),
    ),
    "gemma3_text": replace(
        GEMMA,
        config_defaults=ConfigDefaults(head_size=256, tied=True, head_norms=True),
        gguf=GgufFormat("gemma3", window_pattern=6, double_scale_layers=62, ropes=("default", "linear"), **GEMMA_GGUF),
    ),
    "gemma4_text": replace(GEMMA, norm_offset=0.0, per_layer_inputs=True),
    "smollm3": Family(uses_rope=lambda attention: bool(attention.use_rope)),
    "olmo2": OLMO,
    "olmo3": OLMO,
    "granite": GRANITE,
    "cohere": COHERE,
    "cohere2": replace(COHERE, uses_rope=lambda attention: attention.sliding_window is not None),
    "glm": GLM,
    "glm4": replace(GLM, after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
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
}  # fmt: skip

# Linear layers whose weight the model's code reads without calling the layer, of families with and without an entry
# above. PEFT refuses some of them; in Bamba, Granite 4 and Zamba 2 optional fused kernels read them.
_FUSED_KERNEL = ("out_proj", "conv1d")
DIRECTLY_READ = {
    **dict.fromkeys(("falcon_h1", "mamba2", "nemotron_h", "bamba", "granitemoehybrid", "zamba2"), _FUSED_KERNEL),
    **dict.fromkeys(("mamba", "falcon_mamba"), (*_FUSED_KERNEL, "dt_proj")),
    **dict.fromkeys(("jamba", "zamba"), ("dt_proj",)),
}


def find_gguf_family(arch: str) -> tuple[str, Family] | None:
    """Return (name, entry) of the first family that llama.cpp stores under this architecture."""
    entries = ((name, family) for name, family in FAMILIES.items() if family.gguf and family.gguf.arch == arch)
    return next(entries, None)
