"""What a training step costs on this CPU beside its large products, by steps of small models of random weights.

A step's time is a sum: products of frozen weights and of adapters by their FLOPs, the weights read once each way, and
three costs that are fitted here: of a layer, of what its element-wise work moves, and of attention.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from strop.data.types import Example
from strop.engine.kernels.dispatch import backend_for
from strop.engine.step import step_for
from strop.engine.train.plain import PlainLoss
from strop.machine.probe import TILED_RANK
from strop.models.families.shape import ModelShape
from strop.models.quantize import pack, unpack
from strop.planning.activations import MicroBatch
from strop.planning.time import KINDS_HIDDEN, Rate, known_seconds, work_of
from strop.planning.workload import Setting

SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "head_dim": 64, "max_position_embeddings": 4096}
SMALL = {**SIZES, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
LARGE = {**SIZES, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
RANK, WIDE_RANK, ROUNDS, BUDGET_S = 16, 96, 3, 0.6
TRIED = (
    (SMALL, (1, 72)),
    (SMALL, (1, 300)),
    (SMALL, (2, 512)),
    (SMALL, (1, 1536)),
    (LARGE, (1, 72)),
    (LARGE, (2, 512)),
)
UNPACKED = (1536, 576)  # a weight that is dequantized

assert SMALL["hidden_size"] == KINDS_HIDDEN and RANK <= TILED_RANK < WIDE_RANK


@dataclass(frozen=True)
class Costs:
    """In one type. layer_s: of a layer, whatever the rows. moved: bytes/s of element-wise work. attention_flops: in
    FLOP/s. kinds_s: to make the products of a length that was not met before, at KINDS_HIDDEN. plain: times the fast
    step's time. thin_flops: of products with a rank that is too large for tiles, in FLOP/s."""

    layer_s: float
    moved: float
    attention_flops: float
    kinds_s: float
    plain: float
    thin_flops: float


def step_costs(dtype: torch.dtype, rate: Rate) -> Costs:
    """rate: of the large products and of memory, as measured."""
    models = {sizes["hidden_size"]: _model(sizes, dtype) for sizes in (SMALL, LARGE)}
    steps = {hidden: step_for(model).token_loss for hidden, model in models.items()}
    found, whole, making = list[float](), list[float](), list[float]()
    terms: list[Sequence[float]] = []
    for sizes, (number, length) in TRIED:
        new, again = _seconds(steps[sizes["hidden_size"]], number, length)
        setting, batch = _setting(sizes, dtype), MicroBatch.rows([length] * number)
        work = work_of(setting, batch)
        terms.append((sizes["num_hidden_layers"], work.moved, work.attention))
        found.append(again - known_seconds(work, rate))
        whole.append(again)
        making += [max(0.0, new - again)] if sizes is SMALL else []
    layer, moved, attention = _least_squares(terms, found, whole)
    plain = _seconds(PlainLoss(models[SMALL["hidden_size"]]).token_loss, *TRIED[2][1])[1]
    fast = _seconds(steps[SMALL["hidden_size"]], *TRIED[2][1])[1]
    ranked = step_for(_model(SMALL, dtype, WIDE_RANK)).token_loss
    thin = _thin_flops(dtype, rate, _seconds(ranked, *TRIED[2][1])[1] - fast)
    return Costs(layer, 1 / moved, 1 / attention, float(np.mean(making)), plain / fast, thin)


def _thin_flops(dtype: torch.dtype, rate: Rate, more_s: float) -> float:
    """By what a step takes more with WIDE_RANK than with RANK, whose adapters take what the plan says."""
    number, length = TRIED[2][1]
    batch = MicroBatch.rows([length] * number)
    low, high = (work_of(_setting(SMALL, dtype, rank), batch) for rank in (RANK, WIDE_RANK))
    return high.thin / max(more_s + low.adapters / rate.flops, high.thin / rate.flops)


def pace(dtype: torch.dtype) -> float:
    """Seconds of one of these steps: how fast this CPU is now, as others leave it."""
    return _seconds(step_for(_model(SMALL, dtype)).token_loss, *TRIED[2][1])[1]


def _model(sizes: dict[str, int], dtype: torch.dtype, rank: int = RANK) -> Any:
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).requires_grad_(False)
    config = peft.LoraConfig(r=rank, target_modules="all-linear")
    return peft.get_peft_model(model, config).train()


def unpacked_per_s(scheme: str) -> float:
    """Weights that are dequantized a second."""
    weight = torch.randn(UNPACKED)
    packed = pack(weight, scheme)
    dtype = torch.bfloat16
    return weight.numel() / fastest(lambda: unpack(packed, scheme, weight.shape, dtype), 8)


def fastest(work: Callable[[], object], rounds: int = 4) -> float:
    best = math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def _setting(sizes: dict[str, int], dtype: torch.dtype, rank: int = RANK) -> Setting:
    shape = ModelShape.of({"model_type": "llama", **sizes})
    tiles = backend_for(torch.device("cpu"), dtype).has_tiled_attention(shape.head_size)
    return Setting(shape, 0, ranks=(rank,) * len(shape.linears), tiles=tiles, element=dtype.itemsize)


def _seconds(loss: Callable[[Sequence[Example]], Tensor], number: int, length: int) -> tuple[float, float]:
    """(of a length that was not met before, of one that was), each the fastest of some."""
    new = again = math.inf
    begun = time.perf_counter()
    for turn in range(ROUNDS):
        if turn and time.perf_counter() - begun > BUDGET_S:
            break
        at = np.arange(length - turn, dtype=np.int32)
        rows = [Example((at + row) % SIZES["vocab_size"], (at > 0).astype(np.float32), "", 0) for row in range(number)]
        for once in range(2):
            started = time.perf_counter()
            loss(rows).backward()  # type: ignore[no-untyped-call]
            took = time.perf_counter() - started
            new, again = (min(new, took), again) if once == 0 else (new, min(again, took))
    return new, again


def _least_squares(
    terms: Sequence[Sequence[float]], found: Sequence[float], whole: Sequence[float]
) -> tuple[float, float, float]:
    """Costs that are not below a floor, from what is left of each step's whole time; errors count as shares of that."""
    weights = 1 / np.array(whole)
    a, y = np.array(terms) * weights[:, None], np.array(found) * weights
    least = np.array([1e-6, 1e-13, 1e-14])  # s a layer; 10 TB/s; 100 TFLOP/s
    free = np.ones(3, bool)
    cost = least.copy()
    for _ in range(3):
        cost[free] = np.linalg.lstsq(a[:, free], y - a[:, ~free] @ least[~free], rcond=None)[0]
        low = free & (cost < least)
        if not low.any():
            break
        free &= ~low
        cost[low] = least[low]
    return float(cost[0]), float(cost[1]), float(cost[2])
