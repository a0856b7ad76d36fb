"""The fast step, for models of the families table.

FastLoss reads the weights and adapters of a transformers + PEFT model and computes the loss itself. The model stays
usable: its optimizer, save, merge and generate work on the same parameters. Base weights that share an input are fused
once, and the model's weights become views of them, so that nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strop.engine.kernels.dispatch import ALL, USUAL, drops_for, processor_for
from strop.engine.kernels.protocols import Placed, apply
from strop.engine.layers import DecoderLayers
from strop.engine.train.blocks import AttentionBlock, BatchContext, Blocks, Layer
from strop.engine.train.buffers import Arena
from strop.engine.train.dropout import install_dropout
from strop.engine.train.eligibility import uses_llama_kernels, why_not_fast
from strop.engine.train.head import LabelLogProbs, OutputHead, SupervisedLoss
from strop.engine.train.norms import normalize
from strop.engine.train.packing import (
    PackedBatch,
    order_by_example,
    pack,
    pack_last_tokens,
    pack_separately,
    sum_by_example,
)
from strop.engine.train.peft_modules import base_of, current_module, dropout_spec, find_active_adapters
from strop.engine.train.plain import LayerWatch, WeightGatherer, call_before_gradient

if TYPE_CHECKING:
    from strop.data.types import Example


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
        self.why = self._family.by_model
        self._device: torch.device = self._head.weight.device
        self.masks = install_dropout(model, drops_for)
        loops = (USUAL if uses_llama_kernels(model) else ALL) if warm else ""
        self._processor = processor_for(self._device, self._head.weight.dtype, warm=loops, integers=integers)
        self._head_matmul = self._processor.head_product(self._head.weight)
        self._ops, self.lacking = self._processor.ops, self._processor.lacking
        self._dropout_ops = drops_for(self._head.weight)
        on_cpu = self._device.type == "cpu"
        self._arena = Arena() if on_cpu else None
        self._input_arena = Arena() if on_cpu else None  # for the inputs of recomputed layers
        self._blocks = Blocks(self._model, self._processor, self._dropout_ops, self.masks, self._arena)
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
        self.host_memory = self.host_memory or self._processor.host_memory(self._device)

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
        head, new = base_of(current_module(model.output)), model.new_rows()
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
        self._processor.lay_out(linears, self._head.weight.dtype)
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
            attention = layer.mixer if isinstance(layer.mixer, AttentionBlock) else None
            reused = shared_kv[attention.kind] if attention and attention.takes else None
            arguments = layer, hidden, context, batch.rows if i == last else None, reused
            self._gather(i)
            if i < self.checkpoint_layers and trains:
                with nullcontext() if self.host_memory is None else self.host_memory.keeping(last=i == last):
                    hidden, stored_kv = checkpoint(
                        self._compute_layer, *arguments, use_reentrant=False, preserve_rng_state=False,
                        context_fn=lambda: (nullcontext(), self._arena or nullcontext()),  # forward, recomputation
                    )  # fmt: skip
                if self._input_arena is not None and self.host_memory is None:
                    hidden = apply(Placed, hidden, self._input_arena)
            else:
                hidden, stored_kv = self._compute_layer(*arguments)
            if attention is not None and stored_kv is not None:
                shared_kv[attention.kind] = stored_kv
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
