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
from strop.planning.activations import MicroBatch
from strop.planning.memory import load, train
from strop.planning.setting import Setting
from strop.runs.lock import sha256_text

MICRO_BATCH_TOKENS = 2048
USABLE = {"cpu": 0.9, "mps": 0.75, "cuda": 0.95}  # of what is free: MemoryWatch stops a run on a CPU there
GIB = 1 << 30


def learning_rate(parameters: int) -> float:
    """2e-4 for 7B parameters and more (QLoRA, arXiv:2305.14314, table 9), larger for small models:
    2e-4 (7e9 / P)^0.41, at most 2e-3.

    The exponent makes it 1e-3 at 135M parameters, measured on SNIPS and the demo data (docs/log.md).
    """
    return float(f"{min(2e-3, 2e-4 * max(1.0, 7e9 / parameters) ** 0.41):.2g}")


def choose(
    resolved: Resolved,
    machine: Machine,
    shape: ModelShape,
    device: str,
    dtype: tuple[str, str],
    adapter: Mapping[str, Any] | None = None,
    parameters: int | None = None,
) -> Resolved:
    """Fills in every field that is still open. device: the one found; dtype: (name, why) of the precision probe.

    adapter: adapter_config.json of `model.adapter`, whose shape the recipe then takes. parameters: of the model, where
    its files say more than its config.
    Raises ModelError where an option asks for another shape than the adapter to start from has.
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
    if recipe.train.learning_rate is None:
        pick("train.learning_rate", *_rate(recipe, shape))
    if recipe.train.optimizer == "paged_adamw_8bit" and not device.startswith("cuda"):
        pick("train.optimizer", "adamw_8bit", "there is nothing to page without CUDA")
    resolved = resolved.decide(picks)
    room = Room(shape, parameters or shape.parameters, usable_bytes(machine, resolved.recipe.model.device))
    resolved = resolved.decide(_tokens(resolved.recipe))
    for decide in (_narrower, _quantization, _smaller_micro_batch, _resident, _checkpointing):
        resolved = resolved.decide(decide(resolved, room))
    known = recall(memory_key(resolved.recipe, machine, shape))
    if known.get("streamed") and resolved.choices["model.resident_layers"].origin == "plan":
        why = "an earlier run of this shape ran out of memory here with more"
        resolved = resolved.decide([Choice("model.resident_layers", 0, "plan", why)])
    if known.get("recompute") and resolved.choices["train.gradient_checkpointing"].origin == "plan":
        why = "an earlier run of this shape ran out of memory here without"
        resolved = resolved.decide([Choice("train.gradient_checkpointing", "on", "plan", why)])
    if known.get("micro_batch_tokens") and resolved.choices["train.micro_batch_tokens"].origin == "plan":
        why = "an earlier run of this shape ran out of memory here with more"
        fewer = min(known["micro_batch_tokens"], resolved.recipe.train.micro_batch_tokens or 1 << 30)
        resolved = resolved.decide([Choice("train.micro_batch_tokens", fewer, "plan", why)])
    return resolved


def usable_bytes(machine: Machine, device: str) -> int:
    """What a run may hold: of the card's memory, or of what this process may still have."""
    kind, _, index = device.partition(":")
    free = machine.free_bytes
    if kind == "cuda" and len(machine.gpus) > int(index or 0):
        free = card_bytes(machine.gpus[int(index or 0)]) or free
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

    def need(self, recipe: Recipe, **changes: Any) -> int:
        """Bytes that training by this recipe takes, or by one that differs in parts of its Setting."""
        setting = Setting.of(recipe, self.shape, self.parameters).but(**changes)
        return max(train(setting, micro_batch_of(recipe)).needed_bytes, load(setting).needed_bytes)

    def fits(self, recipe: Recipe, **changes: Any) -> bool:
        return self.need(recipe, **changes) <= self.usable

    def least_layers(self, recipe: Recipe) -> int | None:
        """The fewest layers that must be computed again for it to fit; None where all of them are not enough."""
        layers = self.shape.layers
        return next((k for k in range(layers + 1) if self.fits(recipe, checkpoint_layers=k)), None)

    def said(self, need: int) -> str:
        return f"{need / GIB:.1f} GiB needed, {self.usable / GIB:.1f} GiB usable"


def micro_batch_of(recipe: Recipe, longest: int | None = None) -> MicroBatch:
    """The largest micro-batch that a recipe makes, of rows as long as they may be (or as the longest there is)."""
    train_, length = recipe.train, min(longest or recipe.data.max_length, recipe.data.max_length)
    number = train_.micro_batch or max(1, (train_.micro_batch_tokens or MICRO_BATCH_TOKENS) // length)
    number = min(number, train_.batch_size)
    return MicroBatch.rows([length] * number, more=number < train_.batch_size)


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
    need = room.need(_least(recipe), scheme=scheme, checkpoint_layers=room.shape.layers)
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
    need = room.need(_least(recipe), scheme="none", checkpoint_layers=room.shape.layers)
    if need <= room.usable:
        fits = f"16-bit weights fit: {room.said(need)}"
        return [Choice(field, "none", "plan", fits)] if recipe.model.quantization == "auto" else []
    return [Choice(field, "nf4", "plan", f"16-bit weights would not fit: {room.said(need)}")]


def _is_open(resolved: Resolved) -> bool:
    """Whether the plan decides about quantization."""
    recipe = resolved.recipe
    default = resolved.choices["model.quantization"].origin == "default"
    return recipe.model.quantization == "auto" or (recipe.preset == "auto" and default and recipe.model.adapter is None)


def _least(recipe: Recipe) -> Recipe:
    """With one row at a time."""
    if recipe.train.micro_batch is not None:
        return recipe
    train_ = recipe.train.model_copy(update={"micro_batch_tokens": recipe.data.max_length})
    return recipe.model_copy(update={"train": train_})


def _smaller_micro_batch(resolved: Resolved, room: Room) -> list[Choice]:
    """Half as many tokens at once until it fits with every layer computed again; a row is never cut."""
    recipe, field = resolved.recipe, "train.micro_batch_tokens"
    tokens = recipe.train.micro_batch_tokens
    if tokens is None or resolved.choices[field].origin != "plan":
        return []
    layers = room.shape.layers if recipe.train.gradient_checkpointing != "off" else 0
    while tokens > recipe.data.max_length and not room.fits(recipe, checkpoint_layers=layers):
        tokens = max(recipe.data.max_length, tokens // 2)
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_tokens": tokens})})
    if tokens == resolved.recipe.train.micro_batch_tokens:
        return []
    return [Choice(field, tokens, "plan", f"more would not fit: {room.said(room.need(resolved.recipe))}")]


def _resident(resolved: Resolved, room: Room) -> list[Choice]:
    """Quantized layers that are dequantized once, as far as memory goes beside activations that are kept."""
    recipe = resolved.recipe
    if recipe.model.quantization == "none" or recipe.model.resident_layers is not None:
        return []
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


def _rate(recipe: Recipe, shape: ModelShape) -> tuple[float, str]:
    rate, why = learning_rate(shape.parameters), f"rule for {shape.parameters / 1e6:,.0f}M parameters"
    if recipe.train.optimizer == "sgd":
        raise RecipeError("--train.optimizer sgd: has no rule for its learning rate", fix="give --train.learning_rate")
    if recipe.train.optimizer == "lion":
        return float(f"{rate / 5:.2g}"), f"{why}, a fifth of it for lion (arXiv:2302.06675: 3 to 10 times smaller)"
    return rate, why


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
        "lora.modules_to_save": adapter.get("modules_to_save") or [],
    }
    for field, value in found.items():
        asked = resolved.choices[field]
        if asked.origin in ("recipe", "option") and asked.value != value:
            raise ModelError(
                f"--{field} {asked.value}: the adapter to start from has {value}",
                fix=f"leave {field} out, or train a new adapter",
            )
    return [Choice(field, value, "plan", "as in the adapter it starts from") for field, value in found.items()]
