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

from strop.engine.attention import Heads, Turned
from strop.engine.dropout import masks_of
from strop.engine.families import FAMILIES, activation_of, linears, text_of
from strop.engine.fits import unsupported
from strop.engine.functions import Activation, Enter, Glu, LayerNorm, Norm, Ops, RmsNorm, apply
from strop.engine.head import LabelLogProbs, SupervisedLoss
from strop.engine.joined import Joined, Workspace
from strop.engine.packed import Packed, pack, pack_apart, pack_ends, sums_by_owner
from strop.engine.processor import Attend, drops_for, processor_for

if TYPE_CHECKING:
    from strop.data.conversation import Example


NOWHERE = "nowhere"
Angles = dict[str | None, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layer:
    """One decoder layer as the fast step computes it."""

    qkv: Joined
    heads: Heads
    attend: Attend
    rope: str | None  # the kind of rotary embedding, where there are several; NOWHERE: the layer has no positions
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
        self._head = base.get_output_embeddings()
        self._decoder, self._config = text_of(base)
        self._embedding, family = self._decoder.get_input_embeddings(), FAMILIES[self._config.model_type]
        self._softcap = float(getattr(self._config, "final_logit_softcapping", None) or 0)
        self._device: torch.device = self._head.weight.device
        self._processor = processor_for(self._device, self._head.weight.dtype, warm=warm)
        self._ops = self._processor.ops
        self._drops = drops_for(self._head.weight)
        self.masks = masks_of(model, drops_for)
        parallel, self._family = family.parallel, family
        self._parallel = bool(getattr(self._config, parallel)) if isinstance(parallel, str) else parallel
        self._scales = family.embedding(self._config), family.residual(self._config), family.logits(self._config)
        self._norm = self._norm_of(getattr(self._decoder, family.final_norm), self._config.hidden_size)
        self.exchange(lambda: None)

    def exchange(self, replace: Callable[[], None]) -> None:
        """Lets go of the layers' weights, has them replaced in the model, and takes up those that are there then."""
        self._layers: list[Layer] = []
        replace()
        self._workspace = Workspace()
        self._layers = [self._layer(number, layer) for number, layer in enumerate(self._decoder.layers)]

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Sum over supervised tokens of weight * cross entropy: an fp32 scalar, differentiable in the adapters."""
        batch = pack(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        return apply(SupervisedLoss, self._hidden(batch), batch.labels, batch.weights, *self._output())

    def log_probs(self, examples: Sequence[Example]) -> Tensor:
        """Sum over the supervised tokens of each example of weight * log-probability (N,), fp64, differentiable.

        Examples with one prompt share it, whatever other prompts there are.
        """
        batch = pack_apart(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        found = apply(LabelLogProbs, self._hidden(batch), batch.labels, *self._output())
        assert batch.owners is not None
        return sums_by_owner(found, batch.weights, batch.owners, len(examples))

    def last_hidden(self, examples: Sequence[Example]) -> Tensor:
        """What the model holds at the last token of each example, behind its last norm (N, h), differentiable."""
        return self._hidden(pack_ends(examples, prefix_sharing=self.prefix_sharing, device=self._device), scaled=False)

    def _output(self) -> tuple[Tensor, float, Ops, Tensor | None]:
        return self._head.weight, self._softcap, self._ops, self._head.bias

    def _hidden(self, batch: Packed, *, scaled: bool = True) -> Tensor:
        """What the output embedding takes for each label (M, h); scaled: with the factor that some families have."""
        if self.watch is not None:
            self.watch.begin()
        hidden = _scaled(self._embedding(batch.ids), self._scales[0])
        if self._family.embedding_norm:
            hidden = apply(RmsNorm, hidden, self._norm)
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
        hidden = _scaled(apply(RmsNorm, hidden, self._norm), self._scales[2] if scaled else 1.0)
        if len(batch.picked) != len(batch.rows):  # a row behind which several examples part has several labels
            hidden = hidden[batch.picked]
        return hidden

    def _through(
        self,
        layer: Layer,
        hidden: Tensor,
        batch: Packed,
        angles: Angles,
        rows: Tensor | None,
    ) -> Tensor:
        """One layer; rows: the only rows that anything behind this layer reads (its keys and values need all)."""
        if self.watch is not None:
            self.watch()
        tokens, family = batch.keys, self._family
        qkv = layer.qkv(hidden, tokens)
        if family.fused_heads:
            qkv = qkv.view(len(qkv), -1, 3, layer.heads.size).transpose(1, 2).reshape(qkv.shape)
        cos, sin = angles[layer.rope]
        scale = None if family.query_scale is None else family.query_scale(self._config, batch.positions)
        if scale is not None or family.turned_first or family.pairs == "neighbours":
            qkv = apply(Turned, qkv, layer.heads, cos, sin, family.pairs == "neighbours", scale)
            cos, sin = angles[NOWHERE]
        mixed = layer.attend(qkv, layer.heads, cos, sin, batch.documents)
        if rows is not None:
            mixed, hidden, tokens = mixed[rows], hidden[rows], tokens[rows]
        between = self._added(hidden, mixed, tokens, layer.o, layer.after_attention)
        inner = layer.gate_up(hidden if self._parallel else between, tokens)
        return self._added(between, inner, tokens, layer.down, layer.after_mlp)

    def _added(self, hidden: Tensor, x: Tensor, tokens: Tensor, linear: Joined, after: Norm | None) -> Tensor:
        """The residual stream with what a block adds to it."""
        scale = self._scales[1]
        if after is None and scale == 1:
            return linear(x, tokens, hidden)
        change = linear(x, tokens)
        return hidden + _scaled(change if after is None else apply(RmsNorm, change, after), scale)

    def _angles(self, positions: Tensor) -> Angles:
        """cos and sin (T, m) for each kind of rotary embedding among the layers."""
        nothing = torch.empty(len(positions), 0, device=positions.device)
        found: Angles = {NOWHERE: (nothing, nothing)}
        for kind in {layer.rope for layer in self._layers} - {NOWHERE}:
            like = torch.empty(0, device=positions.device)
            cos, sin = self._decoder.rotary_emb(like, positions[None], *([] if kind is None else [kind]))
            # Each angle is given twice.
            once = slice(None, None, 2) if self._family.angles == "neighbours" else slice(cos.shape[-1] // 2)
            sin = -sin if self._family.backwards else sin
            found[kind] = cos[0, :, once].contiguous(), sin[0, :, once].contiguous()
        return found

    def _norm_of(self, module: Any, width: int) -> Norm:
        eps = float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)
        weight = getattr(module, "weight", None)
        weight = self._head.weight.new_ones(width) if weight is None else weight.data
        if self._family.layer_norm:
            bias = getattr(module, "bias", None)
            return LayerNorm(self._ops, weight, eps, 0.0, None if bias is None else bias.data)
        return Norm(self._ops, weight, eps, self._family.norm_offset)

    def _layer(self, number: int, layer: Any) -> Layer:
        family, config = self._family, self._config
        attention = getattr(layer, family.attention)
        size = int(getattr(attention, "head_dim", None) or attention.head_size)
        kinds = getattr(config, "layer_types", None)

        def norm(owner: Any, name: str | None, width: int = config.hidden_size) -> Norm | None:
            found = getattr(owner, name, None) if name else None
            return None if found is None else self._norm_of(found, width)

        qkv, o, gate_up, down = linears(layer, family)
        softcap = float(getattr(attention, "attn_logit_softcapping", None) or 0)
        window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        before = norm(layer, family.attention_norm)
        in_front = norm(layer, family.mlp_norm)
        activation = activation_of(config)
        compiled = family.gated and activation in ("silu", "gelu_pytorch_tanh")
        heads = Heads(
            self._ops,
            query=config.num_attention_heads,
            key_value=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            size=size,
            scale=float(attention.scaling),
            # Mistral and Phi-3 keep it in the config alone, the others in the layers it applies to.
            window=0 if kinds and kinds[number] == "full_attention" else int(window or 0),
            softcap=softcap,
            q_norm=norm(attention, family.q_norm, size),
            k_norm=norm(attention, family.k_norm, size),
        )

        def joined(modules: list[Any], enter: Enter) -> Joined:
            return Joined(modules, enter, self._workspace, self._processor.lora, self._drops, self._ops)

        by_type = isinstance(getattr(self._decoder.rotary_emb, "rope_type", None), dict)
        return Layer(
            joined(qkv, before),
            heads,
            self._processor.attention(size, softcap),
            NOWHERE if not family.turned(attention) else kinds[number] if by_type and kinds else None,
            joined(o, None),
            norm(layer, family.after_attention),
            joined(gate_up, before if in_front is None and self._parallel else in_front),
            joined(down, Glu(self._ops, activation) if compiled else Activation(_activation(layer.mlp), family.gated)),
            norm(layer, family.after_mlp),
        )


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _activation(mlp: Any) -> Callable[[Tensor], Tensor]:
    """The module's own, by the names that transformers gives it."""
    found: Callable[[Tensor], Tensor] = next(
        getattr(mlp, name) for name in ("act_fn", "activation_fn", "act") if hasattr(mlp, name)
    )
    return found
