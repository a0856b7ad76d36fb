"""What to change where a plan does not fit, the cheapest first, until it does; and what each change costs in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from strop.config.schema import Recipe
from strop.planning.activations import offloaded_bytes
from strop.planning.fit import GIB, SHORTEST, Room, smaller_scheme
from strop.planning.microbatch import largest_micro_batch, usual_micro_batch
from strop.planning.time import Rate, tokens_per_s
from strop.planning.workload import Setting, why_not_offloaded


@dataclass(frozen=True)
class Rung:
    """One change more. options: all that were changed so far; time: a token's, as a multiple of the plan's own."""

    what: str
    gives_up: str
    options: dict[str, Any]
    peak_bytes: int
    fits: bool
    time: float

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what, "gives_up": self.gives_up, "options": self.options, "peak_bytes": self.peak_bytes,
            "fits": self.fits, "time": round(self.time, 3),
        }  # fmt: skip


def ladder(recipe: Recipe, room: Room, rate: Rate) -> list[Rung]:
    """Rungs up to the first that fits; the last one, where none does, is a smaller model."""
    rungs: list[Rung] = []
    options: dict[str, Any] = {}
    first, now = _speed(recipe, room, rate), recipe
    for change in (_checkpoint, _offload, _stream, _one_row, _small_moments, _shorter, _fewer_targets):
        for what, gives_up, changed in change(now, room):
            options |= changed
            now = _changed(now, changed)
            need = room.need(now)
            rungs.append(
                Rung(what, gives_up, dict(options), need, need <= room.usable, first / _speed(now, room, rate))
            )
            if rungs[-1].fits:
                return rungs
    fewer = int(room.parameters * room.usable / max(1, room.need(now)))
    what = f"a model of at most about {fewer / 1e9:.1f} B parameters"
    return [
        *rungs,
        Rung(what, "what a larger model can do", dict(options), room.need(now), False, fewer / room.parameters),
    ]


def _speed(recipe: Recipe, room: Room, rate: Rate) -> float:
    return tokens_per_s(Setting.of(recipe, room.shape, room.parameters), usual_micro_batch(recipe), rate)


Change = Callable[[Recipe, Room], Iterator[tuple[str, str, dict[str, Any]]]]


def _checkpoint(recipe: Recipe, room: Room) -> Iterator[tuple[str, str, dict[str, Any]]]:
    layers = room.shape.layers
    if Setting.of(recipe, room.shape).checkpoint_layers < layers:
        least = room.least_layers(recipe) or layers
        value: Any = "on" if least == layers else least
        yield (
            f"compute {least} of {layers} layers again in the backward",
            "time",
            {"train.gradient_checkpointing": value},
        )


def _offload(recipe: Recipe, room: Room) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if recipe.train.gradient_checkpointing != "offload" and why_not_offloaded(recipe, room.shape) is None:
        changed = {"train.gradient_checkpointing": "offload"}
        setting = Setting.of(recipe, room.shape).but(checkpoint_layers=room.shape.layers, offload=True)
        size = offloaded_bytes(setting, largest_micro_batch(recipe, setting)) / GIB
        yield f"the inputs of layers wait in the host's memory: {size:.1f} GiB", "memory of the host", changed


def _stream(recipe: Recipe, room: Room) -> Iterator[tuple[str, str, dict[str, Any]]]:
    now, fixed = recipe.model.quantization, room.shape.prequantized
    schemes: list[str] = [now] if now not in ("none", "auto") and (recipe.model.resident_layers or 0) > 0 else []
    smaller, how = (
        smaller_scheme(recipe),
        "multiplied as it is" if recipe.train.int8_matmul else "dequantized for each product",
    )
    schemes += [smaller] if now in {"none", "auto", "int8"} - {smaller} and fixed is None else []
    for scheme in schemes:
        changed = {"model.quantization": scheme, "model.resident_layers": 0}
        yield f"hold the base in {scheme}, {how}", "a little accuracy, and time", changed


def _one_row(recipe: Recipe, room: Room) -> Iterator[tuple[str, str, dict[str, Any]]]:
    train, length = recipe.train, recipe.data.max_length
    rows = train.micro_batch or max(1, min(train.batch_size, (train.micro_batch_tokens or length) // length))
    while rows > 1:
        rows //= 2
        more = -(-train.batch_size // rows)
        field = "train.micro_batch" if train.micro_batch is not None else "train.micro_batch_tokens"
        changed = {field: rows if train.micro_batch is not None else rows * length}
        yield f"{rows} row{'s' * (rows > 1)} at once, {more} to a step", "time, where a row is short", changed


def _small_moments(recipe: Recipe, room: Room) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if recipe.train.optimizer == "adamw":
        yield "the optimizer's moments in 8 bit", "a little accuracy", {"train.optimizer": "adamw_8bit"}


def _shorter(recipe: Recipe, room: Room) -> Iterator[tuple[str, str, dict[str, Any]]]:
    length = recipe.data.max_length
    while length > SHORTEST:
        length = max(SHORTEST, length // 2)
        changed: dict[str, Any] = {"data.max_length": length}
        if recipe.data.overlong == "refuse":
            changed["data.overlong"] = "split"
        if recipe.train.micro_batch is None:
            changed["train.micro_batch_tokens"] = length
        yield f"rows of at most {length} tokens", "longer rows are split or left out", changed


def _fewer_targets(recipe: Recipe, room: Room) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if recipe.lora.target_modules != "attention":
        yield "adapters on attention alone", "some of what the adapter can learn", {"lora.target_modules": "attention"}
    rank = recipe.lora.r
    if rank > 8:
        changed = {"lora.r": 8, "lora.alpha": 16.0}
        yield "rank 8", "some of what the adapter can learn", changed


def _changed(recipe: Recipe, options: dict[str, Any]) -> Recipe:
    tree = recipe.model_dump()
    for field, value in options.items():
        section, _, name = field.partition(".")
        tree[section][name] = value
    return Recipe.model_validate(tree)
