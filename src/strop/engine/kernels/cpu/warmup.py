"""Compiles loops in a process of its own, once for a machine and a type of weights.

The process that compiles a loop runs other machine code than one that reads it from numba's cache: it calls the body
of a parallel loop as it was compiled alone, not the copy that was optimised once more with what surrounds it and then
kept. The results differ in their last bits, and a resumed run would not be bit-identical to one that had compiled.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import torch
from filelock import FileLock
from numba.core.caching import IndexDataCacheFile

from strop.engine.kernels.compiler import take
from strop.errors import DiskError
from strop.machine.probe import probe
from strop.runs.folder import free_bytes
from strop.runs.lock import sha256_text

LOG = logging.getLogger(__name__)


ROOM_BYTES = 32 << 20  # of the disk: all loops for a type of weights take 10 MB
PARTS_BYTES = 4 << 30  # free memory from which on several processes compile: each takes about 1 GB


def compile_once(
    dtype: torch.dtype,
    cache: Path,
    exercise: str,
    words: Sequence[str] = (),
    parts: Sequence[str] = (),
    *,
    joined: bool = False,
) -> None:
    """Sees to it that this process finds the loops for weights of this type in numba's cache, the folder `cache`.

    exercise: the module that calls them when it is run with the type's name and `words`, which say which loops; parts:
    those of one part where it is told a part as well, which go side by side; joined: then all, since loops of several
    parts are called by another.
    """
    told = [str(dtype).removeprefix("torch."), *words]
    sources = [file.stat().st_mtime_ns for file in sorted(Path(__file__).parent.glob("*.py"))]
    machine = probe()
    state = sha256_text(repr((sources, numba.__version__, machine.cpu)))[:16]
    mark = cache / "-".join(["strop", state, exercise, *told])
    if _holds(mark):
        return
    if free_bytes(cache) < ROOM_BYTES:  # numba would fail in the middle of a step, and not say where
        what = f"{cache}: compiled loops need {ROOM_BYTES >> 20} MiB of disk, {free_bytes(cache) >> 20} are free"
        raise DiskError(what, fix="free some space, or set NUMBA_CACHE_DIR to a folder on another disk")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "strop.lock"):  # of two processes that start at once, one waits for what the other compiles
        if _holds(mark):
            return
        # numba knows a loop's own file, not those that it imports from; and a file that was cut off ends the process
        if mark.is_file() or not any(cache.glob(f"strop-{state}-*")):
            for old in (*cache.glob("*.nb[ic]"), *cache.glob("strop-*-*")):
                old.unlink(missing_ok=True)
        LOG.info("compiling loops for this CPU in %s, once on this machine (15 to 30 s)", told[0])
        apart = parts if machine.cores > 1 and machine.free_bytes > PARTS_BYTES else ()
        whole = [[exercise, *told]]
        stages = [[[*whole[0], part] for part in apart], *([whole] if joined else [])] if apart else [whole]
        code, said = take().run(*stages)
        if code:  # this process compiles for itself: its last bits may differ from the next one's
            LOG.warning("loops could not be compiled beforehand (exit %d): %s", code, said)
        sizes = {path.name: path.stat().st_size for path in cache.glob("*.nb[ic]")}
        mark.write_text(json.dumps(sizes), encoding="utf-8")


def _holds(mark: Path) -> bool:
    """Whether loops were compiled, and the files of them are there and not shorter than they were then. A machine that
    stopped may have left zeros at their ends, where Python's pickles have none."""
    try:
        sizes = json.loads(mark.read_text(encoding="utf-8"))
        for name, size in sizes.items():
            with mark.with_name(name).open("rb") as file:
                if file.seek(0, os.SEEK_END) < size or file.seek(-1, os.SEEK_END) < 0 or file.read(1) == b"\0":
                    return False
        return True
    except (OSError, ValueError):
        return False


def save_in_turn() -> None:
    """From here on this process and others that did the same write numba's cache one after the other: two that kept
    the same function for two types at once could each take the other's code for its own."""
    save = IndexDataCacheFile.save

    def locked(self: Any, *args: Any) -> None:
        with FileLock(f"{self._index_path}.lock"):
            save(self, *args)

    IndexDataCacheFile.save = locked
