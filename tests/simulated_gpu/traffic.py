"""FLOPs, bytes and launches of each operation of a step on the simulated GPU.

The bytes are those of an operation's inputs and outputs, or of a Triton kernel's arguments, counted as often as they
are read or written, as if nothing stayed in the GPU's caches. What cuBLAS and flash attention move internally is not
counted.
"""

from __future__ import annotations

from tests.simulated_gpu import fake  # first: before torch

# isort: split

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from strop.config.schema import TrainSection
from strop.engine.train.fast import FastLoss
from strop.training.optim import make_optimizer
from tests.simulated_gpu.sizes import Case, build_model

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}  # position of the first matrix
NARROW = 64  # a matmul with a side this short belongs to an adapter
PICKING = {"embedding", "index", "index_select", "gather"}  # they read as much of a table as they return
ADDING = {"index_add_": 3, "index_put_": 2, "scatter_add_": 3}  # they change as much of a table as this argument
OVERWRITING = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
DEQUANTIZING = {"_four_bit", "_eight_bit"}
UNREAD = {"_rope": ("q_weight", "k_weight"), "_rope_backward": ("x", "q_weight", "k_weight")}  # without norms
Entry = tuple[str, str, float, float]  # part, operation, FLOPs and bytes of one launch


def size(x: Any) -> int:
    """Return the bytes of a tensor on the GPU; elements repeated by a stride of 0 count once."""
    if not fake.is_fake(x):
        return 0
    numbers = 1
    for n, stride in zip(x.shape, x.stride(), strict=True):
        numbers *= n if stride or not n else 1
    return numbers * x.element_size()


def sizes_of(x: Any) -> int:
    return sum(map(size, tree_leaves(x)))


def moved_bytes(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Return the bytes of a PyTorch operation: reads plus writes; what it changes counts twice."""
    total = 0
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if place == 0 and name in PICKING:
            total += sizes_of(out)
        elif place == 0 and name in ADDING:
            total += 2 * sizes_of(args[ADDING[name]])
        else:
            twice = written and not argument.is_out and name not in OVERWRITING
            total += (2 if twice else 1) * sizes_of(value)
    returns = func._schema.returns
    for kind, value in zip(returns, out if len(returns) > 1 else (out,), strict=False):  # lists in place return nothing
        total += 0 if kind.alias_info is not None else sizes_of(value)
    return total


def product_flops(name: str, args: Sequence[Any]) -> float:
    if name not in PRODUCTS:
        assert "mm" not in name and "conv" not in name, f"{name}: a product that is not counted"
        return 0.0
    a, b = args[PRODUCTS[name] :][:2]
    return 2.0 * a.numel() * b.shape[-1]


def flash_flops(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Return the FLOPs of two matmuls over the visible pairs, or five for the backward (arXiv:2307.08691)."""
    q, longest = (args[0], args[5]) if name == "_flash_attention_forward" else (args[1], args[8])
    assert len(q) % longest == 0 and kwargs["window_size_left"] == -1, "equal documents without a window"
    pairs = len(q) * (longest + 1) / 2
    return (4.0 if name == "_flash_attention_forward" else 10.0) * pairs * q.shape[1] * q.shape[2]


def passes(name: str, argument: str, constants: Mapping[str, Any]) -> float:
    """Return how often a Triton kernel reads or writes an argument."""
    if name in UNREAD and not constants["NORMED"] and argument in UNREAD[name]:
        return 0
    if name in ("_rope", "_rope_backward") and argument == "x":  # q and k of a row, v's not
        return constants["HEADS"] / (2 * constants["HEADS"] - constants["QUERY"])
    if name == "_four_bit" and argument in ("levels", "scale"):
        return float(constants["NESTED"])
    if name == "_cross_entropy" and argument == "logits":
        return 3 if constants["GRADIENT"] else 1
    return 2 if (name, argument) == ("_scale", "x") else 1  # in place


def kernel_bytes(kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any]) -> float:
    named = zip(kernel.arg_names, arguments, strict=False)
    return sum(passes(kernel.__name__, name, constants) * size(x) for name, x in named)


def is_in_head() -> bool:
    """Return whether the output embedding or its loss is being computed."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(fake.SOURCE) and Path(frame.f_code.co_filename).name == "head.py":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class Ledger(fake.Meter):
    """Entries by part: products (frozen matmuls), adapters, attention, head, dequantization, element-wise, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: Counter[Entry] = Counter()
        self.all_of = ""  # the part that all entries belong to now

    def ran(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        if "flash_attention" in name:
            part, flops = "attention", flash_flops(name, args, kwargs)
        else:
            flops = product_flops(name, args)
            part = "element-wise"
            if flops:
                a, b = args[PRODUCTS[name] :][:2]
                part = "adapters" if min(*a.shape[-2:], b.shape[-1]) <= NARROW else "products"
        number = fake.launches(name, args)
        self._add(part, name, flops, moved_bytes(func, name, args, kwargs, out) / number, number)

    def launched(self, kernel: Any, grid: Any, arguments: Any, constants: Any) -> None:
        name = kernel.__name__
        part = "dequantization" if name in DEQUANTIZING else "element-wise"
        self._add(part, name, 0.0, kernel_bytes(kernel, arguments, constants))

    def _add(self, part: str, name: str, flops: float, bytes: float, number: int = 1) -> None:
        part = self.all_of or ("head" if is_in_head() else part)
        self.entries[part, name, flops, bytes] += number

    def report(self) -> list[dict[str, Any]]:
        keys = ("part", "operation", "flops", "bytes")
        return [{**dict(zip(keys, entry, strict=True)), "launches": n} for entry, n in self.entries.items()]


def counted(gpu: fake.SimulatedGpu, work: Callable[[], Callable[[Ledger], None]]) -> list[dict[str, Any]]:
    """Return the entries of the function that `work` returns, run on the GPU with Triton kernels."""
    ledger = Ledger()
    with ExitStack() as stack:
        stack.enter_context(patch("strop.engine.kernels.cuda.selftest.find_failures", lambda device: {}))
        stack.enter_context(patch("strop.engine.kernels.cuda.launch.enqueue", ledger.launched))
        stack.enter_context(gpu.present())
        run = work()
        with ledger:
            run(ledger)
    return ledger.report()


def step(gpu: fake.SimulatedGpu, case: Case) -> list[dict[str, Any]]:
    """Count forward, backward, clipping and AdamW on one micro-batch after the first."""

    def work() -> Callable[[Ledger], None]:
        model = build_model(case)
        loss, rows = FastLoss(model, checkpoint_layers=case.checkpointed), case.rows()
        weights = {name: x for name, x in model.named_parameters() if x.requires_grad}
        optimizer = make_optimizer(weights, TrainSection())
        for x in weights.values():
            x.grad = torch.zeros_like(x)
        optimizer.step()  # creates its moments
        optimizer.zero_grad()

        def run(ledger: Ledger) -> None:
            (loss.token_loss(rows) / case.tokens).backward()
            ledger.all_of = "optimizer"
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0, foreach=True)  # not the default for fake tensors
            optimizer.step()
            optimizer.zero_grad()

        return run

    return counted(gpu, work)


def run_known(gpu: fake.SimulatedGpu, operation: str) -> list[dict[str, Any]]:
    """Count one operation on x (8, 16) in bf16, 256 bytes."""

    def work() -> Callable[[Ledger], None]:
        x = torch.zeros(8, 16, dtype=torch.bfloat16, device="cuda")
        return lambda ledger: KNOWN[operation](x)

    return counted(gpu, work)


def _flash(x: Tensor) -> None:
    q = x.new_empty(8, 2, 8)
    ends = torch.empty(3, dtype=torch.int32, device="cuda")  # two documents of 4
    torch.ops.aten._flash_attention_forward(
        q, q, q, ends, ends, 4, 4, 0.0, True, False, scale=1.0, window_size_left=-1, window_size_right=0
    )


def _norm(x: Tensor) -> None:
    from strop.engine.kernels.cuda.elementwise import rms_norm, rms_norm_backward

    rms_norm(x, x[0], 1e-6, 0.0)
    rms_norm_backward(x, x, x[0], 1e-6, 0.0, x)


def _loss(x: Tensor) -> None:
    from strop.engine.kernels.cuda.elementwise import cross_entropy_

    labels = torch.zeros(8, dtype=torch.int64, device="cuda")
    cross_entropy_(x, labels, torch.zeros(8, device="cuda"), 0.0, True)


KNOWN: dict[str, Callable[[Tensor], Any]] = {
    "product": lambda x: x @ x.t(),
    "sum": lambda x: x + x[:1].expand(8, 16),
    "in place": lambda x: x.mul_(2.0),
    "overwritten": lambda x: x.copy_(x.new_empty(8, 16)),
    "picked": lambda x: torch.nn.functional.embedding(torch.zeros(3, dtype=torch.int64, device="cuda"), x),
    "view": lambda x: x[:, 2:].t(),
    "many": lambda x: torch._foreach_mul_([x, x.new_empty(4)], 2.0),
    "flash": _flash,
    "norm": _norm,
    "loss": _loss,
}
