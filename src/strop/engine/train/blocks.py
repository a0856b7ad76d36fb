"""A decoder layer as the fast step computes it: by hand where families.py knows it, else by the model's own modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from strop.engine.kernels.dispatch import Attend, Processor
from strop.engine.kernels.protocols import apply
from strop.engine.layers import NOWHERE, Angles, LayerPart, Layers, NormPart, about
from strop.engine.train.arena import Arena, in_heap
from strop.engine.train.attention import Heads, norms_aside
from strop.engine.train.dropout import Drops, Masks
from strop.engine.train.fused_linear import Joined, Workspace
from strop.engine.train.lora_linear import Activation, Enter, Glu, InFront, LoopedActivation
from strop.engine.train.norms import LayerNorm, Norm, normed
from strop.engine.train.packing import Packed
from strop.models.families.layers import ACTIVATIONS
from strop.models.families.table import Family


@dataclass(frozen=True)
class Way:
    """What a micro-batch has with it on its way through the layers.

    per_layer (T, layers, p): of each token for each layer, in models that have it.
    """

    batch: Packed
    angles: Angles
    per_layer: Tensor | None = None


@dataclass(frozen=True)
class Attended:
    """Attention, in front of its output projection `o`.

    rope: the kind of rotary embedding, where there are several; NOWHERE: the layer has no positions. aside: the rotary
    embedding where it is not left to attention, but makes a copy of q, k and v. kind, keeps, takes: of keys and values
    that several layers see, in front of their norms.
    """

    family: Family
    config: Any
    qkv: Joined
    heads: Heads
    attend: Attend
    rope: str | None
    o: Joined
    aside: Any
    kind: str
    keeps: bool
    takes: bool

    def __call__(self, hidden: Tensor, way: Way, taken: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """taken: an earlier layer's keys and values. The second that comes back: those that later layers see too."""
        family, heads, batch = self.family, self.heads, way.batch
        qkv, gates, query = self.qkv(hidden, batch.keys), None, self.heads.query * self.heads.size
        if family.fused_heads:  # a copy
            qkv = qkv.view(len(qkv), -1, 3, heads.size).transpose(1, 2).reshape(qkv.shape)
        if family.gated_output:  # copies
            q, gates = (x.flatten(1) for x in qkv[:, : 2 * query].view(len(qkv), heads.query, 2, heads.size).unbind(2))
            qkv = torch.cat([q, qkv[:, 2 * query :]], 1)
        if taken is not None:
            qkv = torch.cat([qkv, taken], 1)
        elif qkv.shape[1] == query + heads.key_value * heads.size:  # the values are the keys
            qkv = torch.cat([qkv, qkv[:, query:]], 1)
        kept = qkv[:, query:] if self.keeps else None
        cos, sin = way.angles[self.rope]
        scale = None if family.query_scale is None else family.query_scale(self.config, batch.positions)
        if self.aside is not None:
            qkv = apply(self.aside, qkv, heads, cos, sin, family.rope_pairs == "interleaved", scale)
            cos, sin = way.angles[NOWHERE]
        qkv, heads = norms_aside(qkv, heads)
        mixed = self.attend(qkv, heads, cos, sin, batch.documents)
        return mixed if gates is None else mixed * gates.sigmoid(), kept


@dataclass(frozen=True)
class Mlp:
    gate_up: Joined
    down: Joined


@dataclass(frozen=True)
class Own:
    """A part of a layer that the model's own module computes, behind this norm."""

    module: nn.Module
    norm: Norm | None
    masks: Masks

    def on_rows(self, x: Tensor, keys: Tensor) -> Tensor:
        """Of rows (T, h) that do not see each other."""
        if not len(x):  # what is trained has a gradient of zeros then, as everywhere
            return x + 0 * sum(p.sum() for p in self.module.parameters() if p.requires_grad)
        self.masks.tokens = keys
        return self._output(normed(x, self.norm)[None])[0]

    def on_documents(self, hidden: Tensor, batch: Packed) -> Tensor:
        """Of documents as rows beside each other, those of like length together: none sees another, and what stands
        behind a row's end changes nothing in front of it."""
        groups, places = batch.documents.beside
        x, found = normed(hidden, self.norm), []
        for rows in groups:
            self.masks.tokens = batch.keys[rows]
            found.append(self._output(x[rows]).flatten(0, 1))
        return torch.cat(found)[places]

    def _output(self, x: Tensor) -> Tensor:
        found = self.module(x)
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)


@dataclass(frozen=True)
class PerLayer:
    """What Gemma 4 adds behind a layer, of what a token has for it, by the model's own modules. number: the layer's."""

    layer: Any
    number: int
    norm: Norm | None
    masks: Masks

    def __call__(self, hidden: Tensor, own: Tensor | None, keys: Tensor) -> Tensor:
        """own (T, p)."""
        if own is not None:
            self.masks.tokens = keys
            inner = self.layer.act_fn(self.layer.per_layer_input_gate(hidden[None]))[0] * own
            hidden = hidden + normed(self.layer.per_layer_projection(inner[None])[0], self.norm)
        return cast(Tensor, hidden * self.layer.layer_scalar)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. parallel: its blocks read the same input. residual_scale: times what they add."""

    mixer: Attended | Own
    after_attention: Norm | None
    mlp: Mlp | Own
    after_mlp: Norm | None
    per_layer: PerLayer | None
    parallel: bool
    residual_scale: float

    @property
    def linears(self) -> list[Joined]:
        mixer, mlp = self.mixer, self.mlp
        found = [] if isinstance(mixer, Own) else [mixer.qkv, mixer.o]
        return [*found, *([] if isinstance(mlp, Own) else [mlp.gate_up, mlp.down])]

    def __call__(
        self, hidden: Tensor, way: Way, rows: Tensor | None, taken: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden (T, h); rows: the only ones that anything behind this layer reads (its keys and values need all).
        taken, and the second that comes back: as of Attended."""
        keys, mixer, mlp, kept = way.batch.keys, self.mixer, self.mlp, None
        if isinstance(mixer, Own):
            mixed = mixer.on_documents(hidden, way.batch)
        else:
            mixed, kept = mixer(hidden, way, taken)
        if rows is not None:
            mixed, hidden, keys = mixed[rows], hidden[rows], keys[rows]
        last = None if isinstance(mixer, Own) else mixer.o
        between = self._added(hidden, mixed, keys, last, self.after_attention)
        source = hidden if self.parallel else between
        if isinstance(mlp, Own):
            hidden = self._added(between, mlp.on_rows(source, keys), keys, None, self.after_mlp)
        else:
            hidden = self._added(between, mlp.gate_up(source, keys), keys, mlp.down, self.after_mlp)
        if self.per_layer is not None:
            own = None if way.per_layer is None else way.per_layer[:, self.per_layer.number]
            hidden = self.per_layer(hidden, own if own is None or rows is None else own[rows], keys)
        return hidden, kept

    def _added(self, hidden: Tensor, x: Tensor, keys: Tensor, linear: Joined | None, after: Norm | None) -> Tensor:
        """The residual stream with what a block adds to it: a linear layer's product with x, or x."""
        if linear is not None and after is None and self.residual_scale == 1:
            return linear(x, keys, hidden)
        change = normed(x if linear is None else linear(x, keys), after)
        return hidden + (change if self.residual_scale == 1 else change * self.residual_scale)


class Blocks:
    """Makes the layers of a model, for what a processor has."""

    def __init__(self, model: Layers, processor: Processor, drops: Drops, masks: Masks, arena: Arena | None) -> None:
        self._model, self._processor, self._drops, self._masks, self._arena = model, processor, drops, masks, arena

    def layers(self) -> list[Layer]:
        workspace = Workspace()
        return [self._layer(self._model.part(number), number, workspace) for number in range(len(self._model))]

    def norm(self, part: NormPart | None) -> Norm | None:
        if part is None:
            return None
        now = None if part.module is None else part.now
        about_ = self._processor.ops, part.weight, part.eps, part.offset, part.bias, now
        return LayerNorm(*about_, loops=self._processor.loops) if part.centered else Norm(*about_)

    def _layer(self, part: LayerPart, number: int, workspace: Workspace) -> Layer:
        in_front, in_between = self.norm(part.before_attention), self.norm(part.before_mlp)
        per_layer = None
        if part.per_layer is not None:
            per_layer = PerLayer(part.per_layer, number, self.norm(part.per_layer_norm), self._masks)
        return Layer(
            self._attention(part, workspace) if part.mixer is None else Own(part.mixer, in_front, self._masks),
            self.norm(part.after_attention),
            self._mlp(part, workspace) if part.mixture is None else Own(part.mixture, in_between, self._masks),
            self.norm(part.after_mlp),
            per_layer,
            self._model.parallel,
            self._model.residual_scale,
        )

    def _joined(self, modules: list[Any], enter: Enter, workspace: Workspace, *, kept: bool = True) -> Joined:
        arena, processor = self._arena if kept else None, self._processor
        made = processor.lora, processor.product, processor.held
        return Joined(modules, enter, workspace, *made, self._drops, processor.ops, arena)

    def _mlp(self, part: LayerPart, workspace: Workspace) -> Mlp:
        gate_up = self._joined(part.gate_up, self.norm(part.before_mlp), workspace)
        return Mlp(gate_up, self._joined(part.down, self._in_front_of_down(part), workspace))

    def _in_front_of_down(self, part: LayerPart) -> InFront:
        gated, loops, kind = self._model.family.gated, self._processor.loops, ACTIVATIONS.get(part.activation)
        if gated and part.activation in ("silu", "gelu_pytorch_tanh"):
            return Glu(self._processor.ops, part.activation)
        if gated or loops is None or kind is None:
            return Activation(part.act, gated)
        return LoopedActivation(loops, kind, about(part.act))

    def _attention(self, part: LayerPart, workspace: Workspace) -> Attended:
        family = self._model.family
        heads = Heads(
            self._processor.ops,
            query=part.query,
            key_value=part.key_value,
            size=part.size,
            scale=part.scale,
            window=part.window,
            softcap=part.softcap,
            q_norm=self.norm(part.q_norm),
            k_norm=self.norm(part.k_norm),
            v_norm=self.norm(part.v_norm),
            new=self._arena or in_heap,
            sinks=None if part.sinks is None else part.sinks.detach().float(),
        )
        outputs = sum(module.out_features for module in part.qkv)
        made = outputs != (part.query + 2 * part.key_value) * part.size  # from parts
        copied = family.fused_heads or made or family.separate_rope  # and the copy is what is kept
        return Attended(
            family,
            self._model.config,
            self._joined(part.qkv, self.norm(part.before_attention), workspace, kept=not copied),
            heads,
            self._processor.attention(part.size),
            part.rope,
            self._joined(part.o, None, workspace),
            self._processor.aside() if family.separate_rope else None,
            part.kind,
            part.keeps,
            part.takes,
        )
