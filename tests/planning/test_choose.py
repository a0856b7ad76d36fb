"""Choices of the plan about storage, memory and rates, on machines of several sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from strop.config.load import Resolved, resolve
from strop.errors import RecipeError
from strop.machine.memory import save_measured
from strop.machine.probe import Machine, vector_extensions
from strop.models.families.shape import ModelShape
from strop.objectives.table import longest_sequence, max_sampled_tokens
from strop.planning.activations import MAX_SAVED_KEYS, offloaded_bytes, peak_live_bytes
from strop.planning.choose import (
    choose,
    find_unusual_values,
    learning_rate,
    memory_key,
    objective_base_rate,
    usable_bytes,
)
from strop.planning.fit import MemoryBudget
from strop.planning.memory import EvaluationLoad, RolloutLoad, predict_phases
from strop.planning.microbatch import largest_micro_batch, mean_micro_batch
from strop.planning.tables import KNOWN
from strop.planning.time import HOST_BYTES_PER_S, Rate, micro_batch_seconds, rollout_seconds
from strop.planning.workload import Workload

GIB = 1 << 30
LLAMA_8B = ModelShape.from_config(KNOWN["Llama-3.1-8B"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that another test has stored would change the choices."""
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))


def machine(free: float, gpus: tuple[str, ...] = ()) -> Machine:
    return Machine("a CPU", (), "Linux", "3.11", 8, int(64 * GIB), int(free * GIB), gpus)


def plan(free: float, prequantized: str | None = None, **options: Any) -> Resolved:
    usual = {"model": "m", "data": "d", "train.micro_batch_tokens": 1024, "model.placement": "replicated"}
    recipe = resolve(None, {**usual, **options})
    shape = replace(LLAMA_8B, prequantized=prequantized)
    return choose(recipe, machine(free), shape, "cpu", ("bf16", "measured"))


def test_auto_quantizes_if_16_bit_would_not_fit() -> None:
    assert plan(60, **{"model.quantization": "auto"}).recipe.model.quantization == "none"
    tight = plan(12, **{"model.quantization": "auto"})
    assert tight.recipe.model.quantization == "nf4" and "would not fit" in tight.choices["model.quantization"].why
    assert plan(60, "int8", **{"model.quantization": "auto"}).recipe.model.quantization == "int8"


def test_default_quantization_changes_only_if_16_bit_does_not_fit() -> None:
    assert plan(60).choices["model.quantization"].origin == "default"
    assert plan(12).recipe.model.quantization == "nf4"
    assert plan(12, **{"model.quantization": "none"}).recipe.model.quantization == "none"
    assert plan(12, preset="max-quality", **{"train.micro_batch_tokens": None}).recipe.model.quantization == "none"


def test_as_many_layers_are_dequantized_once_as_fit() -> None:
    counts = [plan(free, **{"model.quantization": "nf4"}).recipe.model.resident_layers for free in (9, 14, 20, 60)]
    assert counts[0] == 0 and counts[-1] == 32 and 0 < counts[1] < counts[2] < 32  # type: ignore[operator]
    assert plan(60, **{"model.quantization": "nf4", "model.resident_layers": 3}).recipe.model.resident_layers == 3
    assert plan(60).recipe.model.resident_layers is None


def test_resident_layers_with_a_16_bit_base_are_refused() -> None:
    with pytest.raises(RecipeError, match="16 bit"):
        plan(60, **{"model.resident_layers": 3})
    assert plan(12, **{"model.resident_layers": 3}).recipe.model.resident_layers == 3  # the plan chooses nf4


def test_weights_that_stay_quantized_leave_memory_for_activations() -> None:
    quantized = plan(14, **{"model.quantization": "nf4"}).recipe
    assert quantized.train.gradient_checkpointing == "off"
    assert plan(14, **{"model.quantization": "none"}).recipe.train.gradient_checkpointing == "on"


def test_fewer_layers_are_checkpointed_with_more_memory() -> None:
    counts = []
    for free in (9, 10, 11):
        chosen = plan(free, **{"model.quantization": "nf4"})
        counts.append(chosen.recipe.train.gradient_checkpointing)
        assert "would not fit" in chosen.choices["train.gradient_checkpointing"].why or counts[-1] == "off"
    assert isinstance(counts[0], int) and isinstance(counts[1], int) and 32 > counts[0] > counts[1], counts


def test_largest_micro_batch_is_full_and_needs_the_most_memory() -> None:
    recipe = plan(60, **{"train.micro_batch_tokens": 2048, "data.max_length": 1100}).recipe
    workload = Workload.from_recipe(recipe, LLAMA_8B)
    largest = largest_micro_batch(recipe, workload)
    assert largest.tokens == 2048
    for length in (2, 100, MAX_SAVED_KEYS, 700, 1000, 1100):
        rows = mean_micro_batch(recipe, [(length, length - 1)] * 8)
        assert peak_live_bytes(workload, rows).total <= peak_live_bytes(workload, largest).total, length
    alone = plan(60, **{"train.batch_size": 1, "data.max_length": 1100}).recipe
    assert largest_micro_batch(alone, workload).tokens <= 1100


def test_micro_batch_of_a_preset_is_lowered_and_a_given_one_is_not() -> None:
    options = {"train.micro_batch_tokens": None, "data.max_length": 4096}
    large, tight = (plan(free, preset="balanced", **options) for free in (60, 9))
    fewer = tight.choices["train.micro_batch"]
    assert large.recipe.train.micro_batch == 4 and large.choices["train.micro_batch"].origin == "preset"
    assert fewer.value in (1, 2) and fewer.origin == "plan" and "would not fit" in fewer.why
    assert tight.recipe.train.batch_size == 8
    fixed = plan(9, preset="balanced", **{**options, "train.micro_batch": 4})
    assert fixed.recipe.train.micro_batch == 4


def test_last_resorts_change_only_open_options_and_only_if_they_suffice() -> None:
    open_ = {"train.micro_batch_tokens": None}
    assert plan(8.5, **open_).choices["train.optimizer"].origin == "default"
    assert plan(7.6, **open_).recipe.train.optimizer == "adamw_8bit"
    shorter = plan(7.35, **open_).recipe
    assert shorter.data.max_length < 1024 and shorter.data.overlong == "split", shorter
    assert plan(7.35, **{**open_, "data.max_length": 1024}).recipe.data.max_length == 1024
    assert plan(3, **open_).recipe.train.optimizer == "adamw"


def test_limits_of_an_earlier_out_of_memory_error_are_applied() -> None:
    options = {"data": "d", "model": "m"}

    def chosen(**more: Any) -> Resolved:
        return choose(resolve(None, {**options, **more}), machine(60), LLAMA_8B, "cpu", ("bf16", ""))

    fresh = chosen()
    assert fresh.recipe.train.micro_batch_tokens == 2048
    key = memory_key(fresh.recipe, machine(60), LLAMA_8B)
    save_measured(key, {"micro_batch_tokens": 512, "recompute": True})
    again = chosen()
    assert again.recipe.train.micro_batch_tokens == 512 and again.recipe.train.gradient_checkpointing == "on"
    assert "ran out of memory" in again.choices["train.micro_batch_tokens"].why
    assert chosen(**{"train.micro_batch_tokens": 1024}).recipe.train.micro_batch_tokens == 1024  # given by the user
    assert chosen(**{"lora.r": 64}).recipe.train.micro_batch_tokens == 2048
    save_measured(
        memory_key(plan(60, **{"model.quantization": "nf4"}).recipe, machine(60), LLAMA_8B), {"streamed": True}
    )
    assert plan(60, **{"model.quantization": "nf4"}).recipe.model.resident_layers == 0


def test_usable_memory_is_that_of_the_device() -> None:
    with_gpu = machine(60, ("a GPU, 8192 MiB",))
    assert usable_bytes(with_gpu, "cuda") < 8 * GIB < usable_bytes(with_gpu, "cpu")
    assert usable_bytes(replace(with_gpu, card_free_bytes=3 * GIB), "cuda:1") == int(0.95 * 3 * GIB)
    recipe = resolve(None, {"model": "m", "data": "d"})
    assert choose(recipe, with_gpu, LLAMA_8B, "cuda", ("bf16", "")).recipe.model.quantization == "nf4"


def test_micro_batch_grows_on_a_gpu_up_to_a_step() -> None:

    def tokens(memory: str, device: str = "cuda", **options: Any) -> int | None:
        recipe = resolve(None, {"model": "m", "data": "d", "model.quantization": "none", **options})
        result = choose(recipe, machine(200, (memory,)), LLAMA_8B, device, ("bf16", ""))
        return result.recipe.train.micro_batch_tokens

    assert tokens("a GPU, 81559 MiB") == 8192 and tokens("a GPU, 200000 MiB", **{"train.batch_size": 64}) == 16384
    assert tokens("a GPU, 36000 MiB") == 4096 and tokens("a GPU, 24564 MiB") == 2048
    assert tokens("a GPU, 81559 MiB", "cpu") == 2048
    assert tokens("a GPU, 81559 MiB", **{"train.micro_batch_tokens": 1024}) == 1024


def test_limit_is_ignored_if_other_programs_used_the_memory() -> None:
    open_recipe = resolve(None, {"model": "m", "data": "d"})

    def tokens() -> int | None:
        return choose(open_recipe, machine(60), LLAMA_8B, "cpu", ("bf16", "")).recipe.train.micro_batch_tokens

    chosen = choose(open_recipe, machine(60), LLAMA_8B, "cpu", ("bf16", "")).recipe
    for usable, expected in ((4, 2048), (54, 512)):
        shape = {"micro_batch_tokens": 512, "usable_bytes": usable * GIB}
        save_measured(memory_key(chosen, machine(60), LLAMA_8B), shape)
        assert tokens() == expected


def test_learning_rate_depends_on_size_and_optimizer() -> None:
    assert learning_rate(7_000_000_000) == 2e-4
    assert plan(60).recipe.train.learning_rate == 2e-4
    lion = plan(60, **{"train.optimizer": "lion"})
    assert lion.recipe.train.learning_rate == 4e-5 and "lion" in lion.choices["train.learning_rate"].why
    with pytest.raises(RecipeError, match=r"train\.optimizer sgd"):
        plan(60, **{"train.optimizer": "sgd"})
    assert plan(60, **{"train.optimizer": "sgd", "train.learning_rate": 0.1}).recipe.train.learning_rate == 0.1


@pytest.mark.parametrize(("preset", "scheme"), [("low-memory", "nf4"), ("balanced", "nf4"), ("max-quality", "none")])
def test_presets_decide_quantization(preset: str, scheme: str) -> None:
    resolved = plan(60, preset=preset, **{"train.micro_batch_tokens": None})
    assert resolved.recipe.model.quantization == scheme
    assert all(choice.why for choice in resolved.choices.values() if choice.origin == "plan")


def test_yaml_booleans_and_numbers_set_gradient_checkpointing() -> None:
    def parse(value: Any) -> Any:
        recipe = resolve(None, {"model": "m", "data": "d", "train.gradient_checkpointing": value}).recipe
        return recipe.train.gradient_checkpointing

    assert parse(True) == "on" and parse(False) == "off" and parse("4") == 4
    with pytest.raises(RecipeError):
        parse(0)


def test_objective_decides_its_options_and_learning_rate() -> None:
    result = plan(60, **{"train.objective": "simpo", "train.gamma": 0.5})
    train = result.recipe.train
    assert (train.beta, train.gamma, train.label_smoothing, train.desirable_weight) == (2.0, 0.5, 0.0, None)
    assert "arXiv:2405.14734" in result.choices["train.beta"].why
    assert train.learning_rate == pytest.approx(0.01 * objective_base_rate(LLAMA_8B.parameters), rel=0.01)
    assert "0.01 of it for simpo" in result.choices["train.learning_rate"].why


def test_defaults_of_the_objective_of_a_written_recipe_are_left_out_for_another_objective(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(plan(60, **{"train.objective": "dpo"}).as_yaml(), encoding="utf-8")

    def plan_from_file(**options: Any) -> Resolved:
        return choose(resolve(file, options), machine(60), LLAMA_8B, "cpu", ("bf16", "measured"))

    result = plan_from_file(**{"train.objective": "ipo"})
    assert (result.recipe.train.beta, result.recipe.train.label_smoothing) == (0.1, None)
    assert result.choices["train.label_smoothing"].why == "objective ipo does not read it"
    assert any("train.length_normalized false: set by the recipe" in x for x in find_unusual_values(result, LLAMA_8B))
    assert plan_from_file(**{"train.objective": "sft"}).recipe.train.beta is None
    with pytest.raises(RecipeError, match="objective ipo does not read it"):
        plan_from_file(**{"train.objective": "ipo", "train.label_smoothing": 0.0})
    file.write_text(file.read_text(encoding="utf-8").replace("label_smoothing: 0.0", "label_smoothing: 0.1"))
    with pytest.raises(RecipeError, match="label_smoothing: objective ipo does not read it"):
        plan_from_file(**{"train.objective": "ipo"})
    file.write_text("{model: m, data: d, train: {objective: ipo, label_smoothing: 0.0}}")
    with pytest.raises(RecipeError, match="label_smoothing: objective ipo does not read it"):
        plan_from_file()


def test_both_answers_of_a_pair_are_in_one_micro_batch() -> None:
    options = {"data.max_length": 1024, "train.micro_batch_tokens": 1024}
    one, two = (plan(60, **options, **{"train.objective": name}) for name in ("sft", "dpo"))
    batches = [
        largest_micro_batch(result.recipe, Workload.from_recipe(result.recipe, LLAMA_8B)) for result in (one, two)
    ]
    assert [batch.tokens for batch in batches] == [1024, 2048]
    assert sum(number for number, _, _ in batches[1].documents) % 2 == 0
    usual = mean_micro_batch(two.recipe, [(100, 40)] * 16)
    assert sum(number for number, _, _ in usual.documents) == 10  # five pairs of 200 tokens


def test_rows_of_dpo_are_truncated_at_the_start_and_not_split() -> None:
    for free in (4 + n / 4 for n in range(20)):
        options = {"model": "m", "data": "d", "train.objective": "dpo", "model.placement": "replicated"}
        recipe = resolve(None, options)
        result = choose(recipe, machine(free), LLAMA_8B, "cpu", ("bf16", "measured")).recipe
        if result.data.max_length < 1024:
            assert result.data.overlong == "truncate-start"
            return
    raise AssertionError("no memory size lowers data.max_length")


def test_merge_is_measured_on_the_first_rows() -> None:
    assert EvaluationLoad.from_rows([*[(400, 400)] * 6, (900, 900)], 1024).measured == 400
    load = EvaluationLoad.from_rows([*[(400, 100)] * 20, (900, 100), (950, 100)], 1024)
    assert load.measured == 900 and load.longest == 950
    assert EvaluationLoad.from_rows([], 60).measured == 60


def test_rollouts_are_planned_at_their_maximum_length() -> None:
    """A group is in one micro-batch. Prompts that are too long are dropped, not truncated."""
    options = {"train.rewards": "exact", "train.group": 4, "train.answer_tokens": 100, "data.max_length": 60}
    result = plan(60, **options, **{"train.objective": "grpo", "train.micro_batch_tokens": 640, "train.batch_size": 3})
    batch = largest_micro_batch(result.recipe, Workload.from_recipe(result.recipe, LLAMA_8B))
    assert batch.tokens == 640 and sum(number for number, _, _ in batch.documents) == 4
    rollouts = RolloutLoad.from_recipe(result.recipe)
    assert rollouts == RolloutLoad(completions=12, group=4, prompt=60, answer=100)
    assert RolloutLoad.from_recipe(plan(60).recipe) is None
    desk = {"train.objective": "grpo", "train.environment": "desk.py:Desk", "train.turns": 3, "data.max_length": 400}
    traces = resolve(None, {"model": "m", "data": "d", **desk, "train.answer_tokens": 50, "train.group": 4}).recipe
    load = RolloutLoad.from_recipe(traces, 60)
    assert load is not None and (load.prompt, load.answer) == (60, 340)  # each trace may reach data.max_length
    assert longest_sequence(traces) == 400 and max_sampled_tokens(traces, 60) == 150
    assert max_sampled_tokens(traces, 300) == 100
    workload = Workload.from_recipe(result.recipe, LLAMA_8B)
    evaluation = EvaluationLoad.from_rows([], 60)
    planned = predict_phases(workload, batch, evaluation, 8 << 30, rollouts, dtype="bf16")
    assert list(planned) == ["load", "draw", "train", "evaluate", "merge", "export", "serve"]
    more = predict_phases(workload, batch, evaluation, 8 << 30, replace(rollouts, completions=24), dtype="bf16")
    assert planned["draw"].parts["saved_activations"] * 2 == more["draw"].parts["saved_activations"] > 0
    rate = Rate(1e12, 1e11, "a test")
    times = [rollout_seconds(workload, replace(rollouts, answer=answer), rate) for answer in (100, 200)]
    assert 0 < 1.8 * times[0] < times[1] < 2.2 * times[0]
    for free in (4 + n / 4 for n in range(20)):
        recipe = resolve(None, {"model": "m", "data": "d", "train.objective": "grpo", "train.rewards": "exact"})
        result = choose(recipe, machine(free), LLAMA_8B, "cpu", ("bf16", "measured"))
        assert result.recipe.data.overlong in ("refuse", "drop")


def on_gpu(gib: float, **options: Any) -> Resolved:
    recipe = resolve(None, {"model": "m", "data": "d", "model.quantization": "nf4", "lora.r": 16, **options})
    small = replace(machine(64), gpus=("a GPU, 1 MiB",), card_free_bytes=int(gib * GIB))
    return choose(recipe, small, LLAMA_8B, "cuda", ("bf16", "the GPU computes in bf16"))


def test_inputs_of_long_rows_are_offloaded_if_they_do_not_fit_on_the_gpu() -> None:
    field, long = "train.gradient_checkpointing", {"data.max_length": 32768}
    assert on_gpu(20, **long).recipe.train.gradient_checkpointing == "offload"
    result = on_gpu(16, **long)
    assert result.recipe.train.gradient_checkpointing == "offload" and result.recipe.data.max_length == 32768
    assert result.choices[field].origin == "plan" and "would not fit" in result.choices[field].why
    assert isinstance(on_gpu(40, **long).recipe.train.gradient_checkpointing, int)
    assert on_gpu(9, **long, **{field: "on"}).recipe.train.gradient_checkpointing == "on"
    checkpointed, offloaded = (
        Workload.from_recipe(on_gpu(60, **long, **{field: way}).recipe, LLAMA_8B) for way in ("on", "offload")
    )
    assert offloaded.compute.offload and not checkpointed.compute.offload
    assert offloaded.compute.checkpointed_layers == checkpointed.compute.checkpointed_layers == 32
    batch = largest_micro_batch(on_gpu(60, **long).recipe, checkpointed)
    inputs = batch.tokens * 4096 * 2
    assert offloaded_bytes(offloaded, batch) == 31 * inputs and offloaded_bytes(checkpointed, batch) == 0
    assert peak_live_bytes(checkpointed, batch).total - peak_live_bytes(offloaded, batch).total >= 30 * inputs
    slow_bus = Rate(1e18, 1e18, "none", attention_flops=1e18, gpu=True)  # only the transfer takes time
    assert micro_batch_seconds(offloaded, batch, slow_bus) == pytest.approx(2 * 31 * inputs / HOST_BYTES_PER_S)


def test_offloading_is_refused_on_a_cpu_and_in_the_plain_step() -> None:
    with pytest.raises(RecipeError, match=r"gradient_checkpointing offload: .*cpu"):
        plan(60, **{"train.gradient_checkpointing": "offload"})
    with pytest.raises(RecipeError, match="offload: offloading needs strop's fused kernels"):
        on_gpu(60, **{"train.gradient_checkpointing": "offload", "lora.modules_to_save": ["q_proj"]})
    key = memory_key(on_gpu(20).recipe, replace(machine(64), gpus=("a GPU, 1 MiB",)), LLAMA_8B)
    save_measured(key, {"recompute": True, "offload": True})
    assert on_gpu(20).recipe.train.gradient_checkpointing == "offload"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_cpu_plan_takes_the_fastest_micro_batch_size(quantization: str) -> None:
    shape, sizes = ModelShape.from_config(KNOWN["SmolLM2-135M"]), set()
    for free in (1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 8.0):

        def planned(free: float = free, **options: Any) -> Resolved:
            settings = {"data.max_length": 256, "model.quantization": quantization, **options}
            recipe = resolve(None, {"model": "m", "data": "d", **settings})
            return choose(recipe, machine(free), shape, "cpu", ("bf16", "measured"))

        def seconds(resolved: Resolved) -> float:
            workload, batch = Workload.from_recipe(resolved.recipe, shape), mean_micro_batch(resolved.recipe)
            return micro_batch_seconds(workload, batch, Rate.of_cpu(machine(1), None, "bf16")) / batch.tokens

        resolved = planned()
        sized = [planned(**{"train.micro_batch_tokens": size}) for size in (2048, 1024, 512, 256)]
        budget = MemoryBudget(shape, shape.parameters, usable_bytes(machine(free), "cpu"))
        optimizer = resolved.recipe.train.optimizer
        comparable = [plan for plan in sized if plan.recipe.train.optimizer == optimizer]
        fitting = [seconds(plan) for plan in comparable if budget.fits(plan.recipe)]
        assert seconds(resolved) <= 1.0001 * min(fitting)
        choice, size = resolved.choices["train.micro_batch_tokens"], resolved.recipe.train.micro_batch_tokens
        sizes.add(size)
        assert ("faster" in choice.why) == (size != 2048)
    if quantization == "nf4":  # each micro-batch dequantizes all weights, so small ones do not pay
        assert sizes <= {1024, 2048} if "amx_bf16" in vector_extensions() else sizes == {1024, 2048}
    else:
        assert len(sizes) > 1


def test_given_micro_batch_and_a_gpus_are_not_lowered_for_speed() -> None:
    options = {"data.max_length": 256, "train.micro_batch_tokens": 2048}
    assert plan(13, **options).recipe.train.micro_batch_tokens == 2048
    tight = on_gpu(8, **{"data.max_length": 256, "train.gradient_checkpointing": "auto"}).recipe.train
    assert tight.micro_batch_tokens == 2048 and tight.gradient_checkpointing != "off"


def test_start_adapter_decides_its_fields_and_conflicts_are_refused() -> None:
    adapter = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}

    def chosen(**options: Any) -> Resolved:
        recipe = resolve(None, {"model": "m", "data": "d", **options})
        return choose(recipe, machine(60), LLAMA_8B, "cpu", ("bf16", ""), adapter)

    assert Workload.from_recipe(chosen().recipe, LLAMA_8B).adapter.dropout
    assert not Workload.from_recipe(chosen(**{"lora.dropout": 0.0}).recipe, LLAMA_8B).adapter.dropout
    rewarded = chosen(**{"train.objective": "grpo", "train.rewards": "exact", "lora.init": "default"})
    choice = rewarded.choices["lora.dropout"]
    assert choice.value == 0 and "had 0.1" in choice.why
    for changed in ({"lora.init": "gaussian"}, {"lora.new_tokens": ["<x>"]}, {"lora.r": 4}):
        with pytest.raises(RecipeError, match="adapter to start from"):
            chosen(**changed)
