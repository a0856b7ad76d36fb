"""Flash attention 3 (Shah et al., arXiv:2407.08608) on Hopper, where it is installed: newer PyTorch can put it in the
place of its own, and does so only when it is asked."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.attention
from torch import Tensor

from strop.engine.kernels.cuda.attention import flash, flash_backward
from strop.engine.train.attention import Heads
from strop.engine.train.packing import Varlen

LOG = logging.getLogger(__name__)

NAME, PACKAGE, HOPPER = "FA3", "flash_attn_interface", 9
NEAR = 2e-2  # of numbers around 1 in bf16, each rounded several times on its way


@cache
def why_not(device: torch.device) -> str | None:
    """Has this process compute attention by it from here on. None where that is so, else why not, in a line."""
    known: Any = torch.nn.attention
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return "it is for Hopper"
    if not hasattr(known, "activate_flash_attention_impl") or NAME not in known.list_flash_attention_impls():
        return "this PyTorch does not know of it"
    if find_spec(PACKAGE) is None:
        return "it is not installed"
    before = _trial(device)
    try:
        known.activate_flash_attention_impl(NAME)
        found = _trial(device)
        near = (((a.float() - b.float()).abs() <= NEAR).all() for a, b in zip(found, before, strict=True))
        why = None if all(map(bool, near)) else "its numbers are wrong here"
    except Exception as error:  # whatever ails it, PyTorch's own is there
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if why is not None:
        known.restore_flash_attention_impl()
        LOG.warning("flash attention 3 is installed and cannot be used: %s", why)
    return why


def _trial(device: torch.device) -> list[Tensor]:
    """Outputs and gradients of two documents of 40 and 24 tokens, with four heads of q on two, and with a window."""
    made = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(64, heads, 64, generator=made).to(device, torch.bfloat16) for heads in (4, 2, 2, 4)
    )  # fmt: skip
    ends, found = torch.tensor([0, 40, 64], dtype=torch.int32).to(device), []
    cut = Varlen(ends, ends, 40, 40, None)
    for window in (0, 16):
        heads = Heads(cast(Any, None), 4, 2, 64, 0.125, window, 0.0, None, None)
        out, *kept = flash(q, k, v, cut, heads)
        found += [out, *flash_backward(grad, (q, k, v), out, kept, cut, heads)]
    return found
