"""What a sweep does: its recipe, search space and options, checked before anything starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from strop import api
from strop.config.load import Resolved, resolve
from strop.errors import RecipeError, suggest
from strop.evaluation.diagnosis import changes_measure
from strop.evaluation.metrics import find_metric
from strop.models.adapter_config import WEIGHTS_FILE, adapter_folder
from strop.models.source import fingerprint, locate
from strop.objectives.table import data_kind_of
from strop.runs.lock import sha256_file, sha256_text
from strop.sweeping.space import (
    Dimension,
    Setting,
    apply_setting,
    check_settings,
    corners,
    given_values,
    grid,
    make_space,
)
from strop.sweeping.split import hash_sources
from strop.sweeping.study import SAMPLERS

DEFAULT_TRIALS = 12


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep does, in addition to its recipe and search space."""

    metric: str = "exact"
    trials: int | None = None  # number of trials, with the default
    sampler: str = "auto"
    selection: str | None = None  # share or file of the selection rows
    test: str | None = None
    seeds: int = 3  # of the final check
    prune: bool = False
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Request:
    """A recipe, the search space, and the options of a sweep."""

    resolved: Resolved
    space: list[Dimension]
    options: SweepOptions

    @cached_property
    def default(self) -> Setting:
        """The default values of the fields that are swept."""
        choices = self.resolved.choices
        return {dimension.field: choices[dimension.field].value for dimension in self.space}

    @cached_property
    def points(self) -> list[Setting]:
        """The settings of a grid, without the default."""
        default = self.resolved.recipe.model_dump(exclude={"out"})
        settings = (setting for setting in grid(self.space))
        return [x for x in settings if apply_setting(self.resolved, x).recipe.model_dump(exclude={"out"}) != default]

    @cached_property
    def sampler(self) -> str:
        options, has_ranges = self.options, any(dimension.is_range for dimension in self.space)
        limit = options.trials or DEFAULT_TRIALS
        if options.sampler == "auto":
            size = math.inf if has_ranges else math.prod(len(dimension.choices) for dimension in self.space)
            return "grid" if size <= 10 * limit and len(self.points) + 1 <= limit else "tpe"
        if options.sampler == "grid" and has_ranges:
            ranges = ", ".join(dimension.field for dimension in self.space if dimension.is_range)
            raise RecipeError(f"--sampler grid: {ranges} is a range", fix="list its values, or use --sampler tpe")
        if options.sampler == "grid" and options.trials and options.trials < len(self.points) + 1:
            what = f"--trials {options.trials}: the grid with the default has {len(self.points) + 1} settings"
            raise RecipeError(what, fix="give more trials, fewer values, or --sampler tpe")
        return options.sampler

    @property
    def trials(self) -> int:
        return len(self.points) + 1 if self.sampler == "grid" else self.options.trials or DEFAULT_TRIALS

    def as_json(self) -> dict[str, Any]:
        """Return what must not change when a sweep is resumed."""
        values = {name: value for name, value in given_values(self.resolved).items() if name != "out"}
        over = {dimension.field: dimension.as_json() for dimension in self.space}
        options = asdict(self.options) | {"sampler": self.sampler, "trials": self.trials}
        return {"recipe": values, "over": over, **options, "data": self.data_hash, "models": self.model_hash}

    @cached_property
    def model_hash(self) -> str:
        """A hash of the base models and of the adapter that trials start from."""
        model = self.resolved.recipe.model
        swept = [name for dimension in self.space if dimension.field == "model.name" for name in dimension.choices]
        sources = [fingerprint(locate(name, model.revision)) for name in dict.fromkeys([model.name, *swept])]
        adapter = adapter_folder(model.adapter) if model.adapter else None
        return sha256_text(json.dumps([*sources, None if adapter is None else sha256_file(adapter / WEIGHTS_FILE)]))

    @cached_property
    def data_hash(self) -> str:
        """A hash of the data files, and of the file of a user-defined metric."""
        recipe, options = self.resolved.recipe, self.options
        key = hash_sources(recipe.data, options.selection, options.test)
        return f"{key} {sha256_file(Path(options.metric.rpartition(':')[0]))}" if ".py:" in options.metric else key


def make_request(
    path: Path | None, over: Mapping[str, Any] | None, values: Mapping[str, Any], options: SweepOptions
) -> Request:
    """Check a recipe, the values of --over and the options of a sweep. Raises InputError."""
    resolved = resolve(path, values)
    if options.sampler not in SAMPLERS:
        raise RecipeError(
            f"--sampler {options.sampler}: unknown{suggest(options.sampler, SAMPLERS)}", fix=", ".join(SAMPLERS)
        )
    if (options.trials or 2) < 2:
        raise RecipeError(f"--trials {options.trials}: the first one is the default", fix="give at least 2")
    if options.seeds < 1:
        raise RecipeError(f"--seeds {options.seeds}", fix="give at least 1; 3 tell a setting from luck")
    recipe = resolved.recipe
    if options.metric not in ("preference", "accuracy", "accuracy_at_1"):
        find_metric(options.metric)
    request = Request(resolved, make_space(over or {}, resolved), options)
    for objective in request.space:
        if objective.field == "train.objective":
            kinds = {data_kind_of(recipe.train.model_copy(update={"objective": name})) for name in objective.ends}
            if len(kinds) > 1:
                raise RecipeError(
                    "--over train.objective: they train on different rows", fix="compare those of one kind"
                )
    if options.prune:
        _check_losses(request.space)
    check_settings(corners(request.space), resolved)
    request.trials  # noqa: B018 (checks the sampler)
    api.check_inputs(models=[recipe.model.name], revision=recipe.model.revision, data=[recipe.data.train])
    return request


def _check_losses(space: Sequence[Dimension]) -> None:
    """Raise RecipeError if trials of the space have evaluation losses that cannot be compared."""
    for dimension in space:
        if changes_measure(dimension.field) or dimension.field == "model.name":
            what = f"--prune: trials are pruned by their evaluation loss, which {dimension.field} changes"
            raise RecipeError(what, fix="leave --prune out: scores can be compared")
