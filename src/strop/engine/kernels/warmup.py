"""Import the libraries of a command, and compile the CPU kernels ahead of time in another process.

Compilation takes 15 to 30 s on two idle cores, once per machine and weight dtype, and longer while other programs run.
If numba's cache lacks kernels, `load` starts a `Compiler` process, which imports its libraries beside the command.
`compile_once` then makes it run tiny models (warmup_models.py), which compiles the kernels, in two processes if there
are enough cores and memory. The compilers' memory is free afterwards. This module and what it imports need only the
standard library, so that commands start quickly.

A kernel that no tiny model needs is compiled by the process that calls it, with the same results (cpu/compiled.py).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import runpy
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.machine.processes import end_session

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger(__name__)

TRAIN, DECODE = "train", "decode"  # the warm-ups that warmup_models.py can run
MODELS = "strop.engine.kernels.warmup_models"
# With it, torch.compile returns functions as they are. PEFT imports bitsandbytes, which would load Inductor (0.6 s) to
# compile functions that strop never calls.
WITHOUT_COMPILER = "TORCHDYNAMO_DISABLE"
LIBRARIES = ("transformers.models.llama.modeling_llama", "numba")  # of the compiler, besides those of import_libraries
FORKS = sys.platform == "linux"  # on other systems, math libraries may fail in a forked process
SOURCES = Path(__file__).with_name("cpu")  # numba caches compiled kernels next to their sources, in __pycache__
WAIT_S = 120.0  # after this time, an unused compiler process exits
DISK_BYTES = 32 << 20  # required free space; the kernels of one weight dtype take 10 MB
PARALLEL_BYTES = 4 << 30  # free memory required for compiling in parallel; each process takes about 1 GB

_started: list[Compiler] = []
_compile_seconds = 0.0


def load(warmup: str | None = TRAIN) -> None:
    """Import the libraries of a command, which later garbage collections skip.

    Args:
        warmup: the kernels that the command will use, TRAIN, DECODE or None. If they are missing from numba's cache,
            a compiler process is started.
    """
    if warmup:
        start_compiler(warmup)
    import_libraries()
    gc.freeze()


def import_libraries() -> None:
    """Import PyTorch, transformers and PEFT without garbage collection and Inductor: a third less time.

    For some models and CPUs, transformers and bitsandbytes would download compiled code from the Hub, and run it. Here
    they do not; with USE_HUB_KERNELS=YES in the environment, transformers does.

    Raises:
        FileNotFoundError: the working folder was deleted. MKL would end the process there without an exception.
    """
    os.getcwd()
    before, collects = os.environ.get(WITHOUT_COMPILER), gc.isenabled()
    os.environ[WITHOUT_COMPILER] = "1"
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    gc.disable()
    try:
        import torch  # noqa: F401 (imported for its side effect on sys.modules)
        import transformers  # noqa: F401 (as above)

        _import_bitsandbytes()
        import peft  # noqa: F401 (as above)
    finally:
        if collects:
            gc.enable()
        del os.environ[WITHOUT_COMPILER]
        os.environ.update({} if before is None else {WITHOUT_COMPILER: before})


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without the package `kernels`, with which it would download a kernel for CPUs with bf16.

    strop does not call that kernel. transformers requires `kernels` since 5.25.
    """
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes the import fail
    try:
        with contextlib.suppress(Exception):  # PEFT imports it again, and reports the error
            importlib.import_module("bitsandbytes")
    finally:
        del sys.modules["kernels"]
        sys.modules.update({} if kernels is None else {"kernels": kernels})


class Compiler:
    """A process that waits for modules to run as programs. It starts on construction."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__spec__.name} import main; main()"], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={
                **os.environ, WITHOUT_COMPILER: "1", "PYTHONSAFEPATH": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )  # fmt: skip

    @property
    def is_waiting(self) -> bool:
        return self._process.poll() is None

    def run(self, *stages: Sequence[Sequence[str]]) -> tuple[int, str]:
        """Run modules as programs, and end the process.

        Args:
            stages: run one after another; the programs of a stage run in parallel. A program is a module name and its
                arguments.

        Returns:
            The exit code of the first program that failed, or 0, and the last line of standard error.
        """
        try:
            lines = self._process.communicate(json.dumps(stages))[1].strip().splitlines()
        finally:
            if self._process.poll() is None:
                end_session(self._process, force=True)
        return self._process.returncode, lines[-1] if lines else ""

    def close(self) -> None:
        """Close the pipes, and end the process if it still waits."""
        self._process.communicate()


def start_compiler(warmup: str) -> None:
    """Start a compiler process for `take_compiler` if the kernels of a warm-up are not compiled yet.

    An unused process exits together with this process, or after WAIT_S.
    """
    if FORKS and not _started and (os.cpu_count() or 1) > 1 and is_missing(warmup):
        _started.append(Compiler())


def take_compiler() -> Compiler:
    """Return the compiler process that `start_compiler` started, or a new one."""
    if _started:
        compiler = _started.pop()
        if compiler.is_waiting:
            return compiler
        compiler.close()
    return Compiler()


def is_missing(warmup: str) -> bool:
    """Return whether kernels are not compiled yet: no marker of compile_once. Always False on machines with a GPU."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return False
    cache = os.environ.get("NUMBA_CACHE_DIR")
    if cache:
        return not any(Path(cache).glob(f"*/strop-*-{warmup}-*"))
    return os.access(SOURCES, os.W_OK) and not any((SOURCES / "__pycache__").glob(f"strop-*-{warmup}-*"))


def main() -> None:
    """Run the compiler process: import the libraries, and read the stages from standard input."""
    gc.disable()  # saves a sixth of the time of this short-lived process
    if FORKS:
        import_libraries()
        for name in LIBRARIES:
            importlib.import_module(name)
    is_ready = sys.platform == "win32" or select.select([sys.stdin], [], [], WAIT_S)[0]
    request = sys.stdin.read() if is_ready else ""
    for stage in json.loads(request) if request else []:
        waits = [_start(program) for program in stage]
        codes = [wait() for wait in waits]
        if any(codes):
            sys.exit(next(filter(None, codes)))


def _start(program: Sequence[str]) -> Callable[[], int]:
    """Start a process that runs one program. Returns a function that waits for it and returns its exit code."""
    if sys.platform == "win32" or not FORKS:
        names = "import_libraries, run_program"
        code = f"from {__spec__.name} import {names}; import_libraries(); run_program({list(program)!r})"
        return subprocess.Popen([sys.executable, "-c", code]).wait
    process = os.fork()
    if process == 0:
        exit_code = 1
        try:
            run_program(program)
            exit_code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(exit_code)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run_program(program: Sequence[str]) -> None:
    """Run a module with arguments as a program, in this process."""
    gc.disable()
    sys.argv = list(program)
    runpy.run_module(program[0], run_name="__main__", alter_sys=True)


def compile_once(
    dtype: torch.dtype, cache: Path, warmup: str, arguments: Sequence[str] = (), parts: Sequence[str] = (), *,
    whole: bool = False,
) -> None:  # fmt: skip
    """Compile the kernels for weights of this dtype into numba's cache, unless it has them.

    Args:
        cache: the folder of numba's cache.
        warmup: TRAIN or DECODE.
        arguments: arguments of the warm-up in warmup_models.py, after the dtype.
        parts: parts of the warm-up that run in parallel if there are enough cores and memory.
        whole: after the parts, also run the complete warm-up, because one kernel calls kernels of several parts.

    Raises:
        DiskError: the disk is full.
    """
    import numba
    from filelock import FileLock, Timeout

    from strop.errors import DiskError
    from strop.machine.probe import probe
    from strop.runs.folder import free_bytes
    from strop.runs.lock import sha256_text

    arguments = [str(dtype).removeprefix("torch."), *arguments]
    sources = [file.stat().st_mtime_ns for file in sorted(SOURCES.glob("*.py"))]
    machine = probe()
    state = sha256_text(repr((sources, numba.__version__, machine.cpu)))[:16]
    marker = cache / "-".join(["strop", state, warmup, *arguments])
    if _is_complete(marker):
        return
    if free_bytes(cache) < DISK_BYTES:  # numba would fail later, with an error that does not mention the disk
        what = f"{cache}: compiled kernels need {DISK_BYTES >> 20} MiB of disk, {free_bytes(cache) >> 20} are free"
        raise DiskError(what, fix="free some space, or set NUMBA_CACHE_DIR to a folder on another disk")
    cache.mkdir(parents=True, exist_ok=True)
    started, lock = time.perf_counter(), FileLock(cache / "strop.lock")  # only one process compiles at a time
    try:
        lock.acquire(timeout=0)
    except Timeout:
        LOG.info("waiting for another program that compiles CPU kernels, once on this machine; may take minutes")
        lock.acquire()
    try:
        if _is_complete(marker):
            return
        # Delete kernels of other sources, because numba does not check imported files, and truncated files, because
        # reading one crashes the process.
        if marker.is_file() or not any(cache.glob(f"strop-{state}-*")):
            for file in (*cache.glob("*.nb[ic]"), *cache.glob("strop-*-*")):
                file.unlink(missing_ok=True)
        use = "training" if warmup == TRAIN else "generating text"
        LOG.info("compiling CPU kernels for %s in %s, once on this machine; may take minutes", use, arguments[0])
        parallel = machine.cores > 1 and machine.free_bytes > PARALLEL_BYTES
        program = [MODELS, warmup, *arguments]
        stages = [[program]]
        if parallel and parts:
            stages = [[[*program, part] for part in parts], *([[program]] if whole else [])]
        code, last_line = take_compiler().run(*stages)
        if code:  # this process compiles for itself
            LOG.warning("kernels could not be compiled ahead of time (exit %d): %s", code, last_line)
        sizes = {path.name: path.stat().st_size for path in cache.glob("*.nb[ic]")}
        marker.write_text(json.dumps(sizes), encoding="utf-8")
    finally:
        lock.release()
        global _compile_seconds
        _compile_seconds += time.perf_counter() - started


def compile_seconds() -> float:
    """Return how long this process has compiled kernels ahead of time, or waited for another one to."""
    return _compile_seconds


def _is_complete(marker: Path) -> bool:
    """Return whether the kernels were compiled and their files are intact.

    After a crash of the machine, files may be shorter or end with zeros; a pickle never ends with a zero byte.
    """
    try:
        sizes = json.loads(marker.read_text(encoding="utf-8"))
        for name, size in sizes.items():
            with marker.with_name(name).open("rb") as file:
                if file.seek(0, os.SEEK_END) < size or file.seek(-1, os.SEEK_END) < 0 or file.read(1) == b"\0":
                    return False
        return True
    except (OSError, ValueError):
        return False


def lock_cache_writes() -> None:
    """Make this process lock numba's cache when it writes.

    Without the lock, two processes that save the same function for different types can mix up their code.
    """
    from filelock import FileLock
    from numba.core.caching import IndexDataCacheFile

    save = IndexDataCacheFile.save

    def save_locked(self: Any, *args: Any) -> None:
        with FileLock(f"{self._index_path}.lock"):
            save(self, *args)

    IndexDataCacheFile.save = save_locked
