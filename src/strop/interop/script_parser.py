"""Calls and literal values of a Python script, read from its text; nothing of it is ever run."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strop.errors import InputError
from strop.interop.draft import Draft, Keys

UNREAD = object()  # a value that only running the script would give
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_TYPES = ("bfloat16", "float16", "float32", "half", "float")  # of torch


@dataclass(frozen=True)
class Call:
    """name: its last part, such as SFTConfig. owner: what stands before it. into: the name that it is assigned to.
    unpacked: what ** stands before and cannot be read."""

    name: str
    owner: str
    line: int
    arguments: list[ast.expr]
    keywords: dict[str, ast.expr]
    into: str
    unpacked: list[ast.expr] = field(default_factory=list)


class Script:
    """Raises InputError where the file is no Python."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
            self._tree = _parsed(_cells(text) if path.suffix == ".ipynb" else text)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}",
                fix="give the path of a Python script",
            ) from None
        except SyntaxError as error:
            what = f"{path}{f':{error.lineno}' if error.lineno else ''}: not Python: {error.msg}"
            raise InputError(what, fix="give the script that trains, or the notebook (.ipynb)") from None
        except (RecursionError, MemoryError):
            raise InputError(f"{path}: nested too deeply to be read", fix="give the script that trains") from None
        except ValueError as error:
            raise InputError(
                f"{path}: not a notebook: {error}", fix="give a .py file, or a notebook as saved"
            ) from None
        self._constants = dict(self._assigned_once())
        self.defaults: dict[str, tuple[Any, int]] = {}  # of the script's own options, where one was read: value, line
        self._flags = dict(self._find_flags())
        self.calls = list(self._find_calls())

    def _assigned_once(self) -> Iterator[tuple[str, ast.expr]]:
        """Names that one line of the script, outside of branches and loops, gives a value, and no other."""
        counts: dict[str, int] = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
                counts[node.id] = counts.get(node.id, 0) + 1
            elif isinstance(node, ast.arg):
                counts[node.arg] = counts.get(node.arg, 0) + 1
        for node in _always(self._tree.body):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, value = node.targets[0], node.value
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                target, value = node.target, node.value
            else:
                continue
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for name, held in pairs:
                if isinstance(name, ast.Name) and counts[name.id] == 1:
                    yield name.id, held

    def _find_flags(self) -> Iterator[tuple[str, ast.expr]]:
        """Defaults of argparse's options, by the name that they have in what `parse_args` returns."""
        for node in ast.walk(self._tree):
            if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"):
                continue
            words = {word.arg: word.value for word in node.keywords}
            names = [str(word.value) for word in node.args if isinstance(word, ast.Constant)]
            long = [name for name in names if name.startswith("--")]
            dest = words.get("dest")
            name = str(dest.value) if isinstance(dest, ast.Constant) else (long or names or [""])[0].lstrip("-")
            if "default" in words:
                yield name.replace("-", "_"), words["default"]
            elif getattr(words.get("action"), "value", "") == "store_true":
                yield name.replace("-", "_"), ast.Constant(False)

    def flag(self, node: ast.expr) -> str | None:
        """The option of the script's own command line that an expression such as `args.lr` reads, where it has a
        default."""
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in self._flags):
            return None
        made = self._constants.get(node.value.id)
        return node.attr if isinstance(made, ast.Call) and getattr(made.func, "attr", "") == "parse_args" else None

    def settings(self, name: str) -> Iterator[tuple[str, ast.expr, int, bool]]:
        """Attributes that are set on a name: `config.seed = 1` is (seed, 1, its line, whether it is set whatever
        happens)."""
        always = {id(node) for node in _always(self._tree.body)}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign | ast.AugAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Attribute) and ast.unparse(target).startswith(f"{name}."):
                        value = node.value if isinstance(node, ast.Assign) else target
                        yield ast.unparse(target).partition(".")[2], value, node.lineno, id(node) in always

    def derived(self, names: tuple[str, ...]) -> list[tuple[str, str, int]]:
        """Classes made from one of `names`: (its own name, that name, its line)."""
        found = []
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
                found += [(node.name, base, node.lineno) for base in bases if base in names]
        return found

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
            keywords: dict[str, ast.expr] = {}
            unpacked: list[ast.expr] = []
            for word in node.keywords:
                if word.arg is not None:
                    keywords[word.arg] = word.value
                elif (held := self._items(word.value)) is not None:
                    keywords |= held
                else:
                    unpacked.append(word.value)
            yield Call(name, owner, node.lineno, node.args, keywords, into.get(id(node), ""), unpacked)

    def _items(self, node: ast.expr, depth: int = 0) -> dict[str, ast.expr] | None:
        """The items of a map that is written down, each an expression: {...}, dict(...), or a name of one."""
        if isinstance(node, ast.Name) and node.id in self._constants and depth <= 8:
            return self._items(self._constants[node.id], depth + 1)
        if isinstance(node, ast.Dict):
            pairs = {key.value: value for key, value in zip(node.keys, node.values, strict=True)
                     if isinstance(key, ast.Constant) and isinstance(key.value, str)}  # fmt: skip
            return pairs if len(pairs) == len(node.keys) else None
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict" and not node.args:
            words = {word.arg: word.value for word in node.keywords if word.arg}
            return words if len(words) == len(node.keywords) else None
        return None

    def stands_for(self, node: ast.expr, depth: int = 0) -> ast.expr:
        """The expression that a name stands for, where one line of the script gives it a value; else the name."""
        held = self._constants.get(node.id) if isinstance(node, ast.Name) and depth <= 8 else None
        return node if held is None else self.stands_for(held, depth + 1)

    def listed(self, node: ast.expr) -> list[ast.expr]:
        """The items of a list that is written down, or of a name of one; else the expression itself."""
        held = self.stands_for(node)
        return list(held.elts) if isinstance(held, ast.List | ast.Tuple) else [held]

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """The value of an expression, or UNREAD: literals, lists and maps of them, sums and products of them, texts
        that hold them, torch's types, names that have one, and defaults of the script's own options."""
        if depth > 8:
            return UNREAD
        if isinstance(node, ast.Name):
            return self.value(self._constants[node.id], depth + 1) if node.id in self._constants else UNREAD
        if isinstance(node, ast.Attribute):
            if (flag := self.flag(node)) is not None:
                value = self.value(self._flags[flag], depth + 1)
                if value is not UNREAD:
                    self.defaults[flag] = (value, node.lineno)
                return value
            return node.attr if node.attr in _TYPES else UNREAD
        if isinstance(node, ast.List | ast.Tuple):
            items = [self.value(item, depth + 1) for item in node.elts]
            return UNREAD if any(item is UNREAD for item in items) else items
        if isinstance(node, ast.JoinedStr):
            parts = [self._part(part, depth + 1) for part in node.values]
            return UNREAD if any(part is UNREAD for part in parts) else "".join(map(str, parts))
        if isinstance(node, ast.BinOp):
            return self._computed(node, depth + 1)
        if (held := self._items(node)) is not None:
            pairs = {key: self.value(item, depth + 1) for key, item in held.items()}
            return UNREAD if any(item is UNREAD for item in pairs.values()) else pairs
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return UNREAD

    def _part(self, node: ast.expr, depth: int) -> Any:
        if isinstance(node, ast.FormattedValue):
            return self.value(node.value, depth) if node.format_spec is None and node.conversion == -1 else UNREAD
        return self.value(node, depth)

    def _computed(self, node: ast.BinOp, depth: int) -> Any:
        """Sums, differences, products and quotients of numbers; two texts or two lists one after the other."""
        left, right = self.value(node.left, depth), self.value(node.right, depth)
        work = _OPERATORS.get(type(node.op))
        both = [isinstance(one, int | float) and not isinstance(one, bool) for one in (left, right)]
        joined = isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, str | list)
        if work is None or not (all(both) or joined):
            return UNREAD
        try:
            return work(left, right)
        except (ZeroDivisionError, OverflowError):
            return UNREAD

    def root(self, node: ast.expr) -> str:
        """The name that an expression such as `data["train"].select(range(9))` begins with."""
        while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
            node = node.func if isinstance(node, ast.Call) else node.value
        return node.id if isinstance(node, ast.Name) else ""


def _parsed(text: str) -> ast.Module:
    """Lines of a notebook that are no Python (`!pip install`, `%%capture`) count as empty statements."""
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.parse(re.sub(r"^([ \t]*)[!%].*$", r"\1pass", text, flags=re.M))


def _cells(text: str) -> str:
    """The code of a notebook, cell after cell. Raises ValueError."""
    tree = json.loads(text)
    if not isinstance(tree, dict) or not isinstance(tree.get("cells"), list):
        raise ValueError("it has no cells")
    return "\n".join("".join(cell.get("source", [])) for cell in tree["cells"] if cell.get("cell_type") == "code")


def keys_of(draft: Draft, script: Script, call: Call, positional: tuple[str, ...] = ()) -> Keys:
    """The arguments of a call that can be read, and what is set on its result afterwards; of the others it is told
    that they cannot be read."""
    given = {**dict(zip(positional, call.arguments, strict=False)), **call.keywords}
    lines = {key: node.lineno for key, node in given.items()}
    for key, node, line, always in script.settings(call.into) if call.into else ():
        if always:
            given[key], lines[key] = node, line
        else:
            draft.lack(f"{call.into}.{key}", f"{text_of(node)}: set in a branch or a loop: is it in your run?", line)
    values: dict[str, Any] = {}
    for key, node in given.items():
        value = script.value(node)
        if value is UNREAD:
            draft.lack(f"{call.name}.{key}", f"{text_of(node)}: not a literal value, and nothing is run", lines[key])
        else:
            values[key] = value
    for node in call.unpacked:
        draft.lack(f"{call.name}(**...)", f"{text_of(node)}: not a literal map, and nothing is run", node.lineno)
    return Keys(values, lines, set(given) - set(values))


def text_of(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _always(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run whenever the script does what it is for: of the module, of functions, and below
    `if __name__ == "__main__"`."""
    for node in body:
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
            yield from _always(node.body)
        else:
            yield node
