"""Optimizer and learning-rate schedule, both without hidden state: what must survive a crash is in TrainState."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from strop.config.schema import TrainSection
from strop.errors import QuantizerError


def make_optimizer(weights: Mapping[str, nn.Parameter], section: TrainSection) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable weights, in two groups where LoRA+ gives B another rate than A
    (arXiv:2402.12354). Its rate is set before each step.

    8-bit optimizers keep their moments in 8 bit by blocks (arXiv:2110.02861), but for weights below 4,096 numbers.
    """
    ratio = section.lora_plus_ratio
    fast = {name for name in weights if "lora_B" in name or "lora_embedding_B" in name} if ratio != 1 else set()
    groups = [
        {"params": [weight for name, weight in weights.items() if (name in fast) == wanted], "scale": scale}
        for wanted, scale in ((False, 1.0), (True, ratio))
    ]
    make = _MAKERS[section.optimizer]
    return make([group for group in groups if group["params"]], section.weight_decay)


def _adamw(groups: Any, decay: float) -> torch.optim.Optimizer:
    kinds = {weight.device.type for group in groups for weight in group["params"]}
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=decay, fused=kinds <= {"cpu", "cuda"})


def _adamw_8bit(groups: Any, decay: float) -> torch.optim.Optimizer:
    return _bitsandbytes("AdamW8bit", groups, decay)


def _paged_adamw_8bit(groups: Any, decay: float) -> torch.optim.Optimizer:
    return _bitsandbytes("PagedAdamW8bit", groups, decay)


def _lion(groups: Any, decay: float) -> torch.optim.Optimizer:
    return _bitsandbytes("Lion", groups, decay)


def _adafactor(groups: Any, decay: float) -> torch.optim.Optimizer:
    """With the rate as it is given: scaled by a weight's own size, as in the paper, B would never leave zero."""
    from transformers.optimization import Adafactor

    made: torch.optim.Optimizer = Adafactor(
        groups, lr=0.0, weight_decay=decay, scale_parameter=False, relative_step=False
    )
    return made


def _sgd(groups: Any, decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, weight_decay=decay)


def _bitsandbytes(name: str, groups: Any, decay: float) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        what = f"bitsandbytes, which has this optimizer, cannot be used here: {str(error).splitlines()[0]}"
        raise QuantizerError(what, fix="pip install -U bitsandbytes, or --train.optimizer adamw") from None
    made: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(groups, lr=1.0, weight_decay=decay)
    return made


def make_state(optimizer: Any) -> None:
    """What an optimizer holds of each weight, in front of its first step: where there is no memory for it, no weight
    has moved yet, and it can be tried again. (Adafactor's is small, SGD has none.)"""
    for number, group in enumerate(optimizer.param_groups):
        for place, weight in enumerate(group["params"]):
            if not optimizer.state.get(weight):
                try:
                    _make_state_of(weight, optimizer, group, number, place)
                except BaseException:
                    optimizer.state.pop(weight, None)  # half of it would be taken for the whole
                    raise


def _make_state_of(weight: nn.Parameter, optimizer: Any, group: Any, number: int, place: int) -> None:
    """As the optimizer's own first step makes it."""
    if isinstance(optimizer, torch.optim.AdamW):
        where = weight.device if group["fused"] else "cpu"
        step = torch.zeros((), dtype=torch.float32, device=where)
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": step, **moments}
    elif hasattr(optimizer, "init_state"):  # bitsandbytes
        optimizer.init_state(group, weight, number, place)


_MAKERS = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": _paged_adamw_8bit,
    "adafactor": _adafactor,
    "lion": _lion,
    "sgd": _sgd,
}


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Below 1 a share of all steps, else a number of steps."""
    return math.ceil(warmup * total_steps) if warmup < 1 else round(warmup)


def rate_factor(step: int, total_steps: int, warmup: int, scheduler: str) -> float:
    """The rate of a step (from 0) as a share of its peak: linear warmup that never is zero, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    if scheduler == "constant":
        return 1.0
    return 1 - done if scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
