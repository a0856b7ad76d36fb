"""What memory decides of a recipe that leaves it open: quantization, tokens at once, layers computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from strop.config.load import Choice, Resolved
from strop.config.schema import Recipe
from strop.errors import RecipeError
from strop.models.families.shape import ModelShape
from strop.objectives.table import answers_of, drawn_tokens, learning_of
from strop.planning.memory import load, train
from strop.planning.microbatch import MICRO_BATCH_TOKENS, largest_micro_batch, usual_micro_batch
from strop.planning.time import Rate, tokens_per_s
from strop.planning.workload import Setting, why_not_offloaded

CARD_TOKENS = (16384, 8192, 4096)  # at once on a card, where they fit with nothing computed again
SHORTEST = 256  # tokens; a row below holds little of a conversation
GIB = 1 << 30


@dataclass(frozen=True)
class Room:
    """A model, the bytes that training it may take, and how fast a CPU computes in a type."""

    shape: ModelShape
    parameters: int
    usable: int
    devices: int = 1
    rate_of: Callable[[str], Rate] | None = None

    def need(self, recipe: Recipe, **changes: Any) -> int:
        """Bytes that training by this recipe takes, or by one that differs in parts of its Setting."""
        setting = Setting.of(recipe, self.shape, self.parameters, devices=self.devices).but(**changes)
        return max(train(setting, largest_micro_batch(recipe, setting)).needed_bytes, load(setting).needed_bytes)

    def fits(self, recipe: Recipe, **changes: Any) -> bool:
        return self.need(recipe, **changes) <= self.usable

    def least_layers(self, recipe: Recipe) -> int | None:
        """The fewest layers that must be computed again for it to fit; None where all of them are not enough."""
        layers = self.shape.layers
        return next((k for k in range(layers + 1) if self.fits(recipe, checkpoint_layers=k)), None)

    def said(self, need: int) -> str:
        return f"{need / GIB:.1f} GiB needed at most, {self.usable / GIB:.1f} GiB usable"


def fitted(resolved: Resolved, room: Room) -> Resolved:
    """With what is left open about memory decided."""
    for decide in (_narrower, _quantization, _smaller_micro_batch, _larger_micro_batch, _last_resorts):
        resolved = resolved.decide(decide(resolved, room))
    return _fastest(resolved, room)


def _finished(resolved: Resolved, room: Room) -> Resolved:
    """With so many tokens at once, as much kept as fits."""
    for decide in (_resident, _checkpointing):
        resolved = resolved.decide(decide(resolved, room))
    return resolved


def _fastest(resolved: Resolved, room: Room) -> Resolved:
    """On a CPU: fewer tokens at once where that leaves room to compute less again, or to hold more layers dequantized,
    and is faster by the plan's time, of rows as long as they may be. Small pieces cost each layer its beginnings, a
    second forward all of its work."""
    found, field = _finished(resolved, room), "train.micro_batch_tokens"
    size, least = resolved.recipe.train.micro_batch_tokens, max(SHORTEST, resolved.recipe.data.max_length)
    if room.rate_of is None or size is None or resolved.choices[field].origin != "plan":
        return found
    rate, again = room.rate_of(found.recipe.model.dtype), Setting.of(found.recipe, room.shape).checkpoint_layers
    seconds = first = _seconds_a_token(found.recipe, room, rate)
    while size > least:
        size = max(least, size // 2)
        tried = _finished(resolved.decide([Choice(field, size, "plan", "")]), room)
        took = _seconds_a_token(tried.recipe, room, rate)
        if took < seconds and room.fits(tried.recipe):
            less = Setting.of(tried.recipe, room.shape).checkpoint_layers < again
            gain = "less is computed again" if less else "more is dequantized once"
            why = f"faster here than more at once ({took / first:.2f} of the time): {gain}"
            found, seconds = tried.decide([Choice(field, size, "plan", why)]), took
    return found


def _seconds_a_token(recipe: Recipe, room: Room, rate: Rate) -> float:
    return 1 / tokens_per_s(Setting.of(recipe, room.shape, room.parameters), usual_micro_batch(recipe), rate)


def placed(resolved: Resolved, room: Room) -> Resolved:
    """The same for several devices: the base whole on each of them where it fits, else a share on each."""
    field, asked, why_not = "model.placement", resolved.recipe.model.placement, _why_whole(resolved.recipe)
    if asked == "sharded" and why_not:
        raise RecipeError(f"--{field} sharded: not with {why_not}", fix="leave one of them out")
    if asked != "auto":
        return fitted(resolved, room)
    whole = fitted(resolved.decide([Choice(field, "replicated", "plan", "fits whole on each device")]), room)
    need = room.need(whole.recipe)
    if need <= room.usable:
        return whole
    if why_not:
        return whole.decide([Choice(field, "replicated", "plan", f"would not fit, and is not sharded with {why_not}")])
    why = f"would not fit whole on each device: {room.said(need)}"
    return fitted(resolved.decide([Choice(field, "sharded", "plan", why)]), room)


def _why_whole(recipe: Recipe) -> str | None:
    """What reads or trains weights of the base outside of a pass through the layers."""
    lora = recipe.lora
    reasons = {
        "lora.use_dora": lora.use_dora,
        "lora.init loftq": lora.init == "loftq",
        "lora.new_tokens": bool(lora.new_tokens),
        "lora.modules_to_save": bool(lora.modules_to_save),
        "train.int8_matmul": recipe.train.int8_matmul,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def fixed_tokens(recipe: Recipe) -> list[Choice]:
    if recipe.train.micro_batch is not None or recipe.train.micro_batch_tokens is not None:
        return []
    tokens = max(MICRO_BATCH_TOKENS, recipe.data.max_length)
    return [Choice("train.micro_batch_tokens", tokens, "plan", "large enough to keep the cores busy")]


def _narrower(resolved: Resolved, room: Room) -> list[Choice]:
    """bf16 where fp32, which is faster on this CPU, does not fit at its smallest: half the memory for the weights."""
    recipe, field = resolved.recipe, "model.dtype"
    if recipe.model.dtype != "fp32" or resolved.choices[field].origin != "plan" or recipe.model.device != "cpu":
        return []
    scheme = "nf4" if _is_open(resolved) else recipe.model.quantization
    need = room.need(_least(resolved), scheme=scheme, checkpoint_layers=room.shape.layers)
    if need <= room.usable:
        return []
    return [Choice(field, "bf16", "plan", f"fp32 is faster here, and would not fit: {room.said(need)}")]


def _quantization(resolved: Resolved, room: Room) -> list[Choice]:
    """16 bit where it fits, with layers computed again if need be; the default gives way only where it does not."""
    recipe, field = resolved.recipe, "model.quantization"
    if not _is_open(resolved):
        return []
    if room.shape.prequantized:
        return [Choice(field, room.shape.prequantized, "plan", "as the weights are on disk")]
    need = room.need(_least(resolved), scheme="none", checkpoint_layers=room.shape.layers)
    if need <= room.usable:
        fits = f"16-bit weights fit: {room.said(need)}"
        return [Choice(field, "none", "plan", fits)] if recipe.model.quantization == "auto" else []
    return [Choice(field, smaller_scheme(recipe), "plan", f"16-bit weights would not fit: {room.said(need)}")]


def smaller_scheme(recipe: Recipe) -> str:
    """How the base is stored where 16 bit would not fit."""
    return "int8" if recipe.train.int8_matmul else "nf4"


def _is_open(resolved: Resolved) -> bool:
    """Whether the plan decides about quantization."""
    recipe = resolved.recipe
    default = resolved.choices["model.quantization"].origin == "default"
    return recipe.model.quantization == "auto" or (recipe.preset == "auto" and default and recipe.model.adapter is None)


def _least(resolved: Resolved) -> Recipe:
    """With one row at a time, where nobody asked for more."""
    recipe = resolved.recipe
    if recipe.train.micro_batch is not None:
        return _with(recipe, micro_batch=1) if _is_reducible(resolved) else recipe
    return _with(recipe, micro_batch_tokens=recipe.data.max_length)


def _is_reducible(resolved: Resolved) -> bool:
    return resolved.choices["train.micro_batch"].origin == "preset"


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _smaller_micro_batch(resolved: Resolved, room: Room) -> list[Choice]:
    """Half as many tokens (or rows, where a preset says how many) at once until it fits with every layer computed
    again; a row is never cut."""
    recipe, layers = resolved.recipe, _layers_again(resolved.recipe, room)
    asked = recipe.train.micro_batch or recipe.train.micro_batch_tokens or 0
    name, least = ("micro_batch", 1) if recipe.train.micro_batch else ("micro_batch_tokens", recipe.data.max_length)
    if resolved.choices[f"train.{name}"].origin != "plan" and not _is_reducible(resolved):
        return []
    size = asked
    while size > least and not room.fits(recipe, checkpoint_layers=layers):
        size = max(least, size // 2)
        recipe = _with(recipe, **{name: size})
    if size == asked:
        return []
    why = f"more would not fit: {room.said(room.need(resolved.recipe))}"
    return [Choice(f"train.{name}", size, "plan", why)]


def _larger_micro_batch(resolved: Resolved, room: Room) -> list[Choice]:
    """On a card: as many tokens at once as keep it busy, but no more than a step has."""
    recipe, field = resolved.recipe, "train.micro_batch_tokens"
    now = recipe.train.micro_batch_tokens
    if not recipe.model.device.startswith("cuda") or now is None or resolved.choices[field].origin != "plan":
        return []
    a_step = recipe.train.batch_size * answers_of(recipe.train) * (recipe.data.max_length + drawn_tokens(recipe.train))
    for tokens in CARD_TOKENS:
        if now < tokens and tokens // 2 < a_step and room.fits(_with(recipe, micro_batch_tokens=tokens)):
            return [
                Choice(field, tokens, "plan", "as many as fit with nothing computed again: larger pieces are faster")
            ]
    return []


def _layers_again(recipe: Recipe, room: Room) -> int:
    """The most layers that the plan may have computed again."""
    asked = recipe.train.gradient_checkpointing
    return room.shape.layers if asked in ("auto", "on", "offload") else asked if isinstance(asked, int) else 0


def _last_resorts(resolved: Resolved, room: Room) -> list[Choice]:
    """Moments in 8 bit, then shorter rows, where nothing else makes it fit and nobody asked for these; all or none."""
    recipe, layers = resolved.recipe, _layers_again(resolved.recipe, room)
    need = room.need(recipe, checkpoint_layers=layers)
    if need <= room.usable:
        return []
    why, again = f"would not fit: {room.said(need)}", "train.gradient_checkpointing"
    may = recipe.train.gradient_checkpointing == "auto" and why_not_offloaded(recipe, room.shape) is None
    if may and room.fits(recipe, checkpoint_layers=layers, offload=True):
        return [Choice(again, "offload", "plan", f"{why} with the inputs of layers on the card")]
    made: dict[str, Any] = {}

    def is_open(field: str) -> bool:
        return resolved.choices[field].origin == "default"

    if is_open("train.optimizer"):
        made["train.optimizer"] = "adamw_8bit"
    length = recipe.data.max_length
    while True:
        tried = [Choice(field, value, "plan", why) for field, value in made.items()]
        if room.fits(resolved.decide(tried).recipe, checkpoint_layers=layers):
            return tried
        if length <= SHORTEST or not is_open("data.max_length") or recipe.train.micro_batch is not None:
            return []
        length = max(SHORTEST, length // 2)
        made["data.max_length"] = made["train.micro_batch_tokens"] = length
        if is_open("data.overlong"):
            shorter = {"turns": "split", "prompts": "drop"}
            made["data.overlong"] = shorter.get(learning_of(recipe.train), "truncate-start")


def _resident(resolved: Resolved, room: Room) -> list[Choice]:
    """Quantized layers that are dequantized once, as far as memory goes beside activations that are kept."""
    recipe = resolved.recipe
    if recipe.model.quantization == "none" or recipe.model.resident_layers is not None:
        return []
    if recipe.model.placement == "sharded" and room.devices > 1:
        return [Choice("model.resident_layers", 0, "plan", "fewer bytes to gather")]
    if recipe.train.int8_matmul:
        return [Choice("model.resident_layers", 0, "plan", "multiplied in 8 bit, as they are held")]
    layers = next((k for k in range(room.shape.layers, 0, -1) if room.fits(recipe, resident_layers=k)), 0)
    said = "dequantized once: faster, as large as 16 bit" if layers else "no room for 16-bit weights"
    return [Choice("model.resident_layers", layers, "plan", said)]


def _checkpointing(resolved: Resolved, room: Room) -> list[Choice]:
    """As few layers as it takes: each costs its forward once more, all of them about a third of the time."""
    recipe, field = resolved.recipe, "train.gradient_checkpointing"
    if recipe.train.gradient_checkpointing != "auto":
        return []
    layers, without = room.least_layers(recipe), room.need(recipe)
    if layers == 0:
        return [Choice(field, "off", "plan", f"fits: {room.said(without)}")]
    if layers is None:
        need = room.need(recipe, checkpoint_layers=room.shape.layers)
        return [Choice(field, "on", "plan", f"would not fit, and even so it is tight: {room.said(need)}")]
    plain = Setting.of(recipe, room.shape).step == "plain"  # transformers checkpoints all layers or none
    value: Any = "on" if plain or layers == room.shape.layers else layers
    return [Choice(field, value, "plan", f"would not fit: {room.said(without)} without")]


# ---- from strop.planning.ladder ----
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
