"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from strop.config.schema import TrainSection
from strop.engine.kernels.dispatch import gpu_failures
from strop.engine.kernels.operations import FUSED_ADAMW
from strop.errors import QuantizerError, first_line


def make_optimizer(weights: Mapping[str, nn.Parameter], section: TrainSection) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of the trainable weights. `set_rate` sets its learning rate before each step.

    With LoRA+ (arXiv:2402.12354), B has a scaled rate. Only matrices decay: norms, biases and DoRA's magnitudes would
    draw the base's weights towards zero. 8-bit optimizers (arXiv:2110.02861) store the moments of weights with fewer
    than 4,096 elements in fp32.
    """
    ratio = section.lora_plus_ratio
    scaled = {name for name in weights if "lora_B" in name or "lora_embedding_B" in name} if ratio != 1 else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, weight in weights.items():
        decays = not section.weight_decay or weight.ndim > 1
        groups.setdefault((name in scaled, decays), []).append(weight)
    described = [
        {"params": group, "scale": ratio if is_scaled else 1.0} | ({} if decays else {"weight_decay": 0.0})
        for (is_scaled, decays), group in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]
    return _OPTIMIZERS[section.optimizer](described, section.weight_decay)


def _adamw(groups: Any, decay: float) -> torch.optim.Optimizer:
    devices = {weight.device for group in groups for weight in group["params"]}
    fused = all(x.type == "cpu" or (x.type == "cuda" and FUSED_ADAMW not in gpu_failures(x)) for x in devices)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=decay, fused=fused)


def _adafactor(groups: Any, decay: float) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # scale_parameter scales the rate by the weight's magnitude, so that B would stay zero
    optimizer: torch.optim.Optimizer = Adafactor(
        groups, lr=0.0, weight_decay=decay, scale_parameter=False, relative_step=False
    )
    return optimizer


def _sgd(groups: Any, decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, weight_decay=decay)


def _bitsandbytes(name: str, groups: Any, decay: float) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        what = f"bitsandbytes, which has this optimizer, cannot be used here: {first_line(error)}"
        raise QuantizerError(what, fix="pip install -U bitsandbytes, or --train.optimizer adamw") from None
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(groups, lr=1.0, weight_decay=decay)
    return optimizer


_OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": partial(_bitsandbytes, "AdamW8bit"),
    "paged_adamw_8bit": partial(_bitsandbytes, "PagedAdamW8bit"),
    "adafactor": _adafactor,
    "lion": partial(_bitsandbytes, "Lion"),
    "sgd": _sgd,
}


def allocate_state(optimizer: Any) -> None:
    """Allocate the optimizer's state before the first step, so that the step can be retried if memory runs out."""
    for number, group in enumerate(optimizer.param_groups):
        for index, weight in enumerate(group["params"]):
            if not optimizer.state.get(weight):
                try:
                    _allocate_state(weight, optimizer, group, number, index)
                except BaseException:
                    optimizer.state.pop(weight, None)  # a partial state would be treated as complete
                    raise


def _allocate_state(weight: nn.Parameter, optimizer: Any, group: Any, number: int, index: int) -> None:
    if isinstance(optimizer, torch.optim.AdamW):
        device = weight.device if group["fused"] else "cpu"
        step = torch.zeros((), dtype=torch.float32, device=device)
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": step, **moments}
    elif hasattr(optimizer, "init_state"):  # bitsandbytes
        optimizer.init_state(group, weight, number, index)


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Return the number of warmup steps. warmup: a number of steps, or below 1 a share of all steps."""
    return math.ceil(warmup * total_steps) if warmup < 1 else round(warmup)


def rate_factor(step: int, total_steps: int, warmup: int, scheduler: str) -> float:
    """Return the learning rate of a step (from 0) as a share of its peak: linear warmup, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    if scheduler == "constant":
        return 1.0
    return 1 - done if scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
