"""Kill a random rank or the agent at random instants, then resume on another number of devices."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from strop.runs.events import read_events
from tests import ROOT
from tests.distributed.suite import Lab, apart, codes, outputs

SOON = 20.0  # seconds in which the other ranks must have ended by themselves
CHAIN = 4  # maximum number of kills of a run
STEPS = ("--train.exact", "true", "--train.save_steps", "2", "--model.device", "cpu")


def kills(lab: Lab, number: int, seed: int = 0, agent: int = 8) -> None:
    """Kill runs on 2 or 3 processes, replicated and sharded, several times each; each resumes on any number of devices.

    The result must equal an unbroken run to the bit. agent: every `agent`-th kill is of torchrun's agent.
    """
    chance, killed, runs, early = random.Random(seed), 0, 0, 0
    started = time.monotonic()
    whole = lab.good(1, *STEPS)
    longest = max(time.monotonic() - started, *(_seconds(lab, world) for world in (2, 3)))
    while killed < number:
        out = lab.out()
        for _ in range(chance.randint(1, CHAIN)):
            world, sharded = chance.choice((2, 3)), chance.random() < 0.5
            words = [*_again(lab, out), "--model.placement", "sharded" if sharded else "replicated"]
            killed += 1
            if killed % agent == 0:
                _kill_agent(lab, words, world, chance)
            else:
                early += not _kill_rank(lab, words, world, chance, longest, out)
            if killed == number:
                break
        world = chance.choice((1, 2, 3))
        ended = lab.start(world, _again(lab, out)).end()
        assert codes(ended) == [0] * world, outputs(ended)
        assert apart(whole, out) == 0.0, (seed, killed, apart(whole, out))
        runs += 1
        print(f"{killed} of {number} kills, {runs} runs", flush=True)
    print(f"{killed} kills of {runs} runs ({early} before the ranks had met): none lost, all with the same bits")


def _again(lab: Lab, out: Path) -> list[str]:
    return [*lab.words(out, *STEPS), "--resume"]


def _seconds(lab: Lab, world: int) -> float:
    started = time.monotonic()
    lab.good(world, *STEPS)
    return time.monotonic() - started


def _kill_rank(lab: Lab, words: Sequence[str], world: int, chance: random.Random, longest: float, out: Path) -> bool:
    """Kill a rank, and return whether the ranks had connected.

    If they had, the other ranks end by themselves; otherwise this process ends them, as a launcher would.
    """
    before = _said(out)
    crew, victim = lab.start(world, words), chance.randrange(world)
    time.sleep(chance.uniform(0.0, longest))
    with suppress(ProcessLookupError):
        os.kill(crew.pids[victim], signal.SIGKILL)
    met = _said(out) > before
    ended = crew.end(within=SOON if met else 1.0)
    left = [one.code for rank, one in enumerate(ended) if rank != victim]
    assert not met or all(code in (0, 1) for code in left), (left, outputs(ended))
    return met


def _said(out: Path) -> int:
    """Return the number of events; the ranks have connected before the first of a session."""
    file = out / "events.jsonl"
    return len(read_events(file)) if file.is_file() else 0


def _kill_agent(lab: Lab, words: Sequence[str], world: int, chance: random.Random) -> None:
    """Kill the agent; its processes must notice and end."""
    agent = subprocess.Popen(
        [sys.executable, "-m", "strop.cli", *words, "--devices", str(world)], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    time.sleep(chance.uniform(2.0, 20.0))
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + SOON
    while _group_lives(agent.pid):
        if time.monotonic() > deadline:
            os.killpg(agent.pid, signal.SIGKILL)
            raise AssertionError(f"after {SOON} s without the agent its processes still run")
        time.sleep(0.05)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
