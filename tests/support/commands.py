"""Whether a command of strop, as a person would type it, is one: its name, its options, and values of the recipe."""

from __future__ import annotations

from typing import Any

import typer

from strop.cli.app import build
from strop.config.load import parse_option, resolve
from strop.config.schema import option_fields
from strop.errors import StropError


def fault(words: list[str]) -> str | None:
    """What is wrong with `strop WORDS...`, if anything. Nothing is run."""
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
    if rest in (["--help"], ["-h"]):
        return None
    if any(word.endswith("...") for word in rest):  # "and so on"
        return None
    try:
        context = command.make_context(" ".join(path), rest, resilient_parsing=False)
    except Exception as error:  # click's errors, which typer vendors or imports
        said = error.format_message() if hasattr(error, "format_message") else str(error)
        return said or type(error).__name__
    return _recipe_fault(context.params)


def _recipe_fault(values: dict[str, Any]) -> str | None:
    """Whether the recipe's fields that are given have values that the recipe takes."""
    known = {field.replace(".", "__"): field for field, _ in option_fields()}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name in known and isinstance(value, str | list | tuple) and value:
            many = isinstance(value, list | tuple)
            given[known[name]] = list(value) if many else parse_option(known[name], value)
    if not given:
        return None
    try:
        resolve(None, {"model.name": "m", "data.train": "d", "data.eval": "e", **given})
    except StropError as error:
        return "; ".join(error.lines())
    return None
