"""Compare the operations of the fast step on a GPU with others, on small inputs, once for each GPU and version.

Triton compiles a kernel, and the C code that launches it, at the first launch. This fails without a C compiler, without
Python's headers, or on a GPU that Triton does not support. An operation that fails or is wrong is not used: PyTorch's
other operations replace it, and the rest stays as it is.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from strop.engine.kernels import eager
from strop.engine.kernels.operations import (
    DORA,
    DROPOUT,
    EFFICIENT,
    EIGHT_BIT,
    FLASH,
    FOUR_BIT,
    FP32_SUMS,
    FUSED_ADAMW,
    GLU,
    LOSS,
    NORM,
    ROPE,
    SINKS,
    TRITON,
)
from strop.engine.train import dropout
from strop.engine.train.attention import Heads
from strop.engine.train.packing import Varlen
from strop.errors import DeviceError, QuantizerError, first_line
from strop.machine.memory import is_out_of_memory
from strop.machine.probe import nvidia_smi
from strop.models.quantize import QuantizedLinear, quantize_weight
from strop.runs.folder import cache_folder, read_json, write_json

LOG = logging.getLogger(__name__)

Pairs = Iterator[tuple[Tensor, Tensor]]  # results, and what is expected
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative to 1 + the largest value
WRONG = "its results are wrong"
WINDOWS = ((0, 0), (16, 0), (0, 16), (9, 16))  # (window, length of a prefix) of the attention that is tried
MAX_ENDED = 2  # processes; one may have been killed by somebody while it tried an operation


@cache
def find_failures(device: torch.device) -> Mapping[str, str]:
    """Return the operations that cannot be used on this GPU, and why, in one line each.

    Raises DeviceError if one leaves the GPU unusable in this process; the next process does not try it.
    """
    file, key = _results_file(), _describe_versions(device)
    found: dict[str, Any] = dict(read_json(file).get(key, {}))
    if not all(isinstance(found.get(name), str) for name in CHECKS):
        LOG.info("trying each operation of a step on this GPU")
    for name, check in CHECKS.items():
        if isinstance(found.get(name), str):
            continue
        number, started, ended = found.get(name) or (0, 0.0, 0)
        ended += not _is_running(number, started) if number else 0  # another rank may be trying it
        if ended >= MAX_ENDED:
            found[name] = f"it ended {ended} processes"
        else:
            _save(file, key, {name: [*_this_process(), ended]})  # the only trace if the process ends here
            try:
                found[name] = _try(check, device, name)
            except BaseException as error:  # out of memory and Ctrl-C say nothing about the operation
                _save(file, key, {name: error.what if isinstance(error, DeviceError) else None})
                raise
        _save(file, key, {name: found[name]})
    return {name: found[name] for name in CHECKS if found[name]}


def describe(failures: Mapping[str, str]) -> str:
    """Return the failures in one line."""
    reasons = {reason: [name for name in failures if failures[name] == reason] for reason in failures.values()}
    parts = [
        f"{'Triton' if set(names) >= TRITON else ', '.join(names)} cannot be used: {reason}"
        for reason, names in reasons.items()
    ]
    return "; ".join(parts)


def _describe_versions(device: torch.device) -> str:
    names = ("strop", "torch", "triton", "bitsandbytes")
    versions = [f"{name} {_version(name)}" for name in names]
    driver = ", ".join(nvidia_smi("driver_version")[:1])
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    # of a cache that several machines share, each has its own entry, with the numbers of its processes
    return ", ".join([*versions, f"driver {driver}", gpu, socket.gethostname()])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _this_process() -> list[Any]:
    """Return the number of this process and the time of its start: in containers, numbers are soon used again."""
    process = psutil.Process()
    return [process.pid, process.create_time()]


def _is_running(number: int, started: float) -> bool:
    try:
        return abs(psutil.Process(number).create_time() - started) < 1
    except psutil.Error:
        return False


def _results_file() -> Path:
    return cache_folder() / "gpu_operations.json"


def _save(file: Path, key: str, results: Mapping[str, Any]) -> None:
    """Store a reason, "" for an operation that works, or the process that tries it and how many it ended."""
    stored = read_json(file)
    with suppress(OSError):  # in a read-only cache each process tries again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**stored, key: {**stored.get(key, {}), **results}})


def _try(check: Callable[[torch.device], Pairs], device: torch.device, name: str) -> str:
    """Return why an operation cannot be used, or ""."""
    try:
        return "" if all(_is_close(*pair) for pair in check(device)) else WRONG
    except QuantizerError:
        return ""  # without bitsandbytes there are no weights of such a kind
    except CalledProcessError:
        return "the C compiler failed (are Python's headers installed?)"
    except Exception as error:  # whatever fails, training continues with PyTorch's operations
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:  # after an illegal access, no other operation works in this process
        what = f"{name} made the GPU fail: {first_line(error)}"
        raise DeviceError(what, fix="start again: it is left out from now on") from None
    return reason


def _is_close(result: Tensor, expected: Tensor) -> bool:
    bound = TOLERANCE[result.dtype] * (1 + expected.float().abs().max())
    return bool(((result.float() - expected.float()).abs() <= bound).all())


def _dtypes(device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float32, torch.float16 if is_old else torch.bfloat16


def _random(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device)


def _both(name: str, ours: Any, others: Any, *arguments: Any) -> tuple[Any, Any]:
    return getattr(ours, name)(*arguments), getattr(others, name)(*arguments)


def _norm(device: torch.device) -> Pairs:
    from strop.engine.kernels.cuda import elementwise

    for dtype in _dtypes(device):
        x, grad, weight = (_random(device, *shape).to(dtype) for shape in ((5, 576), (5, 576), (576,)))
        yield _both("rms_norm", elementwise, eager, x, weight, 1e-6, 1.0)
        yield _both("rms_norm_backward", elementwise, eager, grad, x, weight, 1e-6, 1.0)


def _glu(device: torch.device) -> Pairs:
    from strop.engine.kernels.cuda import elementwise

    for dtype in _dtypes(device):
        x, grad = _random(device, 5, 768).to(dtype), _random(device, 5, 384).to(dtype)
        for activation in ("silu", "gelu_pytorch_tanh"):
            yield _both("glu", elementwise, eager, x, activation)
            yield from zip(*_both("glu_backward", elementwise, eager, grad, x, activation), strict=True)


def _rope(device: torch.device) -> Pairs:
    from strop.engine.kernels.cuda import rope
    from strop.engine.kernels.cuda.attention import EAGER_ROPE
    from strop.engine.train.attention import ApplyRope
    from strop.engine.train.norms import Norm

    angles = _random(device, 5, 32)
    turns = angles.cos(), angles.sin()
    for dtype in _dtypes(device):
        weight = _random(device, 64).to(dtype)
        for norm in (None, Norm(cast(Any, eager), weight, 1e-6, 0.0)):
            heads = Heads(cast(Any, eager), 4, 2, 64, 1.0, 0, 0.0, norm, norm)
            qkv = _random(device, 5, 8 * 64).to(dtype)
            yield from zip(*_both("rotate_qk", rope, EAGER_ROPE, qkv, heads, *turns), strict=True)
            grads = tuple(_random(device, 5, many, 64).to(dtype) for many in (4, 2, 2))
            yield _both("rotate_qk_backward", rope, EAGER_ROPE, grads, qkv, heads, *turns)
        for interleaved in (False, True):
            yield _both("apply", rope.ApplyRope, ApplyRope, qkv, heads, *turns, interleaved, None)


def _loss(device: torch.device) -> Pairs:
    from strop.engine.kernels.cuda import elementwise

    labels, weights = torch.tensor([3, 20000, 0], device=device), torch.tensor([1.0, 0.5, 0.0], device=device)
    for dtype in _dtypes(device):
        for softcap in (0.0, 30.0):
            logits = [(4 * _random(device, 3, 20003)).to(dtype) for _ in range(2)]
            losses = [
                op.cross_entropy_(x, labels, weights, softcap, True)
                for op, x in zip((elementwise, eager), logits, strict=True)
            ]
            yield losses[0].float(), losses[1]
            yield logits[0], logits[1]


def _dora(device: torch.device) -> Pairs:
    from strop.engine.kernels.cuda import elementwise

    gains = _random(device, 130).abs()
    for dtype in _dtypes(device):
        x, y = (_random(device, rows, 130).to(dtype) for rows in (7, 7))
        yield elementwise.scale_columns_(x.clone(), gains), eager.scale_columns_(x.clone(), gains)
        yield from zip(*_both("scale_columns_backward", elementwise, eager, x, y, gains), strict=True)


def _dropout(device: torch.device) -> Pairs:
    from strop.engine.kernels.cuda import dropout as kernels

    keys = torch.arange(1, 8, device=device) * 123456789
    dropped = dropout.DropoutSpec(3, 4, keys, (0, 5), (20000, 40000))
    for dtype in _dtypes(device):
        x, grad = _random(device, 7, 130).to(dtype), _random(device, 7, 260).to(dtype)
        yield _both("apply_masks", kernels, dropout, x, dropped)
        yield _both("apply_masks_backward", kernels, dropout, grad, dropped)


def _quantized(scheme: str) -> Callable[[torch.device], Pairs]:
    def check(device: torch.device) -> Pairs:
        from strop.engine.kernels.cuda import dequantize

        weight = _random(torch.device("cpu"), 70, 512)
        for double in (False, True):
            packed = quantize_weight(weight, scheme, double=double)
            for dtype in _dtypes(device):
                layer = QuantizedLinear(nn.Linear(512, 70, bias=False), scheme, dtype)
                layer.load_packed(packed)
                expected = layer.dequantize()
                yield layer.to(device).dequantize_by(dequantize), expected.to(device)

    return check


def _flash(device: torch.device) -> Pairs:
    from strop.engine.kernels.cuda.attention import flash_backward, flash_forward, has_flash

    if has_flash(device):
        for window, prefix in WINDOWS:
            yield from _attention(device, _dtypes(device)[1], flash_forward, flash_backward, window, prefix)


def _efficient(device: torch.device) -> Pairs:
    from strop.engine.kernels.cuda.attention import efficient_backward, efficient_forward

    for dtype in _dtypes(device):
        for window, prefix in WINDOWS:
            yield from _attention(device, dtype, efficient_forward, efficient_backward, window, prefix)


def _sinks(device: torch.device) -> Pairs:
    from strop.engine.kernels.cuda import attention

    dtype, sinks = _dtypes(device)[1], _random(device, 4)
    yield from _attention(device, dtype, attention.efficient_forward, attention.efficient_backward, 9, 16, sinks)
    if attention.has_flash(device):
        yield from _attention(device, dtype, attention.flash_forward, attention.flash_backward, 9, 16, sinks)


def _attention(
    device: torch.device, dtype: torch.dtype, forward: Any, backward: Any, window: int, prefix: int,
    sinks: Tensor | None = None,
) -> Pairs:  # fmt: skip
    """Check outputs and gradients of two documents. prefix: number of keys before those of the first document."""
    from strop.engine.kernels.cuda.attention import add_sinks

    query_ends, key_ends = [0, 40, 64], [0, 40 + prefix, 64 + prefix]
    ends = [torch.tensor(x, dtype=torch.int32, device=device) for x in (query_ends, key_ends)]
    varlen = Varlen(ends[0], ends[1], 40, 40 + prefix, None)
    shapes = ((64, 4), (64 + prefix, 2), (64 + prefix, 2), (64, 4))
    q, k, v, grad = (_random(device, rows, many, 64).to(dtype) for rows, many in shapes)
    heads = Heads(cast(Any, None), 4, 2, 64, 0.125, window, 0.0, None, None)
    out, *saved = forward(q, k, v, varlen, heads)
    if sinks is not None:
        out, saved[0] = add_sinks(out, saved[0], varlen, sinks)
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    spans = zip(pairwise(query_ends), pairwise(key_ends), strict=True)
    parts = [_masked_attention(wide[0][a:b], wide[1][c:d], wide[2][c:d], window, sinks) for (a, b), (c, d) in spans]
    expected = torch.cat(parts)
    yield out, expected.detach()
    grads = backward(grad, (q, k, v), out, saved, varlen, heads)
    yield from zip(grads, torch.autograd.grad(expected, wide, grad.float()), strict=True)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: Tensor | None = None) -> Tensor:
    """Return causal attention (T, 4, size) of a document, whose last query sees its last key. k, v: (keys, 2, size)."""
    q, k, v = (x.repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in (q, k, v))
    mask = eager.causal_mask(q.shape[1], k.shape[1], k.shape[1] - q.shape[1], window, q.device)
    scores = (0.125 * q @ k.transpose(1, 2)).masked_fill(mask, -math.inf)
    if sinks is not None:  # a key without a value
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(scores[0]), 1)], 2)
    return (scores.softmax(2)[..., : len(v[0])] @ v).transpose(0, 1)


def _fp32_sums(device: torch.device) -> Pairs:
    a, b = (_random(device, *shape).to(_dtypes(device)[1]) for shape in ((16, 300), (300, 40)))
    yield torch.mm(a, b, out_dtype=torch.float32), a.float() @ b.float()


def _fused_adamw(device: torch.device) -> Pairs:
    weights = [nn.Parameter(_random(device, 40, 30)) for _ in range(2)]
    for fused, weight in zip((True, False), weights, strict=True):
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused, foreach=False)
        for step in (1, 2):
            weight.grad = _random(device, 40, 30 + step)[:, :30].clone()
            optimizer.step()
    yield weights[0].detach(), weights[1].detach()


CHECKS: dict[str, Callable[[torch.device], Pairs]] = {
    NORM: _norm, GLU: _glu, ROPE: _rope, LOSS: _loss, DORA: _dora, DROPOUT: _dropout, FOUR_BIT: _quantized("nf4"),
    EIGHT_BIT: _quantized("int8"), FLASH: _flash, EFFICIENT: _efficient, SINKS: _sinks, FP32_SUMS: _fp32_sums,
    FUSED_ADAMW: _fused_adamw,
}  # fmt: skip
