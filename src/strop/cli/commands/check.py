"""`strop check`: what would be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strop.cli.options import Json, RecipeFile
from strop.cli.progress import alive
from strop.cli.terminal import console, print_json, print_notes
from strop.errors import InputError

if TYPE_CHECKING:
    from strop.config.schema import Recipe
    from strop.data.store import Indices


def check(
    recipe: RecipeFile = None,
    show: Annotated[int, typer.Option(min=0, help="Rows to show token by token.")] = 0,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids too.")] = False,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Write a cleaned copy, with a log of each change.")
    ] = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """See what would be trained on: rows, drops, masks, stop tokens (without --model: with the demo's tokenizer)."""
    with alive(console, "reading and checking the rows"):
        from strop.config.load import resolve
        from strop.data import check as account
        from strop.data.prepare import prepare
        from strop.models.source import locate
        from strop.models.tokenizer import load_tokenizer
        from strop.objectives.table import learning_of

        chosen = resolve(recipe, options if recipe else {"model.name": "demo", **(options or {})}).recipe
        tokenizer = load_tokenizer(locate(chosen.model.name, chosen.model.revision))
        learning = learning_of(chosen.train)
        prepared = prepare(chosen.data, tokenizer, strict=False, learning=learning)
    account.print_report(prepared.report.as_json(), console)
    beyond = _beyond(chosen, prepared.train.lengths)
    print_notes([beyond] if beyond else [])
    if show:
        account.show(prepared, show, console, ids=ids)
    if fix is not None:
        changes = account.fix(chosen.data, tokenizer, fix, learning)
        dropped = sum(change.change.startswith("dropped") for change in changes)
        with fix.open("rb") as file:
            rows = sum(1 for _ in file)
        told = f"wrote {fix}: {rows:,} rows, {dropped:,} dropped (see {fix}.changes.jsonl)"
        console.print(told, markup=False, highlight=False)
    report = prepared.report
    refusal = report.refusal or (report.eval.refusal if report.eval else None)
    print_json({**report.as_json(), **({"error": refusal.as_json()} if refusal else {})}, as_json)
    if refusal:
        raise typer.Exit(InputError.exit_code)


def _beyond(recipe: Recipe, lengths: Indices) -> str | None:
    """Whether rows are longer than what the model was made for, where its config says."""
    from strop.errors import ModelError
    from strop.models.families.shape import read_model_info
    from strop.objectives.table import drawn_tokens

    try:
        shape = read_model_info(recipe.model.name, recipe.model.revision).shape
    except ModelError:
        return None
    return shape.count_too_long(lengths, drawn_tokens(recipe.train))
