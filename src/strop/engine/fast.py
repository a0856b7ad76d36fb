"""The fast step, for models whose layers families.py knows.

FastLoss reads the weights and the adapters of a transformers + peft model and computes the loss itself. The model
stays whole: its optimizer, save, merge and generate go on with the same parameters. Base weights that share an input
are laid side by side once; the model's own weights become views of them, so that nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strop.engine.attention import Heads
from strop.engine.dropout import masks_of
from strop.engine.families import FAMILIES, Family, activation_of, linears, unsupported
from strop.engine.functions import Glu, Norm, RmsNorm, apply
from strop.engine.head import SupervisedLoss
from strop.engine.joined import Joined, Workspace
from strop.engine.packed import Packed, pack
from strop.engine.processor import Attend, drops_for, processor_for

if TYPE_CHECKING:
    from strop.data.conversation import Example


@dataclass(frozen=True)
class Layer:
    """One decoder layer as the fast step computes it."""

    qkv: Joined
    heads: Heads
    attend: Attend
    rope: str | None
    o: Joined
    after_attention: Norm | None
    gate_up: Joined
    down: Joined
    after_mlp: Norm | None


class Watch(Protocol):
    """Told of each micro-batch and each layer that is about to be computed; may raise (machine.memory.MemoryWatch)."""

    def begin(self) -> None: ...

    def __call__(self) -> None: ...


class FastLoss:
    """The loss of a micro-batch through the fast step, for models that `unsupported` has no reason against.

    prefix_sharing: compute a prefix common to all examples once. checkpoint_layers: this many layers, from the first,
    keep nothing but their input and are computed again in the backward. warm: have the loops compiled beforehand, in
    another process. Made after the model is on its device and in its type.
    """

    watch: Watch | None = None  # looked at before each layer

    def __init__(
        self, model: nn.Module, *, prefix_sharing: bool = True, checkpoint_layers: int = 0, warm: bool = True
    ) -> None:
        reason = unsupported(model)
        assert reason is None, reason
        base: Any = cast(Any, model).get_base_model()
        self.prefix_sharing, self.checkpoint_layers = prefix_sharing, checkpoint_layers
        self._decoder, self._head = base.model, base.get_output_embeddings()
        self._softcap = float(getattr(base.config, "final_logit_softcapping", None) or 0)
        self._device: torch.device = self._head.weight.device
        self._processor = processor_for(self._device, self._head.weight.dtype, warm=warm)
        self._ops = self._processor.ops
        self._drops = drops_for(self._head.weight)
        self.masks = masks_of(model, drops_for)
        self._config, self._family = base.config, FAMILIES[base.config.model_type]
        self._norm = self._norm_of(base.model.norm, self._family)
        self.exchange(lambda: None)

    def exchange(self, replace: Callable[[], None]) -> None:
        """Lets go of the layers' weights, has them replaced in the model, and takes up those that are there then."""
        self._layers: list[Layer] = []
        replace()
        self._workspace = Workspace()
        self._layers = [self._layer(layer, self._family, self._config) for layer in self._decoder.layers]

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Sum over supervised tokens of weight * cross entropy: an fp32 scalar, differentiable in the adapters."""
        if self.watch is not None:
            self.watch.begin()
        batch = pack(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        hidden = self._decoder.embed_tokens(batch.ids)
        angles = self._angles(batch.positions)
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            rows = batch.rows if i == last else None
            if i < self.checkpoint_layers and torch.is_grad_enabled():
                hidden = checkpoint(
                    self._through, layer, hidden, batch, angles, rows, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = self._through(layer, hidden, batch, angles, rows)
        hidden = apply(RmsNorm, hidden, self._norm)
        if len(batch.picked) != len(batch.rows):  # a row behind which several examples part has several labels
            hidden = hidden[batch.picked]
        return apply(SupervisedLoss, hidden, batch.labels, batch.weights, self._head.weight, self._softcap, self._ops)

    def _through(
        self,
        layer: Layer,
        hidden: Tensor,
        batch: Packed,
        angles: dict[str | None, tuple[Tensor, Tensor]],
        rows: Tensor | None,
    ) -> Tensor:
        """One layer; rows: the only rows that anything behind this layer reads (its keys and values need all)."""
        if self.watch is not None:
            self.watch()
        tokens = batch.keys
        qkv = layer.qkv(hidden, tokens)
        cos, sin = angles[layer.rope]
        mixed = layer.attend(qkv, layer.heads, cos, sin, batch.documents)
        if rows is not None:
            mixed, hidden, tokens = mixed[rows], hidden[rows], tokens[rows]
        hidden = _added(hidden, mixed, tokens, layer.o, layer.after_attention)
        return _added(hidden, layer.gate_up(hidden, tokens), tokens, layer.down, layer.after_mlp)

    def _angles(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """cos and sin (T, m) for each kind of rotary embedding among the layers."""
        found = {}
        for kind in {layer.rope for layer in self._layers}:
            like = torch.empty(0, device=positions.device)
            cos, sin = self._decoder.rotary_emb(like, positions[None], *([] if kind is None else [kind]))
            half = cos.shape[-1] // 2  # both halves are the same
            found[kind] = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return found

    def _norm_of(self, module: Any, family: Family) -> Norm:
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        return Norm(self._ops, module.weight.data, float(eps), family.norm_offset)

    def _layer(self, layer: Any, family: Family, config: Any) -> Layer:
        def norm(owner: Any, name: str | None) -> Norm | None:
            found = getattr(owner, name, None) if name else None
            return None if found is None else self._norm_of(found, family)

        attention = layer.self_attn
        qkv, o, gate_up, down = linears(layer, family)
        softcap, size = float(getattr(attention, "attn_logit_softcapping", None) or 0), attention.head_dim
        heads = Heads(
            self._ops,
            query=config.num_attention_heads,
            key_value=config.num_key_value_heads,
            size=size,
            scale=float(attention.scaling),
            # Mistral and Phi-3 keep it in the config alone, the others in the layers it applies to.
            window=int(getattr(attention, "sliding_window", getattr(config, "sliding_window", None)) or 0),
            softcap=softcap,
            q_norm=norm(attention, "q_norm"),
            k_norm=norm(attention, "k_norm"),
        )

        def joined(modules: list[Any], enter: Norm | Glu | None) -> Joined:
            return Joined(modules, enter, self._workspace, self._processor.lora, self._drops)

        by_type = isinstance(getattr(self._decoder.rotary_emb, "rope_type", None), dict)
        return Layer(
            joined(qkv, norm(layer, "input_layernorm")),
            heads,
            self._processor.attention(size, softcap),
            attention.layer_type if by_type else None,
            joined(o, None),
            norm(layer, family.after_attention),
            joined(gate_up, norm(layer, family.mlp_norm)),
            joined(down, Glu(self._ops, activation_of(config))),
            norm(layer, family.after_mlp),
        )


def _added(hidden: Tensor, x: Tensor, tokens: Tensor, linear: Joined, after: Norm | None) -> Tensor:
    """The residual stream with what a block adds to it."""
    return linear(x, tokens, hidden) if after is None else hidden + apply(RmsNorm, linear(x, tokens), after)
