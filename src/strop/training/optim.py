"""Optimizer and learning-rate schedule, both without hidden state: what must survive a crash is in TrainState."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from strop.config.schema import TrainSection


def make_optimizer(weights: Mapping[str, nn.Parameter], section: TrainSection) -> torch.optim.Optimizer:
    """AdamW over the trainable weights, in two groups where LoRA+ gives B another rate than A (arXiv:2402.12354)."""
    ratio = section.lora_plus_ratio
    fast = {name for name in weights if "lora_B" in name or "lora_embedding_B" in name} if ratio != 1 else set()
    groups = [
        {"params": [weight for name, weight in weights.items() if (name in fast) == wanted], "scale": scale}
        for wanted, scale in ((False, 1.0), (True, ratio))
    ]
    fused = all(weight.device.type in ("cpu", "cuda") for weight in weights.values())
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, weight_decay=section.weight_decay, fused=fused
    )


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
