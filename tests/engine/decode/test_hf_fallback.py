"""A family whose answers would be wrong side by side is not served."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from strop.engine.decode.hf_fallback import HfDecoder, prove
from strop.errors import ModelError
from tests.support import tiny_families


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma3_text", "falcon", "gpt2"])
def test_families_that_go_by_positions_are_served(kind: str) -> None:
    model = tiny_families.build(kind)
    prove(HfDecoder(model, keep=100), model)


def test_an_adapter_changes_nothing() -> None:
    model = get_peft_model(
        tiny_families.build("mixtral"), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    ).eval()
    prove(HfDecoder(model, keep=100), model)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("roberta", "differ from those alone"),
        ("bart", "differ from those alone"),
        ("bloom", "side by side: ValueError"),
        ("gpt_neo", "its windows are counted by places"),
        ("mpt", "its distances are counted by places"),
    ],
)
def test_families_that_go_by_places_are_not(kind: str, why: str) -> None:
    model = tiny_families.build(kind)
    with pytest.raises(ModelError, match=why):
        prove(HfDecoder(model, keep=100), model)
