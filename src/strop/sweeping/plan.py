"""Predict memory and time of the trials of a sweep before it starts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from strop.config.load import Resolved
from strop.errors import InputError, MemoryLimitError
from strop.machine.memory import parse_memory
from strop.planning.machines import find_target
from strop.planning.memory import format_sizes
from strop.planning.microbatch import Rows, measure_rows
from strop.planning.multi_device import Devices, target_share
from strop.planning.plan import Plan, make_plan, read_model_facts, start_adapter
from strop.sweeping.space import Setting, apply_setting, format_setting


class Planner:
    """Plan the runs of settings. Rows and facts of a model are read once."""

    def __init__(self, resolved: Resolved, memory: int | str | None) -> None:
        self._resolved, self._memory = resolved, memory
        self._rows: dict[str, Rows] = {}
        self._models: dict[str, Any] = {}
        self._targets: dict[str, Any] = {}

    def plan(self, setting: Setting) -> Plan:
        resolved = apply_setting(self._resolved, setting)
        recipe = resolved.recipe
        data_key = f"{recipe.data} {recipe.model.name} {recipe.model.revision} {recipe.train.objective}"
        if data_key not in self._rows:
            self._rows[data_key] = measure_rows(recipe)
        model_key = f"{recipe.model} {recipe.train.objective}"
        if model_key not in self._models:
            self._models[model_key] = read_model_facts(recipe), start_adapter(recipe)
        device = recipe.model.device
        if device not in self._targets:
            target = find_target(device, parse_memory(self._memory), None)
            self._targets[device] = target_share(target, Devices(1, 1), local=self._memory is None)
        model, adapter = self._models[model_key]
        rows = self._rows[data_key]
        return make_plan(resolved, model, self._targets[device], rows=rows, adapter=adapter, thorough=False)

    def cost(self, setting: Setting) -> tuple[float, ...]:
        """Return trainable parameters, predicted seconds and predicted peak bytes of a run, rounded for comparisons."""
        plan = self.plan(setting)
        numbers = (plan.workload.adapter_weights, plan.seconds or 0.0, plan.phases["train"].peak_bytes)
        return tuple(float(f"{number:.3g}") for number in numbers)


@dataclass(frozen=True)
class SweepPlan:
    """Predicted memory and training time of a sweep.

    seconds: of all trials and the final check, without evaluation; None if the number of rows is unknown.
    """

    trials: int
    final_runs: int
    peak_bytes: int  # of the setting that needs most
    largest: Setting
    usable_bytes: int
    seconds: float | None
    settings: int  # number of settings that were planned
    too_large: str = ""  # the first setting that does not fit, and what it needs

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "fits": not self.too_large}


def plan_sweep(planner: Planner, settings: Sequence[Setting], trials: int, seeds: int) -> SweepPlan:
    """Plan all given settings, which are those of a grid or the corners of the search space.

    Raises InputError for a setting that a run would refuse.
    """
    plans = []
    for setting in settings:
        plan = planner.plan(setting)
        if plan.refused:
            raise InputError(f"{format_setting(setting)}: {plan.refused}", fix="leave it out of --over")
        plans.append((setting, plan))
    peaks = [max(plan.phases[name].peak_bytes for name in ("load", "train", "evaluate")) for _, plan in plans]
    largest = peaks.index(max(peaks))
    too_large = next((setting for setting, plan in plans if not plan.fits or "evaluate" in plan.phases_too_large), None)
    times = [plan.seconds for _, plan in plans]
    known = [seconds for seconds in times if seconds is not None]
    final_runs = 2 * seeds
    total = statistics.fmean(known) * (trials + final_runs) if len(known) == len(times) else None
    what = ""
    if too_large is not None:
        plan = next(plan for setting, plan in plans if setting == too_large)
        needed = max(plan.needed_bytes, plan.phases["evaluate"].needed_bytes)
        required, usable = format_sizes(needed, plan.usable_bytes)
        what = f"{format_setting(too_large)} needs {required}, and {usable} are usable"
    return SweepPlan(
        trials, final_runs, peaks[largest], plans[largest][0], plans[0][1].usable_bytes, total, len(plans), what
    )


def check_fits(plan: SweepPlan) -> None:
    """Raise MemoryLimitError if a setting does not fit."""
    if plan.too_large:
        fix = "leave it out of --over, or see `strop plan` for changes that make it fit"
        raise MemoryLimitError(f"a trial does not fit in memory: {plan.too_large}", fix=fix)
