"""Isolate strop's use of torch from the calling program, and strop's threads from each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock

import torch

from strop.errors import RunError

_LOCK = RLock()
_USED_BY: set[int] = set()  # ids of processes that used strop: this one, or one from which it was forked


@contextmanager
def default_torch_state() -> Iterator[None]:
    """Reset this thread's torch state inside the block: gradients on, autocast off, CPU as default device."""
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
    """Reset this thread's torch state and the default dtype inside the block, and restore the random states after it.

    Other threads wait, because transformers changes more process-wide state while it loads a model. Raises RunError if
    this process was forked from one that has used strop, because torch's compute threads do not exist in it.
    """
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
