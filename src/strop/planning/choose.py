"""What the recipe leaves open, decided for this model and this machine; each decision with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strop.config.load import Choice, Resolved
from strop.config.schema import Recipe
from strop.errors import ModelError, RecipeError
from strop.machine.memory import recall
from strop.machine.probe import Machine
from strop.runs.lock import sha256_text

MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class ModelShape:
    """What the choices need to know of a model; all sizes from its config."""

    parameters: int
    layers: int
    hidden: int
    query: int  # heads * head size
    key_value: int  # key-value heads * head size
    intermediate: int
    vocabulary: int

    @staticmethod
    def of(config: Any, parameters: int) -> ModelShape:
        """From a transformers config. Raises ModelError where it is not a decoder with the usual fields."""
        text = config.get_text_config()
        try:
            head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            key_value_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
            return ModelShape(
                parameters, text.num_hidden_layers, text.hidden_size, head * text.num_attention_heads,
                head * key_value_heads, intermediate, text.vocab_size,
            )  # fmt: skip
        except AttributeError as error:
            raise ModelError(
                f"model type {config.model_type}: {error}", fix="use a decoder-only language model"
            ) from None


def learning_rate(parameters: int) -> float:
    """2e-4 for 7B parameters and more (QLoRA, arXiv:2305.14314, table 9), larger for small models:
    2e-4 (7e9 / P)^0.41, at most 2e-3.

    The exponent makes it 1e-3 at 135M parameters, measured on SNIPS and the demo data (docs/log.md).
    """
    return float(f"{min(2e-3, 2e-4 * max(1.0, 7e9 / parameters) ** 0.41):.2g}")


def saved_bytes_per_token(shape: ModelShape, rank: int) -> int:
    """Activations that the plain path keeps for the backward pass, fp32 adapters on a 16-bit base: by layer
    28 h + 8 q + 4 kv + 10 I + 28 r (op by op from a Llama layer with peft), and 14 V for the head's supervised rows."""
    layer = 28 * shape.hidden + 8 * shape.query + 4 * shape.key_value + 10 * shape.intermediate + 28 * rank
    return shape.layers * layer + 14 * shape.vocabulary


def choose(
    resolved: Resolved,
    machine: Machine,
    shape: ModelShape,
    device: str,
    dtype: tuple[str, str],
    adapter: Mapping[str, Any] | None,
    prequantized: str | None = None,
) -> Resolved:
    """Fills in every field that is still open. device: the one found; dtype: (name, why) of the precision probe.

    adapter: adapter_config.json of `model.adapter`, whose shape the recipe then takes. prequantized: how the base's
    weights are quantized on disk, if they are.
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
    room = _room(resolved.recipe, machine, shape)
    resolved = resolved.decide(_scheme(resolved.recipe, shape, room, prequantized))
    known = recall(memory_key(resolved.recipe, machine, shape))
    resolved = resolved.decide(_resident(resolved.recipe, shape, room, known))
    tokens, why = max(MICRO_BATCH_TOKENS, recipe.data.max_length), "large enough to keep the cores busy"
    if known.get("micro_batch_tokens"):
        tokens, why = known["micro_batch_tokens"], "an earlier run of this shape ran out of memory here with more"
    picks = []
    if recipe.train.micro_batch is None and recipe.train.micro_batch_tokens is None:
        pick("train.micro_batch_tokens", tokens, why)
    if recipe.train.gradient_checkpointing == "auto":
        without = ("on", "an earlier run of this shape ran out of memory here without")
        fits = _checkpointing(recipe, machine, shape, tokens)
        pick("train.gradient_checkpointing", *(without if known.get("recompute") else fits))
    return resolved.decide(picks)


def quantized_size_bytes(parameters: int, scheme: str) -> int:
    """Bytes of quantized weights: 4 bits and 0.127 for their constants (QLoRA, arXiv:2305.14314, 3), or 8 bits."""
    return int(parameters * (4.127 if scheme != "int8" else 8) / 8)


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


def _checkpointing(recipe: Recipe, machine: Machine, shape: ModelShape, tokens: int) -> tuple[str, str]:
    """On only where the saved activations do not fit: it costs a second forward pass, about a third of the time."""
    at_once = recipe.train.micro_batch_tokens or (
        recipe.train.micro_batch * recipe.data.max_length if recipe.train.micro_batch else tokens
    )
    need = at_once * saved_bytes_per_token(shape, recipe.lora.r) + _weight_bytes(recipe, shape)
    fits = need < 0.8 * machine.free_bytes
    said = f"{need / 2**30:.1f} GiB at {at_once} tokens, {machine.free_bytes / 2**30:.1f} GiB free"
    return ("off", f"fits: {said}") if fits else ("on", f"would not fit: {said}")


def _weight_bytes(recipe: Recipe, shape: ModelShape) -> int:
    model = recipe.model
    whole = _whole_bytes(recipe, shape)
    if model.quantization == "none":
        return whole
    resident = (model.resident_layers or 0) / shape.layers
    return int(resident * whole + (1 - resident) * quantized_size_bytes(shape.parameters, str(model.quantization)))


def _rate(recipe: Recipe, shape: ModelShape) -> tuple[float, str]:
    rate, why = learning_rate(shape.parameters), f"rule for {shape.parameters / 1e6:,.0f}M parameters"
    if recipe.train.optimizer == "sgd":
        raise RecipeError("--train.optimizer sgd: has no rule for its learning rate", fix="give --train.learning_rate")
    if recipe.train.optimizer == "lion":
        return float(f"{rate / 5:.2g}"), f"{why}, a fifth of it for lion (arXiv:2302.06675: 3 to 10 times smaller)"
    return rate, why


def _room(recipe: Recipe, machine: Machine, shape: ModelShape) -> float:
    """Bytes that are left for the base beside the activations."""
    tokens = recipe.train.micro_batch_tokens or max(MICRO_BATCH_TOKENS, recipe.data.max_length)
    return 0.8 * machine.free_bytes - tokens * saved_bytes_per_token(shape, recipe.lora.r)


def _scheme(recipe: Recipe, shape: ModelShape, room: float, prequantized: str | None) -> list[Choice]:
    """Quantization where the recipe says auto."""
    if recipe.model.quantization != "auto":
        return []
    if prequantized:
        return [Choice("model.quantization", prequantized, "plan", "as the weights are on disk")]
    whole = _whole_bytes(recipe, shape)
    said = f"{whole / 2**30:.1f} GiB of 16-bit weights, room for {max(room, 0) / 2**30:.1f}"
    scheme, why = ("none", f"fits: {said}") if whole < room else ("nf4", f"would not fit: {said}")
    return [Choice("model.quantization", scheme, "plan", why)]


def _resident(recipe: Recipe, shape: ModelShape, room: float, known: Mapping[str, Any]) -> list[Choice]:
    """How many layers have their quantized weights dequantized once, where the recipe leaves it open."""
    model = recipe.model
    if model.quantization == "none" or model.resident_layers is not None:
        return []
    packed, whole = quantized_size_bytes(shape.parameters, str(model.quantization)), _whole_bytes(recipe, shape)
    layers = max(0, min(shape.layers, int(shape.layers * (room - packed) / max(1, whole - packed))))
    why = "dequantized once: faster, as large as 16 bit" if layers else "no room for 16-bit weights"
    if known.get("streamed"):
        layers, why = 0, "an earlier run of this shape ran out of memory here with more"
    return [Choice("model.resident_layers", layers, "plan", why)]


def _whole_bytes(recipe: Recipe, shape: ModelShape) -> int:
    return (4 if recipe.model.dtype == "fp32" else 2) * shape.parameters


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
