"""Compute the plan and the row preview of the "new run" form, in a worker process that does not import torch."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from strop.config.load import Choice, parse_option, resolve
from strop.config.names import MEANINGS, OTHER_NAMES, SHORT_FORMS, WITHOUT_OPTION, full_name
from strop.config.schema import Recipe, option_fields
from strop.dash.files import limit_rows
from strop.dash.jobs import option_flags, shell_command
from strop.data.check import find_images, split_tokens
from strop.data.images import thumbnail
from strop.data.prepare import Prepared
from strop.data.reading import sources
from strop.data.store import Conversations, ExampleGroups, Examples, digest, dump_conversation
from strop.data.types import Indices
from strop.errors import InputError, StropError
from strop.machine.memory import parse_memory
from strop.models.families.shape import ModelInfo
from strop.models.source import is_on_disk, locate
from strop.models.tokenizer import load_tokenizer
from strop.objectives.table import data_kind_of, prepare_rows
from strop.planning.machines import TargetMachine, find_target
from strop.planning.microbatch import NO_DATA, Rows, measure_rows, plan_options
from strop.planning.plan import make_plan, read_model_facts, start_adapter
from strop.runs.folder import free_bytes

IMAGE_SIDE = 192  # pixels of the pictures next to rows
TARGET_CACHE_S = 10.0  # short, because the free memory of the machine changes
MODEL_CACHE_S = 60.0
ROWS_WAIT_S = 1.5  # time to wait for row lengths; without them, the plan assumes rows of maximum length


class Planner:
    def __init__(self) -> None:
        self._cache: dict[tuple[str, str], tuple[float, Any]] = {}
        self._row_sizes: dict[str, Rows | StropError] = {}
        self._threads: dict[str, threading.Thread] = {}

    def plan(
        self, options: dict[str, Any], memory: str | None, gpu: str | None, out: str | None, thorough: bool
    ) -> dict[str, Any]:
        """Return `strop plan --json` for these options, with the origin of each value and the train command."""
        started = time.perf_counter()
        arguments = ["train", *(flag for field, value in options.items() for flag in option_flags(field, value))]
        arguments += [f"--memory={memory}"] if memory else []
        resolved = resolve(None, plan_options(typed_options(options), False))
        model = resolved.recipe.model
        machine = (model.device, parse_memory(memory), gpu)
        target: TargetMachine = self._cached("target", machine, TARGET_CACHE_S, lambda: find_target(*machine))
        if gpu is not None and model.device.partition(":")[0] != target.device:
            resolved = resolved.decide([Choice("model.device", target.device, "plan", f"of the given GPU, {gpu}")])
        source = [model.name, model.revision]
        facts: ModelInfo = self._cached("model", source, MODEL_CACHE_S, lambda: read_model_facts(resolved.recipe))
        rows, state = self._rows(resolved.recipe)
        adapter = start_adapter(resolved.recipe)
        plan = make_plan(resolved, facts, target, rows=rows, adapter=adapter, thorough=thorough)
        plan_json = plan.as_json()
        choices = [asdict(choice) for choice in plan.resolved.choices.values() if choice.value != NO_DATA]
        return {
            **plan_json, "recipe": choices, "argv": arguments,
            "command": shell_command([*arguments, *([f"--out={out}"] if out else [])]),
            "rows": state, "downloads": _downloads(facts, plan_json["parameters"]),
            "writes": {"bytes": plan_json["disk_bytes"], "free_bytes": free_bytes(Path(out or "."))},
            "here": gpu is None, "took_ms": round(1000 * (time.perf_counter() - started), 1),
        }  # fmt: skip

    def _cached(self, kind: str, key: Any, seconds: float, make: Callable[[], Any]) -> Any:
        """Return make(), or its previous result if that is not older than `seconds`."""
        name = (kind, json.dumps(key))
        entry = self._cache.get(name)
        if entry is None or time.monotonic() - entry[0] > seconds:
            if len(self._cache) > 64:
                self._cache.clear()
            entry = self._cache[name] = (time.monotonic(), make())
        return entry[1]

    def _rows(self, recipe: Recipe) -> tuple[Rows, dict[str, Any]]:
        """Return the row lengths and their state for the page; a background thread reads them."""
        if recipe.data.train == NO_DATA:
            return Rows(), {"known": False, "number": None, "measuring": False, "why": "no data set is selected"}
        key = json.dumps([recipe.data.model_dump(), recipe.model.name, recipe.train.objective, _file_stamps(recipe)])
        if key not in self._row_sizes:
            if key not in self._threads:
                self._threads[key] = threading.Thread(target=self._read_row_sizes, args=(key, recipe), daemon=True)
                self._threads[key].start()
            with contextlib.suppress(KeyError):  # the thread has ended
                self._threads[key].join(ROWS_WAIT_S)
        rows = self._row_sizes.get(key)
        if rows is None:
            return Rows(), {"known": False, "number": None, "measuring": True, "why": "the rows are being read"}
        if isinstance(rows, StropError):
            raise rows
        refused = rows.refused.as_json() if rows.refused else None
        state = {"known": bool(rows), "number": len(rows) or None, "measuring": False, "refused": refused}
        return rows, {**state, "warnings": [*rows.warnings], "why": str(rows.refused or rows.unknown)}

    def _read_row_sizes(self, key: str, recipe: Recipe) -> None:
        result: Rows | StropError
        try:
            try:
                result = measure_rows(recipe)
            except StropError as error:
                result = error
            if len(self._row_sizes) > 16:
                self._row_sizes.clear()
            self._row_sizes[key] = result
        finally:
            del self._threads[key]


def typed_options(options: dict[str, Any]) -> dict[str, Any]:
    """Parse options as the command line does; returns typed values by full name."""
    fields = dict(option_fields())
    parsed: dict[str, Any] = {}
    for name, value in options.items():
        field = full_name(name)
        texts = [flag.partition("=")[2] for flag in option_flags(field, value)]
        # `resolve` reports unknown names with the nearest match
        parsed[field] = parse_option(field, *texts) if field in fields and texts else value
    return parsed


def schema() -> dict[str, Any]:
    """Return the type, the limits, the default and the help text of every recipe option."""
    fields = []
    for name, info in option_fields():
        bounds = {type(rule).__name__: rule for rule in info.metadata}
        minimum = getattr(bounds.get("Ge"), "ge", getattr(bounds.get("Gt"), "gt", None))
        maximum = getattr(bounds.get("Le"), "le", getattr(bounds.get("Lt"), "lt", None))
        kind, choices = _form_type(info.annotation)
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        fields.append({
            "field": name, "type": kind, "choices": choices, "default": default, "required": info.is_required(),
            "help": info.description or "", "minimum": minimum, "maximum": maximum, "names": _other_names(name),
        })  # fmt: skip
    return {"fields": fields, "short": SHORT_FORMS, "without_option": WITHOUT_OPTION}


def _other_names(field: str) -> list[str]:
    """Return the short form of a field, and names in other tools whose translation mentions it."""
    names = [name for name, translated in OTHER_NAMES.items() if translated.split()[0] == field]
    names += [name for name, text in MEANINGS.items() if f"}}{field} " in text]
    return [*names, *(short for short, full in SHORT_FORMS.items() if full == field)]


def _form_type(hint: Any) -> tuple[str, list[Any] | None]:
    """Return the type of a form field for a type hint, and its choices if it has any."""
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


def _file_stamp(name: str) -> list[Any]:
    """Return path, modification time and size, which change when a file is changed. Raises OSError."""
    status = os.stat(name)
    return [name, status.st_mtime_ns, status.st_size]


def _file_stamps(recipe: Recipe) -> list[Any]:
    """Return the stamps of data files that are given by path. Changes of globs and Hub data sets are not noticed."""
    stamps = []
    for names in (recipe.data.train, recipe.data.eval or []):
        for name in [names] if isinstance(names, str) else names:
            with contextlib.suppress(OSError):
                stamps.append(_file_stamp(name))
    return stamps


def _downloads(facts: ModelInfo, parameters: int) -> list[dict[str, Any]]:
    """Return the download of a run: for a Hub model that is not cached, about 2 bytes per parameter."""
    name = facts.name
    if is_on_disk(name) or Path(name).expanduser().exists():
        return []
    from huggingface_hub import try_to_load_from_cache

    weights = ("model.safetensors", "model.safetensors.index.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in weights):
        return []
    return [{"what": f"{name} from the Hugging Face Hub", "bytes": 2 * parameters, "about": True}]


# --- data ------------------------------------------------------------------------------------------

MAX_LISTED_ROWS = 2000  # of dropped, truncated and duplicate rows each
MAX_COMPARED_ROWS = 50_000  # in the search for duplicates
MAX_PREFIX_ROWS = 2000  # in the search for a shared prefix
NUM_BINS = 40
MAX_PAGE_ROWS = 100


class DataReader:
    def __init__(self) -> None:
        self._cache: dict[str, tuple[Prepared, dict[str, Any]]] = {}  # prepared data and its summary

    def rows(
        self, options: dict[str, Any], part: str, order: str, offset: int, count: int, ids: bool
    ) -> dict[str, Any]:  # fmt: skip
        """Return the data report and a page of rows, in the order of the file or with "long" or "short" rows first."""
        prepared, summary = self._prepare(resolve(None, {"model.name": "demo", **typed_options(options)}).recipe)
        examples = prepared.train if part == "train" else prepared.eval
        if part not in ("train", "eval") or order not in ("file", "long", "short"):
            raise InputError("part is train or eval; order is file, long or short")
        statistics = summary[part] if examples is not None else {"lengths": None, "repeats": [], "sharing": None}
        indices = _sort_rows(examples, order) if examples is not None else np.zeros(0, np.int64)
        page = indices[offset : offset + min(count, MAX_PAGE_ROWS)]
        rows = [_row(prepared, examples, int(index), ids) for index in page] if examples else []
        return {**summary["report"], **statistics, "part": part, "order": order, "num_rows": len(indices), "rows": rows}

    def held_out(self, options: dict[str, Any]) -> str:
        """Return the lines that a share in data.eval holds out. Raises InputError if they are not in JSONL files."""
        lines: dict[str, set[int]] = {}
        for row in self._prepare(resolve(None, typed_options(options)).recipe)[0].eval_conversations or ():
            lines.setdefault(row.file, set()).add(row.line)
        if other := next((file for file in lines if not file.endswith(".jsonl")), None):
            fix = "choose a file of rows that the run was not trained on"
            raise InputError(f"{other}: held-out rows are copied from JSONL files only", fix=fix)
        text = ""
        for file, numbers in lines.items():
            with open(file, encoding="utf-8", newline="\n") as rows:
                text += "".join(f"{row.rstrip()}\n" for number, row in enumerate(rows, 1) if number in numbers)
        return text

    def _prepare(self, recipe: Recipe) -> tuple[Prepared, dict[str, Any]]:
        data_kind = data_kind_of(recipe.train)
        new_tokens = recipe.lora.new_tokens
        settings = [
            recipe.data.model_dump(),
            recipe.model.name,
            recipe.model.revision,
            data_kind,
            new_tokens,
            recipe.train.labels,
        ]
        key = json.dumps([settings, _source_stamps(recipe)], sort_keys=True)
        if key not in self._cache:
            while len(self._cache) > 1:
                del self._cache[next(iter(self._cache))]
            tokenizer = load_tokenizer(locate(recipe.model.name, recipe.model.revision))
            prepared = prepare_rows(recipe, tokenizer, strict=False)
            self._cache[key] = (prepared, _summarize(prepared, recipe))
        return self._cache[key]


def _source_stamps(recipe: Recipe) -> list[Any]:
    """Return the stamps of all data files, including those that a glob matches."""
    stamps = []
    for name in (recipe.data.train, recipe.data.eval):
        if name is None or (isinstance(name, str) and name.strip().endswith("%")):
            continue
        try:
            stamps += [_file_stamp(file) for source in sources.resolve(name) for file in source.files]
        except (StropError, OSError):  # `prepare` reports the error
            stamps.append([name])
    return stamps


def _summarize(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    """Return the data report, and statistics of the training and evaluation rows."""
    full = prepared.report.as_json()
    report = {**(limit_rows(full, MAX_LISTED_ROWS) or {}), "eval": limit_rows(full["eval"], MAX_LISTED_ROWS)}
    summary: dict[str, Any] = {
        "report": {"report": report, "objective": recipe.train.objective, "model": recipe.model.name}
    }
    parts = {"train": (prepared.train, prepared.train_conversations)}
    if prepared.eval is not None and prepared.eval_conversations is not None:
        parts["eval"] = (prepared.eval, prepared.eval_conversations)
    batch = recipe.train.batch_size
    for name, (examples, conversations) in parts.items():
        summary[name] = {
            "lengths": _length_histogram(examples), "repeats": _find_duplicates(conversations),
            "sharing": _shared_prefix(examples, batch, pairs=isinstance(prepared.train_items, ExampleGroups)),
        }  # fmt: skip
    return summary


def _sort_rows(examples: Examples, order: str) -> Indices:
    if order == "file":
        return np.arange(len(examples), dtype=np.int64)
    indices: Indices = np.argsort(examples.lengths if order == "short" else -examples.lengths, kind="stable")
    return indices


def _row(prepared: Prepared, examples: Examples, index: int, with_ids: bool) -> dict[str, Any]:
    """Return a row with its text as pieces of [text, loss weight, whether it ends with a supervised stop token]."""
    renderer, example = prepared.renderer, examples[index]
    stop_ids = {*renderer.stop_ids, renderer.tokenizer.eos_token_id}
    pieces = list(split_tokens(example, renderer.tokenizer))
    row: dict[str, Any] = {
        "row": index, "file": example.file, "line": example.line, "tokens": len(example),
        "supervised": example.supervised, "part": examples.part(index),
        "pieces": [[text, weight, weight > 0 and ids[-1] in stop_ids] for text, ids, weight in pieces],
        "images": [thumbnail(image, IMAGE_SIDE) for _, _, image, _ in find_images(example, renderer.tokenizer)],
    }  # fmt: skip
    return {**row, "ids": [ids for _, ids, _ in pieces]} if with_ids else row


def _length_histogram(examples: Examples) -> dict[str, Any]:
    if not len(examples):
        return {"edges": [], "counts": [], "supervised": []}
    longest = int(examples.lengths.max())
    width = max(1, -(-longest // NUM_BINS))
    edges = np.arange(0, longest + width + 1, width)
    counts, supervised = (np.histogram(sizes, edges)[0] for sizes in (examples.lengths, examples.supervised))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "supervised": supervised.tolist()}


def _find_duplicates(conversations: Conversations) -> list[dict[str, Any]]:
    """Return the rows whose content is equal to that of an earlier row."""
    first_places: dict[int, str] = {}
    duplicates: list[dict[str, Any]] = []
    for index, conversation in enumerate(conversations):
        if index >= MAX_COMPARED_ROWS or len(duplicates) >= MAX_LISTED_ROWS:
            break
        place = conversation.place
        first = first_places.setdefault(digest(dump_conversation(conversation)), place)
        if first != place:
            duplicates.append({"file": conversation.file, "line": conversation.line, "same_as": first})
    return duplicates


def _shared_prefix(examples: Examples, batch_size: int, *, pairs: bool) -> dict[str, Any]:
    """Return the length of the prefix that all rows share, and the fraction of tokens saved by computing it once.

    pairs: return the mean length of the prefix that the two rows of each pair share.
    """
    rows = [examples[index].ids for index in range(min(len(examples), MAX_PREFIX_ROWS))]
    num_tokens = sum(map(len, rows))
    if len(rows) < 2 or not num_tokens:
        return {"prefix_tokens": 0, "prefix_saves": 0.0}
    if pairs:
        lengths = [_shared_prefix_length(pair) for pair in zip(rows[0::2], rows[1::2], strict=False)]
        return {"prefix_tokens": int(np.mean(lengths)), "prefix_saves": sum(lengths) / num_tokens}
    length = _shared_prefix_length(rows)
    return {"prefix_tokens": length, "prefix_saves": length * len(rows) * (1 - 1 / max(1, batch_size)) / num_tokens}


def _shared_prefix_length(rows: Sequence[Any]) -> int:
    prefix = rows[0][: min(map(len, rows))]
    for row in rows[1:]:
        different = np.flatnonzero(prefix != row[: len(prefix)])
        if len(different):
            prefix = prefix[: int(different[0])]
    return len(prefix)
