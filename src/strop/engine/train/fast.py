"""The fast step, for models whose layers families.py knows.

FastLoss reads the weights and the adapters of a transformers + peft model and computes the loss itself. The model
stays whole: its optimizer, save, merge and generate go on with the same parameters. Base weights that share an input
are laid side by side once; the model's own weights become views of them, so that nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strop.engine.eligibility import unsupported, usual
from strop.engine.kernels.dispatch import ALL, USUAL, drops_for, processor_for
from strop.engine.kernels.protocols import Placed, apply
from strop.engine.layers import Layers
from strop.engine.train.arena import Arena
from strop.engine.train.blocks import Attended, Blocks, Layer, Way
from strop.engine.train.dropout import masks_of
from strop.engine.train.full_modules import used
from strop.engine.train.fused_linear import adapters_on, base_of, dropped_by
from strop.engine.train.head import LabelLogProbs, Output, SupervisedLoss
from strop.engine.train.norms import normed
from strop.engine.train.packing import Packed, by_owner, pack, pack_apart, pack_ends, sums_by_owner

if TYPE_CHECKING:
    from strop.data.types import Example


class Watch(Protocol):
    """Told of each micro-batch and each layer that is about to be computed; may raise (machine.memory.MemoryWatch)."""

    def begin(self) -> None: ...

    def __call__(self) -> None: ...


class Gathered(Protocol):
    """Has the weights of a decoder layer (by its number), of the `embedding` or of the `head` there from its call until
    others are asked for; modules: those that hold them."""

    modules: dict[int | str, nn.Module]

    def __call__(self, where: int | str) -> None: ...


class InHost(Protocol):
    """engine.card.offload.HostMemory."""

    def begin(self) -> None: ...

    def keeping(self, *, last: bool) -> Any: ...


def before_gradient(output: Tensor, act: Callable[[], None]) -> None:
    """Has `act` called before the gradient of what made this tensor is computed."""
    cast(Any, output).register_hook(lambda _: act())


class FastLoss:
    """The loss of a micro-batch through the fast step, for models that `unsupported` has no reason against.

    prefix_sharing: compute a prefix common to all examples once; not where a layer has a mixer of its own, which goes
    on from one token to the next. checkpoint_layers: this many layers, from the first, keep nothing but their input and
    are computed again in the backward. warm: have the loops compiled beforehand, in another process. integers: multiply
    frozen weights in 8-bit integers, on a CPU in fp32, without DoRA. Made after the model is on its device and in its
    type.
    """

    watch: Watch | None = None  # looked at before each layer
    gathered: Gathered | None = None  # where the weights are not always there
    host: InHost | None = None  # where the inputs of layers that are computed again wait, if not on the device

    def __init__(
        self,
        model: nn.Module,
        *,
        prefix_sharing: bool = True,
        checkpoint_layers: int = 0,
        warm: bool = True,
        integers: bool = False,
    ) -> None:
        reason = unsupported(model)
        assert reason is None, reason
        self._model, self.checkpoint_layers = Layers(model), checkpoint_layers
        self._family, self._head = self._model.family, self._model.head
        self.prefix_sharing = prefix_sharing and not self._family.mixer
        self._device: torch.device = self._head.weight.device
        self.masks = masks_of(model, drops_for)
        loops = (USUAL if usual(model) else ALL) if warm else ""
        self._processor = processor_for(self._device, self._head.weight.dtype, warm=loops, integers=integers)
        self._product = self._processor.head_product(self._head.weight)
        self._ops, self.lacking = self._processor.ops, self._processor.lacking
        self._drops = drops_for(self._head.weight)
        on_cpu = self._device.type == "cpu"
        self._arena = Arena() if on_cpu else None
        self._inputs = Arena() if on_cpu else None  # of layers that are computed again
        self._blocks = Blocks(self._model, self._processor, self._drops, self.masks, self._arena)
        self._norm = self._blocks.norm(self._model.norm)
        self.exchange(lambda: None)

    def exchange(self, replace: Callable[[], None]) -> None:
        """Lets go of the layers' weights, has them replaced in the model, and takes up those that are there then."""
        self._layers: list[Layer] = []
        replace()
        self._layers = self._blocks.layers()
        if self.on_card:  # weights that were laid side by side leave holes: 5.9 GB of an 8B model's in 16 bit
            torch.cuda.empty_cache()

    def release(self) -> None:
        """Gives back what is held from one micro-batch to the next; it comes again as it is needed."""
        for arena in (self._arena, self._inputs):
            if arena is not None:
                arena.drop()
        if self.host is not None:
            self.host.begin()

    @property
    def by_model(self) -> str:
        return self._family.model_parts

    @property
    def on_card(self) -> bool:
        return self._device.type == "cuda"

    def offload(self) -> None:
        """From here on all layers are computed again, and their inputs wait in the host's memory. On a card alone."""
        self.checkpoint_layers = len(self._layers)
        self.host = self.host or self._processor.host_memory(self._device)

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Sum over supervised tokens of weight * cross entropy: an fp32 scalar, differentiable in the adapters."""
        batch = pack(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        return apply(SupervisedLoss, self._hidden(batch), batch.labels, batch.weights, *self._output(batch))

    def log_probs(self, examples: Sequence[Example]) -> Tensor:
        """Sum over the supervised tokens of each example of weight * log-probability (N,), fp64, differentiable.

        Examples with one prompt share it, whatever other prompts there are.
        """
        found, batch = self._label_log_probs(examples)
        assert batch.owners is not None
        return sums_by_owner(found, batch.weights, batch.owners, len(examples))

    def token_log_probs(self, examples: Sequence[Example]) -> Tensor:
        """The log-probability of each supervised token, one example after the other (M,), fp32, differentiable."""
        found, batch = self._label_log_probs(examples)
        assert batch.owners is not None
        return found[by_owner(batch.owners)]

    def _label_log_probs(self, examples: Sequence[Example]) -> tuple[Tensor, Packed]:
        batch = pack_apart(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        return apply(LabelLogProbs, self._hidden(batch), batch.labels, *self._output(batch)), batch

    def last_hidden(self, examples: Sequence[Example]) -> Tensor:
        """What the model holds at the last token of each example, behind its last norm (N, h), differentiable."""
        return self._hidden(pack_ends(examples, prefix_sharing=self.prefix_sharing, device=self._device), scaled=False)

    def _output(self, batch: Packed) -> tuple[Any, ...]:
        """The output embedding as it is now, and what of it is trained."""
        model = self._model
        head, new = base_of(used(model.output)), model.new_rows()
        now, rows = adapters_on([model.output], [self._head]), batch.keys[batch.rows]
        output = Output(
            head.weight,
            model.softcap,
            self._ops,
            head.bias,
            None if new is None else new.rows,
            None if new is None else new.index(),
            tuple(now.parts),
            now.scales,
            dropped_by(now.dropouts, rows if len(batch.picked) == len(batch.rows) else rows[batch.picked]),
            self._drops,
            head.weight.requires_grad,
            head.bias is not None and head.bias.requires_grad,
            self._product,
        )
        return output, *(output.trained if torch.is_grad_enabled() else [])

    def _hidden(self, batch: Packed, *, scaled: bool = True) -> Tensor:
        """What the output embedding takes for each label (M, h); scaled: with the factor that some families have."""
        last, trains, again = len(self._layers) - 1, torch.is_grad_enabled(), self.checkpoint_layers > 0
        if self._arena is not None and self._inputs is not None:
            self._arena.begin(used=trains and not again)
            self._inputs.begin(used=trains and again and self.host is None)
        if self.watch is not None:
            self.watch.begin()
        linears = [one for layer in self._layers for one in layer.linears]
        self._processor.lay_out(linears, self._head.weight.dtype)
        self._need("embedding")
        hidden = self._model.embedded(batch.ids)
        if self._family.embedding_norm:
            hidden = normed(hidden, self._norm)
        self.masks.tokens = batch.keys
        way = Way(batch, self._model.angles(batch.positions), self._model.per_layer(batch.ids, hidden))
        if self.host is not None:
            self.host.begin()
        shared: dict[str, Tensor] = {}  # keys and values that later layers see too
        for i, layer in enumerate(self._layers):
            of = layer.mixer if isinstance(layer.mixer, Attended) else None
            given = layer, hidden, way, batch.rows if i == last else None, shared[of.kind] if of and of.takes else None
            self._need(i)
            if i < self.checkpoint_layers and trains:
                with nullcontext() if self.host is None else self.host.keeping(last=i == last):
                    hidden, kept = checkpoint(
                        self._through, *given, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts
                    )
                if self._inputs is not None and self.host is None:
                    hidden = apply(Placed, hidden, self._inputs)
            else:
                hidden, kept = self._through(*given)
            if of is not None and kept is not None:
                shared[of.kind] = kept
            if self.gathered is not None and hidden.requires_grad:
                before_gradient(hidden, partial(self._need, i))
        self._need("head")
        hidden = normed(hidden, self._norm)
        if scaled and self._model.logits_scale != 1:
            hidden = hidden * self._model.logits_scale
        if len(batch.picked) != len(batch.rows):  # a row behind which several examples part has several labels
            hidden = hidden[batch.picked]
        return hidden

    def _contexts(self) -> tuple[Any, Any]:
        """Of a layer that keeps nothing, and of the same when it is computed again."""
        return nullcontext(), self._arena or nullcontext()

    def _need(self, where: int | str) -> None:
        if self.gathered is not None:
            self.gathered(where)

    def _through(
        self, layer: Layer, hidden: Tensor, way: Way, rows: Tensor | None, taken: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.watch is not None:
            self.watch()
        return layer(hidden, way, rows, taken)
