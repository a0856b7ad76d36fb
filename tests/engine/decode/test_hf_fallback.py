"""The fallback through transformers: which families it can batch, and its cache of prefixes."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from strop.engine.decode import generate
from strop.engine.decode.hf_cache import PrefixCache
from strop.engine.decode.hf_fallback import HfDecoder, check_batching, hf_generate
from strop.engine.decode.sampling import Sampling
from strop.errors import ModelError
from tests.support import tiny_families
from tests.support.random_models import tiny


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
        ("gpt_neo", "its windows are computed"),
        ("mpt", "its distances are computed"),
    ],
)
def test_families_that_count_cache_positions_are_rejected(kind: str, message: str) -> None:
    model = tiny_families.build(kind)
    with pytest.raises(ModelError, match=message):
        check_batching(HfDecoder(model, keep=100), model)


@pytest.mark.parametrize("mixed", [False, True])
def test_prompts_of_a_step_are_sampled_together_on_a_gpu(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of completions in a padded batch are those of each prompt with its completion alone."""
    model = tiny().eval()
    batches = list[int]()

    def counted(model: Any, texts: Any, *args: Any, **options: Any) -> Any:
        batches.append(len(texts))
        return hf_generate(model, texts, *args, **options)

    monkeypatch.setattr(generate, "hf_generate", counted)
    monkeypatch.setattr(generate, "MAX_SEQUENCES", 5)
    monkeypatch.setattr(generate, "why_decoder_unsupported", lambda model: "on a GPU")
    assert not generate._mixes_prompts(model)  # on a CPU
    monkeypatch.setattr(generate, "_mixes_prompts", lambda model: mixed)
    prompts = [np.arange(3, 3 + length, dtype=np.int32) for length in (4, 9, 6)]
    seeds = [[1, 2], [3, 4], [5, 6]]
    groups = generate.sample_completions(model, prompts, seeds, [2], 5)
    assert batches == ([4, 2] if mixed else [2, 2, 2]) and [len(group) for group in groups] == [2, 2, 2]
    again = generate.sample_completions(model, prompts, seeds, [2], 5)
    for prompt, group, same in zip(prompts, groups, again, strict=True):
        for completion, repeated in zip(group, same, strict=True):
            assert np.array_equal(completion.ids, repeated.ids) and 1 <= len(completion.ids) <= 5
            ids = torch.from_numpy(np.concatenate([prompt, completion.ids]).astype(np.int64))
            with torch.no_grad():
                logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
            expected = logits.float().log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].numpy()
            assert np.allclose(completion.log_probs, expected, atol=1e-5)


def test_a_batch_without_enough_memory_is_generated_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = tiny().eval(), list[int]()

    def limited(model: Any, texts: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(texts))
        if len(texts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return hf_generate(model, texts, *args, **options)

    prompts = [np.arange(3, 8 + row, dtype=np.int32) for row in range(5)]
    options: Any = {"stop_ids": [2], "max_new_tokens": 4, "pad_id": 2, "with_log_probs": True}
    alone = [hf_generate(model, [prompt], Sampling(0.0), **options)[0][0] for prompt in prompts]
    monkeypatch.setattr(generate, "hf_generate", limited)
    tokens, log_probs = generate._hf_generate_in_halves(model, prompts, Sampling(0.0), **options)
    assert sizes == [5, 2, 3, 1, 2] and [row[:4] for row in tokens] == alone and len(log_probs) == 5
    with pytest.raises(RuntimeError, match="another error"):
        monkeypatch.setattr(generate, "hf_generate", Mock(side_effect=RuntimeError("another error")))
        generate._hf_generate_in_halves(model, prompts, Sampling(0.0), **options)


def test_layers_with_other_state_are_rejected() -> None:
    model = tiny().eval()
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        HfDecoder(model, keep=0)


def test_longest_cached_prefix_is_found() -> None:
    cache = PrefixCache(100)
    ids = np.arange(60, dtype=np.int32)

    def kv(length: int) -> Any:
        return [(torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 2))]

    cache.add("a", ids[:40], kv(40))
    cache.add("a", ids, kv(60))  # replaces its own prefix
    assert len(cache._entries) == 1
    assert cache.find("a", np.append(ids[:50], np.int32(999)))[0][0].shape[2] == 50
    assert cache.find("a", ids)[0][0].shape[2] == 59  # the last token must be processed
    assert cache.find(None, ids) == [] and cache.find("a", ids[:20]) == []
    cache.add(None, ids, kv(60))
    assert cache.find("a", ids) == []  # evicted: 120 tokens exceed the capacity
