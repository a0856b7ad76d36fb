"""What the recipe leaves open, decided for this model and this machine; each decision with its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from strop.config.load import Choice, Resolved
from strop.config.schema import Recipe
from strop.errors import RecipeError
from strop.machine.memory import load_measured
from strop.machine.probe import Machine
from strop.machine.rates import load_rates
from strop.models.families.shape import ModelShape
from strop.objectives.table import check_devices, default_options
from strop.planning.largest import Room, fitted, fixed_tokens, placed
from strop.planning.learning_rate import alpha_of, open_rate
from strop.planning.time import Rate
from strop.planning.workload import check_names, why_not_offloaded, why_plain
from strop.runs.lock import sha256_text

MORE = 1.1  # times the bytes that were usable when a run ran out of memory: it may not do so again
USABLE = {"cpu": 0.9, "mps": 0.75, "cuda": 0.95}  # of what is free: MemoryWatch stops a run on a CPU there
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

    adapter: adapter_config.json of `model.adapter`, whose shape the recipe then takes, with `new_tokens`, their texts.
    parameters: of the model, where its files say more than its config. devices: that train together; the machine is
    what one of them has. Raises RecipeError for options that do not go together, or not with the adapter to start from.
    """
    recipe = resolved.recipe
    check_devices(recipe.train, devices)
    if adapter is not None:
        resolved = resolved.decide(_of_adapter(resolved, adapter))
        recipe = resolved.recipe
    picks: list[Choice] = []

    def pick(field: str, value: Any, why: str) -> None:
        picks.append(Choice(field, value, "plan", why))

    if recipe.model.device == "auto":
        pick("model.device", device, "the fastest device torch can use here")
    if recipe.model.dtype == "auto":
        pick("model.dtype", *(("fp32", "train.int8_matmul adds up in it") if recipe.train.int8_matmul else dtype))
    if recipe.lora.alpha is None:
        pick("lora.alpha", alpha_of(recipe), "2 r")
    for option in default_options(recipe.train):
        pick(*option)
    if recipe.train.learning_rate is None:
        pick("train.learning_rate", *open_rate(recipe, shape))
    if recipe.train.optimizer == "paged_adamw_8bit" and not device.startswith("cuda"):
        pick("train.optimizer", "adamw_8bit", "there is nothing to page without CUDA")
    resolved = resolved.decide(picks)
    check_names(resolved.recipe.lora, shape)
    again = resolved.recipe.train.gradient_checkpointing
    if again == "offload" and (why := why_not_offloaded(resolved.recipe, shape)) is not None:
        raise RecipeError(f"--train.gradient_checkpointing offload: {why}", fix="use on, or leave it at auto")
    if resolved.recipe.train.int8_matmul and (why := why_no_integers(resolved.recipe, machine, shape)) is not None:
        raise RecipeError(f"--train.int8_matmul true: {why}", fix="leave train.int8_matmul out")
    model = resolved.recipe.model
    rate_of = partial(Rate.of_cpu, machine, load_rates(machine, "cpu")) if model.device == "cpu" else None
    room = Room(shape, parameters or shape.parameters, usable_bytes(machine, model.device), devices, rate_of)
    decide, open_ = fitted if devices == 1 else placed, resolved.decide(fixed_tokens(resolved.recipe))
    resolved = decide(open_, room)
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
    known = load_measured(memory_key(resolved.recipe, machine, shape))
    if room.usable > MORE * known.get("usable_bytes", room.usable):  # another program had some of it then
        known = {}
    if known.get("recompute") or known.get("streamed"):  # fewer tokens at once would not save what they are taken for
        resolved = decide(open_, replace(room, rate_of=None))
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


def why_no_integers(recipe: Recipe, machine: Machine, shape: ModelShape) -> str | None:
    """Why frozen weights cannot be multiplied in 8-bit integers. recipe: with its device chosen."""
    why = why_plain(recipe, shape)
    reasons = {
        f"only on a CPU, and the run is on {recipe.model.device}": recipe.model.device != "cpu",
        f"{machine.cpu} has no products of such integers (VNNI)": not machine.has_int8_dot,
        f"the plain step cannot, which trains this ({why})": why is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def usable_bytes(machine: Machine, device: str) -> int:
    """What a run may hold: of the card's memory (what is free of it, where a run has looked), or of what this process
    may still have."""
    kind, _, index = device.partition(":")
    free = machine.free_bytes
    if kind == "cuda" and machine.gpus:
        free = card_bytes(machine.gpus[min(int(index or 0), len(machine.gpus) - 1)]) or free
    if kind == "cuda" and machine.gpu_free_bytes is not None:
        free = machine.gpu_free_bytes
    return int(USABLE[kind] * free)


def card_bytes(line: str) -> int | None:
    """Memory of a card as the driver lists it: "name, 24564 MiB"."""
    found = re.search(r"(\d+) MiB", line)
    return int(found[1]) << 20 if found else None


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
        "lora.new_tokens": adapter.get("new_tokens", []),
    }
    given = {field: choice for field, choice in resolved.choices.items() if choice.origin in ("recipe", "option")}
    has = found | {"lora.init": "default"}  # which draws values where there are none
    for field, value in has.items():
        if field in given and given[field].value != value:
            own = "its values" if field == "lora.init" else value
            what = f"--{field} {given[field].value}: the adapter to start from has {own}"
            raise RecipeError(what, fix=f"leave {field} out, or train a new adapter")
    picks = [Choice(field, value, "plan", "as in the adapter it starts from") for field, value in found.items()]
    if "lora.dropout" not in given:
        picks.append(_own_dropout(resolved.recipe, float(adapter.get("lora_dropout", 0))))
    return picks


def _own_dropout(recipe: Recipe, own: float) -> Choice:
    if own and recipe.train.objective == "grpo":
        return Choice("lora.dropout", 0.0, "plan", f"objective grpo has none; the adapter it starts from had {own:g}")
    return Choice("lora.dropout", own, "plan", "as in the adapter it starts from")
