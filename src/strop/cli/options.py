"""Options that several commands share, and flags generated from the recipe's fields."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from rich.markup import escape

from strop.errors import RecipeError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
ModelName = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="Run, adapter or model folder, .gguf file, Hub id, or demo.")
]
Memory = Annotated[str | None, typer.Option(help="Maximum memory to use, such as 8GB.", metavar="SIZE")]
Quantization = Annotated[str, typer.Option(help="none, nf4, fp4, int8, or auto (as the adapter was trained).")]
Force = Annotated[bool, typer.Option("--force", help="Load an adapter on a different base, and list the differences.")]
AdapterName = Annotated[str, typer.Argument(metavar="RUN", help="Run or adapter folder.")]
NoParity = Annotated[
    bool, typer.Option("--no-parity", help="Skip the measurement, for models too large to run on this machine.")
]
Data = Annotated[str | None, typer.Option("--data", help="Rows to measure on; default: the run's rows.")]
Devices = Annotated[str | None, typer.Option(help="Number of devices of this machine to use, or all.", metavar="N|all")]
Machines = Annotated[int, typer.Option(min=1, help="Number of machines.")]
DevicesPerMachine = Annotated[int, typer.Option(min=1, help="Devices per machine: GPUs, or processes on a CPU.")]
RecipeFile = Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe file (YAML).")]


def parse_numbers(text: str) -> list[float]:
    """Parse numbers separated by commas. Raises RecipeError."""
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        raise RecipeError(f"{text}: not numbers", fix="write them as 0.7,0.3") from None


def add_recipe_options(command: Callable[..., Any], enabled: bool, only: Collection[str] = ()) -> Any:
    """Add a flag for each recipe field to a command. Its parameter `options` receives the values by field.

    enabled: if False, add no flags. only: if not empty, add only these fields, whose defaults are those of the run.
    """
    parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    fields: dict[str, Any] = {}
    if enabled:
        from strop.config.load import SHORT_FORMS
        from strop.config.schema import option_fields

        fields, short_forms = dict(option_fields()), {field: name for name, field in SHORT_FORMS.items()}
    flags = {field.replace(".", "__"): field for field in fields if not only or field in only}
    new_parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    for name, field in flags.items():
        value_type = list[str] if field in ("data.train", "data.eval", "track") else str
        names = [f"--{field}", *([f"--{short_forms[field]}"] if field in short_forms else [])]
        panel = f"Recipe: {field.partition('.')[0]}" if "." in field else "Recipe"
        text = escape(_help_text(fields[field], "the run's" if only else None))  # Rich would drop [words] as markup
        option = typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, metavar="VALUE")
        annotation = Annotated[value_type | None, option]  # type: ignore[valid-type]
        parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        new_parameters.append(parameter)

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        options = {flags[name]: value for name, value in values.items() if name in flags and value not in (None, [])}
        return command(**{p.name: values[p.name] for p in parameters}, options=_parse_options(options))

    run.__signature__ = inspect.Signature(new_parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in new_parameters}
    return run


def _help_text(info: Any, default: str | None) -> str:
    """Return a field's description with its choices and its default. default: replaces the field's own default."""
    value = None if info.is_required() else info.get_default(call_default_factory=True)
    if default is None and value not in (None, [], {}):
        default = str(value).lower() if isinstance(value, bool) else str(value)
    choices = _choices(info.annotation)
    parts = [info.description, f"[{'|'.join(choices)}]" if choices else "", f"[default: {default}]" if default else ""]
    return " ".join(filter(None, parts))


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the values that a field allows if they are listed in its type, else ()."""
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    return tuple(choice for member in members for choice in _choices(member))


def _parse_options(options: dict[str, Any]) -> dict[str, Any]:
    from strop.config.load import parse_option

    parsed = {}
    for field, value in options.items():
        if field == "track":  # each flag may name several trackers; `none` removes those of the recipe
            parsed[field] = [name for text in value for name in parse_option(field, text) if name != "none"]
        elif isinstance(value, list) and len(value) > 1:
            parsed[field] = value
        else:
            parsed[field] = parse_option(field, value[0] if isinstance(value, list) else value)
    return parsed
