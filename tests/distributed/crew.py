"""Start several ranks on this machine as forks of a process that has done the slow imports; no torchrun."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from strop.cli import app
from strop.distributed.devices import Devices
from strop.distributed.launch import join_devices
from tests.faults.harness import Ended, start, wait

Prepare = Callable[[], None]
AFTER_FAILURE = 30.0  # seconds in which the other ranks must end by themselves


@dataclass
class Crew:
    """Running ranks. logs: the output of each."""

    pids: list[int]
    logs: list[Path]
    started: float

    def end(self, within: float = 300.0) -> list[Ended]:
        """Return how each rank ended. Ranks are killed that run longer than `within` seconds, or much longer than a
        rank that failed."""
        deadline, running = time.monotonic() + within, set(self.pids)
        while running:
            for pid in sorted(running):
                status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if status is not None:
                    running.remove(pid)
                    if status.si_status:  # an exit code or a signal
                        deadline = min(deadline, time.monotonic() + AFTER_FAILURE)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        return [wait(pid, log, self.started) for pid, log in zip(self.pids, self.logs, strict=True)]


def free_port() -> int:
    with socket.socket() as result:
        result.bind(("127.0.0.1", 0))
        return int(result.getsockname()[1])


def crew(work: Callable[[], int], world: int, folder: Path, prepare: Mapping[int, Prepare] | None = None) -> Crew:
    """Start `work` on `world` ranks. prepare: by rank, called before."""
    folder.mkdir(parents=True, exist_ok=True)
    port, started, pids = free_port(), time.monotonic(), []
    logs = [folder / f"rank-{rank}.txt" for rank in range(world)]
    for rank in range(world):
        place = {
            "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip

        def be(rank: int = rank, place: Mapping[str, object] = place) -> int:
            if world > 1:
                os.environ.update({name: str(value) for name, value in place.items()})
            if prepare and rank in prepare:
                prepare[rank]()
            return work()

        pids.append(start(be, logs[rank]))
    return Crew(pids, logs, started)


def command(words: Sequence[str]) -> Callable[[], int]:
    def work() -> int:
        sys.argv = ["strop", *words]
        app.main()
        return 0

    return work


def inside(work: Callable[[Devices], None]) -> Callable[[], int]:
    """Return work that is called with its devices."""

    def be() -> int:
        with join_devices() as devices:
            work(devices)
        return 0

    return be
