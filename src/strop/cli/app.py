"""The command line: the commands by name, and how each of them ends."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import inspect
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from strop import __version__
from strop.cli.commands.adapters import adapters
from strop.cli.commands.chat import chat
from strop.cli.commands.check import check
from strop.cli.commands.dash import dash
from strop.cli.commands.demo import demo
from strop.cli.commands.doctor import doctor
from strop.cli.commands.evaluate import evaluate
from strop.cli.commands.export import gguf, ollama
from strop.cli.commands.export_script import export_script
from strop.cli.commands.import_ import import_
from strop.cli.commands.launch import kubernetes, ray, skypilot, slurm
from strop.cli.commands.merge import merge
from strop.cli.commands.modules import modules
from strop.cli.commands.plan import plan
from strop.cli.commands.push import push
from strop.cli.commands.resume import resume
from strop.cli.commands.runs import runs
from strop.cli.commands.schema import schema
from strop.cli.commands.serve import serve
from strop.cli.commands.train import train
from strop.cli.examples import epilog
from strop.cli.invocation import typed
from strop.cli.options import recipe_options
from strop.cli.terminal import console, print_json
from strop.errors import DiskError, FolderError, PeerFailed, StropError


def main() -> None:
    """Runs a command. Whatever goes wrong ends as one message and the exit code of its kind (see errors.py)."""
    asked_to_stop: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        asked_to_stop.append(number)
        raise KeyboardInterrupt

    _take_any_text()
    for number in (signal.SIGINT, signal.SIGTERM):  # while training, `stop_signals` takes their place
        signal.signal(number, interrupt)
    atexit.register(_end)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # peft imports it; what it lacks is no concern of this run
    try:
        words = [*sys.argv[1:], *_being_completed()]
        code = build(words)(standalone_mode=False, prog_name="strop") or 0
        if asked_to_stop and code == 130:  # typer has caught the interrupt, without a word
            _stopped()
        sys.exit(code)
    except PeerFailed as error:
        sys.exit(error.exit_code)
    except StropError as error:
        _fail(error.lines(), error.as_json(), error.exit_code, error.partial_result)
    except KeyboardInterrupt:
        _stopped()
    except Exception as error:  # the one place for faults of ours: never a traceback unless asked
        if asked_to_stop:  # an extension module that is interrupted while it is imported says ImportError
            _stopped()
        if hasattr(error, "format_message"):  # click's UsageError and its kin, which typer vendors or imports
            _fail(
                [line for line in [error.format_message()] if line],
                {"kind": "UsageError", "message": error.format_message()},
                2,
            )
        if os.environ.get("STROP_DEBUG"):
            raise
        if (refused := _by_the_system(error)) is not None:
            _fail(refused.lines(), refused.as_json(), refused.exit_code)
        said = f"{type(error).__name__}: {error}"
        lines = [said, "this is a fault of strop's: set STROP_DEBUG=1 to see where, and please report it"]
        _fail(lines, {"kind": "InternalError", "message": said}, 1)


def _end() -> None:
    """What is done last, before Python ends. It would look for rubbish once more: with torch loaded that is 1.8 s of
    work after the last word. nanobind, in triton from 3.9 on, calls what is left there a leak, in a hundred lines."""
    gc.freeze()
    if "triton" in sys.modules and not os.environ.get("STROP_DEBUG"):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _take_any_text() -> None:
    """A locale that knows few characters ends no command: what it cannot write is escaped, what it cannot read is
    kept as bytes."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def build(words: Sequence[str]) -> typer.Typer:
    """The command line for these arguments. The flags of a recipe are made only for a command that is among them:
    they cost a tenth of a second, which `strop --help` need not wait for."""
    app = typer.Typer(
        help="Fine-tunes open language models with LoRA on your own hardware, and proves the result.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_version_option)
    for name, command in COMMANDS.items():
        takes_recipe = "options" in inspect.signature(command).parameters
        made = recipe_options(command, name in words, ONLY.get(name, ())) if takes_recipe else command
        app.command(name, epilog=epilog(name))(made)
    for group, (text, commands) in GROUPS.items():
        inner = typer.Typer(help=text, no_args_is_help=True)
        for name, command in commands.items():
            inner.command(name, epilog=epilog(f"{group} {name}"))(command)
        app.add_typer(inner, name=group)
    return app


def _being_completed() -> list[str]:
    """The line that a shell asks strop to complete, in words."""
    return " ".join(os.environ.get(name, "") for name in ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")).split()


def _show_version(asked: bool) -> None:
    if asked:
        print(f"strop {__version__}")
        raise typer.Exit


ONLY: Mapping[str, tuple[str, ...]] = {"eval": ("data.format", "data.columns", "data.encoding")}
COMMANDS: Mapping[str, Callable[..., None]] = {
    "doctor": doctor,
    "plan": plan,
    "check": check,
    "train": train,
    "resume": resume,
    "eval": evaluate,
    "chat": chat,
    "adapters": adapters,
    "merge": merge,
    "serve": serve,
    "modules": modules,
    "runs": runs,
    "dash": dash,
    "import": import_,
    "export-script": export_script,
    "push": push,
    "schema": schema,
    "demo": demo,
}

GROUPS: Mapping[str, tuple[str, Mapping[str, Callable[..., None]]]] = {
    "export": (
        "Make files for other programs, each proved to be the same model.",
        {"gguf": gguf, "ollama": ollama},
    ),
    "launch": (
        "Write the job file that trains a recipe on a cluster.",
        {"slurm": slurm, "ray": ray, "kubernetes": kubernetes, "skypilot": skypilot},
    ),
}


def _version_option(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def _by_the_system(error: Exception) -> StropError | None:
    """What the system does not let this user do, with a file or a folder, is no fault of strop's."""
    from strop.runs.folder import is_cache  # psutil: not for `strop --help`

    try:
        here = Path.cwd()
    except OSError:
        return FolderError("the folder that this was started in is gone", fix="cd to one that is there")
    if not isinstance(error, OSError) or error.errno is None:
        return None
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    if error.filename is None:  # of a write, which knows no name
        what = f"a file cannot be written: {os.strerror(error.errno)}"
        return DiskError(what, fix="free some space") if full else None
    what, place = f"{error.filename}: {os.strerror(error.errno).lower()}", here / os.fsdecode(error.filename)
    if full:
        return DiskError(what, fix="free some space")
    if is_cache(place):
        return FolderError(what, fix="set STROP_CACHE to a folder of your own that can be written")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FolderError(what, fix="it is another user's, or read-only: ask for the right to it, or use a copy")
    return None


def _stopped() -> None:
    _fail(["stopped at once; what was saved before is intact"], {"kind": "Stopped", "message": "interrupted"}, 130)


def _fail(lines: list[str], error: dict[str, Any], code: int, partial_result: Mapping[str, Any] | None = None) -> None:
    for line in lines:
        console.print(f"error: {typed(line)}", markup=False, style="red" if code != 130 else "yellow")
    with contextlib.suppress(OSError):  # it may be stdout that cannot be written
        print_json({**(partial_result or {}), "error": error, "exit": code}, "--json" in sys.argv)
    sys.exit(code)


if __name__ == "__main__":
    main()
