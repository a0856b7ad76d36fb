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
    "strop.engine.kernels.warmup_train",
    "strop.engine.kernels.warmup_decode",
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
