"""Write the tables of docs/recipe.md, docs/formats.md and docs/import.md from the code: `python tools/reference.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from strop.config.names import OTHER_NAMES, SHORT_FORMS
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
        option = f'<a id="{name}"></a>`{name}`' + (f", `--{short[name]}`" if name in short else "")
        default = "required" if info.is_required() else _yaml(info.get_default(call_default_factory=True))
        rows["objective" if leaf in OBJECTIVE_OPTIONS else section].append((option, default, _meaning(info)))
    head = ("option", "default", "meaning")
    return "\n\n".join(f"## {title}\n\n{_table(head, rows[name])}" for name, title in _SECTIONS.items())


def formats() -> str:
    """Return a heading for each row format, and a table each for file types, reasons and roles."""
    roles = {**ROLES, **dict.fromkeys(CALL_ROLES, "assistant; its content is the call, as JSON")}
    tables: dict[str, tuple[tuple[str, ...], Iterable[tuple[str, ...]]]] = {
        "File types": (("file type", "what"), ((f"`{suffix}`", what) for suffix, (_, what) in TYPES.items())),
        "Why a row is not used": (
            ("reason", "why the row is not used"),
            ((f"`{code}`", what) for code, what in REASONS.items()),
        ),
        "Roles": (("role in the file", "role"), ((f"`{name}`", role) for name, role in roles.items())),
    }
    rows = ["## Row formats", *map(_format_section, FORMATS.values())]
    return "\n\n".join([*rows, *(f"## {title}\n\n{_table(*table)}" for title, table in tables.items())])


def other_names() -> str:
    """Return a table of names that other tools have for options."""
    names: dict[str, list[str]] = {}
    for other, meant in OTHER_NAMES.items():
        field, _, value = meant.partition(" ")
        if other not in (value, "gpu"):
            names.setdefault(f"`{field}: {value}`" if value else f"`{field}`", []).append(f"`{other}`")
    return _table(("in strop", "in other tools"), ((field, ", ".join(others)) for field, others in names.items()))


def pages() -> dict[Path, str]:
    """Return the pages with tables, as they are with the tables of now."""
    made = {DOCS / "recipe.md": recipe(), DOCS / "formats.md": formats(), DOCS / "import.md": other_names()}
    return {
        page: _MADE.sub(lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", page.read_text(encoding="utf-8"))
        for page, text in made.items()
    }


def _meaning(info: Any) -> str:
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    if set(map(str, choices)) <= set(re.findall(r"[\w-]+", info.description)):  # those of the text, or none
        return str(info.description)
    return f"{info.description}. Values: {', '.join(map(str, choices))}"


def _yaml(value: Any) -> str:
    """Return a default as it is written in a recipe."""
    return f"`{value:g}`" if isinstance(value, float) else f"`{json.dumps(value).strip(chr(34))}`"


def _format_section(entry: Format) -> str:
    """Return a heading, the description, the columns and an example of a format."""
    sets = [", with ".join(map(_either, columns)) for columns in _join_sets(entry.keys)]
    lines = [f"### `{entry.name}`", "", f"{entry.description[0].upper()}{entry.description[1:]}.", ""]
    lines += [f"- Columns: {sets[0]}", *(f"- Or: {columns}" for columns in sets[1:])]
    lines += [f"- Optional: {', '.join(f'`{key}`' for key in entry.optional)}"] if entry.optional else []
    return "\n".join([*lines, "", "```json", json.dumps(entry.example), "```"])


def _join_sets(sets: Iterable[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """Return sets of columns, each column with its alternatives. Sets that differ in one column become one."""
    joined = [[(key,) for key in keys] for keys in sets]
    for place in (-1, 0, 1):  # first those that differ in the last column
        rest: dict[Any, list[tuple[str, ...]]] = {}
        for columns in joined:
            others = tuple(None if n == place % len(columns) else names for n, names in enumerate(columns))
            if others in rest:
                rest[others][place] += columns[place]
            else:
                rest[others] = columns
        joined = list(rest.values())
    return joined


def _either(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
