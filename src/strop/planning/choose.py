"""Choose the options that a recipe leaves unset, such as those for memory and the learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from strop.config.load import Choice, Resolved
from strop.config.schema import OBJECTIVE_OPTIONS, Recipe, option_fields
from strop.errors import RecipeError
from strop.machine.memory import load_measured
from strop.machine.probe import Machine
from strop.models.families.shape import ModelShape
from strop.models.families.table import FAMILIES, overflows_fp16
from strop.objectives.table import OBJECTIVES, check_devices, default_options, objective_of
from strop.planning.fit import MemoryBudget, default_micro_batch, fit, fit_devices, why_not_streamed
from strop.planning.machines import rates_of
from strop.planning.memory import PROCESS_BYTES
from strop.planning.workload import check_paths, why_not_offloaded, why_recipe_not_fast
from strop.runs.lock import sha256_text

# If the usable memory has grown by this factor since an out-of-memory error, the error no longer limits the plan.
FREED_FACTOR = 1.1
USABLE = {"cpu": 0.9, "mps": 0.75, "cuda": 0.95}  # share of free memory; on a CPU, MemoryWatch stops a run above it
REWARD_HEADS = ("classifier", "score")  # PEFT's names for the head of a reward model
PUBLISHED_PARAMETERS = 7e9  # model size from which the rate is 2e-4 (QLoRA, arXiv:2305.14314, table 9)
REFERENCE_SCALE, REFERENCE_ROWS = 32, 8  # adapter scale (r 16, alpha 32) and rows per step of the rule
# The rate of weights that are trained in full, as a share of that of adapters: all of them ("LoRA Without Regret",
# 2025), or a projector (docs/images.md).
FULL_RATE_SHARE = 0.1
DIVERGING_RATE = 4  # times the rule's rate (docs/learning_rate.md)
MIN_SCALE, ROWS_RANGE = 8, (2, 32)  # measured range, outside of which the rate stays constant
DEPENDENCIES = {  # options that alpha and the learning rate depend on
    "lora.alpha": ("lora.r",),
    "train.learning_rate": (
        *("model.name", "lora.r", "lora.alpha", "lora.use_rslora"),
        *("lora.vision", "train.objective", "train.batch_size", "train.lora_plus_ratio", "train.optimizer"),
    ),
}
MEASURED_PARAMETERS = 71e6, 135e6  # smallest and largest model of benchmarks/learning_rates.py


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
    """Choose every unset option of a recipe.

    machine: its cores and memory are one device's share. device, dtype (name, reason): the choices for auto. adapter:
    the expanded config of `model.adapter`. Raises RecipeError if options conflict with each other or with the adapter.
    """
    check_devices(resolved.recipe.train, devices)
    if is_full := resolved.recipe.train.method == "full":
        resolved = resolved.decide(_leave_out_adapters(resolved))
    if adapter is not None:
        resolved = resolved.decide(_choose_from_adapter(resolved, adapter))
    resolved = resolved.decide(_leave_out_defaults(resolved))
    resolved = resolved.decide(_choose_without_memory(resolved.recipe, shape, device, dtype))
    recipe, model = resolved.recipe, resolved.recipe.model
    if not is_full and adapter is None:
        check_paths(recipe.lora, shape)
    if recipe.train.gradient_checkpointing == "offload" and (why := why_not_offloaded(recipe, shape)) is not None:
        raise RecipeError(f"--train.gradient_checkpointing offload: {why}", fix="use on, or leave it at auto")
    if model.placement == "streamed" and (why := why_not_streamed(recipe, devices)) is not None:
        raise RecipeError(f"--model.placement streamed: {why}", fix="leave model.placement out")
    if recipe.train.int8_matmul and (why := why_no_int8(recipe, machine, shape)) is not None:
        raise RecipeError(f"--train.int8_matmul true: {why}", fix="leave train.int8_matmul out")
    usable = usable_bytes(machine, model.device)
    budget = MemoryBudget(shape, parameters or shape.parameters, usable, devices, rates_of(machine, model.device))
    fit_memory, unfitted = fit if devices == 1 else fit_devices, resolved.decide(default_micro_batch(recipe))
    resolved = fit_memory(unfitted, budget)
    model, fix = resolved.recipe.model, "leave it out, or give --model.quantization nf4"
    if model.quantization == "none" and model.resident_layers is not None:
        what = f"--model.resident_layers {model.resident_layers}: the base is in 16 bit and is not dequantized"
        raise RecipeError(what, fix=fix)
    if model.quantization == "none" and recipe.lora.init == "loftq":
        raise RecipeError("--lora.init loftq: the base is in 16 bit, without a quantization error", fix=fix)
    limits = load_measured(memory_key(resolved.recipe, machine, shape))
    if usable > FREED_FACTOR * limits.get("usable_bytes", usable):  # another program used memory at the time
        limits = {}
    # With these limits, activations are recomputed or no layers are resident. A smaller micro-batch would not avoid
    # that, so the fit does not compare speeds.
    if limits.get("recompute") or limits.get("streamed"):
        resolved = fit_memory(unfitted, replace(budget, compare_speeds=False))
    return _apply_memory_limits(resolved, limits)


def _leave_out_adapters(resolved: Resolved) -> list[Choice]:
    """Reset options of adapters and quantization that a preset has set, where all weights are trained.

    Raises RecipeError if the user has set one.
    """
    defaults = dict(option_fields())
    choices = []
    for field, choice in resolved.choices.items():
        default = defaults[field].get_default(call_default_factory=True)
        is_quantization = field == "model.quantization"
        is_unused = is_quantization or (field.startswith("lora.") and field != "lora.new_tokens")
        if not is_unused or choice.value in (None, default) or (is_quantization and choice.value == "auto"):
            continue
        why = "quantized weights cannot be trained" if is_quantization else "without adapters"
        if choice.origin != "preset":
            what = f"--{field} {choice.value}: train.method full trains all weights, {why}"
            raise RecipeError(what, fix=f"leave {field} out, or use --train.method lora")
        choices.append(Choice(field, default, "plan", f"all weights are trained, {why}"))
    return choices


def _leave_out_defaults(resolved: Resolved) -> list[Choice]:
    """Reset options that an earlier run wrote as the defaults of its objective, if an option names one without them."""
    objective, choices = resolved.choices["train.objective"], resolved.choices
    read = OBJECTIVES[objective.value].options if objective.value in OBJECTIVES else {}
    return [
        Choice(f"train.{name}", None, "plan", f"objective {objective.value} does not read it")
        for name in OBJECTIVE_OPTIONS
        if objective.origin == "option" and name not in read and (choice := choices[f"train.{name}"]).value is not None
        if choice.origin == "recipe" and any(choice.value == known.options.get(name) for known in OBJECTIVES.values())
    ]


def _choose_without_memory(recipe: Recipe, shape: ModelShape, device: str, dtype: tuple[str, str]) -> list[Choice]:
    values: list[tuple[str, Any, str]] = []
    if recipe.model.device == "auto":
        values.append(("model.device", device, "the fastest device torch can use here"))
    full = recipe.train.method == "full"
    if recipe.model.dtype == "auto":
        half = dtype[0] == "fp16"
        parts = FAMILIES[shape.family].model_parts if shape.family in FAMILIES else ""
        dtype = ("fp32", f"all weights are trained, {parts}".rstrip(", ")) if full and (parts or half) else dtype
        dtype = ("fp32", f"{shape.family} overflows in fp16") if half and overflows_fp16(shape.family) else dtype
        dtype = ("fp32", "train.int8_matmul speeds up fp32 more") if recipe.train.int8_matmul else dtype
        values.append(("model.dtype", *dtype))
    if full and recipe.model.quantization == "auto":
        values.append(("model.quantization", "none", "all weights are trained"))
    if recipe.lora.alpha is None and not full:
        values.append(("lora.alpha", alpha_or_default(recipe), "twice the rank"))
    values += default_options(recipe.train)
    if recipe.train.learning_rate is None:
        values.append(("train.learning_rate", *default_learning_rate(recipe, shape)))
    if recipe.train.optimizer == "paged_adamw_8bit" and not device.startswith("cuda"):
        values.append(("train.optimizer", "adamw_8bit", "paging needs CUDA"))
    return [Choice(field, value, "plan", why) for field, value, why in values]


def _apply_memory_limits(resolved: Resolved, limits: Mapping[str, Any]) -> Resolved:
    """Reduce choices of the plan to the limits that were stored when an earlier run was out of memory."""
    why = "an earlier run of this shape ran out of memory here"
    tokens = min(limits.get("micro_batch_tokens") or 1 << 30, resolved.recipe.train.micro_batch_tokens or 1 << 30)
    for name, field, value, suffix in (
        ("streamed", "model.resident_layers", 0, "with more"),
        ("recompute", "train.gradient_checkpointing", "offload" if limits.get("offload") else "on", "without"),
        ("micro_batch_tokens", "train.micro_batch_tokens", tokens, "with more"),
    ):
        if limits.get(name) and resolved.choices[field].origin == "plan":
            resolved = resolved.decide([Choice(field, value, "plan", f"{why} {suffix}")])
    return resolved


def why_no_int8(recipe: Recipe, machine: Machine, shape: ModelShape) -> str | None:
    """Return why frozen weights cannot be multiplied in int8, or None. The recipe's device must be known."""
    if recipe.model.device != "cpu":
        return f"only on a CPU, and the run is on {recipe.model.device}"
    if not machine.has_int8_dot:
        return f"{machine.cpu} has no 8-bit integer dot products (VNNI)"
    why = why_recipe_not_fast(recipe, shape)
    return None if why is None else f"it needs strop's fused kernels, which do not support this recipe ({why})"


def usable_bytes(machine: Machine, device: str) -> int:
    """Return the bytes that a run may use, a share of the device's free memory.

    On a CPU it is a share of the whole process, with its libraries, as MemoryWatch has it.
    """
    kind, _, index = device.partition(":")
    free = machine.free_bytes
    if kind == "cuda" and machine.gpus:
        line = machine.gpus[min(int(index or 0), len(machine.gpus) - 1)]  # from the driver: "name, 24564 MiB"
        free = int(match[1]) << 20 if (match := re.search(r"(\d+) MiB", line)) else free
    if kind == "cuda" and machine.card_free_bytes is not None:
        free = machine.card_free_bytes
    if kind == "cpu":
        free = max(0, free - round((1 - USABLE[kind]) / USABLE[kind] * PROCESS_BYTES))
    return int(USABLE[kind] * free)


def memory_key(recipe: Recipe, machine: Machine, shape: ModelShape) -> str:
    """Return the key for stored out-of-memory limits. It depends on what affects memory, except the micro-batch."""
    model, lora = recipe.model, recipe.lora
    parts = (
        *(machine.cpu, machine.memory_bytes, machine.gpus, shape, model.device, model.dtype, model.quantization),
        *(lora.r, lora.target_modules, recipe.data.max_length, recipe.train.optimizer),
    )
    return sha256_text(repr(parts))[:24]


def _choose_from_adapter(resolved: Resolved, adapter: Mapping[str, Any]) -> list[Choice]:
    """Choose the options that the start adapter determines. Raises RecipeError if the recipe has other values."""
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
    user = {field: choice.value for field, choice in resolved.choices.items() if choice.origin in ("recipe", "option")}
    for field, value in (values | {"lora.init": "default"}).items():  # another init would overwrite the adapter
        if field in user and user[field] != value:
            adapter_value = "trained values" if field == "lora.init" else value
            what = f"--{field} {user[field]}: the adapter to start from has {adapter_value}"
            raise RecipeError(what, fix=f"leave {field} out, or train a new adapter")
    why, dropout = "as in the adapter it starts from", float(adapter.get("lora_dropout", 0))
    choices = [Choice(field, value, "plan", why) for field, value in values.items()]
    if dropout and resolved.recipe.train.objective == "grpo":
        dropout, why = 0.0, f"objective grpo uses none; the adapter it starts from had {dropout:g}"
    return choices if "lora.dropout" in user else [*choices, Choice("lora.dropout", dropout, "plan", why)]


def choose_labels(resolved: Resolved, names: Sequence[str]) -> Resolved:
    """Set train.labels to the labels of the training rows, if the recipe does not set it."""
    if resolved.recipe.train.labels is not None or not names:
        return resolved
    return resolved.decide([Choice("train.labels", list(names), "plan", "the labels of the training rows")])


def learning_rate(parameters: int) -> float:
    """Return the rate for supervised fine-tuning of P parameters: 2e-4 max(1, 7e9 / P)^(2/3), at most 4e-3."""
    # The exponent was fitted to the published rate for 7B and to measured models (docs/learning_rate.md).
    return float(f"{min(4e-3, 2e-4 * max(1.0, PUBLISHED_PARAMETERS / parameters) ** (2 / 3)):.2g}")


def objective_base_rate(parameters: int) -> float:
    """Return the rate of which other objectives use a share: for P parameters 2e-4 max(1, 7e9 / P)^0.41, <= 2e-3."""
    # The shares were measured when this was also the rule for supervised fine-tuning (docs/preferences.md).
    return float(f"{min(2e-3, 2e-4 * max(1.0, PUBLISHED_PARAMETERS / parameters) ** 0.41):.2g}")


def default_learning_rate(recipe: Recipe, shape: ModelShape) -> tuple[float, str]:
    """Return the learning rate for a recipe that sets none, and the reason. Raises RecipeError for sgd."""
    train, objective, size = recipe.train, objective_of(recipe.train), shape.parameters
    if train.optimizer == "sgd":
        raise RecipeError("--train.optimizer sgd: no rule for its learning rate", fix="give --train.learning_rate")
    rate, why = learning_rate(size), f"rule for {size / 1e6:,.0f}M parameters, {rule_evidence(size)}"
    scale = REFERENCE_SCALE if train.method == "full" else adapter_scale(recipe)
    if (factor := rate_factor(scale, train.batch_size, train.lora_plus_ratio)) != 1:
        differences = {
            f"alpha {alpha_or_default(recipe):g}{' and rsLoRA' * recipe.lora.use_rslora}": scale != REFERENCE_SCALE,
            f"batches of {train.batch_size}": train.batch_size != REFERENCE_ROWS,
            "LoRA+": train.lora_plus_ratio != 1,
        }
        differing = ", ".join(name for name, differs in differences.items() if differs)
        rate, why = float(f"{rate * factor:.2g}"), f"{why}; times {factor:.2g} for {differing}"
    if objective is not None:
        rate = float(f"{objective.learning_rate_factor * objective_base_rate(size):.2g}")
        why = f"2e-4 (7e9 / parameters)^0.41, {objective.learning_rate_factor:g} of it for {objective.name}"
    if train.method == "full" or recipe.lora.vision != "none":
        trained = "all weights" if train.method == "full" else "a projector"
        rate, why = float(f"{FULL_RATE_SHARE * rate:.2g}"), f"{why}; {FULL_RATE_SHARE:g} of it for {trained}"
    if train.optimizer == "lion":
        return float(f"{rate / 5:.2g}"), f"{why}; a fifth of it for lion (arXiv:2302.06675: 3 to 10 times smaller)"
    return rate, why


def find_unusual_values(resolved: Resolved, shape: ModelShape) -> Iterator[str]:
    """Yield notes on options whose default an option changes, although the recipe sets them: alpha, the learning rate,
    and those of the objective. Also on a rate at which runs have diverged, and on epochs that are not used.
    """
    # The recipe.yaml of a run sets all options, so alpha and the rate do not follow a changed rank or model.
    recipe, choices = resolved.recipe, resolved.choices
    rule_values = {"lora.alpha": 2.0 * recipe.lora.r}
    if recipe.train.optimizer != "sgd":
        rule_values["train.learning_rate"] = default_learning_rate(recipe, shape)[0]
    if (objective := objective_of(recipe.train)) is not None:
        numbers = {name: value for name, value in objective.options.items() if isinstance(value, int | float)}
        rule_values |= {f"train.{name}": value for name, value in numbers.items()}
    if recipe.train.max_steps is not None and choices["train.epochs"].origin == "option":
        yield f"train.epochs {recipe.train.epochs:g} is not used: train.max_steps {recipe.train.max_steps} replaces it"
    for field, value in rule_values.items():
        changed = [
            choices[name] for name in DEPENDENCIES.get(field, ("train.objective",)) if choices[name].origin == "option"
        ]
        options, choice = [f"--{x.field} {x.value}" for x in changed], choices[field]
        if options and choice.origin == "recipe" and choice.value is not None and choice.value != value:
            default = f"with {', '.join(options)} it would be {_as_text(value)} (--{field} none)"
            yield f"{field} {_as_text(choice.value)}: set by the recipe; {default}"
    rate, rule = recipe.train.learning_rate, rule_values.get("train.learning_rate")
    if rate is not None and rule is not None and rate > DIVERGING_RATE * rule:
        what = f"train.learning_rate {rate:g}: {rate / rule:,.0f} times the default of this recipe ({rule:g})"
        yield f"{what}; from {DIVERGING_RATE} times on, runs diverged (docs/learning_rate.md)"


def _as_text(value: float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def adapter_scale(recipe: Recipe) -> float:
    """Return the rank times the scaling of the adapter: alpha, or alpha sqrt(r) with rsLoRA."""
    return alpha_or_default(recipe) * (recipe.lora.r**0.5 if recipe.lora.use_rslora else 1)


def alpha_or_default(recipe: Recipe) -> float:
    return recipe.lora.alpha or 2.0 * recipe.lora.r


def rate_factor(scale: float, batch: int, ratio: float = 1.0) -> float:
    """Return the factor on the learning rate for an adapter scale, number of rows per step, and LoRA+ ratio."""
    # Measured at ranks 4 to 128, scales 1 to 8, 2 to 32 rows, and a ratio of 16 (docs/learning_rate.md). The rate does
    # not depend on the rank if alpha does not, as in "LoRA Without Regret" (Schulman and Thinking Machines, 2025).
    rows = min(max(batch, ROWS_RANGE[0]), ROWS_RANGE[1])
    return float((REFERENCE_SCALE / max(scale, MIN_SCALE)) ** 0.5 * (rows / REFERENCE_ROWS) ** 0.2 / ratio**0.5)


def rule_evidence(parameters: int) -> str:
    smallest, largest = MEASURED_PARAMETERS
    if parameters >= PUBLISHED_PARAMETERS:
        return "as published for 7B and more"
    if parameters > largest * 1.05:
        return "between 135M and 7B, not measured: try half and twice it"
    return "measured" if parameters >= smallest * 0.95 else "smaller than what was measured: try half and twice it"
