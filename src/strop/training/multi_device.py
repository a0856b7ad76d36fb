"""A run on several devices, around its steps: all of them start from the same, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from strop.config.load import Resolved, read_resolved
from strop.distributed.devices import Devices
from strop.distributed.environment import threads_asked
from strop.errors import InputError, Where
from strop.runs.folder import RunFolder
from strop.training.job import Job
from strop.training.preflight import Setup, check_space, set_up


def set_up_together(
    resolved: Resolved, memory: int | None, folder: RunFolder, devices: Devices, threads: int | None = None
) -> Setup:
    """What a run is made of: rank 0 decides what the recipe leaves open; one rank of each node prepares the rows, and
    the others read what it has written. threads: that the run began with, where its numbers are to stay the same.

    Raises InputError where the ranks do not see the same: run folder, base, rows, template, versions.
    """
    if threads is None and resolved.recipe.train.exact and not threads_asked():
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)  # a product is split by thread, and so its last bits
    setup: Setup | None = None
    first, of_node = devices.rank == 0, devices.local == 0
    for turn in (first, of_node and not first, not of_node):
        with devices.together():
            if turn:
                setup = set_up(resolved, memory, devices)
                if first:
                    check_space(folder, setup)
        resolved = devices.gather(resolved if setup is None else setup.resolved)[0]
        if devices.world == 1:
            break
    assert setup is not None
    for rank, there in enumerate(devices.gather(folder.path.is_dir())):
        if not there:
            what = f"{folder.path}: rank {rank} does not see this folder"
            raise InputError(what, fix="give --out a folder on a disk that all nodes share")
    devices.refuse_unlike(_identity(setup))
    return replace(setup, resolved=resolved, lock={**setup.lock, **_decided(resolved)})


def _identity(setup: Setup) -> dict[str, str]:
    lock = setup.lock
    versions = {name: text.rpartition(".")[0] for name, text in lock["versions"].items() if name in ("torch", "strop")}
    names = ("data", "template")
    return {"base": lock["base"]["fingerprint"], **{name: str(lock[name]) for name in names}, **versions}


def _decided(resolved: Resolved) -> dict[str, Any]:
    return {
        "values": {field: choice.value for field, choice in resolved.choices.items()},
        "precision": resolved.recipe.model.dtype,
    }


def start_alike(job: Job) -> None:
    """Gives all ranks the adapters of rank 0, and proves that what a step changes is the same on all."""
    if job.devices.world == 1:
        return
    weights = list(job.state.weights.values())
    flat = torch.cat([weight.detach().float().flatten() for weight in weights])
    job.devices.agree()
    job.devices.send(flat, 0)
    at = 0
    with torch.no_grad():
        for weight in weights:
            weight.copy_(flat[at : at + weight.numel()].view_as(weight))
            at += weight.numel()


def refuse_another(resolved: Resolved, folder: Path) -> None:
    """Raises InputError where a recipe says something else than the one that a run was started with."""
    before = read_resolved(folder / "recipe.yaml").choices
    where = [
        Where(str(folder), None, f"{field} was {before[field].value} when this run was started, and is {choice.value}")
        for field, choice in resolved.choices.items()
        if choice.origin in ("recipe", "option") and field != "out" and _other(choice.value, before[field].value)
    ]
    if where:
        raise InputError(f"{folder}: another run", fix="put it back, or see `strop resume --help`", where=where)


def _other(asked: Any, was: Any) -> bool:
    return bool(asked not in (None, "auto") and asked != was)


def count_of(lock: Mapping[str, Any]) -> int:
    """The number of devices that a lock was written with."""
    return int(lock.get("devices", {}).get("count", 1))


def described(devices: Devices, exact: bool) -> dict[str, Any]:
    mode = "one" if devices.world == 1 else "replicated" if devices.base is None else "sharded"
    return {
        "count": devices.world,
        "nodes": devices.nodes,
        "mode": mode,
        "exact": exact,
        "threads": torch.get_num_threads(),
        **({} if devices.base is None else {"base": devices.base.share()}),
    }


def measured(job: Job) -> dict[str, Any]:
    """For the report: the devices, seconds of sending and of waiting for the slowest in steps, and the balance: the
    mean rank's computing time over the slowest one's."""
    progress = job.state.progress
    return {
        **described(job.devices, job.recipe.train.exact),
        "communication_s": progress.communication_s,
        "waiting_s": progress.waiting_s,
        "balance": progress.computing_s / progress.slowest_s if progress.slowest_s else 1.0,
        "tokens_per_s_each": progress.tokens / max(progress.seconds, 1e-9) / job.devices.world,
    }
