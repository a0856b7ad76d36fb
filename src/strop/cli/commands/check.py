"""`strop check`: show the rows that would be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strop import api
from strop.cli.options import Json, RecipeFile
from strop.cli.progress import status_line
from strop.cli.tables import console, print_json, print_notes
from strop.errors import InputError

if TYPE_CHECKING:
    from strop.config.schema import Recipe
    from strop.data.types import Indices


def check(
    recipe: RecipeFile = None,
    show: Annotated[int, typer.Option(min=0, help="Number of rows to show token by token.")] = 0,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids with --show.")] = False,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Write a cleaned copy, and a log of each change.")
    ] = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Show the rows that would be trained on: drops, masks, stop tokens. The default tokenizer is the demo model's."""
    with status_line("reading and checking the rows"):
        from strop.data import check as data_check

        rows = api.check_rows(recipe, options or {})
    data_check.print_report(rows.prepared.report.as_json(), console)
    too_long = _note_on_length(rows.recipe, rows.prepared.train.lengths)
    print_notes([too_long] if too_long else [])
    if show:
        data_check.print_examples(rows.prepared, show, console, ids=ids)
    if fix is not None:
        changes = data_check.write_cleaned_copy(rows.recipe.data, rows.tokenizer, fix, rows.data_kind)
        dropped = sum(change.change.startswith("dropped") for change in changes)
        with fix.open("rb") as file:
            written = sum(1 for _ in file)
        summary = f"wrote {fix}: {written:,} rows, {dropped:,} dropped (see {fix}.changes.jsonl)"
        console.print(summary, markup=False, highlight=False)
    report = rows.prepared.report
    refusal = report.refusal or (report.eval.refusal if report.eval else None)
    print_json({**report.as_json(), **({"error": refusal.as_json()} if refusal else {})}, as_json)
    if refusal:
        raise typer.Exit(InputError.exit_code)


def _note_on_length(recipe: Recipe, lengths: Indices) -> str | None:
    """Return a note if rows are longer than the context length in the model's config."""
    from strop.errors import ModelError
    from strop.models.families.shape import read_model_info
    from strop.objectives.table import max_completion_tokens

    try:
        shape = read_model_info(recipe.model.name, recipe.model.revision).shape
    except ModelError:
        return None
    return shape.count_too_long(lengths, max_completion_tokens(recipe.train))
