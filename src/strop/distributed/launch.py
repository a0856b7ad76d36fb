"""How a command comes to its devices: it joins what a launcher has started, or starts torchrun's agent with itself."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from strop.distributed.devices import ALONE, Devices
from strop.distributed.environment import OWN_AGENT, place_of
from strop.errors import PeerFailed, RecipeError, RunError, Stopped
from strop.machine.probe import affinity
from strop.runs.child_env import safe_path_env

if TYPE_CHECKING:
    from strop.distributed.process_group import Group

FINISHING_S = "3600"  # that ranks which were told to stop may take for their step and for saving (torch's own: 30)


class joined:
    """`with joined() as devices`: this process among those that a launcher has started; alone where there is none.

    All ranks leave the block well, or all leave it with an error that one of them prints.
    """

    def __init__(self) -> None:
        self._group: Group | None = None

    def __enter__(self) -> Devices:
        place = place_of()
        if place is None:
            return ALONE
        from strop.distributed.process_group import Group

        self._group = Group(place)
        return self._group

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        instead = self._group.finish(error) if self._group is not None else None
        if instead is not None:
            raise instead from None


def to_start(asked: str | None, device: str = "auto") -> int:
    """How many processes `--devices` asks for; 0: none, this one does the work. device: as the recipe has it.

    Raises RecipeError for what is no number, more cards than there are, or a launcher that has chosen already.
    """
    if asked is None:
        return 0
    if place_of() is not None:
        raise RecipeError("--devices: a launcher has started this process", fix="leave it out: the launcher decides")
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--devices {asked}: the device is {device}", fix="give cpu or cuda, or leave it at auto")
    import torch

    cards = 0 if device == "cpu" else torch.cuda.device_count()
    if asked != "all" and (not asked.isdecimal() or int(asked) < 1):
        raise RecipeError(f"--devices {asked}: not a number of devices", fix="give a number, or all")
    number = (cards or affinity()) if asked == "all" else int(asked)
    if cards and number > cards:
        raise RecipeError(f"--devices {asked}: {cards} cards are here", fix="give at most as many, or all")
    return 0 if number == 1 else number


def start(devices: int, words: Sequence[str]) -> None:
    """Runs strop with these words (less --devices) once a device, under torchrun's own agent, to the end.

    Raises Elsewhere with the exit code of what failed, or was stopped by Ctrl-C or SIGTERM, and has said so; RunError
    for one that another signal ended, or where all of them were sent one, such as the terminal's when it closes.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", FINISHING_S)
    os.environ.update(safe_path_env())
    if not os.environ.get("STROP_DEBUG"):  # the ranks say themselves how they ended
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    if sys.platform == "linux":  # all are on this machine: no network is asked for its name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=devices, run_id=f"{OWN_AGENT}{uuid.uuid4()}", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "strop.cli", *_without_devices(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            what = f"rank {rank} (process {failure.pid}) was ended by {signal.Signals(-failure.exitcode).name}"
            raise RunError(what, fix="go on from the last checkpoint with `strop resume`") from None
        raise PeerFailed(failure.exitcode) from None
    except SignalException as caught:
        if caught.sigval in (signal.SIGINT, signal.SIGTERM):
            raise PeerFailed(Stopped.exit_code) from None
        what = f"ended by {caught.sigval.name}, which saves nothing"
        raise RunError(what, fix="go on from the last checkpoint with `strop resume`") from None


def _without_devices(words: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith("--devices="):
            skip = word == "--devices"
            kept += [] if skip else [word]
        else:
            skip = False
    return kept
