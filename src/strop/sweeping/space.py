"""The values that a sweep tries: parse `--over`, check every value, and list settings."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import yaml

from strop.config.load import Resolved, explain_name, parse_option
from strop.config.names import full_name
from strop.config.schema import option_fields
from strop.errors import InputError, RecipeError, StropError

Setting = dict[str, Any]  # recipe field -> value

LOG_RATIO = 10  # a range of positive numbers is sampled on a log scale if its ends differ at least by this factor
DIGITS = 3  # significant digits of a sampled number
MAX_CORNERS = 64  # settings that are planned before a sweep over ranges starts
FIXED_FIELDS = {  # fields that cannot be swept, and why
    "out": "every trial has its own folder in that of the sweep",
    "data.train": "trials are compared on rows of the same data; compare runs on other data with `strop eval`",
    "data.eval": "all trials are compared on the same selection rows; give them with --selection",
    "track": "it does not change the results",
}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*")


@dataclass(frozen=True)
class Dimension:
    """The values of one recipe field: either `choices`, or all numbers from `low` to `high`."""

    field: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False  # sample the logarithm uniformly
    integer: bool = False

    @property
    def is_range(self) -> bool:
        return not self.choices

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values to plan: all choices, or both ends of a range."""
        return (self.low, self.high) if self.is_range else self.choices

    def contains(self, value: Any) -> bool:
        if not self.is_range:
            return value in self.choices
        is_number = isinstance(value, int if self.integer else int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high

    def describe(self) -> str:
        if self.is_range:
            return f"{format_value(self.low)} to {format_value(self.high)}{' (log)' if self.log else ''}"
        return ", ".join(map(format_value, self.choices))

    def as_json(self) -> dict[str, Any]:
        if not self.is_range:
            return {"choices": list(self.choices)}
        return {"low": self.low, "high": self.high, "log": self.log, "integer": self.integer}


def read_over(texts: Sequence[str]) -> dict[str, Any]:
    """Return the fields and values of `--over FIELD=SPEC` options: a list of choices, or a tuple of two numbers."""
    over: dict[str, Any] = {}
    for text in texts:
        name, separator, spec = text.partition("=")
        if not separator or not spec.strip():
            fix = "write --over lora.r=8,16,32 or --over train.learning_rate=1e-4..1e-3"
            raise RecipeError(f"--over {text}: not a field and its values", fix=fix)
        field = find_field(name.strip())
        if field in over:
            raise RecipeError(f"--over {field}: given twice", fix="give all its values in one --over")
        over[field] = _parse_spec(field, spec.strip())
    return over


def _parse_spec(field: str, spec: str) -> Any:
    if match := _RANGE.fullmatch(spec):
        return float(match[1]), float(match[2])
    if spec.startswith("["):
        try:
            values = json.loads(spec)
        except ValueError as error:
            raise RecipeError(f"--over {field}={spec}: not a JSON list: {error}", fix="write it as [8, 16]") from None
        return values
    return [parse_option(field, part.strip()) for part in spec.split(",") if part.strip()]


def find_field(name: str) -> str:
    """Return the dotted name of a recipe field from its full, short or last name. Raises RecipeError."""
    fields = [field for field, _ in option_fields()]
    field = full_name(name)
    if field not in fields:
        last_names = [known for known in fields if known.rpartition(".")[2] == name.replace("-", "_")]
        if len(last_names) != 1:
            what = f"--over {name}: no such recipe field{explain_name(name)}"
            raise RecipeError(what, fix="see `strop train --help-all` for all fields")
        field = last_names[0]
    if field in FIXED_FIELDS:
        raise RecipeError(f"--over {field}: cannot be swept: {FIXED_FIELDS[field]}", fix="leave it out")
    return field


def require_over(over: Mapping[str, Any]) -> None:
    if not over:
        raise RecipeError("--over is required", fix="give the values to compare: --over lora.r=8,16,32")


def make_space(over: Mapping[str, Any], resolved: Resolved) -> list[Dimension]:
    """Check all values with the recipe's schema, and return the dimensions of the search space.

    Args:
        over: a list of choices, or a tuple of the two ends of a range, by field.
        resolved: the recipe in which each value is checked.

    Raises:
        RecipeError: If a field is unknown, a value is invalid, or there is nothing to compare.
    """
    require_over(over)
    if not isinstance(over, Mapping):
        what = f"--over: a dictionary of fields and their values, not {type(over).__name__}"
        raise RecipeError(what, fix="give the values to compare: --over lora.r=8,16,32")
    dimensions: list[Dimension] = []
    for name, values in over.items():
        field = find_field(name)
        if any(field == known.field for known in dimensions):
            raise RecipeError(f"--over {field}: given twice", fix="give all its values in one --over")
        dimensions.append(_make_dimension(field, values, resolved))
    return dimensions


def _make_dimension(field: str, values: Any, resolved: Resolved) -> Dimension:
    if isinstance(values, tuple):
        return _make_range(field, values, resolved)
    if not isinstance(values, list):
        what = f"--over {field}: {values!r} is neither a list of choices nor a range of two numbers"
        raise RecipeError(what, fix="give a list such as [8, 16, 32], or a range as a tuple such as (1e-4, 1e-3)")
    choices = [check_value(resolved, field, value) for value in values]
    if len(choices) < 2:
        option = f"--{field} {format_value(choices[0])}" if choices else f"--{field}"
        raise RecipeError(f"--over {field}: fewer than two values", fix=f"give more, or set one value with {option}")
    if repeated := [value for i, value in enumerate(choices) if value in choices[:i]]:
        raise RecipeError(f"--over {field}: {format_value(repeated[0])} is given twice", fix="give each value once")
    return Dimension(field, tuple(choices))


def _make_range(field: str, values: tuple[Any, ...], resolved: Resolved) -> Dimension:
    what = f"--over {field}: {'..'.join(map(format_value, values))}"
    is_pair = len(values) == 2 and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
    if not is_pair:
        raise RecipeError(f"{what}: not a range of two numbers", fix="give a tuple such as (1e-4, 1e-3)")
    if values[0] >= values[1]:
        raise RecipeError(f"{what}: the first number is not below the second", fix="write the smaller number first")
    ends = []
    for value in values:
        whole = int(value) if float(value).is_integer() else value
        ends.append(check_value(resolved, field, whole))
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise RecipeError(f"{what}: the field is not a number", fix="give a list of values with commas")
    low, high = ends
    integer = isinstance(low, int) and isinstance(high, int)
    return Dimension(field, (), low, high, low > 0 and high / low >= LOG_RATIO, integer)


def check_value(resolved: Resolved, field: str, value: Any) -> Any:
    """Return a value as the recipe's schema reads it. Raises RecipeError that names the option --over."""
    try:
        return attrgetter(field)(apply_setting(resolved, {field: value}).recipe)
    except InputError as error:
        problems = [place.what.removeprefix(f"{field}: ") for place in error.where] or [error.what]
        fix = error.fix or f"see `strop train --help-all` for the values of {field}"
        raise RecipeError(f"--over {field}={format_value(value)}: {'; '.join(problems)}", fix=fix) from None


def apply_setting(resolved: Resolved, setting: Setting) -> Resolved:
    """Return the recipe with the values of a setting. Raises RecipeError for values that do not fit together."""
    from strop.config.load import resolve

    return resolve(None, given_values(resolved) | setting)


def given_values(resolved: Resolved) -> dict[str, Any]:
    """Return the values that the user gave, by dotted name; the plan may still choose all others."""
    return {
        field: choice.value
        for field, choice in resolved.choices.items()
        if choice.origin in ("recipe", "option") and not (field == "preset" and choice.value == "auto")
    }


def grid(space: Sequence[Dimension]) -> Iterator[Setting]:
    """Yield every combination of the choices, the last field varying fastest."""
    for values in itertools.product(*(dimension.ends for dimension in space)):
        yield {dimension.field: value for dimension, value in zip(space, values, strict=True)}


def corners(space: Sequence[Dimension]) -> list[Setting]:
    """Return settings that show whether all fit: every combination of choices and ends, or a part if there are many."""
    if math.prod(len(dimension.ends) for dimension in space) <= MAX_CORNERS:
        return list(grid(space))
    chosen: list[Setting] = [{dimension.field: dimension.ends[end] for dimension in space} for end in (0, -1)]
    chosen += [{dimension.field: value} for dimension in space for value in dimension.ends]
    return chosen[:MAX_CORNERS]


def check_settings(settings: Sequence[Setting], resolved: Resolved) -> None:
    """Raise RecipeError for a combination of values that the recipe refuses."""
    for setting in settings:
        try:
            apply_setting(resolved, setting)
        except StropError as error:
            error.what = f"--over {format_setting(setting)}: {error.what}"
            raise


def round_number(value: float) -> float:
    """Round a sampled number to DIGITS significant digits, so that settings can be read and typed."""
    return float(f"{value:.{DIGITS}g}")


def format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def format_setting(setting: Mapping[str, Any]) -> str:
    """Return a setting as text, such as "lora.r 16, learning_rate 0.0003"."""
    short = {field: field.removeprefix("train.").removeprefix("model.") for field in setting}
    return ", ".join(f"{short[field]} {format_value(value)}" for field, value in setting.items()) or "the default"


def without_seed(setting: Mapping[str, Any]) -> Setting:
    return {name: value for name, value in setting.items() if name != "seed"}


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return recipe values by dotted name as a recipe file."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
