"""DoRA with dropout, adapters on the output head, and fully trained modules, in the fast and the plain step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from strop.engine.step import step_for
from strop.engine.train.eligibility import why_not_fast
from strop.engine.train.fast import FastLoss
from strop.engine.train.plain import PlainLoss
from strop.models.lora import cast_trainable_to_fp32, patch_lora_forward
from tests.engine.train.test_fast import (
    answers,
    assert_same,
    assert_same_trajectory,
    attentive,
    some,
    step,
    with_prefix,
    with_prefixes,
)
from tests.support.random_models import adapted, example

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias"),
]
HEAD = ["q_proj", "down_proj", "lm_head"]
UNTIED = {"tie_word_embeddings": False}


def variant(family: str, lora: dict[str, Any], **changes: Any) -> Callable[..., PeftModel]:
    def build(**more: Any) -> PeftModel:
        model = adapted(family, lora, **changes, **more).train()
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_" not in name:
                weight.data += 0.1 * torch.randn_like(weight)  # no longer equal to the base
        return model

    return build


VARIANTS = {
    "dora, dropout": variant("llama", {"use_dora": True, "lora_dropout": 0.25}),
    "dora, dropout, biases": variant("qwen2", {"use_dora": True, "lora_dropout": 0.25, "bias": "all"}),
    "adapter on the head": variant("llama", {"target_modules": HEAD}, **UNTIED),
    "adapter on a tied head": variant("llama", {"target_modules": HEAD}, tie_word_embeddings=True),
    "adapter on the head alone": variant("llama", {"target_modules": ["lm_head"]}, **UNTIED),
    "adapter on a head with a bias": variant("phi", {"target_modules": [*HEAD[2:], "fc2"]}, **UNTIED),
    "adapter on a bent head, dropout": variant("gemma2", {"target_modules": HEAD, "lora_dropout": 0.25}, **UNTIED),
    "adapter on a scaled head, dropout": variant("granite", {"target_modules": HEAD, "lora_dropout": 0.25}),
    "head in full": variant("llama", {"modules_to_save": ["lm_head"]}, **UNTIED),
    "head with a bias in full": variant("phi", {"modules_to_save": ["lm_head"]}, **UNTIED),
    "embedding in full": variant("llama", {"modules_to_save": ["embed_tokens"]}, **UNTIED),
    "embedding and head in full": variant("gemma2", {"modules_to_save": ["embed_tokens", "lm_head"]}, **UNTIED),
    "multiplied embedding in full": variant("granite", {"modules_to_save": ["embed_tokens"]}, **UNTIED),
    "norms in full": variant("llama", {"modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "a norm in front of few adapters": variant(
        "llama", {"modules_to_save": ["input_layernorm", "post_attention_layernorm"], "target_modules": ["down_proj"]}
    ),
    "norms that are differences from 1": variant(
        "gemma2", {"modules_to_save": ["pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"]}
    ),
    "norms of q and k": variant("qwen3", {"modules_to_save": ["q_norm", "k_norm"]}),
    "norm of k": variant("qwen3", {"modules_to_save": ["k_norm"]}),
    "norms of all of q and k": variant("olmo2", {"modules_to_save": ["q_norm", "k_norm", "post_attention_layernorm"]}),
    "norms behind turning": variant("hunyuan_v1_dense", {"modules_to_save": ["query_layernorm", "key_layernorm"]}),
    "one norm for both blocks": variant("cohere", {"modules_to_save": ["input_layernorm", "norm"]}),
    "layer norms in full": variant("starcoder2", {"modules_to_save": ["input_layernorm", "norm"]}),
    "all biases": variant("phi", {"bias": "all"}),
    "all biases, two norms": variant("stablelm", {"bias": "all"}, use_parallel_residual=False),
    "all of it": variant(
        "llama", {"modules_to_save": ["embed_tokens", "lm_head", "norm"], "use_dora": True, "lora_dropout": 0.1},
        **UNTIED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_the_plain_step(name: str) -> None:
    model = VARIANTS[name]()
    assert why_not_fast(model) is None
    for examples in (some(), with_prefix(some(weighted=True)), with_prefixes(some(weighted=True))):
        expected = step(model, PlainLoss(model), examples)
        assert_same(step(model, FastLoss(model), examples), expected)
        assert_same(step(model, FastLoss(model, checkpoint_layers=1), examples), expected)
        assert_same(step(model, FastLoss(model, prefix_sharing=False), examples), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_log_probs_of_variants_equal_the_plain_step(name: str) -> None:
    model = VARIANTS[name]()
    rows = [*answers((20, 1), (3, 3), (9, 4), alike=3), *answers((20, 1))]
    fast, plain = FastLoss(model, checkpoint_layers=1), PlainLoss(model)
    for kind in ("log_probs", "token_log_probs"):
        with torch.no_grad():
            length = len(getattr(fast, kind)(rows))
        upstream = torch.linspace(-1, 2, length, dtype=torch.float64)

        def loss(one: Any, kind: str = kind, upstream: torch.Tensor = upstream) -> Any:
            return lambda examples: (getattr(one, kind)(examples) * upstream).sum().float()

        assert_same(step(model, loss(fast), rows), step(model, loss(plain), rows))


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_trajectory_equals_the_plain_step(name: str) -> None:
    assert_same_trajectory(VARIANTS[name], 20)


@pytest.mark.parametrize("name", VARIANTS)
def test_evaluation_and_disabled_adapters_equal_the_plain_step(name: str) -> None:
    """With disabled adapters, fully trained modules have their base weights."""
    model = attentive(VARIANTS[name]())
    fast, plain = FastLoss(model), PlainLoss(model)
    rows = answers((20, 1), (3, 3))
    model.eval()
    with torch.no_grad():
        tuned = plain.token_loss(rows)
        torch.testing.assert_close(fast.token_loss(rows), tuned, rtol=1e-5, atol=0)
        with model.disable_adapter():
            base = plain.token_loss(rows)
            torch.testing.assert_close(fast.token_loss(rows), base, rtol=1e-5, atol=0)
            torch.testing.assert_close(fast.log_probs(rows), plain.log_probs(rows), rtol=1e-5, atol=0)
        torch.testing.assert_close(fast.token_loss(rows), tuned, rtol=1e-5, atol=0)
    assert abs(tuned - base) > 1e-4
    trained = step(model, fast, rows)
    assert_same(trained, step(model, plain, rows))  # they are trained again


# LayerNorm does not support an fp32 bias with bf16 weights
IN_BF16 = [name for name in VARIANTS if "biases" not in name]


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_error_of_variants_is_close_to_the_plain_steps(name: str) -> None:
    """Errors of eight batches are summed, because those of a single batch vary.

    peft computes fully trained modules and DoRA in fp32; the fast step uses bf16 matmuls and sums over rows in fp32.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 64, **({} if "layer norms" in name else {"head_dim": 32})}
    truth_model, model = VARIANTS[name](**sizes), VARIANTS[name](**sizes)
    model.to(torch.bfloat16)
    cast_trainable_to_fp32(patch_lora_forward(model))
    truth_model.to(torch.bfloat16).float()
    ways = {"truth": PlainLoss(truth_model), "fast": FastLoss(model), "plain": PlainLoss(model)}
    loss_errors, errors = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for seed in range(8):
        for (called, one), same in zip(model.named_parameters(), truth_model.parameters(), strict=True):
            if one.requires_grad:
                assert one.dtype == torch.float32
                if "lora_A" in called or "lora_B" in called:
                    same.data = torch.randn_like(same) * 0.05
                else:
                    same.data += 0.003 * torch.randn_like(same)
                one.data = same.data.clone()
        rows = with_prefix([example(length, 10 * seed + length) for length in (9, 5, 12, 2)])
        result = {way: step(truth_model if way == "truth" else model, one, rows) for way, one in ways.items()}
        truth, gradients = result["truth"]
        for way, (loss, grads) in result.items():
            loss_errors[way] += float((loss - truth).abs() / truth)
            errors[way] += sum(float((grads[n] - g).square().sum()) for n, g in gradients.items()) ** 0.5
    assert loss_errors["fast"] <= 1.5 * loss_errors["plain"] + 1e-3
    assert errors["fast"] <= 1.5 * errors["plain"]


@pytest.mark.parametrize(
    ("reason", "lora", "changes"),
    [
        ("DoRA on the output head", {"use_dora": True, "target_modules": HEAD}, {}),
        ("q_proj.modules_to_save.default.weight is trained in full", {"modules_to_save": ["q_proj"]}, {}),
        ("an adapter on model.embed_tokens", {"target_modules": ["q_proj", "embed_tokens"]}, UNTIED),
    ],
)
def test_unsupported_variant_returns_the_reason(reason: str, lora: dict[str, Any], changes: dict[str, Any]) -> None:
    lora = {"target_modules": ["v_proj"], **lora}
    assert reason in str(why_not_fast(adapted("llama", lora, **changes)))


COPIED = {
    "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "mlp", "self_attn", "layers.1", "lm_head"],
    "phi": ["v_proj", "fc1", "dense", "input_layernorm"], "gemma3_text": ["down_proj", "q_norm", "embed_tokens"],
    "qwen3_moe": ["gate", "mlp", "o_proj"], "mixtral": ["gate", "mlp"], "qwen3_5_text": ["in_proj_qkv", "out_proj"],
    "gemma4_text": ["per_layer_input_gate", "per_layer_model_projection", "down_proj"],
}  # fmt: skip


@pytest.mark.parametrize(("family", "copied"), [(family, name) for family, names in COPIED.items() for name in names])
def test_loaded_copies_of_modules_are_used(family: str, copied: str) -> None:
    """Nothing of a loaded adapter is trained, and modules that were trained in full are used all the same."""
    untied = UNTIED if copied in ("lm_head", "embed_tokens") else {}
    targets = [{"self_attn": "up_proj", "q_proj": "v_proj"}.get(copied, "q_proj")]
    model = variant(family, {"modules_to_save": [copied], "target_modules": targets}, **untied)().eval()
    model.requires_grad_(False)
    rows, loss = answers((20, 1), (3, 3)), step_for(model)
    with torch.no_grad():
        tuned = PlainLoss(model).token_loss(rows)
        torch.testing.assert_close(loss.token_loss(rows), tuned, rtol=1e-5, atol=0)
        with model.disable_adapter():
            base = PlainLoss(model).token_loss(rows)
            torch.testing.assert_close(loss.token_loss(rows), base, rtol=1e-5, atol=0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
        assert abs(PlainLoss(model).token_loss(rows) - base) > 1e-5  # of the copies alone


def test_head_adapter_dropout_does_not_depend_on_micro_batches() -> None:
    """Sums over the whole batch and over its parts are equal in both steps."""
    model = VARIANTS["adapter on a bent head, dropout"]()
    assert any(isinstance(one, nn.Dropout) for one in model.get_output_embeddings().lora_dropout.values())
    rows = with_prefix(some(weighted=True))
    for make in (PlainLoss, FastLoss):
        loss: Any = make(model)
        whole = step(model, loss, rows)
        parts = [step(model, loss, rows[begin : begin + 2]) for begin in (0, 2)]
        assert_same((parts[0][0] + parts[1][0], {n: parts[0][1][n] + parts[1][1][n] for n in whole[1]}), whole)
