"""Calls and literal values of a Python script, read from its text; nothing of it is ever run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.errors import InputError

UNREAD = object()  # a value that only running the script would give
_TYPES = ("bfloat16", "float16", "float32", "half", "float")  # of torch


@dataclass(frozen=True)
class Call:
    """name: its last part, such as SFTConfig. owner: what stands before it. into: the name that it is assigned to."""

    name: str
    owner: str
    line: int
    arguments: list[ast.expr]
    keywords: dict[str, ast.expr]
    into: str


class Script:
    """Raises InputError where the file is no Python."""

    def __init__(self, path: Path) -> None:
        try:
            self._tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}",
                fix="give the path of a Python script",
            ) from None
        except SyntaxError as error:
            what = f"{path}:{error.lineno}: not Python: {error.msg}"
            raise InputError(
                what, fix="of a notebook, save the code as a .py file, without lines that begin with ! or %"
            ) from None
        self._constants = dict(self._assigned_once())
        self.calls = list(self._find_calls())

    def _assigned_once(self) -> Iterator[tuple[str, ast.expr]]:
        """Names that one line of the script, outside of functions and branches, gives a value, and no other."""
        counts: dict[str, int] = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
                counts[node.id] = counts.get(node.id, 0) + 1
            elif isinstance(node, ast.arg):
                counts[node.arg] = counts.get(node.arg, 0) + 1
        for node in self._tree.body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, value = node.targets[0], node.value
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                target, value = node.target, node.value
            else:
                continue
            if isinstance(target, ast.Name) and counts[target.id] == 1:
                yield target.id, value

    def _find_calls(self) -> Iterator[Call]:
        into: dict[int, str] = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                first = node.targets[0]
                first = first.elts[0] if isinstance(first, ast.Tuple) else first
                into[id(node.value)] = first.id if isinstance(first, ast.Name) else ""
        found = [node for node in ast.walk(self._tree) if isinstance(node, ast.Call)]
        for node in sorted(found, key=lambda call: (call.lineno, call.col_offset)):
            owner, name = "", ""
            if isinstance(node.func, ast.Attribute):
                owner, name = ast.unparse(node.func.value), node.func.attr
            elif isinstance(node.func, ast.Name):
                name = node.func.id
            keywords = {word.arg: word.value for word in node.keywords if word.arg}
            yield Call(name, owner, node.lineno, node.args, keywords, into.get(id(node), ""))

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """The literal value of an expression, or UNREAD: literals, lists and maps of them, torch's types, and names
        that have one."""
        if depth > 8:
            return UNREAD
        if isinstance(node, ast.Name):
            return self.value(self._constants[node.id], depth + 1) if node.id in self._constants else UNREAD
        if isinstance(node, ast.Attribute):
            return node.attr if node.attr in _TYPES else UNREAD
        if isinstance(node, ast.List | ast.Tuple):
            items = [self.value(item, depth + 1) for item in node.elts]
            return UNREAD if any(item is UNREAD for item in items) else items
        if isinstance(node, ast.Dict):
            pairs = {
                key.value: self.value(value, depth + 1)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            }
            unread = len(pairs) != len(node.keys) or any(value is UNREAD for value in pairs.values())
            return UNREAD if unread else pairs
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return UNREAD

    def root(self, node: ast.expr) -> str:
        """The name that an expression such as `data["train"].select(range(9))` begins with."""
        while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
            node = node.func if isinstance(node, ast.Call) else node.value
        return node.id if isinstance(node, ast.Name) else ""
