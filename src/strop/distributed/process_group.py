"""Several ranks over torch.distributed: gloo between CPUs, gloo and NCCL between GPUs."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from strop.distributed.assign import assign_balanced
from strop.distributed.devices import (
    AGENT_PREFIX,
    DEFAULT_PORT,
    RESUME,
    Devices,
    RankInfo,
    log_progress,
    threads_requested,
)
from strop.errors import PeerFailed, RunError, StropError, first_line
from strop.machine.doctor import why_no_code
from strop.machine.memory import is_out_of_memory
from strop.machine.probe import available_cores

T = TypeVar("T")
R = TypeVar("R")

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
PREPARE_TIMEOUT = timedelta(days=1)  # rank 0 may read rows for hours
STORE_TIMEOUT_S = 5.0  # for a reply of the store, which runs on rank 0
REGISTRATION_S = 2.0  # time for the remaining ranks to register in the store after a failed collective
MAX_FLAGS = 3
OK, NO_MEMORY, FAILED = 0, 1, 2
SHARED = "known_to_all_ranks"  # attribute of an error that has been exchanged
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element

# `all_gather_into_tensor` is the name up to torch 2.12
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ProcessGroupDevices(Devices):
    """The connected processes of a run. Raises RunError if they cannot connect at MASTER_ADDR."""

    def __init__(self, ranks: RankInfo) -> None:
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.local_rank, self.local_world_size = ranks.local_rank, ranks.local_world_size
        self.communication_s = self.waiting_s = 0.0
        self._failed = False  # all ranks know of a failure; no more collectives are run
        self._silent = False  # another rank reports the failure
        self._exit_code = 1
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._timeout_s = PREPARE_TIMEOUT.total_seconds()
        os.environ.setdefault("MASTER_PORT", DEFAULT_PORT)
        has_gpus = torch.cuda.is_available() and why_no_code() is None
        if not threads_requested():
            torch.set_num_threads(max(1, available_cores() // self.local_world_size))
        if has_gpus:
            torch.cuda.set_device(self.local_rank)
        try:
            launcher_store, _, _ = next(rendezvous("env://", self.rank, self.world_size, timeout=RENDEZVOUS_TIMEOUT))
            store = _make_unused_prefix(launcher_store, self.rank, self.world_size)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if has_gpus else "gloo", store=store, rank=self.rank, world_size=self.world_size,
                timeout=RENDEZVOUS_TIMEOUT,
            )  # fmt: skip
            self._waiting_store = PrefixStore("strop", store)
            self._group = dist.new_group(timeout=PREPARE_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            what = f"rank {self.rank} of {self.world_size} did not reach the others at {address}: {first_line(error)}"
            raise RunError(what, fix="check that all ranks were started and can reach that address") from None
        self.nodes = len(set(self.gather(socket.gethostname())))

    def set_timeout(self, seconds: float) -> None:
        self._timeout_s = seconds
        with self._communicating():
            self._group = dist.new_group(timeout=timedelta(seconds=seconds))

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not getattr(error, SHARED, False):
                self._exchange_status(error)
            raise
        self._exchange_status(None)

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        table = self._exchange_status(None, flags)
        return tuple(bool(table[:, 1 + column].any()) for column in range(len(flags)))

    def run_on_main(self, compute: Callable[[], T]) -> T:
        results: list[Any] = [None]
        with self.all_or_none():
            if self.is_main:
                results = [compute()]
        with self._communicating():
            dist.broadcast_object_list(results, src=0, group=self._group)
        return cast(T, results[0])

    def gather(self, value: T) -> list[T]:
        self._exchange_status(None)
        return self._gather_objects(value)

    def map(
        self, groups: Sequence[T], compute: Callable[[T], R], cost: Callable[[T], float], activity: str = ""
    ) -> list[R]:
        shares = assign_balanced([cost(group) for group in groups], self.world_size)
        own_groups = log_progress([groups[index] for index in shares[self.rank]], activity)
        with self.all_or_none():
            own = self.run_passes(shares.__getitem__, lambda _: compute(next(own_groups)), backward=False)
        by_index = dict(zip(shares[self.rank], own, strict=True))
        results = dict(itertools.chain.from_iterable(part.items() for part in self._gather_objects(by_index)))
        return [results[index] for index in range(len(groups))]

    def run_passes(self, share: Callable[[int], Sequence[T]], compute: Callable[[T], R], *, backward: bool) -> list[R]:
        if self.base is None:
            return super().run_passes(share, compute, backward=backward)
        own, results, failure = share(self.rank), list[R](), None
        for index in range(max(len(share(rank)) for rank in range(self.world_size))):
            self.base.begin(backward=backward)
            try:
                if failure is None and index < len(own):
                    results.append(compute(own[index]))
            except BaseException as error:
                if self._failed:
                    raise
                failure = error  # the other ranks have not finished the pass and need this rank's shards
                traceback.clear_frames(error.__traceback__)
            self.base.end()
        if failure is not None:
            raise failure
        return results

    def start_all_gather(self, out: Tensor, shard: Tensor) -> Callable[[], None]:
        with self._communicating():
            work = _all_gather(out, shard, group=self._group, async_op=True)

        def wait() -> None:
            with self._communicating():
                work.wait()

        return wait

    def all_reduce(self, buffer: Tensor) -> None:
        with self._communicating():
            dist.all_reduce(buffer, group=self._group)

    def broadcast(self, buffer: Tensor, source: int) -> None:
        with self._communicating():
            dist.broadcast(buffer, src=source, group=self._group)

    def check_equal(self, tensors: Callable[[], dict[str, Tensor]]) -> None:
        with self.all_or_none():
            named = tensors()
            own = torch.tensor([_tensor_digest(tensor) for tensor in named.values()], dtype=torch.int64)
        digests = [torch.empty_like(own) for _ in range(self.world_size)]
        with self._communicating():
            dist.all_gather(digests, own, group=self._group)
        table = torch.stack(digests)
        different = (table != table.mode(dim=0).values).nonzero().tolist()
        if different:
            what = "the ranks' weights or optimizer states differ: "
            rank, column = different[0]
            if self.world_size == 2:  # without a majority, either could be wrong
                what += f"{list(named)[column]} differs between rank 0 and rank 1"
            else:
                more = f", and {len(different) - 1} more" if different[1:] else ""
                what += f"{list(named)[column]} of rank {rank} is not that of the others{more}"
            raise RunError(what, fix=f"{RESUME}; if it happens again, test that machine's memory")

    def finish(self, error: BaseException | None) -> StropError | None:
        """Exchange `error`, with which this rank ends, or None. Returns the error to raise instead, or None."""
        if not self._failed:
            try:
                self._exchange_status(error, final=True)
            except StropError as peer_error:
                if error is None:
                    return peer_error
        if error is None:
            dist.destroy_process_group()
        elif self._silent:
            return PeerFailed(self._exit_code)
        elif isinstance(error, StropError):
            if self.rank and not isinstance(error, PeerFailed):
                error.what = f"{self._name}: {error.what}"
        elif isinstance(error, Exception):
            print(f"{self._name}:", file=sys.stderr)
            traceback.print_exception(error)
        return None

    @property
    def _name(self) -> str:
        return f"rank {self.rank} of {self.world_size} ({socket.gethostname()})"

    def _exchange_status(
        self, error: BaseException | None, flags: Sequence[bool] = (), *, final: bool = False
    ) -> Tensor:
        """Exchange each rank's status and flags. Returns them, shape (world_size, 1 + MAX_FLAGS), uint8.

        Raises PeerFailed or MemoryError if another rank failed. final: this rank will not retry, so an out-of-memory
        error is a failure too.
        """
        if self._failed:
            return torch.zeros(self.world_size, 1 + MAX_FLAGS, dtype=torch.uint8)
        status = OK if error is None else FAILED if final or not is_out_of_memory(error) else NO_MEMORY
        table = torch.zeros(self.world_size, 1 + MAX_FLAGS, dtype=torch.uint8)
        own = [status, *map(int, flags)]
        table[self.rank, : len(own)] = torch.tensor(own, dtype=torch.uint8)
        started, before = time.perf_counter(), self.communication_s
        with self._communicating():
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self._group)
        self.communication_s, self.waiting_s = before, self.waiting_s + time.perf_counter() - started
        worst = int(table[:, 0].max())
        if worst == OK:
            return table
        description = "" if error is None else f"{type(error).__name__}: {first_line(error)}"
        reports = self._gather_objects((status, _exit_code(error), description))
        failed_rank = next(rank for rank, (peer_status, _, _) in enumerate(reports) if peer_status == worst)
        _, exit_code, description = reports[failed_rank]
        if worst == NO_MEMORY:
            if error is None:
                text = f"out of memory on rank {failed_rank} of {self.world_size}: {description}"
                raise _mark_shared(MemoryError(text))
            _mark_shared(error)
            return table
        self._failed, self._exit_code = True, exit_code
        self._silent = self.rank != failed_rank
        if status != FAILED:
            raise PeerFailed(self._exit_code)
        return table

    def _gather_objects(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world_size
        with self._communicating():
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def _communicating(self) -> Iterator[None]:
        """Measure the time of a collective operation. If it fails, raise an error that names the missing ranks."""
        if self._parent is not None and os.getppid() != self._parent:
            self._failed = True
            raise RunError("torchrun, which started this process, has ended", fix=RESUME)
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            self._failed = True
            raise self._missing_rank_error(error, time.perf_counter() - started) from None
        self.communication_s += time.perf_counter() - started

    def _missing_rank_error(self, error: RuntimeError, waited: float) -> StropError:
        """Return an error that names the ranks which do not register in the store after a failed collective."""
        missing: list[int] = []

        def register() -> None:
            with suppress(RuntimeError):
                self._waiting_store.set(f"waiting-{self.rank}", str(waited))
                time.sleep(REGISTRATION_S)
                ranks = range(self.world_size)
                missing.extend(rank for rank in ranks if not self._waiting_store.check([f"waiting-{rank}"]))

        thread = threading.Thread(target=register, daemon=True)  # takes minutes if rank 0's machine is unreachable
        thread.start()
        thread.join(REGISTRATION_S + STORE_TIMEOUT_S)
        if thread.is_alive():
            missing = [0]
        timed_out = waited > 0.9 * self._timeout_s
        plural = len(missing) > 1
        names = f"rank{'s' * plural} {', '.join(map(str, missing)) or '0'} {'have' if plural else 'has'}"
        what = f"{names} not answered for {waited:.0f} s (train.timeout)" if timed_out else f"{names} ended"
        reporter = min(set(range(self.world_size)) - set(missing), default=self.rank)
        by_strop = os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(AGENT_PREFIX)
        if self.rank != reporter or (not timed_out and by_strop):  # `launch_processes` reports a process that ended
            return PeerFailed(1)
        fix = "find out what that process was doing, then continue with `strop resume`"
        return RunError(f"{what}: {first_line(error)}", fix=fix)


def _tensor_digest(tensor: Tensor) -> int:
    """Return the sum of bits(element i) * (2 i + 1), modulo 2^64, which changes if any one element changes."""
    bits = tensor.detach().contiguous().flatten().view(INTEGERS[tensor.element_size()]).long()
    return int((bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()) if len(bits) else 0


def _mark_shared(error: BaseException) -> BaseException:
    """Mark an out-of-memory error that all ranks know of, so that an outer all_or_none does not exchange it again."""
    setattr(error, SHARED, True)
    return error


def _make_unused_prefix(store: Store, rank: int, world_size: int) -> Store:
    """Return a view of the store with a new prefix.

    torchrun keeps its store when it restarts processes, including the addresses of processes that have ended. Each rank
    therefore sends a random number to rank 0, which replies under that number with the name of the prefix.
    """
    name = number = uuid.uuid4().hex
    if rank:
        store.set(f"strop-rank-{rank}", number)
        store.wait([f"strop-name-{number}"], RENDEZVOUS_TIMEOUT)
        name = store.get(f"strop-name-{number}").decode()
        store.set(f"strop-joined-{name}-{rank}", "yes")
    missing = set(range(1, world_size)) if rank == 0 else set()
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT.total_seconds()
    while missing:
        for peer in sorted(missing):
            if store.check([f"strop-rank-{peer}"]):
                store.set(f"strop-name-{store.get(f'strop-rank-{peer}').decode()}", name)
            if store.check([f"strop-joined-{name}-{peer}"]):
                missing.discard(peer)
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {', '.join(map(str, sorted(missing)))} did not connect")
        time.sleep(0.01)
    return PrefixStore(name, store)


def _exit_code(error: BaseException | None) -> int:
    if isinstance(error, StropError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 0 if error is None else 1
