"""The fast step compared with the model's forward: loss and gradients of all adapters, for each family."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Mistral3ForConditionalGeneration, OlmoConfig

from strop.config.schema import LoraSection
from strop.data.types import Example
from strop.engine.step import step_for
from strop.engine.train.eligibility import why_not_fast
from strop.engine.train.fast import FastLoss
from strop.engine.train.packing import MIN_LENGTH_RATIO, Documents, pack, pack_separately
from strop.engine.train.plain import PlainLoss
from strop.machine.probe import probe
from strop.models.families.table import FAMILIES
from strop.models.lora import add_lora
from tests.support.random_models import FAMILY_CONFIGS, WITHIN_OTHERS, adapted, example, tiny, tiny_of
from tests.support.slow import slow_except

Gradients = dict[str, torch.Tensor]


def some(weighted: bool = False) -> list[Example]:
    result = [example(9, 1), example(5, 2), example(12, 3), example(2, 4)]
    if weighted:
        rng = np.random.default_rng(0)
        result = [
            dataclasses.replace(e, weights=(e.weights * rng.choice([0, 0.5, 1, 3], len(e))).astype(np.float32))
            for e in result
        ]
    return result


def with_prefix(examples: list[Example], length: int = 11, seed: int = 99) -> list[Example]:
    prefix = example(length, seed)
    rng = np.random.default_rng(1)
    return [
        Example(
            np.concatenate([prefix.ids, e.ids]),
            np.concatenate([np.r_[0, rng.choice([0, 1, 2], length - 1)], e.weights]).astype(np.float32),
            "f",
            i,
        )
        for i, e in enumerate(examples)
    ]


def with_prefixes(examples: list[Example]) -> list[Example]:
    """Return rows with two prefixes and without one, mixed."""
    groups = zip(with_prefix(examples), with_prefix(examples, 14, 98), examples, strict=True)
    return [one for group in groups for one in group]


def step(model: PeftModel, loss: Any, examples: list[Example]) -> tuple[torch.Tensor, Gradients]:
    model.zero_grad()
    value = getattr(loss, "token_loss", loss)(examples)
    (value * 0.1).backward()
    return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def attentive(model: PeftModel) -> PeftModel:
    """Scale the weights so that attention affects the gradients.

    Otherwise gradients of queries and keys are a millionth of the largest ones, and the error of fp32 (compared with
    fp64) is a ten-thousandth of them.
    """
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "lora_" not in name and "self_attn" in name:
            weight.data.mul_(8)
    return model


GRADIENT_TOLERANCE = 1.5e-4  # one variant measured 1.02e-4 on Xeons, with AMX and without


def assert_same(actual: tuple[torch.Tensor, Gradients], expected: tuple[torch.Tensor, Gradients]) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=0)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert grad.norm() > 0, name
        assert (actual[1][name] - grad).norm() <= GRADIENT_TOLERANCE * grad.norm(), name


def test_each_family_has_a_parity_test() -> None:
    assert FAMILY_CONFIGS.keys() | WITHIN_OTHERS == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_each_family_equals_the_plain_step(family: str) -> None:
    model = adapted(family)
    for examples in (some(), some(weighted=True), with_prefix(some(weighted=True)), with_prefixes(some(weighted=True))):
        expected = step(model, PlainLoss(model), examples)
        assert_same(step(model, FastLoss(model), examples), expected)
        assert_same(step(model, FastLoss(model, checkpoint_layers=1), examples), expected)


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {}),
        ({"target_modules": ["down_proj"]}, {}),
        ({"target_modules": ["up_proj", "k_proj"], "layers_to_transform": [1]}, {}),
        ({"use_rslora": True, "rank_pattern": {"k_proj": 1}}, {}),
        ({}, {"tie_word_embeddings": True}),
        ({}, {"attention_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
        ({}, {"hidden_act": "gelu"}),
        ({"bias": "all"}, {"attention_bias": True, "mlp_bias": True}),
        ({"bias": "all", "target_modules": ["q_proj", "up_proj"]}, {"attention_bias": True, "mlp_bias": True}),
        ({"bias": "lora_only", "target_modules": ["v_proj", "o_proj"]}, {"attention_bias": True}),
        ({"bias": "lora_only", "use_dora": True}, {"attention_bias": True}),
        ({"use_dora": True}, {}),
        ({"use_dora": True, "target_modules": ["v_proj", "o_proj", "up_proj"]}, {"attention_bias": True}),
    ],
    ids=[
        "attention",
        "down",
        "last layer",
        "rslora",
        "tied",
        "bias",
        "activation",
        "biases",
        "few adapters and biases",
        "biases beside adapters",
        "dora and trained biases",
        "dora",
        "dora and biases",
    ],
)
def test_lora_variant_equals_the_plain_step(lora: dict[str, Any], changes: dict[str, Any]) -> None:
    model = attentive(adapted(LlamaConfig, lora, **changes))
    expected = step(model, PlainLoss(model), some())
    assert_same(step(model, FastLoss(model), some()), expected)
    assert_same(step(model, FastLoss(model, checkpoint_layers=1), some()), expected)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"sliding_window": 4}),
        ("olmoe", {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2}),
        ("mistral", {"layer_types": ["full_attention"] * 2}),
        ("mixtral", {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}),
        ("gpt_neox", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
)
def test_config_fields_that_the_family_ignores_change_nothing(family: str, changes: dict[str, Any]) -> None:
    model = attentive(adapted(family, **changes))
    assert_same(step(model, FastLoss(model), some()), step(model, PlainLoss(model), some()))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_5_text"])
def test_dropout_inside_the_models_modules_equals_the_plain_step(family: str) -> None:
    """Covers attention, shared experts and mixers whose experts have no adapter: masks do not depend on the
    micro-batches.
    """
    base, targets = tiny_of(family), r".*\.(q_proj|o_proj|in_proj_qkv|out_proj|shared_experts?\.(gate|up|down)_proj)"
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=targets, lora_dropout=0.3)).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    plain, fast = PlainLoss(model), FastLoss(model)
    for way in (plain, fast):
        way.masks.begin(7, 3)
    rows = some()
    expected, result = step(model, plain, rows), step(model, fast, rows)
    assert_same(result, expected)
    assert_same(step(model, FastLoss(model, checkpoint_layers=2), rows), expected)
    parts = [step(model, fast, [row]) for row in rows]
    assert_same(result, (sum(p[0] for p in parts), {n: sum(p[1][n] for p in parts) for n in result[1]}))
    model.eval()
    assert (step(model, fast, rows)[0] - result[0]).abs() > 1e-3


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.mixer])
def test_mixer_processes_each_document_alone(family: str) -> None:
    model = adapted(family)
    fast = FastLoss(model)
    first, second = example(9, 1), example(5, 2)
    silent = dataclasses.replace(second, weights=np.zeros_like(second.weights))
    other = dataclasses.replace(silent, ids=(silent.ids + 7) % 97)
    expected = step(model, fast, [first])
    for beside in (silent, other):
        value, gradients = step(model, fast, [beside, first])
        torch.testing.assert_close(value, expected[0])
        torch.testing.assert_close(gradients, expected[1], rtol=1e-4, atol=1e-5)
    parts = f"{FAMILIES[family].mixer} and experts" if FAMILIES[family].moe else FAMILIES[family].mixer
    assert step_for(model).why == f"{parts} by the model's own modules"


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_bf16_checkpoint_uses_the_fast_step(family: str, tmp_path: Path) -> None:
    """In bf16, some families keep their routers in fp32."""
    tiny_of(family).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = add_lora(base, LoraSection(r=2, alpha=4), None)
    assert why_not_fast(model) is None
    assert step(model, FastLoss(model), some())[0].isfinite()


def test_discarded_forward_frees_its_activations() -> None:
    """Later layers of Gemma 4 use keys of earlier ones, which could create reference cycles with checkpointing."""
    model = adapted("gemma4_text")
    fast, seen = FastLoss(model, checkpoint_layers=4), []
    through = fast._compute_layer

    def watched(layer: Any, hidden: torch.Tensor, *rest: Any) -> Any:
        seen.append(weakref.ref(rest[0]))
        return through(layer, hidden, *rest)

    fast._compute_layer = watched  # type: ignore[method-assign]
    fast.token_loss(some())
    gc.collect()
    assert len(seen) == 4 and not any(one() for one in seen)


@pytest.mark.parametrize(("lengths", "groups"), [((40, 38, 33, 9, 8), 2), ((5,), 1), ((64, 50, 30, 20), 4)])
def test_documents_are_padded_in_groups_of_similar_length(lengths: tuple[int, ...], groups: int) -> None:
    starts = np.cumsum([0, *lengths])[:-1]
    spans = np.array([(start, own, 0) for start, own in zip(starts, lengths, strict=True)])
    rows, places = Documents(spans, sum(lengths), torch.device("cpu")).padded_groups
    assert len(rows) == groups
    assert sum(one.numel() for one in rows) <= sum(lengths) / MIN_LENGTH_RATIO
    whole = torch.cat([one.flatten() for one in rows])
    assert torch.equal(whole[places], torch.arange(sum(lengths)))


def test_expert_balancing_loss_uses_the_plain_step() -> None:
    model = adapted("mixtral", output_router_logits=True)
    assert "balances experts" in str(why_not_fast(model))


NEW_TOKENS = {
    "tied": ("llama", {"tie_word_embeddings": True}, ["embed_tokens"]),
    "untied": ("llama", {"tie_word_embeddings": False}, ["embed_tokens", "lm_head"]),
    "scaled and bent": ("gemma2", {"tie_word_embeddings": True}, ["embed_tokens"]),
    "embedding multiplied": ("granite", {"tie_word_embeddings": True}, ["embed_tokens"]),
    "norm of the embedding": ("nanochat", {"tie_word_embeddings": False}, ["embed_tokens", "lm_head"]),
}


def with_new_tokens(case: str) -> PeftModel:
    family, changes, modules = NEW_TOKENS[case]
    ids = sorted({96, *(int(row.ids[1]) for row in some())})  # 96 may not be in the rows
    model = adapted(family, {"trainable_token_indices": dict.fromkeys(modules, ids)}, **changes)
    for name, rows in model.named_parameters():
        if "trainable_tokens_delta" in name:
            rows.data += torch.randn_like(rows)
    return model


@pytest.mark.parametrize("case", NEW_TOKENS)
def test_new_tokens_equal_the_plain_step(case: str) -> None:
    model = with_new_tokens(case)
    assert why_not_fast(model) is None
    for examples in (some(), with_prefix(some()), with_prefixes(some())):
        plain, fast = PlainLoss(model), FastLoss(model)
        expected = step(model, plain, examples)
        assert sum("trainable_tokens_delta" in name for name in expected[1]) == len(NEW_TOKENS[case][2])
        assert_same(step(model, fast, examples), expected)
        assert_same(step(model, FastLoss(model, checkpoint_layers=1), examples), expected)
        upstream = torch.linspace(-1, 2, len(examples), dtype=torch.float64)
        fast_sum, plain_sum = (
            step(model, lambda rows, one=one, up=upstream: (one.log_probs(rows) * up).sum().float(), examples)
            for one in (fast, plain)
        )
        assert_same(fast_sum, plain_sum)
        with torch.no_grad():
            torch.testing.assert_close(fast.token_loss(examples), expected[0], rtol=1e-5, atol=0)
            with model.disable_adapter():
                torch.testing.assert_close(fast.token_loss(examples), plain.token_loss(examples), rtol=1e-5, atol=0)


def test_new_tokens_with_a_biased_head_are_unsupported() -> None:
    indices = {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}}
    assert "bias" in str(why_not_fast(adapted("phi", indices, tie_word_embeddings=False)))


def test_packed_batch_equals_single_examples_and_unshared_prefix() -> None:
    model = adapted()
    examples = with_prefix(some(weighted=True))
    fast, unshared = FastLoss(model), FastLoss(model, prefix_sharing=False)
    together = step(model, fast, examples)
    parts = [step(model, fast, [one]) for one in examples]
    one_by_one = sum(p[0] for p in parts), {n: sum(p[1][n] for p in parts) for n in together[1]}
    assert_same(together, one_by_one)
    assert_same(together, step(model, unshared, examples))


def test_groups_of_rows_compute_each_prefix_once() -> None:
    packed = pack(with_prefixes(some()), prefix_sharing=True, device=torch.device("cpu"))
    assert len(packed.ids) == 3 * sum(map(len, some())) + 11 + 14
    assert sorted(end for end, _ in packed.ends) == list(range(12))


@pytest.mark.parametrize("reverse", [False, True])
def test_labels_in_another_order_than_their_rows(reverse: bool) -> None:
    """The last token of the shared prefix predicts a label of the second row only, so its label is not the first.

    As many labels as rows were taken for labels in the order of rows: in multi-turn rows with weights, and in rows of
    one prompt of which one has soft labels.
    """
    first, second = with_prefix([example(7, 1), example(6, 2)])
    first.weights[:], second.weights[:] = 0, 0
    first.weights[14:], second.weights[11:] = 1, 1
    model, rows = adapted(), [second, first] if reverse else [first, second]
    packed = pack(rows, prefix_sharing=True, device=torch.device("cpu"))
    assert len(packed.rows) == len(packed.label_rows) and packed.in_row_order is reverse
    expected = step(model, PlainLoss(model), rows)
    assert_same(step(model, FastLoss(model), rows), expected)
    head = adapted(lora={"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.4}).train()
    masked = []
    for sharing in (False, True):
        loss = FastLoss(head, prefix_sharing=sharing)
        loss.masks.begin(5, 7)
        masked.append(step(head, loss, rows))
    assert_same(*masked)


@pytest.mark.parametrize("sharing", [False, True])
def test_no_document_leaks_into_another(sharing: bool) -> None:
    """Only the first document is supervised; tokens of another one must not change a bit."""
    model = adapted()
    fast = FastLoss(model, prefix_sharing=sharing)
    first, *others = with_prefix([example(9, 1), example(9, 2), example(5, 3)])
    silent = [dataclasses.replace(other, weights=np.zeros_like(other.weights)) for other in others]
    ids = silent[0].ids.copy()
    ids[12:] = (ids[12:] + 7) % 97
    changed = [dataclasses.replace(silent[0], ids=ids), silent[1]]
    before, after = step(model, fast, [first, *silent]), step(model, fast, [first, *changed])
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


@pytest.mark.parametrize("head_dim", [8, 32])  # 32: tiled attention, on CPUs that support it
def test_bf16_error_is_close_to_the_plain_steps(head_dim: int) -> None:
    """Errors of eight batches are summed, because those of a single batch vary."""
    truth_model, model = adapted(head_dim=head_dim), adapted(head_dim=head_dim)
    model.get_base_model().to(torch.bfloat16)
    truth_model.get_base_model().to(torch.bfloat16).float()  # the same rounded base weights
    for parameter in truth_model.parameters():
        parameter.data = parameter.data.float()
    ways = {"truth": PlainLoss(truth_model), "fast": FastLoss(model), "plain": PlainLoss(model)}
    loss_errors, errors = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for seed in range(8):
        for one, same in zip(model.parameters(), truth_model.parameters(), strict=True):
            if one.requires_grad:  # other adapters each time; their output is a fourth of the base's
                same.data = torch.randn_like(same) * 0.05
                one.data = same.data.clone()
        rows = with_prefix([example(length, 10 * seed + length) for length in (9, 5, 12, 2)])
        result = {name: step(truth_model if name == "truth" else model, way, rows) for name, way in ways.items()}
        truth, gradients = result["truth"]
        for name, (loss, grads) in result.items():
            loss_errors[name] += float((loss - truth).abs() / truth)
            errors[name] += sum(float((grads[n] - g).square().sum()) for n, g in gradients.items()) ** 0.5
    assert loss_errors["fast"] <= 1.5 * loss_errors["plain"] + 1e-3
    assert errors["fast"] <= 1.2 * errors["plain"]


def test_evaluation_equals_training_and_respects_disabled_adapters() -> None:
    model = adapted()
    fast, plain = FastLoss(model), PlainLoss(model)
    trained = step(model, fast, some())[0]
    with torch.no_grad():
        torch.testing.assert_close(fast.token_loss(some()), trained, rtol=1e-6, atol=0)
        with model.disable_adapter():
            base = fast.token_loss(some())
            torch.testing.assert_close(base, plain.token_loss(some()), rtol=1e-5, atol=0)
    assert (base - fast.token_loss(some()).detach()).abs() > 1e-3


def answers(*prompts: tuple[int, int], alike: int = 0) -> list[Example]:
    """Return two answers for each prompt of (length, seed). alike: number of initial tokens that both share."""
    results = []
    for length, seed in prompts:
        prompt, common = example(length, seed).ids, example(2 + alike, seed + 50).ids[2:]
        for side in range(2):
            own = example(5 + 3 * side, 10 * seed + side + 100).ids
            ids = np.concatenate([prompt, common, own])
            results.append(Example(ids, (np.arange(len(ids)) >= length).astype(np.float32), "f", seed))
    return results


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi"])
@pytest.mark.parametrize("checkpoint_layers", [0, 1])
def test_log_probs_of_completions_equal_the_plain_step(family: str, checkpoint_layers: int) -> None:
    """Prompts are shared by two and four answers, one is too short to share, and some answers begin with the same
    tokens.
    """
    model = adapted(family)
    rows = [*answers((20, 1), (12, 2), (3, 3), (9, 4), alike=3), *answers((20, 1))]
    upstream = torch.linspace(-1, 2, len(rows), dtype=torch.float64)

    def loss(one: Any) -> Any:
        return lambda examples: (one.log_probs(examples) * upstream).sum().float()

    fast = FastLoss(model, checkpoint_layers=checkpoint_layers)
    expected = step(model, loss(PlainLoss(model)), rows)
    assert_same(step(model, loss(fast), rows), expected)
    assert_same(step(model, loss(FastLoss(model, prefix_sharing=False)), rows), expected)
    alone = torch.cat([fast.log_probs([row]) for row in rows])
    torch.testing.assert_close(fast.log_probs(rows), alone, rtol=1e-5, atol=1e-5)
    for row, log_prob in zip(rows, alone, strict=True):
        torch.testing.assert_close(-fast.token_loss([row]).double(), log_prob, rtol=1e-6, atol=0)


def test_shared_prompts_are_packed_once() -> None:
    packed = pack_separately(answers((20, 1), (12, 2)), prefix_sharing=True, device=torch.device("cpu"))
    assert len(packed.ids) == 20 + 5 + 8 + 12 + 5 + 8
    assert packed.label_examples is not None and packed.label_examples.bincount().tolist() == [5, 8, 5, 8]
    keys = packed.documents.varlen.keys
    assert keys is not None and keys[:20].tolist() == list(range(20)) and keys[20:40].tolist() == list(range(20))


@pytest.mark.skipif("avx512_bf16" not in probe().vector, reason="this CPU has no AVX512-BF16")
def test_several_shared_prompts_in_tiled_attention() -> None:
    """In bf16, log-probabilities and gradients are the same with shared prompts as with a prompt for each answer."""
    model = adapted("llama", head_dim=32).to(torch.bfloat16)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    rows = answers((20, 1), (33, 2), (9, 4))
    results = []
    for sharing in (True, False):
        fast = FastLoss(model, prefix_sharing=sharing)
        results.append(step(model, lambda examples, fast=fast: fast.log_probs(examples).sum().float(), rows))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=0)
    for name, grad in results[1][1].items():
        assert (results[0][1][name] - grad).norm() <= 0.03 * grad.norm(), name


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_unsupervised_batch_has_zero_loss_and_gradients(family: str) -> None:
    model = adapted(family)
    silent = [dataclasses.replace(e, weights=np.zeros_like(e.weights)) for e in some()]
    loss, grads = step(model, FastLoss(model), silent)
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


def test_model_still_generates_and_saves(tmp_path: Path) -> None:
    model, untouched = adapted(), adapted()
    FastLoss(model)
    fast = FastLoss(model)  # twice: the weights are already contiguous
    ids = torch.arange(1, 6)[None]
    model.eval(), untouched.eval()
    assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=ids, **options), untouched.generate(input_ids=ids, **options))
    model.save_pretrained(tmp_path / "adapter")
    base = model.get_base_model()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in base.parameters())  # no weight is stored twice
    loss = step(model, fast, some())[0]
    merged = model.merge_and_unload()
    torch.testing.assert_close(PlainLoss(merged).token_loss(some()).detach(), loss, rtol=1e-5, atol=0)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(input_ids=ids).logits, merged(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("reason", "build"),
    [
        ("no peft adapter", lambda: tiny().requires_grad_(False)),
        ("olmo is not in the table", lambda: adapted(OlmoConfig)),
        (
            "variant of LoRA",
            lambda: adapted(LlamaConfig, {"lora_bias": True, "target_modules": ["q_proj"]}, attention_bias=True),
        ),
        ("norms of q and k", lambda: adapted("cohere", use_qk_norm=True)),
        ("hidden_dropout", lambda: adapted("gpt_neox", hidden_dropout=0.1)),
        ("attention_dropout", lambda: adapted(attention_dropout=0.1)),
        ("rotary", lambda: adapted(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
        ("float8", lambda: adapted().to(torch.float8_e4m3fn)),
    ],
)
def test_unsupported_model_returns_the_reason(reason: str, build: Any) -> None:
    result = why_not_fast(build())
    assert result is not None
    assert reason in result


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("stablelm", {"use_parallel_residual": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("glm", {"partial_rotary_factor": 0.5}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
        ("olmo2", {"num_key_value_heads": 2}),
    ],
)
def test_family_options_equal_the_plain_step(family: str, changes: dict[str, Any]) -> None:
    model = adapted(family, **changes)
    assert_same(step(model, FastLoss(model), some()), step(model, PlainLoss(model), some()))


@pytest.mark.parametrize("family", ["smollm3", "cohere2", "gpt_neox", "hunyuan_v1_dense", "olmo2"])
def test_rope_variants_in_tiled_attention_equal_the_plain_step(family: str) -> None:
    """In bf16 with heads of 32, the CPU's tiled attention, if supported, is within the rounding of bf16."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, **({} if family == "gpt_neox" else {"head_dim": 32})}
    model = adapted(family, **sizes)
    model.get_base_model().to(torch.bfloat16)
    for weight in model.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
    with torch.no_grad():
        result, expected = (make(model).token_loss(with_prefix(some())) for make in (FastLoss, PlainLoss))
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0)


def test_text_part_of_a_multimodal_model_equals_the_plain_step() -> None:
    heads = {"num_attention_heads": 2, "head_dim": 8, "hidden_size": 16, "intermediate_size": 24}
    text = {**heads, "model_type": "mistral", "vocab_size": 97, "num_hidden_layers": 2, "num_key_value_heads": 1}
    vision = {**heads, "model_type": "pixtral", "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    config = AutoConfig.for_model("mistral3", text_config=text, vision_config=vision, image_token_index=0)
    torch.manual_seed(0)
    targets = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    model = get_peft_model(Mistral3ForConditionalGeneration(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    assert why_not_fast(model) is None
    assert_same(step(model, FastLoss(model), some()), step(model, PlainLoss(model), some()))


def assert_same_trajectory(model_of: Callable[[], PeftModel], steps: int) -> None:
    """Check optimizer steps in fp32: losses within 1e-4 of the plain step, trained weights at the end within 1e-3.

    model_of: returns the same model each time.
    """
    runs = []
    for make in (PlainLoss, FastLoss):
        model = model_of()
        loss: Any = make(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for i in range(steps):
            loss.masks.begin(0, i)
            examples = [example(3 + (i * 7 + j * 5) % 11, 100 * i + j) for j in range(3)]
            value = loss.token_loss(with_prefix(examples) if i % 2 else examples) / 20
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        runs.append((losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}))
    (expected, weights), (result, own) = runs
    assert result == pytest.approx(expected, rel=1e-4)
    for name, weight in weights.items():
        assert (own[name] - weight).norm() <= 1e-3 * weight.norm(), name


@pytest.mark.parametrize("family", slow_except(FAMILY_CONFIGS, ("llama", "gemma4_text", "qwen3_moe")))
def test_training_trajectory_equals_the_plain_step(family: str) -> None:
    def seeded() -> PeftModel:
        torch.manual_seed(0)
        return adapted(family)

    assert_same_trajectory(seeded, 50)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 8), (torch.float32, 8), (torch.bfloat16, 32)])
def test_saved_activations_match_the_memory_formula(dtype: torch.dtype, head_dim: int) -> None:
    """A token and layer saves (2 h + 2 q + 2 kv + 2 I + 7 r) elements and the attention probabilities.

    Tiled attention saves an fp32 value per head instead of the probabilities, and the output of the last layer's
    attention. Nothing is saved twice.
    """
    model = adapted(head_dim=head_dim)
    model.get_base_model().to(dtype)
    fast = FastLoss(model)

    def saved(lengths: list[int]) -> int:
        results: dict[tuple[int, int], int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if x.is_floating_point() and x.data_ptr() not in weights:
                results[x.data_ptr(), x.numel()] = x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            value = fast.token_loss([example(length, i) for i, length in enumerate(lengths)])
        del value
        return sum(results.values())

    weights = {p.data_ptr() for p in model.parameters()}
    config: Any = model.get_base_model().config
    h, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size = config.head_dim
    q, kv = heads * size, config.num_key_value_heads * size
    element = torch.empty((), dtype=dtype).element_size()
    # In the difference of two batches, memory cancels that does not grow with the number of documents (adapters,
    # angles) or is needed for supervised rows only (the last layer after its attention).
    more, layers = saved([16] * 6) - saved([16] * 2), config.num_hidden_layers
    tiled = dtype == torch.bfloat16 and probe().has_tiled_attention(size)
    r = 16 if tiled else 3
    attention_elements = q * element / layers + 4 * heads if tiled else heads * 16 * element
    a_token = (2 * h + 2 * q + 2 * kv + 2 * inner + 7 * r) * element + attention_elements
    assert more == pytest.approx(4 * 16 * layers * a_token, rel=0.15)
