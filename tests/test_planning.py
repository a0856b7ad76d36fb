"""What the plan decides about storage, memory and rates, on machines of other sizes than this one."""

from __future__ import annotations

from typing import Any

import pytest

from strop.config.load import Resolved, resolve
from strop.errors import RecipeError
from strop.machine.memory import remember
from strop.machine.probe import Machine
from strop.planning.choose import ModelShape, choose, learning_rate, memory_key

GIB = 1 << 30
LLAMA_8B = ModelShape(8_030_000_000, 32, 4096, 4096, 1024, 14336, 128256)


def machine(free: float) -> Machine:
    return Machine("Linux", "3.11", "a CPU", (), 8, int(64 * GIB), int(free * GIB), ())


def plan(free: float, prequantized: str | None = None, shape: ModelShape = LLAMA_8B, **options: Any) -> Resolved:
    recipe = resolve(None, {"model": "m", "data": "d", "train.micro_batch_tokens": 256, **options})
    return choose(recipe, machine(free), shape, "cpu", ("bf16", "measured"), None, prequantized)


def test_auto_quantizes_where_16_bit_would_not_fit() -> None:
    assert plan(60, **{"model.quantization": "auto"}).recipe.model.quantization == "none"
    tight = plan(12, **{"model.quantization": "auto"})
    assert tight.recipe.model.quantization == "nf4" and "would not fit" in tight.choices["model.quantization"].why
    assert plan(60, "int8", **{"model.quantization": "auto"}).recipe.model.quantization == "int8"


def test_as_many_layers_are_resident_as_fit() -> None:
    counts = [plan(free, **{"model.quantization": "nf4"}).recipe.model.resident_layers for free in (6, 14, 18, 60)]
    assert counts[0] == 0 and counts[-1] == 32 and 0 < counts[1] < counts[2] < 32  # type: ignore[operator]
    assert plan(60, **{"model.quantization": "nf4", "model.resident_layers": 3}).recipe.model.resident_layers == 3
    assert plan(60).recipe.model.resident_layers is None


def test_streamed_weights_leave_room_for_activations() -> None:
    """At 11 GiB the 16-bit weights alone would ask for checkpointing, and more."""
    streamed = plan(11, **{"model.quantization": "nf4"}).recipe
    assert streamed.train.gradient_checkpointing == "off"
    assert plan(11).recipe.train.gradient_checkpointing == "on"


def test_what_ran_out_of_memory_once_is_remembered() -> None:
    options = {"data": "d", "model": "m"}
    fresh = choose(resolve(None, options), machine(60), LLAMA_8B, "cpu", ("bf16", ""), None)
    assert fresh.recipe.train.micro_batch_tokens == 2048
    key = memory_key(fresh.recipe, machine(60), LLAMA_8B)
    remember(key, {"micro_batch_tokens": 512, "recompute": True})
    again = choose(resolve(None, options), machine(60), LLAMA_8B, "cpu", ("bf16", ""), None)
    assert again.recipe.train.micro_batch_tokens == 512 and again.recipe.train.gradient_checkpointing == "on"
    assert "ran out of memory" in again.choices["train.micro_batch_tokens"].why
    asked = choose(
        resolve(None, {**options, "train.micro_batch_tokens": 1024}), machine(60), LLAMA_8B, "cpu", ("bf16", ""), None
    )
    assert asked.recipe.train.micro_batch_tokens == 1024  # what a person asks for stays
    remember(memory_key(plan(60, **{"model.quantization": "nf4"}).recipe, machine(60), LLAMA_8B), {"streamed": True})
    assert plan(60, **{"model.quantization": "nf4"}).recipe.model.resident_layers == 0
    other = choose(resolve(None, {**options, "lora.r": 64}), machine(60), LLAMA_8B, "cpu", ("bf16", ""), None)
    assert other.recipe.train.micro_batch_tokens == 2048


def test_rates_by_size_and_optimizer() -> None:
    assert learning_rate(7_000_000_000) == 2e-4 and learning_rate(135_000_000) == pytest.approx(1e-3, rel=0.02)
    assert plan(60).recipe.train.learning_rate == 2e-4
    lion = plan(60, **{"train.optimizer": "lion"})
    assert lion.recipe.train.learning_rate == 4e-5 and "lion" in lion.choices["train.learning_rate"].why
    with pytest.raises(RecipeError, match="no rule"):
        plan(60, **{"train.optimizer": "sgd"})
    assert plan(60, **{"train.optimizer": "sgd", "train.learning_rate": 0.1}).recipe.train.learning_rate == 0.1


@pytest.mark.parametrize(("preset", "scheme"), [("low-memory", "nf4"), ("balanced", "nf4"), ("max-quality", "none")])
def test_presets_name_their_quantization(preset: str, scheme: str) -> None:
    assert resolve(None, {"model": "m", "data": "d", "preset": preset}).recipe.model.quantization == scheme
