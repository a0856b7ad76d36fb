"""The plain step, which calls the model's own forward. It supports all families and is the reference for FastLoss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from strop.engine.images import image_features
from strop.engine.kernels.dispatch import dropout_ops_for
from strop.engine.kernels.protocols import apply
from strop.engine.train.buffers import copy_to_device
from strop.engine.train.dropout import install_dropout, token_keys
from strop.engine.train.head import CrossEntropy, divergence, select_top_probs
from strop.engine.train.packing import mean_by_example, sum_by_example
from strop.errors import ModelError
from strop.models.families.layers import load_balancing_coefficient

if TYPE_CHECKING:
    from strop.data.types import Example


class LayerWatch(Protocol):
    """The interface of machine.memory.MemoryWatch.

    `begin` is called before each micro-batch, and the object itself before each layer. Both may raise.
    """

    def begin(self) -> None: ...

    def __call__(self) -> None: ...


class WeightGatherer(Protocol):
    """Makes weights that are sharded or streamed from disk available until others are requested.

    modules: the modules that hold the weights. The keys are the numbers of decoder layers, "embedding" and "head".
    """

    modules: dict[int | str, nn.Module]

    def __call__(self, key: int | str) -> None: ...


class PlainLoss:
    """The implementation of engine.step.Step with the model's own forward, on rows padded on the right.

    model: any causal language model of transformers, with or without adapters. why: the reason for not using FastLoss.
    dtype: compute in it with autocast, if it is not that of the weights.
    """

    name = "plain"
    packed = False
    prefix_sharing = False
    gpu_failures = ""
    can_offload = False
    soft_loss: Tensor

    def __init__(self, model: Any, why: str = "", dtype: torch.dtype | None = None) -> None:
        self.model, self.why, self._dtype = model, why, dtype
        self.masks = install_dropout(model, dropout_ops_for)
        self._head: nn.Module = model.get_output_embeddings()
        if dtype == next(self._head.parameters()).dtype:
            self._dtype = None
        self._images = image_features(model)
        self._balance = load_balancing_coefficient(model.config)

    def token_loss(self, examples: Sequence[Example]) -> Tensor:
        losses, weights, rows, balance = self._supervised_losses(examples)
        total = (losses * weights).sum()
        self.soft_loss = total.new_zeros(())
        if any(example.soft is not None for example in examples):
            is_soft = np.array([example.soft is not None for example in examples], np.float32)
            [kept] = copy_to_device([is_soft], rows.device)
            self.soft_loss = (losses * weights * kept[rows]).detach().sum()
        return total if balance is None else total + balance * weights.sum()  # balance is for a mean, total is a sum

    def log_probs(self, examples: Sequence[Example]) -> Tensor:
        losses, weights, rows, _ = self._supervised_losses(examples)
        return sum_by_example(-losses, weights, rows, len(examples))

    def token_log_probs(self, examples: Sequence[Example]) -> Tensor:
        return -self._supervised_losses(examples)[0]

    def last_hidden(self, examples: Sequence[Example]) -> Tensor:
        """Return the input of the output head at the last token of each example (N, h), differentiable."""
        rows, columns = np.arange(len(examples)), np.array([len(example) - 1 for example in examples])
        return self._pick_hidden(examples, rows, columns)

    def mean_hidden(self, examples: Sequence[Example]) -> Tensor:
        """Return the mean input of the output head over the tokens of each example (N, h), fp32, differentiable."""
        rows = np.repeat(np.arange(len(examples)), [len(example) for example in examples])
        hidden = self._pick_hidden(examples, rows, np.concatenate([np.arange(len(example)) for example in examples]))
        return mean_by_example(hidden, torch.from_numpy(rows).to(hidden.device), len(examples))

    def _pick_hidden(
        self, examples: Sequence[Example], rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
    ) -> Tensor:
        """Return the input of the output head at these positions (M, h). rows, columns: (M,), of the padded batch."""
        picked: list[Tensor] = []

        def pick(hidden: Tensor) -> Tensor:
            picked.append(hidden[tuple(torch.from_numpy(index).to(hidden.device) for index in (rows, columns))])
            return picked[0][:1].detach()  # no logits are needed, but a model always computes some

        self._forward(_PaddedBatch.of(examples), pick)
        return picked[0]

    @torch.no_grad()
    def top_probs(self, examples: Sequence[Example], k: int, temperature: float) -> tuple[Tensor, Tensor]:
        padded = _PaddedBatch.of(examples)
        rows, columns = padded.weights.nonzero()
        logits = self._forward(padded, lambda hidden: hidden[rows, columns - 1]).logits.float()
        labels = torch.from_numpy(padded.ids[rows, columns]).long().to(logits.device)
        return select_top_probs(logits, labels, k, temperature)

    def checkpoint(self, layers: int | None = None) -> None:
        """Recompute all layers in the backward. transformers does not support this for some of them only."""
        names = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # transformers from 5.24 on, before
        enable = next(getattr(self.model, name) for name in names if hasattr(self.model, name))
        enable({"use_reentrant": False})

    def offload(self) -> None:  # not called, because can_offload is False
        raise NotImplementedError("the plain step keeps its activations on the device")

    def replace_weights(self, replace: Callable[[], None]) -> None:
        replace()

    def release_buffers(self) -> None:
        pass  # there are none

    def set_memory_watch(self, watch: LayerWatch) -> None:
        """Call `watch` before each decoder layer, with hooks. The layers are the longest list of modules."""
        lists: list[nn.ModuleList] = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        for i, layer in enumerate(sorted(lists, key=len)[-1]):
            layer.register_forward_pre_hook(lambda *_, i=i: watch() if i else watch.begin())

    def set_weight_gatherer(self, gather: WeightGatherer) -> None:
        for key, module in gather.modules.items():
            module.register_forward_pre_hook(lambda *_, key=key: gather(key))
            module.register_forward_hook(lambda _, __, output, key=key: _gather_for_backward(output, gather, key))

    def _supervised_losses(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the cross entropy, weight and example of each supervised token, and the load-balancing loss.

        The load-balancing loss of a mixture of experts is None if the config disables it.
        """
        padded, device = _PaddedBatch.of(examples), next(self._head.parameters()).device
        indices = padded.weights.nonzero()
        arrays = [padded.ids[indices], padded.weights[indices], indices[0], indices[1] - 1]
        labels, weights, rows, predicting = copy_to_device(arrays, device)
        output = self._forward(padded, lambda hidden: hidden[rows, predicting], (rows, predicting))
        losses = apply(CrossEntropy, output.logits, labels)
        losses = _with_soft_labels(losses, output.logits, labels, examples, indices)
        uses_balance = self._balance and self.model.training
        return losses, weights, rows, self._balance * output.aux_loss.to(device) if uses_balance else None

    def _forward(
        self, padded: _PaddedBatch, pick: Callable[[Tensor], Tensor], positions: tuple[Tensor, Tensor] | None = None
    ) -> Any:
        """Return the model's output, with logits only for the positions that `pick` selects.

        A hook on the output head replaces its input (B, S, h) with the result of `pick`. This avoids logits for
        padding, prompts and other unsupervised tokens. positions: the rows and columns that `pick` selects, for the
        dropout of an adapter on the output head.
        """
        device = next(self._head.parameters()).device
        ids, attended, keys = copy_to_device([padded.ids, padded.attended, padded.keys], device)
        self.masks.token_keys = keys

        def pick_inputs(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
            if inputs[0].shape[:2] != padded.ids.shape:
                what = f"{self.model.config.model_type}: the input of its output head does not have one row per token"
                raise ModelError(what, fix="use a decoder-only language model")
            self.masks.token_keys = keys if positions is None else keys[positions]
            return (pick(inputs[0]), *inputs[1:])

        def restore_keys(*_: Any) -> None:  # a layer may be recomputed in the backward
            self.masks.token_keys = keys

        computing = torch.autocast(device.type, self._dtype) if self._dtype is not None else nullcontext()
        hooks = self._head.register_forward_pre_hook(pick_inputs), self._head.register_forward_hook(restore_keys)
        with hooks[0], hooks[1], computing:
            images = {} if self._images is None else self._images.arguments(ids)
            return self.model(input_ids=ids, attention_mask=attended, use_cache=False, return_dict=True, **images)


def _with_soft_labels(
    losses: Tensor, logits: Tensor, labels: Tensor, examples: Sequence[Example], indices: tuple[Any, ...]
) -> Tensor:
    """Return the losses (M,), with those of soft labels for the examples that have them. indices: as of the labels."""
    chosen = [(label, example, token) for label, (example, token) in enumerate(zip(*indices, strict=True))
              if examples[example].soft is not None]  # fmt: skip
    if not chosen:
        return losses
    soft = [(examples[example].soft, token) for _, example, token in chosen]
    arrays = [np.stack([getattr(x, name)[token] for x, token in soft]) for name in ("ids", "probs")]
    ids, probs, rows = copy_to_device(
        [arrays[0].astype(np.int64), arrays[1], np.array([label for label, _, _ in chosen])], losses.device
    )
    ((share, temperature),) = {(x.weight, x.temperature) for x, _ in soft if x is not None}
    picked, hard = logits[rows].to(losses.dtype), losses[rows]
    if temperature == 1:  # the cross entropy is log_sum minus the logit
        log_sum = hard + picked.gather(1, labels[rows, None]).squeeze(1)
    else:
        log_sum = (picked / temperature).logsumexp(1)
    divergences = temperature**2 * divergence(probs, picked.gather(1, ids) / temperature - log_sum[:, None])
    return losses.index_add(0, rows, share * (divergences - hard))


def call_before_gradient(output: Tensor, function: Callable[[], None]) -> None:
    """Call `function` in the backward, before the operation that computed this tensor."""
    cast(Any, output).register_hook(lambda _: function())


def _gather_for_backward(output: Any, gather: WeightGatherer, key: int | str) -> None:
    tensor = output[0] if isinstance(output, tuple) else output
    if key != "embedding" and tensor.requires_grad:
        call_before_gradient(tensor, lambda: gather(key))


@dataclass(frozen=True)
class _PaddedBatch:
    """Examples padded on the right to one length. Arrays are (B, S). keys: the result of dropout.token_keys."""

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    attended: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]

    @staticmethod
    def of(examples: Sequence[Example]) -> _PaddedBatch:
        shape = len(examples), max(len(example) for example in examples)
        ids, attended, keys = (np.zeros(shape, np.int64) for _ in range(3))
        weights = np.zeros(shape, np.float32)
        for i, example in enumerate(examples):
            ids[i, : len(example)] = example.ids
            weights[i, : len(example)] = example.weights
            attended[i, : len(example)] = 1
            keys[i, : len(example)] = token_keys(example.ids)
        return _PaddedBatch(ids, weights, attended, keys)
