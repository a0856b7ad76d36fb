"""A model's decoder layers as numbers and modules, read by the family's row of families.py: what the fast step and the
answering engine compute from. Nothing is copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strop.engine.train.full_modules import NewRows, embedded, new_rows, used, without
from strop.engine.train.fused_linear import base_of
from strop.models.families.layers import activation_name, find_rotary, linears, mixer_module, moe_module, text_decoder
from strop.models.families.table import FAMILIES, Family

NOWHERE = "nowhere"
Angles = dict[str | None, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class NormPart:
    """An RMS norm, or a LayerNorm (`centered`). offset: 1 where the weight is stored as its difference from 1.
    module: where something of it is trained, its own, which has other weights while adapters are off."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    offset: float
    centered: bool
    module: Any = None

    def now(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the module as they are used now."""
        module = used(self.module)
        return module.weight, getattr(module, "bias", None)


@dataclass(frozen=True)
class LayerPart:
    """One decoder layer. Modules may have adapters on them; those of a list share their input.

    mixer, mixture: the model's own module in the place of attention, of the MLP; the lists and numbers of what is not
    there are empty. rope: the kind of rotary embedding, where there are several; NOWHERE: the layer has no positions.
    window: keys that a query sees, itself included, 0: all; softcap 0: none. sinks (query,): what each head's softmax
    counts beside the keys, and gives to none. per_layer: the layer itself, where it adds what tokens have for it. kind,
    keeps, takes: of attention whose keys and values later layers of that kind see as well. activation: its name, or
    where `act` says more than a name the module itself.
    """

    qkv: list[Any]
    o: list[Any]
    gate_up: list[Any]
    down: list[Any]
    query: int
    key_value: int
    size: int
    scale: float
    window: int
    softcap: float
    rope: str | None
    sinks: Tensor | None
    mixer: nn.Module | None
    mixture: nn.Module | None
    q_norm: NormPart | None
    k_norm: NormPart | None
    v_norm: NormPart | None
    before_attention: NormPart | None
    after_attention: NormPart | None
    before_mlp: NormPart | None
    after_mlp: NormPart | None
    per_layer: Any
    per_layer_norm: NormPart | None
    kind: str
    keeps: bool
    takes: bool
    activation: str
    act: Callable[[Tensor], Tensor]


class Layers:
    """A model of a family that families.py knows, with or without adapters: its layers and what stands around them."""

    def __init__(self, model: Any) -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder, self.config = text_decoder(base)
        self.family: Family = FAMILIES[self.config.model_type]
        self.output = base.get_output_embeddings()
        self.head = base_of(self.output)
        self.embedding = self.decoder.get_input_embeddings()
        self.softcap = float(getattr(self.config, "final_logit_softcapping", None) or 0)
        family = self.family
        self.embedding_scale, self.residual_scale, self.logits_scale = (
            scale(self.config) for scale in (family.embedding_scale, family.residual_scale, family.logit_scale)
        )
        named = family.parallel
        self.parallel = bool(getattr(self.config, named)) if isinstance(named, str) else named
        self.norm = self._norm(getattr(self.decoder, family.final_norm), self.config.hidden_size)

    def __len__(self) -> int:
        return len(self.decoder.layers)

    def embedded(self, ids: Tensor) -> Tensor:
        """(T, hidden) of ids (T,), in the model's type."""
        x = embedded(self.embedding, ids)
        return x if self.embedding_scale == 1 else x * self.embedding_scale

    def new_rows(self) -> NewRows | None:
        """Rows of the head that are trained, and active now."""
        return new_rows(self.output)

    def kind_of(self, number: int) -> str | None:
        """The layer's kind of rotary embedding, as in LayerPart."""
        attention = getattr(self.decoder.layers[number], self.family.attention, None)
        if attention is None or not self.family.uses_rope(attention):
            return NOWHERE
        kinds = getattr(self.config, "layer_types", None)
        by_type = isinstance(getattr(find_rotary(self.decoder), "rope_type", None), dict)
        return kinds[number] if by_type and kinds else None

    def angles(self, positions: Tensor) -> Angles:
        """cos and sin (T, m) for each kind of rotary embedding among the layers."""
        nothing = torch.empty(len(positions), 0, device=positions.device)
        found: Angles = {NOWHERE: (nothing, nothing)}
        rotary: Any = find_rotary(self.decoder)
        for kind in {self.kind_of(number) for number in range(len(self))} - {NOWHERE}:
            like = torch.empty(0, device=positions.device)
            cos, sin = rotary(like, positions[None], *([] if kind is None else [kind]))
            once = {  # most give each angle twice
                "halves": slice(cos.shape[-1] // 2), "neighbours": slice(None, None, 2), "once": slice(None),
            }[self.family.rope_angles]  # fmt: skip
            sin = -sin if self.family.rope_reversed else sin
            found[kind] = cos[0, :, once].contiguous(), sin[0, :, once].contiguous()
        return found

    def part(self, number: int) -> LayerPart:
        family, config, layer = self.family, self.config, self.decoder.layers[number]
        attention, mixture = getattr(layer, family.attention, None), moe_module(layer, family)
        of_keys = self._of_keys(number, attention)
        size = 0 if attention is None else int(getattr(attention, "head_dim", None) or attention.head_size)
        qkv, o, gate_up, down = linears(layer, family)
        before = self._norm_named(layer, family.attention_norm, config.hidden_size)
        in_front = self._norm_named(layer, family.mlp_norm, config.hidden_size)
        return LayerPart(
            qkv=qkv,
            o=o,
            gate_up=gate_up,
            down=down,
            query=config.num_attention_heads,
            key_value=self._key_value_heads(of_keys, size),
            size=size,
            scale=float(getattr(attention, "scaling", 0)),
            window=self._window(number, attention),
            softcap=float(getattr(attention, "attn_logit_softcapping", None) or 0),
            rope=self.kind_of(number),
            sinks=getattr(attention, "sinks", None),
            mixer=mixer_module(layer, family),
            mixture=mixture,
            q_norm=self._norm_named(attention, family.q_norm, size),
            k_norm=self._norm_named(of_keys, family.k_norm, size),
            v_norm=self._norm_named(of_keys, family.v_norm, size),
            before_attention=before,
            after_attention=self._norm_named(layer, family.after_attention, config.hidden_size),
            before_mlp=before if in_front is None and self.parallel else in_front,
            after_mlp=self._norm_named(layer, family.after_mlp, config.hidden_size),
            per_layer=layer if family.per_layer_inputs else None,
            per_layer_norm=self._norm_named(layer, "post_per_layer_input_norm", config.hidden_size),
            kind=str(getattr(attention, "layer_type", "")),
            keeps=bool(getattr(attention, "store_full_length_kv", False)),
            takes=of_keys is not attention,
            activation=activation_name(config),
            act=torch.nn.functional.silu if mixture is not None else _act(getattr(layer, family.mlp)),
        )

    def _of_keys(self, number: int, attention: Any) -> Any:
        """The attention whose keys and values this layer's sees: its own, or that of the last one that keeps them."""
        if not getattr(attention, "is_kv_shared_layer", False):
            return attention
        earlier = [getattr(layer, self.family.attention) for layer in self.decoder.layers[:number]]
        alike = (one for one in earlier if one.store_full_length_kv and one.layer_type == attention.layer_type)
        return list(alike)[-1]

    def _window(self, number: int, attention: Any) -> int:
        """Keys that a query of the layer sees, 0: all; a config may name a window that its family does not have."""
        if self.family.window_in_all_layers:
            return int(getattr(self.config, "sliding_window", None) or 0)
        kinds = getattr(self.config, "layer_types", None)
        full = kinds and kinds[number] == "full_attention"
        return 0 if full else int(getattr(attention, "sliding_window", None) or 0)

    def _key_value_heads(self, attention: Any, size: int) -> int:
        if self.family.per_layer_inputs:  # they differ from layer to layer
            return int(base_of(attention.k_proj).out_features // size)
        few = None if self.family.fused_heads else getattr(self.config, "num_key_value_heads", None)
        return int(few or self.config.num_attention_heads)

    def per_layer(self, ids: Tensor, embedded: Tensor) -> Tensor | None:
        """What tokens (T,) have for each layer (T, layers, p), in models that have it."""
        if not (self.family.per_layer_inputs and self.config.hidden_size_per_layer_input):
            return None
        own = self.decoder.get_per_layer_inputs(ids[None], None)
        found: Tensor = self.decoder.project_per_layer_inputs(embedded[None], own)[0]
        return found

    def _norm_named(self, owner: Any, name: str | None, width: int) -> NormPart | None:
        found = getattr(owner, name, None) if name else None
        return None if found is None else self._norm(found, width)

    def _norm(self, module: Any, width: int) -> NormPart:
        own = without(module)
        eps = float(own.variance_epsilon if hasattr(own, "variance_epsilon") else own.eps)
        weight = getattr(own, "weight", None)
        weight = self.head.weight.new_ones(width) if weight is None else weight.data
        bias = getattr(own, "bias", None) if self.family.layer_norm else None
        trained = own is not module or any(one.requires_grad for one in own.parameters())
        return NormPart(
            weight, None if bias is None else bias.data, eps,
            0.0 if self.family.layer_norm else self.family.norm_offset, self.family.layer_norm,
            module if trained else None,
        )  # fmt: skip


def _act(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module's own, by the names that transformers gives it."""
    names = (name for name in ("act_fn", "activation_fn", "activation", "act") if hasattr(mlp, name))
    found: Callable[[Tensor], Tensor] = next((getattr(mlp, name) for name in names), torch.nn.functional.silu)
    return found


def about(act: Any) -> tuple[float, float, float, float]:
    """xIELU's numbers, zeros for others: its slopes above and below 0, beta, eps."""
    if not hasattr(act, "alpha_p"):
        return 0.0, 0.0, 0.0, 0.0
    positive, negative = (torch.nn.functional.softplus(x.detach().float()) for x in (act.alpha_p, act.alpha_n))
    beta, eps = float(act.beta), float(act.eps)
    return float(positive), float(negative) + beta, beta, eps
