"""Compare a model with a reference by their next-token distributions on the same rows."""

from __future__ import annotations

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
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from strop.data.images import hide_images
from strop.data.types import Example
from strop.display.terminal import LASTING
from strop.engine.device import pick_device
from strop.errors import ParityError
from strop.evaluation.metrics import Z_95, Estimate, wilson_interval
from strop.machine.memory import free_memory
from strop.models.adapters import adapter_disabled
from strop.models.experts import expert_parameters
from strop.planning.memory import POSITIONS

LOG = logging.getLogger(__name__)
GPU_WORKSPACE_BYTES = 4 << 30  # a head in fp32, the logits of a row, and what a layer computes
CHUNK_BYTES = 4 << 20  # log-probabilities are processed in chunks of this size


@dataclass(frozen=True)
class Limit:
    """Limits of a comparison. At a clear flip, the most likely token differs and is not a near tie in the reference."""

    kl_mean: float  # highest mean KL divergence, in nats
    agreement: float  # lowest share of positions without a clear flip

    @property
    def near_tie(self) -> float:
        """The largest difference in probability between two tokens whose order may change through rounding.

        By Pinsker's inequality (Tsybakov, Introduction to Nonparametric Estimation, 2009, lemma 2.5), KL(p || q) = k
        implies sum |p - q| <= sqrt(2 k), so q can only reverse the order of tokens whose probabilities under p differ
        by no more. k is the limit of the mean KL divergence.
        """
        return math.sqrt(2 * self.kl_mean)

    @property
    def cosine(self) -> float:
        """The lowest cosine of a text's vectors: 0.99998 in fp32, 0.99 in bf16, 0.999 in fp16."""
        return 1 - 20 * self.kl_mean


# Measured mean KL of correct merges of SmolLM2-135M (docs/log): fp32 4e-12, bf16 6e-5 to 1.4e-4, fp16 5e-7 to 4e-6. It
# is 1.2e-3 or more if one of the 30 layers is not merged. Of 206 tiny random models, 3 exceed the bf16 limit.
LIMITS = {"fp32": Limit(1e-6, 0.995), "bf16": Limit(5e-4, 0.995), "fp16": Limit(5e-5, 0.995)}
EFFECT_TOLERANCE = 0.02  # allowed error of the adapter's effect; an alpha that is 10 % too large causes 0.07
FEW_POSITIONS = 1000  # with fewer positions, a single one may cause a mean to exceed its limit
STANDARD_ERRORS = 3.0  # a figure must exceed its limit by this many standard errors
WEAK_EFFECT = 5.0  # effects below this multiple of the KL limit are not checked, because rounding errors distort them


@dataclass(frozen=True)
class Parity:
    """Difference of a model from a reference."""

    positions: int
    kl_mean: float  # KL(reference || model), nats
    kl_max: float
    top1_agreement: float  # share of positions with the same most likely token
    loss_difference: float  # model - reference, on the supervised tokens
    loss_error: float  # standard error of loss_difference
    limit: Limit
    clear_flips: int  # number of positions; see Limit
    agreement: Estimate  # share of positions without a clear flip
    effect: Estimate | None  # share of the adapter's effect, ideally 1; None if it is too weak or there is no adapter
    cosine_min: float | None = None  # lowest cosine of a text's two vectors; None unless they are embeddings

    @property
    def violations(self) -> list[str]:
        """Descriptions of the figures that exceed their limits or are NaN."""
        limit, violations = self.limit, []
        if not self.kl_mean <= limit.kl_mean:
            violations.append(f"mean KL {self.kl_mean:.2g} (limit {limit.kl_mean:.2g})")
        if not self.agreement.high >= limit.agreement:
            flips = f"{self.clear_flips} clear flips in {self.positions} positions"
            violations.append(f"{flips}, agreement {self.agreement.value:.2%} (limit {limit.agreement:.2%})")
        if not abs(self.loss_difference) <= limit.near_tie + STANDARD_ERRORS * self.loss_error:
            violations.append(f"loss {self.loss_difference:+.2g} (limit {limit.near_tie:.2g})")
        if self.effect is not None:
            difference, error = abs(self.effect.value - 1), (self.effect.high - self.effect.low) / (2 * Z_95)
            if not difference <= EFFECT_TOLERANCE + STANDARD_ERRORS * error:
                violations.append(f"{self.effect.value:.1%} of the adapter's effect (limit {EFFECT_TOLERANCE:.0%} off)")
        if self.cosine_min is not None and not self.cosine_min >= limit.cosine:
            violations.append(f"lowest cosine {self.cosine_min:.6f} (limit {limit.cosine:.6f})")
        return violations

    @property
    def passed(self) -> bool:
        return not self.violations

    def describe_limits(self) -> str:
        """Return the limits as they were applied, with the reason why few positions may exceed one."""
        share = f"{1 - self.limit.agreement:.1%}"
        text = f"mean KL at most {self.limit.kl_mean:.2g}, clear flips in at most {share} of the positions"
        if self.positions >= FEW_POSITIONS:
            return text
        low, high = 1 - self.agreement.high, 1 - self.agreement.low
        few = f"as {self.positions} positions are few, their 95 % interval is compared: {low:.1%} to {high:.1%}"
        return f"{text} ({few})"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "limits": self.describe_limits()}

    def check(self, name: str, alternative: str = "") -> None:
        """Raise ParityError if a limit is exceeded. alternative: what to do instead, such as another option."""
        if self.violations:
            fix = "please report it with the base's name"
            if self.positions < FEW_POSITIONS:
                few = f"{self.positions} positions are few"
                fix = f"{few}: measure on more rows (--data FILE); if that fails too, {fix}"
            what = f"{name}: not the same model: {'; '.join(self.violations)}"
            raise ParityError(what, fix="; ".join(filter(None, ["nothing was kept", alternative, fix])))


def compare(
    reference: Callable[[], Any], model: Callable[[], Any], examples: Sequence[Example], limit: Limit
) -> Parity:
    """Compare two models on the first POSITIONS positions of the rows. Only one model is in memory at a time.

    reference, model: load a transformers model that computes in fp32, or an object with a method `log_probabilities`.
    A prefix that several rows share counts once for KL and agreement, but in each row for the loss.
    """
    with measure_against(reference, examples) as measure:
        return measure(model, limit)


@contextmanager
def measure_against(
    reference: Callable[[], Any], examples: Sequence[Example]
) -> Iterator[Callable[[Callable[[], Any], Limit], Parity]]:
    """Yield a function (load model, limit) that compares a model with the reference; see `compare`."""
    examples, starts = select_rows(examples)
    sizes = [len(example) - 1 - start for example, start in zip(examples, starts, strict=True)]
    ends = list(accumulate(sizes))
    LOG.info("measuring the result on rows, which may take longest (--no-parity skips it)", extra=LASTING)
    with tempfile.TemporaryDirectory() as folder:
        model = move_to_gpu(reference())
        stored, losses = _LogprobFile(Path(folder) / "tuned"), []
        for example, start in zip(_log_progress("the tuned model", examples), starts, strict=True):
            logprobs = _compute_logprobs(model, example)
            losses.append(_compute_loss(logprobs, example))
            stored.append(logprobs[start:])
        effect = _store_effect(model, examples, starts, ends, stored, Path(folder) / "effect")
        del model, logprobs
        free_memory()

        def measure(load: Callable[[], Any], limit: Limit) -> Parity:
            model = move_to_gpu(load())
            divergences, flips, clear_flips, model_losses, projections = [], 0, 0, [], []
            for example, start, size, end in zip(
                _log_progress("the result", examples), starts, sizes, ends, strict=True
            ):
                logprobs = _compute_logprobs(model, example)
                model_losses.append(_compute_loss(logprobs, example))
                projection = np.zeros(2)
                for offset, chunk in _split_chunks(logprobs[start:]):
                    expected = stored.read(end - size + offset, len(chunk))
                    p, q = expected.double().exp(), chunk.double().exp()
                    # q - p: the sums of p and q are 1 but for fp32's rounding, which is larger than a small divergence
                    divergences.append((p * (expected.double() - chunk.double()) + q - p).sum(1))
                    first, second = expected.argmax(1, keepdim=True), chunk.argmax(1, keepdim=True)
                    margins = (expected.gather(1, first).exp() - expected.gather(1, second).exp())[:, 0]
                    flipped = (first != second)[:, 0]
                    flips += int(flipped.sum())
                    clear_flips += int((flipped & (margins > limit.near_tie)).sum())
                    if effect is not None:
                        projection += _project(expected, chunk, effect.read(end - size + offset, len(chunk)))
                if effect is not None:
                    projections.append((float(projection[0]), float(projection[1])))
            kl = torch.cat(divergences).clamp(min=0)  # rounding errors may make it negative; NaN remains NaN
            weights = np.array([float(example.weights[1:].sum()) for example in examples])
            loss_difference, loss_error = _compute_ratio(np.array(model_losses) - np.array(losses), weights)
            total = ends[-1]
            return Parity(
                total, float(kl.mean()), float(kl.max()), 1 - flips / total, loss_difference, loss_error, limit,
                clear_flips, Estimate(1 - clear_flips / total, *wilson_interval(total - clear_flips, total)),
                _estimate_effect(projections, 2 * WEAK_EFFECT * limit.kl_mean * total),
            )  # fmt: skip

        yield measure


def move_to_gpu(model: Any) -> Any:
    """Move a transformers model to the GPU if there is one with enough memory. Quantized weights stay on the CPU."""
    if not isinstance(model, nn.Module) or pick_device("auto") != "cuda":
        return model
    free_memory()
    torch.cuda.empty_cache()
    tensors = [*model.parameters(), *model.buffers()]
    needed = sum(tensor.numel() * tensor.itemsize for tensor in tensors) + GPU_WORKSPACE_BYTES
    is_packed = any(tensor.dtype in (torch.uint8, torch.int8) for tensor in tensors)
    if is_packed or needed > torch.cuda.mem_get_info()[0]:
        return model
    try:
        return model.to("cuda")
    except torch.OutOfMemoryError:
        return model.cpu()


def _log_progress(name: str, examples: Sequence[Example]) -> Iterator[Example]:
    """Yield the examples, and log for the status line which one is measured."""
    for number, example in enumerate(examples):
        LOG.info("measuring %s: %d of %d rows", name, number, len(examples))
        yield example


class _LogprobFile:
    """Log-probabilities (positions, vocabulary) in a file, which (unlike a memory map) does not count as memory."""

    def __init__(self, file: Path) -> None:
        self._file, self._width = file, 0

    def append(self, logprobs: Tensor) -> None:
        self._width = logprobs.shape[1]
        with self._file.open("ab") as handle:
            for _, chunk in _split_chunks(logprobs):
                chunk.numpy().tofile(handle)

    def read(self, begin: int, count: int) -> Tensor:
        values = np.fromfile(self._file, np.float32, count * self._width, offset=4 * begin * self._width)
        return torch.from_numpy(values).view(count, self._width)


def _split_chunks(logprobs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first position, log-probabilities) of chunks, because processing takes several times their memory."""
    rows = max(1, CHUNK_BYTES // (4 * logprobs.shape[1]))
    return ((start, logprobs[start : start + rows]) for start in range(0, len(logprobs), rows))


def _store_effect(
    model: Any, examples: Sequence[Example], starts: Sequence[int], ends: Sequence[int], tuned: _LogprobFile, file: Path
) -> _LogprobFile | None:
    """Store the adapter's change to the base's log-probabilities. Returns None if the model has no adapter."""
    if not isinstance(model, peft.PeftModel):
        return None
    effect = _LogprobFile(file)
    with adapter_disabled(model):
        for example, start, end in zip(_log_progress("the base", examples), starts, ends, strict=True):
            base = _compute_logprobs(model, example)[start:]
            for offset, chunk in _split_chunks(base):
                chunk.copy_(tuned.read(end - len(base) + offset, len(chunk)) - chunk)
            effect.append(base)
    return effect


def _project(expected: Tensor, logprobs: Tensor, effect: Tensor) -> tuple[float, float]:
    """Return the inner products of (logprobs - expected) with the effect, and of the effect with itself.

    The inner product is weighted by the reference's probabilities (the Fisher metric) and summed over the positions.
    Half the squared norm of a small change is its KL divergence.
    """
    p = expected.exp()
    effect = effect - (p * effect).sum(1, keepdim=True)
    return float((p * (logprobs - expected) * effect).sum()), float((p * effect.square()).sum())


def _estimate_effect(projections: Sequence[tuple[float, float]], min_square: float) -> Estimate | None:
    """Return the share of the adapter's effect in the model: 1 + the slope of a regression of the error on the effect.

    Returns None unless the squared norm of the effect exceeds `min_square`.
    """
    if sum(square for _, square in projections) <= min_square:
        return None
    slope, error = _compute_ratio(*np.array(projections).T)
    return Estimate(1 + slope, 1 + slope - Z_95 * error, 1 + slope + Z_95 * error)


def _compute_ratio(parts: Any, wholes: Any) -> tuple[float, float]:
    """Return the ratio of the sums, and its standard error over rows (positions of a row are not independent)."""
    ratio = float(parts.sum() / wholes.sum())
    return ratio, float(math.sqrt(((parts - ratio * wholes) ** 2).sum()) / wholes.sum())


def linears_may_stay_16bit(model: Any) -> bool:
    """Return whether `compute_in_fp32` can keep linear weights in 16 bit.

    It casts the weights in nn.Linear.forward, which Mamba and xLSTM layers and mixtures of experts bypass.
    """
    has_mixers = any(kind in type(module).__name__ for module in model.modules() for kind in ("Mamba", "xLSTM"))
    return not has_mixers and next(expert_parameters(model), None) is None


def compute_in_fp32(model: Any) -> Any:
    """Make a model compute in fp32. To save memory, linear weights keep their type and are cast for each matmul."""
    if not linears_may_stay_16bit(model):
        return model.float()
    for module in model.modules():
        # They are trained in full, or their weights are used without a matmul.
        if isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            module.float()
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype != torch.float32:
            module.forward = partial(_linear_in_fp32, module)  # type: ignore[method-assign]
    linear_weights = {id(module.weight) for module in model.modules() if type(module) is nn.Linear}
    embedding = model.get_input_embeddings().weight  # converted even if it is tied to the output head
    for parameter in model.parameters():
        if parameter.is_floating_point() and (id(parameter) not in linear_weights or parameter is embedding):
            parameter.data = parameter.data.float()
    return model


def _linear_in_fp32(module: nn.Linear, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.float()
    return F.linear(x.float(), module.weight.float(), bias)  # encoders may give it pixels in the dtype of its weight


def select_rows(examples: Sequence[Example]) -> tuple[list[Example], list[int]]:
    """Return the first rows that have POSITIONS distinct contexts in total, or all rows.

    Also returns for each row the first position whose context (the tokens up to there) is not in an earlier row.
    """
    rows, starts, total, seen = list[Example](), list[int](), 0, set[bytes]()
    for example in examples:
        contexts = [example.ids[: end + 1].tobytes() for end in range(len(example) - 1)]
        starts.append(sum(context in seen for context in contexts))  # all prefixes of a known context are known
        rows.append(example)
        seen.update(contexts)
        total += len(contexts) - starts[-1]
        if total >= POSITIONS:
            break
    assert total, "parity needs rows"
    return rows, starts


def _compute_logprobs(model: Any, example: Example) -> Tensor:
    """Return the log-probabilities of all next tokens at each position: (tokens - 1, vocabulary), fp32."""
    if hasattr(model, "log_probabilities"):
        logprobs: Tensor = model.log_probabilities(example)
        return logprobs
    ids = torch.from_numpy(example.ids.astype(np.int64))[None].to(next(model.parameters()).device)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1].float().cpu()
    return log_softmax_(logits)


def log_softmax_(logits: Tensor) -> Tensor:
    """Replace logits (positions, vocabulary) in fp32 by their log softmax, in place."""
    for _, chunk in _split_chunks(logits):
        chunk.copy_(F.log_softmax(chunk, -1))
    return logits


def _compute_loss(logprobs: Tensor, example: Example) -> float:
    labels = torch.from_numpy(hide_images(example.ids[1:]).astype(np.int64))
    weights = torch.from_numpy(example.weights[1:].copy())
    return float(-(logprobs.gather(1, labels[:, None])[:, 0] * weights).sum())
