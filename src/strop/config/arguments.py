"""Check the arguments of the public functions, and name options in their errors as in Python."""

from __future__ import annotations

import functools
import inspect
import json
import os
import textwrap
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

from strop.config.names import OTHER_NAMES, SHORT_FORMS
from strop.config.options import COMMON, SHOWN_TYPES, Options
from strop.errors import InputError, StropError, closest, in_terminal

P = ParamSpec("P")
R = TypeVar("R")
# what parameters for displays take
TAKEN = {"callback": "a function", "progress": "True, False, None, or for some functions a function"}
# other names for parameters -> ours; the first one that the function has
OTHER_PARAMETERS = {
    **dict.fromkeys(("model", "model_name", "model_path", "path"), ("run", "name")), "run": ("name",),
    "name": ("run",), "runs": ("run",), "adapter_path": ("run", "name"), "format": ("target",), "to": ("target",),
    **dict.fromkeys(("quant", "quantize", "quantization", "dtype"), ("type",)), "max_tokens": ("max_new_tokens",),
    **dict.fromkeys(("output_path", "save_path"), ("out",)), "repo_id": ("repo",),
    **dict.fromkeys(("test", "dataset", "rows", "file"), ("data",)),
}  # fmt: skip
EVALUATION_FIELDS = ("format", "columns", "encoding")  # recipe fields that `evaluate` accepts


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Raise InputError for arguments that do not fit the signature, and write errors for a caller in Python."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            _check_arguments(function.__name__, signature, args, kwargs)
            return function(*args, **kwargs)
        except StropError as error:
            if not in_terminal.get():
                error.use_python_names()
            raise

    if function.__name__ == "train":
        names = textwrap.wrap(
            ", ".join(Options.__annotations__), 100, initial_indent=" " * 8, subsequent_indent=" " * 8
        )
        checked.__doc__ = "\n".join([f"{(function.__doc__ or '').rstrip()}\n\n    All recipe fields:", *names, "    "])
    checked.__signature__ = _add_common_options(signature)  # type: ignore[attr-defined]
    return checked


def _takes_recipe_fields(signature: inspect.Signature) -> bool:
    return "options" in signature.parameters and "Unpack" in str(signature.parameters["options"].annotation)


def _add_common_options(signature: inspect.Signature) -> inspect.Signature:
    """Return the signature with the common recipe fields, which an interactive shell then completes."""
    if not _takes_recipe_fields(signature):
        return signature
    first, *others = signature.parameters.values()
    hints = {name: hint.__forward_arg__ for name, hint in Options.__annotations__.items()} | SHOWN_TYPES
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, default in COMMON.items()
    ]
    return signature.replace(parameters=[first, *common, *others])


def check_path(name: str, value: Any) -> str:
    """Return a path, or the name of a model, as text. Raises InputError for other types."""
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{name}: a path or a name, not {type(value).__name__}", fix="give a string, a Path or a Run")
    return str(os.fspath(value))


def _check_arguments(name: str, signature: inspect.Signature, args: Any, kwargs: Mapping[str, Any]) -> None:
    parameters = signature.parameters
    positional = [text for text, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(positional):
        what = f"{name}: {len(args)} arguments by position, where only {', '.join(positional)} can be given so"
        named = [text for text, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
        pairs = zip(named, args[len(positional) :], strict=False)
        example = ", ".join(f"{text}={json.dumps(value, default=lambda value: '...')}" for text, value in pairs)
        if _takes_recipe_fields(signature):
            example = 'model="demo", data="rows.jsonl"'
        raise InputError(what, fix=f"give the others by name, such as {example}")
    for option in kwargs.keys() - parameters.keys():
        _check_option(name, option, parameters)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:  # an argument is missing, or given twice
        raise InputError(f"{name}: {error}", fix=f"see `help(strop.{name})`") from None
    for text, value in bound.items():
        kind = str(parameters[text].annotation)
        if kind.startswith("PathLike") and "Sequence" not in kind and not (value is None and "None" in kind):
            check_path(text, value)
        if text in TAKEN and not (value is None or callable(value) or (text == "progress" and isinstance(value, bool))):
            raise InputError(f"{name}: {text} is {value!r}", fix=f"give {TAKEN[text]}")
        if text == "callback" and value is not None:
            _check_callback(name, value)
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        if kind in ("int", "int | None") and not (is_integer or (value is None and "None" in kind)):
            raise InputError(f"{name}: {text} is {value!r}", fix=f"give a whole number, such as {text}=2")
        if kind == "bool" and not isinstance(value, bool):
            raise InputError(f"{name}: {text} is {value!r}", fix=f"give {text}=True or {text}=False")


def _check_callback(name: str, callback: Callable[..., Any]) -> None:
    """Raise InputError for a function that does not take one event."""
    try:
        signature = inspect.signature(callback)
    except (TypeError, ValueError):  # some C functions have no signature
        return
    try:
        signature.bind({})
    except TypeError as error:
        what = f"{name}: callback{signature}: {error}"
        raise InputError(what, fix="it gets one event, a dictionary: `def callback(event)`") from None


def _check_option(name: str, option: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raise InputError for an unknown keyword that probably means a parameter, or that the function does not take."""
    from strop.config.schema import option_fields

    known = [text for text, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    fields = (
        [field.rpartition(".")[2] for field in (*dict(option_fields()), *SHORT_FORMS)]
        if "options" in parameters
        else []
    )
    fields = [*EVALUATION_FIELDS] if name == "evaluate" else [field.replace("-", "_") for field in fields]
    field, _, value = OTHER_NAMES.get(option, "").partition(" ")
    meant = next((text for text in OTHER_PARAMETERS.get(option, ()) if text in known), None)
    hint = meant or field.rpartition(".")[2] or closest(option, [*known, *fields])
    value = "" if meant else value
    if option.rpartition(".")[2] in fields or (fields and name != "evaluate" and hint not in known):
        return  # if the recipe has no such field, it says so
    suggestion = f" (did you mean {hint}{value and f'={value!r}'}?)" if hint in (*known, *fields) else ""
    raise InputError(f"{name}: unknown argument {option}{suggestion}", fix=f"see `help(strop.{name})`")
