"""Name a function or a class that a Python program gives, so that a later process finds it: "FILE.py:NAME"."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import Any

from strop.errors import InputError


def function_spec(field: str, value: Any) -> Any:
    """Return a class, or functions of one file, as "FILE.py:NAME,NAME". Raises InputError if they are in no file."""
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(map(callable, parts)):
        return value
    places = [_find_in_module(part) for part in parts]
    files = {place and place[0] for place in places}
    if None in files or len(files) != 1:
        names = ", ".join(getattr(part, "__qualname__", type(part).__name__) for part in parts)
        fix = "put it into a file, and give the file and the name as text: 'file.py:name'"
        raise InputError(f"{field}: {names}: not at the top of one Python file", fix=fix)
    return f"{files.pop()}:{','.join(place[1] for place in places if place)}"


def _find_in_module(part: Any) -> tuple[str, str] | None:
    """Return the file and the name under which a class or function is there when the file is read again, or None."""
    for module in map(sys.modules.get, (getattr(part, "__module__", None) or "", "__main__")):
        file = getattr(module, "__file__", None)
        if file is None or not file.endswith(".py"):
            continue
        name = next((name for name, other in vars(module).items() if other is part), None)
        if name is not None and (module is not sys.modules["__main__"] or name in _names_of_module(Path(file))):
            return os.path.abspath(file), name
    return None


def _names_of_module(file: Path) -> set[str]:
    """Return the names that a file defines when it is imported, and not run as a program."""
    nodes = [node for node in ast.parse(file.read_bytes()).body if not _is_main_block(node)]
    defined = [child for node in nodes for child in ast.walk(node)]
    names = {
        child.name for child in defined if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    names |= {child.id for child in defined if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)}
    return names | {child.asname or child.name for child in defined if isinstance(child, ast.alias)}


def _is_main_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
