"""`strop import`: another tool's config as a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strop.cli.invocation import as_typed
from strop.cli.options import Json
from strop.cli.terminal import console, print_json
from strop.errors import FolderError

if TYPE_CHECKING:
    from strop.interop.draft import Imported


def import_(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="axolotl, llamafactory, trl, unsloth or torchtune.")],
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Its YAML config; of trl and unsloth the script or notebook, never run."),
    ],
    out: Annotated[Path | None, typer.Option(help="Write the recipe here; default: print it.")] = None,
    as_json: Json = False,
) -> None:
    """Make a recipe of another tool's config, and list by name what has no equivalent."""
    from strop.interop.importers import import_config
    from strop.runs.folder import write_atomic

    made = import_config(peer, file)
    if out is not None:
        if out.exists():
            raise FolderError(f"{out}: is there already", fix="give --out another name")
        try:
            write_atomic(out, made.to_yaml())
        except OSError as error:
            fix = "give --out a file in a folder that can be written to"
            raise FolderError(f"{out}: cannot be written: {error.strerror}", fix=fix) from None
    elif not as_json:
        print(made.to_yaml(), end="")
    _print(made, out)
    print_json({**made.as_json(), "out": str(out) if out else None, "recipe": made.to_yaml()}, as_json)


def _print(made: Imported, out: Path | None) -> None:
    """What came along and what did not (a printed recipe says it itself), and the command that goes on from here."""
    from strop.interop.draft import MISSING

    console.print(f"[bold]taken[/]    {len(made.draft.fields)} fields")
    for title, color, notes in (
        ("differs", "yellow", made.draft.differs),
        ("left out", "red", made.draft.unsupported),
        ("own way", "dim", made.draft.ignored),
    ):
        for note in notes if out else ():
            at = f"{note.key}, line {note.line}" if note.line else note.key
            console.print(f"{title:8} ", style=color, end="")
            console.print(f"{at}{': ' * bool(note.text)}{note.text}", markup=False)
    given = {"model.name": "--model", "data.train": "--data"}
    more = "".join(f" {given[name]} {MISSING[name]}" for name in made.missing)
    console.print(
        f"next     {as_typed()} train {shlex.quote(str(out)) if out else 'RECIPE.yaml'}{more} --print-recipe",
        markup=False,
    )
