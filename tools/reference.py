"""Write the tables of docs/recipe.md and docs/formats.md from the code: `python tools/reference.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from strop.config.names import SHORT_FORMS
from strop.config.schema import OBJECTIVE_OPTIONS, option_fields
from strop.data.converters import CALL_ROLES, ROLES
from strop.data.formats import FORMATS, Format
from strop.data.reading.files import TYPES
from strop.data.row_errors import REASONS

DOCS = Path(__file__).parents[1] / "docs"
_MADE = re.compile(r"(<!-- made by tools/reference.py -->\n).*(\n<!-- end -->\n)", re.S)
_SECTIONS = {
    "model": "Model",
    "data": "Data",
    "lora": "Adapter",
    "train": "Training",
    "objective": "Preferences and rewards",
    "": "Other options",
}


def recipe() -> str:
    """Return a heading and a table for each section of the recipe."""
    rows: dict[str, list[tuple[str, ...]]] = {section: [] for section in _SECTIONS}
    short = {field: name for name, field in SHORT_FORMS.items()}
    for name, info in option_fields():
        section, _, leaf = name.rpartition(".")
        option = f"`{name}`" + (f", `--{short[name]}`" if name in short else "")
        default = "required" if info.is_required() else f"`{info.get_default(call_default_factory=True)}`"
        rows["objective" if leaf in OBJECTIVE_OPTIONS else section].append((option, default, _meaning(info)))
    head = ("option", "default", "meaning")
    return "\n\n".join(f"## {title}\n\n{_table(head, rows[name])}" for name, title in _SECTIONS.items())


def formats() -> str:
    """Return a heading and a table each for formats, file types, reasons and roles."""
    roles = {**ROLES, **dict.fromkeys(CALL_ROLES, "assistant; its content is the call, as JSON")}
    tables: dict[str, tuple[tuple[str, ...], Iterable[tuple[str, ...]]]] = {
        "Row formats": (
            ("format", "columns", "optional columns", "what", "example"),
            map(_format_row, FORMATS.values()),
        ),
        "File types": (("file type", "what"), ((f"`{suffix}`", what) for suffix, (_, what) in TYPES.items())),
        "Why a row is not used": (
            ("reason", "why the row is not used"),
            ((f"`{code}`", what) for code, what in REASONS.items()),
        ),
        "Roles": (("role in the file", "role"), ((f"`{name}`", role) for name, role in roles.items())),
    }
    return "\n\n".join(f"## {title}\n\n{_table(*table)}" for title, table in tables.items())


def pages() -> dict[Path, str]:
    """Return the pages with tables, as they are with the tables of now."""
    made = {DOCS / "recipe.md": recipe(), DOCS / "formats.md": formats()}
    return {
        page: _MADE.sub(lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", page.read_text(encoding="utf-8"))
        for page, text in made.items()
    }


def _meaning(info: Any) -> str:
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    return ": ".join(filter(None, (info.description, ", ".join(map(str, choices)))))


def _format_row(entry: Format) -> tuple[str, ...]:
    last: dict[tuple[str, ...], list[str]] = {}  # key sets that differ in the last key only
    for keys in entry.keys:
        last.setdefault(keys[:-1], []).append(keys[-1])
    sets = [[*(f"`{key}`" for key in first), "/".join(f"`{key}`" for key in ends)] for first, ends in last.items()]
    columns = " or ".join(" + ".join(keys) for keys in sets)
    optional = ", ".join(f"`{key}`" for key in entry.optional)
    return f"`{entry.name}`", columns, optional or "-", entry.description, f"`{json.dumps(entry.example)}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
