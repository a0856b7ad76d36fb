"""Several ranks over torch.distributed: gloo between CPUs, gloo and nccl between cards. See `group` for the rule."""

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
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from strop.distributed.assign import deal
from strop.distributed.devices import Devices
from strop.distributed.digest import digest
from strop.distributed.environment import OWN_AGENT, PORT, Place, threads_of
from strop.errors import PeerFailed, RunError, StropError
from strop.machine.memory import is_out_of_memory

T = TypeVar("T")
R = TypeVar("R")

MEETING = timedelta(minutes=10)  # until all ranks are there
PREPARING = timedelta(days=1)  # rank 0 may read rows for hours
ANSWER_S = 5.0  # for rank 0's host to say who is there
GRACE_S = 2.0  # in which ranks that were waiting say so, after one was not heard of
WISHES = 3
OK, NO_MEMORY, FAILED = 0, 1, 2
KNOWN = "every_rank_knows"  # an attribute of an error


# the older name of the same, up to torch 2.12
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group(Devices):
    def __init__(self, place: Place) -> None:
        self.rank, self.world = place.rank, place.world
        self.local, self.local_world = place.local, place.local_world
        self.communication_s = self.waiting_s = 0.0
        self._over = self._silent = False  # a failure was told to all; it is another rank that prints it
        self._code = 1
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._limit = PREPARING.total_seconds()
        os.environ.setdefault("MASTER_PORT", PORT)
        cards = torch.cuda.is_available()
        if (threads := threads_of(place)) is not None:
            torch.set_num_threads(threads)
        if cards:
            torch.cuda.set_device(self.local)
        try:
            shared, _, _ = next(rendezvous("env://", self.rank, self.world, timeout=MEETING))
            store = _fresh(shared, self.rank, self.world)
            backend = "cpu:gloo,cuda:nccl" if cards else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=MEETING)
            self._marks = PrefixStore("strop", store)
            self._group = dist.new_group(timeout=PREPARING)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            what = f"rank {self.rank} of {self.world} has not met the others at {where}: {_first_line(error)}"
            raise RunError(what, fix="all ranks must be started, and reach that address") from None
        self._trouble = 0
        self.nodes = len(set(self.gather(socket.gethostname())))

    def limit(self, seconds: float) -> None:
        self._limit = seconds
        with self._sending():
            self._group = dist.new_group(timeout=timedelta(seconds=seconds))

    def together(self) -> AbstractContextManager[None]:
        return _Block(self)

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        found = self._flags(None, wishes)
        return tuple(bool(found[:, 1 + place].any()) for place in range(len(wishes)))

    def once(self, make: Callable[[], T]) -> T:
        made: list[Any] = [None]
        with self.together():
            if self.main:
                made = [make()]
        with self._sending():
            dist.broadcast_object_list(made, src=0, group=self._group)
        found: T = made[0]
        return found

    def gather(self, value: T) -> list[T]:
        self._flags(None)
        return self._gathered(value)

    def each(self, groups: Sequence[T], compute: Callable[[T], R], cost: Callable[[T], float]) -> list[R]:
        shares = deal([cost(group) for group in groups], self.world)
        with self.together():
            made = self.turns(shares.__getitem__, lambda place: compute(groups[place]), backward=False)
        own = dict(zip(shares[self.rank], made, strict=True))
        found = dict(itertools.chain.from_iterable(part.items() for part in self._gathered(own)))
        return [found[place] for place in range(len(groups))]

    def turns(self, share: Callable[[int], Sequence[T]], compute: Callable[[T], R], *, backward: bool) -> list[R]:
        if self.base is None:
            return super().turns(share, compute, backward=backward)
        own, found, failed = share(self.rank), list[R](), None
        for turn in range(max(len(share(rank)) for rank in range(self.world))):
            self.base.begin(backward=backward)
            try:
                if failed is None and turn < len(own):
                    found.append(compute(own[turn]))
            except BaseException as error:
                if self._over:
                    raise
                failed = error  # the others are on their way through the layers, and need this rank's part
                traceback.clear_frames(error.__traceback__)
            self.base.end()
        if failed is not None:
            raise failed
        return found

    def begin_gather(self, whole: Tensor, own: Tensor) -> Callable[[], None]:
        with self._sending():
            work = _all_gather(whole, own, group=self._group, async_op=True)

        def wait() -> None:
            with self._sending():
                work.wait()

        return wait

    def add_up(self, buffer: Tensor) -> None:
        with self._sending():
            dist.all_reduce(buffer, group=self._group)

    def send(self, buffer: Tensor, source: int) -> None:
        with self._sending():
            dist.broadcast(buffer, src=source, group=self._group)

    def compare(self, tensors: Callable[[], dict[str, Tensor]]) -> None:
        with self.together():
            named = tensors()
            own = digest(named.values())
        every = [torch.empty_like(own) for _ in range(self.world)]
        with self._sending():
            dist.all_gather(every, own, group=self._group)
        table = torch.stack(every)
        different = (table != table.mode(dim=0).values).nonzero().tolist()
        if different:
            what = "the ranks no longer hold the same numbers: "
            if self.world == 2:  # nobody can say which of two is wrong
                what += f"{list(named)[different[0][1]]} differs between rank 0 and rank 1"
            else:
                said = [f"{list(named)[at]} of rank {rank}" for rank, at in different]
                what += f"{said[0]} is not that of the others" + (f", and {len(said) - 1} more" if said[1:] else "")
            raise RunError(what, fix="go on from the last checkpoint with `strop resume`; again: test that memory")

    def finish(self, error: BaseException | None) -> StropError | None:
        """The end of this rank's work. Gives what is to be raised in the place of `error`, if anything is."""
        if not self._over:
            try:
                self._flags(error, final=True)
            except StropError as found:
                if error is None:
                    return found
        if error is None:
            dist.destroy_process_group()
        elif self._silent:
            return PeerFailed(self._code)
        elif isinstance(error, StropError):
            if self.rank and not isinstance(error, PeerFailed):
                error.what = f"{self._name}: {error.what}"
        elif isinstance(error, Exception):
            print(f"{self._name}:", file=sys.stderr)
            traceback.print_exception(error)
        return None

    @property
    def _name(self) -> str:
        return f"rank {self.rank} of {self.world} ({socket.gethostname()})"

    def _flags(self, error: BaseException | None, wishes: Sequence[bool] = (), *, final: bool = False) -> Tensor:
        """The one tiny reduction: (world, 1 + WISHES) uint8, each rank's state and wishes. final: this rank will not
        try again with less memory.

        Raises what this rank is to raise because of another's state.
        """
        if self._over:
            return torch.zeros(self.world, 1 + WISHES, dtype=torch.uint8)
        state = OK if error is None else FAILED if final or not is_out_of_memory(error) else NO_MEMORY
        flags = torch.zeros(self.world, 1 + WISHES, dtype=torch.uint8)
        own = [state, *map(int, wishes)]
        flags[self.rank, : len(own)] = torch.tensor(own, dtype=torch.uint8)
        started, before = time.perf_counter(), self.communication_s
        with self._sending():
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        self.communication_s, self.waiting_s = before, self.waiting_s + time.perf_counter() - started
        worst = int(flags[:, 0].max())
        if worst == OK:
            return flags
        told = self._gathered((state, _code_of(error), _said(error)))
        worse = [rank for rank, (found, _, _) in enumerate(told) if found == worst]
        if worst == NO_MEMORY:
            if error is None:
                raise _known(MemoryError(f"out of memory on rank {worse[0]} of {self.world}: {told[worse[0]][2]}"))
            _known(error)
            return flags
        self._over, self._code = True, told[worse[0]][1]
        self._silent = self.rank != worse[0]
        if state != FAILED:
            raise PeerFailed(self._code)
        return flags

    def _gathered(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.world
        with self._sending():
            dist.all_gather_object(found, value, group=self._group)
        return found

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """Counts the time, and tells who is missing where a rank is gone or does not answer."""
        if self._parent is not None and os.getppid() != self._parent:
            self._over = True
            raise RunError("torchrun, which started this process, is gone", fix="go on with `strop resume`")
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            self._over = True
            raise self._missing(error, time.perf_counter() - started) from None
        self.communication_s += time.perf_counter() - started

    def _missing(self, error: RuntimeError, waited: float) -> StropError:
        """Which rank is not there any more: each that was waiting says so to the others; who says nothing is it."""
        missing: list[int] = []

        def ask() -> None:
            with suppress(RuntimeError):
                self._marks.set(f"waiting-{self.rank}", str(waited))
                time.sleep(GRACE_S)
                missing.extend(rank for rank in range(self.world) if not self._marks.check([f"waiting-{rank}"]))

        asking = threading.Thread(target=ask, daemon=True)  # where rank 0's host is out of reach, asking takes minutes
        asking.start()
        asking.join(GRACE_S + ANSWER_S)
        if asking.is_alive():
            missing = [0]
        late = waited > 0.9 * self._limit
        names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing)) or '0'}"
        are = "have" if len(missing) > 1 else "has"
        what = f"{names} {are} not answered for {waited:.0f} s (train.timeout)" if late else f"{names} {are} gone"
        first = min(set(range(self.world)) - set(missing), default=self.rank)
        if self.rank != first or (not late and os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(OWN_AGENT)):
            return PeerFailed(1)  # one of those that are left tells; of one that is gone, our agent knows how it ended
        fix = "see what that process was doing; then go on with `strop resume`"
        return RunError(f"{what}: {_first_line(error)}", fix=fix)


class _Block:
    """See Devices.together."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not getattr(error, KNOWN, False):
            self._group._flags(error)


def _known(error: BaseException) -> BaseException:
    """An error of memory that every rank has been told of: a block around the one it came out of says it no more, and
    so all ranks stand at the same place again, in whichever of the two each of them was."""
    setattr(error, KNOWN, True)
    return error


def _fresh(store: Store, rank: int, world: int) -> Store:
    """A part of the store that only the ranks of now have written to: torchrun keeps one store over restarts, in which
    the addresses of ranks that are gone still stand.

    Each rank shows rank 0 a number of its own, and is answered under it with the name of that part.
    """
    name = number = uuid.uuid4().hex
    if rank:
        store.set(f"strop-rank-{rank}", number)
        store.wait([f"strop-name-{number}"], MEETING)
        name = store.get(f"strop-name-{number}").decode()
        store.set(f"strop-met-{name}-{rank}", "yes")
    missing, deadline = set(range(1, world)) if rank == 0 else set(), time.monotonic() + MEETING.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"strop-rank-{other}"]):
                store.set(f"strop-name-{store.get(f'strop-rank-{other}').decode()}", name)
            if store.check([f"strop-met-{name}-{other}"]):
                missing.discard(other)
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {', '.join(map(str, sorted(missing)))} have not come")
        time.sleep(0.01)
    return PrefixStore(name, store)


def _code_of(error: BaseException | None) -> int:
    if isinstance(error, StropError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 0 if error is None else 1


def _said(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
