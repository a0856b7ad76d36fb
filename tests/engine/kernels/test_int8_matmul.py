"""The fast step with frozen weights multiplied in 8-bit integers, against itself in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig

from strop.engine.train.fast import FastLoss
from strop.engine.train.peft_modules import base_of
from strop.machine.probe import probe
from strop.models.quantize import QuantizedLinear, quantize_weight
from tests.engine.train.test_fast import NEW_TOKENS, answers, some, step, with_new_tokens
from tests.support.random_models import FAMILY_CONFIGS, adapted

pytestmark = pytest.mark.skipif(not probe().has_int8_dot, reason="this CPU has no VNNI")
LOSS, GRADIENT = 1e-5, 3e-3  # relative; the gradient of each weight by its norm


def assert_near(model: PeftModel, **how: Any) -> None:
    expected, found = (
        step(model, FastLoss(model, **how), some()),
        step(model, FastLoss(model, integers=True, **how), some()),
    )
    torch.testing.assert_close(found[0], expected[0], rtol=LOSS, atol=0)
    same = [torch.equal(found[1][name], grad) for name, grad in expected[1].items()]
    assert not all(same), "these are the products in fp32"
    whole = torch.cat([grad.flatten() for grad in expected[1].values()]).norm()
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= GRADIENT * grad.norm() + 1e-5 * whole, name


def quantized(model: PeftModel) -> PeftModel:
    """All adapted layers in 8 bit."""
    for module in [*model.modules()]:
        base = base_of(module)
        if hasattr(module, "lora_A") and type(base) is nn.Linear:
            layer = QuantizedLinear(base, "int8", torch.float32)
            layer.load_packed(quantize_weight(base.weight.data, "int8"))
            module.base_layer = layer
    return model


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_family_is_near_to_fp32(family: str) -> None:
    model = adapted(family)
    assert_near(model)


@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.2}, {"bias": "all"}, {"target_modules": ["v_proj", "o_proj"]}])
def test_base_in_8_bit_is_multiplied_as_it_is_held(lora: dict[str, Any]) -> None:
    model = quantized(adapted(LlamaConfig, lora, attention_bias=True))
    held = [base_of(module).weight for module in model.modules() if hasattr(module, "lora_A")]
    values = [weight.clone() for weight in held]
    assert_near(model)
    assert_near(model, checkpoint_layers=1)
    now = [base_of(module).weight for module in model.modules() if hasattr(module, "lora_A")]
    assert all(torch.equal(a, b) for a, b in zip(now, values, strict=True))


@pytest.mark.parametrize("case", NEW_TOKENS)
def test_new_tokens(case: str) -> None:
    assert_near(with_new_tokens(case))


def test_log_probs_of_answers() -> None:
    model = adapted(LlamaConfig, {})
    rows = answers((5, 2), (7, 3), alike=2)
    found, expected = (FastLoss(model, integers=yes).log_probs(rows) for yes in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
