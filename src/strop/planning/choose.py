"""What the recipe leaves open, decided for this model and this machine; each decision with its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strop.config.load import Choice, Resolved
from strop.config.schema import Recipe
from strop.errors import ModelError, RecipeError
from strop.machine.memory import recall
from strop.machine.probe import Machine
from strop.model.shape import ModelShape
from strop.objectives.table import answers_of, drawn_tokens, learning_of, open_options
from strop.planning.memory import load, train
from strop.planning.microbatch import MICRO_BATCH_TOKENS, largest_micro_batch
from strop.planning.rates import open_rate
from strop.planning.setting import Setting, why_not_offloaded
from strop.runs.lock import sha256_text

CARD_TOKENS = (16384, 8192, 4096)  # at once on a card, where they fit with nothing computed again
MORE = 1.1  # times the bytes that were usable when a run ran out of memory: it may not do so again
SHORTEST = 256  # tokens; a row below holds little of a conversation
USABLE = {"cpu": 0.9, "mps": 0.75, "cuda": 0.95}  # of what is free: MemoryWatch stops a run on a CPU there
GIB = 1 << 30
HEADS = ("classifier", "score")  # of a reward model: peft names both, and the objective brings its own


def choose(
    resolved: Resolved,
    machine: Machine,
    shape: ModelShape,
    device: str,
    dtype: tuple[str, str],
    adapter: Mapping[str, Any] | None = None,
    parameters: int | None = None,
    devices: int = 1,
) -> Resolved:
    """Fills in every field that is still open. device: the one found; dtype: (name, why) of the precision probe.

    adapter: adapter_config.json of `model.adapter`, whose shape the recipe then takes. parameters: of the model, where
    its files say more than its config. devices: that train together; the machine is what one of them has.
    Raises ModelError where an option asks for another shape than the adapter to start from has, RecipeError for options
    that do not go together.
    """
    recipe = resolved.recipe
    if adapter is not None:
        resolved = resolved.decide(_of_adapter(resolved, adapter))
        recipe = resolved.recipe
    picks: list[Choice] = []

    def pick(field: str, value: Any, why: str) -> None:
        picks.append(Choice(field, value, "plan", why))

    if recipe.model.device == "auto":
        pick("model.device", device, "the fastest device torch can use here")
    if recipe.model.dtype == "auto":
        pick("model.dtype", *dtype)
    if recipe.lora.alpha is None:
        pick("lora.alpha", float(2 * recipe.lora.r), "2 r")
    for option in open_options(recipe.train):
        pick(*option)
    if recipe.train.learning_rate is None:
        pick("train.learning_rate", *open_rate(recipe, shape))
    if recipe.train.optimizer == "paged_adamw_8bit" and not device.startswith("cuda"):
        pick("train.optimizer", "adamw_8bit", "there is nothing to page without CUDA")
    resolved = resolved.decide(picks)
    again = resolved.recipe.train.gradient_checkpointing
    if again == "offload" and (why := why_not_offloaded(resolved.recipe, shape)) is not None:
        raise RecipeError(f"--train.gradient_checkpointing offload: {why}", fix="use on, or leave it at auto")
    room = Room(shape, parameters or shape.parameters, usable_bytes(machine, resolved.recipe.model.device), devices)
    resolved = resolved.decide(_tokens(resolved.recipe))
    resolved = _fitted(resolved, room) if devices == 1 else _placed(resolved, room)
    model = resolved.recipe.model
    if model.quantization == "none" and model.resident_layers is not None:
        raise RecipeError(
            f"--model.resident_layers {model.resident_layers}: the base is in 16 bit, where no layer is dequantized",
            fix="leave it out, or give --model.quantization nf4",
        )
    if model.quantization == "none" and resolved.recipe.lora.init == "loftq":
        raise RecipeError(
            "--lora.init loftq: the base is in 16 bit, nothing was lost",
            fix="leave it out, or give --model.quantization nf4",
        )
    known = recall(memory_key(resolved.recipe, machine, shape))
    if room.usable > MORE * known.get("usable_bytes", room.usable):  # another program had some of it then
        known = {}
    earlier = "an earlier run of this shape ran out of memory here"
    fewer = min(known.get("micro_batch_tokens") or 1 << 30, resolved.recipe.train.micro_batch_tokens or 1 << 30)
    for name, field, value, how in (
        ("streamed", "model.resident_layers", 0, "with more"),
        ("recompute", "train.gradient_checkpointing", "offload" if known.get("offload") else "on", "without"),
        ("micro_batch_tokens", "train.micro_batch_tokens", fewer, "with more"),
    ):
        if known.get(name) and resolved.choices[field].origin == "plan":
            resolved = resolved.decide([Choice(field, value, "plan", f"{earlier} {how}")])
    return resolved


def usable_bytes(machine: Machine, device: str) -> int:
    """What a run may hold: of the card's memory (what is free of it, where a run has looked), or of what this process
    may still have."""
    kind, _, index = device.partition(":")
    free = machine.free_bytes
    if kind == "cuda" and machine.gpus:
        free = card_bytes(machine.gpus[min(int(index or 0), len(machine.gpus) - 1)]) or free
    if kind == "cuda" and machine.card_free_bytes is not None:
        free = machine.card_free_bytes
    return int(USABLE[kind] * free)


def card_bytes(line: str) -> int | None:
    """Memory of a card as the driver lists it: "name, 24564 MiB"."""
    found = re.search(r"(\d+) MiB", line)
    return int(found[1]) << 20 if found else None


@dataclass(frozen=True)
class Room:
    """A model, and the bytes that training it may take."""

    shape: ModelShape
    parameters: int
    usable: int
    devices: int = 1

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


def memory_key(recipe: Recipe, machine: Machine, shape: ModelShape) -> str:
    """What decides whether a micro-batch fits, apart from its size: names what is remembered of running out of memory.

    recipe: with device and dtype chosen.
    """
    model, lora = recipe.model, recipe.lora
    parts = (
        *(
            machine.cpu,
            machine.memory_bytes,
            machine.gpus,
            shape,
            model.device,
            model.dtype,
            model.quantization,
        ),
        *(lora.r, lora.target_modules, recipe.data.max_length, recipe.train.optimizer),
    )
    return sha256_text(repr(parts))[:24]


def _fitted(resolved: Resolved, room: Room) -> Resolved:
    """With what is left open about memory decided."""
    for decide in (
        *(_narrower, _quantization, _smaller_micro_batch, _larger_micro_batch, _last_resorts, _resident),
        _checkpointing,
    ):
        resolved = resolved.decide(decide(resolved, room))
    return resolved


def _placed(resolved: Resolved, room: Room) -> Resolved:
    """The same for several devices: the base whole on each of them where it fits, else a share on each."""
    field, asked, why_not = "model.placement", resolved.recipe.model.placement, _why_whole(resolved.recipe)
    if asked == "sharded" and why_not:
        raise RecipeError(f"--{field} sharded: not with {why_not}", fix="leave one of them out")
    if asked != "auto":
        return _fitted(resolved, room)
    whole = _fitted(resolved.decide([Choice(field, "replicated", "plan", "fits whole on each device")]), room)
    need = room.need(whole.recipe)
    if need <= room.usable:
        return whole
    if why_not:
        return whole.decide([Choice(field, "replicated", "plan", f"would not fit, and is not sharded with {why_not}")])
    why = f"would not fit whole on each device: {room.said(need)}"
    return _fitted(resolved.decide([Choice(field, "sharded", "plan", why)]), room)


def _why_whole(recipe: Recipe) -> str | None:
    """What reads or trains weights of the base outside of a pass through the layers."""
    lora = recipe.lora
    reasons = {
        "lora.use_dora": lora.use_dora,
        "lora.init loftq": lora.init == "loftq",
        "lora.new_tokens": bool(lora.new_tokens),
        "lora.modules_to_save": bool(lora.modules_to_save),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _tokens(recipe: Recipe) -> list[Choice]:
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
    return [Choice(field, "nf4", "plan", f"16-bit weights would not fit: {room.said(need)}")]


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


def _of_adapter(resolved: Resolved, adapter: Mapping[str, Any]) -> list[Choice]:
    found = {
        "lora.r": adapter["r"],
        "lora.alpha": float(adapter["lora_alpha"]),
        "lora.use_rslora": adapter.get("use_rslora", False),
        "lora.use_dora": adapter.get("use_dora", False),
        "lora.bias": adapter.get("bias", "none"),
        "lora.target_modules": sorted(adapter["target_modules"]),
        "lora.rank_pattern": adapter.get("rank_pattern") or {},
        "lora.alpha_pattern": adapter.get("alpha_pattern") or {},
        "lora.modules_to_save": [name for name in adapter.get("modules_to_save") or [] if name not in HEADS],
    }
    for field, value in found.items():
        asked = resolved.choices[field]
        if asked.origin in ("recipe", "option") and asked.value != value:
            what = f"--{field} {asked.value}: the adapter to start from has {value}"
            raise ModelError(what, fix=f"leave {field} out, or train a new adapter")
    return [Choice(field, value, "plan", "as in the adapter it starts from") for field, value in found.items()]
