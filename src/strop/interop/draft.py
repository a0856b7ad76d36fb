"""A recipe in the making: what came from which key, what means something else here, what has no equivalent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from strop.config.load import Resolved, resolve
from strop.errors import InputError, RecipeError

# what only the user can give, and what stands for it while a recipe without it is checked
MISSING = {"model.name": "MODEL", "data.train": "YOURS.jsonl"}
_GIVE = {"model": ("model.name", "give the model here, or with --model"),
         "data": ("data.train", "give your rows here, or with --data")}  # fmt: skip


@dataclass(frozen=True)
class Note:
    """A key of the other tool, and what a person should know about it. line: in its file, where that is known."""

    key: str
    text: str
    line: int | None = None


@dataclass
class Draft:
    """fields: recipe values by dotted name, with the key that each came from.
    differs: taken over, with another meaning. lacks: left out, and strop has nothing like it.
    own_way: left out, because strop decides it itself and it does not change what is learned.
    """

    peer: str
    file: Path
    fields: dict[str, tuple[Any, str]] = field(default_factory=dict)
    differs: list[Note] = field(default_factory=list)
    lacks: list[Note] = field(default_factory=list)
    own_way: list[Note] = field(default_factory=list)
    unread_model: bool = False  # a model is named, by a value that cannot be read

    def put(self, name: str, value: Any, source: str) -> None:
        self.fields[name] = (value, source)

    def get(self, name: str) -> Any:
        return self.fields[name][0] if name in self.fields else None

    def differ(self, key: str, text: str, line: int | None = None) -> None:
        self.differs.append(Note(key, text, line))

    def lack(self, key: str, text: str, line: int | None = None) -> None:
        self.lacks.append(Note(key, text, line))

    def skip(self, key: str, text: str = "", line: int | None = None) -> None:
        self.own_way.append(Note(key, text, line))

    def finish(self) -> Imported:
        """Checked as `strop train` would check it. Raises RecipeError where a value is out of strop's bounds."""
        if self.get("train.lr_scheduler") == "constant" and self.get("train.warmup") is None:
            self.put("train.warmup", 0, "constant from the first step on")
        if self.get("data.eval") is None and (patience := self.fields.pop("train.early_stopping", None)) is not None:
            what = f"{patience[0]}: needs rows to evaluate on: give data.eval, and train.early_stopping {patience[0]}"
            self.lack(patience[1], what)
        values = {name: value for name, (value, _) in self.fields.items()}
        if "model.name" not in values and not self.unread_model:
            raise RecipeError(f"{self.file}: names no model", fix="is it a training config of this tool?")
        missing = [name for name in MISSING if name not in values]
        resolved = resolve(None, {**values, **{name: MISSING[name] for name in missing}})
        return Imported(self, resolved, missing)


@dataclass(frozen=True)
class Imported:
    """draft: what became of every key. resolved: the recipe. missing: fields that only the user can give."""

    draft: Draft
    resolved: Resolved
    missing: list[str]

    def as_yaml(self) -> str:
        """The recipe, each value with the key that it came from; then, as comments, all that did not come along."""
        lines = [f"# From {self.draft.file.name} ({self.draft.peer}), by `strop import`."]
        section = ""
        for name in sorted(self.draft.fields, key=_order):
            value, source = self.draft.fields[name]
            head, _, leaf = name.rpartition(".")
            if head and head != section:
                lines.append(f"{head}:")
                field_, what = _GIVE.get(head, ("", ""))
                lines += [f"  # {field_.partition('.')[2]}: {what}"] * (field_ in self.missing)
            section = head
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
            lines.append(f"{'  ' if head else ''}{leaf}: {text.removesuffix('...' + chr(10)).strip()}  # {source}")
        for title, notes in self._told().items():
            lines += [f"# {title}:"] * bool(notes)
            lines += [f"#   {_line(note)}" for note in notes]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        fields = [{"field": name, "value": value, "from": key} for name, (value, key) in self.draft.fields.items()]
        lists = {"differs": self.draft.differs, "no_equivalent": self.draft.lacks, "own_way": self.draft.own_way}
        told = {
            name: [{"key": note.key, "what": note.text, "line": note.line} for note in notes]
            for name, notes in lists.items()
        }
        return {"peer": self.draft.peer, "fields": fields, "missing": self.missing, **told}

    def _told(self) -> dict[str, list[Note]]:
        return {
            "Another meaning here": self.draft.differs,
            "No equivalent in strop, left out": self.draft.lacks,
            "Left out, because strop decides it itself and it does not change what is learned": self.draft.own_way,
        }


class Keys:
    """The keys of a config, each to be taken once; what nobody takes is told at the end. unread: keys whose values
    cannot be read. none: keys that are given, as None."""

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

    def default(self, key: str, said: str) -> str:
        """Where a value comes from that was not taken from `key`."""
        return f"{said}: line {self._lines[key]} cannot be read, set it here" if key in self._unread else said

    def left(self) -> list[str]:
        return list(self._left)

    def line(self, key: str) -> int | None:
        return self._lines.get(key)

    def end(self, draft: Draft, own_way: Iterable[str]) -> None:
        """What was not taken: known to be strop's own business, or without equivalent."""
        known = set(own_way)
        for key, value in self._left.items():
            if key in known:
                draft.skip(key)
            else:
                draft.lack(key, shown(value), self.line(key))
        self._left.clear()


def read_yaml(path: Path) -> dict[str, Any]:
    """A map out of a YAML file. Raises InputError."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}", fix="give the path of a YAML file"
        ) from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {str(error).splitlines()[0]}", fix="mend it") from None
    except RecursionError:
        raise InputError(f"{path}: not a config: too deep", fix="mend it") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a map of keys", fix="give the config that the other tool trains with")
    return tree


def shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _line(note: Note) -> str:
    at = f" (line {note.line})" if note.line else ""
    return f"{note.key}{at}{': ' if note.text else ''}{note.text}".replace("\n", " ")


def _order(name: str) -> tuple[int, str]:
    sections = ["preset", "model", "data", "lora", "train", "track", "seed", "out"]
    return sections.index(name.partition(".")[0]), name
