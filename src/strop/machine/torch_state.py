"""Isolate strop's use of torch from the program around it, and its threads from each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock

import torch

from strop.errors import RunError

_LOCK = RLock()
_USED_BY: set[int] = set()  # ids of this process, or of one that it was forked from


@contextmanager
def default_torch_state() -> Iterator[None]:
    """Reset this thread's torch state inside the block: with gradients, without autocast, on the CPU by default."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def isolated_torch_state() -> Iterator[None]:
    """Extend `default_torch_state` with the process-wide state: fp32 as default dtype, preserved random streams."""
    # transformers changes more of that kind while it loads, so a second thread waits. A process forked from one that
    # has used strop gets a RunError: torch's compute threads are missing.
    if _USED_BY - {os.getpid()}:
        what = "this process was forked from one that has used strop, so torch's compute threads are missing"
        raise RunError(what, fix='start it with multiprocessing.get_context("spawn")')
    with ExitStack() as stack:
        stack.enter_context(_LOCK)
        _USED_BY.add(os.getpid())
        uses_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = [torch.cuda.current_device()] if uses_cuda else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(default_torch_state())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        yield
