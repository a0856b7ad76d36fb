"""A recipe being imported: where each value came from, what differs in meaning, and what has no equivalent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from strop.config.load import Resolved, resolve
from strop.errors import InputError, RecipeError

# fields that only the user can fill in, with placeholders used while the recipe is validated
MISSING = {"model.name": "MODEL", "data.train": "YOURS.jsonl"}
_GIVE = {"model": ("model.name", "give the model here, or with --model"),
         "data": ("data.train", "give your rows here, or with --data")}  # fmt: skip


@dataclass(frozen=True)
class Note:
    """A key of the other tool's config, what the user should know about it, and its line if known."""

    key: str
    text: str
    line: int | None = None


@dataclass
class Draft:
    """The result of reading another tool's config, before validation.

    fields: recipe values by dotted name, each with the key it came from.
    differs: keys that were imported but have another meaning in strop.
    unsupported: keys without an equivalent, left out.
    ignored: keys left out because strop decides them itself and they do not change what is learned.
    """

    peer: str
    file: Path
    fields: dict[str, tuple[Any, str]] = field(default_factory=dict)
    differs: list[Note] = field(default_factory=list)
    unsupported: list[Note] = field(default_factory=list)
    ignored: list[Note] = field(default_factory=list)
    model_unreadable: bool = False  # a model is given as an expression that only running the script would evaluate

    def put(self, name: str, value: Any, source: str) -> None:
        self.fields[name] = (value, source)

    def get(self, name: str) -> Any:
        return self.fields[name][0] if name in self.fields else None

    def add_difference(self, key: str, text: str, line: int | None = None) -> None:
        self.differs.append(Note(key, text, line))

    def add_unsupported(self, key: str, text: str, line: int | None = None) -> None:
        self.unsupported.append(Note(key, text, line))

    def add_ignored(self, key: str, text: str = "", line: int | None = None) -> None:
        self.ignored.append(Note(key, text, line))

    def finish(self) -> Imported:
        """Validate the recipe as `strop train` does. Raises RecipeError if a value is out of range."""
        if self.get("train.lr_scheduler") == "constant" and self.get("train.warmup") is None:
            self.put("train.warmup", 0, "no warmup: constant from the first step")
        if self.get("data.eval") is None and (patience := self.fields.pop("train.early_stopping", None)) is not None:
            what = f"{patience[0]}: needs evaluation rows: set data.eval and train.early_stopping {patience[0]}"
            self.add_unsupported(patience[1], what)
        values = {name: value for name, (value, _) in self.fields.items()}
        if "model.name" not in values and not self.model_unreadable:
            raise RecipeError(f"{self.file}: no model is given", fix="check that it is a training config of this tool")
        missing = [name for name in MISSING if name not in values]
        resolved = resolve(None, {**values, **{name: MISSING[name] for name in missing}})
        return Imported(self, resolved, missing)


@dataclass(frozen=True)
class Imported:
    """An imported config: the draft with notes on every key, the recipe, and the fields the user must fill in."""

    draft: Draft
    resolved: Resolved
    missing: list[str]

    def to_yaml(self) -> str:
        """Return the recipe as YAML, each value with its source key; keys that were not imported follow as comments."""
        lines = [f"# From {self.draft.file.name} ({self.draft.peer}), by `strop import`."]
        section = ""
        for name in sorted(self.draft.fields, key=_sort_key):
            value, source = self.draft.fields[name]
            head, _, leaf = name.rpartition(".")
            if head and head != section:
                lines.append(f"{head}:")
                field_, what = _GIVE.get(head, ("", ""))
                lines += [f"  # {field_.partition('.')[2]}: {what}"] * (field_ in self.missing)
            section = head
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
            lines.append(f"{'  ' if head else ''}{leaf}: {text.removesuffix('...' + chr(10)).strip()}  # {source}")
        for title, notes in self._note_sections().items():
            lines += [f"# {title}:"] * bool(notes)
            lines += [f"#   {_format_note(note)}" for note in notes]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        fields = [{"field": name, "value": value, "from": key} for name, (value, key) in self.draft.fields.items()]
        lists = {"differs": self.draft.differs, "no_equivalent": self.draft.unsupported, "own_way": self.draft.ignored}
        notes_by_kind = {
            name: [{"key": note.key, "what": note.text, "line": note.line} for note in notes]
            for name, notes in lists.items()
        }
        return {"peer": self.draft.peer, "fields": fields, "missing": self.missing, **notes_by_kind}

    def _note_sections(self) -> dict[str, list[Note]]:
        return {
            "Imported, with a different meaning": self.draft.differs,
            "Left out: no equivalent in strop": self.draft.unsupported,
            "Left out: strop decides it itself, and it does not change what is learned": self.draft.ignored,
        }


class Keys:
    """The keys of a config. Each is taken once; keys left at the end are reported.

    lines: line of each key in its file. unread: keys whose values cannot be evaluated. none: keys given as None.
    """

    def __init__(
        self, values: Mapping[str, Any], lines: Mapping[str, int] | None = None, unread: Iterable[str] = ()
    ) -> None:
        self._unread = set(unread)
        self.none = {str(key) for key, value in values.items() if value is None}
        self._left = {str(key): value for key, value in values.items() if value is not None and value != ""}
        self._lines = dict(lines or {})

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def peek(self, key: str, default: Any = None) -> Any:
        return self._left.get(key, default)

    def default(self, key: str, source: str) -> str:
        """Return the source of a default, with a hint if the file sets `key` to something unreadable."""
        return f"{source}: line {self._lines[key]} cannot be read, set it here" if key in self._unread else source

    def left(self) -> list[str]:
        return list(self._left)

    def line(self, key: str) -> int | None:
        return self._lines.get(key)

    def report_rest(self, draft: Draft, ignored: Iterable[str]) -> None:
        """Report the keys that were not taken: as ignored if listed in `ignored`, else as unsupported."""
        known = set(ignored)
        for key, value in self._left.items():
            if key in known:
                draft.add_ignored(key)
            else:
                draft.add_unsupported(key, format_value(value), self.line(key))
        self._left.clear()


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises InputError."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}", fix="give the path of a YAML file"
        ) from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {str(error).splitlines()[0]}", fix="fix the syntax") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply to be a config", fix="check the file") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a mapping of keys", fix="give the config that the other tool trains with")
    return tree


def format_value(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _format_note(note: Note) -> str:
    at = f" (line {note.line})" if note.line else ""
    return f"{note.key}{at}{': ' if note.text else ''}{note.text}".replace("\n", " ")


def _sort_key(name: str) -> tuple[int, str]:
    sections = ["preset", "model", "data", "lora", "train", "track", "seed", "out"]
    return sections.index(name.partition(".")[0]), name
