"""The step as the model itself computes it: for every family, and the reference the fast step is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from strop.engine.kernels.dispatch import dropout_ops_for
from strop.engine.kernels.protocols import apply
from strop.engine.train.dropout import masks_of, token_keys
from strop.engine.train.head import CrossEntropy
from strop.engine.train.packing import sums_by_owner
from strop.engine.train.transfer import sent
from strop.errors import ModelError
from strop.models.families.layers import load_balancing

if TYPE_CHECKING:
    from strop.data.types import Example


class PlainLoss:
    """Loss of a micro-batch through the model's own forward, on rows padded at their right.

    model: any causal language model of transformers, with or without adapters. Whatever the architecture does
    behind its output embedding (scaling, soft-capping) stays in place.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.masks = masks_of(model, dropout_ops_for)
        self._head: torch.nn.Module = cast(Any, model).get_output_embeddings()
        self._balance = load_balancing(cast(Any, model).config)

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Sum over supervised tokens of weight * cross entropy: an fp32 scalar, differentiable."""
        losses, weight, _, balance = self._supervised(examples)
        total = (losses * weight).sum()
        return total if balance is None else total + balance * weight.sum()  # a mean, as the loss is a sum

    def log_probs(self, examples: Sequence[Example]) -> Tensor:
        """Sum over the supervised tokens of each example of weight * log-probability (N,), fp64, differentiable."""
        losses, weight, owners, _ = self._supervised(examples)
        return sums_by_owner(-losses, weight, owners, len(examples))

    def token_log_probs(self, examples: Sequence[Example]) -> Tensor:
        """The log-probability of each supervised token, one example after the other (M,), fp32, differentiable."""
        return -self._supervised(examples)[0]

    def last_hidden(self, examples: Sequence[Example]) -> Tensor:
        """What the model holds at the last token of each example, as its output embedding takes it (N, h)."""
        found: list[Tensor] = []

        def last(hidden: Tensor) -> Tensor:
            ends = torch.tensor([len(example) - 1 for example in examples], device=hidden.device)
            found.append(hidden[torch.arange(len(examples), device=hidden.device), ends])
            return found[0][:1].detach()  # no logits are wanted, and a model makes some

        self._forward(_Padded.of(examples), last)
        return found[0]

    def _supervised(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(cross entropy, weight, row) of each supervised token, and what a mixture adds to a mean loss to keep its
        experts evenly used, where its config asks for it."""
        padded, device = _Padded.of(examples), next(self._head.parameters()).device
        row, column = padded.weights.nonzero(as_tuple=True)
        labels, weight = padded.ids[row, column], padded.weights[row, column]
        before = column - 1  # the position that predicts each label
        labels, weight, row, before = sent([labels.numpy(), weight.numpy(), row.numpy(), before.numpy()], device)
        found = self._forward(padded, lambda hidden: hidden[row, before], (row, before))
        losses = apply(CrossEntropy, found.logits, labels)
        balanced = self._balance and self.model.training
        return losses, weight, row, self._balance * found.aux_loss.to(device) if balanced else None

    def _forward(
        self, padded: _Padded, pick: Callable[[Tensor], Tensor], at: tuple[Tensor, Tensor] | None = None
    ) -> Any:
        """The model's own output, with logits of what `pick` takes of the last hidden states (B, S, h) alone. at: which
        of (B, S) these are, so that dropout in front of an adapter on the output embedding knows them."""
        device = next(self._head.parameters()).device
        sides = [padded.ids.numpy(), padded.attended.numpy(), padded.keys.numpy()]
        ids, attended, keys = sent(sides, device)
        self.masks.tokens = keys

        def picked_only(_: torch.nn.Module, inputs: tuple[Any, ...]) -> Any:
            if inputs[0].shape[:2] != padded.ids.shape:
                kind = cast(Any, self.model).config.model_type
                what = f"{kind}: its output head does not take one position a token"
                raise ModelError(what, fix="use a decoder-only language model")
            self.masks.tokens = keys if at is None else keys[at]
            return (pick(inputs[0]), *inputs[1:])

        def whole_again(*_: Any) -> None:  # a layer may be computed again in the backward
            self.masks.tokens = keys

        # A hook on the output embedding, so that no logits are made for padding, prompts and other unsupervised tokens.
        with self._head.register_forward_pre_hook(picked_only), self._head.register_forward_hook(whole_again):
            return self.model(
                input_ids=ids,
                attention_mask=attended,
                use_cache=False,
                return_dict=True,
            )


@dataclass(frozen=True)
class _Padded:
    """Examples as rows of one length, padded at their right: all (B, S)."""

    ids: Tensor
    weights: Tensor
    attended: Tensor
    keys: Tensor

    @staticmethod
    def of(examples: Sequence[Example]) -> _Padded:
        shape = len(examples), max(len(example) for example in examples)
        ids, attended = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        weights, keys = torch.zeros(shape), np.zeros(shape, dtype=np.int64)
        for i, example in enumerate(examples):
            ids[i, : len(example)] = torch.from_numpy(example.ids)
            weights[i, : len(example)] = torch.from_numpy(example.weights)
            attended[i, : len(example)] = 1
            keys[i, : len(example)] = token_keys(example.ids)
        return _Padded(ids, weights, attended, torch.from_numpy(keys))
