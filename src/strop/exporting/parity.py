"""Whether two models are the same: their next-token distributions, position by position, on the same rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strop.data.conversation import Example
from strop.errors import ParityError

POSITIONS = 2048  # compared, or as many as there are


@dataclass(frozen=True)
class Limit:
    """kl_mean: nats, at most; top1_agreement: share of positions, at least."""

    kl_mean: float
    top1_agreement: float


# bf16: where a text has several good next words, rounding decides between some: 99.35 % agreed on chat rows, at a mean
# KL of 7e-5 (docs/log).
LIMITS = {"fp32": Limit(1e-6, 0.995), "bf16": Limit(1e-3, 0.99), "fp16": Limit(1e-3, 0.995)}


@dataclass(frozen=True)
class Parity:
    """kl_mean, kl_max: KL(reference || other) in nats. loss_difference: of the supervised tokens, other - reference."""

    positions: int
    kl_mean: float
    kl_max: float
    top1_agreement: float
    loss_difference: float
    limit: Limit

    @property
    def passed(self) -> bool:
        """Also false where anything is NaN."""
        return self.kl_mean <= self.limit.kl_mean and self.top1_agreement >= self.limit.top1_agreement

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def check(self, what: str) -> None:
        """Raises ParityError beyond the limit."""
        if not self.passed:
            raise ParityError(
                f"{what}: not the same model: mean KL {self.kl_mean:.2g} (limit {self.limit.kl_mean:.2g}), "
                f"top-1 agreement {self.top1_agreement:.2%} (limit {self.limit.top1_agreement:.2%})",
                fix="nothing was kept; please report it with the base's name",
            )


def compare(
    reference: Callable[[], Any], other: Callable[[], Any], examples: Sequence[Example], limit: Limit
) -> Parity:
    """Both models, loaded one after the other, on the first POSITIONS positions of the rows.

    reference, other: each loads a transformers model that computes in fp32, or something with `log_probabilities`; only
    one is in memory at a time, the reference's distributions wait in a file. Each context counts once for KL and
    agreement (what rows begin with alike is one text, not many), supervised positions for the loss.
    """
    with measuring(reference, examples) as measure:
        return measure(other, limit)


@contextmanager
def measuring(
    reference: Callable[[], Any], examples: Sequence[Example]
) -> Iterator[Callable[[Callable[[], Any], Limit], Parity]]:
    """Inside the block, what is given measures any number of models against one reference, as `compare` does."""
    examples = enough(examples)
    starts = new_from(examples)
    total = sum(len(example) - 1 - start for example, start in zip(examples, starts, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        kept: Any = None
        loss, at = 0.0, 0
        model = reference()
        for example, start in zip(examples, starts, strict=True):
            logs = _log_probabilities(model, example)
            loss += _loss(logs, example)
            if kept is None:
                kept = np.memmap(Path(folder) / "kept", np.float32, "w+", shape=(total, logs.shape[1]))
            kept[at : at + len(logs) - start] = logs[start:].numpy()
            at += len(logs) - start
        del model

        def measure(other: Callable[[], Any], limit: Limit) -> Parity:
            model = other()
            divergences, same, other_loss, at = [], 0, 0.0, 0
            for example, start in zip(examples, starts, strict=True):
                logs = _log_probabilities(model, example)
                other_loss += _loss(logs, example)
                logs = logs[start:]
                wanted = torch.from_numpy(np.array(kept[at : at + len(logs)]))
                divergences.append((wanted.exp() * (wanted - logs)).sum(1))
                same += int((wanted.argmax(1) == logs.argmax(1)).sum())
                at += len(logs)
            kl = torch.cat(divergences).clamp(min=0)  # below zero by rounding alone; NaN stays
            weight = sum(float(example.weights[1:].sum()) for example in examples)
            difference = (other_loss - loss) / weight
            return Parity(total, float(kl.mean()), float(kl.max()), same / total, difference, limit)

        yield measure


def in_fp32(model: Any) -> Any:
    """The model, computing in fp32 on linear weights that stay in their own type: each is cast for its product."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype != torch.float32:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
    cast = {id(module.weight) for module in model.modules() if type(module) is nn.Linear}
    embedding = model.get_input_embeddings().weight  # in fp32 even where the head shares it
    for parameter in model.parameters():
        if parameter.is_floating_point() and (id(parameter) not in cast or parameter is embedding):
            parameter.data = parameter.data.float()
    return model


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.float()
    return F.linear(x, module.weight.float(), bias)


def enough(examples: Sequence[Example]) -> list[Example]:
    """The first rows that hold POSITIONS positions with contexts of their own, or all."""
    found, total, seen = list[Example](), 0, set[bytes]()
    for example in (examples[row] for row in range(len(examples))):
        found.append(example)
        total += len(example) - 1 - _new_from(example, seen)
        if total >= POSITIONS:
            break
    assert total, "parity needs rows"
    return found


def new_from(examples: Sequence[Example]) -> list[int]:
    """Of each row, the first position whose context no row before it has."""
    seen: set[bytes] = set()
    return [_new_from(example, seen) for example in examples]


def _new_from(example: Example, seen: set[bytes]) -> int:
    contexts = [example.ids[: end + 1].tobytes() for end in range(len(example) - 1)]
    known = sum(context in seen for context in contexts)  # a context is known only where those within it are
    seen.update(contexts)
    return known


def _log_probabilities(model: Any, example: Example) -> Tensor:
    """(positions - 1, vocabulary) in fp32: what is predicted for each token but the first."""
    if hasattr(model, "log_probabilities"):
        found: Tensor = model.log_probabilities(example)
        return found
    ids = torch.from_numpy(example.ids.astype(np.int64))[None].to(next(model.parameters()).device)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return F.log_softmax(logits, -1).cpu()


def _loss(logs: Tensor, example: Example) -> float:
    labels = torch.from_numpy(example.ids[1:].astype(np.int64))
    weights = torch.from_numpy(example.weights[1:].copy())
    return float(-(logs.gather(1, labels[:, None])[:, 0] * weights).sum())
