"""Checks and measurements of `strop doctor` that need torch.

planning.time predicts the time of a step as a sum. Matmuls and memory bandwidth are measured alone. The costs of a
layer, of element-wise work and of attention are fitted to the time of steps of small random models.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from strop.data.types import Example
from strop.engine.device import measure_precision, pick_dtype, prepare_process
from strop.engine.kernels.dispatch import backend_for, describe_gpu_failures, measure_frozen_flops, measure_int8_flops
from strop.engine.kernels.protocols import apply
from strop.engine.step import step_for
from strop.engine.train.head import OutputHead, SupervisedLoss
from strop.engine.train.plain import PlainLoss
from strop.errors import QuantizerError
from strop.machine.doctor import Finding, crash_finding, is_installed, pip_command, why_no_code
from strop.machine.probe import MAX_TILED_RANK, Machine, this_cpu
from strop.machine.rates import Rates, load_rates, save_rates
from strop.models.families.shape import ModelShape
from strop.models.quantize import QuantizedLinear, dequantize_weight, quantize_weight
from strop.planning.activations import MicroBatch
from strop.planning.time import COMPILE_HIDDEN, Rate, count_work, matmul_seconds, repacked_bytes
from strop.planning.workload import AdapterWeights, BaseWeights, Compute, Workload

LOG = logging.getLogger(__name__)

COPY_BYTES = 256 << 20
BUSY_SHARE = 0.4  # load average per core above which measurements are unreliable

SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "head_dim": 64, "max_position_embeddings": 4096}
SMALL = {**SIZES, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
LARGE = {**SIZES, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
RANK, WIDE_RANK, ROUNDS, BUDGET_S = 16, 96, 3, 0.6
MIN_RATE = 0.25  # of fp32's matmuls; costs of a dtype that is slower are estimated from those of fp32
COMPARED_STEP = (2, 512)  # rows, and tokens per row, of the steps that are compared
# model sizes, and (rows, tokens per row), of the steps to which costs are fitted
TRIALS = [*((SMALL, x) for x in ((1, 72), (1, 300), (2, 512), (1, 1536))), (LARGE, (1, 72)), (LARGE, (2, 512))]
DEQUANTIZED_SHAPE = (1536, 576)

assert SMALL["hidden_size"] == COMPILE_HIDDEN and RANK <= MAX_TILED_RANK < WIDE_RANK


def examine(machine: Machine) -> tuple[list[Finding], Rates]:
    """Run all checks, and measure the CPU's rates, which are stored for `strop plan`."""
    rates, warnings = _measure_or_keep(machine)
    what = f"bf16 {rates.bf16_flops / 1e9:,.0f} GFLOP/s, fp32 {rates.fp32_flops / 1e9:,.0f} GFLOP/s"
    dtype, why = pick_dtype("cpu")  # the reason has the ratio of another measurement
    what += f", memory {rates.bandwidth / 1e9:.0f} GB/s on the CPU: the base is computed in {dtype} here "
    what += f"({why.partition(':')[0]})"
    findings = [Finding("ok", what)]
    if rates.integers:
        both = " and ".join(f"{rates.integers[name] / 1e9:,.0f}" for name in ("none", "int8"))
        what = f"8-bit integers {both} GFLOP/s on a base in 16 bit and in int8: --train.int8_matmul true"
        findings.append(Finding("ok", what))
    return [*check_gpus(machine), *warnings, *findings, check_four_bit_step()], rates


def _measure_or_keep(machine: Machine) -> tuple[Rates, list[Finding]]:
    """Return the CPU's rates. If other programs use the cores, they are those measured before, if there are any."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    quiet, before = load < BUSY_SHARE * machine.cores, load_rates(machine, "cpu")
    kept = None if before is None or before.busy else before
    what = f"other programs are using the cores (load {load:.1f}, {machine.cores} cores)"
    fix = "# run strop doctor again when the machine is idle"
    if quiet or kept is None:
        rates = measure_rates()
        rates = replace(rates, busy=rates.busy or not quiet)
        if kept is None or not rates.busy:
            save_rates(machine, "cpu", rates)
            why = "`strop plan` predicts the time of runs from these rates"
            too_low = Finding("warning", f"{what}, so the measured rates are too low", why, fix)
            return rates, [too_low] if rates.busy else []
    why = "rates that are measured now would be too low"
    return kept, [Finding("warning", f"{what}: showing the rates that were measured before", why, fix)]


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """Check that torch can use the driver's GPU, that it has bf16, and that strop's kernels compile."""
    if not machine.gpus:
        return
    fix = f"{pip_command()} install --force-reinstall torch"
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        what = f"{machine.gpus[0]} is installed, but torch {torch.__version__} (built for {built}) cannot use it"
        why = "training would run on the CPU; see docs/troubleshooting.md#cuda"
        yield Finding("error", what, why, fix if torch.version.cuda is None else "# update the NVIDIA driver")
        return
    if (why_not := why_no_code()) is not None:
        yield Finding("error", why_not[0], "training runs on the CPU; see docs/troubleshooting.md#cuda", why_not[1])
        return
    if (dtype := pick_dtype("cuda")[0]) == "fp32":
        why = "the base is stored in fp32, in twice the memory"
        yield Finding("warning", f"{machine.gpus[0]} has no fast 16-bit type", why)
    else:
        yield Finding("ok", f"{machine.gpus[0]}: torch can use it, in {dtype}")
    failures = describe_gpu_failures(torch.device("cuda"))
    if not failures:
        yield Finding("ok", "strop's operations give the right results on the GPU")
    else:
        why = "training uses other operations, which are slower; see docs/troubleshooting.md#triton"
        install = f"{pip_command()} install triton" if "No module named" in failures else "apt install gcc python3-dev"
        yield Finding("warning", failures, why, install if "Triton" in failures else "# update torch or the driver")


def measure_rates() -> Rates:
    """Measure matmuls in both dtypes, memory bandwidth, the output head, and the costs of a step, on the CPU."""
    prepare_process(rank=WIDE_RANK)  # sets the largest cache of matmul shapes that a run uses
    LOG.info("measuring matmuls and memory of this CPU")
    precision, disturbed = measure_precision()
    x = torch.empty(COPY_BYTES, dtype=torch.uint8).fill_(1)
    y = torch.empty_like(x)
    bandwidth = 2 * COPY_BYTES / fastest(lambda: y.copy_(x))
    costs: dict[str, dict[str, float]] = {}
    bf16 = measure_frozen_flops(torch.bfloat16)
    for name, dtype, rate in (("fp32", torch.float32, precision.fp32_flops), ("bf16", torch.bfloat16, bf16)):
        if rate < MIN_RATE * precision.fp32_flops:  # measuring steps would take many minutes
            slower = rate / precision.fp32_flops
            costs[name] = {field: x * slower if field.endswith("flops") else x for field, x in costs["fp32"].items()}
            continue
        LOG.info("measuring steps of small models in %s", name)
        step = measure_step_costs(dtype, Rate(rate, bandwidth, "measured"))
        costs[name] = {"head_flops": _measure_head(dtype, bandwidth), **step}
    schemes = ("nf4", "int8") if is_installed("bitsandbytes") else ()
    unpacked = {scheme: measure_dequantization(scheme) for scheme in schemes}
    integers = measure_int8_flops() if precision.dtype == "fp32" else {}
    return Rates(bf16, precision.fp32_flops, bandwidth, torch.get_num_threads(), costs, unpacked, integers, disturbed)


def _measure_head(dtype: torch.dtype, bandwidth: float) -> float:
    """Measure the FLOP/s of the output head, without the time to move its weight."""
    rows, hidden, vocabulary = 512, 576, 49152
    x, weight = torch.ones(rows, hidden, dtype=dtype, requires_grad=True), torch.ones(vocabulary, hidden, dtype=dtype)
    labels, weights = torch.zeros(rows, dtype=torch.long), torch.ones(rows)
    backend = backend_for(torch.device("cpu"), dtype)
    output = OutputHead(weight, 0.0, backend.ops, matmul=backend.matmul(weight.shape))
    seconds = fastest(lambda: apply(SupervisedLoss, x, labels, weights, output), 3)
    bf16_kernel = dtype == torch.bfloat16 and this_cpu().has_bf16_matmul(weight.shape)
    moving = repacked_bytes(rows, vocabulary, hidden, x.element_size(), bf16_kernel) / bandwidth
    return 4 * rows * hidden * vocabulary / max(seconds - moving, seconds / 2)


def measure_step_costs(dtype: torch.dtype, rate: Rate) -> dict[str, float]:
    """Return the costs of a step as fields of `planning.time.Rate`. rate: of large matmuls and memory."""
    models = {sizes["hidden_size"]: _make_model(sizes, dtype) for sizes in (SMALL, LARGE)}
    steps = {hidden: step_for(model).token_loss for hidden, model in models.items()}
    residuals, totals, compiling = list[float](), list[float](), list[float]()
    terms: list[Sequence[float]] = []
    for sizes, (number, length) in TRIALS:
        first, repeated = _time_step(steps[sizes["hidden_size"]], number, length)
        work = count_work(_workload(sizes, dtype), MicroBatch.rows([length] * number))
        terms.append((sizes["num_hidden_layers"], work.moved, work.attention))
        residuals.append(repeated - matmul_seconds(work, rate))
        totals.append(repeated)
        compiling += [max(0.0, first - repeated)] if sizes is SMALL else []
    layer, moved, attention = _least_squares(terms, residuals, totals)
    number, length = COMPARED_STEP
    plain_seconds = _time_step(PlainLoss(models[SMALL["hidden_size"]]).token_loss, number, length)[1]
    fast_seconds = _time_step(steps[SMALL["hidden_size"]], number, length)[1]
    wide_seconds = _time_step(step_for(_make_model(SMALL, dtype, WIDE_RANK)).token_loss, number, length)[1]
    batch = MicroBatch.rows([length] * number)
    narrow_work, wide_work = (count_work(_workload(SMALL, dtype, rank), batch) for rank in (RANK, WIDE_RANK))
    lora_seconds = wide_seconds - fast_seconds + narrow_work.adapters / rate.flops
    wide_flops = wide_work.wide_lora / max(lora_seconds, wide_work.wide_lora / rate.flops)
    return {
        "layer_s": layer, "moved": 1 / moved, "attention_flops": 1 / attention, "kinds_s": float(np.mean(compiling)),
        "plain": plain_seconds / fast_seconds, "thin_flops": wide_flops,
    }  # fmt: skip


def measure_step(dtype: torch.dtype) -> float:
    """Return the seconds of a calibration step, which depend on the other programs that run at the same time."""
    return _time_step(step_for(_make_model(SMALL, dtype)).token_loss, *COMPARED_STEP)[1]


def _make_model(sizes: dict[str, int], dtype: torch.dtype, rank: int = RANK) -> Any:
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).requires_grad_(False)
    config = peft.LoraConfig(r=rank, target_modules="all-linear")
    return peft.get_peft_model(model, config).train()


def measure_dequantization(scheme: str) -> float:
    weight = torch.randn(DEQUANTIZED_SHAPE)
    packed = quantize_weight(weight, scheme)
    return weight.numel() / fastest(lambda: dequantize_weight(packed, scheme, weight.shape, torch.bfloat16), 8)


def fastest(work: Callable[[], object], rounds: int = 4) -> float:
    best = math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def _workload(sizes: dict[str, int], dtype: torch.dtype, rank: int = RANK) -> Workload:
    shape = ModelShape.from_config({"model_type": "llama", **sizes})
    tiles = backend_for(torch.device("cpu"), dtype).has_tiled_attention(shape.head_size)
    return Workload(
        base=BaseWeights(shape=shape, parameters=0),
        adapter=AdapterWeights(ranks=(rank,) * len(shape.linears)),
        compute=Compute(dtype_bytes=dtype.itemsize, attention_tiles=tiles),
    )


def _time_step(loss: Callable[[Sequence[Example]], Tensor], number: int, length: int) -> tuple[float, float]:
    """Return the fastest seconds of a step with a new row length, and with a repeated one."""
    fastest_seconds = [math.inf, math.inf]
    begin = time.perf_counter()
    for shorter in range(ROUNDS):
        if shorter and time.perf_counter() - begin > BUDGET_S:
            break
        x = np.arange(length - shorter, dtype=np.int32)
        rows = [Example((x + row) % SIZES["vocab_size"], (x > 0).astype(np.float32), "", 0) for row in range(number)]
        for repeated in (0, 1):
            started = time.perf_counter()
            loss(rows).backward()  # type: ignore[no-untyped-call]
            fastest_seconds[repeated] = min(fastest_seconds[repeated], time.perf_counter() - started)
    return fastest_seconds[0], fastest_seconds[1]


def _least_squares(
    terms: Sequence[Sequence[float]], residuals: Sequence[float], totals: Sequence[float]
) -> tuple[float, float, float]:
    """Fit costs with a lower bound to the residual seconds of steps, weighted by the inverse of their total seconds."""
    weights = 1 / np.array(totals)
    a, y = np.array(terms) * weights[:, None], np.array(residuals) * weights
    bounds = np.array([1e-6, 1e-13, 1e-14])  # seconds per layer, per byte (10 TB/s) and per FLOP (100 TFLOP/s)
    free = np.ones(3, bool)
    cost = bounds.copy()
    for _ in range(3):
        cost[free] = np.linalg.lstsq(a[:, free], y - a[:, ~free] @ bounds[~free], rcond=None)[0]
        too_low = free & (cost < bounds)
        if not too_low.any():
            break
        free &= ~too_low
        cost[too_low] = bounds[too_low]
    return float(cost[0]), float(cost[1]), float(cost[2])


def check_four_bit_step() -> Finding:
    """Train one step through an nf4 weight and compare it with autograd in fp32."""
    device, fix = "cuda" if torch.cuda.is_available() else "cpu", f"{pip_command()} install -U bitsandbytes"
    LOG.info("one training step in 4 bit")
    torch.manual_seed(0)
    try:
        moved, error = _four_bit_update(device)
    except QuantizerError as quantizer_error:
        why = "4-bit and 8-bit bases cannot be used; see docs/troubleshooting.md#bitsandbytes"
        return Finding("error", quantizer_error.what, why, fix)
    except Exception as crash:  # a crash is a finding too
        return crash_finding("a training step in 4 bit", crash, fix)
    if not moved or not error <= 1e-3 * moved:  # NaN fails too
        what = f"a 4-bit step moves a weight by {moved:.2g}, with an error of {error:.2g}"
        return Finding("error", what, "a 4-bit run would train wrongly", fix)
    return Finding("ok", f"a training step in 4 bit on {device}: the weight moves as it should")


def _four_bit_update(device: str) -> tuple[float, float]:
    """Return the largest change of an adapter weight, and the largest difference from the fp32 update."""
    weight = torch.randn(128, 128, device=device)
    packed = quantize_weight(weight, "nf4")
    layer = QuantizedLinear(nn.Linear(128, 128, bias=False), "nf4", torch.float32)
    layer.load_packed(packed)
    dequantized = dequantize_weight(packed, "nf4", weight.shape, torch.float32)
    x, a = torch.randn(8, 128, device=device), torch.randn(4, 128, device=device) / 10

    def trained(matmul: Callable[[Tensor], Tensor]) -> Tensor:
        b = nn.Parameter(torch.zeros(128, 4, device=device))
        matmul(x + (x @ a.t()) @ b.t()).square().mean().backward()  # type: ignore[no-untyped-call]
        torch.optim.SGD([b], lr=0.1).step()
        return b.detach()

    b, exact = trained(layer), trained(lambda z: z @ dequantized.t())
    return float(b.abs().max()), float((b - exact).abs().max())
