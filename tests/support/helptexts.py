"""What `--help` is made from, command by command: text that depends on neither the terminal nor typer's version.

python -m tests.support.helptexts      writes tests/help.txt anew, after a change that is meant
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin

import typer

from strop.cli.app import COMMANDS, build
from tests import ROOT

FILE = ROOT / "tests" / "help.txt"


def helptexts() -> str:
    """Every command with its text, and every argument and option with its names, kind, bounds, default and text."""
    return "\n".join(_commands("strop", build(list(COMMANDS))))


def _commands(name: str, app: typer.Typer) -> Iterator[str]:
    yield f"{name}: {app.info.help}\n"
    if app.registered_callback is not None:
        yield from _parameters(app.registered_callback.callback)
    for command in app.registered_commands:
        assert command.callback is not None
        yield f"{name} {command.name}: {inspect.getdoc(command.callback)}"
        yield from _parameters(command.callback)
        yield (command.epilog or "").replace("\n\n", "\n") + "\n"
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from _commands(f"{name} {group.name}", group.typer_instance)


def _parameters(command: Callable[..., Any] | None) -> Iterator[str]:
    assert command is not None
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind, info = get_args(parameter.annotation)
        first = info.default if isinstance(info.default, str) else f"--{name.replace('_', '-')}"
        names = [first, *(info.param_decls or ())]
        words = info.metavar or name if isinstance(info, typer.models.ArgumentInfo) else " ".join(names)
        facts = [_kind(kind)]
        facts += [f"at least {info.min}"] if info.min is not None else []
        facts += [f"at most {info.max}"] if info.max is not None else []
        facts += ["required"] if parameter.default is parameter.empty else [f"default {parameter.default}"]
        yield f"  {words} ({', '.join(facts)}): {info.help}"
    yield ""


def _kind(kind: Any) -> str:
    """Of `list[str] | None`: list[str]."""
    inner = [_kind(part) for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is list:
        return f"list[{inner[0]}]"
    return inner[0] if inner else kind.__name__


if __name__ == "__main__":
    FILE.write_text(helptexts(), encoding="utf-8")
