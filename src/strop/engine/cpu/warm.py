"""Compiles loops in a process of its own, once for a machine and a type of weights.

The process that compiles a loop runs other machine code than one that reads it from numba's cache: it calls the body
of a parallel loop as it was compiled alone, not the copy that was optimised once more with what surrounds it and then
kept. The results differ in their last bits, and a resumed run would not be bit-identical to one that had compiled.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numba
import torch
from filelock import FileLock

from strop.machine.probe import affinity, probe
from strop.runs.lock import sha256_text

LOG = logging.getLogger(__name__)

SOURCES = (
    "kernels.py", "compiled.py", "attention_tiles.py", "tile.py", "amx.py", "lora_tiles.py", "frozen.py", "turn.py",
    "dropout_loops.py", "dots.py", "unpack.py", "products.py", "cached_attention.py", "passes.py", "draws.py",
    "loss.py", "rows.py", "aside.py", "scores.py", "vectors.py",
)  # fmt: skip


def compile_once(dtype: torch.dtype, cache: Path, exercise: str, parts: Sequence[str] = ()) -> None:
    """Sees to it that this process finds every loop for weights of this type in numba's cache, the folder `cache`.

    exercise: the module that calls every loop when it is run with the type's name; parts: those of one part where it is
    told a part as well, which go side by side.
    """
    name = str(dtype).removeprefix("torch.")
    sources = [Path(__file__).with_name(file).stat().st_mtime_ns for file in SOURCES]
    mark = cache / f"strop-{sha256_text(repr((sources, numba.__version__, probe().cpu, exercise)))[:16]}-{name}"
    if mark.is_file():
        return
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "strop.lock"):  # of two processes that start at once, one waits for what the other compiles
        if not mark.is_file():
            LOG.info("compiling loops for this CPU in %s, once on this machine (half a minute)", name)
            told = [[part] for part in parts] if affinity() > 1 and parts else [[]]
            pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
            started = [
                subprocess.Popen([sys.executable, "-m", exercise, name, *part], stdout=nowhere, stderr=pipe, text=True)
                for part in told
            ]
            for process in started:
                said = process.communicate()[1]
                if process.returncode:
                    # This process compiles for itself then: its last bits may differ from those of the next one.
                    LOG.warning("loops could not be compiled beforehand: %s", (said or "").strip().splitlines()[-1:])
            mark.touch()
