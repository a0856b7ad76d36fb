"""What the plan decides about storage, memory and rates, on machines of other sizes than this one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from strop.config.load import Resolved, resolve
from strop.errors import RecipeError
from strop.machine.memory import save_measured
from strop.machine.probe import Machine, vector_extensions
from strop.models.families.shape import ModelShape
from strop.planning.activations import KEEP_PAIRS, at_peak, offloaded_bytes
from strop.planning.choose import choose, memory_key, usable_bytes
from strop.planning.compare import KNOWN
from strop.planning.largest import Room
from strop.planning.learning_rate import learning_rate, whole
from strop.planning.memory import Drawn
from strop.planning.microbatch import largest_micro_batch, usual_micro_batch
from strop.planning.phases import Asked, phases
from strop.planning.time import HOST_BYTES_PER_S, Rate, drawing_seconds, micro_batch_seconds
from strop.planning.workload import Setting

GIB = 1 << 30
LLAMA_8B = ModelShape.from_config(KNOWN["Llama-3.1-8B"])


def machine(free: float, gpus: tuple[str, ...] = ()) -> Machine:
    return Machine("Linux", "3.11", "a CPU", (), 8, int(64 * GIB), int(free * GIB), gpus)


def plan(free: float, prequantized: str | None = None, **options: Any) -> Resolved:
    recipe = resolve(None, {"model": "m", "data": "d", "train.micro_batch_tokens": 1024, **options})
    shape = replace(LLAMA_8B, prequantized=prequantized)
    return choose(recipe, machine(free), shape, "cpu", ("bf16", "measured"))


def test_auto_quantizes_where_16_bit_would_not_fit() -> None:
    assert plan(60, **{"model.quantization": "auto"}).recipe.model.quantization == "none"
    tight = plan(12, **{"model.quantization": "auto"})
    assert tight.recipe.model.quantization == "nf4" and "would not fit" in tight.choices["model.quantization"].why
    assert plan(60, "int8", **{"model.quantization": "auto"}).recipe.model.quantization == "int8"


def test_the_default_gives_way_only_where_16_bit_does_not_fit_at_all() -> None:
    assert plan(60).choices["model.quantization"].origin == "default"
    assert plan(12).recipe.model.quantization == "nf4"
    assert plan(12, **{"model.quantization": "none"}).recipe.model.quantization == "none"
    assert plan(12, preset="max-quality", **{"train.micro_batch_tokens": None}).recipe.model.quantization == "none"


def test_as_many_layers_are_resident_as_fit() -> None:
    counts = [plan(free, **{"model.quantization": "nf4"}).recipe.model.resident_layers for free in (9, 14, 20, 60)]
    assert counts[0] == 0 and counts[-1] == 32 and 0 < counts[1] < counts[2] < 32  # type: ignore[operator]
    assert plan(60, **{"model.quantization": "nf4", "model.resident_layers": 3}).recipe.model.resident_layers == 3
    assert plan(60).recipe.model.resident_layers is None


def test_resident_layers_of_a_base_in_16_bit_are_refused() -> None:
    with pytest.raises(RecipeError, match="16 bit"):
        plan(60, **{"model.resident_layers": 3})
    assert plan(12, **{"model.resident_layers": 3}).recipe.model.resident_layers == 3  # nf4 by the plan


def test_streamed_weights_leave_room_for_activations() -> None:
    """At 14 GiB the 16-bit weights alone would ask for checkpointing, and more."""
    streamed = plan(14, **{"model.quantization": "nf4"}).recipe
    assert streamed.train.gradient_checkpointing == "off"
    assert plan(14, **{"model.quantization": "none"}).recipe.train.gradient_checkpointing == "on"


def test_only_as_many_layers_are_computed_again_as_must_be() -> None:
    counts = []
    for free in (9, 10, 11):
        chosen = plan(free, **{"model.quantization": "nf4"})
        counts.append(chosen.recipe.train.gradient_checkpointing)
        assert "would not fit" in chosen.choices["train.gradient_checkpointing"].why or counts[-1] == "off"
    assert isinstance(counts[0], int) and isinstance(counts[1], int) and 32 > counts[0] > counts[1], counts


def test_the_largest_micro_batch_is_full_and_of_the_rows_that_need_most() -> None:
    recipe = plan(60, **{"train.micro_batch_tokens": 2048, "data.max_length": 1100}).recipe
    setting = Setting.of(recipe, LLAMA_8B)
    found = largest_micro_batch(recipe, setting)
    assert found.tokens == 2048
    for length in (2, 100, KEEP_PAIRS, 700, 1000, 1100):
        rows = usual_micro_batch(recipe, [(length, length - 1)] * 8)
        assert at_peak(setting, rows).total <= at_peak(setting, found).total, length
    alone = plan(60, **{"train.batch_size": 1, "data.max_length": 1100}).recipe
    assert largest_micro_batch(alone, setting).tokens <= 1100


def test_a_presets_rows_at_once_give_way_and_a_persons_do_not() -> None:
    options = {"train.micro_batch_tokens": None, "data.max_length": 4096}
    roomy, tight = (plan(free, preset="balanced", **options) for free in (60, 9))
    fewer = tight.choices["train.micro_batch"]
    assert roomy.recipe.train.micro_batch == 4 and roomy.choices["train.micro_batch"].origin == "preset"
    assert fewer.value in (1, 2) and fewer.origin == "plan" and "would not fit" in fewer.why
    assert tight.recipe.train.batch_size == 8
    asked = plan(9, preset="balanced", **{**options, "train.micro_batch": 4})
    assert asked.recipe.train.micro_batch == 4


def test_last_resorts_are_taken_only_where_they_make_it_fit_and_nobody_asked() -> None:
    open_ = {"train.micro_batch_tokens": None}
    assert plan(8.5, **open_).choices["train.optimizer"].origin == "default"
    assert plan(7.6, **open_).recipe.train.optimizer == "adamw_8bit"
    shorter = plan(7.35, **open_).recipe
    assert shorter.data.max_length < 1024 and shorter.data.overlong == "split", shorter
    assert plan(7.35, **{**open_, "data.max_length": 1024}).recipe.data.max_length == 1024
    assert plan(3, **open_).recipe.train.optimizer == "adamw"


def test_what_ran_out_of_memory_once_is_remembered() -> None:
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
    assert chosen(**{"train.micro_batch_tokens": 1024}).recipe.train.micro_batch_tokens == 1024  # as a person asks
    assert chosen(**{"lora.r": 64}).recipe.train.micro_batch_tokens == 2048
    save_measured(
        memory_key(plan(60, **{"model.quantization": "nf4"}).recipe, machine(60), LLAMA_8B), {"streamed": True}
    )
    assert plan(60, **{"model.quantization": "nf4"}).recipe.model.resident_layers == 0


def test_the_memory_that_counts_is_that_of_the_device() -> None:
    with_card = machine(60, ("a card, 8192 MiB",))
    assert usable_bytes(with_card, "cuda") < 8 * GIB < usable_bytes(with_card, "cpu")
    assert usable_bytes(replace(with_card, gpu_free_bytes=3 * GIB), "cuda:1") == int(0.95 * 3 * GIB)
    recipe = resolve(None, {"model": "m", "data": "d"})
    assert choose(recipe, with_card, LLAMA_8B, "cuda", ("bf16", "")).recipe.model.quantization == "nf4"


def test_a_card_is_kept_busy_where_memory_allows() -> None:
    """As many tokens at once as fit with nothing computed again, and as a step has; a CPU keeps its cache."""

    def tokens(memory: str, device: str = "cuda", **options: Any) -> int | None:
        recipe = resolve(None, {"model": "m", "data": "d", "model.quantization": "none", **options})
        found = choose(recipe, machine(200, (memory,)), LLAMA_8B, device, ("bf16", ""))
        return found.recipe.train.micro_batch_tokens

    assert tokens("a card, 81559 MiB") == 8192 and tokens("a card, 200000 MiB", **{"train.batch_size": 64}) == 16384
    assert tokens("a card, 36000 MiB") == 4096 and tokens("a card, 24564 MiB") == 2048
    assert tokens("a card, 81559 MiB", "cpu") == 2048
    assert tokens("a card, 81559 MiB", **{"train.micro_batch_tokens": 1024}) == 1024


def test_what_ran_out_while_others_had_the_memory_is_tried_again() -> None:
    open_recipe = resolve(None, {"model": "m", "data": "d"})

    def tokens() -> int | None:
        return choose(open_recipe, machine(60), LLAMA_8B, "cpu", ("bf16", "")).recipe.train.micro_batch_tokens

    chosen = choose(open_recipe, machine(60), LLAMA_8B, "cpu", ("bf16", "")).recipe
    for usable, expected in ((4, 2048), (54, 512)):
        shape = {"micro_batch_tokens": 512, "usable_bytes": usable * GIB}
        save_measured(memory_key(chosen, machine(60), LLAMA_8B), shape)
        assert tokens() == expected


def test_rates_by_size_and_optimizer() -> None:
    assert learning_rate(7_000_000_000) == 2e-4
    assert plan(60).recipe.train.learning_rate == 2e-4
    lion = plan(60, **{"train.optimizer": "lion"})
    assert lion.recipe.train.learning_rate == 4e-5 and "lion" in lion.choices["train.learning_rate"].why
    with pytest.raises(RecipeError, match="no rule"):
        plan(60, **{"train.optimizer": "sgd"})
    assert plan(60, **{"train.optimizer": "sgd", "train.learning_rate": 0.1}).recipe.train.learning_rate == 0.1


@pytest.mark.parametrize(("preset", "scheme"), [("low-memory", "nf4"), ("balanced", "nf4"), ("max-quality", "none")])
def test_presets_name_their_quantization(preset: str, scheme: str) -> None:
    resolved = plan(60, preset=preset, **{"train.micro_batch_tokens": None})
    assert resolved.recipe.model.quantization == scheme
    assert all(choice.why for choice in resolved.choices.values() if choice.origin == "plan")


def test_a_bare_on_in_yaml_is_not_one_layer() -> None:
    def asked(value: Any) -> Any:
        return resolve(None, {"model": "m", "data": "d", "train.gradient_checkpointing": value}).recipe

    assert asked(True).train.gradient_checkpointing == "on" and asked(False).train.gradient_checkpointing == "off"
    assert asked("4").train.gradient_checkpointing == 4
    with pytest.raises(RecipeError):
        asked(0)


def test_an_objective_brings_its_options_and_a_share_of_the_rate() -> None:
    found = plan(60, **{"train.objective": "simpo", "train.gamma": 0.5})
    train = found.recipe.train
    assert (train.beta, train.gamma, train.label_smoothing, train.desirable_weight) == (2.0, 0.5, 0.0, None)
    assert "arXiv:2405.14734" in found.choices["train.beta"].why
    assert train.learning_rate == pytest.approx(0.01 * whole(LLAMA_8B.parameters), rel=0.01)
    assert "0.01 of it for simpo" in found.choices["train.learning_rate"].why


def test_a_pair_is_two_rows_of_a_micro_batch_that_are_never_parted() -> None:
    """The memory of two answers is planned where one row alone would fit the budget."""
    options = {"data.max_length": 1024, "train.micro_batch_tokens": 1024}
    one, two = (plan(60, **options, **{"train.objective": name}) for name in ("sft", "dpo"))
    batches = [largest_micro_batch(found.recipe, Setting.of(found.recipe, LLAMA_8B)) for found in (one, two)]
    assert [batch.tokens for batch in batches] == [1024, 2048]
    assert sum(number for number, _, _ in batches[1].documents) % 2 == 0
    usual = usual_micro_batch(two.recipe, [(100, 40)] * 16)
    assert sum(number for number, _, _ in usual.documents) == 10  # five pairs of 200 tokens


def test_rows_are_made_shorter_by_their_start_where_answers_are_compared() -> None:
    """sft may split them; an answer that is compared cannot be."""
    for free in (4 + n / 4 for n in range(20)):
        recipe = resolve(None, {"model": "m", "data": "d", "train.objective": "dpo"})
        found = choose(recipe, machine(free), LLAMA_8B, "cpu", ("bf16", "measured")).recipe
        if found.data.max_length < 1024:
            assert found.data.overlong == "truncate-start"
            return
    raise AssertionError("no size at which rows are made shorter")


def test_a_merge_is_measured_on_the_first_rows() -> None:
    """What they begin with alike counts once, so that more rows are read than their tokens say."""
    assert Asked.of([*[(400, 400)] * 6, (900, 900)], 1024).measured == 400
    asked = Asked.of([*[(400, 100)] * 20, (900, 100), (950, 100)], 1024)
    assert asked.measured == 900 and asked.longest == 950
    assert Asked.of([], 60).measured == 60


def test_drawn_answers_are_planned_at_their_longest() -> None:
    """A group is one unit of a micro-batch; prompts that are too long are dropped, never cut."""
    options = {"train.rewards": "exact", "train.group": 4, "train.answer_tokens": 100, "data.max_length": 60}
    found = plan(60, **options, **{"train.objective": "grpo", "train.micro_batch_tokens": 640, "train.batch_size": 3})
    batch = largest_micro_batch(found.recipe, Setting.of(found.recipe, LLAMA_8B))
    assert batch.tokens == 640 and sum(number for number, _, _ in batch.documents) == 4
    drawn = Drawn.of(found.recipe)
    assert drawn == Drawn(texts=12, group=4, prompt=60, answer=100) and Drawn.of(plan(60).recipe) is None
    setting = Setting.of(found.recipe, LLAMA_8B)
    asked = Asked.of([], 60)
    made = phases(setting, batch, asked, 8 << 30, drawn, dtype="bf16")
    assert list(made) == ["load", "draw", "train", "evaluate", "merge", "export", "serve"]
    more = phases(setting, batch, asked, 8 << 30, replace(drawn, texts=24), dtype="bf16")
    assert made["draw"].parts["saved_activations"] * 2 == more["draw"].parts["saved_activations"] > 0
    rate = Rate(1e12, 1e11, "a test")
    times = [drawing_seconds(setting, replace(drawn, answer=answer), rate) for answer in (100, 200)]
    assert 0 < 1.8 * times[0] < times[1] < 2.2 * times[0]
    for free in (4 + n / 4 for n in range(20)):
        recipe = resolve(None, {"model": "m", "data": "d", "train.objective": "grpo", "train.rewards": "exact"})
        found = choose(recipe, machine(free), LLAMA_8B, "cpu", ("bf16", "measured"))
        assert found.recipe.data.overlong in ("refuse", "drop")


def on_card(gib: float, **options: Any) -> Resolved:
    recipe = resolve(None, {"model": "m", "data": "d", "model.quantization": "nf4", "lora.r": 16, **options})
    small = replace(machine(64), gpus=("a card, 1 MiB",), gpu_free_bytes=int(gib * GIB))
    return choose(recipe, small, LLAMA_8B, "cuda", ("bf16", "the card computes in bf16"))


def test_inputs_wait_in_the_host_s_memory_where_a_card_has_no_room_for_them() -> None:
    """Of long rows, before they are cut: with all layers computed again their inputs are most of it."""
    field, long = "train.gradient_checkpointing", {"data.max_length": 32768}
    assert on_card(20, **long).recipe.train.gradient_checkpointing == "offload"
    found = on_card(16, **long)
    assert found.recipe.train.gradient_checkpointing == "offload" and found.recipe.data.max_length == 32768
    assert found.choices[field].origin == "plan" and "would not fit" in found.choices[field].why
    assert isinstance(on_card(40, **long).recipe.train.gradient_checkpointing, int)
    assert on_card(9, **long, **{field: "on"}).recipe.train.gradient_checkpointing == "on"
    kept, away = (Setting.of(on_card(60, **long, **{field: way}).recipe, LLAMA_8B) for way in ("on", "offload"))
    assert away.offload and not kept.offload and away.checkpoint_layers == kept.checkpoint_layers == 32
    batch = largest_micro_batch(on_card(60, **long).recipe, kept)
    inputs = batch.tokens * 4096 * 2
    assert offloaded_bytes(away, batch) == 31 * inputs and offloaded_bytes(kept, batch) == 0
    assert at_peak(kept, batch).total - at_peak(away, batch).total >= 30 * inputs
    slow = Rate(1e18, 1e18, "none", peak=True)  # all time is the bus's
    assert micro_batch_seconds(away, batch, slow) == pytest.approx(2 * 31 * inputs / HOST_BYTES_PER_S)


def test_inputs_wait_only_where_something_is_gained() -> None:
    with pytest.raises(RecipeError, match="offload: nothing is gained on cpu"):
        plan(60, **{"train.gradient_checkpointing": "offload"})
    with pytest.raises(RecipeError, match="the plain step cannot"):
        on_card(60, **{"train.gradient_checkpointing": "offload", "lora.modules_to_save": ["q_proj"]})
    key = memory_key(on_card(20).recipe, replace(machine(64), gpus=("a card, 1 MiB",)), LLAMA_8B)
    save_measured(key, {"recompute": True, "offload": True})
    assert on_card(20).recipe.train.gradient_checkpointing == "offload"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_fewer_tokens_at_once_where_that_is_faster_than_computing_again(quantization: str) -> None:
    """Of all numbers of tokens at once, each with as much kept as fits, a CPU's plan takes the fastest."""
    shape, sizes = ModelShape.from_config(KNOWN["SmolLM2-135M"]), set()
    for free in (1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 8.0):

        def planned(free: float = free, **options: Any) -> Resolved:
            given = {"data.max_length": 256, "model.quantization": quantization, **options}
            recipe = resolve(None, {"model": "m", "data": "d", **given})
            return choose(recipe, machine(free), shape, "cpu", ("bf16", "measured"))

        def seconds(found: Resolved) -> float:
            setting, batch = Setting.of(found.recipe, shape), usual_micro_batch(found.recipe)
            return micro_batch_seconds(setting, batch, Rate.of_cpu(machine(1), None, "bf16")) / batch.tokens

        found = planned()
        others = {size: planned(**{"train.micro_batch_tokens": size}) for size in (2048, 1024, 512, 256)}
        room = Room(shape, shape.parameters, usable_bytes(machine(free), "cpu"))
        alike = [one for one in others.values() if one.recipe.train.optimizer == found.recipe.train.optimizer]
        fitting = [seconds(one) for one in alike if room.fits(one.recipe)]
        assert seconds(found) <= 1.0001 * min(fitting)
        choice, size = found.choices["train.micro_batch_tokens"], found.recipe.train.micro_batch_tokens
        sizes.add(size)
        assert ("faster" in choice.why) == (size != 2048)
    if quantization == "nf4" and "amx_bf16" in vector_extensions():  # the rates of this CPU enter; so at 078e0e2 too
        assert sizes <= {1024, 2048}
    else:
        assert (
            sizes == {1024, 2048} if quantization == "nf4" else len(sizes) > 1
        )  # small pieces unpack all weights again


def test_a_card_and_a_number_that_was_asked_for_stay() -> None:
    options = {"data.max_length": 256, "train.micro_batch_tokens": 2048}
    assert plan(13, **options).recipe.train.micro_batch_tokens == 2048
    tight = on_card(8, **{"data.max_length": 256, "train.gradient_checkpointing": "auto"}).recipe.train
    assert tight.micro_batch_tokens == 2048 and tight.gradient_checkpointing != "off"


def test_dropout_of_an_adapter_to_start_from_counts_and_what_is_given_stays() -> None:
    adapter = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}

    def chosen(**options: Any) -> Resolved:
        recipe = resolve(None, {"model": "m", "data": "d", **options})
        return choose(recipe, machine(60), LLAMA_8B, "cpu", ("bf16", ""), adapter)

    assert Setting.of(chosen().recipe, LLAMA_8B).dropout
    assert not Setting.of(chosen(**{"lora.dropout": 0.0}).recipe, LLAMA_8B).dropout
    rewarded = chosen(**{"train.objective": "grpo", "train.rewards": "exact", "lora.init": "default"})
    choice = rewarded.choices["lora.dropout"]
    assert choice.value == 0 and "had 0.1" in choice.why
    for given in ({"lora.init": "gaussian"}, {"lora.new_tokens": ["<x>"]}, {"lora.r": 4}):
        with pytest.raises(RecipeError, match="the adapter to start from has"):
            chosen(**given)
