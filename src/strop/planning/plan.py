"""`strop plan`: model facts, fit, time and what to change. Imports no torch, except for models of unknown families."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from strop.config.load import Resolved, resolve
from strop.config.schema import Recipe
from strop.data.batching import BatchStream
from strop.errors import ModelError
from strop.machine.doctor import is_installed
from strop.models.adapter_config import expand_adapter_config, read_adapter_config
from strop.models.families.shape import (
    LinearKind,
    ModelInfo,
    embedding_kind,
    linear_kinds_from_headers,
    read_model_info,
    target_names,
)
from strop.models.source import locate, quantization_method, read_headers
from strop.objectives.table import data_kind_of, objective_of, sequences_per_row
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
    """The plan of a run; `as_json` gives the fields of `strop plan --json`."""

    fits: bool  # whether loading, sampling and training fit in memory
    refused: str | None  # why no run would train this model, or None
    device: str
    memory_bytes: int
    usable_bytes: int  # memory that the run may use
    phases: dict[str, Phase]
    resolved: Resolved
    workload: Workload
    engine: str  # fast or plain step, and why
    tokens_per_s: float
    seconds: float | None  # predicted time of the run; None if its number of rows is unknown
    rate: Rate
    data: dict[str, Any]  # number of rows, tokens of the longest, and what is wrong with them or why they are unknown
    largest: dict[str, int]  # the longest row, and the most tokens at once, that fit
    disk_bytes: int
    ladder: list[Rung]  # changes with which the plan fits; empty if it fits
    gives_up: list[str]  # what the plan does without to fit
    multi_device: MultiDevicePlan  # communication of several devices

    @property
    def beyond(self) -> list[str]:
        """Phases after training that do not fit. Merging and exporting do not use a GPU's memory."""
        later = ("evaluate", "serve", *(() if self.device == "cuda" else ("merge", "export")))
        return [name for name in later if self.phases[name].needed_bytes > self.usable_bytes]

    def as_json(self) -> dict[str, Any]:
        choices = [asdict(choice) for choice in self.resolved.choices.values() if choice.origin != "default"]
        base = self.workload.base
        return {
            "fits": self.fits, "beyond": self.beyond, "refused": self.refused, "device": self.device,
            "memory_bytes": self.memory_bytes, "usable_bytes": self.usable_bytes,
            "phases": {name: phase.as_json() for name, phase in self.phases.items()},
            "choices": choices, "engine": self.engine, "tokens_per_s": self.tokens_per_s, "seconds": self.seconds,
            "rate": {"flops": self.rate.flops, "bandwidth": self.rate.bandwidth, "source": self.rate.source},
            "data": self.data, "largest": self.largest, "disk_bytes": self.disk_bytes,
            "ladder": [rung.as_json() for rung in self.ladder], "gives_up": self.gives_up,
            "devices": self.multi_device.as_json(), "trainable_parameters": self.workload.adapter_weights,
            "parameters": base.parameters, "active_parameters": base.parameters - base.shape.idle_expert_weights,
        }  # fmt: skip


def make_plan(
    resolved: Resolved,
    model: ModelInfo,
    target: Target,
    *,
    rows: Rows,
    adapter: Mapping[str, Any] | None,
    devices: Devices = SINGLE_DEVICE,
    thorough: bool = True,
) -> Plan:
    """Plan a run. thorough: also find the largest rows that fit and changes that fit, which takes the longest."""
    machine, shape = target.machine, model.shape
    resolved = choose(resolved, machine, shape, target.device, target.dtype, adapter, model.parameters, devices.count)
    recipe = resolved.recipe
    workload = Workload.from_recipe(
        recipe, shape, parameters=model.parameters, threads=machine.cores, devices=devices.count
    )
    lengths = [tokens for tokens, _ in rows]
    longest, beyond = max(lengths, default=None), shape.count_too_long(lengths)
    unknown, refused = rows.unknown or None, rows.refused or None
    if workload.family.mixer is not None:  # the fast step then computes the prefix of each row
        rows = Rows(rows)  # without the shared prefix
    budget = MemoryBudget(shape, model.parameters, usable_bytes(machine, recipe.model.device), devices.count)
    batch = largest_micro_batch(recipe, workload, longest)
    usual, rate = usual_micro_batch(recipe, rows), target.rate_of(recipe.model.dtype)
    prompt = max((tokens - supervised for tokens, supervised in rows), default=None)
    evaluation = EvaluationLoad.of(rows, recipe.data.max_length)
    rollouts = RolloutLoad.of(recipe, prompt)
    run_phases = phases(workload, batch, evaluation, budget.usable, rollouts, dtype=target.dtype[0])
    needed = max(run_phases[name].needed_bytes for name in ("load", "draw", "train") if name in run_phases)
    fits = needed <= budget.usable
    multi_device = plan_devices(recipe, workload, rate, devices, rows)
    speed, steps = tokens_per_s(workload, usual, rate), []
    if rows and data_kind_of(recipe.train) == "turns":
        steps = first_steps(recipe, rows, packed=workload.compute.step == "fast")
        tokens = sum(batch.tokens + batch.shared for step in steps for batch in step)
        speed = tokens / steps_seconds(workload, steps, rate)
    why = why_plain(recipe, shape)
    return Plan(
        fits=fits,
        refused=model.refused,
        device=recipe.model.device,
        memory_bytes=machine.memory_bytes if recipe.model.device in ("cpu", "mps") else round(budget.usable / 0.95),
        usable_bytes=budget.usable,
        phases=run_phases,
        resolved=resolved,
        workload=workload,
        engine=f"plain: {why}" if why else f"fast: {workload.family.model_parts}".rstrip(": "),
        tokens_per_s=multi_device.link_times[0].tokens_per_s if multi_device.link_times else speed,
        seconds=_run_seconds(recipe, workload, usual, rate, rows, multi_device, steps),
        rate=rate,
        data={"rows": len(rows) or None, "longest": longest, "unknown": unknown, "refused": refused, "beyond": beyond},
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
    """Return the seconds of the run, over the slowest link, or None if the number of steps is unknown."""
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


def _largest(recipe: Recipe, budget: MemoryBudget, positions: int) -> dict[str, int]:
    """Return the longest row that fits in a context of `positions`, and the most tokens of rows of this length."""

    def fits(tokens: int, length: int) -> bool:
        update = {"micro_batch": None, "micro_batch_tokens": tokens, "batch_size": max(1, tokens // length)}
        train, data = recipe.train.model_copy(update=update), recipe.data.model_copy(update={"max_length": length})
        return budget.fits(recipe.model_copy(update={"train": train, "data": data}))

    length = recipe.data.max_length
    rows = _largest_fitting(lambda rows: fits(rows * length, length), MAX_TOKENS // length)
    longest = _largest_fitting(lambda tokens: fits(tokens, tokens), min(positions, MAX_TOKENS))
    return {"max_length": longest, "micro_batch_tokens": length * rows}


def _largest_fitting(fits: Callable[[int], bool], limit: int) -> int:
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _disk_bytes(recipe: Recipe, workload: Workload) -> int:
    """Return bytes on disk: checkpoints (kept, best, one being written), adapter, and quantized or converted base."""
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
    train, data = resolved.recipe.train, resolved.recipe.data
    packed, recomputed = layers - base.resident_layers, compute.checkpointed_layers
    inputs = ", with their inputs in host memory" if compute.offload else ""
    shrunk = "would not fit" in choices["train.micro_batch_tokens"].why
    sentences = (
        ("model.quantization", base.scheme != "none", f"the base is stored in {base.scheme}"),
        ("model.resident_layers", workload.dequantizes, f"{packed} of {layers} layers are dequantized for each matmul"),
        ("train.gradient_checkpointing", recomputed, f"{recomputed} of {layers} layers are recomputed{inputs}"),
        ("train.optimizer", compute.optimizer == "adamw_8bit", "the optimizer's moments are in 8 bit"),
        ("data.max_length", True, f"rows of at most {data.max_length} tokens; longer ones are split"),
        ("train.micro_batch", True, f"{train.micro_batch} rows at once"),
        ("train.micro_batch_tokens", shrunk, f"{train.micro_batch_tokens} tokens at once"),
    )
    return [text for field, applies, text in sentences if applies and choices[field].origin == "plan"]


def read_model_facts(recipe: Recipe) -> ModelInfo:
    """Return the model's sizes, by its config."""
    # An unknown family's, or with modules trained in full, come from the model built without weights, if torch is
    # there; else from its config and the headers of its weight files.
    facts = _check_weight_files(read_model_info(recipe.model.name, recipe.model.revision))
    whole_modules = recipe.lora.modules_to_save
    if (facts.shape.known and not whole_modules) or not is_installed("torch"):
        return facts
    from strop.models.introspect import refine_with_model

    objective = objective_of(recipe.train)
    return refine_with_model(facts, whole_modules=whole_modules, predicts=objective is None or not objective.scored)


def _check_weight_files(facts: ModelInfo) -> ModelInfo:
    """Set `refused` if the model's weight files have fewer weights than its config describes, or more layers."""
    folder, shape = Path(facts.name).expanduser(), facts.shape
    is_plain = facts.config is not None and shape.known and not quantization_method(facts.config)
    if not is_plain or not any(folder.glob("*.safetensors")):
        return facts
    names = (name for _, header in read_headers(folder) for name in header)
    layers = {int(match[1]) for name in names if (match := re.search(r"\blayers\.(\d+)\.", name))}
    if facts.parameters >= shape.parameters and max(layers, default=0) < shape.layers:
        return facts
    files = f"its files have {facts.parameters:,} weights in {len(layers)} layers"
    config = f"its config describes {shape.parameters:,} in {shape.layers} layers"
    return replace(facts, refused=f"{facts.name}: {files}, and {config}")


def start_adapter(recipe: Recipe) -> dict[str, Any] | None:
    """Return the config of the adapter that training starts from, as `expand_adapter_config` does, or None."""
    if recipe.model.adapter is None:
        return None
    path = Path(recipe.model.adapter).expanduser()
    folder = next((place for place in (path, path / "adapter") if (place / "adapter_config.json").is_file()), None)
    if folder is None:
        raise ModelError(f"--model.adapter {path}: no adapter in this folder", fix="give a run or adapter folder")
    return expand_adapter_config(folder, read_adapter_config(folder))


def list_layers(model: str) -> tuple[list[LinearKind], list[dict[str, Any]]]:
    """Return the kinds of layers of a model, and for each its fields in `strop modules --json`."""
    shape = read_model_info(model).shape
    if shape.known:
        kinds = [*shape.linear_kinds(), embedding_kind("embed_tokens", shape.vocabulary, shape.hidden)]
    else:
        kinds = _introspect_layers(model)
    linears = [kind for kind in kinds if kind.type != "Embedding"]
    presets = {}
    for preset in ("auto", "low-memory", "balanced", "max-quality"):
        lora = resolve(None, {"model": model, "data": "-", "preset": preset}).recipe.lora
        with suppress(ModelError):  # the model lacks such layers, and a run would refuse the preset
            presets[preset] = target_names(linears, lora.target_modules)
    rows = [
        {**asdict(kind), "presets": [preset for preset, names in presets.items() if kind.name in names]}
        for kind in kinds
    ]
    return kinds, rows


def _introspect_layers(model: str) -> list[LinearKind]:
    """Return the layers of a model built without weights; without torch, those in the headers of its weight files."""
    source = locate(model)
    if not is_installed("torch"):
        if source.kind != "folder":
            raise ModelError(f"{model}: listing the layers of this family needs torch", fix="pip install torch")
        return linear_kinds_from_headers(source.path)
    from strop.models.introspect import embedding_kinds, linear_kinds
    from strop.models.load import load_without_weights

    bare = load_without_weights(source)
    return [*linear_kinds(bare), *embedding_kinds(bare)]
