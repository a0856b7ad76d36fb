"""Whether two models are the same: their next-token distributions, position by position, on the same rows."""

from __future__ import annotations

import gc
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strop.data.types import Example
from strop.errors import ParityError
from strop.evaluation.metrics import Z_95, wilson
from strop.machine.malloc import give_back
from strop.models.biases import without_adapter
from strop.planning.memory import POSITIONS

LOG = logging.getLogger(__name__)
MEASURING = "measuring, row by row"
AT_ONCE_BYTES = 4 << 20  # of log-probabilities that something is computed of


@dataclass(frozen=True)
class Limit:
    """kl_mean: nats, at most. agreement: share of positions without a clear flip, at least."""

    kl_mean: float
    agreement: float

    @property
    def tie(self) -> float:
        """How far apart in probability two words may be that rounding alone may swap.

        Models whose distributions p and q have KL(p || q) = k differ by sum |p - q| <= sqrt(2 k) (Pinsker's inequality;
        Tsybakov, Introduction to Nonparametric Estimation, 2009, lemma 2.5). q prefers another word than p does only
        where p's two words are no further apart than that. k: what the type may cost at a position, on average.
        """
        return math.sqrt(2 * self.kl_mean)


# Measured on right merges of SmolLM2-135M (docs/log): fp32 8e-10 to 4e-8, bf16 6e-5 to 1.4e-4, fp16 5e-7 to 4e-6. One
# layer of thirty left out costs 1.2e-3 and more. Of 206 tiny random models three lie above the limit of bf16.
LIMITS = {"fp32": Limit(1e-6, 0.995), "bf16": Limit(5e-4, 0.995), "fp16": Limit(5e-5, 0.995)}
EFFECT = 0.02  # what may be missing of the adapter's effect, or too much; with 10 % of alpha too much it is 0.07
FEW = 1000  # positions of which a single one may take a mean beyond its limit
SURE = 3.0  # standard errors that a figure must lie beyond its limit
FAINT = 5.0  # an effect below this many times the KL limit is not judged: rounding could look like a part of it


@dataclass(frozen=True)
class Share:
    """A share with its interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Parity:
    """How far another model is from a reference.

    kl_mean, kl_max: KL(reference || other) in nats. top1_agreement: positions with the same likeliest word. agreement:
    positions without a clear flip, which is another likeliest word where the reference's two words are no near tie
    (Limit.tie). loss_difference: of the supervised tokens, other - reference; loss_error: its standard error. effect:
    how much of what the adapter does to its base arrives, 1 being all; None where the reference has no adapter, or one
    that does too little to tell.
    """

    positions: int
    kl_mean: float
    kl_max: float
    top1_agreement: float
    loss_difference: float
    loss_error: float
    limit: Limit
    clear_flips: int
    agreement: Share
    effect: Share | None

    @property
    def faults(self) -> list[str]:
        """What is beyond its limit; NaN is."""
        limit, found = self.limit, []
        if not self.kl_mean <= limit.kl_mean:
            found.append(f"mean KL {self.kl_mean:.2g} (limit {limit.kl_mean:.2g})")
        if not self.agreement.high >= limit.agreement:
            found.append(
                f"{self.clear_flips} clear flips in {self.positions} positions, agreement {self.agreement.value:.2%} "
                f"(limit {limit.agreement:.2%})"
            )
        if not abs(self.loss_difference) <= limit.tie + SURE * self.loss_error:
            found.append(f"loss {self.loss_difference:+.2g} (limit {limit.tie:.2g})")
        if self.effect is not None:
            off, error = abs(self.effect.value - 1), (self.effect.high - self.effect.low) / (2 * Z_95)
            if not off <= EFFECT + SURE * error:
                found.append(f"{self.effect.value:.1%} of the adapter's effect (limit {EFFECT:.0%} off)")
        return found

    @property
    def passed(self) -> bool:
        return not self.faults

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def check(self, what: str) -> None:
        """Raises ParityError beyond the limit."""
        if self.faults:
            fix = "please report it with the base's name"
            if self.positions < FEW:  # one of them may make the mean
                fix = (
                    f"{self.positions} positions are few: measure on more rows (--data FILE); if that fails too, {fix}"
                )
            raise ParityError(f"{what}: not the same model: {'; '.join(self.faults)}", fix=f"nothing was kept; {fix}")


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
    sizes = [len(example) - 1 - start for example, start in zip(examples, starts, strict=True)]
    ends = list(accumulate(sizes))
    with tempfile.TemporaryDirectory() as folder:
        model = reference()
        LOG.info(MEASURING)
        kept = _Kept(Path(folder) / "kept")
        losses = []
        for example, start in zip(examples, starts, strict=True):
            logs = _log_probabilities(model, example)
            losses.append(_loss(logs, example))
            kept.add(logs[start:])
        changed = _keep_effect(model, examples, starts, ends, kept, Path(folder) / "changed")
        del model, logs
        freed()

        def measure(other: Callable[[], Any], limit: Limit) -> Parity:
            model = other()
            LOG.info(MEASURING)
            divergences, apart, clear, others, effects = [], 0, 0, [], []
            for example, start, size, end in zip(examples, starts, sizes, ends, strict=True):
                logs = _log_probabilities(model, example)
                others.append(_loss(logs, example))
                along = np.zeros(2)
                for at, part in _parts(logs[start:]):
                    wanted = kept.rows(end - size + at, len(part))
                    divergences.append((wanted.exp() * (wanted - part)).sum(1))
                    first, second = wanted.argmax(1, keepdim=True), part.argmax(1, keepdim=True)
                    margins = (wanted.gather(1, first).exp() - wanted.gather(1, second).exp())[:, 0]
                    flipped = (first != second)[:, 0]
                    apart += int(flipped.sum())
                    clear += int((flipped & (margins > limit.tie)).sum())
                    if changed is not None:
                        along += _along(wanted, part, changed.rows(end - size + at, len(part)))
                effects += [(float(along[0]), float(along[1]))] if changed is not None else []
            kl = torch.cat(divergences).clamp(min=0)  # below zero by rounding alone; NaN stays
            weights = np.array([float(example.weights[1:].sum()) for example in examples])
            further, further_error = _ratio(np.array(others) - np.array(losses), weights)
            total = ends[-1]
            agreement = Share(1 - clear / total, *wilson(total - clear, total))
            return Parity(
                total, float(kl.mean()), float(kl.max()), 1 - apart / total, further, further_error, limit,
                clear, agreement, _share(effects, 2 * FAINT * limit.kl_mean * total),
            )  # fmt: skip

        yield measure


def freed() -> None:
    """Gives back what a model held that nobody names any more. Its modules and their forwards name each other, so that
    it would stay until Python looks for such circles: two models in memory in place of one."""
    gc.collect()
    give_back()


class _Kept:
    """Log-probabilities (positions, vocabulary) in a file. Not mapped: pages of a mapped file count as memory of the
    process, and of 2,048 positions over 49,152 words they are 384 MiB."""

    def __init__(self, file: Path) -> None:
        self._file, self._width = file, 0

    def add(self, logs: Tensor) -> None:
        self._width = logs.shape[1]
        with self._file.open("ab") as handle:
            for _, part in _parts(logs):
                part.numpy().tofile(handle)

    def rows(self, begin: int, count: int) -> Tensor:
        offset = 4 * begin * self._width
        found = np.fromfile(self._file, np.float32, count * self._width, offset=offset)
        return torch.from_numpy(found).view(count, self._width)


def _parts(logs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A few positions at a time, and where they begin: what is computed of them takes several times their memory."""
    rows = max(1, AT_ONCE_BYTES // (4 * logs.shape[1]))
    return ((at, logs[at : at + rows]) for at in range(0, len(logs), rows))


def _keep_effect(
    model: Any, examples: Sequence[Example], starts: Sequence[int], ends: Sequence[int], tuned: _Kept, file: Path
) -> _Kept | None:
    """What the adapter does to its base's log-probabilities, in a file; None without an adapter."""
    if not isinstance(model, peft.PeftModel):
        return None
    changed = _Kept(file)
    with without_adapter(model):
        for example, start, end in zip(examples, starts, ends, strict=True):
            base = _log_probabilities(model, example)[start:]
            for at, part in _parts(base):
                part.copy_(tuned.rows(end - len(base) + at, len(part)) - part)
            changed.add(base)
    return changed


def _along(wanted: Tensor, logs: Tensor, changed: Tensor) -> tuple[float, float]:
    """(of other - reference along the adapter's effect, of the effect along itself), summed over a row's positions, in
    the metric in which half of a square is a small change's KL (Fisher's, at the reference)."""
    p = wanted.exp()
    changed = changed - (p * changed).sum(1, keepdim=True)
    return float((p * (logs - wanted) * changed).sum()), float((p * changed.square()).sum())


def _share(effects: Sequence[tuple[float, float]], least: float) -> Share | None:
    """1 + the slope of what differs on the effect. least: None where the effect's squares sum up to no more."""
    if sum(whole for _, whole in effects) <= least:
        return None
    slope, error = _ratio(*np.array(effects).T)
    return Share(1 + slope, 1 + slope - Z_95 * error, 1 + slope + Z_95 * error)


def _ratio(parts: Any, wholes: Any) -> tuple[float, float]:
    """(sum of parts / sum of wholes, its standard error) from the rows, whose positions are not independent."""
    ratio = float(parts.sum() / wholes.sum())
    return ratio, float(math.sqrt(((parts - ratio * wholes) ** 2).sum()) / wholes.sum())


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
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1].float().cpu()
    return normalized(logits)


def normalized(logits: Tensor) -> Tensor:
    """Their log softmax, in their place: (positions, vocabulary) fp32."""
    for _, part in _parts(logits):
        part.copy_(F.log_softmax(part, -1))
    return logits


def _loss(logs: Tensor, example: Example) -> float:
    labels = torch.from_numpy(example.ids[1:].astype(np.int64))
    weights = torch.from_numpy(example.weights[1:].copy())
    return float(-(logs.gather(1, labels[:, None])[:, 0] * weights).sum())
