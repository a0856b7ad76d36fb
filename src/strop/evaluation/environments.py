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
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, get_type_hints

from strop.data.converters import parse_request
from strop.data.rendering.tool_calls import Call, InvalidCall
from strop.data.row_errors import InvalidRow
from strop.data.types import Message
from strop.errors import InputError, RecipeError, RunError, suggest
from strop.evaluation.calls import MAX_WORKERS, CallError, Worker, call_async, is_async, run_together, start
from strop.evaluation.metrics import USER_CODE_ERRORS, load_function
from strop.evaluation.rewards import read_parts
from strop.runs.lock import sha256_file, sha256_text

NOT_TOOLS = ("reset", "reward", "done", "close")
_MISSING = object()
FORM = "write it as FILE.py:Class or FILE.py:function,function"


@dataclass(frozen=True)
class TurnResult:
    """The results of the tool calls of a turn.

    Attributes:
        texts: the result of each call, for the model.
        failed: whether each call failed.
        done: whether the trace has ended, or the CallError of `done`.
    """

    texts: tuple[str, ...]
    failed: tuple[bool, ...]
    done: bool | CallError


@dataclass(frozen=True)
class Environment:
    """A kind of environment. Its objects are reused after `reset`, as in TRL.

    All members of an object are called in its worker, or in the event loop if they are `async`.

    spec: train.environment. factory: returns a new object. schemas: JSON schemas of the tools, by name. timeout: of a
    call, in seconds.
    """

    spec: str
    name: str
    factory: Callable[[], Any]
    schemas: Mapping[str, dict[str, Any]]
    timeout: float
    _unused: list[Any] = field(default_factory=list, repr=False, compare=False)
    _workers: dict[int, Worker] = field(default_factory=dict, repr=False, compare=False)  # by id of the object
    _next_worker: Iterator[Worker] = field(default_factory=lambda: _cycle_workers(), repr=False, compare=False)
    _late: set[int] = field(default_factory=set, repr=False, compare=False)  # ids of objects whose calls took too long

    def take(self, count: int) -> list[Any]:
        """Return objects that no trace uses. Raises RunError if one cannot be made."""
        taken = [self._unused.pop() for _ in range(min(count, len(self._unused)))]
        workers = [next(self._next_worker) for _ in range(count - len(taken))]
        made = run_together([worker.call(self.factory, self.timeout) for worker in workers])
        if error := next((x for x in made if isinstance(x, CallError)), None):
            what = f"environment {self.spec}: {self.describe(error)}"
            raise RunError(what, fix="fix its __init__")
        self._workers.update({id(used): worker for used, worker in zip(made, workers, strict=True)})
        return [*taken, *made]

    def give_back(self, used: Any) -> None:
        """Let other traces use an object, unless a call of it may still be running."""
        if id(used) in self._late:
            self._late.remove(id(used))
            del self._workers[id(used)]
        else:
            self._unused.append(used)

    def reset(self, starts: Sequence[Start]) -> list[list[Message]]:
        """Start traces concurrently, and return the messages of the prompt of each. Raises RunError for a row."""
        calls = [self._prepare_reset(start) for start in starts]
        results = run_together([self._call(*call) for call in calls])
        return [self._read_reset(*pair) for pair in zip(starts, results, strict=True)]

    def _prepare_reset(self, start: Start) -> tuple[Any, Callable[..., Any], dict[str, Any]]:
        try:
            arguments = _reset_arguments(start.used.reset, start.row, start.seed)
            inspect.signature(start.used.reset).bind(**arguments)
        except TypeError as error:
            what = f"environment {self.spec}: reset: row {start.place}: {error}"
            raise RunError(what, fix="give rows with these columns") from None
        return start.used, start.used.reset, arguments

    def _read_reset(self, start: Start, result: Any) -> list[Message]:
        """Return the messages of a prompt after `reset` has returned a text, messages or None."""
        what, messages = f"environment {self.spec}: reset: row {start.place}", start.messages
        if isinstance(result, CallError):
            raise RunError(f"{what}: {self.describe(result)}", fix=f"fix {self.name}.reset, or the row")
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

    def start_turn(
        self, used: Any, calls: Sequence[Call | InvalidCall], *, reads_done: bool = True
    ) -> Future[TurnResult]:
        """Start to call the tools of a turn, one after the other, and then to read `done` if `reads_done`."""
        return start(self._call_turn(used, calls, reads_done=reads_done))

    async def _call_turn(self, used: Any, calls: Sequence[Call | InvalidCall], *, reads_done: bool) -> TurnResult:
        results = [await self._call_tool(used, call) for call in calls]
        failed = tuple(isinstance(result, CallError) for result in results)
        texts = (_as_text(f"error: {self.describe(x)}") if isinstance(x, CallError) else x for x in results)
        done = await self._read(used, "done", {}) if reads_done and has_member(used, "done") else False
        return TurnResult(tuple(texts), failed, done if isinstance(done, CallError) else bool(done))

    async def _call_tool(self, used: Any, call: Call | InvalidCall) -> Any:
        """Return the result of a tool as text, or a CallError."""
        if isinstance(call, InvalidCall):
            return CallError(call.why)
        if call.name not in self.schemas:
            hint = suggest(call.name, self.schemas)
            return CallError(f"there is no tool {call.name}{hint}; the tools are {', '.join(self.schemas)}")
        tool = getattr(used, call.name)
        try:
            inspect.signature(tool).bind(**call.arguments)
        except TypeError as error:
            return CallError(f"{call.name}: {error}")
        result = await self._call(used, tool, deepcopy(call.arguments))  # a tool may change them
        return result if isinstance(result, CallError) else await self._call(used, _as_text, {"result": result})

    def rewards(self, ends: Sequence[End]) -> list[dict[str, float]]:
        """Return the named parts of the environment's own reward of each trace, or {} if it has none.

        They are computed concurrently. Raises RunError for a row.
        """
        results = run_together([self._reward(end) for end in ends])
        parts = []
        for end, result in zip(ends, results, strict=True):
            self.check("reward", end.place, result)
            what = f"environment {self.spec}: reward"
            parts.append({} if result is _MISSING else read_parts(self.name, what, result, end.place))
        return parts

    async def _reward(self, end: End) -> Any:
        if not has_member(end.used, "reward"):
            return _MISSING
        given = {"completion": end.completion, "messages": list(end.messages), "row": dict(end.row)}
        return await self._read(end.used, "reward", given)

    def check(self, member: str, place: str, result: Any) -> None:
        """Raise RunError if a call of a member has failed. place: of the row."""
        if isinstance(result, CallError):
            what = f"environment {self.spec}: {member}: row {place}: {self.describe(result)}"
            raise RunError(what, fix=f"fix {self.name}.{member}")

    async def _read(self, used: Any, name: str, given: Mapping[str, Any]) -> Any:
        """Return the value of an attribute, or the result of a method, which gets the parameters that it names."""

        def named(method: Callable[..., Any]) -> dict[str, Any]:
            return {key: given[key] for key in inspect.signature(method).parameters if key in given}

        def read() -> Any:
            value = getattr(used, name)
            return value(**named(value)) if callable(value) else value

        if inspect.isroutine(inspect.getattr_static(used, name)) and is_async(method := getattr(used, name)):
            return await self._call(used, method, named(method))
        return await self._call(used, read, {})

    async def _call(self, used: Any, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Return the result of a call that concerns an object, or its CallError."""
        call = partial(function, **arguments)
        if is_async(function):
            return await call_async(call, self.timeout)
        result = await self._workers[id(used)].call(call, self.timeout)
        if isinstance(result, CallError) and result.timed_out:
            self._late.add(id(used))
        return result

    def describe(self, error: CallError) -> str:
        return _describe(error, self.timeout)


@dataclass(frozen=True)
class Start:
    """The start of a trace. used: object of the environment. messages: of the row's prompt. seed: for `reset`."""

    used: Any
    row: Mapping[str, Any]
    messages: Sequence[Message]
    seed: int
    place: str


@dataclass(frozen=True)
class End:
    """The end of a trace. completion: text of the last turn. messages: of all turns."""

    used: Any
    completion: str
    messages: Sequence[Mapping[str, Any]]
    row: Mapping[str, Any]
    place: str


def _cycle_workers() -> Iterator[Worker]:
    workers: list[Worker] = []
    for number in count():
        if number < MAX_WORKERS:
            workers.append(Worker())
        yield workers[number % MAX_WORKERS]


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
    environment = Environment(spec, name, factory, {}, timeout)
    try:
        [first] = environment.take(1)
    except RunError as error:
        what = error.what.replace(spec, f"{spec}: {name}()", 1)
        raise RecipeError(what, fix="make a class that is created without arguments") from None
    environment.give_back(first)
    return replace(
        environment, schemas={tool: _describe_tool(spec, file, tool, getattr(first, tool)) for tool in tools}
    )


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
