"""Plan and rows for the form of a new run, in a worker process of the server. Imports tokenizers, but not torch."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import typing
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from strop.config.load import SHORT_FORMS, Choice, parse_option, resolve
from strop.config.schema import Recipe, option_fields
from strop.dash.files import limit_rows
from strop.dash.jobs import command, option
from strop.data.check import token_pieces
from strop.data.prepare import Prepared, prepare
from strop.data.reading import sources
from strop.data.store import Conversations, Examples, digest, dump_conversation
from strop.data.types import Indices
from strop.errors import InputError, StropError
from strop.machine.memory import limit_bytes
from strop.models.families.shape import ModelInfo
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from strop.objectives.table import data_kind_of
from strop.planning.machines import Target, target_for
from strop.planning.microbatch import NO_DATA, Rows, plan_options, row_sizes
from strop.planning.plan import make_plan, read_model_facts, start_adapter
from strop.runs.folder import free_bytes

TARGET_S = 10.0  # seconds to cache machine facts; free memory changes
MODEL_S = 60.0
ROWS_S = 1.5  # seconds to wait for row lengths; until then the plan assumes rows of maximum length


class Planner:
    def __init__(self) -> None:
        self._cache: dict[tuple[str, str], tuple[float, Any]] = {}
        self._measured: dict[str, Rows | StropError] = {}
        self._measuring: dict[str, threading.Thread] = {}

    def plan(
        self, options: dict[str, Any], memory: str | None, gpu: str | None, out: str | None, thorough: bool
    ) -> dict[str, Any]:
        """Return `strop plan --json` for these options, with the origin of each value and the train command."""
        started = time.perf_counter()
        words = [word for field, value in options.items() for word in option(field, value)]
        given = typed_options(options)
        resolved = resolve(None, plan_options(given, False))
        model = resolved.recipe.model
        machine = (model.device, limit_bytes(memory), gpu)
        target: Target = self._cached("target", machine, TARGET_S, lambda: target_for(*machine))
        if gpu is not None and model.device.partition(":")[0] != target.device:
            resolved = resolved.decide([Choice("model.device", target.device, "plan", f"of --gpu {gpu}")])
        source = [model.name, model.revision]
        facts: ModelInfo = self._cached("model", source, MODEL_S, lambda: read_model_facts(resolved.recipe))
        rows, state = self._rows(resolved.recipe)
        adapter = start_adapter(resolved.recipe)
        found = make_plan(resolved, facts, target, rows=rows, adapter=adapter, thorough=thorough)
        words = ["train", *words, *([f"--memory={memory}"] if memory else [])]
        planned = found.as_json()
        choices = [asdict(choice) for choice in found.resolved.choices.values()]
        return {
            **planned, "recipe": [choice for choice in choices if choice["value"] != NO_DATA], "argv": words,
            "command": command([*words, *([f"--out={out}"] if out else [])]),
            "rows": state, "downloads": _downloads(facts, planned["parameters"]),
            "writes": {"bytes": planned["disk_bytes"], "free_bytes": free_bytes(Path(out or "."))},
            "here": gpu is None, "took_ms": round(1000 * (time.perf_counter() - started), 1),
        }  # fmt: skip

    def _cached(self, kind: str, key: Any, seconds: float, make: Callable[[], Any]) -> Any:
        name = (kind, json.dumps(key))
        known = self._cache.get(name)
        if known is None or time.monotonic() - known[0] > seconds:
            if len(self._cache) > 64:
                self._cache.clear()
            known = (time.monotonic(), make())
            self._cache[name] = known
        return known[1]

    def _rows(self, recipe: Recipe) -> tuple[Rows, dict[str, Any]]:
        """Return the row lengths known so far; a background thread measures the rest."""
        if recipe.data.train == NO_DATA:
            return Rows(), {"known": False, "number": None, "measuring": False, "why": "no data is chosen"}
        key = json.dumps([recipe.data.model_dump(), recipe.model.name, recipe.train.objective, _file_stamps(recipe)])
        if key not in self._measured:
            if key not in self._measuring:
                self._measuring[key] = threading.Thread(target=self._measure, args=(key, recipe), daemon=True)
                self._measuring[key].start()
            with contextlib.suppress(KeyError):  # the thread has ended
                self._measuring[key].join(ROWS_S)
        found = self._measured.get(key)
        if found is None:
            return Rows(), {"known": False, "number": None, "measuring": True, "why": "the rows are being read"}
        if isinstance(found, StropError):
            raise found
        known, number = bool(found), len(found) or None
        return found, {"known": known, "number": number, "measuring": False, "why": found.refused or found.unknown}

    def _measure(self, key: str, recipe: Recipe) -> None:
        found: Rows | StropError
        try:
            try:
                found = row_sizes(recipe)
            except StropError as error:
                found = error
            if len(self._measured) > 16:
                self._measured.clear()
            self._measured[key] = found
        finally:
            del self._measuring[key]


def typed_options(options: dict[str, Any]) -> dict[str, Any]:
    """Parse options as the command line does: full names, typed values."""
    known = dict(option_fields())
    given: dict[str, Any] = {}
    for short, value in options.items():
        field = SHORT_FORMS.get(short, short)
        texts = [word.partition("=")[2] for word in option(field, value)]
        many = field == "track" or (len(texts) > 1 and field in ("data.train", "data.eval"))
        # `resolve` reports unknown names with the nearest match
        given[field] = texts if many else parse_option(field, texts[0]) if field in known and texts else value
    return given


def schema() -> dict[str, Any]:
    """Return every recipe option, for the form."""
    fields = []
    for name, info in option_fields():
        bounds = {type(rule).__name__: rule for rule in info.metadata}
        least = getattr(bounds.get("Ge"), "ge", getattr(bounds.get("Gt"), "gt", None))
        most = getattr(bounds.get("Le"), "le", getattr(bounds.get("Lt"), "lt", None))
        kind, choices = _kind(info.annotation)
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        fields.append({
            "field": name, "type": kind, "choices": choices, "default": default, "required": info.is_required(),
            "help": info.description or "", "minimum": least, "maximum": most,
        })  # fmt: skip
    return {"fields": fields, "short": SHORT_FORMS}


def _kind(hint: Any) -> tuple[str, list[Any] | None]:
    """Return the kind of a field and its choices."""
    names = {bool: "boolean", int: "integer", float: "number", str: "text", list: "list", dict: "map"}
    choices: list[Any] = []
    kinds = []
    for part in [hint] if typing.get_origin(hint) in (Literal, list, dict, None) else typing.get_args(hint):
        while typing.get_origin(part) is typing.Annotated:
            part = typing.get_args(part)[0]
        origin = typing.get_origin(part)
        if origin is Literal:
            choices += typing.get_args(part)
        elif (origin or part) in names:
            kinds.append(names[origin or part])
    if choices:
        return "choice", [*choices, *(f"<{kind}>" for kind in kinds)]
    return (kinds[0] if kinds else "text"), None


def _file_stamps(recipe: Recipe) -> list[Any]:
    """Return path, time and size of data files; globs and Hub data sets are read once."""
    stamps = []
    for names in (recipe.data.train, recipe.data.eval or []):
        for name in [names] if isinstance(names, str) else names:
            with contextlib.suppress(OSError):
                status = os.stat(name)
                stamps.append([name, status.st_mtime_ns, status.st_size])
    return stamps


def _downloads(facts: ModelInfo, parameters: int) -> list[dict[str, Any]]:
    """Return what a run would download; a Hub model that is not cached counts two bytes per weight."""
    name = facts.name
    if name.startswith("demo") or name.endswith(".gguf") or Path(name).expanduser().exists():
        return []
    from huggingface_hub import try_to_load_from_cache

    wanted = ("model.safetensors", "model.safetensors.index.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in wanted):
        return []
    return [{"what": f"{name} from the Hugging Face Hub", "bytes": 2 * parameters, "about": True}]


# --- data ------------------------------------------------------------------------------------------

MOST_LISTED = 2000  # dropped, truncated and duplicate rows that are sent
MOST_LOOKED = 50_000  # rows that are compared for duplicates
BUCKETS = 40
MOST_ROWS = 100


class DataReader:
    def __init__(self) -> None:
        self._known: dict[str, tuple[Prepared, Recipe, dict[str, Any]]] = {}

    def rows(
        self, options: dict[str, Any], part: str, order: str, offset: int, count: int, ids: bool
    ) -> dict[str, Any]:  # fmt: skip
        """Return the data report and a page of rows. order: file (original order), long or short first."""
        recipe = resolve(None, {"model.name": "demo", **typed_options(options)}).recipe
        prepared, recipe, about = self._prepared(recipe)
        examples = prepared.train if part == "train" else prepared.eval
        if part not in ("train", "eval") or order not in ("file", "long", "short"):
            raise InputError("part is train or eval; order is file, long or short")
        result = about[part] if examples is not None else {"lengths": None, "repeats": [], "sharing": None}
        numbers = _ordered(examples, order) if examples is not None else np.zeros(0, np.int64)
        page = numbers[offset : offset + min(count, MOST_ROWS)]
        rows = [_row(prepared, examples[int(number)], int(number), ids) for number in page] if examples else []
        return {**about["report"], **result, "part": part, "order": order, "num_rows": len(numbers), "rows": rows}

    def _prepared(self, recipe: Recipe) -> tuple[Prepared, Recipe, dict[str, Any]]:
        data_kind = data_kind_of(recipe.train)
        asked = [recipe.data.model_dump(), recipe.model.name, recipe.model.revision, data_kind]
        key = json.dumps([asked, _source_stamps(recipe)], sort_keys=True)
        if key not in self._known:
            while len(self._known) > 1:
                del self._known[next(iter(self._known))]
            tokenizer = load_tokenizer(locate(recipe.model.name, recipe.model.revision))
            prepared = prepare(recipe.data, tokenizer, strict=False, data_kind=data_kind)
            self._known[key] = (prepared, recipe, _about(prepared, recipe))
        return self._known[key]


def _source_stamps(recipe: Recipe) -> list[Any]:
    """Return path, time and size of every data file, so that changed files are read again."""
    names = [recipe.data.train, recipe.data.eval]
    stamps = []
    for name in names:
        if name is None or (isinstance(name, str) and name.strip().endswith("%")):
            continue
        try:
            files = [file for source in sources.resolve(name) for file in source.files]
            stamps += [[file, Path(file).stat().st_mtime_ns, Path(file).stat().st_size] for file in files]
        except (StropError, OSError):  # `prepare` reports the error
            stamps.append([name])
    return stamps


def _about(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    full = prepared.report.as_json()
    report = {**(limit_rows(full, MOST_LISTED) or {}), "eval": limit_rows(full["eval"], MOST_LISTED)}
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
    """Return a row with its tokens as pieces of [text, weight, is a supervised stop token]."""
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
    """Return a histogram of row lengths."""
    if not len(examples):
        return {"edges": [], "counts": [], "supervised": []}
    longest = int(examples.lengths.max())
    width = max(1, -(-longest // BUCKETS))
    edges = np.arange(0, longest + width + 1, width)
    counts, supervised = (np.histogram(sizes, edges)[0] for sizes in (examples.lengths, examples.supervised))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "supervised": supervised.tolist()}


def _repeats(conversations: Conversations) -> list[dict[str, Any]]:
    """Return rows that duplicate an earlier row."""
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
    """Return the prefix that all rows, or both rows of each pair, share, and a lower bound of the tokens it saves."""
    facts = [examples[number] for number in range(min(len(examples), 2000))]
    total = sum(map(len, facts))
    if len(facts) < 2 or not total:
        return {"prefix_tokens": 0, "prefix_saves": 0.0}
    if pairs:
        both = [_common([first.ids, second.ids]) for first, second in zip(facts[0::2], facts[1::2], strict=False)]
        return {"prefix_tokens": int(np.mean(both)), "prefix_saves": sum(both) / total}
    common = _common([example.ids for example in facts])
    return {"prefix_tokens": common, "prefix_saves": common * len(facts) * (1 - 1 / max(1, batch)) / total}


def _common(rows: list[Any]) -> int:
    length = min(map(len, rows))
    first = rows[0][:length]
    for row in rows[1:]:
        differ = np.flatnonzero(first[: len(row)] != row[: len(first)])
        if len(differ):
            first = first[: int(differ[0])]
    return len(first)
