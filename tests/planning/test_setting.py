"""What the plan knows of a recipe on a model is what training finds."""

from __future__ import annotations

import pytest

from strop.config.load import resolve
from strop.engine.step import step_for
from strop.model.measured import shape_of
from strop.planning.setting import Setting
from tests.support.random_models import FAMILY_CONFIGS, adapted, tiny_of


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_biases_are_trained_where_the_model_has_any(family: str, bias: str) -> None:
    """A model without them has nothing more to train, and keeps the fast step."""
    model = adapted(family, {"bias": bias})
    config = model.get_base_model().config.to_dict()
    options = {"lora.r": 3, "lora.bias": bias, "model.device": "cpu", "model.dtype": "fp32"}
    recipe = resolve(None, {"model": "m", "data": "d", **options}).recipe
    found = Setting.of(recipe, shape_of(config, config, tiny_of(family)))
    assert found.adapter_weights == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.step == step_for(model).name
