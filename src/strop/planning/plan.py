"""`strop plan`: whether a recipe fits a machine, how long it takes, and what to change. No torch, no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from strop.config.load import Resolved
from strop.config.schema import Recipe
from strop.data.batching import BatchStream
from strop.machine.probe import Machine
from strop.models.families.shape import ModelInfo, ModelShape
from strop.objectives.table import data_kind_of, sequences_per_row
from strop.planning.activations import MicroBatch
from strop.planning.choose import choose, usable_bytes
from strop.planning.devices import Devices, Spread, spread
from strop.planning.ladder import Rung, ladder
from strop.planning.largest import Room
from strop.planning.memory import Drawn, Phase, constant_bytes, weight_bytes
from strop.planning.microbatch import Rows, first_steps, largest_micro_batch, usual_micro_batch
from strop.planning.phases import Asked, phases
from strop.planning.time import FORWARD, Rate, drawing_seconds, step_seconds, steps_seconds, tokens_per_s
from strop.planning.workload import Setting, why_plain

CHECKPOINT_BYTES = 12  # a trainable weight on disk: itself and two moments
LONGEST = 1 << 20
ONE = Devices()


@dataclass(frozen=True)
class Plan:
    """What was found; the fields of `strop plan --json`. seconds: of the whole run, None where its rows are unknown.
    refused: why no run would train this model."""

    fits: bool
    refused: str | None
    device: str
    memory_bytes: int
    usable_bytes: int
    phases: dict[str, Phase]
    resolved: Resolved
    setting: Setting
    engine: str
    tokens_per_s: float
    seconds: float | None
    rate: Rate
    data: dict[str, Any]
    largest: dict[str, int]
    disk_bytes: int
    ladder: list[Rung]
    gives_up: list[str]
    spread: Spread

    @property
    def beyond(self) -> list[str]:
        """What would not fit after a run that fits. On a card, merging and exporting are not its memory's concern."""
        later = ("evaluate", "serve", *(() if self.device == "cuda" else ("merge", "export")))
        return [name for name in later if self.phases[name].needed_bytes > self.usable_bytes]

    def as_json(self) -> dict[str, Any]:
        chosen = [
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
            "choices": chosen,
            "engine": self.engine,
            "tokens_per_s": self.tokens_per_s,
            "seconds": self.seconds,
            "rate": {"flops": self.rate.flops, "bandwidth": self.rate.bandwidth, "source": self.rate.source},
            "data": self.data,
            "largest": self.largest,
            "disk_bytes": self.disk_bytes,
            "ladder": [rung.as_json() for rung in self.ladder],
            "gives_up": self.gives_up,
            "devices": self.spread.as_json(),
            "trainable_parameters": self.setting.adapter_weights,
            "parameters": self.setting.parameters,
            "active_parameters": self.setting.parameters - self.setting.shape.idle_expert_weights,
        }


def make_plan(
    resolved: Resolved,
    machine: Machine,
    model: ModelInfo,
    rate_of: Callable[[str], Rate],
    *,
    device: str,
    dtype: tuple[str, str],
    rows: Sequence[tuple[int, int]] = (),
    adapter: Mapping[str, Any] | None = None,
    devices: Devices = ONE,
    thorough: bool = True,
) -> Plan:
    """rate_of: the machine's in a type. device and dtype: where the recipe leaves them open. rows: tokens and
    supervised tokens of each answer, where they are known. adapter: adapter_config.json of the adapter to start from.
    devices: machine and rate_of are of one of them. thorough: look for what would just fit, and for what helps where it
    does not: longer than all the rest.

    Raises InputError where the recipe asks for what the model does not have.
    """
    resolved = choose(resolved, machine, model.shape, device, dtype, adapter, model.parameters, devices.count)
    recipe = resolved.recipe
    setting = Setting.of(recipe, model.shape, model.parameters, machine.cores, devices.count)
    told = _told(rows, model.shape)
    rows = rows if setting.shares or not isinstance(rows, Rows) else Rows(rows)  # without what they begin with
    room = Room(model.shape, model.parameters, usable_bytes(machine, recipe.model.device), devices.count)
    batch = largest_micro_batch(recipe, setting, max((tokens for tokens, _ in rows), default=None))
    usual, rate = usual_micro_batch(recipe, rows), rate_of(recipe.model.dtype)
    prompt = max((tokens - supervised for tokens, supervised in rows), default=None)
    asked = Asked.of(rows, recipe.data.max_length)
    found = phases(setting, batch, asked, room.usable, Drawn.of(recipe, prompt), dtype=dtype[0])
    need = max(found[name].needed_bytes for name in ("load", "draw", "train") if name in found)
    fits = need <= room.usable
    on_cpu = recipe.model.device in ("cpu", "mps")
    several = spread(recipe, setting, rate, devices, rows)
    steps = first_steps(recipe, rows, setting.step == "fast") if _are_turns(rows, recipe) else []
    seconds = _seconds(recipe, setting, usual, rate, rows, several, steps)
    speed = tokens_per_s(setting, usual, rate)
    if steps:
        tokens = sum(batch.tokens + batch.shared for step in steps for batch in step)
        speed = tokens / steps_seconds(setting, steps, rate)
    return Plan(
        fits=fits,
        refused=model.refused,
        device=recipe.model.device,
        memory_bytes=machine.memory_bytes if on_cpu else round(room.usable / 0.95),
        usable_bytes=room.usable,
        phases=found,
        resolved=resolved,
        setting=setting,
        engine=f"plain: {why}" if (why := why_plain(recipe, model.shape)) else f"fast: {setting.by_model}".rstrip(": "),
        tokens_per_s=several.over[0].tokens_per_s if several.over else speed,
        seconds=seconds,
        rate=rate,
        data=told,
        largest=_largest(recipe, room, model.shape.positions or LONGEST) if thorough else {},
        disk_bytes=_disk_bytes(recipe, setting),
        ladder=[] if fits or not thorough else ladder(recipe, room, rate),
        gives_up=_given_up(resolved, setting),
        spread=several,
    )


def _seconds(
    recipe: Recipe,
    setting: Setting,
    usual: MicroBatch,
    rate: Rate,
    sizes: Sequence[tuple[int, int]],
    several: Spread,
    steps: Sequence[Sequence[MicroBatch]],
) -> float | None:
    """Of the run's steps: by the first of them where the rows are known, by full steps where only their number is. Of
    several devices: over the slowest link."""
    train, rows = recipe.train, len(sizes) // sequences_per_row(recipe.train)
    if not rows and train.max_steps is None:
        return None
    stream = BatchStream(
        rows or train.batch_size, batch_size=train.batch_size, seed=0, epochs=train.epochs, max_steps=train.max_steps
    )
    if several.over:
        return stream.total_steps * (several.compute_s + several.over[0].seconds)
    if steps:
        return stream.total_steps * steps_seconds(setting, steps, rate) / len(steps)
    a_step = sequences_per_row(train) * stream.num_rows / stream.steps_per_epoch
    step = step_seconds(setting, usual, a_step / usual.number, rate)
    mean = round(sum(tokens - supervised for tokens, supervised in sizes) / len(sizes)) if sizes else None
    if (drawn := Drawn.of(recipe, mean)) is not None:
        again = (train.updates or 1) + (FORWARD if train.beta else 0)
        step = step * again + drawing_seconds(setting, drawn, rate)
    return stream.total_steps * step


def _are_turns(rows: Sequence[tuple[int, int]], recipe: Recipe) -> TypeGuard[Rows]:
    """Whether these are the recipe's rows, each an answer by itself."""
    return isinstance(rows, Rows) and len(rows) > 0 and data_kind_of(recipe.train) == "turns"


def _told(rows: Sequence[tuple[int, int]], shape: ModelShape) -> dict[str, Any]:
    """Of the rows that the plan is about: how many, the longest's tokens, and why a run would not start on them, or
    would go wrong. unknown: why there are none."""
    lengths = [tokens for tokens, _ in rows]
    about = rows if isinstance(rows, Rows) else Rows(rows)
    return {
        "rows": len(rows) or None,
        "longest": max(lengths, default=None),
        "unknown": about.unknown or None,
        "refused": about.refused or None,
        "beyond": shape.count_too_long(lengths),
    }


def _largest(recipe: Recipe, room: Room, positions: int) -> dict[str, int]:
    """The longest row, of those that the model was made for, and the most tokens at once of rows as long as the
    recipe's, that fit as it is."""

    def fits(tokens: int, length: int) -> bool:
        update = {"micro_batch": None, "micro_batch_tokens": tokens, "batch_size": max(1, tokens // length)}
        changed = recipe.model_copy(
            update={
                "train": recipe.train.model_copy(update=update),
                "data": recipe.data.model_copy(update={"max_length": length}),
            }
        )
        return room.fits(changed)

    length = recipe.data.max_length
    return {
        "max_length": _most(lambda tokens: fits(tokens, tokens), min(positions, LONGEST)),
        "micro_batch_tokens": length * _most(lambda rows: fits(rows * length, length), LONGEST // length),
    }


def _most(fits: Any, limit: int = LONGEST) -> int:
    """The largest number up to the limit that fits; what fits, fits with less."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _disk_bytes(recipe: Recipe, setting: Setting) -> int:
    """Checkpoints that are kept, the best and one being written; the adapter; a quantized copy of the base, and the
    16-bit one that a GGUF file is made into."""
    trained = setting.adapter_weights
    base = setting.but(resident_layers=0)
    quantized = setting.scheme != "none" and setting.shape.prequantized is None
    packed = weight_bytes(base) + constant_bytes(base) if quantized else 0
    name = recipe.model.name
    packed += 2 * setting.parameters if name.endswith(".gguf") or name.startswith(("demo", "gguf:")) else 0
    return (recipe.train.keep_checkpoints + 2) * CHECKPOINT_BYTES * trained + 4 * trained + packed


def _given_up(resolved: Resolved, setting: Setting) -> list[str]:
    """What the plan does without, so that it fits; only what it chose itself."""
    layers, choices = setting.shape.layers, resolved.choices
    said = {
        "model.quantization": f"the base is held in {setting.scheme}" if setting.scheme != "none" else "",
        "model.resident_layers": f"{layers - setting.resident_layers} of {layers} layers are dequantized each time"
        if setting.streamed
        else "",
        "train.gradient_checkpointing": f"{setting.checkpoint_layers} of {layers} layers are computed twice"
        + (", their inputs wait in the host's memory" if setting.offload else "")
        if setting.checkpoint_layers
        else "",
        "train.optimizer": "the optimizer's moments are in 8 bit" if setting.optimizer == "adamw_8bit" else "",
        "data.max_length": f"rows of at most {resolved.recipe.data.max_length} tokens; longer ones are split",
        "train.micro_batch": f"{resolved.recipe.train.micro_batch} rows at once",
        "train.micro_batch_tokens": f"{resolved.recipe.train.micro_batch_tokens} tokens at once"
        if "would not fit" in choices["train.micro_batch_tokens"].why
        else "",
    }
    return [text for field, text in said.items() if text and choices[field].origin == "plan"]
