"""The flags that commands share; a recipe's fields as flags, made from the schema, never written down twice."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from strop.errors import RecipeError

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
ModelName = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="Run, adapter or model folder, .gguf file, Hub id, or demo.")
]
Memory = Annotated[str | None, typer.Option(help="Use at most this much memory, such as 8GB.", metavar="SIZE")]
Quantization = Annotated[str, typer.Option(help="none, nf4, fp4, int8; auto: what the adapter was trained on.")]
Force = Annotated[bool, typer.Option("--force", help="Load an adapter on another base; says what differs.")]
Tuned = Annotated[str, typer.Argument(metavar="RUN", help="A run or adapter folder.")]
NoParity = Annotated[
    bool, typer.Option("--no-parity", help="Do not measure the result: for a model too large to compute here.")
]
Data = Annotated[str | None, typer.Option("--data", help="Rows to measure on; default: the run's own.")]
Devices = Annotated[
    str | None, typer.Option(help="Use this many devices of this machine: a number, or all.", metavar="N|all")
]
RecipeFile = Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe file (YAML).")]


def numbers(text: str) -> list[float]:
    """Numbers with commas between them. Raises RecipeError."""
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        raise RecipeError(f"{text}: not numbers", fix="write them as 0.7,0.3") from None


def recipe_options(command: Callable[..., Any], wanted: bool, only: Collection[str] = ()) -> Any:
    """Gives a command one flag for each recipe field; it receives those that were used as `options`. only: for these
    alone, of a command that takes them from a run where they are not given."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    known, short = _recipe_fields() if wanted else ({}, {})
    flags = {field.replace(".", "__"): field for field in known if not only or field in only}
    added = []
    for name, field in flags.items():
        info = known[field]
        kind = list[str] if field in ("data.train", "data.eval", "track") else str
        names = [f"--{field}", *([f"--{short[field]}"] if field in short else [])]
        default = "the run's" if only else info.get_default(call_default_factory=True)
        default = "" if info.is_required() else f" [default: {default}]"
        panel = f"Recipe: {field.partition('.')[0]}" if "." in field else "Recipe"
        choices = f" [{'|'.join(map(str, _choices(info.annotation)))}]" if _choices(info.annotation) else ""
        text = (info.description or field) + choices + default
        option = typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, metavar="VALUE")
        hint = Annotated[kind | None, option]  # type: ignore[valid-type]
        added.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        options = {flags[name]: value for name, value in given.items() if name in flags and value not in (None, [])}
        return command(**{p.name: given[p.name] for p in own}, options=_parsed(options))

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _choices(hint: Any) -> tuple[Any, ...]:
    """The words that a field takes, if it takes words alone."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = [_choices(part) for part in get_args(hint)] if get_origin(hint) in (Union, types.UnionType) else []
    return tuple(word for part in parts for word in part)


def _recipe_fields() -> tuple[dict[str, Any], dict[str, str]]:
    """Field infos by dotted name, and the short form of those that have one."""
    from strop.config.load import SHORT_FORMS
    from strop.config.schema import option_fields

    return dict(option_fields()), {field: name for name, field in SHORT_FORMS.items()}


def _parsed(options: dict[str, Any]) -> dict[str, Any]:
    from strop.config.load import parse_option

    found = {}
    for field, value in options.items():
        if field == "track":  # each may name several; `none` takes back a recipe's
            found[field] = [name for text in value for name in parse_option(field, text) if name != "none"]
        elif isinstance(value, list) and len(value) > 1:
            found[field] = value
        else:
            found[field] = parse_option(field, value[0] if isinstance(value, list) else value)
    return found
