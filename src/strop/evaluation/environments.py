"""Environments for RL: Python objects whose methods are tools that the model calls (train.environment).

    class Shop:
        def reset(self, row): ...            # before each trace; may return the messages of the prompt
        def price(self, item: str) -> str:   # a tool: type hints and a docstring with an Args section
            '''Return the price of an item.

            Args:
                item: name of the item.
            '''
        done = False                         # optional: whether the trace has ended
        def reward(self, completion, row):   # optional: a number, or a dict of named numbers

This is also the shape of TRL's `environment_factory`: `reset(**columns)` gets the columns of the row, and may return a
text, which is appended to the last user message. A file with functions is an environment without a state:
`FILE.py:add,look_up`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from strop.data.converters import parse_request
from strop.data.rendering.tool_calls import Call, InvalidCall
from strop.data.row_errors import InvalidRow
from strop.data.types import Message
from strop.errors import InputError, RecipeError, RunError, suggest
from strop.evaluation.metrics import USER_CODE_ERRORS, load_function
from strop.evaluation.rewards import CallError, call_together, call_within, is_async, read_parts
from strop.runs.lock import sha256_file, sha256_text

NOT_TOOLS = ("reset", "reward", "done", "close")
_MISSING = object()
FORM = "write it as FILE.py:Class or FILE.py:function,function"


@dataclass(frozen=True)
class Environment:
    """A kind of environment. Its objects are reused after `reset`, as in TRL.

    spec: train.environment. factory: returns a new object. schemas: JSON schemas of the tools, by name.
    """

    spec: str
    name: str
    factory: Callable[[], Any]
    schemas: Mapping[str, dict[str, Any]]
    timeout: float
    _unused: list[Any] = field(default_factory=list, repr=False, compare=False)

    def take(self) -> Any:
        """Return an object that no trace uses. Raises RunError if it cannot be made."""
        if self._unused:
            return self._unused.pop()
        made = call_within(self.timeout, self.factory)
        if isinstance(made, CallError):
            raise RunError(f"environment {self.spec}: {_describe(made, self.timeout)}", fix="fix its __init__")
        return made

    def give_back(self, used: Any) -> None:
        self._unused.append(used)

    def reset(
        self, used: Any, row: Mapping[str, Any], messages: Sequence[Message], seed: int, place: str
    ) -> list[Message]:
        """Start a trace, and return the messages of its prompt. Raises RunError for the row.

        row: its columns. messages: of its prompt. seed: passed if `reset` has such a parameter.
        """
        what, fix = f"environment {self.spec}: reset: row {place}", f"fix {self.name}.reset, or the row"
        try:
            arguments = _reset_arguments(used.reset, row, seed)
            inspect.signature(used.reset).bind(**arguments)
        except TypeError as error:
            raise RunError(f"{what}: {error}", fix="give rows with these columns") from None
        result = self._call([partial(used.reset, **arguments)], used.reset)[0]
        if isinstance(result, CallError):
            raise RunError(f"{what}: {_describe(result, self.timeout)}", fix=fix)
        if result is None:
            return list(messages)
        if isinstance(result, str):  # as in TRL
            last = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
            if last is None:
                return [*messages, Message("user", result)]
            changed = Message("user", messages[last].content + result)
            return [*messages[:last], changed, *messages[last + 1 :]]
        try:
            parsed = list(parse_request({"messages": result}).messages)
        except InvalidRow as error:
            raise RunError(f"{what}: returns {error.what}", fix="return messages, a text or None") from None
        if not parsed or parsed[-1].role not in ("user", "tool"):
            raise RunError(f"{what}: the last message is not the user's", fix="return messages that the model answers")
        return parsed

    def call_tools(self, calls: Sequence[tuple[Any, Call | InvalidCall]]) -> list[tuple[str, bool]]:
        """Call tools of different objects, those that are `async` at the same time.

        Returns the result of each as a text for the model, and whether it is an error.
        """
        results: list[Any] = [None] * len(calls)
        pending: list[tuple[int, Callable[[], Any]]] = []
        for i, (used, call) in enumerate(calls):
            if isinstance(call, InvalidCall):
                results[i] = CallError(call.why)
                continue
            if call.name not in self.schemas:
                hint = suggest(call.name, self.schemas)
                results[i] = CallError(f"there is no tool {call.name}{hint}; the tools are {', '.join(self.schemas)}")
                continue
            tool = getattr(used, call.name)
            try:
                inspect.signature(tool).bind(**call.arguments)
            except TypeError as error:
                results[i] = CallError(f"{call.name}: {error}")
                continue
            function = partial(tool, **deepcopy(call.arguments))  # a tool may change them
            if is_async(tool):
                pending.append((i, function))
            else:
                results[i] = call_within(self.timeout, function)
        if pending:
            done = call_together([function for _, function in pending], self.timeout)
            for (i, _), result in zip(pending, done, strict=True):
                results[i] = result
        texts = [x if isinstance(x, CallError) else call_within(self.timeout, partial(_as_text, x)) for x in results]
        return [
            (_as_text(f"error: {_describe(x, self.timeout)}"), True) if isinstance(x, CallError) else (x, False)
            for x in texts
        ]

    def is_done(self, used: Any, place: str) -> bool:
        """Return whether the trace has ended. Raises RunError if `done` fails."""
        return has_member(used, "done") and bool(self._read(used, "done", {}, place))

    def reward(
        self, used: Any, completion: str, messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any], place: str
    ) -> dict[str, float]:
        """Return the named parts of the environment's own reward, or {} if it has none. Raises RunError."""
        if not has_member(used, "reward"):
            return {}
        given = {"completion": completion, "messages": list(messages), "row": dict(row)}
        return read_parts(
            self.name, f"environment {self.spec}: reward", self._read(used, "reward", given, place), place
        )

    def _read(self, used: Any, name: str, given: Mapping[str, Any], place: str) -> Any:
        """Return the value of an attribute, or the result of a method, which gets the parameters that it names."""

        def read() -> Any:
            value = getattr(used, name)
            if not callable(value):
                return value
            return value(**{key: given[key] for key in inspect.signature(value).parameters if key in given})

        static = inspect.getattr_static(used, name, None)
        is_method = inspect.isroutine(static) and is_async(getattr(used, name))
        result = call_together([read], self.timeout)[0] if is_method else call_within(self.timeout, read)
        if isinstance(result, CallError):
            what = f"environment {self.spec}: {name}: row {place}: {_describe(result, self.timeout)}"
            raise RunError(what, fix=f"fix {self.name}.{name}")
        return result

    def _call(self, calls: Sequence[Callable[[], Any]], function: Callable[..., Any]) -> list[Any]:
        if is_async(function):
            return call_together(calls, self.timeout)
        return [call_within(self.timeout, call) for call in calls]


def check_hash(environment: str, recorded: str | None, current: str, *, force: bool) -> None:
    """Raise InputError if the file of a run's environment is not the one of its training, before it is executed."""
    if recorded not in (None, current) and not force:
        what = f"environment {environment}: the file has changed since the run was trained"
        raise InputError(what, fix="restore it, or use --force to run the new file")


def hash_file(spec: str) -> str:
    """Return the SHA-256 of the spec without its folder and of the file. Raises RecipeError if there is no file."""
    path, _, names = spec.rpartition(":")
    if not Path(path).is_file():
        raise RecipeError(f"environment {spec}: no such file", fix=FORM)
    return sha256_text(f"{names} {sha256_file(Path(path))}")


def has_member(used: Any, name: str) -> bool:
    """Return whether an object has an attribute, without reading it."""
    return inspect.getattr_static(used, name, _MISSING) is not _MISSING


def _describe(error: CallError, timeout: float) -> str:
    return f"takes more than {timeout:g} s" if error.timed_out else error.text


def _as_text(result: Any) -> str:
    """Return the result of a tool as text. Raises what its own code raises."""
    text = result
    if not isinstance(text, str):
        try:
            text = json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            text = str(result)
    return str(text).encode("utf-8", "replace").decode()  # half of a character is no text


def _reset_arguments(reset: Callable[..., Any], row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the arguments of `reset`: `row`, `seed`, and columns of the row by name. **kwargs gets all columns."""
    parameters = inspect.signature(reset).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {"seed": seed, **row, "row": dict(row)}
    named = {name: given[name] for name in parameters if name in given}
    return {**(row if takes_all else {}), **named}


class _Functions:
    """An environment whose tools are functions."""

    def reset(self) -> None:
        """Do nothing."""


def load_environment(spec: str, timeout: float) -> Environment:
    """Load the class or the functions that train.environment names, and describe its tools.

    Raises RecipeError for a file, class or method that cannot be used.
    """
    file, _, names = spec.rpartition(":")
    if not file.endswith(".py") or not names:
        raise RecipeError(f"--train.environment {spec}: not a file and a class", fix=FORM)
    found_names = [name.strip() for name in names.split(",")]
    found = [load_function("environment", file, name) for name in found_names]
    factory: Callable[[], Any]
    if inspect.isclass(found[0]) and len(found) == 1:
        factory, name = found[0], found[0].__name__
        tools = dict(_list_tools(factory))
    else:
        if wrong := next((each for each in found if not inspect.isroutine(each)), None):
            what = f"environment {spec}: {getattr(wrong, '__name__', wrong)} is not a function"
            raise RecipeError(what, fix=FORM)
        if reserved := [name for name in found_names if name in NOT_TOOLS]:
            raise RecipeError(f"environment {spec}: {reserved[0]} is not a name of a tool", fix="rename the function")
        factory, name = _Functions, "functions"
        tools = dict(zip(found_names, found, strict=True))
        factory = type("Functions", (_Functions,), {key: staticmethod(value) for key, value in tools.items()})
    if not callable(getattr(factory, "reset", None)):
        raise RecipeError(f"environment {spec}: it has no method reset", fix="add `def reset(self, row): ...`")
    if not tools:
        what = f"environment {spec}: it has no public method, so it has no tool"
        raise RecipeError(what, fix="add a method with type hints and a docstring")
    first = call_within(timeout, factory)
    if isinstance(first, CallError):
        what = f"environment {spec}: {name}(): {_describe(first, timeout)}"
        raise RecipeError(what, fix="make a class that is created without arguments")
    schemas = {tool: _describe_tool(spec, file, tool, getattr(first, tool)) for tool in tools}
    return Environment(spec, name, factory, schemas, timeout, [first])


def _check_parameters(tool: Callable[..., Any]) -> None:
    """Raise TypeError for parameters that a call with JSON cannot give."""
    hints = get_type_hints(tool)
    for name, parameter in inspect.signature(tool).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"the parameter {name} cannot be given by name")
        if isinstance(hint := hints.get(name), type) and issubclass(hint, Enum):
            raise TypeError(f"the parameter {name} is an Enum, and a call gives a text: use Literal")


def _list_tools(factory: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods of a class, those of base classes first, in their order in the file."""
    for parent in reversed(factory.__mro__[:-1]):
        for name, member in vars(parent).items():
            is_method = inspect.isfunction(member) or isinstance(member, staticmethod | classmethod)
            if is_method and not name.startswith("_") and name not in NOT_TOOLS:
                yield name, member


def _describe_tool(spec: str, file: str, name: str, tool: Callable[..., Any]) -> dict[str, Any]:
    """Return the JSON schema of a tool. Raises RecipeError."""
    from transformers.utils import get_json_schema

    try:
        _check_parameters(tool)
        schema = {**get_json_schema(tool)["function"], "name": name}  # a decorator may have another name
    except USER_CODE_ERRORS as error:  # transformers raises plain exceptions for some hints
        line = getattr(getattr(inspect.unwrap(tool), "__code__", None), "co_firstlineno", None)
        where = f"{file}:{line}" if line else file
        what = f"{where}: environment {spec}: the tool {name}: {error}"
        fix = "give each parameter a type hint, and a docstring with a line for each under Args:"
        raise RecipeError(what, fix=f"{fix}; a method that is no tool begins with _") from None
    schema.pop("return", None)  # not part of the tools that a client sends to a server
    return {"type": "function", "function": schema}
