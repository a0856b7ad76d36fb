"""Families whose sequences affect each other in a batch are rejected."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from strop.engine.decode.hf_fallback import HfDecoder, check_batching
from strop.errors import ModelError
from tests.support import tiny_families


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma3_text", "falcon", "gpt2"])
def test_families_that_use_position_ids_pass(kind: str) -> None:
    model = tiny_families.build(kind)
    check_batching(HfDecoder(model, keep=100), model)


def test_base_is_checked_without_its_adapter() -> None:
    model = get_peft_model(
        tiny_families.build("mixtral"), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    ).eval()
    check_batching(HfDecoder(model, keep=100), model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("roberta", "differ from each alone"),
        ("bart", "differ from each alone"),
        ("bloom", "in a batch: ValueError"),
        ("gpt_neo", "its windows are counted"),
        ("mpt", "its distances are counted"),
    ],
)
def test_families_that_count_cache_positions_are_rejected(kind: str, message: str) -> None:
    model = tiny_families.build(kind)
    with pytest.raises(ModelError, match=message):
        check_batching(HfDecoder(model, keep=100), model)
