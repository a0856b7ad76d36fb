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

UNREADABLE = object()  # marks a value that can only be computed by running the script
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip
Assignment = ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr
# methods that change a dict or a list
_CHANGING_METHODS = ("append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update")
_DTYPES = ("bfloat16", "float16", "float32", "half", "float")  # attributes of torch


@dataclass(frozen=True)
class Call:
    name: str  # last part of the function's name, for example "from_pretrained"
    owner: str  # the part before it, for example "AutoTokenizer"
    line: int
    arguments: list[ast.expr]
    keywords: dict[str, ast.expr]
    assigned_to: str  # the name that the result is assigned to, or ""
    unpacked: list[ast.expr | ast.stmt]  # ** arguments that are not literal dicts, and changes that cannot be read
    is_conditional: bool = False  # in a branch, or in a function that the script never names


class Script:
    """A parsed script. Raises InputError if the file is not Python."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
            self._tree = _parse(_join_code_cells(text) if path.suffix == ".ipynb" else text)
        except (OSError, UnicodeDecodeError) as error:
            what = f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
            raise InputError(what, fix="give the path of a Python script") from None
        except SyntaxError as error:
            what = f"{path}{f':{error.lineno}' if error.lineno else ''}: not Python: {error.msg}"
            raise InputError(what, fix="give the script that trains, or the notebook (.ipynb)") from None
        except (RecursionError, MemoryError):
            raise InputError(f"{path}: nested too deeply to be read", fix="give the script that trains") from None
        except ValueError as error:
            raise InputError(f"{path}: not a notebook: {error}", fix="give a .py or .ipynb file") from None
        self._constants = dict(self._find_single_assignments())
        self._tree = _Branches(self._constants).visit(self._tree)
        self._constants = dict(self._find_single_assignments())  # without the assignments in removed branches
        self._changes = list(self._find_changes())
        self._options = dict(self._find_argparse_defaults())
        self.used_defaults: dict[str, tuple[Any, int]] = {}  # argparse options read by `value`: default and line
        self.calls = list(self._find_calls())
        self.last_line = float("inf")  # of the statements that change the first training
        self._returned = {
            function.name: [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
            for function in ast.walk(self._tree)
            if isinstance(function, ast.FunctionDef)
        }

    def _find_single_assignments(self) -> Iterator[tuple[str, ast.expr]]:
        """Yield (name, value) of names that are assigned exactly once, outside branches and loops."""
        counts: Counter[str] = Counter()
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
                counts[node.id] += 1
            elif isinstance(node, ast.arg):
                counts[node.arg] += 1
        for node in _find_unconditional_statements(self._tree.body):
            if isinstance(node, ast.Assign | ast.AnnAssign):
                yield from ((name, value) for name, value, is_all in _pair_names(node) if is_all and counts[name] == 1)

    def _find_changes(self) -> Iterator[tuple[str, ast.expr | ast.stmt, bool]]:
        """Yield changes of dicts and lists as (name, `name[key] = 1` or `name.update(...)`, is unconditional)."""
        unconditional = {id(node) for node in _find_unconditional_statements(self._tree.body)}
        for node in ast.walk(self._tree):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Subscript) and isinstance(node, ast.stmt):
                    yield self.find_root_name(target), node, id(node) in unconditional
            call = node.value if isinstance(node, ast.Expr | ast.Assign) else None
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in _CHANGING_METHODS:
                yield self.find_root_name(call), call, id(node) in unconditional

    def _read_changes(self, name: ast.Name) -> tuple[dict[str, ast.expr], list[ast.expr | ast.stmt]]:
        """Return the items that are set in a dict before this use of its name, and the changes that cannot be read."""
        items: dict[str, ast.expr] = {}
        unread: list[ast.expr | ast.stmt] = []
        for changed, node, unconditional in self._changes:
            if changed == name.id:
                is_readable = unconditional and node.lineno < name.lineno
                added = self._read_set_items(node) if is_readable else None
                items |= added or {}
                unread += [node] if added is None else []
        return items, unread

    def _read_set_items(self, change: ast.expr | ast.stmt) -> dict[str, ast.expr] | None:
        """Return the items that `name["key"] = value` or `name.update(...)` sets, or None for other changes."""
        if isinstance(change, ast.Assign) and len(change.targets) == 1:
            target = change.targets[0]
            key = self.value(target.slice) if isinstance(target, ast.Subscript) else UNREADABLE
            is_name = isinstance(getattr(target, "value", None), ast.Name)
            return {key: change.value} if is_name and isinstance(key, str) else None
        if isinstance(change, ast.Call) and isinstance(change.func, ast.Attribute) and change.func.attr == "update":
            dicts = [*change.args, *(keyword.value for keyword in change.keywords if keyword.arg is None)]
            read = [self.read_dict_items(node) for node in dicts]
            unread = [node for node in dicts if isinstance(node, ast.Name) and self._read_changes(node)[1]]
            if isinstance(change.func.value, ast.Name) and None not in read and not unread:
                named = {keyword.arg: keyword.value for keyword in change.keywords if keyword.arg}
                return {key: value for part in (*read, named) for key, value in (part or {}).items()}
        return None

    def _find_argparse_defaults(self) -> Iterator[tuple[str, ast.expr]]:
        """Yield (attribute of the parsed arguments, default) of argparse options."""
        for node in ast.walk(self._tree):
            if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"):
                continue
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            names = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
            long_names = [name for name in names if name.startswith("--")]
            dest = keywords.get("dest")
            name = str(dest.value) if isinstance(dest, ast.Constant) else (long_names or names or [""])[0].lstrip("-")
            if "default" in keywords:
                yield name.replace("-", "_"), keywords["default"]
            elif getattr(keywords.get("action"), "value", "") == "store_true":
                yield name.replace("-", "_"), ast.Constant(False)

    def _is_argparse_option(self, node: ast.Attribute) -> bool:
        """Return whether an expression such as `args.lr` reads an argparse option that has a default."""
        if not isinstance(node.value, ast.Name) or node.attr not in self._options:
            return False
        parsed = self._constants.get(node.value.id)
        return isinstance(parsed, ast.Call) and getattr(parsed.func, "attr", "") == "parse_args"

    def find_attribute_assignments(self, name: str) -> Iterator[tuple[str, ast.expr, int, bool]]:
        """Yield what is set on a name before training starts.

        `config.seed = 1` is ("seed", 1, line, whether it is unconditional), `trainer.x["lr"] = 1` is ('x["lr"]', ...).
        """
        unconditional = {id(node) for node in _find_unconditional_statements(self._tree.body)}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign | ast.AugAssign) and node.lineno <= self.last_line:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Attribute | ast.Subscript) and ast.unparse(target).startswith(f"{name}."):
                        value = node.value if isinstance(node, ast.Assign) else target
                        yield ast.unparse(target).partition(".")[2], value, node.lineno, id(node) in unconditional

    def trace(self, node: ast.expr, calls: list[Call]) -> Iterator[ast.expr]:
        """Yield an expression and all others that its value may come from, back to one of `calls`.

        These are both sides of a conditional, every value of a name, what a function of the script returns, the items
        of a list, the object of a method, and the first argument of another call.
        """
        pending, seen = [node], set[str]()
        while pending:
            node = pending.pop(0)
            yield node
            if isinstance(node, ast.IfExp):
                pending += [node.body, node.orelse]
            elif isinstance(node, ast.Attribute | ast.Subscript):
                pending.append(node.value)
            elif isinstance(node, ast.List | ast.Tuple | ast.Dict):
                pending += node.values if isinstance(node, ast.Dict) else node.elts
            elif isinstance(node, ast.Call) and not any(call.arguments is node.args for call in calls):
                owner = node.func.value if isinstance(node.func, ast.Attribute) else None
                is_module = isinstance(owner, ast.Name) and not self.assigned_values(owner.id)  # or a class
                function = getattr(node.func, "id", "")
                results = self._returned.get(function, []) if f"{function}()" not in seen else []
                seen.add(f"{function}()")
                pending += [*results, *node.args[:1]] if owner is None or is_module else [owner]
            elif isinstance(node, ast.Name) and node.id not in seen:
                seen.add(node.id)
                pending += self.assigned_values(node.id)

    def find_sources(self, nodes: list[ast.expr], calls: list[Call]) -> list[Call]:
        """Return those of the calls whose results may be in one of the expressions."""
        traced = [part.args for node in nodes for part in self.trace(node, calls) if isinstance(part, ast.Call)]
        return [call for call in calls if any(call.arguments is arguments for arguments in traced)]

    def find_key(self, node: ast.expr) -> Any:
        """Return the first key on the way to a value, such as "test" for `data["test"]`, or None."""
        return next((self.value(part.slice) for part in self.trace(node, []) if isinstance(part, ast.Subscript)), None)

    def assigned_values(self, name: str) -> list[ast.expr]:
        """Return the expressions that are assigned to a name, or to a tuple with it, before training."""
        nodes = [
            node for node in ast.walk(self._tree) if isinstance(node, Assignment) and node.lineno <= self.last_line
        ]
        return [value for node in nodes for assigned, value, _ in _pair_names(node) if assigned == name]

    def find_assigned_attributes(self, attribute: str) -> Iterator[ast.Assign]:
        """Yield assignments such as `x.requires_grad = True`."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign) and any(getattr(x, "attr", "") == attribute for x in node.targets):
                yield node

    def find_import(self, name: str) -> tuple[str, str]:
        """Return (module, name there) of a name that is imported from a module, or ("", "")."""
        for node in ast.walk(self._tree):
            if not isinstance(node, ast.ImportFrom) or node.level or not name:
                continue
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return node.module or "", alias.name
        return "", ""

    def find_subclasses(self, names: tuple[str, ...]) -> list[tuple[str, str, int]]:
        """Return (class, base, line) of each class derived from one of `names`."""
        classes = [node for node in ast.walk(self._tree) if isinstance(node, ast.ClassDef)]
        bases = [(node, ast.unparse(base).rpartition(".")[2]) for node in classes for base in node.bases]
        return [(node.name, base, node.lineno) for node, base in bases if base in names]

    def _find_calls(self) -> Iterator[Call]:
        assigned_to: dict[int, str] = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                target = node.targets[0]
                target = target.elts[0] if isinstance(target, ast.Tuple) else target
                assigned_to[id(node.value)] = target.id if isinstance(target, ast.Name) else ""
        call_nodes = [node for node in ast.walk(self._tree) if isinstance(node, ast.Call)]
        unconditional = set(map(id, _find_unconditional_nodes(self._tree)))
        for node in sorted(call_nodes, key=lambda call: (call.lineno, call.col_offset)):
            owner, name = "", ""
            if isinstance(node.func, ast.Attribute):
                owner, name = ast.unparse(node.func.value), node.func.attr
            elif isinstance(node.func, ast.Name):
                name = node.func.id
            keywords: dict[str, ast.expr] = {}
            unpacked: list[ast.expr | ast.stmt] = []
            for keyword in node.keywords:
                if keyword.arg is not None:
                    keywords[keyword.arg] = keyword.value
                elif (items := self.read_dict_items(keyword.value)) is not None:
                    keywords |= items
                    if isinstance(keyword.value, ast.Name):
                        unpacked += self._read_changes(keyword.value)[1]
                else:
                    unpacked.append(keyword.value)
            given = node.args, keywords, assigned_to.get(id(node), ""), unpacked
            yield Call(name, owner, node.lineno, *given, is_conditional=id(node) not in unconditional)

    def read_dict_items(self, node: ast.expr, depth: int = 0) -> dict[str, ast.expr] | None:
        """Return the items of {...} or dict(...) with string keys, or of a variable that is assigned one, else None."""
        if isinstance(node, ast.Name) and node.id in self._constants and depth <= 8:
            items = self.read_dict_items(self._constants[node.id], depth + 1)
            return items if items is None else {**items, **self._read_changes(node)[0]}
        if isinstance(node, ast.Dict):
            pairs = {key.value: value for key, value in zip(node.keys, node.values, strict=True)
                     if isinstance(key, ast.Constant) and isinstance(key.value, str)}  # fmt: skip
            return pairs if len(pairs) == len(node.keys) else None
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict" and not node.args:
            keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            return keywords if len(keywords) == len(node.keywords) else None
        return None

    def resolve_name(self, node: ast.expr, depth: int = 0) -> ast.expr:
        """Return the expression assigned to a name, if it is assigned exactly once; otherwise the name itself."""
        assigned = self._constants.get(node.id) if isinstance(node, ast.Name) and depth <= 8 else None
        return node if assigned is None else self.resolve_name(assigned, depth + 1)

    def read_list_items(self, node: ast.expr) -> list[ast.expr]:
        """Return the items of a list, or of a variable that is assigned one, also those added later; else the node."""
        resolved = self.resolve_name(node)
        if not isinstance(resolved, ast.List | ast.Tuple):
            return [resolved]
        changes = [change for name, change, _ in self._changes if name == getattr(node, "id", "")]
        return [*resolved.elts, *(item for call in changes if isinstance(call, ast.Call) for item in call.args)]

    def value(self, node: ast.expr) -> Any:
        """Return the value of a literal, arithmetic, f-string, dtype, constant or argparse default, or UNREADABLE."""
        try:
            return self._evaluate(node)
        except (ValueError, TypeError, SyntaxError, LookupError, ArithmeticError, MemoryError, RecursionError):
            return UNREADABLE

    def _evaluate(self, node: ast.expr, depth: int = 0) -> Any:
        """Return the value of an expression; see `value`. Raises LookupError or an error of ast.literal_eval."""
        if depth > 8:
            raise RecursionError
        if isinstance(node, ast.Name):
            changes, unread = self._read_changes(node)
            if unread:
                raise LookupError(node.id)
            value = self._evaluate(self._constants[node.id], depth + 1)
            added = {key: self._evaluate(item, depth + 1) for key, item in changes.items()}
            return {**value, **added} if added else value
        if isinstance(node, ast.Attribute) and self._is_argparse_option(node):
            value = self._evaluate(self._options[node.attr], depth + 1)
            self.used_defaults[node.attr] = (value, node.lineno)
            return value
        if isinstance(node, ast.Attribute) and node.attr in _DTYPES:
            return node.attr
        if isinstance(node, ast.List | ast.Tuple):
            return [self._evaluate(item, depth + 1) for item in node.elts]
        if isinstance(node, ast.JoinedStr):
            return "".join(str(self._evaluate(part, depth)) for part in node.values)
        if isinstance(node, ast.FormattedValue) and node.format_spec is None and node.conversion == -1:
            return self._evaluate(node.value, depth + 1)
        if isinstance(node, ast.BinOp):
            return self._evaluate_operator(node, depth + 1)
        if (entries := self.read_dict_items(node)) is not None:
            return {key: self._evaluate(item, depth + 1) for key, item in entries.items()}
        return ast.literal_eval(node)

    def _evaluate_operator(self, node: ast.BinOp, depth: int) -> Any:
        """Evaluate arithmetic on numbers, and the concatenation of two strings or lists."""
        left, right = self._evaluate(node.left, depth), self._evaluate(node.right, depth)
        are_numbers = all(isinstance(side, int | float) and not isinstance(side, bool) for side in (left, right))
        concatenates = isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, str | list)
        if not are_numbers and not concatenates:
            raise TypeError
        return _OPERATORS[type(node.op)](left, right)

    def find_root_name(self, node: ast.expr) -> str:
        """Return the name that an expression such as `data["train"].select(range(9))` begins with."""
        while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
            node = node.func if isinstance(node, ast.Call) else node.value
        return node.id if isinstance(node, ast.Name) else ""


# lines of a notebook that IPython reads: `!pip install`, `%%capture`, `files = !ls`, `?name`, `name?`
_MAGIC = re.compile(r"^([ \t]*)(?:[!%?].*|[\w., ]+=[ \t]*[!%].*|[\w.]+\?+[ \t]*)$", re.M)
_PYTHON_CELL = re.compile(r"(?!%%)|%%(?:capture|time|timeit|prun)\b")  # not `%%bash` or `%%writefile`


def _parse(text: str) -> ast.Module:
    """Parse Python, treating notebook magics as empty statements."""
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.parse(_MAGIC.sub(r"\1pass", text))


def _join_code_cells(text: str) -> str:
    """Return the code cells of a notebook as one text. Raises ValueError."""
    tree = json.loads(text)
    if not isinstance(tree, dict) or not isinstance(tree.get("cells"), list):
        raise ValueError("no cells")
    sources = ["".join(cell.get("source", [])) for cell in tree["cells"] if cell.get("cell_type") == "code"]
    return "\n".join(cell if _PYTHON_CELL.match(cell) else "\n" * cell.count("\n") for cell in sources)


def read_arguments(draft: Draft, script: Script, call: Call, positional: tuple[str, ...] = ()) -> Keys:
    """Return the literal arguments of a call, and attributes set on its result; report those that cannot be read."""
    arguments = {**dict(zip(positional, call.arguments, strict=False)), **call.keywords}
    lines = {key: node.lineno for key, node in arguments.items()}
    for key, node, line, unconditional in script.find_attribute_assignments(call.assigned_to):
        if unconditional:
            arguments[key], lines[key] = node, line
        else:
            report_expression(draft, f"{call.assigned_to}.{key}", node, "set in a branch or loop, which is not read")
    for node in call.arguments[len(positional) :]:
        report_expression(draft, call.name, node, "not read: a positional argument; give its name")
    values: dict[str, Any] = {}
    for key, node in arguments.items():
        value = script.value(node)
        if value is UNREADABLE:
            report_expression(draft, f"{call.name}.{key}", node, "not a literal value, and scripts are not executed")
        else:
            values[key] = value
    report_unpacked(draft, call)
    return Keys(values, lines, set(arguments) - set(values))


def find_passed(
    draft: Draft, script: Script, key: str, nodes: list[ast.expr], calls: list[Call], *, elsewhere: bool = False
) -> Call | None:
    """Return the call whose result is an argument, and report the others, and a condition.

    nodes: where the argument is given. elsewhere: it may also be given where this cannot be read.
    """
    nodes = [node for node in nodes if script.value(node) is UNREADABLE]
    passed = script.find_sources(nodes, calls)
    is_optional = any(getattr(part, "value", 0) is None for node in nodes for part in script.trace(node, calls))
    if passed and (is_optional or len(passed) > 1):
        text = f"{passed[0].name} in line {passed[0].line} is read, but whether it is used depends on a condition"
        draft.add_difference(key, text, passed[0].line)
    elif calls and not passed and (elsewhere or nodes):
        passed = calls[:1]
        draft.add_difference(key, f"{passed[0].name} in line {passed[0].line} is read; its use was not found")
    for call in calls:
        if call not in passed[:1]:
            draft.add_unsupported(call.name, f"not imported: not passed as {key}, or another one is", call.line)
    return next(iter(passed), None)


def report_unpacked(draft: Draft, call: Call) -> None:
    for node in call.unpacked:
        report_expression(draft, f"{call.name}(**...)", node, "not read: not literal, and scripts are not executed")


def report_expression(draft: Draft, key: str, node: ast.expr | ast.stmt, reason: str) -> None:
    """Report an expression as unsupported."""
    source = ast.unparse(node)
    source = source if len(source) <= 60 else f"{source[:57]}..."
    draft.add_unsupported(key, f"{source}: {reason}", node.lineno)


def _pair_names(node: Assignment) -> Iterator[tuple[str, ast.expr, bool]]:
    """Yield (name, value, whether the name gets all of it) of an assignment, which may be to a tuple of names."""
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        items = target.elts if isinstance(target, ast.Tuple) else [target]
        parts = node.value.elts if isinstance(node.value, ast.Tuple) and len(items) > 1 else []
        is_all = target is items[0] or len(parts) == len(items)
        for item, value in zip(items, parts if len(parts) == len(items) else [node.value] * len(items), strict=True):
            if isinstance(item, ast.Name) and value is not None:
                yield item.id, value, is_all


class _Branches(ast.NodeTransformer):
    """Replace `if` with a constant condition, such as `if False` or `if DEBUG` after `DEBUG = False`, by what runs."""

    def __init__(self, constants: dict[str, ast.expr]) -> None:
        self._constants = constants

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        return {None: node, True: node.body, False: node.orelse}[self._truth(node.test)]

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        self.generic_visit(node)
        return {None: node, True: node.body, False: node.orelse}[self._truth(node.test)]

    def _truth(self, test: ast.expr) -> bool | None:
        """Return the truth of a condition, or None if it is not a constant."""
        test = self._constants.get(test.id, test) if isinstance(test, ast.Name) else test
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return None if (truth := self._truth(test.operand)) is None else not truth
        return test.value if isinstance(test, ast.Constant) and isinstance(test.value, bool) else None


def _find_unconditional_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield all nodes but those in a branch, or in a function whose name the script never uses."""
    nodes = list(ast.walk(tree))
    used = {
        getattr(node, "attr", getattr(node, "id", "")) for node in nodes if isinstance(node, ast.Attribute | ast.Name)
    }
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.FunctionDef) and node.name not in used:
            continue
        if isinstance(node, ast.If | ast.IfExp) and "__name__" not in ast.unparse(node.test):
            pending.append(node.test)
        else:
            pending += ast.iter_child_nodes(node)


def _find_unconditional_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements outside branches and loops, also those in functions and in `if __name__ == "__main__"`."""
    for node in body:
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
            yield from _find_unconditional_statements(node.body)
        else:
            yield node
