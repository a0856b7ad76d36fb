"""What `strop doctor` tries out with torch: the card, products and their rates, one training step in 4 bit."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor, nn

from strop.engine.device import measure, pick_dtype, prepare_process
from strop.engine.kernels.dispatch import backend_for, frozen_flops, int8_flops, why_no_triton
from strop.engine.kernels.protocols import apply
from strop.engine.train.head import OutputHead, SupervisedLoss
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
    reason = why_no_triton(torch.device("cuda"))
    if reason is None:
        yield Finding("ok", "strop's own kernels work on the card")
    else:
        why = "training uses PyTorch's own operations, more slowly; see docs/troubleshooting.md#triton"
        missing = "imported" in reason
        yield Finding("warning", reason, why, f"{pip()} install triton" if missing else "apt install gcc python3-dev")


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
    integers = int8_flops() if found.dtype == "fp32" else {}
    return Rates(bf16, found.fp32_flops, bandwidth, torch.get_num_threads(), costs, unpacked, integers)


def _head_flops(dtype: torch.dtype, bandwidth: float) -> float:
    """The engine's head on 512 rows of a vocabulary of 49,152, hidden size 576, but for moving its weight."""
    rows, hidden, vocabulary = 512, 576, 49152
    x, weight = torch.ones(rows, hidden, dtype=dtype, requires_grad=True), torch.ones(vocabulary, hidden, dtype=dtype)
    labels, weights = torch.zeros(rows, dtype=torch.long), torch.ones(rows)
    backend = backend_for(torch.device("cpu"), dtype)
    output = OutputHead(weight, 0.0, backend.ops, matmul=backend.matmul(weight.shape))
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
