"""Choose the options that a recipe leaves open, for one model and machine. Each choice carries its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from strop.config.load import Choice, Resolved
from strop.config.schema import Recipe
from strop.errors import RecipeError
from strop.machine.memory import recall
from strop.machine.probe import Machine
from strop.machine.rates import known_rates
from strop.models.families.shape import ModelShape
from strop.objectives.table import check_devices, default_options
from strop.planning.fit import MemoryBudget, default_micro_batch, fit, fit_devices
from strop.planning.learning_rate import alpha_of, open_rate
from strop.planning.time import Rate
from strop.planning.workload import check_patterns, why_not_offloaded, why_plain
from strop.runs.lock import sha256_text

FREED_FACTOR = 1.1  # growth of the usable memory since an out-of-memory error, above which the error is ignored
USABLE = {"cpu": 0.9, "mps": 0.75, "cuda": 0.95}  # share of free memory; on a CPU, MemoryWatch stops a run there
REWARD_HEADS = ("classifier", "score")  # peft's names for the head of a reward model; the objective adds its own


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
    """Fill in every open option.

    Args:
        resolved: the recipe, with the origin of each value.
        machine: the machine; with several devices, one device's part of it.
        shape: sizes of the model.
        device: device for a recipe that leaves it open.
        dtype: (name, reason) of the compute dtype for a recipe that leaves it open.
        adapter: adapter_config.json of `model.adapter`, with the texts of its new tokens. The recipe takes its shape.
        parameters: number of weights by the model's files; default: by its shape.
        devices: number of devices that train together.

    Raises:
        RecipeError: options conflict with each other, or with the adapter to start from.
    """
    check_devices(resolved.recipe.train, devices)
    if adapter is not None:
        resolved = resolved.decide(_adapter_choices(resolved, adapter))
    resolved = resolved.decide(_plain_choices(resolved.recipe, shape, device, dtype))
    recipe = resolved.recipe
    check_patterns(recipe.lora, shape)
    if recipe.train.gradient_checkpointing == "offload" and (why := why_not_offloaded(recipe, shape)) is not None:
        raise RecipeError(f"--train.gradient_checkpointing offload: {why}", fix="use on, or leave it at auto")
    if recipe.train.int8_matmul and (why := why_no_integers(recipe, machine, shape)) is not None:
        raise RecipeError(f"--train.int8_matmul true: {why}", fix="leave train.int8_matmul out")
    model = recipe.model
    rate_of = partial(Rate.of_cpu, machine, known_rates(machine, "cpu")) if model.device == "cpu" else None
    usable = usable_bytes(machine, model.device)
    budget = MemoryBudget(shape, parameters or shape.parameters, usable, devices, rate_of)
    fit_memory, unfitted = fit if devices == 1 else fit_devices, resolved.decide(default_micro_batch(recipe))
    resolved = fit_memory(unfitted, budget)
    _check_quantized_options(resolved.recipe)
    limits = recall(memory_key(resolved.recipe, machine, shape))
    if usable > FREED_FACTOR * limits.get("usable_bytes", usable):  # another program used memory at the time
        limits = {}
    if limits.get("recompute") or limits.get("streamed"):  # a smaller micro-batch would not save recomputation
        resolved = fit_memory(unfitted, replace(budget, rate_of=None))
    return _apply_memory_limits(resolved, limits)


def _plain_choices(recipe: Recipe, shape: ModelShape, device: str, dtype: tuple[str, str]) -> list[Choice]:
    """Return the choices that do not depend on memory."""
    choices: list[Choice] = []

    def choose_option(field: str, value: Any, why: str) -> None:
        choices.append(Choice(field, value, "plan", why))

    if recipe.model.device == "auto":
        choose_option("model.device", device, "the fastest device torch can use here")
    if recipe.model.dtype == "auto":
        value = ("fp32", "train.int8_matmul accumulates in fp32") if recipe.train.int8_matmul else dtype
        choose_option("model.dtype", *value)
    if recipe.lora.alpha is None:
        choose_option("lora.alpha", alpha_of(recipe), "2 r")
    for option in default_options(recipe.train):
        choose_option(*option)
    if recipe.train.learning_rate is None:
        choose_option("train.learning_rate", *open_rate(recipe, shape))
    if recipe.train.optimizer == "paged_adamw_8bit" and not device.startswith("cuda"):
        choose_option("train.optimizer", "adamw_8bit", "paging needs CUDA")
    return choices


def _check_quantized_options(recipe: Recipe) -> None:
    """Refuse options of a quantized base on a base in 16 bit."""
    if recipe.model.quantization != "none":
        return
    fix = "leave it out, or give --model.quantization nf4"
    if recipe.model.resident_layers is not None:
        what = f"--model.resident_layers {recipe.model.resident_layers}: the base is in 16 bit and is not dequantized"
        raise RecipeError(what, fix=fix)
    if recipe.lora.init == "loftq":
        raise RecipeError("--lora.init loftq: the base is in 16 bit, without a quantization error", fix=fix)


def _apply_memory_limits(resolved: Resolved, limits: Mapping[str, Any]) -> Resolved:
    """Lower choices of the plan to what did not run out of memory in an earlier run. limits: empty if none did."""
    why = "an earlier run of this shape ran out of memory here"
    tokens = min(limits.get("micro_batch_tokens") or 1 << 30, resolved.recipe.train.micro_batch_tokens or 1 << 30)
    for name, field, value, how in (
        ("streamed", "model.resident_layers", 0, "with more"),
        ("recompute", "train.gradient_checkpointing", "offload" if limits.get("offload") else "on", "without"),
        ("micro_batch_tokens", "train.micro_batch_tokens", tokens, "with more"),
    ):
        if limits.get(name) and resolved.choices[field].origin == "plan":
            resolved = resolved.decide([Choice(field, value, "plan", f"{why} {how}")])
    return resolved


def why_no_integers(recipe: Recipe, machine: Machine, shape: ModelShape) -> str | None:
    """Return why frozen weights cannot be multiplied in 8-bit integers, or None. The recipe's device is chosen."""
    why = why_plain(recipe, shape)
    reasons = {
        f"only on a CPU, and the run is on {recipe.model.device}": recipe.model.device != "cpu",
        f"{machine.cpu} has no 8-bit integer dot products (VNNI)": not machine.integers,
        f"the plain step cannot, and it trains this recipe ({why})": why is not None,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def usable_bytes(machine: Machine, device: str) -> int:
    """Return the bytes a run may use: a share of the GPU's memory, or of what this process can still allocate.

    For a GPU it is a share of the free memory, if a run has read that.
    """
    kind, _, index = device.partition(":")
    free = machine.free_bytes
    if kind == "cuda" and machine.gpus:
        free = gpu_bytes(machine.gpus[min(int(index or 0), len(machine.gpus) - 1)]) or free
    if kind == "cuda" and machine.card_free_bytes is not None:
        free = machine.card_free_bytes
    return int(USABLE[kind] * free)


def gpu_bytes(line: str) -> int | None:
    """Return the memory of a GPU as the driver lists it ("name, 24564 MiB"), or None if the line has none."""
    match = re.search(r"(\d+) MiB", line)
    return int(match[1]) << 20 if match else None


def memory_key(recipe: Recipe, machine: Machine, shape: ModelShape) -> str:
    """Return the key of remembered out-of-memory limits: everything that decides memory except the micro-batch.

    The recipe's device and dtype are chosen.
    """
    model, lora = recipe.model, recipe.lora
    parts = (
        *(machine.cpu, machine.memory_bytes, machine.gpus, shape, model.device, model.dtype, model.quantization),
        *(lora.r, lora.target_modules, recipe.data.max_length, recipe.train.optimizer),
    )
    return sha256_text(repr(parts))[:24]


def _adapter_choices(resolved: Resolved, adapter: Mapping[str, Any]) -> list[Choice]:
    """Return the recipe fields that the adapter to start from decides.

    Raises:
        RecipeError: the recipe gives another value.
    """
    values = {
        "lora.r": adapter["r"],
        "lora.alpha": float(adapter["lora_alpha"]),
        "lora.use_rslora": adapter.get("use_rslora", False),
        "lora.use_dora": adapter.get("use_dora", False),
        "lora.bias": adapter.get("bias", "none"),
        "lora.target_modules": sorted(adapter["target_modules"]),
        "lora.rank_pattern": adapter.get("rank_pattern") or {},
        "lora.alpha_pattern": adapter.get("alpha_pattern") or {},
        "lora.modules_to_save": [name for name in adapter.get("modules_to_save") or [] if name not in REWARD_HEADS],
        "lora.new_tokens": adapter.get("new_tokens", []),
    }
    given = {field: choice for field, choice in resolved.choices.items() if choice.origin in ("recipe", "option")}
    for field, value in (values | {"lora.init": "default"}).items():  # another init would overwrite its values
        if field in given and given[field].value != value:
            adapter_value = "trained values" if field == "lora.init" else value
            what = f"--{field} {given[field].value}: the adapter to start from has {adapter_value}"
            raise RecipeError(what, fix=f"leave {field} out, or train a new adapter")
    choices = [Choice(field, value, "plan", "as in the adapter it starts from") for field, value in values.items()]
    if "lora.dropout" not in given:
        choices.append(_adapter_dropout(resolved.recipe, float(adapter.get("lora_dropout", 0))))
    return choices


def _adapter_dropout(recipe: Recipe, dropout: float) -> Choice:
    if dropout and recipe.train.objective == "grpo":
        why = f"objective grpo uses none; the adapter it starts from had {dropout:g}"
        return Choice("lora.dropout", 0.0, "plan", why)
    return Choice("lora.dropout", dropout, "plan", "as in the adapter it starts from")
