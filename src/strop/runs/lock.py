"""lock.json: what a run was made of, so that it can be made again or told apart from another."""

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
    "strop",
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "accelerate",
    "numpy",
    "numba",
    "bitsandbytes",
)

# recipe values that do not change what is trained, or are held by their content (data) or fingerprint (model)
HARMLESS = {
    "out", "preset", "track", "model.name", "model.revision", "model.placement", "data.train", "data.eval",
    "data.columns", "data.encoding", "train.log_steps", "train.save_steps", "train.keep_checkpoints", "train.max_time",
    "train.timeout",
}  # fmt: skip
# the shape of what is trained, to which a checkpoint of another shape does not fit, and what counts at the start alone
SHAPES = {
    "lora.r", "lora.target_modules", "lora.bias", "lora.use_dora", "lora.rank_pattern", "lora.modules_to_save",
    "lora.new_tokens", "lora.init", "train.objective",
}  # fmt: skip
PARTS = ("base", "data", "template", "rewards")  # of a lock, each a hash
GROUPS = {
    "lr": {"train.learning_rate"},
    "schedule": {"train.lr_scheduler", "train.warmup", "train.epochs", "train.max_steps"},
}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
    """A part of a run that is not what it was: its name, both values as text, and whether a resume may allow it."""

    name: str
    was: str
    now: str
    allowable: bool = True


def compare_locks(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """What decides a run's numbers and differs between two locks: base, data, template, functions that reward, each
    recipe value that matters, and the major version of each library."""
    found = []
    for name in PARTS:
        was, now = old.get(name), new.get(name)
        if _held(was) != _held(now):
            found.append(Difference(name, _short(was), _short(now)))
    before, after = old.get("values", {}), new.get("values", {})
    for field in before:
        if before[field] != after.get(field) and field not in HARMLESS:
            found.append(Difference(field, str(before[field]), str(after.get(field)), field not in SHAPES))
    for library, version_now in new["versions"].items():
        was = old["versions"].get(library, version_now)
        if was.partition(".")[0] != version_now.partition(".")[0]:
            found.append(Difference("versions", f"{library} {was}", f"{library} {version_now}"))
    return found


def is_allowed(difference: Difference, names: Sequence[str]) -> bool:
    """Whether one of the names (a field, its last part, `lr`, `schedule`) allows the difference."""
    known = {difference.name, difference.name.rpartition(".")[2]}
    known |= {group for group, fields in GROUPS.items() if difference.name in fields}
    return difference.allowable and not known.isdisjoint(names)


def check_allowed_names(names: Iterable[str], fields: Iterable[str]) -> None:
    """Raises InputError for a name that could allow nothing. fields: of the recipe."""
    known = [*GROUPS, *PARTS, "versions", *(name for field in fields for name in (field, field.rpartition(".")[2]))]
    for name in names:
        if name not in known:
            what = f"--allow-changed {name}: no such name{nearest(name, known)}"
            raise InputError(what, fix=f"give {', '.join([*GROUPS, *PARTS, 'versions'])}, or a field of the recipe")


def _held(value: Any) -> Any:
    """What a part is held to: of a base its fingerprint, wherever it lies."""
    return value.get("fingerprint") if isinstance(value, Mapping) else value


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value.get('name')} ({str(value.get('fingerprint'))[:12]})"
    return str(value)[:12]
