"""Read calls and literal values from the text of a Python script or notebook. No code is executed."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.errors import InputError
from strop.interop.draft import Draft, Keys

UNREADABLE = object()  # stands for a value that only running the script would give
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_TYPES = ("bfloat16", "float16", "float32", "half", "float")  # torch dtypes


@dataclass(frozen=True)
class Call:
    """A call in the script."""

    name: str  # last part of the callee, such as SFTConfig
    owner: str  # the part before it
    line: int
    arguments: list[ast.expr]
    keywords: dict[str, ast.expr]
    into: str  # the name that the result is assigned to
    unpacked: list[ast.expr]  # arguments passed with ** that cannot be read


class Script:
    """A parsed script. Raises InputError if the file is not Python."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
            self._tree = _parse(_notebook_code(text) if path.suffix == ".ipynb" else text)
        except (OSError, UnicodeDecodeError) as error:
            what = f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
            raise InputError(what, fix="give the path of a Python script") from None
        except SyntaxError as error:
            what = f"{path}{f':{error.lineno}' if error.lineno else ''}: not Python: {error.msg}"
            raise InputError(what, fix="give the script that trains, or the notebook (.ipynb)") from None
        except (RecursionError, MemoryError):
            raise InputError(f"{path}: nested too deeply to be read", fix="give the script that trains") from None
        except ValueError as error:
            what = f"{path}: not a notebook: {error}"
            raise InputError(what, fix="give a .py file, or a notebook as saved") from None
        self._constants = dict(self._single_assignments())
        self.defaults: dict[str, tuple[Any, int]] = {}  # argparse defaults that were used: value and line, by option
        self._flags = dict(self._find_argparse_defaults())
        self.calls = list(self._find_calls())

    def _single_assignments(self) -> Iterator[tuple[str, ast.expr]]:
        """Yield names that are assigned exactly once, outside branches and loops, with their value."""
        counts: Counter[str] = Counter()
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
                counts[node.id] += 1
            elif isinstance(node, ast.arg):
                counts[node.arg] += 1
        for node in _unconditional_statements(self._tree.body):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, value = node.targets[0], node.value
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                target, value = node.target, node.value
            else:
                continue
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for name, assigned in pairs:
                if isinstance(name, ast.Name) and counts[name.id] == 1:
                    yield name.id, assigned

    def _find_argparse_defaults(self) -> Iterator[tuple[str, ast.expr]]:
        """Yield the defaults of argparse options, by attribute name of the parsed arguments."""
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
        """Return the argparse option that an expression such as `args.lr` reads, if it has a default."""
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in self._flags):
            return None
        parsed = self._constants.get(node.value.id)
        return node.attr if isinstance(parsed, ast.Call) and getattr(parsed.func, "attr", "") == "parse_args" else None

    def attribute_assignments(self, name: str) -> Iterator[tuple[str, ast.expr, int, bool]]:
        """Yield attributes assigned on a name: `config.seed = 1` is (seed, 1, line, whether it is unconditional)."""
        always = {id(node) for node in _unconditional_statements(self._tree.body)}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign | ast.AugAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Attribute) and ast.unparse(target).startswith(f"{name}."):
                        value = node.value if isinstance(node, ast.Assign) else target
                        yield ast.unparse(target).partition(".")[2], value, node.lineno, id(node) in always

    def subclasses_of(self, names: tuple[str, ...]) -> list[tuple[str, str, int]]:
        """Return classes derived from one of `names`, as (class, base, line)."""
        classes = [node for node in ast.walk(self._tree) if isinstance(node, ast.ClassDef)]
        bases = [(node, ast.unparse(base).rpartition(".")[2]) for node in classes for base in node.bases]
        return [(node.name, base, node.lineno) for node, base in bases if base in names]

    def _find_calls(self) -> Iterator[Call]:
        into: dict[int, str] = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                first = node.targets[0]
                first = first.elts[0] if isinstance(first, ast.Tuple) else first
                into[id(node.value)] = first.id if isinstance(first, ast.Name) else ""
        call_nodes = [node for node in ast.walk(self._tree) if isinstance(node, ast.Call)]
        for node in sorted(call_nodes, key=lambda call: (call.lineno, call.col_offset)):
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
                elif (items := self._dict_items(word.value)) is not None:
                    keywords |= items
                else:
                    unpacked.append(word.value)
            yield Call(name, owner, node.lineno, node.args, keywords, into.get(id(node), ""), unpacked)

    def _dict_items(self, node: ast.expr, depth: int = 0) -> dict[str, ast.expr] | None:
        """Return the items of a literal dict: {...}, dict(...), or a name of one; None if it cannot be read."""
        if isinstance(node, ast.Name) and node.id in self._constants and depth <= 8:
            return self._dict_items(self._constants[node.id], depth + 1)
        if isinstance(node, ast.Dict):
            pairs = {key.value: value for key, value in zip(node.keys, node.values, strict=True)
                     if isinstance(key, ast.Constant) and isinstance(key.value, str)}  # fmt: skip
            return pairs if len(pairs) == len(node.keys) else None
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict" and not node.args:
            words = {word.arg: word.value for word in node.keywords if word.arg}
            return words if len(words) == len(node.keywords) else None
        return None

    def resolve_name(self, node: ast.expr, depth: int = 0) -> ast.expr:
        """Return the expression assigned to a name, if it is assigned exactly once; otherwise the name itself."""
        assigned = self._constants.get(node.id) if isinstance(node, ast.Name) and depth <= 8 else None
        return node if assigned is None else self.resolve_name(assigned, depth + 1)

    def list_items(self, node: ast.expr) -> list[ast.expr]:
        """Return the items of a literal list or of a name of one; otherwise the expression itself."""
        resolved = self.resolve_name(node)
        return list(resolved.elts) if isinstance(resolved, ast.List | ast.Tuple) else [resolved]

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """Return the value of a literal, arithmetic, f-string, dtype, constant or argparse default, or UNREADABLE."""
        if depth > 8:
            return UNREADABLE
        if isinstance(node, ast.Name):
            return self.value(self._constants[node.id], depth + 1) if node.id in self._constants else UNREADABLE
        if isinstance(node, ast.Attribute):
            if (flag := self.flag(node)) is not None:
                value = self.value(self._flags[flag], depth + 1)
                if value is not UNREADABLE:
                    self.defaults[flag] = (value, node.lineno)
                return value
            return node.attr if node.attr in _TYPES else UNREADABLE
        if isinstance(node, ast.List | ast.Tuple):
            items = [self.value(item, depth + 1) for item in node.elts]
            return UNREADABLE if any(item is UNREADABLE for item in items) else items
        if isinstance(node, ast.JoinedStr):
            parts = [self._evaluate_part(part, depth + 1) for part in node.values]
            return UNREADABLE if any(part is UNREADABLE for part in parts) else "".join(map(str, parts))
        if isinstance(node, ast.BinOp):
            return self._evaluate_operator(node, depth + 1)
        if (entries := self._dict_items(node)) is not None:
            pairs = {key: self.value(item, depth + 1) for key, item in entries.items()}
            return UNREADABLE if any(item is UNREADABLE for item in pairs.values()) else pairs
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return UNREADABLE

    def _evaluate_part(self, node: ast.expr, depth: int) -> Any:
        if isinstance(node, ast.FormattedValue):
            return self.value(node.value, depth) if node.format_spec is None and node.conversion == -1 else UNREADABLE
        return self.value(node, depth)

    def _evaluate_operator(self, node: ast.BinOp, depth: int) -> Any:
        """Evaluate arithmetic on numbers, and the concatenation of two strings or lists."""
        left, right = self.value(node.left, depth), self.value(node.right, depth)
        apply = _OPERATORS.get(type(node.op))
        numeric = [isinstance(side, int | float) and not isinstance(side, bool) for side in (left, right)]
        concatenable = isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, str | list)
        if apply is None or not (all(numeric) or concatenable):
            return UNREADABLE
        try:
            return apply(left, right)
        except (ZeroDivisionError, OverflowError):
            return UNREADABLE

    def root_name(self, node: ast.expr) -> str:
        """Return the name that an expression such as `data["train"].select(range(9))` begins with."""
        while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
            node = node.func if isinstance(node, ast.Call) else node.value
        return node.id if isinstance(node, ast.Name) else ""


def _parse(text: str) -> ast.Module:
    """Parse Python, treating notebook magics (`!pip install`, `%%capture`) as empty statements."""
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.parse(re.sub(r"^([ \t]*)[!%].*$", r"\1pass", text, flags=re.M))


def _notebook_code(text: str) -> str:
    """Return the code cells of a notebook as one text. Raises ValueError."""
    tree = json.loads(text)
    if not isinstance(tree, dict) or not isinstance(tree.get("cells"), list):
        raise ValueError("no cells")
    return "\n".join("".join(cell.get("source", [])) for cell in tree["cells"] if cell.get("cell_type") == "code")


def readable_arguments(draft: Draft, script: Script, call: Call, positional: tuple[str, ...] = ()) -> Keys:
    """Return the arguments of a call, and attributes set on its result, that can be read; report the others."""
    given = {**dict(zip(positional, call.arguments, strict=False)), **call.keywords}
    lines = {key: node.lineno for key, node in given.items()}
    for key, node, line, always in script.attribute_assignments(call.into) if call.into else ():
        if always:
            given[key], lines[key] = node, line
        else:
            text = f"{shorten_source(node)}: set in a branch or loop, which is not evaluated"
            draft.add_unsupported(f"{call.into}.{key}", text, line)
    values: dict[str, Any] = {}
    for key, node in given.items():
        value = script.value(node)
        if value is UNREADABLE:
            text = f"{shorten_source(node)}: not a literal value, and scripts are not executed"
            draft.add_unsupported(f"{call.name}.{key}", text, lines[key])
        else:
            values[key] = value
    for node in call.unpacked:
        text = f"{shorten_source(node)}: not a literal dict, and scripts are not executed"
        draft.add_unsupported(f"{call.name}(**...)", text, node.lineno)
    return Keys(values, lines, set(given) - set(values))


def shorten_source(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unconditional_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements outside branches and loops: of the module, of functions, and below `if __name__ == ...`."""
    for node in body:
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
            yield from _unconditional_statements(node.body)
        else:
            yield node
