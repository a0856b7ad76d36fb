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
from strop.engine.kernels.dispatch import processor_for
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
    plain = _seconds(PlainLoss(models[SMALL["hidden_size"]]), *TRIED[2][1])[1]
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
    tiles = processor_for(torch.device("cpu"), dtype).tiled(shape.head_size)
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


# ---- from strop.planning.trial ----
"""What `strop doctor` tries out with torch: the card, products and their rates, one training step in 4 bit."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor, nn

from strop.engine.device import measure, pick_dtype, prepare_process
from strop.engine.kernels.dispatch import frozen_flops, integer_flops, kernels_lack, processor_for
from strop.engine.kernels.protocols import apply
from strop.engine.train.head import Output, SupervisedLoss
from strop.errors import QuantizerError
from strop.machine.doctor import Finding, crashed, installed, pip
from strop.machine.probe import Machine, probe
from strop.machine.rates import Rates, keep_rates
from strop.models.quantize import QuantizedLinear, pack, unpack
from strop.planning.calibrate import WIDE_RANK, fastest, step_costs, unpacked_per_s
from strop.planning.time import Rate, repacked_bytes

LOG = logging.getLogger(__name__)

COPY_BYTES = 256 << 20
BUSY = 0.4  # of the cores, in the last minute


def try_out(machine: Machine) -> tuple[list[Finding], Rates]:
    """What was found, and the CPU's rates, which are kept for `strop plan`."""
    others = _others(machine)
    rates = measure_rates()
    keep_rates(machine, "cpu", rates)
    said = f"bf16 {rates.bf16_flops / 1e9:,.0f} GFLOP/s, fp32 {rates.fp32_flops / 1e9:,.0f} GFLOP/s"
    said += f", memory {rates.bandwidth / 1e9:.0f} GB/s on the CPU: the base is computed in {rates.dtype} here"
    found = [Finding("ok", said)]
    if rates.integers:
        both = " and ".join(f"{rates.integers[name] / 1e9:,.0f}" for name in ("none", "int8"))
        what = f"in 8-bit integers {both} GFLOP/s, on a base in 16 bit and in int8: --train.int8_matmul true"
        found.append(Finding("ok", what))
    return [*cards(machine), *others, *found, four_bit_step()], rates


def _others(machine: Machine) -> list[Finding]:
    """Whether other programs use this CPU while its rates are measured."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy < BUSY * machine.cores:
        return []
    what = f"other programs are using {busy:.1f} of {machine.cores} cores: the rates are measured too low"
    why = "`strop plan` reckons the time of runs by them"
    return [Finding("warning", what, why, "# strop doctor again when the machine is quiet")]


def cards(machine: Machine) -> Iterator[Finding]:
    """A card that the driver lists and torch cannot use, a bitsandbytes for another CUDA, a card without bf16."""
    if not machine.gpus:
        return
    fix = f"{pip()} install --force-reinstall torch"
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        what = f"{machine.gpus[0]} is there, and torch {torch.__version__} (built for {built}) cannot use it"
        why = "training would run on the CPU; see docs/troubleshooting.md#cuda"
        yield Finding("error", what, why, fix if torch.version.cuda is None else "# update the NVIDIA driver")
        return
    if pick_dtype("cuda")[0] != "bf16":
        yield Finding("warning", f"{machine.gpus[0]} has no bf16", "the base is held in fp32: twice the memory")
    else:
        yield Finding("ok", f"{machine.gpus[0]}: torch can use it, in bf16")
    lacking = kernels_lack(torch.device("cuda"))
    if lacking is None:
        yield Finding("ok", "strop's own kernels work on the card")
    else:
        why = "training uses PyTorch's own operations, more slowly; see docs/troubleshooting.md#triton"
        missing = "imported" in lacking
        yield Finding("warning", lacking, why, f"{pip()} install triton" if missing else "apt install gcc python3-dev")


def measure_rates() -> Rates:
    """Products in both types and a copy, on the CPU; what the engine's head reaches, and what its steps cost."""
    prepare_process(rank=WIDE_RANK)  # as many kinds of product kept as any run keeps
    LOG.info("measuring products and memory of this CPU")
    found = measure("cpu")
    x = torch.empty(COPY_BYTES, dtype=torch.uint8).fill_(1)
    y = torch.empty_like(x)
    bandwidth = 2 * COPY_BYTES / fastest(lambda: y.copy_(x))
    costs: dict[str, dict[str, float]] = {}
    bf16 = frozen_flops(torch.bfloat16)
    for name, dtype, rate in (("bf16", torch.bfloat16, bf16), ("fp32", torch.float32, found.fp32_flops)):
        LOG.info("measuring steps of small models in %s", name)
        step = step_costs(dtype, Rate(rate, bandwidth, "measured"))
        costs[name] = {"head_flops": _head_flops(dtype, bandwidth), **asdict(step)}
    unpacked = {scheme: unpacked_per_s(scheme) for scheme in ("nf4", "int8")} if installed("bitsandbytes") else {}
    integers = integer_flops() if found.dtype == "fp32" else {}
    return Rates(bf16, found.fp32_flops, bandwidth, torch.get_num_threads(), costs, unpacked, integers)


def _head_flops(dtype: torch.dtype, bandwidth: float) -> float:
    """The engine's head on 512 rows of a vocabulary of 49,152, hidden size 576, but for moving its weight."""
    rows, hidden, vocabulary = 512, 576, 49152
    x, weight = torch.ones(rows, hidden, dtype=dtype, requires_grad=True), torch.ones(vocabulary, hidden, dtype=dtype)
    labels, weights = torch.zeros(rows, dtype=torch.long), torch.ones(rows)
    processor = processor_for(torch.device("cpu"), dtype)
    output = Output(weight, 0.0, processor.ops, product=processor.product(weight.shape))
    seconds = fastest(lambda: apply(SupervisedLoss, x, labels, weights, output), 3)
    own = dtype == torch.bfloat16 and probe().has_products(weight.shape)
    moving = repacked_bytes(rows, vocabulary, hidden, x.element_size(), own) / bandwidth
    return 4 * rows * hidden * vocabulary / max(seconds - moving, seconds / 2)


def four_bit_step() -> Finding:
    """One step through a weight in nf4, on the device that a run would take: the adapter must move, and to where
    autograd in fp32 takes it."""
    device, mend = "cuda" if torch.cuda.is_available() else "cpu", f"{pip()} install -U bitsandbytes"
    LOG.info("one training step in 4 bit")
    torch.manual_seed(0)
    try:
        moved, off = _moved(device)
    except QuantizerError as error:
        why = "4-bit and 8-bit bases cannot be used; see docs/troubleshooting.md#bitsandbytes"
        return Finding("error", error.what, why, mend)
    except Exception as error:  # a check that crashes has found something
        return crashed("a training step in 4 bit", error, mend)
    if not moved or not off <= 1e-3 * moved:  # NaN is neither
        what = f"a step in 4 bit moves a weight by {moved:.2g}, and {off:.2g} from where it belongs"
        return Finding("error", what, "a 4-bit run would train wrongly", mend)
    return Finding("ok", f"a training step in 4 bit on {device}: the weight moves as it should")


def _moved(device: str) -> tuple[float, float]:
    """How far the optimizer moves an adapter's weight, and how far from where it does through the weight in fp32."""
    weight = torch.randn(128, 128, device=device)
    packed = pack(weight, "nf4")
    layer = QuantizedLinear(nn.Linear(128, 128, bias=False), "nf4", torch.float32)
    layer.fill(packed)
    whole = unpack(packed, "nf4", weight.shape, torch.float32)
    x, a = torch.randn(8, 128, device=device), torch.randn(4, 128, device=device) / 10
    results: list[Tensor] = []
    products: list[Callable[[Tensor], Tensor]] = [layer, lambda z: z @ whole.t()]
    for product in products:
        b = nn.Parameter(torch.zeros(128, 4, device=device))
        optimizer = torch.optim.SGD([b], lr=0.1)
        product(x + (x @ a.t()) @ b.t()).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        results.append(b.detach())
    return float(results[0].abs().max()), float((results[0] - results[1]).abs().max())
