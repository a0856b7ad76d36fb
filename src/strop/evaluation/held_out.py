"""Whether rows were held out: which of them a run was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from strop.config.load import read_resolved
from strop.config.schema import Recipe
from strop.data.prepare import prepare
from strop.data.store import digest, dump_conversation
from strop.data.types import Conversation, DataKind
from strop.errors import InputError, RecipeError
from strop.models.adapters import adapter_folder, base_source, tokenizer_source
from strop.models.tokenizer import load_tokenizer
from strop.objectives.table import data_kind_of
from strop.runs.folder import RunFolder, cache_folder, is_run


def run_of(name: str) -> RunFolder | None:
    """The run by its folder or by that of its adapter; None for anything else. Raises ModelError as adapter_folder."""
    adapter = adapter_folder(name)
    if adapter is None:
        return None
    run = RunFolder(adapter.parent)
    return run if is_run(run.path) and run.adapter == adapter else None


def recipe_of(name: str) -> Recipe | None:
    """The recipe of a run; None where there is no run, or its recipe is one of an older strop's."""
    run = run_of(name)
    try:
        return None if run is None else read_resolved(run.recipe).recipe
    except RecipeError:
        return None


def trained_on(name: str, rows: Sequence[Conversation]) -> list[bool] | None:
    """Of each row, whether a run, or one that it started from, was trained on it, by content.

    None where that is not known: there is no run, or its data cannot be read any more or is not what it was. Needs no
    weights; rows that are still in the cache of their run are not tokenised again.
    """
    try:
        run, recipe = run_of(name), recipe_of(name)
        if run is None or recipe is None:
            return None
        start, source = recipe.model.adapter, base_source(run.adapter)
        before = [False] * len(rows) if start is None else trained_on(start, rows)
        folder = None if start is None else adapter_folder(start)
        tokenizer = load_tokenizer(source if folder is None else tokenizer_source(folder, source))
        data_kind = data_kind_of(recipe.train)
        data = prepare(recipe.data, tokenizer, cache=cache_folder() / "data", data_kind=data_kind)
    except InputError:
        return None
    if before is None or data.hash != run.read_lock()["data"]:
        return None
    known = data.train_conversations
    digests = known.digests if data_kind == "turns" else [_digest(row, data_kind) for row in known]
    own = np.isin([_digest(row, data_kind) for row in rows], digests)
    return [bool(was or found) for was, found in zip(before, own, strict=True)]


def _digest(row: Conversation, data_kind: DataKind) -> int:
    """What is learned from a row, whatever it was compared with and however it was judged: its answer, or its prompt
    alone."""
    turns = row.messages[:-1] if data_kind == "prompts" and row.answer is not None else row.messages
    return digest(dump_conversation(replace(row, messages=turns, rejected=(), desirable=None)))


def count_train_rows(result: dict[str, Any], known: Sequence[bool] | None) -> None:
    """Puts into a result how many of its rows are also train rows (train_rows; None where that is not known), and a
    note where there are some. known: as trained_on gives it; an interrupted evaluation has asked the first of them."""
    result["train_rows"] = None if known is None else sum(known[: result["rows"]])
    if result["train_rows"]:
        what = f"{result['train_rows']} of {result['rows']} rows are also train rows: the run may know them by heart"
        result.setdefault("notes", []).append(what)
