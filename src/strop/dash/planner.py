"""Plans for the page. Slow parts are cached, so that a changed setting takes milliseconds.

Runs in a worker process of the server. It imports tokenizers, but not torch.
"""

from __future__ import annotations

import json
import threading
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from strop.config.load import SHORT_FORMS, Choice, Resolved, parse_option, resolve
from strop.config.schema import Recipe, option_fields
from strop.dash.jobs import command, option
from strop.errors import StropError
from strop.machine.memory import limit_bytes
from strop.models.families.shape import Peek
from strop.planning.machines import Target, target_for
from strop.planning.microbatch import NO_DATA, Rows, plan_options, row_sizes
from strop.planning.model_facts import read_model_facts, start_adapter
from strop.planning.plan import make_plan
from strop.runs.folder import free_bytes

PLACE_S = 10.0  # seconds to cache machine facts; free memory changes
LOOK_S = 60.0
ROWS_S = 1.5  # seconds to wait for row lengths; until then the plan assumes rows of maximum length


class Planner:
    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[float, Any]] = {}
        self._measured: dict[str, Rows | StropError] = {}
        self._measuring: dict[str, threading.Thread] = {}

    def plan(
        self, options: dict[str, Any], memory: str | None, gpu: str | None, out: str | None, thorough: bool
    ) -> dict[str, Any]:
        """Return `strop plan --json` for these options, with the origin of each value and the train command.

        Raises InputError.
        """
        started = time.perf_counter()
        words = [word for field, value in options.items() for word in option(field, value)]
        given = typed_options(options)
        resolved = resolve(None, plan_options(given, False))
        limit = limit_bytes(memory)
        model = resolved.recipe.model
        where = (model.device, limit, gpu)
        target: Target = self._keep("place", where, PLACE_S, lambda: target_for(*where))
        if gpu is not None and model.device.partition(":")[0] != target.device:
            resolved = resolved.decide([Choice("model.device", target.device, "plan", f"of --gpu {gpu}")])
        looked: Peek = self._keep(
            "look", [model.name, model.revision], LOOK_S, lambda: read_model_facts(resolved.recipe)
        )
        rows, state = self._rows(resolved.recipe)
        found = make_plan(
            resolved, looked, target, rows=rows, adapter=start_adapter(resolved.recipe), thorough=thorough
        )
        words = ["train", *words, *([f"--memory={memory}"] if memory else [])]
        planned = found.as_json()
        return {
            **planned, "recipe": _choices(found.resolved), "argv": words,
            "command": command([*words, *([f"--out={out}"] if out else [])]),
            "rows": state, "downloads": _downloads(looked, planned["parameters"]),
            "writes": {"bytes": planned["disk_bytes"], "free_bytes": free_bytes(Path(out or "."))},
            "here": gpu is None, "took_ms": round(1000 * (time.perf_counter() - started), 1),
        }  # fmt: skip

    def _keep(self, kind: str, key: Any, seconds: float, make: Callable[[], Any]) -> Any:
        name = (kind, json.dumps(key))
        known = self._kept.get(name)
        if known is None or time.monotonic() - known[0] > seconds:
            if len(self._kept) > 64:
                self._kept.clear()
            known = (time.monotonic(), make())
            self._kept[name] = known
        return known[1]

    def _rows(self, recipe: Recipe) -> tuple[Rows, dict[str, Any]]:
        """Return the row lengths known so far; a background thread measures the rest."""
        if recipe.data.train == NO_DATA:
            return Rows(), {"known": False, "number": None, "measuring": False, "why": "no data is chosen"}
        key = json.dumps([recipe.data.model_dump(), recipe.model.name, recipe.train.objective, _stamps(recipe)])
        if key not in self._measured:
            thread = self._measuring.get(key)
            if thread is None:
                thread = threading.Thread(target=self._measure, args=(key, recipe), daemon=True)
                self._measuring[key] = thread
                thread.start()
            thread.join(ROWS_S)
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
    parts = [hint] if typing.get_origin(hint) in (Literal, list, dict, None) else list(typing.get_args(hint))
    plain = {bool: "boolean", int: "integer", float: "number", str: "text"}
    choices: list[Any] = []
    kinds = []
    for part in parts:
        while typing.get_origin(part) is typing.Annotated:
            part = typing.get_args(part)[0]
        origin = typing.get_origin(part)
        if origin is Literal:
            choices += typing.get_args(part)
        elif origin in (list, dict):
            kinds.append("list" if origin is list else "map")
        elif part in plain:
            kinds.append(plain[part])
    if choices:
        return "choice", [*choices, *([] if not kinds else [f"<{kind}>" for kind in kinds])]
    return (kinds[0] if kinds else "text"), None


def _choices(resolved: Resolved) -> list[dict[str, Any]]:
    return [
        {"field": choice.field, "value": choice.value, "origin": choice.origin, "why": choice.why}
        for choice in resolved.choices.values()
        if choice.field != "data.train" or choice.value != "-"
    ]


def _stamps(recipe: Recipe) -> list[Any]:
    """Return path, time and size of data files; globs and Hub data sets are read once."""
    names = [recipe.data.train, recipe.data.eval]
    paths = [Path(one) for name in names for one in (name if isinstance(name, list) else [name] if name else [])]
    stamps = []
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            continue
        stamps.append([str(path), found.st_mtime_ns, found.st_size])
    return stamps


def _downloads(looked: Peek, parameters: int) -> list[dict[str, Any]]:
    """Return what a run would download; a Hub model that is not cached counts two bytes per weight."""
    name = looked.name
    if name.startswith("demo") or name.endswith(".gguf") or Path(name).expanduser().exists():
        return []
    from huggingface_hub import try_to_load_from_cache

    wanted = ("model.safetensors", "model.safetensors.index.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in wanted):
        return []
    return [{"what": f"{name} from the Hugging Face Hub", "bytes": 2 * parameters, "about": True}]
