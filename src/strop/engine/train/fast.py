"""The fast step, for models of the families table: its decoder layers, by hand where the table covers a part.

FastLoss reads the weights and adapters of a transformers + PEFT model and computes the loss itself. The model stays
usable: its optimizer, save, merge and generate work on the same parameters. Base weights that share an input are fused
once, and the model's weights become views of them, so that nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strop.engine.kernels.dispatch import ALL, USUAL, AttentionFunction, Backend, backend_for, dropout_ops_for
from strop.engine.kernels.protocols import CopyToArena, apply
from strop.engine.layers import NO_ROPE, Angles, DecoderLayers, LayerSpec, NormSpec, activation_parameters
from strop.engine.train.attention import Heads, apply_trained_head_norms
from strop.engine.train.buffers import Arena, heap_empty
from strop.engine.train.dropout import DropoutOps, Masks, install_dropout
from strop.engine.train.eligibility import uses_llama_kernels, why_not_fast
from strop.engine.train.head import LabelLogProbs, OutputHead, SupervisedLoss
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
from strop.engine.train.packing import (
    PackedBatch,
    order_by_example,
    pack,
    pack_last_tokens,
    pack_separately,
    sum_by_example,
)
from strop.engine.train.peft_modules import base_module, current_module, dropout_spec, find_active_adapters, new_rows
from strop.engine.train.plain import LayerWatch, WeightGatherer, call_before_gradient
from strop.models.families.layers import ACTIVATIONS
from strop.models.families.table import Family

if TYPE_CHECKING:
    from strop.data.types import Example


@dataclass(frozen=True)
class BatchContext:
    """The inputs of a micro-batch that all layers use. per_layer (T, layers, p): the tokens' per-layer inputs."""

    batch: PackedBatch
    angles: Angles
    per_layer: Tensor | None = None


@dataclass(frozen=True)
class AttentionBlock:
    """Attention, up to its output projection `o`, which the layer applies.

    apply_rope: the function that applies the rotary embedding outside of attention, on a copy of q, k and v, if needed.
    """

    family: Family
    config: Any
    spec: LayerSpec
    qkv: FusedLinear
    heads: Heads
    attend: AttentionFunction
    o: FusedLinear
    apply_rope: Any

    def __call__(self, hidden: Tensor, context: BatchContext, shared_kv: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the attention output (T, query size), and the keys and values that later layers reuse.

        shared_kv: the keys and values of an earlier layer, before their norms.
        """
        family, heads, batch = self.family, self.heads, context.batch
        qkv, gates, query = self.qkv(hidden, batch.keys), None, self.heads.query * self.heads.size
        if family.fused_heads:  # a copy
            qkv = qkv.view(len(qkv), -1, 3, heads.size).transpose(1, 2).reshape(qkv.shape)
        if family.gated_output:  # copies
            q, gates = (x.flatten(1) for x in qkv[:, : 2 * query].view(len(qkv), heads.query, 2, heads.size).unbind(2))
            qkv = torch.cat([q, qkv[:, 2 * query :]], 1)
        if shared_kv is not None:
            qkv = torch.cat([qkv, shared_kv], 1)
        elif qkv.shape[1] == query + heads.key_value * heads.size:  # the values are the keys
            qkv = torch.cat([qkv, qkv[:, query:]], 1)
        stored_kv = qkv[:, query:] if self.spec.keeps else None
        cos, sin = context.angles[self.spec.rope]
        scale = None if family.query_scale is None else family.query_scale(self.config, batch.positions)
        if self.apply_rope is not None:
            qkv = apply(self.apply_rope, qkv, heads, cos, sin, family.rope_pairs == "interleaved", scale)
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
    """Builds the layers of a model for a backend."""

    def __init__(
        self, model: DecoderLayers, backend: Backend, dropout_ops: DropoutOps, masks: Masks, arena: Arena | None
    ) -> None:
        self._model, self._backend, self._masks, self._arena = model, backend, masks, arena
        self._dropout_ops = dropout_ops

    def layers(self) -> list[Layer]:
        workspace = Workspace()
        return [self._layer(self._model.part(number), number, workspace) for number in range(len(self._model))]

    def norm(self, spec: NormSpec | None) -> Norm | None:
        if spec is None:
            return None
        now = None if spec.module is None else spec.now
        arguments = self._backend.ops, spec.weight, spec.eps, spec.offset, spec.bias, now
        return LayerNorm(*arguments, loops=self._backend.cpu_ops) if spec.centered else Norm(*arguments)

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
        arena, backend = self._arena if in_arena else None, self._backend
        matmuls = backend.lora, backend.matmul, backend.weight_loader
        return FusedLinear(modules, prologue, workspace, *matmuls, self._dropout_ops, backend.ops, arena)

    def _activation(self, spec: LayerSpec) -> ActivationModule:
        gated, loops, kind = self._model.family.gated, self._backend.cpu_ops, ACTIVATIONS.get(spec.activation)
        if gated and spec.activation in ("silu", "gelu_pytorch_tanh"):
            return Glu(self._backend.ops, spec.activation)
        if gated or loops is None or kind is None:
            return Activation(spec.act, gated)
        return CompiledActivation(loops, kind, activation_parameters(spec.act))

    def _attention(self, spec: LayerSpec, workspace: Workspace) -> AttentionBlock:
        family = self._model.family
        heads = Heads(
            self._backend.ops,
            spec.query, spec.key_value, spec.size, spec.scale, spec.window, spec.softcap,
            self.norm(spec.q_norm), self.norm(spec.k_norm), self.norm(spec.v_norm),
            new=self._arena or heap_empty,
            sinks=None if spec.sinks is None else spec.sinks.detach().float(),
        )  # fmt: skip
        outputs = sum(module.out_features for module in spec.qkv)
        concatenated = outputs != (spec.query + 2 * spec.key_value) * spec.size
        # a copy of the layer's output is saved for the backward, not the output
        copied = family.fused_heads or concatenated or family.separate_rope
        qkv = self._fused(spec.qkv, self.norm(spec.before_attention), workspace, in_arena=not copied)
        attend, o = self._backend.attention(spec.size), self._fused(spec.o, None, workspace)
        apply_rope = self._backend.rope() if family.separate_rope else None
        return AttentionBlock(family, self._model.config, spec, qkv, heads, attend, o, apply_rope)


class FastLoss:
    """The step (see engine.step.Step) of models that `why_not_fast` does not rule out.

    prefix_sharing: compute a prefix that all examples share once. Not done in families with a mixer other than
    attention, whose state passes from one token to the next. checkpoint_layers: this many layers, from the first, save
    only their input and are recomputed in the backward. warm: compile the CPU kernels beforehand in another process.
    integers: multiply frozen weights in 8-bit integers, on a CPU in fp32, without DoRA.

    Create it after the model is on its device and in its dtype.
    """

    name = "fast"
    packed = True
    memory_watch: LayerWatch | None = None
    weight_gatherer: WeightGatherer | None = None
    host_memory: Any = None  # kernels.cuda.offload.HostMemory, for the inputs of recomputed layers

    def __init__(
        self,
        model: nn.Module,
        *,
        prefix_sharing: bool = True,
        checkpoint_layers: int = 0,
        warm: bool = True,
        integers: bool = False,
    ) -> None:
        reason = why_not_fast(model)
        assert reason is None, reason
        self._model, self.checkpoint_layers = DecoderLayers(model), checkpoint_layers
        self._family, self._head = self._model.family, self._model.head
        self.prefix_sharing = prefix_sharing and not self._family.mixer
        self.why = self._family.model_parts
        self._device: torch.device = self._head.weight.device
        self.masks = install_dropout(model, dropout_ops_for)
        loops = (USUAL if uses_llama_kernels(model) else ALL) if warm else ""
        self._backend = backend_for(self._device, self._head.weight.dtype, warm=loops, integers=integers)
        self._head_matmul = self._backend.head_matmul(self._head.weight)
        self._ops, self.why_no_triton = self._backend.ops, self._backend.why_no_triton
        self._dropout_ops = dropout_ops_for(self._head.weight)
        on_cpu = self._device.type == "cpu"
        self._arena = Arena() if on_cpu else None
        self._input_arena = Arena() if on_cpu else None  # for the inputs of recomputed layers
        self._blocks = Blocks(self._model, self._backend, self._dropout_ops, self.masks, self._arena)
        self._norm = self._blocks.norm(self._model.norm)
        self.replace_weights(lambda: None)

    @property
    def can_offload(self) -> bool:
        return self._device.type == "cuda"

    def token_loss(self, examples: Sequence[Example]) -> Tensor:
        batch = pack(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        return apply(SupervisedLoss, self._hidden(batch), batch.labels, batch.weights, *self._output_head(batch))

    def log_probs(self, examples: Sequence[Example]) -> Tensor:
        log_probs, batch = self._label_log_probs(examples)
        assert batch.label_examples is not None
        return sum_by_example(log_probs, batch.weights, batch.label_examples, len(examples))

    def token_log_probs(self, examples: Sequence[Example]) -> Tensor:
        log_probs, batch = self._label_log_probs(examples)
        assert batch.label_examples is not None
        return log_probs[order_by_example(batch.label_examples)]

    def last_hidden(self, examples: Sequence[Example]) -> Tensor:
        batch = pack_last_tokens(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        return self._hidden(batch, scaled=False)

    def checkpoint(self, layers: int | None = None) -> None:
        self.checkpoint_layers = len(self._layers) if layers is None else layers

    def offload(self) -> None:
        self.checkpoint_layers = len(self._layers)
        self.host_memory = self.host_memory or self._backend.host_memory(self._device)

    def replace_weights(self, replace: Callable[[], None]) -> None:
        self._layers: list[Layer] = []
        replace()
        self._layers = self._blocks.layers()
        if self._device.type == "cuda":  # fused weights leave unused memory: 5.9 GB for an 8B model in 16 bits
            torch.cuda.empty_cache()

    def release_buffers(self) -> None:
        for arena in (self._arena, self._input_arena):
            if arena is not None:
                arena.free()
        if self.host_memory is not None:
            self.host_memory.begin()

    def set_memory_watch(self, watch: LayerWatch) -> None:
        self.memory_watch = watch

    def set_weight_gatherer(self, gather: WeightGatherer) -> None:
        self.weight_gatherer = gather

    def _label_log_probs(self, examples: Sequence[Example]) -> tuple[Tensor, PackedBatch]:
        batch = pack_separately(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        return apply(LabelLogProbs, self._hidden(batch), batch.labels, *self._output_head(batch)), batch

    def _output_head(self, batch: PackedBatch) -> tuple[Any, ...]:
        model = self._model
        head, new = base_module(current_module(model.output)), new_rows(model.output)
        active, keys = find_active_adapters([model.output], [self._head]), batch.keys[batch.rows]
        keys = keys if len(batch.label_rows) == len(batch.rows) else keys[batch.label_rows]
        rows, ids = (None, None) if new is None else (new.rows, new.token_ids())
        output = OutputHead(
            head.weight, model.softcap, self._ops, head.bias, rows, ids, tuple(active.parts), active.scales,
            dropout_spec(active.dropouts, keys), self._dropout_ops, head.weight.requires_grad,
            head.bias is not None and head.bias.requires_grad, self._head_matmul,
        )  # fmt: skip
        return output, *(output.trained if torch.is_grad_enabled() else [])

    def _hidden(self, batch: PackedBatch, *, scaled: bool = True) -> Tensor:
        """Return the output head's input for each label (M, h). scaled: with the factor that some families have."""
        last, trains, recomputes = len(self._layers) - 1, torch.is_grad_enabled(), self.checkpoint_layers > 0
        if self._arena is not None and self._input_arena is not None:
            self._arena.begin(active=trains and not recomputes)
            self._input_arena.begin(active=trains and recomputes and self.host_memory is None)
        if self.memory_watch is not None:
            self.memory_watch.begin()
        linears = [linear for layer in self._layers for linear in layer.linears]
        self._backend.prepare_adapters(linears, self._head.weight.dtype)
        self._gather("embedding")
        hidden = self._model.embedded(batch.ids)
        if self._family.embedding_norm:
            hidden = normalize(hidden, self._norm)
        self.masks.tokens = batch.keys
        context = BatchContext(batch, self._model.angles(batch.positions), self._model.per_layer(batch.ids, hidden))
        if self.host_memory is not None:
            self.host_memory.begin()
        shared_kv: dict[str, Tensor] = {}  # keys and values that later layers reuse, by kind of attention
        for i, layer in enumerate(self._layers):
            spec = layer.mixer.spec if isinstance(layer.mixer, AttentionBlock) else None
            reused = shared_kv[spec.kind] if spec is not None and spec.takes else None
            arguments = layer, hidden, context, batch.rows if i == last else None, reused
            self._gather(i)
            if i < self.checkpoint_layers and trains:
                with nullcontext() if self.host_memory is None else self.host_memory.offload_inputs(last=i == last):
                    hidden, stored_kv = checkpoint(
                        self._compute_layer, *arguments, use_reentrant=False, preserve_rng_state=False,
                        context_fn=lambda: (nullcontext(), self._arena or nullcontext()),  # forward, recomputation
                    )  # fmt: skip
                if self._input_arena is not None and self.host_memory is None:
                    hidden = apply(CopyToArena, hidden, self._input_arena)
            else:
                hidden, stored_kv = self._compute_layer(*arguments)
            if spec is not None and stored_kv is not None:
                shared_kv[spec.kind] = stored_kv
            if self.weight_gatherer is not None and hidden.requires_grad:
                call_before_gradient(hidden, partial(self._gather, i))
        self._gather("head")
        hidden = normalize(hidden, self._norm)
        if scaled and self._model.logits_scale != 1:
            hidden = hidden * self._model.logits_scale
        if len(batch.label_rows) != len(batch.rows):  # a row where several examples diverge has several labels
            hidden = hidden[batch.label_rows]
        return hidden

    def _gather(self, where: int | str) -> None:
        if self.weight_gatherer is not None:
            self.weight_gatherer(where)

    def _compute_layer(
        self, layer: Layer, hidden: Tensor, context: BatchContext, rows: Tensor | None, shared_kv: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.memory_watch is not None:
            self.memory_watch()
        return layer(hidden, context, rows, shared_kv)
