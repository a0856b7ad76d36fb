"""The fast step's decoder layers: by hand where the families table covers a part, else by the model's modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from strop.engine.kernels.dispatch import Attend, Processor
from strop.engine.kernels.protocols import apply
from strop.engine.layers import NO_ROPE, Angles, DecoderLayers, LayerSpec, NormSpec, activation_parameters
from strop.engine.train.attention import Heads, apply_trained_head_norms
from strop.engine.train.buffers import Arena, heap_empty
from strop.engine.train.dropout import DropoutOps, Masks
from strop.engine.train.linear import (
    Activation,
    ActivationModule,
    CompiledActivation,
    FusedLinear,
    Glu,
    Prologue,
    Workspace,
)
from strop.engine.train.norms import LayerNorm, Norm, normalize
from strop.engine.train.packing import PackedBatch
from strop.models.families.layers import ACTIVATIONS, Family


@dataclass(frozen=True)
class BatchContext:
    """The inputs of a micro-batch that all layers use. per_layer (T, layers, p): the tokens' per-layer inputs."""

    batch: PackedBatch
    angles: Angles
    per_layer: Tensor | None = None


@dataclass(frozen=True)
class AttentionBlock:
    """Attention, up to its output projection `o`, which the layer applies.

    rope: the kind of rotary embedding in models with several, or NO_ROPE. apply_rope: the function that applies it
    outside of attention, on a copy of q, k and v, where needed. kind, keeps, takes: as in LayerSpec.
    """

    family: Family
    config: Any
    qkv: FusedLinear
    heads: Heads
    attend: Attend
    rope: str | None
    o: FusedLinear
    apply_rope: Any
    kind: str
    keeps: bool
    takes: bool

    def __call__(self, hidden: Tensor, context: BatchContext, shared_kv: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the attention output (T, query size), and the keys and values that later layers reuse.

        shared_kv: the keys and values of an earlier layer, before their norms.
        """
        family, heads, batch = self.family, self.heads, context.batch
        qkv, gates, query = self.qkv(hidden, batch.keys), None, self.heads.query * self.heads.size
        if family.fused_heads:  # a copy
            qkv = qkv.view(len(qkv), -1, 3, heads.size).transpose(1, 2).reshape(qkv.shape)
        if family.gated_heads:  # copies
            q, gates = (x.flatten(1) for x in qkv[:, : 2 * query].view(len(qkv), heads.query, 2, heads.size).unbind(2))
            qkv = torch.cat([q, qkv[:, 2 * query :]], 1)
        if shared_kv is not None:
            qkv = torch.cat([qkv, shared_kv], 1)
        elif qkv.shape[1] == query + heads.key_value * heads.size:  # the values are the keys
            qkv = torch.cat([qkv, qkv[:, query:]], 1)
        stored_kv = qkv[:, query:] if self.keeps else None
        cos, sin = context.angles[self.rope]
        scale = None if family.query_scale is None else family.query_scale(self.config, batch.positions)
        if self.apply_rope is not None:
            qkv = apply(self.apply_rope, qkv, heads, cos, sin, family.pairs == "neighbours", scale)
            cos, sin = context.angles[NO_ROPE]
        qkv, heads = apply_trained_head_norms(qkv, heads)
        mixed = self.attend(qkv, heads, cos, sin, batch.documents)
        return mixed if gates is None else mixed * gates.sigmoid(), stored_kv


@dataclass(frozen=True)
class Mlp:
    gate_up: FusedLinear
    down: FusedLinear


@dataclass(frozen=True)
class ModelModule:
    """A part of a layer that the model's module computes after this norm."""

    module: nn.Module
    norm: Norm | None
    masks: Masks

    def on_rows(self, x: Tensor, keys: Tensor) -> Tensor:
        """Compute rows (T, h) that are independent of each other."""
        if not len(x):  # trained parameters get a gradient of zeros, as elsewhere
            return x + 0 * sum(p.sum() for p in self.module.parameters() if p.requires_grad)
        self.masks.tokens = keys
        return self._output(normalize(x, self.norm)[None])[0]

    def on_documents(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Compute documents as padded batches of similar length.

        Documents are independent, and padding after a document's end does not change what precedes it.
        """
        groups, places = batch.documents.padded_groups
        x, outputs = normalize(hidden, self.norm), []
        for rows in groups:
            self.masks.tokens = batch.keys[rows]
            outputs.append(self._output(x[rows]).flatten(0, 1))
        return torch.cat(outputs)[places]

    def _output(self, x: Tensor) -> Tensor:
        output = self.module(x)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)


@dataclass(frozen=True)
class PerLayerInput:
    """Gemma 4's per-layer inputs, added after layer `number` by the model's modules."""

    layer: Any
    number: int
    norm: Norm | None
    masks: Masks

    def __call__(self, hidden: Tensor, inputs: Tensor | None, keys: Tensor) -> Tensor:
        """Return hidden (T, h) with the layer's inputs (T, p) added."""
        if inputs is not None:
            self.masks.tokens = keys
            gated = self.layer.act_fn(self.layer.per_layer_input_gate(hidden[None]))[0] * inputs
            hidden = hidden + normalize(self.layer.per_layer_projection(gated[None])[0], self.norm)
        return cast(Tensor, hidden * self.layer.layer_scalar)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. parallel: attention and MLP read the same input. residual_scale: factor of their outputs."""

    mixer: AttentionBlock | ModelModule
    after_attention: Norm | None
    mlp: Mlp | ModelModule
    after_mlp: Norm | None
    per_layer: PerLayerInput | None
    parallel: bool
    residual_scale: float

    @property
    def linears(self) -> list[FusedLinear]:
        mixer, mlp = self.mixer, self.mlp
        linears = [] if isinstance(mixer, ModelModule) else [mixer.qkv, mixer.o]
        return linears if isinstance(mlp, ModelModule) else [*linears, mlp.gate_up, mlp.down]

    def __call__(
        self, hidden: Tensor, context: BatchContext, rows: Tensor | None, shared_kv: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the layer's output (T, h), and the keys and values that later layers reuse.

        rows: the only rows that the output needs; keys and values need all. shared_kv: as for AttentionBlock.
        """
        keys, mixer, mlp, stored_kv = context.batch.keys, self.mixer, self.mlp, None
        if isinstance(mixer, ModelModule):
            mixed = mixer.on_documents(hidden, context.batch)
        else:
            mixed, stored_kv = mixer(hidden, context, shared_kv)
        if rows is not None:
            mixed, hidden, keys = mixed[rows], hidden[rows], keys[rows]
        projection = None if isinstance(mixer, ModelModule) else mixer.o
        attended = self._add(hidden, mixed, keys, projection, self.after_attention)
        source = hidden if self.parallel else attended
        if isinstance(mlp, ModelModule):
            hidden = self._add(attended, mlp.on_rows(source, keys), keys, None, self.after_mlp)
        else:
            hidden = self._add(attended, mlp.gate_up(source, keys), keys, mlp.down, self.after_mlp)
        if self.per_layer is not None:
            inputs = None if context.per_layer is None else context.per_layer[:, self.per_layer.number]
            hidden = self.per_layer(hidden, inputs if inputs is None or rows is None else inputs[rows], keys)
        return hidden, stored_kv

    def _add(self, hidden: Tensor, x: Tensor, keys: Tensor, linear: FusedLinear | None, after: Norm | None) -> Tensor:
        """Add a block's output to the residual stream: linear(x), or x without a linear layer, after its norm."""
        if linear is not None and after is None and self.residual_scale == 1:
            return linear(x, keys, hidden)
        change = normalize(x if linear is None else linear(x, keys), after)
        return hidden + (change if self.residual_scale == 1 else change * self.residual_scale)


class Blocks:
    """Builds the layers of a model for a processor."""

    def __init__(
        self, model: DecoderLayers, processor: Processor, dropout_ops: DropoutOps, masks: Masks, arena: Arena | None
    ) -> None:
        self._model, self._processor, self._masks, self._arena = model, processor, masks, arena
        self._dropout_ops = dropout_ops

    def layers(self) -> list[Layer]:
        workspace = Workspace()
        return [self._layer(self._model.part(number), number, workspace) for number in range(len(self._model))]

    def norm(self, spec: NormSpec | None) -> Norm | None:
        if spec is None:
            return None
        now = None if spec.module is None else spec.now
        arguments = self._processor.ops, spec.weight, spec.eps, spec.offset, spec.bias, now
        return LayerNorm(*arguments, loops=self._processor.loops) if spec.centered else Norm(*arguments)

    def _layer(self, spec: LayerSpec, number: int, workspace: Workspace) -> Layer:
        before_attention, before_mlp = self.norm(spec.before_attention), self.norm(spec.before_mlp)
        mixer: AttentionBlock | ModelModule
        if spec.mixer is None:
            mixer = self._attention(spec, workspace)
        else:
            mixer = ModelModule(spec.mixer, before_attention, self._masks)
        mlp: Mlp | ModelModule
        if spec.mixture is None:
            gate_up = self._fused(spec.gate_up, before_mlp, workspace)
            mlp = Mlp(gate_up, self._fused(spec.down, self._activation(spec), workspace))
        else:
            mlp = ModelModule(spec.mixture, before_mlp, self._masks)
        per_layer = None
        if spec.per_layer is not None:
            per_layer = PerLayerInput(spec.per_layer, number, self.norm(spec.per_layer_norm), self._masks)
        after_attention, after_mlp = self.norm(spec.after_attention), self.norm(spec.after_mlp)
        parallel, residual_scale = self._model.parallel, self._model.residual_scale
        return Layer(mixer, after_attention, mlp, after_mlp, per_layer, parallel, residual_scale)

    def _fused(
        self, modules: list[Any], prologue: Prologue, workspace: Workspace, *, in_arena: bool = True
    ) -> FusedLinear:
        arena, processor = self._arena if in_arena else None, self._processor
        matmuls = processor.lora, processor.product, processor.held
        return FusedLinear(modules, prologue, workspace, *matmuls, self._dropout_ops, processor.ops, arena)

    def _activation(self, spec: LayerSpec) -> ActivationModule:
        gated, loops, kind = self._model.family.gated, self._processor.loops, ACTIVATIONS.get(spec.activation)
        if gated and spec.activation in ("silu", "gelu_pytorch_tanh"):
            return Glu(self._processor.ops, spec.activation)
        if gated or loops is None or kind is None:
            return Activation(spec.act, gated)
        return CompiledActivation(loops, kind, activation_parameters(spec.act))

    def _attention(self, spec: LayerSpec, workspace: Workspace) -> AttentionBlock:
        family = self._model.family
        heads = Heads(
            self._processor.ops,
            spec.query, spec.key_value, spec.size, spec.scale, spec.window, spec.softcap,
            self.norm(spec.q_norm), self.norm(spec.k_norm), self.norm(spec.v_norm),
            new=self._arena or heap_empty,
            sinks=None if spec.sinks is None else spec.sinks.detach().float(),
        )  # fmt: skip
        outputs = sum(module.out_features for module in spec.qkv)
        concatenated = outputs != (spec.query + 2 * spec.key_value) * spec.size
        copied = family.fused_heads or concatenated or family.aside  # then the copy is saved, not the layer's output
        return AttentionBlock(
            family,
            self._model.config,
            self._fused(spec.qkv, self.norm(spec.before_attention), workspace, in_arena=not copied),
            heads,
            self._processor.attention(spec.size),
            spec.rope,
            self._fused(spec.o, None, workspace),
            self._processor.aside() if family.aside else None,
            spec.kind, spec.keeps, spec.takes,
        )  # fmt: skip
