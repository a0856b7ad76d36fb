"""Check a command of strop without running it: its name, its options, and the recipe values among them."""

from __future__ import annotations

from typing import Any

import typer

from strop.cli.app import build
from strop.config.load import parse_option, resolve
from strop.config.schema import option_fields
from strop.errors import StropError


def find_error(words: list[str]) -> str | None:
    """Return what is wrong with `strop WORDS...`, or None."""
    command: Any = typer.main.get_command(build(words))
    if words == ["--help"] or words == ["--version"]:
        return None
    path = []
    rest = list(words)
    while rest and hasattr(command, "commands"):
        name = rest.pop(0)
        if name not in command.commands:
            return f"no command {' '.join([*path, name])}"
        path.append(name)
        command = command.commands[name]
    if rest in (["--help"], ["-h"], ["--help-all"]):
        return None
    if any(word.endswith("...") for word in rest):  # an abbreviated command
        return None
    try:
        context = command.make_context(" ".join(path), rest, resilient_parsing=False)
    except Exception as error:  # click's errors, from click or from the copy in typer
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        return message or type(error).__name__
    return _recipe_error(context.params)


def _recipe_error(values: dict[str, Any]) -> str | None:
    """Return what is wrong with the recipe fields among a command's parameters, or None."""
    fields = {field.replace(".", "__"): field for field, _ in option_fields()}
    fields |= {f"short__{name}": field for name, field in fields.items()}
    options: dict[str, Any] = {}
    for name, value in values.items():
        if name in fields and isinstance(value, str | list | tuple) and value:
            options[fields[name]] = parse_option(fields[name], *([value] if isinstance(value, str) else value))
    if not options:
        return None
    try:
        resolve(None, {"model.name": "m", "data.train": "d", "data.eval": "e", **options})
    except StropError as error:
        return "; ".join(error.lines())
    return None
