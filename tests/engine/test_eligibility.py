"""The step that a plan announces from the config is the step that training uses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import AutoConfig

from strop.config.load import resolve
from strop.engine.eligibility import DROPOUT_FIELDS, rope_types, why_config_not_fast
from strop.engine.step import step_for
from strop.engine.train.eligibility import why_not_fast
from strop.models.introspect import shape_from_model
from strop.models.lora import add_lora
from strop.planning.workload import why_recipe_not_fast
from tests.support.families import tokenizer
from tests.support.random_models import FAMILY_CONFIGS, adapted, tiny_of

LORA_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"lora.target_modules": ["attention"], "lora.use_dora": True},
    "biases": {"lora.bias": "all"},
    "new tokens": {"lora.new_tokens": ["<a>", "<b>"]},
    "adapter on the head": {"lora.target_modules": ["attention", "lm_head"]},
    "dora on the head": {"lora.target_modules": ["attention", "lm_head"], "lora.use_dora": True},
}


def planned_and_actual(family: str, options: dict[str, Any], **changes: Any) -> tuple[str | None, str | None]:
    """Return why the plan expects the plain step, and why training uses it."""
    model = tiny_of(family, **changes)
    config = model.config.to_dict()
    settings = {"model": "m", "data": "d", "lora.r": 2, "lora.alpha": 4, "model.device": "cpu", "model.dtype": "fp32"}
    recipe = resolve(None, {**settings, **options}).recipe
    planned = why_recipe_not_fast(recipe, shape_from_model(config, config, model))
    vocabulary = copy.deepcopy(tokenizer("chatml")) if recipe.lora.new_tokens else None
    return planned, why_not_fast(add_lora(model.requires_grad_(False), recipe.lora, vocabulary).train())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("options", LORA_OPTIONS.values(), ids=LORA_OPTIONS)
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_plan_and_training_choose_the_same_step(family: str, options: dict[str, Any]) -> None:
    if family == "phi" and "lora.new_tokens" in options:
        pytest.skip("new tokens are refused on a head with a bias")
    planned, actual = planned_and_actual(family, options)
    assert (planned is None) == (actual is None), (planned, actual)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_plan_and_training_know_the_default_dropout_of_each_family(family: str) -> None:
    """Seed-OSS has attention dropout 0.1 unless its config sets another rate."""
    default = AutoConfig.for_model(family)
    rates = {field: getattr(default, field) for field in DROPOUT_FIELDS if hasattr(default, field)}
    planned, actual = planned_and_actual(family, {}, **rates)
    assert planned == actual
    assert (planned is not None) == any(rates.values())
    assert family != "seed_oss" or planned == "attention_dropout above 0"


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt_neox", {"hidden_dropout": 0.1}, "hidden_dropout"),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.5}, "balances experts"),
        ("olmoe", {"clip_qkv": 2.0}, "clip_qkv"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type dynamic"),
        ("granitemoehybrid", {"num_local_experts": 4}, "experts next to the MLP"),
    ],
)
def test_plan_and_training_give_the_same_reason(family: str, changes: dict[str, Any], reason: str) -> None:
    planned, actual = planned_and_actual(family, {}, **changes)
    assert planned == actual and reason in str(planned)


def test_plain_step_carries_the_reason_of_the_plan() -> None:
    step = step_for(adapted("seed_oss", attention_dropout=0.1))
    assert (step.name, step.why) == ("plain", "attention_dropout above 0")


def test_unknown_family_uses_the_plain_step() -> None:
    assert "gpt2" in str(why_config_not_fast({"model_type": "gpt2"}))


@pytest.mark.parametrize(
    ("config", "types"),
    [
        ({"rope_scaling": None}, []),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic"]),
        ({"model_type": "phi3", "rope_scaling": {"type": "su"}}, ["longrope"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_type": "default"}}},
         ["yarn", "default"]),
    ],
)  # fmt: skip
def test_rope_types_are_read_from_old_and_new_configs(config: dict[str, Any], types: list[str]) -> None:
    assert rope_types(config) == types
