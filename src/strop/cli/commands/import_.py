"""`strop import`: convert another tool's config to a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strop.cli.invocation import command_name
from strop.cli.options import Json
from strop.cli.tables import console, print_json
from strop.errors import FolderError

if TYPE_CHECKING:
    from strop.interop.draft import Imported


def import_(
    peer: Annotated[str, typer.Argument(metavar="TOOL", help="axolotl, llamafactory, trl, unsloth or torchtune.")],
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="YAML config; for trl and unsloth a script or notebook, which is not run."),
    ],
    out: Annotated[Path | None, typer.Option(help="Recipe file to write; default: print the recipe.")] = None,
    as_json: Json = False,
) -> None:
    """Convert another tool's config to a recipe, and list the settings that have no equivalent."""
    from strop.interop.draft import import_config
    from strop.runs.folder import write_atomic

    imported = import_config(peer, file)
    if out is not None:
        if out.exists():
            raise FolderError(f"{out}: already exists", fix="give --out another name")
        try:
            write_atomic(out, imported.to_yaml())
        except OSError as error:
            fix = "give --out a file in a writable folder"
            raise FolderError(f"{out}: cannot be written: {error.strerror}", fix=fix) from None
    elif not as_json:
        print(imported.to_yaml(), end="")
    _print_summary(imported, out)
    print_json({**imported.as_json(), "out": str(out) if out else None, "recipe": imported.to_yaml()}, as_json)


def _print_summary(imported: Imported, out: Path | None) -> None:
    """Print the converted and missing settings (a printed recipe lists them itself), and the next command."""
    from strop.interop.draft import MISSING

    console.print(f"[bold]taken[/]    {len(imported.draft.fields)} fields")
    for title, color, notes in (
        ("differs", "yellow", imported.draft.differs),
        ("left out", "red", imported.draft.unsupported),
        ("own way", "dim", imported.draft.ignored),
    ):
        for note in notes if out else ():
            place = f"{note.key}, line {note.line}" if note.line else note.key
            console.print(f"{title:8} ", style=color, end="")
            console.print(f"{place}{': ' * bool(note.text)}{note.text}", markup=False)
    flags = {"model.name": "--model", "data.train": "--data"}
    missing = "".join(f" {flags[name]} {MISSING[name]}" for name in imported.missing)
    recipe = shlex.quote(str(out)) if out else "RECIPE.yaml"
    console.print(f"next     {command_name()} train {recipe}{missing} --print-recipe", markup=False)
