"""From defaults, a preset, a recipe file and options to one Recipe, each value with its origin.

Later layers win: default < preset < recipe file < option. What is still `auto` or unset after that is
decided by planning/choose.py and carries the origin `plan`.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from strop.config.schema import Recipe, Section, option_fields
from strop.errors import RecipeError, Where, nearest

Origin = Literal["default", "preset", "recipe", "option", "plan"]

SHOWN_CHARACTERS = 200  # of a wrong value
# short forms of the common options; `strop train --model X` is `strop train --model.name X`
SHORT_FORMS = {
    "model": "model.name",
    "data": "data.train",
    "eval": "data.eval",
    "adapter": "model.adapter",
    "device": "model.device",
    "max-time": "train.max_time",
}


@dataclass(frozen=True)
class Choice:
    """One resolved value of a recipe: the field's dotted name, its value, who set it, and why."""

    field: str
    value: Any
    origin: Origin
    why: str


@dataclass(frozen=True)
class Resolved:
    """A recipe and the origin of each of its values, by dotted field name."""

    recipe: Recipe
    choices: dict[str, Choice]

    def decide(self, decisions: Iterable[Choice]) -> Resolved:
        """A copy in which the given fields have the values that the plan chose."""
        tree = self.recipe.model_dump()
        choices = dict(self.choices)
        for choice in decisions:
            _put(tree, choice.field, choice.value)
            choices[choice.field] = choice
        return Resolved(_validated(tree, {}), choices)

    def as_yaml(self) -> str:
        """The recipe as YAML, each value followed by its origin and reason as a comment. Loads again as a recipe."""
        lines: list[str] = []
        section = ""
        for field, choice in self.choices.items():
            head, _, leaf = field.rpartition(".")
            if head and head != section:
                lines.append(f"{head}:")
            section = head
            value = yaml.dump(
                choice.value, Dumper=_OnOneLine, default_flow_style=True, allow_unicode=True, width=1 << 30
            )
            value = value.removesuffix("...\n").strip()
            why = " ".join(f": {choice.why}".split()) if choice.why else ""
            lines.append(f"{'  ' if head else ''}{leaf}: {value}  # {choice.origin}{why}")
        return "\n".join(lines) + "\n"


def resolve(recipe_file: Path | None = None, options: Mapping[str, Any] | None = None) -> Resolved:
    """Layers a recipe file and options (by dotted name or short form) over the preset and the defaults.

    Raises RecipeError for unknown keys (with the nearest name) and for values out of bounds.
    """
    given: dict[str, tuple[Any, Origin, str]] = {}
    if recipe_file is not None:
        given.update({name: (value, "recipe", str(recipe_file)) for name, value in _read(recipe_file).items()})
    given.update({SHORT_FORMS.get(name, name): (value, "option", "") for name, value in (options or {}).items()})
    preset = given.get("preset", ("auto", "default", ""))[0]
    layered: dict[str, tuple[Any, Origin, str]] = {
        name: (value, "preset", f"preset {preset}") for name, value in _preset(preset).items()
    }
    taken = layered and all(name in given and given[name][1] == "recipe" for name in layered)
    if taken and given["preset"][1] == "option":
        what = f"--preset {preset}: changes nothing, {recipe_file} has values of its own for all that it sets"
        raise RecipeError(what, fix=f"give the values: {', '.join(layered)}")
    return _build({**layered, **given})


def read_resolved(path: Path) -> Resolved:
    """The recipe.yaml of a run folder, whose values all came from that file."""
    return _build({name: (value, "recipe", path.name) for name, value in _read(path).items()})


def parse_option(name: str, text: str) -> Any:
    """An option's text as the recipe's value: lists split at commas, maps as a=b,c=d, `none` for nothing.

    A list may stand in brackets, as in a recipe; tokens are text, and keep theirs.
    """
    hint = dict(option_fields())[name].annotation
    kinds = {typing.get_origin(part) or part for part in _union(hint)}
    if text.lower() in ("none", "null", "") and type(None) in kinds:
        return None
    if dict in kinds:
        pairs = [pair.partition("=") for pair in text.split(",") if pair]
        if not all(middle for _, middle, _ in pairs):
            raise RecipeError(f"--{name} {text}: not a map", fix="write it as name=value,name=value")
        typed = Any in typing.get_args(hint)  # as a recipe would have them: true, 3, text
        try:
            return {key.strip(): yaml.load(value, _EachKeyOnce) if typed else value.strip() for key, _, value in pairs}
        except yaml.YAMLError as error:
            what = f"--{name} {text}: not YAML: {getattr(error, 'problem', None) or error}"
            raise RecipeError(what, fix="put quotes around the value, inside those of the shell") from None
    if list in kinds and not name.startswith("data.") and ("," in text or str not in kinds):
        bare = text if name == "lora.new_tokens" or not re.fullmatch(r"\[.*\]", text) else text[1:-1]
        return [part.strip() for part in bare.split(",") if part.strip()]
    return text


def _union(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _build(given: Mapping[str, tuple[Any, Origin, str]]) -> Resolved:
    known = dict(option_fields())
    unknown = [name for name in given if name not in known]
    if unknown:
        places = [Where(given[name][2] or f"--{name}", None, _unknown(name, known)) for name in unknown]
        raise RecipeError("unknown recipe key", fix="see `strop schema` for every key", where=places)
    tree: dict[str, Any] = {}
    for name, (value, _, _) in given.items():
        _put(tree, name, value)
    recipe = _validated(tree, given)
    choices = {}
    for name in known:
        value = _get(recipe, name)
        _, origin, source = given.get(name, (None, "default", ""))
        choices[name] = Choice(name, value, origin, source if origin == "preset" else "")
    return Resolved(recipe, choices)


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    leaf = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = f" (did you mean {leaf[0]}?)" if leaf else nearest(name, known)
    return f"unknown key {name}{hint}"


def _validated(tree: dict[str, Any], given: Mapping[str, tuple[Any, Origin, str]]) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        places: dict[str, Where] = {}  # one line a field, or key of a map: pydantic reports each member of a union
        for fault in error.errors():
            name = _field_name(fault["loc"])
            name = {"data": "data.train", "model": "model.name"}.get(name, name)  # a missing section: its one duty
            value, origin, source = given.get(name, (None, "", ""))
            key = f"{fault['loc'][-1]}: " if isinstance(value, dict) and len(fault["loc"]) > 2 else ""
            file = source if origin == "recipe" else f"--{name}" if name else "recipe"
            shown = (
                "" if fault["type"] in ("missing", "value_error") and not name else f" (got {_short(fault['input'])})"
            )
            said = "is required" if fault["type"] == "missing" else fault["msg"].removeprefix("Value error, ") + shown
            field = f"{name}: " if origin == "recipe" else ""
            places.setdefault(name + key, Where(file, None, f"{field}{key}{said}"))
        raise RecipeError("the recipe is not valid", fix="", where=list(places.values())) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _field_name(location: tuple[int | str, ...]) -> str:
    known = dict(option_fields())
    for length in (2, 1):
        name = ".".join(str(part) for part in location[:length])
        if name in known:
            return name
    return ".".join(str(part) for part in location)


class _OnOneLine(yaml.SafeDumper):
    """A value in one line. What ends a line, inside a text, is written as \\n and the like."""


def _in_quotes(dumper: _OnOneLine, text: str) -> yaml.ScalarNode:
    breaks = any(mark in text for mark in "\n\r\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_OnOneLine.add_representer(str, _in_quotes)


class _EachKeyOnce(yaml.SafeLoader):
    """YAML, whose maps hold a key once; PyYAML itself takes the last of several. A date stays the text that it is."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                what = f"the key {key.value} stands twice, first in line {lines[key.value]}"
                raise yaml.composer.ComposerError(None, None, what, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


_EachKeyOnce.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:timestamp"]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file", fix="give the path of a YAML file")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else None
        place = Where(str(path), line, f"not YAML: {getattr(error, 'problem', None) or error}")
        raise RecipeError("the recipe cannot be read", fix="mend the YAML", where=[place]) from None
    except RecursionError:
        raise RecipeError(f"{path}: not a recipe: too deep", fix="mend the YAML") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a map of sections", fix="start with `model:` and `data:`")
    return _flat(tree, str(path))


def _flat(tree: Mapping[str, Any], file: str) -> dict[str, Any]:
    """{'lora': {'r': 8}, 'seed': 0} -> {'lora.r': 8, 'seed': 0}; only the recipe's own sections are opened."""
    sections = {name.partition(".")[0] for name, _ in option_fields() if "." in name}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key in sections and isinstance(value, dict):
            found = {f"{key}.{inner}": leaf for inner, leaf in value.items()}
        else:
            found = {} if key in sections and value is None else {str(key): value}
        if twice := [name for name in found if name in flat]:
            place = Where(file, None, f"{twice[0]} stands twice, in its section and by its whole name")
            raise RecipeError("a key stands twice", fix="take one of them out", where=[place])
        flat.update(found)
    return flat


def _preset(name: Any) -> dict[str, Any]:
    file = resources.files("strop.config") / "presets" / f"{name}.yaml"
    # an unknown preset is left to the schema, which names the ones there are
    return _flat(yaml.safe_load(file.read_text(encoding="utf-8")) or {}, file.name) if file.is_file() else {}


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    head, _, leaf = name.rpartition(".")
    if head:
        inner = tree.setdefault(head, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{head}: a section, not a value", fix=f"write {head}.{leaf}")
        inner[leaf] = value
    else:
        tree[leaf] = value


def _get(recipe: Recipe, name: str) -> Any:
    value: Any = recipe
    for part in name.split("."):
        value = getattr(value, part)
    assert not isinstance(value, Section)
    return value
