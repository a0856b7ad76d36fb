"""PyTorch, transformers and peft, which every command that computes imports."""

from __future__ import annotations

import gc

from strop.engine.kernels.warmup import ANSWERS as ANSWERS
from strop.engine.kernels.warmup import STEP as STEP
from strop.engine.kernels.warmup import begin_ahead


def load(exercise: str | None = STEP) -> None:
    """Imports them without Python's search for rubbish on the way, which is a quarter of their time, and later searches
    leave out what they made.

    exercise: of which the process that compiles loops is begun, where they are not yet, to read its libraries
    meanwhile: STEP, ANSWERS, or None.
    """
    if exercise:
        begin_ahead(exercise)
    gc.disable()
    try:
        import peft  # noqa: F401 (to have it loaded)
        import torch  # noqa: F401 (to have it loaded)
        import transformers  # noqa: F401 (to have it loaded)
    finally:
        gc.enable()
    gc.freeze()


# ---- from strop.engine.kernels.compiler ----
"""The process that has loops of a CPU compiled. It reads its libraries while the command that began it reads its own;
told what to compile, it does each part in a process forked from it, so that none reads them again."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

LIBRARIES = ("torch", "transformers.models.llama.modeling_llama", "peft", "numba")
FORKS = sys.platform == "linux"  # elsewhere a forked process may not use the system's mathematics
HERE = Path(__file__).with_name("cpu")  # where numba keeps loops beside their sources, in __pycache__
STEP, ANSWERS = (
    "strop.engine.kernels.warmup_models",
    "strop.engine.kernels.warmup_models",
)
PATIENCE_S = 120.0

_ahead: list[Compiler] = []


class Compiler:
    """A process that is begun when this is made."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__spec__.name} import main; main()"], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip

    @property
    def waits(self) -> bool:
        """Whether it can still be told what to compile."""
        return self._process.poll() is None

    def run(self, *stages: Sequence[Sequence[str]]) -> tuple[int, str]:
        """Runs modules as programs, each given with its arguments: those of a stage side by side, one stage after the
        other. The exit code of the first that failed, else 0, and the last line that was said."""
        try:
            said = self._process.communicate(json.dumps(stages))[1].strip().splitlines()
        finally:
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.returncode, said[-1] if said else ""


def begin_ahead(exercise: str) -> None:
    """Begins one for `take`, where the loops that a module calls are not compiled here yet. Untaken it ends with this
    process, or soon."""
    if FORKS and not _ahead and (os.cpu_count() or 1) > 1 and _nothing_compiled(exercise):
        _ahead.append(Compiler())


def take() -> Compiler:
    """The one that was begun, or a new one."""
    ready = _ahead.pop() if _ahead else None
    return ready if ready is not None and ready.waits else Compiler()


def _nothing_compiled(exercise: str) -> bool:
    """engine.cpu.warm marks what is compiled. False where a card computes, and where it cannot be told."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return False
    own = os.environ.get("NUMBA_CACHE_DIR")
    if own:
        return not any(Path(own).glob(f"*/strop-*-{exercise}-*"))
    return os.access(HERE, os.W_OK) and not any((HERE / "__pycache__").glob(f"strop-*-{exercise}-*"))


def main() -> None:
    """What the process does: it waits for what to compile on its standard input, but not for ever."""
    gc.disable()  # Python's search for rubbish is a sixth of the time, and the process ends soon
    if FORKS:
        for name in LIBRARIES:
            importlib.import_module(name)
    told = sys.stdin.read() if select.select([sys.stdin], [], [], PATIENCE_S)[0] else ""
    for stage in json.loads(told) if told else []:
        begun = [_begin(part) for part in stage]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in begun]
        if any(codes):
            sys.exit(next(filter(None, codes)))


def _begin(part: Sequence[str]) -> int:
    """The id of a process that runs one part."""
    if not FORKS:
        program = f"from {__spec__.name} import run; run({list(part)!r})"
        return os.posix_spawn(sys.executable, [sys.executable, "-c", program], os.environ)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            run(part)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return process


def run(part: Sequence[str]) -> None:
    """Runs a module with arguments as a program, in this process."""
    gc.disable()
    sys.argv = list(part)
    runpy.run_module(part[0], run_name="__main__", alter_sys=True)


# ---- from strop.engine.kernels.cpu.warmup ----
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

from strop.engine.kernels.warmup import take
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
