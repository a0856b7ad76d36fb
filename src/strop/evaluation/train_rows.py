"""Find out which of the evaluated rows a run was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from strop.config.load import read_resolved
from strop.config.schema import Recipe
from strop.data.answers import read_answers
from strop.data.prepare import Prepared
from strop.data.store import digest, dump_conversation
from strop.data.types import Conversation, DataKind
from strop.errors import InputError, RecipeError
from strop.evaluation.metrics import MIN_CLAIM_ROWS
from strop.models.adapter_config import ORIGIN_FILE, adapter_folder
from strop.models.adapters import locate_base, locate_tokenizer
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from strop.objectives.table import data_kind_of, prepare_rows
from strop.runs.folder import RunFolder, cache_folder, is_run


def find_run(name: str) -> RunFolder | None:
    """Return the run if `name` is a run folder or the folder of the adapter or model in it, else None."""
    path = Path(name).expanduser()
    folder = adapter_folder(name) or (RunFolder(path).saved if is_run(path) else path)
    run = RunFolder(folder.parent)
    return run if is_run(run.path) and run.saved == folder else None


def find_recipe(name: str) -> Recipe | None:
    """Return the run's recipe, or None if `name` is not a run or its recipe is from an older version of strop."""
    run = find_run(name)
    try:
        return None if run is None else read_resolved(run.recipe).recipe
    except RecipeError:
        return None


def find_train_rows(name: str, rows: Sequence[Conversation]) -> list[bool] | None:
    """Return whether each row is in the training data of the run, or of a run that it started from.

    name: a run, or a model merged from one. A run starts from another one's adapter, model, or merged model.

    Returns None if that is unknown, because `name` is neither, or the data is unreadable or has changed.
    """
    name = _find_origin(name) or name
    recipe, data = find_recipe(name), prepare_train_rows(name)
    if recipe is None or data is None:
        return None
    in_earlier = [False] * len(rows)
    for start in filter(None, (recipe.model.adapter, _find_base_run(recipe.model.name))):
        if (found := find_train_rows(start, rows)) is None:
            return None
        in_earlier = [any(pair) for pair in zip(in_earlier, found, strict=True)]
    train_rows, data_kind = data.train_conversations, data_kind_of(recipe.train)
    digests = train_rows.digests if data_kind == "turns" else [_hash_row(row, data_kind) for row in train_rows]
    in_this_run = np.isin([_hash_row(row, data_kind) for row in rows], digests)
    if data.answers:  # of a teacher, which the gold need not equal
        in_this_run |= np.isin([_hash_row(row, "prompts") for row in rows], np.array([*data.answers], np.uint64))
    return [bool(first or this) for first, this in zip(in_earlier, in_this_run, strict=True)]


def _find_origin(name: str) -> str | None:
    """Return the adapter that a model folder was merged from, or None if it was not merged by strop."""
    file = Path(name).expanduser() / ORIGIN_FILE
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["adapter"]) if file.is_file() else None
    except (OSError, ValueError, LookupError, TypeError):
        return name  # damaged: its rows are unknown


def _find_base_run(model: str) -> str | None:
    """Return a base model if it is a run's, or was merged from one, else None."""
    return model if find_run(model) is not None or _find_origin(model) is not None else None


def prepare_train_rows(name: str) -> Prepared | None:
    """Return the data of a run. Returns None if `name` is not a run, or its data is unreadable or has changed."""
    try:
        run, recipe = find_run(name), find_recipe(name)
        if run is None or recipe is None:
            return None
        start, model = recipe.model.adapter, recipe.model
        source = locate(model.name, model.revision) if run.has_model else locate_base(run.adapter)
        folder = None if start is None else adapter_folder(start)
        tokenizer = load_tokenizer(source if folder is None else locate_tokenizer(folder, source))
        answers = read_answers(run.teacher) if run.teacher.is_file() else None
        data = prepare_rows(recipe, tokenizer, cache=cache_folder() / "data", answers=answers)
        data = replace(data, answers=answers or {})
    except (InputError, OSError):
        return None
    return data if data.hash == run.read_lock()["data"] else None


def _hash_row(row: Conversation, data_kind: DataKind) -> int:
    """Hash a row without its label, rejected answer and negatives. For "prompts", the right answer is also excluded."""
    turns = row.messages[:-1] if data_kind == "prompts" and row.answer is not None else row.messages
    positive = row.passages[:1]
    row = replace(row, messages=turns, rejected=(), desirable=None, label=None, passages=positive)
    return digest(dump_conversation(row))


def add_row_notes(result: dict[str, Any], rows: Sequence[Conversation], train_rows: Sequence[bool] | None) -> None:
    """Add the number of evaluated rows that are also training rows, and notes about them, repeated and too few rows."""
    evaluated = rows[: result["rows"]]
    if repeated := len(evaluated) - len({digest(dump_conversation(row)) for row in evaluated}):
        what = f"{repeated} of {result['rows']} rows repeat an earlier one"
        result["notes"].append(f"{what}: the intervals are too narrow, as they assume different rows")
    if "difference" in result and result["rows"] < MIN_CLAIM_ROWS:
        result["notes"].append(f"no difference is claimed on fewer than {MIN_CLAIM_ROWS} rows")
    result["train_rows"] = None if train_rows is None else sum(train_rows[: result["rows"]])
    if result["train_rows"]:
        note = f"{result['train_rows']} of {result['rows']} rows are also train rows: the run may have memorized them"
        result["notes"].append(note)
