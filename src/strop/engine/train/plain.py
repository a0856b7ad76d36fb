"""The plain step: the model's own forward. Works for every family and is the reference for the fast step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from strop.engine.kernels.dispatch import dropout_ops_for
from strop.engine.kernels.protocols import apply
from strop.engine.train.buffers import copy_to_device
from strop.engine.train.dropout import install_dropout, token_keys
from strop.engine.train.head import CrossEntropy
from strop.engine.train.packing import sum_by_example
from strop.errors import ModelError
from strop.models.families.layers import load_balancing

if TYPE_CHECKING:
    from strop.data.types import Example


class LayerWatch(Protocol):
    """Called before each micro-batch (`begin`) and each layer; may raise (machine.memory.MemoryWatch)."""

    def begin(self) -> None: ...

    def __call__(self) -> None: ...


class WeightGatherer(Protocol):
    """Makes sharded weights available: those of a decoder layer (its number), of the `embedding` or of the `head`.

    The weights are available until others are requested. modules: the modules that hold them.
    """

    modules: dict[int | str, nn.Module]

    def __call__(self, key: int | str) -> None: ...


class PlainLoss:
    """The step (see engine.step.Step) through the model's own forward, on rows padded on the right.

    model: any causal language model of transformers, with or without adapters. Whatever the architecture does after its
    output head (scaling, soft-capping) is kept. why: the reason for not using the fast step.
    """

    name = "plain"
    packed = False
    prefix_sharing = False
    why_no_triton = ""
    can_offload = False

    def __init__(self, model: Any, why: str = "") -> None:
        self.model, self.why = model, why
        self.masks = install_dropout(model, dropout_ops_for)
        self._head: nn.Module = model.get_output_embeddings()
        self._balance = load_balancing(model.config)

    def token_loss(self, examples: Sequence[Example]) -> Tensor:
        losses, weights, _, balance = self._supervised(examples)
        total = (losses * weights).sum()
        return total if balance is None else total + balance * weights.sum()  # a mean, whereas the loss is a sum

    def log_probs(self, examples: Sequence[Example]) -> Tensor:
        losses, weights, rows, _ = self._supervised(examples)
        return sum_by_example(-losses, weights, rows, len(examples))

    def token_log_probs(self, examples: Sequence[Example]) -> Tensor:
        return -self._supervised(examples)[0]

    def last_hidden(self, examples: Sequence[Example]) -> Tensor:
        """Return the input of the output head at the last token of each example (N, h), differentiable."""
        picked: list[Tensor] = []

        def pick_last(hidden: Tensor) -> Tensor:
            ends = torch.tensor([len(example) - 1 for example in examples], device=hidden.device)
            picked.append(hidden[torch.arange(len(examples), device=hidden.device), ends])
            return picked[0][:1].detach()  # no logits are needed, but a model always computes some

        self._forward(_PaddedBatch.of(examples), pick_last)
        return picked[0]

    def checkpoint(self, layers: int | None = None) -> None:
        """Recompute all layers in the backward: transformers cannot do this for some."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def offload(self) -> None:
        raise NotImplementedError("the plain step keeps its activations on the device")

    def replace_weights(self, replace: Callable[[], None]) -> None:
        replace()

    def release_buffers(self) -> None:
        pass  # none are kept between micro-batches

    def set_memory_watch(self, watch: LayerWatch) -> None:
        """Call `watch` before each decoder layer (the longest list of modules), with hooks."""
        lists: list[nn.ModuleList] = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        for number, layer in enumerate(sorted(lists, key=len)[-1]):
            layer.register_forward_pre_hook(lambda *_, number=number: watch() if number else watch.begin())

    def set_weight_gatherer(self, gather: WeightGatherer) -> None:
        for where, module in gather.modules.items():
            module.register_forward_pre_hook(lambda *_, where=where: gather(where))
            module.register_forward_hook(lambda _, __, output, where=where: _gather_again(output, gather, where))

    def _supervised(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the cross entropy, weight and row of each supervised token, and the experts' balancing loss.

        The last is None unless the config requests such a loss. It belongs to a mean loss.
        """
        padded, device = _PaddedBatch.of(examples), next(self._head.parameters()).device
        rows, columns = padded.weights.nonzero(as_tuple=True)
        before = columns - 1  # the position that predicts each label
        arrays = [padded.ids[rows, columns], padded.weights[rows, columns], rows, before]
        labels, weights, rows, before = copy_to_device([array.numpy() for array in arrays], device)
        output = self._forward(padded, lambda hidden: hidden[rows, before], (rows, before))
        losses = apply(CrossEntropy, output.logits, labels)
        balanced = self._balance and self.model.training
        return losses, weights, rows, self._balance * output.aux_loss.to(device) if balanced else None

    def _forward(
        self, padded: _PaddedBatch, pick: Callable[[Tensor], Tensor], at: tuple[Tensor, Tensor] | None = None
    ) -> Any:
        """Return the model's output with logits only for what `pick` takes of the last hidden states (B, S, h).

        at: the rows and columns that it takes, for the dropout of an adapter on the output head.
        """
        device = next(self._head.parameters()).device
        ids, attended, keys = copy_to_device([padded.ids.numpy(), padded.attended.numpy(), padded.keys.numpy()], device)
        self.masks.tokens = keys

        def pick_inputs(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
            if inputs[0].shape[:2] != padded.ids.shape:
                what = f"{self.model.config.model_type}: its output head does not take one position a token"
                raise ModelError(what, fix="use a decoder-only language model")
            self.masks.tokens = keys if at is None else keys[at]
            return (pick(inputs[0]), *inputs[1:])

        def restore_keys(*_: Any) -> None:  # a layer may be recomputed in the backward
            self.masks.tokens = keys

        # A hook on the output head avoids logits for padding, prompts and other unsupervised tokens.
        with self._head.register_forward_pre_hook(pick_inputs), self._head.register_forward_hook(restore_keys):
            return self.model(input_ids=ids, attention_mask=attended, use_cache=False, return_dict=True)


def call_before_gradient(output: Tensor, function: Callable[[], None]) -> None:
    """Call `function` before the gradient of the operation that computed this tensor."""
    cast(Any, output).register_hook(lambda _: function())


def _gather_again(output: Any, gather: WeightGatherer, where: int | str) -> None:
    tensor = output[0] if isinstance(output, tuple) else output
    if where != "embedding" and tensor.requires_grad:
        call_before_gradient(tensor, lambda: gather(where))


@dataclass(frozen=True)
class _PaddedBatch:
    """Examples padded on the right to one length. All tensors are (B, S); keys as dropout.token_keys returns them."""

    ids: Tensor
    weights: Tensor
    attended: Tensor
    keys: Tensor

    @staticmethod
    def of(examples: Sequence[Example]) -> _PaddedBatch:
        shape = len(examples), max(len(example) for example in examples)
        ids, attended = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        weights, keys = torch.zeros(shape), np.zeros(shape, dtype=np.int64)
        for i, example in enumerate(examples):
            ids[i, : len(example)] = torch.from_numpy(example.ids)
            weights[i, : len(example)] = torch.from_numpy(example.weights)
            attended[i, : len(example)] = 1
            keys[i, : len(example)] = token_keys(example.ids)
        return _PaddedBatch(ids, weights, attended, torch.from_numpy(keys))
