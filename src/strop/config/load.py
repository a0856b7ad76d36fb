"""Build a recipe from defaults, a preset, a recipe file and options (later ones have priority), and record origins."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from strop.config.names import (
    MEANINGS,
    OTHER_NAMES,
    OTHER_VALUES,
    SHORT_FORMS,
    WITHOUT_OPTION,
    full_name,
    is_data_file,
    python_name,
)
from strop.config.schema import Recipe, allows_type, is_bracketed, option_fields
from strop.errors import Location, RecipeError, closest
from strop.runs.folder import RunFolder, is_run

Origin = Literal["default", "preset", "recipe", "option", "plan"]

REQUIRED = {"model.name", "data.train"}  # fields without a default
MAX_SHOWN_CHARACTERS = 200  # of an invalid value in an error message
# pydantic's types of errors in plain words, with the values of their context
MESSAGES = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float", "int_parsing_size"), "a whole number{example}"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number{example}"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    "greater_than_equal": "at least {ge}", "greater_than": "above {gt}", "less_than_equal": "at most {le}",
    "less_than": "below {lt}", "literal_error": "{expected}", "string_type": "text", "list_type": "a list",
    "dict_type": "a map", "model_type": "a section", "string_pattern_mismatch": "{form}",
}  # fmt: skip
_MICRO_BATCH = ("train.micro_batch", "train.micro_batch_tokens")  # a run has one of them


def explain_name(name: str, prefix: str = "", separator: str = ": ") -> str:
    """Return what an unknown name probably means, in a form to append to an error, or "" if nothing is similar.

    prefix: of the suggested field. separator: between the field and its value.
    """
    fields = [field for field, _ in option_fields()]
    leaf = name.lower().replace("-", "_").rpartition(".")[2]
    if leaf in WITHOUT_OPTION:
        return f": {WITHOUT_OPTION[leaf]}"
    same_leaf = next((field for field in fields if field.rpartition(".")[2] == leaf), None)
    short = full_name(leaf) if full_name(leaf) != leaf else None
    found = same_leaf or short or OTHER_NAMES.get(leaf) or closest(name, [*fields, *SHORT_FORMS])
    if not found:
        return ""
    meaning = f" {MEANINGS[leaf].format(prefix=prefix)}" if leaf in MEANINGS else ""
    return f" (did you mean {prefix}{found.replace(' ', separator)}?{meaning})"


def _explain_argument(name: str, value: Any) -> str:
    """Return what an unknown argument of a function probably means, with its value where the field takes it."""
    leaf = name.lower()
    fields = dict(option_fields())
    meant, _, fixed = OTHER_NAMES.get(leaf, "").partition(" ")
    field = meant or full_name(closest(name, [*fields, *SHORT_FORMS]) or "")
    if leaf in WITHOUT_OPTION or field not in fields:
        return explain_name(name)
    argument = python_name(field)
    shown = json.dumps(fixed or value, ensure_ascii=False, default=lambda other: "...")
    if fixed or (leaf in OTHER_NAMES and leaf not in MEANINGS and len(shown) <= 40 and _is_valid(field, value)):
        argument += f"={shown}"
    meaning = f" {MEANINGS[leaf].format(prefix='')}" if leaf in MEANINGS else ""
    return f" (did you mean {argument}?{meaning})"


def _is_valid(field: str, value: Any) -> bool:
    """Return whether a field takes a value, such as text or a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    required = {"model.name": "m", "data.train": "d"}
    try:
        tree: dict[str, Any] = {}
        for name, given in {**required, field: value}.items():
            _set_field(tree, name, given)
        Recipe.model_validate(tree)
    except ValidationError:
        return False
    return True


@dataclass(frozen=True)
class Choice:
    """A resolved value of a recipe. field: dotted name. why: reason for the value."""

    field: str
    value: Any
    origin: Origin
    why: str


@dataclass(frozen=True)
class Resolved:
    """A recipe, and the origin of each value by dotted field name."""

    recipe: Recipe
    choices: dict[str, Choice]

    def decide(self, decisions: Iterable[Choice]) -> Resolved:
        """Return a copy with the given values."""
        tree = self.recipe.model_dump()
        choices = dict(self.choices)
        for choice in decisions:
            _set_field(tree, choice.field, choice.value)
            choices[choice.field] = choice
        return Resolved(_validate(tree, {}), choices)

    def with_origins(self, choices: Mapping[str, Choice]) -> Resolved:
        """Return a copy in which a value of the recipe that equals a choice has its origin and reason."""
        same = {
            field: choices[field]
            for field, choice in self.choices.items()
            if choice.origin == "recipe" and field in choices and choices[field].value == choice.value
        }
        return replace(self, choices=self.choices | same)

    def as_yaml(self) -> str:
        """Return the recipe as YAML, with the origin and reason of each value as a comment."""
        lines: list[str] = []
        style: dict[str, Any] = {"default_flow_style": True, "allow_unicode": True, "width": 1 << 30}
        for section, choices in groupby(self.choices.values(), lambda choice: choice.field.rpartition(".")[0]):
            lines += [f"{section}:"] if section else []
            for choice in choices:
                name = ("  " if section else "") + choice.field.rpartition(".")[2]
                text = str(yaml.dump(choice.value, Dumper=_OneLineDumper, sort_keys=False, **style))
                value = text.removesuffix("...\n").strip()
                why = " ".join(f": {choice.why}".split()) if choice.why else ""
                lines.append(f"{name}: {value}  # {choice.origin}{why}")
        return "\n".join(lines) + "\n"


def resolve(recipe_file: Path | None = None, options: Mapping[str, Any] | None = None) -> Resolved:
    """Combine defaults, preset, recipe file and options (dotted names or short forms). Raises RecipeError.

    A run as model.name means its tuned model, as for all commands: its base with model.adapter, unless one is given.
    """
    given: dict[str, tuple[Any, Origin, str]] = {}
    if recipe_file is not None:
        given.update({name: (value, "recipe", str(recipe_file)) for name, value in _read_recipe(recipe_file).items()})
    given.update({full_name(name): (value, "option", "") for name, value in (options or {}).items()})
    for one, other in (_MICRO_BATCH, _MICRO_BATCH[::-1]):
        if given.get(one, ("", "default"))[1] == "option" and given.get(other, ("", "default"))[1] == "recipe":
            del given[other]  # a recipe may have one of them, and the option is the other
    preset = given.get("preset", ("auto", "default", ""))[0]
    preset_values: dict[str, tuple[Any, Origin, str]] = {
        name: (value, "preset", f"preset {preset}") for name, value in _read_preset(preset).items()
    }
    is_overridden = preset_values and all(name in given and given[name][1] == "recipe" for name in preset_values)
    if is_overridden and given["preset"][1] == "option":
        what = f"--preset {preset}: has no effect, because {recipe_file} sets every value of the preset"
        raise RecipeError(what, fix=f"give the values as options: {', '.join(preset_values)}")
    resolved = _build({**preset_values, **given})
    model, run = resolved.recipe.model, Path(resolved.recipe.model.name).expanduser()
    is_resumed = recipe_file is not None and is_run(recipe_file.parent)
    if model.adapter or is_resumed or not is_run(run):
        return resolved
    if (folder := RunFolder(run)).has_model:
        return resolved.decide([Choice("model.name", str(folder.model), "option", f"the run {model.name}")])
    base = read_resolved(run / "recipe.yaml").recipe.model
    values = {"model.name": base.name, "model.revision": base.revision, "model.adapter": model.name}
    return resolved.decide(Choice(name, value, "option", f"the run {model.name}") for name, value in values.items())


def read_resolved(path: Path) -> Resolved:
    """Read the recipe.yaml of a run folder; every value has the origin `recipe`."""
    return _build({name: (value, "recipe", path.name) for name, value in _read_recipe(path).items()})


def parse_option(name: str, *texts: str) -> Any:
    """Convert the texts of an option, which lists and maps may repeat. `none` is None.

    A list is JSON, [a, b] or a,b (files: one a text, because their names may contain commas). A map is JSON or a=b,c=d.
    """
    hint = dict(option_fields())[name].annotation
    if allows_type(hint, type(None)) and all(text.lower() in ("none", "null", "") for text in texts):
        return None
    if allows_type(hint, dict):
        if allows_type(hint, str) and len(texts) == 1 and texts[0].isidentifier():  # such as balanced
            return texts[0]
        return _make_map(name, [pair for text in texts for pair in _parse_map(name, text, hint).items()])
    if not allows_type(hint, list):
        return texts[-1]
    items = [item for text in texts for item in _parse_list(name, text)]
    if name == "track":  # `none` removes those of the recipe
        return [item for item in items if item != "none"]
    is_text = allows_type(hint, str) and len(texts) == 1 and items == [texts[0].strip()]  # such as all-linear
    return texts[0] if is_text else items


def _parse_list(name: str, text: str) -> list[Any]:
    fix = f"""write --{name} a,b or JSON: --{name} '["a", "b"]'"""
    if name.startswith("data."):
        fix = f'give one option per file, or JSON: --{name} \'["a.jsonl", "b.jsonl"]\''
    # Brackets may be part of a token: [CITE] is one token, [INST],[/INST] are two, [<A>, <B>] is a list.
    is_token = name == "lora.new_tokens" and re.fullmatch(r"""\[[^],"']+\](,.*)?""", text)
    if is_bracketed(text, "[") and not is_token:
        return list(_read_collection(name, text, list, fix))
    parts = [text] if name.startswith("data.") else [part.strip() for part in text.split(",") if part.strip()]
    if any(_is_broken(part) for part in parts):
        raise RecipeError(f"--{name} {text}: not a list", fix=fix)
    return parts


def _parse_map(name: str, text: str, hint: Any) -> dict[Any, Any]:
    fix = f"""write --{name} name=value,name=value or JSON: --{name} '{{"name": value}}'"""
    is_yaml = Any in typing.get_args(hint)  # true, 3, text
    if is_bracketed(text, "{"):
        return dict(_read_collection(name, text, dict, fix, _RecipeLoader if is_yaml else _TextLoader))
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    is_broken = any(_is_broken(part) for key, _, value in pairs for part in ([key] if is_yaml else [key, value]))
    if is_broken or not all(separator for _, separator, _ in pairs):
        raise RecipeError(f"--{name} {text}: not a map", fix=fix)
    parse: Callable[[str], Any] = partial(yaml.load, Loader=_RecipeLoader) if is_yaml else str.strip
    try:
        return _make_map(name, [(key.strip(), parse(value)) for key, _, value in pairs])
    except yaml.YAMLError as error:
        what = f"--{name} {text}: not YAML: {getattr(error, 'problem', None) or error}"
        raise RecipeError(what, fix="put the value in quotes, inside the quotes of the shell") from None


def _read_collection(name: str, text: str, kind: type, fix: str, loader: Any = None) -> Any:
    """Parse JSON, or YAML in brackets, to a list or a map. Raises RecipeError."""
    try:
        # Not YAML alone: PyYAML reads a character that JSON escapes as two halves as two characters.
        value = json.loads(text, object_pairs_hook=partial(_make_map, name))
    except (ValueError, RecursionError):
        try:
            value = yaml.load(text, loader or _TextLoader)
        except (yaml.YAMLError, RecursionError):
            value = None
        if isinstance(value, dict) and {None, ""} & {
            inner for inner in value.values() if isinstance(inner, str | None)
        }:
            value = None  # {a, b} or {a:1}, which YAML reads as names without values
    if not isinstance(value, kind):
        raise RecipeError(f"--{name} {text}: not a {'map' if kind is dict else 'list'}", fix=fix)
    return value


def _make_map(name: str, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise RecipeError(f"--{name}: a name is given twice", fix="give each name once")
    return made


def _is_broken(text: str) -> bool:
    """Return whether a text is probably a piece of a list or map in another syntax: quoted, or with half a pair."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    has_half = text.count('"') % 2 == 1 or text.count("[") != text.count("]") or text.count("{") != text.count("}")
    return is_quoted or has_half


def _build(given: Mapping[str, tuple[Any, Origin, str]]) -> Resolved:
    """Build a recipe from values by dotted name, each with its origin and the file or preset it is from."""
    known = dict(option_fields())
    locations = []
    for name in [name for name in given if name not in known]:
        value, _, source = given[name]
        if source:
            location = Location(source, None, f"unknown key {name}{explain_name(name)}")
        else:  # the command line has refused unknown options before
            hint = explain_name(name) if "." in name else _explain_argument(name, value)
            location = Location(f"--{name}", None, f"unknown key{hint}")
        locations.append(location)
    if locations:
        fix = "see `strop train --help-all` for all keys"
        if len(locations) > 1 and (file := locations[0].file) in {name for _, _, name in given.values()}:
            fix = f"convert a file of another tool with `strop import TOOL {file} --out recipe.yaml`; {fix}"
        raise RecipeError(str(locations[0]), fix=fix, where=locations)
    tree: dict[str, Any] = {}
    for name, (value, _, _) in given.items():
        _set_field(tree, name, value)
    recipe = _validate(tree, given)
    choices = {}
    for name in known:
        _, origin, source = given.get(name, (None, "default", ""))
        choices[name] = Choice(name, attrgetter(name)(recipe), origin, source if origin == "preset" else "")
    return Resolved(recipe, choices)


def _validate(tree: dict[str, Any], given: Mapping[str, tuple[Any, Origin, str]]) -> Recipe:
    """Validate a recipe. Raises RecipeError with one location per field, or per key of a map."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        issues = error.errors()
    recipe_file = next((source for _, origin, source in given.values() if origin == "recipe"), "")
    locations: dict[tuple[str, str], Location] = {}  # by file, and field and key
    problems: dict[tuple[str, str], list[str]] = {}  # several of a field: pydantic reports each member of a union
    missing: list[str] = []
    wrong: set[str] = set()  # names of the fields
    for issue in issues:
        name = _field_name(issue["loc"])
        name = {"data": "data.train", "model": "model.name"}.get(name, name)  # required fields of missing sections
        wrong.add(name)
        problem = explain_issue(name, issue)
        if not name:  # values that contradict each other
            names = "|".join(re.escape(field) for field, _ in option_fields() if "." in field)
            problem = problem if recipe_file else re.sub(rf"(?<![\w.])({names})\b", r"--\1", problem)
            where = [Location(recipe_file, None, problem)] if recipe_file else []
            raise RecipeError(problem, fix="change or leave out one of these settings", where=where)
        value, origin, source = given.get(name, (None, "", ""))
        if isinstance(value, dict) and issue["type"] == "literal_error":
            continue  # pydantic reports that a map is not a name besides what is wrong in the map
        inner = issue["input"] if issue["loc"][-1] == "[key]" else issue["loc"][-1]
        key = f"{inner}: " if isinstance(value, dict) and len(issue["loc"]) > 2 else ""
        file, what = (source, f"{name}: {key}") if origin == "recipe" else (f"--{name}", key)
        problems.setdefault((file, what), []).append(problem)
        text = repr(issue["input"])
        text = text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."
        shown = f" (got {text})"
        if issue["type"] == "missing" or (name in REQUIRED and issue["input"] is None):
            missing, shown = missing + [f"--{name}"] * (f"--{name}" not in missing), ""
        message = ", or ".join(dict.fromkeys(problems[file, what])) + shown
        locations[file, what] = Location(file, None, f"{what}{message}")
    names = " and ".join(missing)
    fix = f"give {names}, or {f'complete {recipe_file}' if recipe_file else 'a recipe file'}" if missing else ""
    examples = (", " if recipe_file else " ").join(
        dict.fromkeys(filter(None, (_valid_example(issue, given) for issue in issues)))
    )
    fix = "; ".join(filter(None, (fix, examples and f"for example {examples}")))
    fix = fix or ("correct it" if wrong <= REQUIRED else "correct it, or leave it out for the default")
    if len(missing) == len(locations):
        raise RecipeError(f"{names} {'are' if len(missing) > 1 else 'is'} required", fix=fix)
    where = list(locations.values())
    what = str(where[0]) if len(where) == 1 else f"the {'recipe is' if recipe_file else 'options are'} not valid"
    raise RecipeError(what, fix=fix, where=where)


def explain_issue(name: str, issue: Mapping[str, Any]) -> str:
    """Return what is wrong with a value in plain words, from an error of pydantic. name: the field, if it is one."""
    if issue["type"] not in MESSAGES:
        return "is required" if issue["type"] == "missing" else str(issue["msg"]).removeprefix("Value error, ")
    info = dict(option_fields()).get(name)
    sample = next(iter((info and info.examples) or ()), info and info.default)
    is_number = isinstance(sample, int | float) and not isinstance(sample, bool)
    form = re.split(r"(?=such as)|: ", info.description)[-1].replace("such as", "a value such as") if info else ""
    details = {"example": f", such as {sample:g}" if is_number else "", "form": form}
    values = issue.get("ctx", {}).items()
    context = {key: f"{value:g}" if isinstance(value, float) else str(value).replace("'", "") for key, value in values}
    return f"must be {MESSAGES[issue['type']].format(**details, **context)}"


def _valid_example(issue: Mapping[str, Any], given: Mapping[str, tuple[Any, Origin, str]]) -> str:
    """Return a field with a valid value in place of a wrong one, as it is written where it was given, or ""."""
    name = _field_name(issue["loc"])
    info = dict(option_fields()).get(name)
    if info is None or name not in given or issue["type"] == "missing" or isinstance(given[name][0], dict):
        return ""
    value, origin, _ = given[name]
    hint = info.annotation
    choices = [part for part in _literals(hint) if isinstance(part, str)]
    suggested = OTHER_VALUES.get(str(value).lower())
    if name == "data.eval" and isinstance(value, int | float | str) and re.fullmatch(r"\d*\.?\d+", str(value)):
        share = float(value)
        text = f"{100 * share if share < 1 else share:g}%" if 0 < share < 100 else "5%"
    elif choices:
        text = suggested if suggested in choices else closest(str(value), choices) or str(info.default or choices[0])
    elif allows_type(hint, dict) or allows_type(hint, list) or name in ("model.name", "data.train"):
        return ""
    elif info.examples or info.default not in (None, ""):
        sample = next(iter(info.examples or ()), info.default)
        is_device = name == "model.device" and suggested
        text = str(suggested) if is_device else f"{sample:g}" if isinstance(sample, float) else str(sample).lower()
    elif form := re.search(r"such as ([^\s,]+)", info.description):
        text = form[1]
    else:
        return ""
    return f"{name}: {text}" if origin == "recipe" else f"--{name} {text}"


def _literals(hint: Any) -> list[Any]:
    """Return the values of all Literals in a type hint."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return list(parts)
    return [value for part in parts for value in _literals(part)]


def _field_name(path: tuple[int | str, ...]) -> str:
    """Return the dotted name of the field at a path of pydantic, or the whole path if it is not in a field."""
    known, names = dict(option_fields()), [".".join(map(str, path[:length])) for length in (2, 1)]
    return next((name for name in names if name in known), ".".join(map(str, path)))


class _OneLineDumper(yaml.SafeDumper):
    """Write each value on one line, with line breaks in texts escaped."""


def _represent_text(dumper: _OneLineDumper, text: str) -> yaml.ScalarNode:
    breaks = any(mark in text for mark in "\n\r\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_OneLineDumper.add_representer(str, _represent_text)


class _RecipeLoader(yaml.SafeLoader):
    """Refuse duplicate keys, and read dates as text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                what = f"duplicate key {key.value}, first in line {lines[key.value]}"
                raise yaml.composer.ComposerError(None, None, what, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


class _TextLoader(_RecipeLoader):
    """Read all scalars as text."""


_TextLoader.yaml_implicit_resolvers = {}
_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:timestamp"]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file as values by dotted name."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file", fix=f"give the path of a YAML file, or --model {path}")
    if is_data_file(path.name):
        raise RecipeError(f"{path}: data, not a recipe file (YAML)", fix=f"give it with --data {path}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else None
        location = Location(str(path), line, f"not YAML: {getattr(error, 'problem', None) or error}")
        fix = "indent with spaces, equally far in a section, and put texts with a colon into quotes"
        raise RecipeError("the recipe cannot be read", fix=fix, where=[location]) from None
    except RecursionError:
        raise RecipeError(f"{path}: not a recipe: nested too deep", fix="fix the YAML") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a map of sections", fix="start with `model:` and `data:`")
    return _flatten(tree, str(path))


def _flatten(tree: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Convert sections to dotted names: {'lora': {'r': 8}, 'seed': 0} becomes {'lora.r': 8, 'seed': 0}."""
    sections = {name.partition(".")[0] for name, _ in option_fields() if "." in name}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key in sections and isinstance(value, dict):
            fields = {f"{key}.{inner}": leaf for inner, leaf in value.items()}
        else:
            fields = {} if key in sections and value is None else {full_name(str(key)): value}
        if duplicates := [name for name in fields if name in flat]:
            location = Location(file, None, f"{duplicates[0]} is given twice, in its section and by its dotted name")
            raise RecipeError("duplicate key", fix="remove one of them", where=[location])
        flat.update(fields)
    return flat


def _read_preset(name: Any) -> dict[str, Any]:
    """Read the values of a preset by dotted name. Returns {} for `auto` and for unknown names."""
    file = resources.files("strop.config") / "presets" / f"{name}.yaml"
    return _flatten(yaml.safe_load(file.read_text(encoding="utf-8")) or {}, file.name) if file.is_file() else {}


def _set_field(tree: dict[str, Any], name: str, value: Any) -> None:
    section, _, leaf = name.rpartition(".")
    values = tree.setdefault(section, {}) if section else tree
    if not isinstance(values, dict):
        raise RecipeError(f"{section}: a section, not a value", fix=f"write {section}.{leaf}")
    values[leaf] = value
