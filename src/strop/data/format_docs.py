"""The tables of docs/data.md, made from the code."""

from __future__ import annotations

import json

from strop.data import converters
from strop.data.formats import FORMATS, REASONS, Format
from strop.data.reading import files


def tables() -> str:
    """The Markdown tables of docs/data.md: formats, file types, reasons, roles."""
    roles = [
        *converters.ROLES.items(),
        *((name, "assistant; its content is the call, as JSON") for name in converters.CALL_ROLES),
    ]
    blocks: list[tuple[str, list[tuple[str, ...]]]] = [
        ("| format | columns | what | example |", [_described(entry) for entry in FORMATS.values()]),
        ("| file type | what |", [(f"`{suffix}`", what) for suffix, (_, what) in files.TYPES.items()]),
        ("| reason | why the row is not used |", [(f"`{code}`", what) for code, what in REASONS.items()]),
        ("| role in the file | role |", [(f"`{name}`", role) for name, role in roles]),
    ]
    return "\n\n".join(
        "\n".join([head, "|" + "---|" * (head.count("|") - 1), *("| " + " | ".join(cells) + " |" for cells in rows)])
        for head, rows in blocks
    )


def _described(entry: Format) -> tuple[str, ...]:
    columns = " or ".join(" + ".join(f"`{key}`" for key in keys) for keys in entry.keys)
    maybe = f"; maybe {', '.join(f'`{key}`' for key in entry.optional)}" if entry.optional else ""
    return f"`{entry.name}`", columns + maybe, entry.what, f"`{json.dumps(entry.example)}`"
