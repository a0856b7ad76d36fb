"""Options that several commands share, and flags generated from the recipe's fields."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape

from strop.config.names import SHORT_FORMS, is_data_file
from strop.display.tables import messages
from strop.errors import FolderError, RecipeError

DEFAULT_FOLDER = Path("runs")
BOOLEAN = "<bool>"  # metavar of a recipe's booleans
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
ModelName = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="Run, adapter or model folder, .gguf file, Hub id, or the word demo.")
]
Memory = Annotated[str | None, typer.Option(help="Maximum memory to use, such as 8GB.", metavar="SIZE")]
Quantization = Annotated[str, typer.Option(help="none, nf4, fp4, int8, or auto (as the adapter was trained).")]
Dtype = Annotated[str, typer.Option(help="bf16, fp32, fp16, or auto (as the adapter was trained).")]
Force = Annotated[bool, typer.Option("--force", help="Load an adapter on a different base, and list the differences.")]
AdapterName = Annotated[str, typer.Argument(metavar="RUN", help="Run or adapter folder.")]
NoParity = Annotated[
    bool, typer.Option("--no-parity", help="Skip the measurement, for models too large to run on this machine.")
]
Data = Annotated[str | None, typer.Option("--data", help="Rows to measure on; default: the run's rows.")]
Devices = Annotated[str | None, typer.Option(help="Number of devices to use, or all.", metavar="N|all")]
Machines = Annotated[int, typer.Option(min=1, help="Number of machines.")]
DevicesPerMachine = Annotated[int, typer.Option(min=1, help="Devices per machine: GPUs, or processes on a CPU.")]
RecipeOrData = Annotated[str | None, typer.Argument(metavar="RECIPE|DATA", help="Recipe file (YAML), or data.")]
RecipeOrModel = Annotated[str | None, typer.Argument(metavar="RECIPE|MODEL", help="Recipe file (YAML), or a model.")]

CHAT_COMMANDS = {
    "/base": "answer without the adapter",
    "/tuned": "answer with the adapter",
    "/compare": "answer each line without and with the adapter",
    "/adapter": "NAME: answer with this adapter; no name: list the adapters",
    "/image": "FILE: show this image with the next line; may be repeated",
    "/system": "TEXT: start over with this system prompt",
    "/reset": "start over with the same system prompt",
    "/help": "show this list",
    "/quit": "end the chat (also an empty line or Ctrl-D)",
}


def read_argument(
    argument: str | None, field: str, options: dict[str, Any] | None
) -> tuple[Path | None, dict[str, Any]]:
    """Return the recipe file and the options of a command whose argument is a recipe file or a field's value."""
    path = Path(argument or "")
    is_model = path.is_dir() or path.suffix == ".gguf" or not path.is_file()
    is_recipe = path.suffix in (".yaml", ".yml") or (
        field == "model.name" and not is_data_file(path.name) and not is_model
    )
    if argument is None or is_recipe:
        return (path if argument else None), options or {}
    if field == "model.name" and is_data_file(argument) and not argument.endswith(".json"):  # a model's config.json
        raise RecipeError(f"{argument}: data, not a model or a recipe", fix=f"give it with --data {argument}")
    if field in (options or {}):
        raise RecipeError(
            f"--{field}: given twice, as {argument} and as an option", fix="give it once, and a list as a,b"
        )
    return None, {field: argument, **(options or {})}


def check_folder(folder: Path) -> None:
    """Raise FolderError if a folder that the user named does not exist; the default one appears with the first run."""
    from strop.runs.folder import suggest_path  # imports psutil, which `strop --help` does not need

    if folder != DEFAULT_FOLDER and not folder.is_dir():
        what = f"{folder}: no such folder{suggest_path(str(folder))}"
        raise FolderError(what, fix="give a folder that contains run folders")


def parse_numbers(text: str) -> list[float]:
    """Parse numbers separated by commas. Raises RecipeError."""
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        raise RecipeError(f"{text}: not numbers", fix="write them as 0.7,0.3") from None


# fields that --help shows for each command, by their short names; --help-all shows the others
COMMON: Mapping[str, tuple[str, ...]] = {
    "train": (
        "model.name", "data.train", "data.eval", "out", "preset", "model.quantization", "data.max_length",
        "train.objective", "lora.r", "train.epochs", "train.max_steps", "train.learning_rate", "train.batch_size",
    ),
    "resume": ("train.epochs", "train.max_steps", "train.learning_rate", "model.device"),
    "sweep": ("model.name", "data.train", "data.eval", "out", "train.epochs", "train.batch_size"),
    "plan": (
        "model.name", "data.train", "model.quantization", "data.max_length", "train.objective", "lora.r",
        "train.epochs", "train.batch_size",
    ),
    "check": ("model.name", "data.train", "data.eval", "data.max_length", "train.objective"),
}  # fmt: skip


def add_recipe_options(command: Callable[..., Any], words: Collection[str], only: Collection[str] = ()) -> Any:
    """Return the command with one option per recipe field; it receives the options that are used as `options`.

    words: the command line; without any, only `--help-all` is added, because the options take 0.1 s to generate.
    only: add only these fields, whose default is the value of an existing run.
    """
    defaults = "the run's" if only or command.__name__ == "resume" else None
    parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    added, fields = [], {}
    for field, name, short, panel, info in _declare_options(words, only) if words else ():
        parameter = field.replace(".", "__") if name == field else f"short__{field.replace('.', '__')}"
        fields[parameter] = field
        kind = list[str] if _is_repeatable(info) else str
        text = escape(_help_text(info, defaults))  # Rich would drop [words] as markup
        text += f" Short form: --{short}." if short else ""
        option = typer.Option(
            f"--{name}",
            help=text,
            rich_help_panel=panel or None,
            hidden=panel is None,
            show_default=False,
            metavar=_metavar(info),
        )
        hint = Annotated[kind | None, option]  # type: ignore[valid-type]
        added.append(inspect.Parameter(parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    if not only:
        added.append(inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll))

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        from strop.config.load import parse_option

        used: dict[str, list[str]] = {}
        for name, value in values.items():
            if name in fields and value not in (None, []):
                if fields[name] in used:
                    raise RecipeError(f"--{fields[name]}: given twice", fix="give its short or its full name")
                used[fields[name]] = value if isinstance(value, list) else [value]
        options = {field: parse_option(field, *texts) for field, texts in used.items()}
        return command(**{p.name: values[p.name] for p in parameters}, options=options)

    keywords = added + [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in keywords}
    return run


def _declare_options(
    words: Collection[str], only: Collection[str]
) -> Iterator[tuple[str, str, str | None, str | None, Any]]:
    """Yield (field, name of the option, its short form, panel of the help or None to hide it, pydantic FieldInfo)."""
    from strop.config.schema import OBJECTIVE_OPTIONS, option_fields

    short = {field: name for name, field in SHORT_FORMS.items()}
    infos = {field: info for field, info in option_fields() if not only or field in only}
    shows_common = bool({"--help", "-h"} & set(words)) and not only
    common = next((COMMON[word] for word in words if word in COMMON), ()) if shows_common else ()
    for field in dict.fromkeys([*common, *short]):
        is_shown = field in common
        if field in infos and (is_shown or field in short):
            yield field, short.get(field, field), None, "" if is_shown else None, infos[field]
    for field, info in infos.items():
        section, _, leaf = field.rpartition(".")
        panel = f"Recipe: {'objectives' if leaf in OBJECTIVE_OPTIONS else section}" if section else "Recipe"
        if field in short or field not in common:
            yield field, field, short.get(field), None if shows_common else panel, info


def _show_full_help(context: typer.Context, requested: bool) -> None:
    if requested:
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option("--help-all", help="Show all options, and exit.", is_eager=True, callback=_show_full_help),
]
OTHER_PANEL = "Output and help"
OTHER_OPTIONS = ("print_recipe", "as_json", "help_all", "help")  # in this panel, if the command has recipe options


def _is_repeatable(info: Any) -> bool:
    """Return whether a field is a list or a map, whose option may be given several times."""
    from strop.config.schema import allows_type

    return any(allows_type(info.annotation, kind) for kind in (list, dict))


def _metavar(info: Any) -> str:
    """Return the name of a field's type that Typer shows for other options of this type."""
    is_union = get_origin(info.annotation) in (Union, types.UnionType)
    parts = get_args(info.annotation) if is_union else (info.annotation,)
    members = [part for part in parts if part is not type(None)]
    first = get_origin(members[0]) or members[0]
    if first is Annotated:
        first = get_args(members[0])[0]
    names = {bool: BOOLEAN, int: "<int>", float: "<float>", list: "<a,b,...>", dict: "<k=v,...>"}
    return names.get(first, "<str>")


def _help_text(info: Any, default: str | None) -> str:
    """Return a field's description with its choices and its default. default: replaces the field's own default."""
    value = None if info.is_required() else info.get_default(call_default_factory=True)
    if default is None and value not in (None, [], {}):
        default = (
            str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        )
    choices = _choices(info.annotation)
    if set(choices) <= set(re.findall(r"[\w-]+", info.description)):  # the description explains each of them
        choices = ()
    description = f"{info.description[0].upper()}{info.description[1:]}."
    has_other_values = get_origin(info.annotation) in (Union, types.UnionType) and any(
        get_origin(member) is not Literal and member is not type(None) for member in get_args(info.annotation)
    )
    listed = f"[{'or ' * has_other_values}{' | '.join(choices)}]" if choices else ""
    parts = [description, listed, f"[default: {default}]" if default else ""]
    return " ".join(filter(None, parts))


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the values that a field allows if they are listed in its type, else ()."""
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    return tuple(choice for member in members for choice in _choices(member))


def is_main_process() -> bool:
    """Return whether this is rank 0, or the only process."""
    from strop.distributed.devices import find_ranks

    ranks = find_ranks()
    return ranks is None or ranks.rank == 0


def console_for(is_main: bool) -> Console:
    """Return a console for messages that prints in the main process only."""
    return messages if is_main else Console(quiet=True)
