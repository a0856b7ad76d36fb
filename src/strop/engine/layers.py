"""Describe the decoder layers of a model by sizes and modules, according to its entry in the families table.

The fast training step and the decoder are built from this description. It does not copy weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strop.data.images import FIRST_IMAGE_ID
from strop.engine.images import ImageFeatures, image_features, insert_features
from strop.engine.train.peft_modules import base_module, current_module, embed, unwrap
from strop.models.families.layers import (
    activation_name,
    find_rotary,
    linear_groups,
    mixer_module,
    moe_module,
    text_decoder,
)
from strop.models.families.table import FAMILIES, Family

NO_ROPE = "none"
Angles = dict[str | None, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class NormSpec:
    """An RMSNorm, or a LayerNorm if `centered`.

    offset: added to the weight; 1 in families that store weight - 1. module: the norm's module if it is trained.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    offset: float
    centered: bool
    module: Any = None

    def current_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias of a trained module, which change when adapters are disabled."""
        module = current_module(self.module)
        return module.weight, getattr(module, "bias", None)


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. The modules of qkv, o, gate_up and down may have adapters; those of a list share their input.

    size: head size. window: number of keys that a query attends to, including its own; 0 for all. softcap: soft cap of
    attention scores; 0 for none. rope: the kind of rotary embedding in models with several, or NO_ROPE. sinks:
    attention sinks (num_query_heads,), an extra score in the softmax of each head. mixer, moe: the model's module that
    replaces attention, or the MLP. per_layer: the layer's module in models with per-layer inputs. kv_kind, stores_kv,
    reuses_kv: in models that share keys and values between layers of a kind, the kind, and whether the layer stores its
    keys and values or reuses those of an earlier layer. activation, act: name and module.
    """

    qkv: list[Any]
    o: list[Any]
    gate_up: list[Any]
    down: list[Any]
    num_query_heads: int
    num_kv_heads: int
    size: int
    scale: float
    window: int
    softcap: float
    rope: str | None
    sinks: Tensor | None
    mixer: nn.Module | None
    moe: nn.Module | None
    q_norm: NormSpec | None
    k_norm: NormSpec | None
    v_norm: NormSpec | None
    before_attention: NormSpec | None
    after_attention: NormSpec | None
    before_mlp: NormSpec | None
    after_mlp: NormSpec | None
    per_layer: Any
    per_layer_norm: NormSpec | None
    kv_kind: str
    stores_kv: bool
    reuses_kv: bool
    activation: str
    act: Callable[[Tensor], Tensor]


class DecoderLayers:
    """The layers, embedding and output head of a model, with or without adapters. Its family must be in the table."""

    def __init__(self, model: Any, dtype: torch.dtype | None = None) -> None:
        """dtype: of the computation, if it differs from that of the weights."""
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._base = base
        self.decoder, self.config = text_decoder(base)
        self.cycle: Callable[[int], None] | None = getattr(base, "layer_cycle", None)  # of a base read from disk
        self.family: Family = FAMILIES[self.config.model_type]
        self.output = base.get_output_embeddings()
        self.head = base_module(self.output)
        self.dtype: torch.dtype = dtype or self.head.weight.dtype
        self.embedding = self.decoder.get_input_embeddings()
        self.softcap = float(getattr(self.config, "final_logit_softcapping", None) or 0)
        family = self.family
        self.embedding_scale, self.residual_scale, self.logits_scale = (
            scale(self.config) for scale in (family.embedding_scale, family.residual_scale, family.logit_scale)
        )
        parallel = family.parallel
        self.parallel = bool(getattr(self.config, parallel)) if isinstance(parallel, str) else parallel
        self.norm = self._norm(getattr(self.decoder, family.final_norm), self.config.hidden_size)

    def __len__(self) -> int:
        return len(self.decoder.layers)

    @property
    def images(self) -> ImageFeatures | None:
        """The features of images, if the model reads them."""
        return image_features(self._base)

    def embed(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the scaled embeddings (T, hidden) of ids (T,), in the dtype of the computation.

        Also returns what the first layers add (DeepStack), as `insert_features`.
        """
        features, later = self.images, list[Tensor]()
        text_ids = ids if features is None else ids.masked_fill(ids >= FIRST_IMAGE_ID, 0)
        x = embed(self.embedding, text_ids, self.dtype)
        if features is not None:
            x, later = insert_features(features, ids, x)
        return x if self.embedding_scale == 1 else x * self.embedding_scale, later

    def rope_kind(self, number: int) -> str | None:
        """Return the kind of rotary embedding of a layer, as in LayerSpec."""
        attention = getattr(self.decoder.layers[number], self.family.attention, None)
        if attention is None or not self.family.uses_rope(attention):
            return NO_ROPE
        kinds = getattr(self.config, "layer_types", None)
        by_type = isinstance(getattr(find_rotary(self.decoder), "rope_type", None), dict)
        return kinds[number] if by_type and kinds else None

    def angles(self, positions: Tensor) -> Angles:
        """Return cos and sin (T, m) of positions for each kind of rotary embedding among the layers.

        positions: (T,), or (3, T) in time, rows and columns for models that have these.
        """
        empty = torch.empty(positions.shape[-1], 0, device=positions.device)
        angles: Angles = {NO_ROPE: (empty, empty)}
        rotary: Any = find_rotary(self.decoder)
        for kind in {self.rope_kind(number) for number in range(len(self))} - {NO_ROPE}:
            like = torch.empty(0, device=positions.device)
            cos, sin = rotary(like, positions[..., None, :], *([] if kind is None else [kind]))
            unique = {  # most families repeat each angle
                "halves": slice(cos.shape[-1] // 2), "interleaved": slice(None, None, 2), "once": slice(None),
            }[self.family.rope_angles]  # fmt: skip
            sin = -sin if self.family.rope_reversed else sin
            angles[kind] = cos[0, :, unique].contiguous(), sin[0, :, unique].contiguous()
        return angles

    def layer_spec(self, number: int) -> LayerSpec:
        family, config, layer = self.family, self.config, self.decoder.layers[number]
        attention, moe = getattr(layer, family.attention, None), moe_module(layer, family)
        kv_attention = self._kv_attention(number, attention)
        size = 0 if attention is None else int(getattr(attention, "head_dim", None) or attention.head_size)
        qkv, o, gate_up, down = linear_groups(layer, family)
        before = self._norm_named(layer, family.attention_norm, config.hidden_size)
        before_mlp = self._norm_named(layer, family.mlp_norm, config.hidden_size)
        return LayerSpec(
            qkv=qkv, o=o, gate_up=gate_up, down=down,
            num_query_heads=config.num_attention_heads, size=size,
            num_kv_heads=self._count_kv_heads(kv_attention, size),
            scale=float(getattr(attention, "scaling", 0)),
            window=self._window(number, attention),
            softcap=float(getattr(attention, "attn_logit_softcapping", None) or 0),
            rope=self.rope_kind(number),
            sinks=getattr(attention, "sinks", None),
            mixer=mixer_module(layer, family), moe=moe,
            q_norm=self._norm_named(attention, family.q_norm, size),
            k_norm=self._norm_named(kv_attention, family.k_norm, size),
            v_norm=self._norm_named(kv_attention, family.v_norm, size),
            before_attention=before,
            after_attention=self._norm_named(layer, family.after_attention, config.hidden_size),
            before_mlp=before if before_mlp is None and self.parallel else before_mlp,
            after_mlp=self._norm_named(layer, family.after_mlp, config.hidden_size),
            per_layer=layer if family.per_layer_inputs else None,
            per_layer_norm=self._norm_named(layer, "post_per_layer_input_norm", config.hidden_size),
            kv_kind=str(getattr(attention, "layer_type", "")),
            stores_kv=bool(getattr(attention, "store_full_length_kv", False)),
            reuses_kv=kv_attention is not attention,
            activation=activation_name(config),
            act=torch.nn.functional.silu if moe is not None else _activation_module(getattr(layer, family.mlp)),
        )  # fmt: skip

    def _kv_attention(self, number: int, attention: Any) -> Any:
        """Return the attention module whose keys and values the layer uses, its own or that of an earlier layer."""
        if not getattr(attention, "is_kv_shared_layer", False):
            return attention
        earlier = [getattr(layer, self.family.attention) for layer in self.decoder.layers[:number]]
        stored = [x for x in earlier if x.store_full_length_kv and x.layer_type == attention.layer_type]
        return stored[-1]

    def _window(self, number: int, attention: Any) -> int:
        """Return the layer's attention window, or 0. Some configs set a window that the family does not use."""
        if self.family.window_in_all_layers:
            return int(getattr(self.config, "sliding_window", None) or 0)
        kinds = getattr(self.config, "layer_types", None)
        full = kinds and kinds[number] == "full_attention"
        return 0 if full else int(getattr(attention, "sliding_window", None) or 0)

    def _count_kv_heads(self, attention: Any, size: int) -> int:
        if self.family.per_layer_inputs:  # in this family, the number differs between layers
            return int(base_module(attention.k_proj).out_features // size)
        count = None if self.family.fused_heads else getattr(self.config, "num_key_value_heads", None)
        return int(count or self.config.num_attention_heads)

    def per_layer_inputs(self, ids: Tensor, embedded: Tensor) -> Tensor | None:
        """Return the per-layer inputs (T, layers, p) of tokens (T,), or None in models without them."""
        if not (self.family.per_layer_inputs and self.config.hidden_size_per_layer_input):
            return None
        token_inputs = self.decoder.get_per_layer_inputs(ids[None], None)
        inputs: Tensor = self.decoder.project_per_layer_inputs(embedded[None], token_inputs)[0]
        return inputs

    def _norm_named(self, owner: Any, name: str | None, width: int) -> NormSpec | None:
        module = getattr(owner, name, None) if name else None
        return None if module is None else self._norm(module, width)

    def _norm(self, module: Any, width: int) -> NormSpec:
        base = unwrap(module)
        eps = float(base.variance_epsilon if hasattr(base, "variance_epsilon") else base.eps)
        weight = getattr(base, "weight", None)
        weight = self.head.weight.new_ones(width) if weight is None else weight.data
        bias = getattr(base, "bias", None) if self.family.layer_norm else None
        trained = base is not module or any(parameter.requires_grad for parameter in base.parameters())
        return NormSpec(
            weight, None if bias is None else bias.data, eps,
            0.0 if self.family.layer_norm else self.family.norm_offset, self.family.layer_norm,
            module if trained else None,
        )  # fmt: skip


def _activation_module(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    names = (name for name in ("act_fn", "activation_fn", "activation", "act") if hasattr(mlp, name))
    act: Callable[[Tensor], Tensor] = next((getattr(mlp, name) for name in names), torch.nn.functional.silu)
    return act


def activation_parameters(act: Any) -> tuple[float, float, float, float]:
    """Return the parameters of xIELU (slopes above and below 0, beta, eps), or zeros for other activations."""
    if not hasattr(act, "alpha_p"):
        return 0.0, 0.0, 0.0, 0.0
    positive, negative = (torch.nn.functional.softplus(x.detach().float()) for x in (act.alpha_p, act.alpha_n))
    beta, eps = float(act.beta), float(act.eps)
    return float(positive), float(negative) + beta, beta, eps
