"""Prompts of different lengths in a batch: each has the answer that it has alone, in all families."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from strop.engine.decode.generate import _generate_with_hf, _resample_turns
from strop.engine.decode.hf_fallback import batch_keys, hf_generate
from strop.engine.decode.sampling import Sampling
from tests.support import tiny_families

CHUNKS = ("chunk_size", "mamba_chunk_size", "block_size")  # of recurrent layers, which the prompts should exceed
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 6.0],
}  # fmt: skip
random = np.random.default_rng(0)
PROMPTS = [random.integers(5, 400, length).astype(np.int32) for length in (31, 90, 47, 31)]
GREEDY = Sampling(temperature=0.0)


def build(kind: str, **fields: Any) -> Any:
    config = tiny_families.config_of(kind)
    for name, value in {**{name: 16 for name in CHUNKS if hasattr(config, name)}, **fields}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(3 if weight.dim() > 1 else 1)
    return model


def answer(model: Any, prompts: list[Any]) -> list[list[int]]:
    return hf_generate(model, prompts, GREEDY, stop_ids=[499], max_new_tokens=10, pad_id=3)[0]


def is_changed(model: Any) -> bool:
    together = answer(model, PROMPTS)
    alone = [answer(model, [prompt])[0] for prompt in PROMPTS]
    return any(a[: len(b)] != b[: len(a)] for a, b in zip(together, alone, strict=True))


CHANGED: dict[str, dict[str, Any]] = {
    "rwkv": {}, "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "phi3": {"rope_parameters": LONGROPE, "max_position_embeddings": 256, "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGED)
def test_prompts_have_the_answers_that_they_have_alone(kind: str) -> None:
    model = build(kind, **CHANGED[kind])
    assert is_changed(model), "the batch changes nothing, so this test would pass anyway"
    tokenizer: Any = SimpleNamespace(pad_token_id=3, decode=lambda ids, **_: " ".join(map(str, ids)))
    completions = _generate_with_hf(model, tokenizer, PROMPTS, [499], [10] * 4, GREEDY, None, None)
    alone = [answer(model, [prompt])[0] for prompt in PROMPTS]
    assert [[int(word) for word in one.text.split()] for one in completions] == alone
    turns: dict[int, list[int]] = {}
    respond: Any = SimpleNamespace(
        begin=lambda number, completion: turns.__setitem__(number, completion.ids.tolist()),
        collect=lambda wait: dict.fromkeys(range(4)),
    )
    _resample_turns(model, PROMPTS, [0] * 4, [499], respond, 10, 200, True, None)
    assert [turns[number] for number in range(4)] == alone


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(tiny_families.text_types()))
def test_families_are_listed_if_a_batch_changes_their_answers(kind: str) -> None:
    try:
        model = build(kind)
        found = is_changed(model)
    except Exception as error:  # of transformers or of this tiny config: the family cannot answer at all
        pytest.skip(f"{type(error).__name__}: {error}")
    if kind not in ("bitnet", "minimax"):  # rounding of integers, and a tiny config without linear layers
        assert found == any(batch_keys(model, PROMPTS))
