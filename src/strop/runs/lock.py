"""lock.json, which stores the inputs and library versions of a run to reproduce it and detect changes on resume."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from strop.errors import InputError, suggest

LIBRARIES = (
    "strop", "torch", "transformers", "peft", "tokenizers", "safetensors", "accelerate", "numpy", "numba",
    "bitsandbytes",
)  # fmt: skip

# recipe fields that do not change the results, or whose content is compared by hash or fingerprint
IGNORED_FIELDS = {
    "out", "preset", "track", "model.name", "model.revision", "model.placement", "data.train", "data.eval",
    "data.columns", "data.encoding", "train.log_steps", "train.save_steps", "train.keep_checkpoints", "train.max_time",
    "train.timeout", "train.samples",
}  # fmt: skip
# fields that a resume cannot change: they determine the shapes of trained weights, or are used only at the start
FIXED_FIELDS = {
    "lora.r", "lora.target_modules", "lora.bias", "lora.use_dora", "lora.rank_pattern", "lora.modules_to_save",
    "lora.new_tokens", "lora.init", "lora.vision", "train.objective", "train.teacher",
}  # fmt: skip
HASHED_PARTS = ("base", "data", "kept", "teacher", "template", "rewards", "environment")  # fields of lock.json
FIELD_GROUPS = {  # names for several fields in --allow-changed
    "lr": {"train.learning_rate"},
    "schedule": {"train.lr_scheduler", "train.warmup", "train.epochs", "train.max_steps"},
}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that affect a run's results."""
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
    """A changed field or input: its name, old and new value as text, and whether --allow-changed can allow it."""

    name: str
    was: str
    now: str
    allowable: bool = True


def compare_locks(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return the differences between two locks that can change results. Of libraries, only major versions count."""
    differences, old_values, new_values = [], old.get("values", {}), new.get("values", {})
    for name in HASHED_PARTS:
        was, now = old.get(name), new.get(name)
        if name == "kept" and old_values.get("train.keep") != new_values.get("train.keep"):
            continue  # it follows from the setting
        if _fingerprint(was) != _fingerprint(now):
            differences.append(Difference(name, _shorten(was), _shorten(now)))
    for field, was in old_values.items():
        if was != new_values.get(field) and field not in IGNORED_FIELDS:
            # without beta no start weights are stored, from which it counts the divergence
            fixed = field in FIXED_FIELDS or (field == "train.beta" and not was)
            differences.append(Difference(field, str(was), str(new_values.get(field)), not fixed))
    for library, now in new["versions"].items():
        was = old["versions"].get(library, now)
        if was.partition(".")[0] != now.partition(".")[0]:
            differences.append(Difference("versions", f"{library} {was}", f"{library} {now}"))
    return differences


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
            what = f"--allow-changed {name}: no such name{suggest(name, known)}"
            raise InputError(what, fix=f"give {', '.join(groups)}, or a recipe field")


def _fingerprint(value: Any) -> Any:
    """Return the fingerprint of a base model, whose name may have changed, or any other value unchanged."""
    return value.get("fingerprint") if isinstance(value, Mapping) else value


def _shorten(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value.get('name')} ({str(value.get('fingerprint'))[:12]})"
    return str(value)[:12]
