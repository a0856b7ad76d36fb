"""lock.json: the inputs and library versions of a run, to reproduce it and to detect changes on resume."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from strop.errors import InputError, nearest

LIBRARIES = (
    "strop", "torch", "transformers", "peft", "tokenizers", "safetensors", "accelerate", "numpy", "numba",
    "bitsandbytes",
)  # fmt: skip

# recipe fields that do not change the numbers, or whose content is compared instead (data: hash, model: fingerprint)
IGNORED_FIELDS = {
    "out", "preset", "track", "model.name", "model.revision", "model.placement", "data.train", "data.eval",
    "data.columns", "data.encoding", "train.log_steps", "train.save_steps", "train.keep_checkpoints", "train.max_time",
    "train.timeout",
}  # fmt: skip
# fields that decide the shapes of the trained weights or only count at the start of a run: a resume cannot change them
FIXED_FIELDS = {
    "lora.r", "lora.target_modules", "lora.bias", "lora.use_dora", "lora.rank_pattern", "lora.modules_to_save",
    "lora.new_tokens", "lora.init", "train.objective",
}  # fmt: skip
HASHED_PARTS = ("base", "data", "template", "rewards")  # of a lock
FIELD_GROUPS = {  # names of --allow-changed that stand for several fields
    "lr": {"train.learning_rate"},
    "schedule": {"train.lr_scheduler", "train.warmup", "train.epochs", "train.max_steps"},
}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that decide a run's numbers."""
    installed = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Difference:
    """A part of a run that has changed: its name, both values as text, and whether --allow-changed may name it."""

    name: str
    was: str
    now: str
    allowable: bool = True


def compare_locks(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return the differences between two locks that can change a run's numbers, such as major versions of libraries."""
    changes = []
    for name in HASHED_PARTS:
        was, now = old.get(name), new.get(name)
        if _fingerprint(was) != _fingerprint(now):
            changes.append(Difference(name, _short(was), _short(now)))
    before, after = old.get("values", {}), new.get("values", {})
    for field in before:
        if before[field] != after.get(field) and field not in IGNORED_FIELDS:
            changes.append(Difference(field, str(before[field]), str(after.get(field)), field not in FIXED_FIELDS))
    for library, version_now in new["versions"].items():
        was = old["versions"].get(library, version_now)
        if was.partition(".")[0] != version_now.partition(".")[0]:
            changes.append(Difference("versions", f"{library} {was}", f"{library} {version_now}"))
    return changes


def is_allowed(difference: Difference, names: Sequence[str]) -> bool:
    """Return whether one of the names (a field, its last part, `lr` or `schedule`) allows the difference."""
    known = {difference.name, difference.name.rpartition(".")[2]}
    known |= {group for group, fields in FIELD_GROUPS.items() if difference.name in fields}
    return difference.allowable and not known.isdisjoint(names)


def check_allowed_names(names: Iterable[str], fields: Iterable[str]) -> None:
    """Raise InputError for a name of --allow-changed that matches nothing. fields: the recipe's fields."""
    groups = [*FIELD_GROUPS, *HASHED_PARTS, "versions"]
    known = [*groups, *(name for field in fields for name in (field, field.rpartition(".")[2]))]
    for name in names:
        if name not in known:
            what = f"--allow-changed {name}: no such name{nearest(name, known)}"
            raise InputError(what, fix=f"give {', '.join(groups)}, or a recipe field")


def _fingerprint(value: Any) -> Any:
    """Return the fingerprint of a base model, which may have moved, and any other part unchanged."""
    return value.get("fingerprint") if isinstance(value, Mapping) else value


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value.get('name')} ({str(value.get('fingerprint'))[:12]})"
    return str(value)[:12]
