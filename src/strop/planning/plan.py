"""`strop plan`: whether a recipe fits a machine, how long it takes, and what to change. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from strop.config.load import Resolved
from strop.config.schema import Recipe
from strop.data.batching import BatchStream
from strop.models.families.shape import ModelShape, Peek
from strop.objectives.table import data_kind_of, sequences_per_row
from strop.planning.activations import MicroBatch
from strop.planning.choose import choose, usable_bytes
from strop.planning.fit import MemoryBudget, Rung, list_rungs
from strop.planning.machines import Target
from strop.planning.memory import EvaluationLoad, Phase, RolloutLoad, constant_bytes, phases, weight_bytes
from strop.planning.microbatch import Rows, first_steps, largest_micro_batch, usual_micro_batch
from strop.planning.multi_device import Devices, MultiDevicePlan, plan_devices
from strop.planning.time import FORWARD, Rate, rollout_seconds, step_seconds, steps_seconds, tokens_per_s
from strop.planning.workload import Workload, why_plain

CHECKPOINT_BYTES = 12  # per trainable weight on disk: the weight and two moments
MAX_TOKENS = 1 << 20
SINGLE_DEVICE = Devices()


@dataclass(frozen=True)
class Plan:
    """The plan of a run; `as_json` gives the fields of `strop plan --json`.

    Args:
        fits: whether loading, sampling and training fit in memory.
        refused: why no run would train this model, or None.
        device: device of the run.
        memory_bytes: memory of the device.
        usable_bytes: memory that the run may use.
        phases: peak memory of each phase.
        resolved: the recipe, with every choice.
        workload: the run's workload.
        engine: fast or plain step, and why.
        tokens_per_s: predicted speed.
        seconds: predicted time of the run; None if its number of rows is unknown.
        rate: speed of the device.
        data: facts about the rows.
        largest: the longest row, and the most tokens at once, that fit.
        disk_bytes: disk space of the run.
        ladder: changes with which the plan fits; empty if it fits.
        gives_up: what the plan does without to fit.
        multi_device: communication of several devices.
    """

    fits: bool
    refused: str | None
    device: str
    memory_bytes: int
    usable_bytes: int
    phases: dict[str, Phase]
    resolved: Resolved
    workload: Workload
    engine: str
    tokens_per_s: float
    seconds: float | None
    rate: Rate
    data: dict[str, Any]
    largest: dict[str, int]
    disk_bytes: int
    ladder: list[Rung]
    gives_up: list[str]
    multi_device: MultiDevicePlan

    @property
    def beyond(self) -> list[str]:
        """Phases after training that do not fit. Merging and exporting do not use a GPU's memory."""
        later = ("evaluate", "serve", *(() if self.device == "cuda" else ("merge", "export")))
        return [name for name in later if self.phases[name].needed_bytes > self.usable_bytes]

    def as_json(self) -> dict[str, Any]:
        choices = [
            {"field": choice.field, "value": choice.value, "origin": choice.origin, "why": choice.why}
            for choice in self.resolved.choices.values()
            if choice.origin != "default"
        ]
        return {
            "fits": self.fits,
            "beyond": self.beyond,
            "refused": self.refused,
            "device": self.device,
            "memory_bytes": self.memory_bytes,
            "usable_bytes": self.usable_bytes,
            "phases": {name: phase.as_json() for name, phase in self.phases.items()},
            "choices": choices,
            "engine": self.engine,
            "tokens_per_s": self.tokens_per_s,
            "seconds": self.seconds,
            "rate": {"flops": self.rate.flops, "bandwidth": self.rate.bandwidth, "source": self.rate.source},
            "data": self.data,
            "largest": self.largest,
            "disk_bytes": self.disk_bytes,
            "ladder": [rung.as_json() for rung in self.ladder],
            "gives_up": self.gives_up,
            "devices": self.multi_device.as_json(),
            "trainable_parameters": self.workload.adapter_weights,
            "parameters": self.workload.base.parameters,
            "active_parameters": self.workload.base.parameters - self.workload.shape.idle,
        }


def make_plan(
    resolved: Resolved,
    model: Peek,
    target: Target,
    *,
    rows: Sequence[tuple[int, int]] = (),
    adapter: Mapping[str, Any] | None = None,
    devices: Devices = SINGLE_DEVICE,
    thorough: bool = True,
) -> Plan:
    """Plan a run.

    Args:
        resolved: the recipe, with the origin of each value.
        model: sizes of the model.
        target: the machine; with several devices, one device's part of it.
        rows: (tokens, supervised tokens) of each answer, if they are known.
        adapter: adapter_config.json of the adapter to start from.
        devices: number of devices and nodes.
        thorough: find the largest rows that fit, and the changes with which the plan fits. This takes longer than
            everything else.

    Raises:
        InputError: the recipe asks for something that the model does not have.
    """
    machine, shape = target.machine, model.shape
    resolved = choose(resolved, machine, shape, target.device, target.dtype, adapter, model.parameters, devices.count)
    recipe = resolved.recipe
    workload = Workload.from_recipe(
        recipe, shape, parameters=model.parameters, threads=machine.cores, devices=devices.count
    )
    data = _data_facts(rows, shape)
    if not workload.shares_prefix and isinstance(rows, Rows):
        rows = Rows(rows)  # drops the shared prefix
    budget = MemoryBudget(shape, model.parameters, usable_bytes(machine, recipe.model.device), devices.count)
    batch = largest_micro_batch(recipe, workload, max((tokens for tokens, _ in rows), default=None))
    usual, rate = usual_micro_batch(recipe, rows), target.rate_of(recipe.model.dtype)
    prompt = max((tokens - supervised for tokens, supervised in rows), default=None)
    evaluation = EvaluationLoad.of(rows, recipe.data.max_length)
    rollouts = RolloutLoad.of(recipe, prompt)
    run_phases = phases(workload, batch, evaluation, budget.usable, rollouts, dtype=target.dtype[0])
    needed = max(run_phases[name].needed_bytes for name in ("load", "draw", "train") if name in run_phases)
    fits = needed <= budget.usable
    host_memory = recipe.model.device in ("cpu", "mps")
    multi_device = plan_devices(recipe, workload, rate, devices, rows)
    steps = first_steps(recipe, rows, workload.compute.step == "fast") if _are_turns(rows, recipe) else []
    seconds = _run_seconds(recipe, workload, usual, rate, rows, multi_device, steps)
    speed = tokens_per_s(workload, usual, rate)
    if steps:
        tokens = sum(batch.tokens + batch.shared for step in steps for batch in step)
        speed = tokens / steps_seconds(workload, steps, rate)
    why = why_plain(recipe, shape)
    return Plan(
        fits=fits,
        refused=model.refused,
        device=recipe.model.device,
        memory_bytes=machine.memory_bytes if host_memory else round(budget.usable / 0.95),
        usable_bytes=budget.usable,
        phases=run_phases,
        resolved=resolved,
        workload=workload,
        engine=f"plain: {why}" if why else f"fast: {workload.family.by_model}".rstrip(": "),
        tokens_per_s=multi_device.link_times[0].tokens_per_s if multi_device.link_times else speed,
        seconds=seconds,
        rate=rate,
        data=data,
        largest=_largest(recipe, budget, shape.positions or MAX_TOKENS) if thorough else {},
        disk_bytes=_disk_bytes(recipe, workload),
        ladder=[] if fits or not thorough else list_rungs(recipe, budget, rate),
        gives_up=_given_up(resolved, workload),
        multi_device=multi_device,
    )


def _run_seconds(
    recipe: Recipe,
    workload: Workload,
    usual: MicroBatch,
    rate: Rate,
    sizes: Sequence[tuple[int, int]],
    multi_device: MultiDevicePlan,
    steps: Sequence[Sequence[MicroBatch]],
) -> float | None:
    """Return the seconds of the run's steps, or None if their number is unknown.

    Known rows: extrapolated from the first steps. Otherwise: full steps of typical micro-batches. Several devices: over
    the slowest link.
    """
    train, rows = recipe.train, len(sizes) // sequences_per_row(recipe.train)
    if not rows and train.max_steps is None:
        return None
    stream = BatchStream(
        rows or train.batch_size, batch_size=train.batch_size, seed=0, epochs=train.epochs, max_steps=train.max_steps
    )
    if multi_device.link_times:
        return stream.total_steps * (multi_device.compute_s + multi_device.link_times[0].seconds)
    if steps:
        return stream.total_steps * steps_seconds(workload, steps, rate) / len(steps)
    rows_per_step = sequences_per_row(train) * stream.num_rows / stream.steps_per_epoch
    step = step_seconds(workload, usual, rows_per_step / usual.number, rate)
    mean = round(sum(tokens - supervised for tokens, supervised in sizes) / len(sizes)) if sizes else None
    if (rollouts := RolloutLoad.of(recipe, mean)) is not None:
        passes = (train.updates or 1) + (FORWARD if train.beta else 0)
        step = step * passes + rollout_seconds(workload, rollouts, rate)
    return stream.total_steps * step


def _are_turns(rows: Sequence[tuple[int, int]], recipe: Recipe) -> TypeGuard[Rows]:
    """Return whether these are known rows of one answer each."""
    return isinstance(rows, Rows) and len(rows) > 0 and data_kind_of(recipe.train) == "turns"


def _data_facts(rows: Sequence[tuple[int, int]], shape: ModelShape) -> dict[str, Any]:
    """Return the number of rows, the longest one's tokens, and what is wrong with the rows or why they are unknown."""
    lengths = [tokens for tokens, _ in rows]
    sizes = rows if isinstance(rows, Rows) else Rows(rows)
    return {
        "rows": len(rows) or None,
        "longest": max(lengths, default=None),
        "unknown": sizes.unknown or None,
        "refused": sizes.refused or None,
        "beyond": shape.beyond(lengths),
    }


def _largest(recipe: Recipe, budget: MemoryBudget, positions: int) -> dict[str, int]:
    """Return the longest row that fits, and the most tokens at once of rows of the recipe's length.

    positions: the model's context length.
    """

    def fits(tokens: int, length: int) -> bool:
        update = {"micro_batch": None, "micro_batch_tokens": tokens, "batch_size": max(1, tokens // length)}
        changed = recipe.model_copy(
            update={
                "train": recipe.train.model_copy(update=update),
                "data": recipe.data.model_copy(update={"max_length": length}),
            }
        )
        return budget.fits(changed)

    length = recipe.data.max_length
    rows = _largest_fitting(lambda rows: fits(rows * length, length), MAX_TOKENS // length)
    return {
        "max_length": _largest_fitting(lambda tokens: fits(tokens, tokens), min(positions, MAX_TOKENS)),
        "micro_batch_tokens": length * rows,
    }


def _largest_fitting(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to the limit that fits, by bisection."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _disk_bytes(recipe: Recipe, workload: Workload) -> int:
    """Return bytes on disk: checkpoints (those kept, the best, one being written), the adapter, and copies of the base.

    The base is copied when it is quantized, and when a GGUF file is converted to 16 bit.
    """
    trained = workload.adapter_weights
    resident = workload.replace(resident_layers=0)
    quantized = workload.base.scheme != "none" and workload.shape.prequantized is None
    base = weight_bytes(resident) + constant_bytes(resident) if quantized else 0
    name = recipe.model.name
    base += 2 * workload.base.parameters if name.endswith(".gguf") or name.startswith(("demo", "gguf:")) else 0
    return (recipe.train.keep_checkpoints + 2) * CHECKPOINT_BYTES * trained + 4 * trained + base


def _given_up(resolved: Resolved, workload: Workload) -> list[str]:
    """Return what the plan does without to fit, among the options that it chose itself."""
    layers, choices, base, compute = workload.shape.layers, resolved.choices, workload.base, workload.compute
    recipe = resolved.recipe
    sentences = {
        "model.quantization": f"the base is stored in {base.scheme}" if base.scheme != "none" else "",
        "model.resident_layers": f"{layers - base.resident_layers} of {layers} layers are dequantized for each matmul"
        if workload.dequantizes
        else "",
        "train.gradient_checkpointing": f"{compute.checkpointed_layers} of {layers} layers are recomputed"
        + (", with their inputs in host memory" if compute.offload else "")
        if compute.checkpointed_layers
        else "",
        "train.optimizer": "the optimizer's moments are in 8 bit" if compute.optimizer == "adamw_8bit" else "",
        "data.max_length": f"rows of at most {recipe.data.max_length} tokens; longer ones are split",
        "train.micro_batch": f"{recipe.train.micro_batch} rows at once",
        "train.micro_batch_tokens": f"{recipe.train.micro_batch_tokens} tokens at once"
        if "would not fit" in choices["train.micro_batch_tokens"].why
        else "",
    }
    return [text for field, text in sentences.items() if text and choices[field].origin == "plan"]
