"""Rows of data as the page shows them: tokens with mask and stop token, lengths, repeats, what sharing saves.

This runs in the data reader, a child process of the server: it imports tokenizers, but no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from strop.config.load import resolve
from strop.config.schema import Recipe
from strop.dash.planner import typed
from strop.data.check import token_pieces
from strop.data.prepare import Prepared, prepare
from strop.data.reading import sources
from strop.data.store import Conversations, Examples, digest, dump_conversation
from strop.data.types import Indices
from strop.errors import InputError, StropError
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from strop.objectives.table import data_kind_of

MOST_LISTED = 2000  # places of dropped, cut and repeated rows that are sent
MOST_LOOKED = 50_000  # rows that are compared for repeats and a common prefix
BUCKETS = 40
MOST_ROWS = 100


class DataReader:
    def __init__(self) -> None:
        self._known: dict[str, tuple[Prepared, Recipe, dict[str, Any]]] = {}

    def rows(
        self, options: dict[str, Any], part: str, order: str, offset: int, count: int, ids: bool
    ) -> dict[str, Any]:  # fmt: skip
        """The account of the data and a page of its rows. Raises InputError for data that cannot be read at all.

        order: file (as they come), long or short first.
        """
        recipe = resolve(None, {"model.name": "demo", **typed(options)}).recipe
        prepared, recipe, about = self._prepared(recipe)
        examples = prepared.train if part == "train" else prepared.eval
        if part not in ("train", "eval") or order not in ("file", "long", "short"):
            raise InputError("part is train or eval; order is file, long or short")
        told = about[part] if examples is not None else {"lengths": None, "repeats": [], "sharing": None}
        numbers = _ordered(examples, order) if examples is not None else np.zeros(0, np.int64)
        page = numbers[offset : offset + min(count, MOST_ROWS)]
        rows = [_row(prepared, examples[int(number)], int(number), ids) for number in page] if examples else []
        return {**about["report"], **told, "part": part, "order": order, "num_rows": len(numbers), "rows": rows}

    def _prepared(self, recipe: Recipe) -> tuple[Prepared, Recipe, dict[str, Any]]:
        data_kind = data_kind_of(recipe.train)
        asked = [recipe.data.model_dump(), recipe.model.name, recipe.model.revision, data_kind]
        key = json.dumps([asked, _stamps(recipe)], sort_keys=True)
        if key not in self._known:
            while len(self._known) > 1:
                del self._known[next(iter(self._known))]
            tokenizer = load_tokenizer(locate(recipe.model.name, recipe.model.revision))
            prepared = prepare(recipe.data, tokenizer, strict=False, data_kind=data_kind)
            self._known[key] = (prepared, recipe, _about(prepared, recipe))
        return self._known[key]


def _stamps(recipe: Recipe) -> list[Any]:
    """Of every file that the recipe names: a changed one is read again."""
    names = [recipe.data.train, recipe.data.eval]
    stamps = []
    for name in names:
        if name is None or (isinstance(name, str) and name.strip().endswith("%")):
            continue
        try:
            files = [file for source in sources.resolve(name) for file in source.files]
            stamps += [[file, Path(file).stat().st_mtime_ns, Path(file).stat().st_size] for file in files]
        except (StropError, OSError):  # `prepare` says what is wrong
            stamps.append([name])
    return stamps


def _about(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    report = prepared.report.as_json()
    for one in (report, report["eval"] or {}):
        for name in ("dropped", "cut"):
            if len(one.get(name) or []) > MOST_LISTED:
                one[f"{name}_left_out"] = len(one[name]) - MOST_LISTED
                one[name] = one[name][:MOST_LISTED]
    about: dict[str, Any] = {
        "report": {"report": report, "objective": recipe.train.objective, "model": recipe.model.name}
    }
    parts = {"train": (prepared.train, prepared.train_conversations)}
    if prepared.eval is not None and prepared.eval_conversations is not None:
        parts["eval"] = (prepared.eval, prepared.eval_conversations)
    batch = recipe.train.batch_size
    for name, (examples, conversations) in parts.items():
        about[name] = {
            "lengths": _lengths(examples), "repeats": _repeats(conversations),
            "sharing": _sharing(examples, batch, pairs=prepared.train_items is not None),
        }  # fmt: skip
    return about


def _ordered(examples: Examples, order: str) -> Indices:
    if order == "file":
        return np.arange(len(examples), dtype=np.int64)
    chosen: Indices = np.argsort(examples.lengths if order == "short" else -examples.lengths, kind="stable")
    return chosen


def _row(prepared: Prepared, example: Any, number: int, ids: bool) -> dict[str, Any]:
    """pieces: [text, weight, is a supervised stop token] one after the other."""
    renderer = prepared.renderer
    stops = {*renderer.stop_ids, renderer.tokenizer.eos_token_id}
    shown = list(token_pieces(example, renderer.tokenizer))
    row: dict[str, Any] = {
        "row": number, "file": example.file, "line": example.line, "tokens": len(example),
        "supervised": example.supervised,
        "pieces": [[text, weight, weight > 0 and numbers[-1] in stops] for text, numbers, weight in shown],
    }  # fmt: skip
    return {**row, "ids": [numbers for _, numbers, _ in shown]} if ids else row


def _lengths(examples: Examples) -> dict[str, Any]:
    """How many rows are how long, in at most so many steps of equal width."""
    if not len(examples):
        return {"edges": [], "counts": [], "supervised": []}
    longest = int(examples.lengths.max())
    width = max(1, -(-longest // BUCKETS))
    edges = np.arange(0, longest + width + 1, width)
    counts, supervised = (np.histogram(sizes, edges)[0] for sizes in (examples.lengths, examples.supervised))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "supervised": supervised.tolist()}


def _repeats(conversations: Conversations) -> list[dict[str, Any]]:
    """Rows that say what an earlier one says."""
    seen: dict[int, str] = {}
    found: list[dict[str, Any]] = []
    for number, conversation in enumerate(conversations):
        if number >= MOST_LOOKED or len(found) >= MOST_LISTED:
            break
        place = f"{conversation.file}:{conversation.line}"
        first = seen.setdefault(digest(dump_conversation(conversation)), place)
        if first != place:
            found.append({"file": conversation.file, "line": conversation.line, "same_as": first})
    return found


def _sharing(examples: Examples, batch: int, *, pairs: bool) -> dict[str, Any]:
    """What is computed once for several rows: the tokens that all rows start with (once a batch of `batch` rows), or of
    pairs what both answers start with. prefix_saves: the share of tokens; more where rows of a batch have more in
    common."""
    looked = [examples[number] for number in range(min(len(examples), 2000))]
    total = sum(map(len, looked))
    if len(looked) < 2 or not total:
        return {"prefix_tokens": 0, "prefix_saves": 0.0}
    if pairs:
        both = [_common([first.ids, second.ids]) for first, second in zip(looked[0::2], looked[1::2], strict=False)]
        return {"prefix_tokens": int(np.mean(both)), "prefix_saves": sum(both) / total}
    common = _common([example.ids for example in looked])
    return {"prefix_tokens": common, "prefix_saves": common * len(looked) * (1 - 1 / max(1, batch)) / total}


def _common(rows: list[Any]) -> int:
    length = min(map(len, rows))
    first = rows[0][:length]
    for row in rows[1:]:
        differ = np.flatnonzero(first[: len(row)] != row[: len(first)])
        if len(differ):
            first = first[: int(differ[0])]
    return len(first)
