"""strop inside another program, which may use torch in its own way, and from several threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock

import torch

from strop.errors import RunError

_TURN = RLock()
_USED_BY: set[int] = set()  # processes: this one, or one that it was forked from


@contextmanager
def default_torch_state() -> Iterator[None]:
    """Inside it this thread uses torch as at a program's start: with gradients, without autocast, on the CPU where no
    device is named."""
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
    """As `default_torch_state`, and in fp32 where no type is named. The program's random numbers go on behind it as if none had
    been drawn inside.

    The type and the random numbers are one for all threads, and transformers changes more such things while it loads:
    a second thread waits. Raises RunError in a process that was forked from one that was here: it lacks its threads.
    """
    if _USED_BY - {os.getpid()}:
        what = "this process was forked from one that has used strop, and lacks the threads that compute"
        raise RunError(what, fix='start it with multiprocessing.get_context("spawn")')
    with ExitStack() as stack:
        stack.enter_context(_TURN)
        _USED_BY.add(os.getpid())
        started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cards = [torch.cuda.current_device()] if started else []
        stack.enter_context(torch.random.fork_rng(devices=cards))
        stack.enter_context(default_torch_state())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        yield
