"""The fast step: strop's implementation of the loss, for models whose family is in models.families.table.

FastLoss uses the weights and adapters of a transformers + PEFT model. Parts of a layer that the table does not describe
are computed by the model's modules. The model stays usable: the optimizer, save, merge and generate work on the same
parameters. Base weights with the same input are fused, and the model's weights become views of the fused weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strop.engine.kernels.dispatch import ALL, USUAL, AttentionFunction, Backend, backend_for, dropout_ops_for
from strop.engine.kernels.protocols import CopyToArena, apply
from strop.engine.layers import NO_ROPE, Angles, DecoderLayers, LayerSpec, NormSpec, activation_parameters
from strop.engine.train.attention import Heads, apply_trained_head_norms
from strop.engine.train.buffers import Arena, allocate_from_heap, copy_to_device
from strop.engine.train.dropout import DropoutOps, Masks, install_dropout
from strop.engine.train.eligibility import uses_llama_kernels, why_not_fast
from strop.engine.train.head import LabelLogProbs, OutputHead, SupervisedLoss, find_top_probs
from strop.engine.train.linear import Activation, CompiledActivation, FusedLinear, Glu, Prologue, Workspace
from strop.engine.train.norms import LayerNorm, Norm, normalize
from strop.engine.train.packing import (
    PackedBatch,
    mean_by_example,
    pack,
    pack_all_tokens,
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
    """The inputs of all layers. per_layer (T, layers, p): the per-layer inputs of models that have them (Gemma 4)."""

    batch: PackedBatch
    angles: Angles
    per_layer: Tensor | None = None


@dataclass(frozen=True)
class AttentionBlock:
    """Attention without its output projection `o`, which is applied by the layer.

    apply_rope: the autograd function of a rotary embedding that `attend` cannot include, or None.
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
        """Return the attention output (T, num_query_heads size), and the keys and values if later layers reuse them.

        shared_kv: the keys and values of an earlier layer, before their norms, for a layer that reuses them.
        """
        family, heads, batch = self.family, self.heads, context.batch
        qkv, gates, q_size = self.qkv(hidden, batch.token_keys), None, self.heads.num_query_heads * self.heads.size
        if family.fused_heads:
            qkv = qkv.view(len(qkv), -1, 3, heads.size).transpose(1, 2).reshape(qkv.shape)
        if family.gated_output:
            pairs = qkv[:, : 2 * q_size].view(len(qkv), heads.num_query_heads, 2, heads.size)
            q, gates = (x.flatten(1) for x in pairs.unbind(2))
            qkv = torch.cat([q, qkv[:, 2 * q_size :]], 1)
        if shared_kv is not None:
            qkv = torch.cat([qkv, shared_kv], 1)
        elif qkv.shape[1] == q_size + heads.num_kv_heads * heads.size:  # the values are the keys
            qkv = torch.cat([qkv, qkv[:, q_size:]], 1)
        stored_kv = qkv[:, q_size:] if self.spec.stores_kv else None
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
    """A part of a layer that is computed by the model's module, after `norm`."""

    module: nn.Module
    norm: Norm | None
    masks: Masks

    def forward_rows(self, x: Tensor, token_keys: Tensor) -> Tensor:
        """Compute the module for rows (T, h), which are independent of each other."""
        if not len(x):  # gives trained parameters a gradient of zeros instead of None
            return x + 0 * sum(p.sum() for p in self.module.parameters() if p.requires_grad)
        self.masks.token_keys = token_keys
        return self._output(normalize(x, self.norm)[None])[0]

    def forward_documents(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Compute the module for documents, in padded batches of similar length."""
        groups, indices = batch.documents.padded_groups
        x, outputs = normalize(hidden, self.norm), []
        for rows in groups:
            self.masks.token_keys = batch.token_keys[rows]
            outputs.append(self._output(x[rows]).flatten(0, 1))
        return torch.cat(outputs)[indices]

    def _output(self, x: Tensor) -> Tensor:
        output = self.module(x)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)


@dataclass(frozen=True)
class PerLayerInput:
    """The per-layer inputs of Gemma 4, which the model's modules add after layer `number`."""

    layer: Any
    number: int
    norm: Norm | None
    masks: Masks

    def __call__(self, hidden: Tensor, inputs: Tensor | None, token_keys: Tensor) -> Tensor:
        """Add the layer's inputs (T, p) to hidden (T, h), and scale the result."""
        if inputs is not None:
            self.masks.token_keys = token_keys
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
        """Return the layer's output (T, h), and the keys and values if later layers reuse them.

        rows: return only these rows, or all rows if it is None. shared_kv: as for AttentionBlock.
        """
        token_keys, mixer, mlp = context.batch.token_keys, self.mixer, self.mlp
        if isinstance(mixer, ModelModule):
            mixed, o, stored_kv = mixer.forward_documents(hidden, context.batch), None, None
        else:
            (mixed, stored_kv), o = mixer(hidden, context, shared_kv), mixer.o
        if rows is not None:
            mixed, hidden, token_keys = mixed[rows], hidden[rows], token_keys[rows]
        attended = self._add(hidden, mixed, token_keys, o, self.after_attention)
        mlp_input = hidden if self.parallel else attended
        if isinstance(mlp, ModelModule):
            hidden = self._add(attended, mlp.forward_rows(mlp_input, token_keys), token_keys, None, self.after_mlp)
        else:
            hidden = self._add(attended, mlp.gate_up(mlp_input, token_keys), token_keys, mlp.down, self.after_mlp)
        if self.per_layer is not None:
            inputs = None if context.per_layer is None else context.per_layer[:, self.per_layer.number]
            hidden = self.per_layer(hidden, inputs if inputs is None or rows is None else inputs[rows], token_keys)
        return hidden, stored_kv

    def _add(
        self, hidden: Tensor, x: Tensor, token_keys: Tensor, linear: FusedLinear | None, after: Norm | None
    ) -> Tensor:
        """Add after(linear(x)) to the residual stream `hidden`. linear, after: None for the identity."""
        if linear is not None and after is None and self.residual_scale == 1:
            return linear(x, token_keys, hidden)
        output = normalize(x if linear is None else linear(x, token_keys), after)
        return hidden + (output if self.residual_scale == 1 else output * self.residual_scale)


class LayerBuilder:
    """Builds the layers of a model with the kernels of a backend."""

    def __init__(
        self, model: DecoderLayers, backend: Backend, dropout_ops: DropoutOps, masks: Masks, arena: Arena | None
    ) -> None:
        self._model, self._backend, self._dropout_ops, self._masks = model, backend, dropout_ops, masks
        self._arena, self._workspace = arena, Workspace()

    def build_layers(self) -> list[Layer]:
        return [self._build_layer(self._model.layer_spec(i), i) for i in range(len(self._model))]

    def build_norm(self, spec: NormSpec | None) -> Norm | None:
        if spec is None:
            return None
        trained_weights = None if spec.module is None else spec.current_weights
        arguments = self._backend.ops, spec.weight, spec.eps, spec.offset, spec.bias, trained_weights
        return LayerNorm(*arguments, cpu_ops=self._backend.cpu_ops) if spec.centered else Norm(*arguments)

    def _build_layer(self, spec: LayerSpec, number: int) -> Layer:
        before_attention, before_mlp = self.build_norm(spec.before_attention), self.build_norm(spec.before_mlp)
        mixer: AttentionBlock | ModelModule
        if spec.mixer is None:
            mixer = self._build_attention(spec, before_attention)
        else:
            mixer = ModelModule(spec.mixer, before_attention, self._masks)
        mlp: Mlp | ModelModule
        if spec.moe is None:
            mlp = Mlp(self._fuse(spec.gate_up, before_mlp), self._fuse(spec.down, self._build_activation(spec)))
        else:
            mlp = ModelModule(spec.moe, before_mlp, self._masks)
        per_layer = None
        if spec.per_layer is not None:
            per_layer = PerLayerInput(spec.per_layer, number, self.build_norm(spec.per_layer_norm), self._masks)
        after_attention, after_mlp = self.build_norm(spec.after_attention), self.build_norm(spec.after_mlp)
        parallel, residual_scale = self._model.parallel, self._model.residual_scale
        return Layer(mixer, after_attention, mlp, after_mlp, per_layer, parallel, residual_scale)

    def _fuse(self, modules: list[Any], prologue: Prologue, *, in_arena: bool = True) -> FusedLinear:
        arena, backend = self._arena if in_arena else None, self._backend
        matmuls, dtype = (backend.lora, backend.matmul, backend.weight_loader), self._model.dtype
        return FusedLinear(modules, prologue, self._workspace, *matmuls, self._dropout_ops, backend.ops, dtype, arena)

    def _build_activation(self, spec: LayerSpec) -> Activation | CompiledActivation | Glu:
        gated, cpu_ops, kind = self._model.family.gated, self._backend.cpu_ops, ACTIVATIONS.get(spec.activation)
        if gated and spec.activation in ("silu", "gelu_pytorch_tanh"):
            return Glu(self._backend.ops, spec.activation)
        if gated or cpu_ops is None or kind is None:
            return Activation(spec.act, gated)
        return CompiledActivation(cpu_ops, kind, activation_parameters(spec.act))

    def _build_attention(self, spec: LayerSpec, norm: Norm | None) -> AttentionBlock:
        family = self._model.family
        heads = Heads(
            self._backend.ops,
            spec.num_query_heads, spec.num_kv_heads, spec.size, spec.scale, spec.window, spec.softcap,
            self.build_norm(spec.q_norm), self.build_norm(spec.k_norm), self.build_norm(spec.v_norm),
            new=self._arena or allocate_from_heap,
            sinks=None if spec.sinks is None else spec.sinks.detach().float(),
        )  # fmt: skip
        outputs = sum(module.out_features for module in spec.qkv)
        is_rearranged = outputs != (spec.num_query_heads + 2 * spec.num_kv_heads) * spec.size
        # AttentionBlock copies q, k and v in these cases, and the copy is saved for the backward.
        is_copied = family.fused_heads or is_rearranged or family.separate_rope
        qkv = self._fuse(spec.qkv, norm, in_arena=not is_copied)
        attend, o = self._backend.attention(spec.size), self._fuse(spec.o, None)
        apply_rope = self._backend.rope() if family.separate_rope else None
        return AttentionBlock(family, self._model.config, spec, qkv, heads, attend, o, apply_rope)


class FastLoss:
    """The implementation of engine.step.Step for models that `why_not_fast` accepts.

    Args:
        model: a model on its final device and in its final dtype.
        prefix_sharing: compute a prefix that examples share only once. Ignored for families with recurrent layers.
        checkpoint_layers: the number of layers, from the first, that save only their input and are recomputed.
        warm: compile the CPU kernels ahead of time in another process.
        int8_matmul: multiply frozen weights in 8-bit integers, on a CPU in fp32, without DoRA.
        dtype: compute in this dtype with a model whose weights are all trained, in fp32; default: that of the weights.
    """

    name = "fast"
    packed = True
    memory_watch: LayerWatch | None = None
    weight_gatherer: WeightGatherer | None = None
    host_memory: Any = None  # kernels.cuda.offload.HostMemory, for the inputs of recomputed layers

    def __init__(
        self, model: nn.Module, *, prefix_sharing: bool = True, checkpoint_layers: int = 0, warm: bool = True,
        int8_matmul: bool = False, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        reason = why_not_fast(model, dtype)
        assert reason is None, reason
        self._model, self.checkpoint_layers = DecoderLayers(model, dtype), checkpoint_layers
        self._family, self._head = self._model.family, self._model.head
        self.prefix_sharing = prefix_sharing and not self._family.mixer
        self.why = self._family.model_parts
        self._device: torch.device = self._head.weight.device
        self.masks = install_dropout(model, dropout_ops_for)
        warm_kernels = (USUAL if uses_llama_kernels(model) else ALL) if warm else ""
        self._backend = backend_for(self._device, self._model.dtype, warm=warm_kernels, int8_matmul=int8_matmul)
        self._head_matmul = self._backend.head_matmul(self._head.weight)
        self._ops, self.gpu_failures = self._backend.ops, self._backend.failures
        self._dropout_ops = dropout_ops_for(self._head.weight)
        on_cpu = self._device.type == "cpu"
        self._arena = Arena() if on_cpu else None
        self._input_arena = Arena() if on_cpu else None  # for the inputs of recomputed layers
        self.replace_weights(lambda: None)

    @property
    def can_offload(self) -> bool:
        return self._device.type == "cuda"

    def token_loss(self, examples: Sequence[Example]) -> Tensor:
        batch = pack(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        hidden = self._compute_hidden(batch)
        loss: Tensor = apply(SupervisedLoss, hidden, batch.labels, batch.weights, *self._build_output_head(batch))
        self.soft_loss = torch.stack(batch.soft.losses).sum() if batch.soft is not None else loss.new_zeros(())
        return loss

    def log_probs(self, examples: Sequence[Example]) -> Tensor:
        log_probs, weights, label_examples = self._compute_label_log_probs(examples)
        return sum_by_example(log_probs, weights, label_examples, len(examples))

    def token_log_probs(self, examples: Sequence[Example]) -> Tensor:
        log_probs, _, label_examples = self._compute_label_log_probs(examples)
        return log_probs[torch.argsort(label_examples, stable=True)]  # stable: keeps the order within an example

    @torch.no_grad()
    def top_probs(self, examples: Sequence[Example], k: int, temperature: float) -> tuple[Tensor, Tensor]:
        batch = pack_separately(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        assert batch.label_examples is not None
        order = torch.argsort(batch.label_examples, stable=True)  # stable: keeps the order within an example
        head = self._build_output_head(batch)[0]
        ids, probs = find_top_probs(self._compute_hidden(batch), batch.labels, head, k, temperature)
        return ids[order], probs[order]

    def last_hidden(self, examples: Sequence[Example]) -> Tensor:
        batch = pack_last_tokens(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        return self._compute_hidden(batch, scaled=False)

    def mean_hidden(self, examples: Sequence[Example]) -> Tensor:
        batch = pack_all_tokens(examples, device=self._device)
        assert batch.label_examples is not None
        return mean_by_example(self._compute_hidden(batch, scaled=False), batch.label_examples, len(examples))

    def checkpoint(self, layers: int | None = None) -> None:
        self.checkpoint_layers = len(self._layers) if layers is None else layers

    def offload(self) -> None:
        self.checkpoint_layers = len(self._layers)
        self.host_memory = self.host_memory or self._backend.host_memory(self._device)

    def replace_weights(self, replace: Callable[[], None]) -> None:
        self._layers: list[Layer] = []
        replace()
        builder = LayerBuilder(self._model, self._backend, self._dropout_ops, self.masks, self._arena)
        self._layers, self._norm = builder.build_layers(), builder.build_norm(self._model.norm)
        if self._device.type == "cuda":  # fusing leaves free memory in PyTorch's cache: 5.9 GB for an 8B model in bf16
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

    def _compute_label_log_probs(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-probability, the weight and the example of each label (M,)."""
        batch = pack_separately(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        assert batch.label_examples is not None
        log_probs = apply(LabelLogProbs, self._compute_hidden(batch), batch.labels, *self._build_output_head(batch))
        return log_probs, batch.weights, batch.label_examples

    def _build_output_head(self, batch: PackedBatch) -> tuple[Any, ...]:
        model = self._model
        head, new = base_module(current_module(model.output)), new_rows(model.output)
        active, token_keys = find_active_adapters([model.output], [self._head]), batch.token_keys[batch.rows]
        token_keys = token_keys if batch.in_row_order else token_keys[batch.label_rows]
        rows, ids = (None, None) if new is None else (new.rows, new.token_ids())
        output = OutputHead(
            head.weight, model.softcap, self._ops, head.bias, rows, ids, tuple(active.parts), active.scales,
            dropout_spec(active.dropouts, token_keys), self._dropout_ops, head.weight.requires_grad,
            head.bias is not None and head.bias.requires_grad, self._head_matmul, batch.soft,
        )  # fmt: skip
        return output, *(output.trained if torch.is_grad_enabled() else [])

    def _compute_hidden(self, batch: PackedBatch, *, scaled: bool = True) -> Tensor:
        """Return the input of the output head for each label (M, h). scaled: multiply by the family's logits_scale."""
        host, has_grad, recomputes = self.host_memory, torch.is_grad_enabled(), self.checkpoint_layers > 0
        if self._arena is not None and self._input_arena is not None:
            self._arena.begin(active=has_grad and not recomputes)
            self._input_arena.begin(active=has_grad and recomputes and host is None)
        if self.memory_watch is not None:
            self.memory_watch.begin()
        linears = [linear for layer in self._layers for linear in layer.linears]
        self._backend.prepare_adapters(linears, self._model.dtype)
        self._gather("embedding")
        hidden, later = self._model.embed(batch.ids)
        if self._family.embedding_norm:
            hidden = normalize(hidden, self._norm)
        self.masks.token_keys = batch.token_keys
        per_layer_inputs = self._model.per_layer_inputs(batch.ids, hidden)
        context = BatchContext(batch, self._model.angles(self._find_positions(batch)), per_layer_inputs)
        if host is not None:
            host.begin()
        shared_kv: dict[str, Tensor] = {}  # keys and values that later layers reuse, by kind of attention
        for i, layer in enumerate(self._layers):
            spec = layer.mixer.spec if isinstance(layer.mixer, AttentionBlock) else None
            reused = shared_kv[spec.kv_kind] if spec is not None and spec.reuses_kv else None
            is_last = i == len(self._layers) - 1
            added = later[1 + i] if 1 + i < len(later) else None
            arguments = layer, hidden, context, batch.rows if is_last and added is None else None, reused
            self._gather(i)
            if i < self.checkpoint_layers and has_grad:
                with nullcontext() if host is None else host.offload_inputs(last=is_last):
                    hidden, stored_kv = checkpoint(
                        self._compute_layer, *arguments, use_reentrant=False, preserve_rng_state=False,
                        context_fn=lambda: (nullcontext(), self._arena or nullcontext()),  # forward, recomputation
                    )  # fmt: skip
                if self._input_arena is not None and host is None:
                    hidden = apply(CopyToArena, hidden, self._input_arena)
            else:
                hidden, stored_kv = self._compute_layer(*arguments)
            if added is not None:
                hidden = hidden.index_put(later[0].nonzero(as_tuple=True), added.to(hidden.dtype), accumulate=True)
                hidden = hidden[batch.rows] if is_last else hidden
            if spec is not None and stored_kv is not None:
                shared_kv[spec.kv_kind] = stored_kv
            if self.weight_gatherer is not None and hidden.requires_grad:
                call_before_gradient(hidden, partial(self._gather, i))
        self._gather("head")
        hidden = normalize(hidden, self._norm)
        if scaled and self._model.logits_scale != 1:
            hidden = hidden * self._model.logits_scale
        if not batch.in_row_order:  # some rows have several labels, or a shared prefix has a later row's label
            hidden = hidden[batch.label_rows]
        return hidden

    def _find_positions(self, batch: PackedBatch) -> Tensor:
        """Return the positions of the rotary embedding, as for DecoderLayers.angles."""
        images = self._model.images
        if images is None or not images.positions_differ:
            return batch.positions
        ids, positions = batch.ids.cpu().numpy(), np.empty((3, batch.documents.tokens), np.int64)
        for start, length, prefix, first, _ in batch.documents.table.tolist():
            document = np.concatenate([ids[first : first + prefix], ids[start : start + length]])
            positions[:, start : start + length] = images.positions(document)[:, prefix:]
        [on_device] = copy_to_device([positions], self._device)
        return on_device

    def _gather(self, key: int | str) -> None:
        if self.weight_gatherer is not None:
            self.weight_gatherer(key)

    def _compute_layer(
        self, layer: Layer, hidden: Tensor, context: BatchContext, rows: Tensor | None, shared_kv: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.memory_watch is not None:
            self.memory_watch()
        return layer(hidden, context, rows, shared_kv)
