"""Calls of the user's code, with a time limit: reward functions, and the members of environments.

Calls of `async` functions run in one event loop, in a thread. Other calls of an object run in a worker, a thread that
the object keeps, because some libraries bind a connection to the thread that opens it. So a call waits only for calls
of objects with the same worker.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

from strop.evaluation.metrics import USER_CODE_ERRORS, time_limit

MAX_WORKERS = 64
INTERRUPT_S = 0.5  # a thread that has not ended a call by then is in a call that Python cannot interrupt
T = TypeVar("T")


class _TooSlow(Exception):
    """A call took longer than the time limit."""


@dataclass(frozen=True)
class CallError:
    """The failure of a call of the user's code. text: the exception as text."""

    text: str
    timed_out: bool = False


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a function is `async`, also one that `functools.wraps` decorates."""
    return inspect.iscoroutinefunction(inspect.unwrap(function)) or inspect.iscoroutinefunction(type(function).__call__)


def call_within(timeout: float, function: Callable[[], Any]) -> Any:
    """Return the result of a call, or a CallError, also if the function catches the exception that ends it."""
    started, result = time.monotonic(), None
    try:
        with time_limit(timeout, cpu_time=False):
            result = function()
    except USER_CODE_ERRORS as error:
        if not isinstance(error, TimeoutError) or time.monotonic() - started < timeout:
            return _call_error(error)
    return CallError("", timed_out=True) if time.monotonic() - started >= timeout else result


def call_together(calls: Sequence[Callable[[], Coroutine[Any, Any, Any]]], timeout: float) -> list[Any]:
    """Run coroutines concurrently. Returns the result of each in order, or its CallError."""
    return run_together([call_async(call, timeout) for call in calls])


def run_together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently in the event loop, and return their results in order."""

    async def gather() -> list[T]:
        return list(await asyncio.gather(*coroutines))

    return start(gather()).result()


def start(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Schedule a coroutine in the event loop, and return its future."""
    return asyncio.run_coroutine_threadsafe(coroutine, _event_loop())


async def call_async(call: Callable[[], Coroutine[Any, Any, Any]], timeout: float) -> Any:
    """Return the result of an `async` function of the user, or its CallError. timeout: in seconds."""

    async def call_guarded() -> Any:
        try:
            return await call()
        except (SystemExit, KeyboardInterrupt) as error:  # would end the loop's thread
            return _call_error(SystemExit(str(error)))

    started, result = time.monotonic(), None
    try:
        result = await asyncio.wait_for(call_guarded(), timeout)
    except asyncio.TimeoutError as error:
        if time.monotonic() - started < timeout:
            return _call_error(error)  # the function's own
    except (*USER_CODE_ERRORS, asyncio.CancelledError) as error:  # nobody else cancels it
        return _call_error(error)
    if time.monotonic() - started >= timeout:  # also if it blocks, or catches its cancellation
        return CallError("", timed_out=True)
    return result


class Worker:
    """A thread that runs calls one after the other. It is replaced if it cannot be interrupted."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._start_thread()

    def _start_thread(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=_run_jobs, args=(self._jobs,), name="environment", daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[], Any], timeout: float) -> Any:
        """Return the result of a call in the thread, or its CallError. timeout: in seconds, without waiting."""
        async with self._lock:
            job = _Job(function, asyncio.get_running_loop())
            self._jobs.put(job)
            if not (await asyncio.wait({job.ended}, timeout=timeout))[0]:
                job.interrupt(self._thread)
                if not (await asyncio.wait({job.ended}, timeout=INTERRUPT_S))[0]:
                    self._jobs.put(None)  # the thread ends after the call
                    self._start_thread()
                return CallError("", timed_out=True)
            return CallError("", timed_out=True) if job.seconds >= timeout else job.ended.result()


class _Job:
    """A call in a worker. ended: has the result, or a CallError. seconds: how long it took."""

    def __init__(self, function: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._function, self._loop = function, loop
        self.ended: asyncio.Future[Any] = loop.create_future()
        self.seconds = 0.0
        self._lock, self._is_over, self._interrupted = threading.Lock(), False, False

    def run(self) -> None:
        """Call the function, and set the result. Called in the worker's thread."""
        started, result = time.monotonic(), None
        try:
            try:
                result = self._function()
            except BaseException as error:  # nothing may end the thread
                result = _call_error(error)
            with self._lock:
                self._is_over = True
            for _ in range(1000 * self._interrupted):  # the exception is raised within a few instructions
                pass
        except _TooSlow:
            pass
        self.seconds = time.monotonic() - started
        self._loop.call_soon_threadsafe(self.ended.set_result, result)

    def interrupt(self, thread: threading.Thread) -> None:
        """Raise an exception in the call, as soon as it executes Python code."""
        with self._lock:
            if not self._is_over and thread.ident is not None:
                self._interrupted = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TooSlow))


def _run_jobs(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()


def _call_error(error: BaseException) -> CallError:
    try:
        text = str(error)
    except USER_CODE_ERRORS:  # its own __str__ fails
        text = "no text"
    return CallError(f"{type(error).__name__}: {text}", timed_out=isinstance(error, _TooSlow))


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return a loop that runs in a thread until the process ends, so that clients can keep their connections."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
