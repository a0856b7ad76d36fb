"""The plan's workload of a recipe agrees with the model that training builds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import strop
from strop.config.load import resolve
from strop.config.schema import LoraSection
from strop.engine.step import step_for
from strop.engine.train.eligibility import why_not_fast
from strop.errors import ModelError
from strop.models.families.shape import ModelShape
from strop.models.introspect import shape_from_model
from strop.models.lora import add_lora
from strop.planning.workload import Workload, why_recipe_not_fast
from tests.support.families import tokenizer
from tests.support.random_models import FAMILY_CONFIGS, adapted, tiny_of


def test_plan_and_engine_agree_that_variants_of_known_families_need_the_plain_step() -> None:
    recipe = resolve(None, {"model": "m", "data": "d", "model.device": "cpu", "model.dtype": "fp32"}).recipe
    for family, more in (
        ("granitemoehybrid", {"num_local_experts": 4}),
        ("gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}),
    ):
        config = tiny_of(family, **more).config.to_dict()
        shape = shape_from_model(config, config, tiny_of(family, **more))
        assert why_recipe_not_fast(recipe, shape) == "experts next to the MLP", family
        assert "experts next to the MLP" in str(why_not_fast(adapted(family, **more))), family
    on_gpu = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cuda"})})
    for family in ("gemma2", "gemma4_text", "gpt_oss"):
        config = tiny_of(family).config.to_dict()
        shape = shape_from_model(config, config, tiny_of(family))
        assert why_recipe_not_fast(recipe, shape) is why_recipe_not_fast(on_gpu, shape) is None, family


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_trained_biases_are_counted_and_keep_the_fast_step(family: str, bias: str) -> None:
    model = adapted(family, {"bias": bias})
    config = model.get_base_model().config.to_dict()
    options = {"lora.r": 3, "lora.bias": bias, "model.device": "cpu", "model.dtype": "fp32"}
    recipe = resolve(None, {"model": "m", "data": "d", **options}).recipe
    workload = Workload.from_recipe(recipe, shape_from_model(config, config, tiny_of(family)))
    assert workload.adapter_weights == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert workload.compute.step == step_for(model).name


HEAD = {"lora.target_modules": ["q_proj", "lm_head"]}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("family", "options", "step"),
    [
        ("llama", {"lora.use_dora": True, "lora.dropout": 0.1}, "fast"),
        ("llama", HEAD, "fast"),
        ("llama", HEAD | {"lora.dropout": 0.1, "lora.rank_pattern": {"lm_head": 2}}, "fast"),
        ("gemma2", HEAD, "fast"),
        ("llama", HEAD | {"lora.use_dora": True}, "plain"),
        ("gemma2", HEAD | {"lora.new_tokens": ["<a>", "<b>"]}, "plain"),
        ("llama", {"lora.modules_to_save": ["lm_head"]}, "fast"),
        ("llama", {"lora.modules_to_save": ["embed_tokens", "lm_head"]}, "fast"),
        ("llama", {"lora.modules_to_save": ["input_layernorm", "model.norm"]}, "fast"),
        (
            "qwen3",
            {"lora.modules_to_save": ["norm"]},
            "fast",
        ),  # matches all modules whose names end with it, as in peft
        ("qwen3", {"lora.modules_to_save": ["q_norm", "post_attention_layernorm"]}, "fast"),
        ("gemma2", {"lora.modules_to_save": ["pre_feedforward_layernorm"]}, "fast"),
        ("llama", {"lora.modules_to_save": ["v_proj"], "lora.target_modules": ["q_proj"]}, "plain"),
        ("llama", {"lora.modules_to_save": ["layers.0.self_attn.k_proj", "norm"], **HEAD}, "plain"),
        ("llama", {"lora.modules_to_save": ["mlp"]}, "plain"),  # with all modules in it, which then have no adapters
        ("qwen2", {"lora.modules_to_save": ["k_proj", "layers.0.mlp"]}, "plain"),
        ("llama", {"lora.rank_pattern": {"layers.1.self_attn.q_proj": 7}}, "fast"),
        ("llama", {"lora.rank_pattern": {r"layers\.0\..*": 1}, "lora.use_dora": True}, "fast"),
    ],
)
def test_plan_predicts_the_step_and_the_number_of_trained_weights(
    family: str, options: dict[str, Any], step: str
) -> None:
    model = tiny_of(family, tie_word_embeddings=family == "gemma2").requires_grad_(False)
    settings = {"model": "m", "data": "d", "lora.r": 3, "lora.alpha": 6, "model.device": "cpu", "model.dtype": "fp32"}
    recipe = resolve(None, {**settings, **options}).recipe
    workload = Workload.from_recipe(recipe, ModelShape.from_config(model.config.to_dict()))
    text_tokenizer = copy.deepcopy(tokenizer("chatml")) if recipe.lora.new_tokens else None
    adapted = add_lora(model, recipe.lora, text_tokenizer).train()
    assert workload.compute.step == step_for(adapted).name == step
    if text_tokenizer is None:  # its vocabulary is larger than this model's
        assert workload.adapter_weights == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_weights_of_a_mixture_with_dense_layers_are_counted_exactly(tmp_path: Path) -> None:
    """A third of the layers has experts, so that no mean per layer is a whole number."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 3, "num_experts": 8, "decoder_sparse_step": 2, "vocab_size": 100, "head_dim": 16}
    config = Qwen3MoeConfig(**sizes)
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    adapted = add_lora(model, LoraSection(r=16, alpha=32), None)
    plan = strop.plan(model=str(tmp_path), lora={"r": 16})
    assert plan.as_json()["trainable_parameters"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_that_matches_no_adapter_is_refused(field: str, tiny_folder: Path) -> None:
    for pattern in ("k_proj", "layers.2.self_attn.q_proj"):  # the model has two layers
        options = {"lora.target_modules": ["q_proj"], f"lora.{field}": {pattern: 4}}
        with pytest.raises(ModelError, match=f"lora.{field}: {pattern}"):
            strop.plan(model=str(tiny_folder), **options)
    assert strop.plan(model=str(tiny_folder), **{f"lora.{field}": {"layers.1.self_attn.q_proj": 4}}).fits
