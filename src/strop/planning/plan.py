"""Implement `strop plan`: memory and time of a run, and changes that make it fit.

Imports torch only for models of unknown families.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from strop.config.load import Resolved, resolve
from strop.config.schema import SAMPLE_TOKENS, Recipe
from strop.data.batching import BatchStream
from strop.display.numbers import format_duration
from strop.display.tables import Printed
from strop.errors import ModelError
from strop.machine.doctor import is_installed
from strop.machine.probe import this_cpu
from strop.machine.rates import generation_dtype
from strop.models.adapter_config import (
    adapter_folder,
    expand_adapter_config,
    read_adapter_config,
    read_base_name,
    read_identity,
)
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
from strop.planning.choose import choose, choose_labels, usable_bytes
from strop.planning.fit import MemoryBudget, Suggestion, list_suggestions
from strop.planning.keep import ANSWERS, choose_keep
from strop.planning.machines import TargetMachine
from strop.planning.memory import (
    PARTS,
    PROCESS_BYTES,
    STATE_BYTES,
    EvaluationLoad,
    Phase,
    RolloutLoad,
    constant_bytes,
    format_sizes,
    host_bytes,
    predict_phases,
    weight_bytes,
)
from strop.planning.microbatch import Rows, first_steps, largest_micro_batch, mean_micro_batch, with_kept_rows
from strop.planning.multi_device import Devices, MultiDevicePlan, plan_devices
from strop.planning.time import (
    FORWARD,
    Rate,
    image_seconds,
    rollout_seconds,
    step_seconds,
    steps_seconds,
    stream_rate,
    tokens_per_s,
)
from strop.planning.workload import Workload, why_recipe_not_fast

TOKENIZER_BYTES = 130  # per token: 72 of SmolLM2's tokenizer.json, 127 of Gemma 3's
REPORT_BYTES = 1 << 20  # report, log, recipe and model card
MAX_TOKENS = 1 << 20
SINGLE_DEVICE = Devices()
_COMMANDS = {"evaluate": "strop eval", "serve": "strop serve", "merge": "strop merge", "export": "strop export"}
_ALTERNATIVES = {
    "evaluate": "use shorter rows, or a machine with more memory",
    "serve": "use a machine with more memory",
    "merge": "use a machine with more memory, or --no-parity, which skips the comparison",
    "export": "use a machine with more memory, or --no-parity, which skips the comparison",
}
_PART_NAMES = {"quantization_constants": "constants", "saved_activations": "activations"}


@dataclass(frozen=True, repr=False)
class Plan(Printed):
    """The plan of a run, which `print` and a notebook show as a table.

    `as_json` gives the fields of `strop plan --json`.
    """

    fits: bool  # whether training fits in memory, with loading and sampling
    needed_bytes: int  # memory that training needs
    refused: str | None  # why `strop train` would reject this model, or None
    device: str
    memory_bytes: int
    usable_bytes: int  # memory that the run may use
    host_bytes: int  # host memory that a run on a GPU needs for layers of the base and their inputs
    host_free_bytes: int | None  # free memory of the GPU's host; None: unknown, or not a GPU
    phases: dict[str, Phase]
    resolved: Resolved
    workload: Workload
    engine: str  # the training step, fast or plain, and the reason
    tokens_per_s: float
    steps: int | None  # steps of the run; None if its number of rows is unknown
    seconds: float | None  # predicted time of these steps
    rate: Rate
    data: dict[str, Any]  # numbers of rows and images, tokens of the longest row, and why rows are invalid or unknown
    largest: dict[str, int]  # the largest max_length and micro_batch_tokens that fit
    disk_bytes: int
    suggestions: list[Suggestion]  # changes to the recipe that would make it fit; empty if it fits
    compromises: list[str]  # compromises in speed or quality that make the plan fit
    multi_device: MultiDevicePlan  # communication between devices

    @property
    def phases_too_large(self) -> list[str]:
        """Phases after training that do not fit. Merging and exporting use host memory, not a GPU's."""
        later = ("evaluate", "serve", *(() if self.device == "cuda" else ("merge", "export")))
        return [x for x in later if x in self.phases and self.phases[x].needed_bytes > self.usable_bytes]

    @property
    def verdict(self) -> str:
        """What fits, in one sentence: training, and the commands after it."""
        needed = [self.needed_bytes, *(self.phases[name].needed_bytes for name in self.phases_too_large)]
        *sizes, usable = format_sizes(*needed, self.usable_bytes)
        if self.host_free_bytes is not None and self.host_bytes > self.host_free_bytes:
            host, free = format_sizes(self.host_bytes, self.host_free_bytes)
            return f"training does not fit: {host} of host memory needed, {free} free"
        if not self.fits:
            return f"training does not fit: {sizes[0]} needed, {usable} usable"
        if len(sizes) == 1:
            return "it fits"
        commands = zip(self.phases_too_large, sizes[1:], strict=True)
        later = ", ".join(f"{_COMMANDS[name]} needs {size}" for name, size in commands)
        return f"training fits ({sizes[0]} of {usable} usable), but not every command after it: {later}"

    def _print(self, out: Console) -> None:
        print_plan(self, out)

    def __repr__(self) -> str:
        (peak,) = format_sizes(self.phases["train"].peak_bytes)
        facts = f"device={self.device!r}, peak={peak!r}, seconds={self.seconds}"
        return f"Plan(fits={self.fits}, verdict={self.verdict!r}, {facts})"

    def as_json(self) -> dict[str, Any]:
        choices = [asdict(choice) for choice in self.resolved.choices.values() if choice.origin != "default"]
        base = self.workload.base
        return {
            "fits": self.fits, "beyond": self.phases_too_large, "verdict": self.verdict, "refused": self.refused,
            "device": self.device, "needed_bytes": self.needed_bytes,
            "memory_bytes": self.memory_bytes, "usable_bytes": self.usable_bytes, "host_bytes": self.host_bytes,
            "phases": {name: phase.as_json() for name, phase in self.phases.items()},
            "choices": choices, "engine": self.engine, "tokens_per_s": self.tokens_per_s, "steps": self.steps,
            "seconds": self.seconds,
            "rate": {"flops": self.rate.flops, "bandwidth": self.rate.bandwidth, "source": self.rate.source},
            "data": self.data, "largest": self.largest, "disk_bytes": self.disk_bytes,
            "ladder": [suggestion.as_json() for suggestion in self.suggestions], "gives_up": self.compromises,
            "devices": self.multi_device.as_json(), "trainable_parameters": self.workload.adapter_weights,
            "parameters": base.parameters, "active_parameters": base.parameters - base.shape.idle_expert_weights,
        }  # fmt: skip


def make_plan(
    resolved: Resolved,
    model: ModelInfo,
    target: TargetMachine,
    *,
    rows: Rows,
    adapter: Mapping[str, Any] | None,
    devices: Devices = SINGLE_DEVICE,
    thorough: bool = True,
) -> Plan:
    """Plan a run. thorough: also plan train.teacher, `largest` and `suggestions`, which takes most of the time."""
    machine, shape = target.machine, model.shape
    plan_again = partial(make_plan, resolved, model, rows=rows, adapter=adapter, thorough=False)
    if rows.images is not None and resolved.recipe.lora.vision == "all":
        shape = replace(shape, image_patches=rows.images.patches)
    resolved = choose(resolved, machine, shape, target.device, target.dtype, adapter, model.parameters, devices.count)
    resolved = choose_labels(resolved, rows.labels)
    if rows:
        resolved = choose_keep(resolved, len(rows), sum(tokens for tokens, _ in rows), rows.why_not_kept)
    recipe = resolved.recipe
    workload = Workload.from_recipe(
        recipe, shape, parameters=model.parameters, threads=machine.cores, devices=devices.count
    )
    lengths = [tokens for tokens, _ in rows]
    longest, too_long = max(lengths, default=None), shape.too_long_message(lengths)
    facts: dict[str, Any] = {
        "unknown": rows.unknown or None,
        "refused": str(rows.refused) if rows.refused else None,
        "beyond": too_long,
    }
    if workload.family.mixer is not None:  # FastLoss does not share prefixes in such models
        rows = copy(rows)
        rows.prefixes = ()
    budget = MemoryBudget(shape, model.parameters, usable_bytes(machine, recipe.model.device), devices.count)
    prompt = max((tokens - supervised for tokens, supervised in rows), default=None)
    evaluation = EvaluationLoad.from_rows(rows, recipe.data.max_length)
    own_rows, rows = rows, with_kept_rows(rows, recipe)
    batch = largest_micro_batch(recipe, workload, rows)
    mean_batch, rate = mean_micro_batch(recipe, rows), target.rate_of(recipe.model.dtype)
    rollouts = RolloutLoad.from_recipe(recipe, prompt)
    dtype = generation_dtype(recipe.model.dtype, target.device, target.dtype[0])
    run_phases = predict_phases(workload, batch, evaluation, budget.usable, rollouts, dtype=dtype)
    if thorough and (teacher := _plan_teacher(recipe, target, rows)) is not None:
        run_phases = {"teacher": teacher, **run_phases}
    before = "teacher", "load", "draw", "train"
    needed = max(run_phases[name].needed_bytes for name in before if name in run_phases)
    if rollouts is not None and "teacher" in run_phases:  # both models are in memory
        needed = run_phases["teacher"].needed_bytes + max(run_phases[name].needed_bytes for name in ("draw", "train"))
    host = host_bytes(workload, batch)
    fits = needed <= budget.usable and (target.host_bytes is None or host <= target.host_bytes)
    has_limit = recipe.model.device == "cpu" and devices.count == 1 and "teacher" not in run_phases
    fits_in = (lambda memory: plan_again(target.with_limit(memory)).fits) if has_limit else None
    multi_device = plan_devices(recipe, workload, rate, devices, rows)
    speed, steps = tokens_per_s(workload, mean_batch, rate), []
    if rows and data_kind_of(recipe.train) == "turns":
        steps = first_steps(recipe, rows, packed=workload.compute.step == "fast")
        tokens = sum(batch.tokens + batch.shared for step in steps for batch in step)
        speed = tokens / steps_seconds(workload, steps, rate)
    stream = _make_stream(recipe, rows)
    seconds = _run_seconds(recipe, workload, mean_batch, rate, rows, multi_device, steps, stream) if stream else None
    if (images := rows.images) is not None:
        facts |= {"images": images.images, "image_seconds": None}
        if images.flops is not None:
            passes = images.passes(recipe, _count_rows(recipe, rows))
            facts["image_seconds"] = image_seconds(images.flops * passes, rate)
            seconds = None if seconds is None else seconds + facts["image_seconds"]
    if recipe.train.keep_share and seconds is not None:
        facts["answer_seconds"] = rollout_seconds(workload, ANSWERS, rate)
        seconds += facts["answer_seconds"]
    if stream and rows.held_out:
        facts["evaluations"] = stream.count_evaluations(recipe.train.eval_steps)
        once = _evaluation_seconds(recipe, workload, mean_batch, rate, rows.held_out)
        facts["evaluation_seconds"] = facts["evaluations"] * once
    why = why_recipe_not_fast(recipe, shape)
    return Plan(
        fits=fits,
        needed_bytes=needed,
        refused=model.refused,
        device=recipe.model.device,
        memory_bytes=machine.memory_bytes if recipe.model.device in ("cpu", "mps") else round(budget.usable / 0.95),
        usable_bytes=budget.usable,
        host_bytes=host,
        host_free_bytes=target.host_bytes,
        phases=run_phases,
        resolved=resolved,
        workload=workload,
        engine=f"plain: {why}" if why else f"fast: {workload.family.model_parts}".rstrip(": "),
        tokens_per_s=multi_device.link_times[0].tokens_per_s if multi_device.link_times else speed,
        steps=stream.total_steps if stream else None,
        seconds=seconds,
        rate=rate,
        data={
            "rows": _count_rows(recipe, own_rows) or None,
            "held_out": own_rows.num_held_out,
            "longest": longest,
            **facts,
        },
        largest=_find_largest(recipe, budget, shape.positions or MAX_TOKENS) if thorough else {},
        disk_bytes=_disk_bytes(recipe, workload),
        suggestions=[] if fits or not thorough else list_suggestions(recipe, replace(budget, rows=rows), rate, fits_in),
        compromises=_list_compromises(resolved, workload, stream_rate(workload, mean_batch, rate)),
        multi_device=multi_device,
    )


def _count_rows(recipe: Recipe, sizes: Rows) -> int:
    return sizes.rows or len(sizes) // sequences_per_row(recipe.train)


def _make_stream(recipe: Recipe, sizes: Rows) -> BatchStream | None:
    """Return the batches of the run, or None if their number is unknown."""
    train, rows = recipe.train, _count_rows(recipe, sizes)
    if not rows and train.max_steps is None:
        return None
    return BatchStream(
        rows or train.batch_size, batch_size=train.batch_size, seed=0, epochs=train.epochs, max_steps=train.max_steps
    )


def _run_seconds(
    recipe: Recipe,
    workload: Workload,
    mean_batch: MicroBatch,
    rate: Rate,
    sizes: Rows,
    multi_device: MultiDevicePlan,
    steps: Sequence[Sequence[MicroBatch]],
    stream: BatchStream,
) -> float:
    """Return the seconds of the run with the slowest link between devices."""
    train, sequences = recipe.train, len(sizes) / sizes.rows if sizes.rows else sequences_per_row(recipe.train)
    if multi_device.link_times:
        return stream.total_steps * (multi_device.compute_s + multi_device.link_times[0].seconds)
    if steps:
        return stream.total_steps * steps_seconds(workload, steps, rate) / len(steps)
    rows_per_step = sequences * stream.num_rows / stream.steps_per_epoch
    step = step_seconds(workload, mean_batch, rows_per_step / mean_batch.num_sequences, rate)
    mean_prompt = round(sum(tokens - supervised for tokens, supervised in sizes) / len(sizes)) if sizes else None
    if (rollouts := RolloutLoad.from_recipe(recipe, mean_prompt)) is not None:
        passes = (train.updates or 1) + (FORWARD if train.beta else 0)
        step = step * passes + rollout_seconds(workload, rollouts, rate)
    return stream.total_steps * step


def _evaluation_seconds(
    recipe: Recipe, workload: Workload, mean_batch: MicroBatch, rate: Rate, rows: Sequence[tuple[int, int]]
) -> float:
    """Return the seconds of one evaluation: a forward pass of the held-out rows, and the sample completions."""
    tokens, supervised = map(sum, zip(*rows, strict=True))
    seconds = FORWARD * tokens / tokens_per_s(workload, mean_batch, rate)
    if recipe.train.objective == "sft" and (samples := min(recipe.train.samples, len(rows))):
        prompt = max(1, (tokens - supervised) // len(rows))
        seconds += rollout_seconds(workload, RolloutLoad(samples, 1, prompt, SAMPLE_TOKENS), rate)
    return seconds


def _find_largest(recipe: Recipe, budget: MemoryBudget, positions: int) -> dict[str, int]:
    def fits(tokens: int, length: int) -> bool:
        update = {"micro_batch": None, "micro_batch_tokens": tokens, "batch_size": max(1, tokens // length)}
        train, data = recipe.train.model_copy(update=update), recipe.data.model_copy(update={"max_length": length})
        return budget.fits(recipe.model_copy(update={"train": train, "data": data}))

    length = recipe.data.max_length
    rows = bisect(range(1, MAX_TOKENS // length + 1), 0, key=lambda rows: not fits(rows * length, length))
    longest = bisect(range(1, min(positions, MAX_TOKENS) + 1), 0, key=lambda tokens: not fits(tokens, tokens))
    return {"max_length": longest, "micro_batch_tokens": length * rows}


def _disk_bytes(recipe: Recipe, workload: Workload) -> int:
    trained, name = workload.adapter_weights, recipe.model.name
    packed = workload.replace(resident_layers=0)
    is_quantized = workload.base.scheme != "none" and workload.shape.prequantized is None
    is_mapped = workload.base.streamed and workload.compute.device == "cpu"
    base = (weight_bytes(packed) + constant_bytes(packed)) * (is_quantized + is_mapped)
    base += 2 * workload.base.parameters if name.endswith(".gguf") or name.startswith(("demo", "gguf:")) else 0
    num_checkpoints = recipe.train.keep_checkpoints + 2  # the best one, and the one that is being written
    checkpoint = round((4 + STATE_BYTES[workload.compute.optimizer]) * trained)
    files = TOKENIZER_BYTES * workload.shape.vocabulary + REPORT_BYTES
    return num_checkpoints * checkpoint + 4 * trained + files + base


def _list_compromises(resolved: Resolved, workload: Workload, needed_rate: float) -> list[str]:
    layers, choices, base, compute = workload.shape.layers, resolved.choices, workload.base, workload.compute
    train, data = resolved.recipe.train, resolved.recipe.data
    packed, recomputed = layers - base.resident_layers, compute.checkpointed_layers
    inputs = ", with their inputs in host memory" if compute.offload else ""
    shrunk = "would not fit" in choices["train.micro_batch_tokens"].why
    sentences = (
        (
            "model.placement",
            base.streamed,
            f"the base is read from disk in each pass, at {needed_rate / 1e6:,.0f} MB/s"
            if compute.device == "cpu"
            else f"the base is copied to the GPU in each pass, at {needed_rate / 1e9:,.1f} GB/s",
        ),
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
    """Return the model's sizes, from its config and the headers of its weight files."""
    # If torch is installed, these are read from a model without weights: unknown families, lora.modules_to_save, and
    # lora.vision.
    facts = _check_weight_files(read_model_info(recipe.model.name, recipe.model.revision))
    needs_model = recipe.lora.modules_to_save or recipe.lora.vision != "none"
    if (facts.shape.known and not needs_model) or not is_installed("torch"):
        return facts
    from strop.models.introspect import refine_with_model

    objective = objective_of(recipe.train)
    is_causal = objective is None or not objective.scored
    return refine_with_model(facts, lora=recipe.lora, is_causal=is_causal)


def _check_weight_files(facts: ModelInfo) -> ModelInfo:
    """Set `refused` if the weight files have fewer weights or more layers than the config describes."""
    folder, shape = Path(facts.name).expanduser(), facts.shape
    is_checkable = facts.config is not None and shape.known and not quantization_method(facts.config)
    if not is_checkable or not any(folder.glob("*.safetensors")):
        return facts
    names = (name for _, header in read_headers(folder) for name in header)
    layers = {int(match[1]) for name in names if (match := re.search(r"\blayers\.(\d+)\.", name))}
    if facts.parameters >= shape.parameters and max(layers, default=0) < shape.layers:
        return facts
    files = f"its files have {facts.parameters:,} weights in {len(layers)} layers"
    config = f"its config describes {shape.parameters:,} in {shape.layers} layers"
    return replace(facts, refused=f"{facts.name}: {files}, and {config}")


def start_adapter(recipe: Recipe) -> dict[str, Any] | None:
    """Return the expanded config of the adapter that training starts from, or None."""
    if recipe.model.adapter is None:
        return None
    path = Path(recipe.model.adapter).expanduser()
    folder = next((x for x in (path, path / "adapter") if (x / "adapter_config.json").is_file()), None)
    if folder is None:
        raise ModelError(f"--model.adapter {path}: no adapter in this folder", fix="give a run or adapter folder")
    return expand_adapter_config(folder, read_adapter_config(folder))


def _plan_teacher(recipe: Recipe, target: TargetMachine, rows: Rows) -> Phase | None:
    """Return the memory that train.teacher needs before training, or None for a server."""
    name = recipe.train.teacher
    if name is None or urlsplit(name).scheme in ("http", "https"):
        return None
    folder = adapter_folder(name)
    identity = {} if folder is None else read_identity(folder)
    options = {
        "model.name": name if folder is None else read_base_name(folder),
        "model.quantization": identity.get("quantization") or "none", "model.dtype": identity.get("dtype") or "auto",
        "model.device": recipe.model.device, "data.train": recipe.data.train, "data.max_length": recipe.data.max_length,
    }  # fmt: skip
    resolved = resolve(None, options)
    adapter = None if folder is None else expand_adapter_config(folder, read_adapter_config(folder))
    facts = read_model_facts(resolved.recipe)
    return make_plan(resolved, facts, target, rows=rows, adapter=adapter, thorough=False).phases["evaluate"]


def list_layers(model: str) -> tuple[list[LinearKind], list[dict[str, Any]]]:
    """Return a model's kinds of layers, and their entries in `strop modules --json`."""
    shape = read_model_info(model).shape
    if shape.known:
        kinds = [*shape.linear_kinds(), embedding_kind("embed_tokens", shape.vocabulary, shape.hidden)]
    else:
        kinds = _introspect_layers(model)
    linears = [kind for kind in kinds if kind.type != "Embedding"]
    presets = {}
    for preset in ("auto", "low-memory", "balanced", "max-quality"):
        lora = resolve(None, {"model": model, "data": "-", "preset": preset}).recipe.lora
        with suppress(ModelError):  # the model has none of the preset's layers
            presets[preset] = target_names(linears, lora.target_modules)
    rows = []
    for kind in kinds:
        values = asdict(kind)
        values["kept_16_bit"] = values.pop("why_16_bit")
        rows.append({**values, "presets": [preset for preset, names in presets.items() if kind.name in names]})
    return kinds, rows


def _introspect_layers(model: str) -> list[LinearKind]:
    """Return the layers of a model built without weights. Without torch, they are read from its weight files."""
    source = locate(model)
    if not is_installed("torch"):
        if source.kind != "folder":
            raise ModelError(f"{model}: listing the layers of this family needs torch", fix="pip install torch")
        return linear_kinds_from_headers(source.path)
    from strop.models.introspect import embedding_kinds, linear_kinds
    from strop.models.load import load_without_weights

    bare = load_without_weights(source)
    return [*linear_kinds(bare), *embedding_kinds(bare)]


def print_plan(plan: Plan, out: Console) -> None:
    for label, text in _describe_model(plan):
        out.print(f"[bold]{label:<8}[/] {text}")
    for choice in plan.resolved.choices.values():
        if choice.origin == "plan":
            out.print(f"[bold]chosen[/]   {choice.field} = {escape(str(choice.value))}  [dim]{escape(choice.why)}[/]")
    out.print(_make_phase_table(plan))
    if plan.multi_device.link_times:
        print_devices(plan.multi_device, out)
    for text in plan.compromises:
        out.print(f"[yellow]given up[/] {escape(text)}")
    about = "about " if plan.resolved.recipe.train.keep_share else ""
    steps = f"; {about}{plan.steps:,} {'step' if plan.steps == 1 else 'steps'}" if plan.steps else ""
    out.print(f"[bold]rows[/]     {_describe_rows(plan)}{steps}")
    for text in filter(None, (plan.data["refused"], plan.data["beyond"])):  # beyond: rows are too long
        out.print(f"[yellow]rows[/]     {escape(text)}", highlight=False)
    seconds = (
        f", {format_duration(plan.seconds)} of training{_describe_images(plan)}{_describe_answers(plan)}"
        f"{_describe_evaluations(plan)}"
        if plan.seconds
        else ""
    )
    seconds += ", without the teacher's time" if seconds and plan.resolved.recipe.train.teacher else ""
    speed = f"{plan.tokens_per_s:,.0f} tokens/s{seconds}, on an otherwise idle machine"
    out.print(f"[bold]time[/]     {speed}  [dim]from {plan.rate.source}[/]")
    if note := this_cpu().note_on(plan.device, plan.resolved.recipe.model.dtype):
        out.print(f"[yellow]note[/]     {note}")
    length, tokens = plan.largest["max_length"], plan.largest["micro_batch_tokens"]
    largest = f"rows of up to {length:,} tokens"
    if tokens:
        largest += f", or {tokens:,} tokens at once in rows of {plan.resolved.recipe.data.max_length:,}"
    out.print(f"[bold]largest[/]  {largest if length else 'not even one row'}")
    out.print(f"[bold]disk[/]     at most {plan.disk_bytes / 2**20:,.0f} MiB, in the run folder and the cache")
    if plan.refused or plan.data["refused"]:
        out.print(f"[red]strop train would refuse this[/]{f': {escape(plan.refused)}' if plan.refused else ''}")
        if plan.fits:
            return
    colour = "red" if not plan.fits else "yellow" if plan.phases_too_large else "green"
    out.print(f"[{colour}]{plan.verdict}[/]", highlight=False, soft_wrap=True)
    if plan.fits:
        for name in plan.phases_too_large:
            out.print(f"  {_COMMANDS[name]}: {_ALTERNATIVES[name]}", highlight=False)
        return
    if len(plan.suggestions) == 1 and not plan.suggestions[0].fits:
        out.print(f"no change to the settings makes it fit; what is needed: {plan.suggestions[0].what}")
        return
    out.print("the cheapest changes that would help:")
    for change in plan.suggestions:
        flags = " ".join(f"--{field} {value}" for field, value in change.options.items())
        fits = "[green]fits[/]" if change.fits else format_sizes(change.peak_bytes, plan.usable_bytes)[0]
        out.print(f"  {change.what}: {fits}, {change.time:.2f} times the time; gives up: {change.gives_up}")
    if plan.suggestions[-1].fits:
        out.print(f"  {flags}", markup=False)


def _describe_model(plan: Plan) -> Iterator[tuple[str, str]]:
    workload, parameters = plan.workload, plan.workload.base.parameters
    trainable, on_experts = workload.adapter_weights, workload.expert_adapter_weights
    idle = workload.shape.idle_expert_weights
    active = f" ({(parameters - idle) / 1e6:,.0f} M per token)" if idle else ""
    experts = f", {on_experts / trainable:.0%} of them on experts" if on_experts else ""
    trained = f"{trainable / 1e6:,.1f} M trainable ({trainable / parameters:.2%}{experts})"
    engine, _, why = plan.engine.partition(": ")
    step = f"{engine} step ({why})" if why else f"{engine} step"
    yield "model", f"{parameters / 1e6:,.0f} M parameters{active}, {trained}; {step}"
    _, _, name = plan.rate.source.partition("data sheet of ")
    device = f"{plan.device} ({name})" if name else plan.device
    memory, usable = format_sizes(plan.memory_bytes, plan.usable_bytes)
    host = f" besides {PROCESS_BYTES / 2**20:.0f} MiB for Python and its libraries" if plan.device == "cpu" else ""
    yield "machine", f"{device}, {memory}, {usable} usable{host}"
    if plan.host_bytes:
        yield "host", f"{format_sizes(plan.host_bytes)[0]} of its memory are needed too"


def _describe_rows(plan: Plan) -> str:
    data = plan.data
    if data["rows"]:
        held_out = f", and {data['held_out']:,} to evaluate on" if data["held_out"] else ""
        return f"{data['rows']:,}, the longest of {data['longest']:,} tokens{held_out}"
    return f"of {plan.resolved.recipe.data.max_length:,} tokens each: {escape(data['unknown'] or 'none are given')}"


def _describe_images(plan: Plan) -> str:
    if not (images := plan.data.get("images")):
        return ""
    seconds = plan.data["image_seconds"]
    if seconds is None:
        return f", without the image encoder on {images:,} images, which has unknown layers"
    return f", of which {format_duration(seconds)} for the image encoder on {images:,} images"


def _describe_evaluations(plan: Plan) -> str:
    if not (number := plan.data.get("evaluations")):
        return ""
    return f", plus {format_duration(plan.data['evaluation_seconds'])} for {number} evaluation{'s' * (number > 1)}"


def _describe_answers(plan: Plan) -> str:
    seconds = plan.data.get("answer_seconds") or 0.0
    return f", of which {format_duration(seconds)} once to answer general prompts" if seconds >= 1 else ""


def print_devices(multi_device: MultiDevicePlan, out: Console) -> None:
    """Print a step's communication on each link. The predicted time of the run is for the first link."""
    devices = multi_device.devices
    out.print(
        f"[bold]devices[/]  {devices.count} ({devices.nodes} x {devices.per_node}), base {multi_device.mode}, "
        f"memory above is per device; per step: {multi_device.compute_s:.3g} s of computation, "
        f"{multi_device.sent_bytes / 2**20:,.1f} MiB sent by each"
    )
    table = Table()
    for head in ("link", "communication", "share of step", "tokens/s in all"):
        table.add_column(head, justify="left" if head == "link" else "right")
    for time in multi_device.link_times:
        share = time.seconds / (multi_device.compute_s + time.seconds)
        table.add_row(time.link.name, f"{1e3 * time.seconds:,.2f} ms", f"{share:.1%}", f"{time.tokens_per_s:,.0f}")
    out.print(table)
    for text in multi_device.notes:
        out.print(f"[bold]note[/]     {escape(text)}")


def _make_phase_table(plan: Plan) -> Table:
    used = {part: [phase.parts[part] for phase in plan.phases.values()] for part in PARTS}
    files = used.pop("mapped_files")
    table = Table(title="peak memory in MiB", title_justify="left")
    table.add_column("")
    for name in plan.phases:
        table.add_column(name, justify="right")
    for part, sizes in used.items():
        if any(sizes):
            table.add_row(_PART_NAMES.get(part, part.replace("_", " ")), *map(_format_mib, sizes))
    table.add_section()
    table.add_row("needed", *(_format_mib(phase.needed_bytes) for phase in plan.phases.values()), style="bold")
    if any(files):
        table.add_row("files", *map(_format_mib, files), style="dim")
        table.caption_justify = "left"
        table.caption = "files: a cache of weight files, not needed: the system frees it when memory is short"
    return table


def _format_mib(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size else ""
